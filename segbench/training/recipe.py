"""Recipes: how a model is trained, as data."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from segbench.data.resizing import MAX_PIXELS
from segbench.errors import ContentError, UnknownNameError, UsageError, unknown_name
from segbench.schemas import strict_yaml

DATASET = "[a-z0-9][a-z0-9_]{0,79}(/[a-z0-9][a-z0-9_-]{0,39})?"
IDENTIFIER = "[a-z0-9][a-z0-9_]{0,79}"  # as the schema of cards has it; the id names the files that training writes
SHORT: Mapping[str, str] = {"lr": "learning_rate"}  # what may also be written in overrides
MAX_NUMBER = 2**63 - 1  # the largest that a card holds
MAX_SEED = 2**32 - 1
MIN_SIDE = 32  # of a training image in pixels: the last feature map is that much smaller
MAX_SIDE = math.isqrt(MAX_PIXELS)  # of a square that is no larger than a picture may be
MAX_EXTENDS = 5  # recipes that build on each other

SEGMENTATION, CLASSIFICATION = "segmentation", "classification"
CHOICES: Mapping[str, tuple[str, ...]] = {
    "task": (SEGMENTATION, CLASSIFICATION),
    "init": ("random", "clean", "robust"),
    "backbone_normalization": ("none", "imagenet", "inception"),
    "optimizer": ("adamw", "sgd"),
    "precision": ("fp32", "bf16"),
}


@dataclass(frozen=True)
class Recipe:
    """One training run. The settings of the paper are those of Croce, Singh, Hein, ECCV 2024, Table 4.

    Attributes:
        id: the model's id, ``<method>_<backbone>_<dataset>``.
        title: one line for people.
        dataset: data set id.
        architecture: name in `segbench.models.architectures`.
        architecture_arguments: its keyword arguments without ``num_classes``.
        epochs: passes over the training split.
        batch_size: images an optimiser step, over all processes and all parts of `accumulation`.
        learning_rate: the peak, of the backbone; see `head_learning_rate_factor`.
        split: of the data set.
        task: ``segmentation``; or ``classification`` of single objects, whose result is a backbone for ``init``.
        init: ``random``; or the backbone comes from a classifier, ``clean``ly or ``robust``ly trained.
        backbone: the classifier: a name of `segbench.models.backbones`, a classification recipe, a link, or a file.
        backbone_normalization: by which the classifier normalises its images, if its file does not say:
            ``none``, ``imagenet`` or ``inception`` (0.5, 0.5). It is folded into the first convolution.
        extra_data: what the backbone was trained on, for the card; empty if on nothing else.
        paper_backbone: how people call the backbone, for the card; empty for none.
        warmup_epochs: epochs in which the learning rate rises linearly.
        power: exponent of the polynomial decay to 0 after the warm-up.
        optimizer: ``adamw`` or ``sgd``.
        weight_decay: on weights of two and more dimensions; norms and biases have none.
        momentum: of SGD.
        betas: of AdamW.
        head_learning_rate_factor: learning rate of all that is not backbone, relative to it.
        auxiliary_weight: weight of the auxiliary head's loss; 0 for an architecture without one.
        eps_255: radius of the attack as a numerator over 255; 0 trains on clean images.
        attack_steps: PGD steps from δ = 0 on cross-entropy, every input adversarial (SEA.md, section 8).
        step_size_255: of each PGD step.
        base: the short side is scaled to this many pixels, times a factor from `scale`; 0 leaves images as they are.
        scale: smallest and largest factor.
        crop: side of a random square crop in pixels, padded where the image is smaller; 0 takes whole images.
        flip: probability of a horizontal flip.
        blur: probability of a Gaussian blur.
        accumulation: parts in which a process computes the gradient of its images, to save memory.
        precision: ``fp32``, or ``bf16`` for forward and backward passes under autocast.
        compile: compile the model with torch.compile.
        ema: decay per step of an average of the weights that is used in their place at the end; 0 for none.
        held_out: images of the training split that are not trained on, a quarter of it at most; the scores on them are
            shown meanwhile.
        monitor_every: epochs between two such scores; 0 for never.
        monitor_eps_255: radius of the attack on them.
        monitor_iterations: its iterations (a short SEA: three losses, worst case).
        seed: of weights, order and augmentation.
    """

    id: str
    title: str
    dataset: str
    architecture: str
    architecture_arguments: Mapping[str, Any]
    epochs: int
    batch_size: int
    learning_rate: float
    split: str = "train"
    task: str = SEGMENTATION
    init: str = "random"
    backbone: str = ""
    backbone_normalization: str = "none"
    extra_data: str = ""
    paper_backbone: str = ""
    warmup_epochs: float = 1.0
    power: float = 1.0
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    momentum: float = 0.9
    betas: tuple[float, ...] = (0.9, 0.999)
    head_learning_rate_factor: float = 1.0
    auxiliary_weight: float = 0.4
    eps_255: float = 0.0
    attack_steps: int = 0
    step_size_255: float = 0.0
    base: int = 0
    scale: tuple[float, ...] = (0.5, 2.0)
    crop: int = 0
    flip: float = 0.5
    blur: float = 0.0
    accumulation: int = 1
    precision: str = "fp32"
    compile: bool = False
    ema: float = 0.0
    held_out: int = 16
    monitor_every: int = 5
    monitor_eps_255: float = 4.0
    monitor_iterations: int = 20
    seed: int = 0

    @property
    def method(self) -> str:
        """``clean``, ``AT``, or ``PIR-AT`` (adversarial training from a robust backbone)."""
        if not self.eps_255:
            return "clean"
        return "PIR-AT" if self.init == "robust" else "AT"

    def to_json(self) -> str:
        """The recipe as one line, by which a checkpoint knows it again."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def list_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in (files("segbench.training") / "recipes").iterdir()
        if path.name.endswith(".yaml")
    )


