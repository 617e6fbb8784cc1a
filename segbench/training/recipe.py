"""Recipes: how a model was trained, as data."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from segbench.errors import UnknownNameError, UsageError, unknown_name

DATASET = "[a-z0-9][a-z0-9_]{0,79}(/[a-z0-9][a-z0-9_-]{0,39})?"
IDENTIFIER = "[a-z0-9][a-z0-9_]{0,79}"  # as the schema of cards has it; the id names the files that training writes
MAX_NUMBER = 2**63 - 1  # the largest that a card holds
MAX_SEED = 2**32 - 1
MIN_SIDE = 32  # of a training image in pixels: the last feature map is that much smaller


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        id: the model's id, ``<method>_<backbone>_<dataset>``.
        title: one line for people.
        dataset: data set id; its ``train`` split is used.
        architecture: name in `segbench.models.architectures`.
        architecture_arguments: its keyword arguments without ``num_classes``.
        epochs: passes over the training split.
        batch_size: images a step.
        learning_rate: peak of AdamW's; linear warm-up over the first epoch, then linear decay to 0.
        weight_decay: AdamW's, on weights of two and more dimensions.
        seed: of weights, order and augmentation.
        eps_255: radius of the attack as a numerator over 255; 0 trains on clean images.
        attack_steps: PGD steps from δ = 0 on cross-entropy, every input adversarial (SEA.md, section 8).
        step_size_255: of each PGD step.
        crop: side of a random square crop, in pixels; 0 takes whole images.
        auxiliary_weight: weight of the auxiliary head's loss.
    """

    id: str
    title: str
    dataset: str
    architecture: str
    architecture_arguments: Mapping[str, Any]
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    eps_255: float
    attack_steps: int
    step_size_255: float
    crop: int
    auxiliary_weight: float

    @property
    def method(self) -> str:
        return "AT" if self.eps_255 else "clean"


def list_recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in (files("segbench.training") / "recipes").iterdir()
        if path.name.endswith(".yaml")
    )


def load_recipe(name: str, overrides: Mapping[str, str] | None = None) -> Recipe:
    """A recipe by name, or from a path that ends in ``.yaml``; ``overrides`` are field = YAML value.

    Raises:
        UsageError: unknown recipe or field, unreadable file, missing field, value of a wrong type or out of range.
    """
    if name.endswith(".yaml"):
        if not Path(name).is_file():
            raise UsageError(f"The recipe {name} does not exist.")
        try:
            text = Path(name).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"Cannot read the recipe {name}: {error}. It must be a text file in UTF-8.") from error
    elif name in list_recipes():
        text = (files("segbench.training") / "recipes" / f"{name}.yaml").read_text("utf-8")
    else:
        raise UnknownNameError(unknown_name("recipe", name, list_recipes()))
    try:
        values = yaml.safe_load(text)
        changes = {key: yaml.safe_load(value) for key, value in (overrides or {}).items()}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        raise UsageError(f"The recipe {name} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"The recipe {name} must be a mapping of field to value.")
    return _checked(name, {**values, **changes})


def _checked(name: str, values: dict[str, Any]) -> Recipe:
    fields = {field.name: str(field.type) for field in dataclasses.fields(Recipe)}
    for key in values:
        if key not in fields:
            raise UsageError(f"Recipe {name}: {unknown_name('field', key, fields)}")
    if missing := [key for key in fields if key not in values]:
        raise UsageError(f"Recipe {name} lacks {', '.join(missing)}.")
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
    for key, kind in fields.items():
        allowed = kinds.get(kind, (dict,))
        if not isinstance(values[key], allowed) or isinstance(values[key], bool):
            raise UsageError(
                f"Recipe {name}: {key} must be {' or '.join(t.__name__ for t in allowed)}, not {values[key]!r}."
            )
        if isinstance(values[key], (int, float)) and not abs(values[key]) <= MAX_NUMBER:
            raise UsageError(f"Recipe {name}: {key} must be a finite number below 2^63.")
    _check_plain(name, values["architecture_arguments"])
    arguments: dict[str, Any] = {
        key: float(values[key]) if kind == "float" else values[key] for key, kind in fields.items()
    }
    recipe = Recipe(**arguments)
    for key in ("id", "dataset", "architecture"):
        if not re.fullmatch(DATASET if key == "dataset" else IDENTIFIER, values[key]):
            raise UsageError(
                f"Recipe {name}: {key} must be 1 to 80 of a-z, 0-9 and _, the first a letter or digit"
                f"{' (and /variant)' if key == 'dataset' else ''}, not {values[key]!r}."
            )
    if not 1 <= len(recipe.title) <= 200:
        raise UsageError(f"Recipe {name}: title must have 1 to 200 characters, not {len(recipe.title)}.")
    if not 0 <= recipe.seed <= MAX_SEED:
        raise UsageError(f"Recipe {name}: seed must be in 0..{MAX_SEED}, not {recipe.seed}.")
    positive = {"epochs": recipe.epochs, "learning_rate": recipe.learning_rate}
    if bad := [key for key, value in positive.items() if not value > 0]:
        raise UsageError(f"Recipe {name}: {bad[0]} must be positive, not {positive[bad[0]]}.")
    if not 0 <= recipe.eps_255 <= 255 or (
        recipe.eps_255 > 0 and not (recipe.attack_steps > 0 and recipe.step_size_255 > 0)
    ):
        raise UsageError(
            f"Recipe {name}: eps_255 must be in 0..255, and above 0 it needs attack_steps and step_size_255 above 0."
        )
    if not recipe.batch_size >= 2:
        raise UsageError(
            f"Recipe {name}: batch_size must be 2 or more, not {recipe.batch_size}: batch normalisation needs two."
        )
    for key in ("weight_decay", "auxiliary_weight", "attack_steps", "step_size_255"):
        if not values[key] >= 0:
            raise UsageError(f"Recipe {name}: {key} must not be negative, but is {values[key]}.")
    if recipe.crop and not recipe.crop >= MIN_SIDE:
        raise UsageError(f"Recipe {name}: crop must be 0 or a side of {MIN_SIDE} pixels or more, not {recipe.crop}.")
    return recipe


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