def load_recipe(name: str, overrides: Mapping[str, str] | None = None) -> Recipe:
    """A recipe by name, or from a path that ends in ``.yaml``; ``overrides`` are field = YAML value.

    A recipe may say ``extends: <another>`` and holds only what differs.

    Raises:
        UsageError: unknown recipe or field, unreadable file, missing field, value of a wrong type or out of range.
    """
    values = _values(name, Path(), [])
    changes = {SHORT.get(key, key): _yaml(value, name) for key, value in (overrides or {}).items()}
    return _checked(name, {**values, **changes})


def _values(name: str, beside: Path, seen: list[str]) -> dict[str, Any]:
    """The fields of a recipe and of those that it extends; a relative path is looked up ``beside`` the one before."""
    if name in seen or len(seen) >= MAX_EXTENDS:
        raise UsageError(f"The recipes {' -> '.join([*seen, name])} extend each other. Write one of them out.")
    folder = (beside / name).parent
    if name.endswith(".yaml"):
        if not (beside / name).is_file():
            raise UsageError(f"The recipe {beside / name} is no file. segbench train lists those of the package.")
        try:
            text = (beside / name).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"Cannot read the recipe {name}: {error}. It must be a text file in UTF-8.") from error
    elif name in list_recipes():
        text = (files("segbench.training") / "recipes" / f"{name}.yaml").read_text("utf-8")
    else:
        raise UnknownNameError(unknown_name("recipe", name, list_recipes()))
    values = _yaml(text, name)
    if not isinstance(values, dict):
        raise UsageError(f"The recipe {name} must be a mapping of field to value.")
    if "extends" not in values:
        return values
    parent = values.pop("extends")
    if not isinstance(parent, str):
        raise UsageError(f"Recipe {name}: extends must be the name of a recipe, not {parent!r}.")
    return {**_values(parent, folder, [*seen, name]), **values}


def _yaml(text: str, name: str) -> Any:
    try:
        return strict_yaml.parse(text)
    except ContentError as error:
        raise UsageError(f"The recipe {name} is not valid YAML: {error}") from error


# The annotation of a field, and what YAML may hold there.
_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "tuple[float, ...]": (list, tuple),
    "Mapping[str, Any]": (dict,),
}


def _checked(name: str, values: dict[str, Any]) -> Recipe:
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    for key in values:
        if key not in fields:
            raise UsageError(f"Recipe {name}: {unknown_name('field', str(key), fields)}")
    needed = [key for key, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [key for key in needed if key not in values]:
        raise UsageError(f"Recipe {name} lacks {', '.join(missing)}.")
    converted = {key: _converted(name, key, str(fields[key].type), value) for key, value in values.items()}
    recipe = Recipe(**converted)
    _check_texts(name, recipe)
    _check_numbers(name, recipe)
    _check_plain(name, values["architecture_arguments"])
    return recipe


def _converted(name: str, key: str, kind: str, value: Any) -> Any:
    allowed = _KINDS[kind]
    if value is None and kind == "str":  # --set backbone=
        return ""
    if type(value) not in allowed:  # a bool is an int for isinstance
        wanted = " or ".join(each.__name__ for each in allowed)
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if kind == "float" and isinstance(value, str) else ""
        raise UsageError(f"Recipe {name}: {key} must be {wanted}, not {value!r}{hint}.")
    numbers = list(value) if kind == "tuple[float, ...]" else [value] if kind in ("int", "float") else []
    if not all(type(number) in (int, float) and abs(number) <= MAX_NUMBER for number in numbers):
        raise UsageError(f"Recipe {name}: {key} must be a finite number below 2^63.")
    if kind == "tuple[float, ...]":
        return tuple(float(number) for number in value)
    return float(value) if kind == "float" else value


def _check_texts(name: str, recipe: Recipe) -> None:
    for key in ("id", "dataset", "architecture", "split"):
        if not re.fullmatch(DATASET if key == "dataset" else IDENTIFIER, getattr(recipe, key)):
            raise UsageError(
                f"Recipe {name}: {key} must be 1 to 80 of a-z, 0-9 and _, the first a letter or digit"
                f"{' (and /variant)' if key == 'dataset' else ''}, not {getattr(recipe, key)!r}."
            )
    if not 1 <= len(recipe.title) <= 200:
        raise UsageError(f"Recipe {name}: title must have 1 to 200 characters, not {len(recipe.title)}.")
    for key, known in CHOICES.items():
        if getattr(recipe, key) not in known:
            raise UsageError(f"Recipe {name}: {unknown_name(key, getattr(recipe, key), known)}")
    if recipe.backbone and recipe.init == "random":
        raise UsageError(
            f"Recipe {name}: a backbone is given, but init is random. Say init: robust, or clean; or do without: "
            "--set backbone="
        )
    if recipe.extra_data and recipe.init == "random":
        raise UsageError(
            f"Recipe {name}: the card would say that a backbone saw {recipe.extra_data!r}, but init is random. Empty "
            "it: --set extra_data="
        )


def _check_numbers(name: str, recipe: Recipe) -> None:
    def refuse(text: str) -> NoReturn:
        raise UsageError(f"Recipe {name}: {text}")

    if not 0 <= recipe.seed <= MAX_SEED:
        refuse(f"seed must be in 0..{MAX_SEED}, not {recipe.seed}.")
    for key in ("epochs", "learning_rate", "power", "accumulation", "head_learning_rate_factor", "monitor_iterations"):
        if not getattr(recipe, key) > 0:
            refuse(f"{key} must be positive, not {getattr(recipe, key)}.")
    if not 0 <= recipe.eps_255 <= 255 or (
        recipe.eps_255 > 0 and not (recipe.attack_steps > 0 and recipe.step_size_255 > 0)
    ):
        refuse("eps_255 must be in 0..255, and above 0 it needs attack_steps and step_size_255 above 0.")
    if not recipe.batch_size >= 2:
        refuse(f"batch_size must be 2 or more, not {recipe.batch_size}: batch normalisation needs two.")
    for key in ("weight_decay", "auxiliary_weight", "attack_steps", "step_size_255", "warmup_epochs", "held_out",
                "monitor_every", "base"):  # fmt: skip
        if not getattr(recipe, key) >= 0:
            refuse(f"{key} must not be negative, but is {getattr(recipe, key)}.")
    for key in ("flip", "blur"):
        if not 0 <= getattr(recipe, key) <= 1:
            refuse(f"{key} is a probability and must be in 0..1, not {getattr(recipe, key)}.")
    for key in ("ema", "momentum"):
        if not 0 <= getattr(recipe, key) < 1:
            refuse(f"{key} must be at least 0 and below 1, not {getattr(recipe, key)}.")
    if not (len(recipe.betas) == 2 and all(0 <= beta < 1 for beta in recipe.betas)):
        refuse(f"betas must be two numbers in [0,1), not {list(recipe.betas)}.")
    if not (len(recipe.scale) == 2 and 0 < recipe.scale[0] <= recipe.scale[1] <= 10):
        refuse(f"scale must be two factors above 0 and up to 10, the smaller first, not {list(recipe.scale)}.")
    if not 0 < recipe.monitor_eps_255 <= 255:
        refuse(f"monitor_eps_255 must be above 0 and up to 255, not {recipe.monitor_eps_255}.")
    if not recipe.warmup_epochs < recipe.epochs and recipe.warmup_epochs > 1:
        refuse(f"warmup_epochs must be below epochs ({recipe.epochs}), not {recipe.warmup_epochs}.")
    if recipe.crop and not recipe.crop >= MIN_SIDE:
        refuse(f"crop must be 0 or a side of {MIN_SIDE} pixels or more, not {recipe.crop}.")
    if recipe.crop > MAX_SIDE:
        refuse(f"crop must be a side of {MAX_SIDE} pixels at most, not {recipe.crop}.")
    if recipe.base * recipe.scale[1] > MAX_SIDE:
        refuse(
            f"base times the largest scale must be {MAX_SIDE} pixels at most, not {recipe.base} * {recipe.scale[1]:g}."
        )
    if recipe.base and not recipe.crop:
        refuse("images are scaled to several sizes (base), so they need a crop.")


def _check_plain(name: str, arguments: dict[Any, Any]) -> None:
    """Arguments go into the card: names to what JSON can hold."""
    try:
        json.dumps(arguments, allow_nan=False)
        plain = all(isinstance(key, str) for key in arguments)
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise UsageError(
            f"Recipe {name}: architecture_arguments must map names to numbers, texts or lists, not {arguments!r}."
        )
