"""``init: robust | clean | random``: where the backbone's first weights come from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from segbench import downloads
from segbench.errors import ModelError, UnknownNameError, UsageError, unknown_name
from segbench.files import sha256_bytes, sha256_file
from segbench.models.backbones import BACKBONES, load_backbone, robust_backbone
from segbench.models.classifiers import Normalization
from segbench.models.weights import read_weights
from segbench.training.recipe import CLASSIFICATION, Recipe, list_recipes, load_recipe

RUNS = Path("runs")  # where `segbench train` writes, below the current folder
NORMALIZATIONS: Mapping[str, Normalization | None] = {
    "none": None,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class Start(NamedTuple):
    """Where a backbone came from, for the log of the card."""

    source: str
    sha256: str


def classifier_recipe(recipe: Recipe) -> str | None:
    """The classification recipe whose result a recipe starts from; None if it is something else."""
    return recipe.backbone if _is_classifier(recipe.backbone) else None


def _is_classifier(name: str) -> bool:
    return name in list_recipes() and load_recipe(name).task == CLASSIFICATION


def classifier_file(name: str, runs: Path = RUNS) -> Path:
    """Where ``segbench train <classification recipe>`` leaves its weights."""
    return runs / f"train-{name}" / f"{name}.safetensors"


def initialise(model: nn.Module, recipe: Recipe, *, runs: Path = RUNS, offline: bool = False) -> Start | None:
    """Copies the weights of the recipe's classifier into the backbone of ``model``; the rest stays random.

    Args:
        model: of `segbench.models.architectures`.
        recipe: its ``init``, ``backbone`` and ``backbone_normalization``.
        runs: folder of the classifiers trained here.
        offline: never use the network.

    Returns:
        What was loaded; None for ``init: random``.

    Raises:
        UsageError: ``init`` needs a backbone, and none is named or there is none of that name.
        ModelError, DownloadError: it cannot be had, or is of another architecture.
    """
    if recipe.init == "random":
        return None
    name, normalization = recipe.backbone, NORMALIZATIONS[recipe.backbone_normalization]
    if not name:
        raise UsageError(
            f"Recipe {recipe.id}: init is {recipe.init}, but no backbone is named. Give the weights of a "
            f"{recipe.init}ly trained classifier, a file or a link: --set backbone=FILE"
        )
    if name in BACKBONES:
        if BACKBONES[name].url is None:
            raise ModelError(
                f"{name} has no link of its own ({BACKBONES[name].source}). Fetch it there, and give its file: "
                "--set backbone=FILE backbone_normalization=imagenet"
            )
        report = robust_backbone(model, name, offline=offline)
        return Start(name, sha256_bytes(b"".join(v.cpu().numpy().tobytes() for v in report.state.values())))
    path = _file(name, runs, offline)
    if not path.is_file():
        if _is_classifier(name):
            raise ModelError(f"The classifier {name} is not trained yet ({path} is missing): segbench train {name}")
        if "/" not in name and "." not in name:
            known = [*BACKBONES, *filter(_is_classifier, list_recipes())]
            raise UnknownNameError(unknown_name("backbone", name, known))
        raise ModelError(f"The backbone {name} does not exist. Correct its path: --set backbone=FILE")
    report = load_backbone(model, read_weights(path), source=str(path), normalization=normalization)
    if report.unknown:
        logging.getLogger("segbench").warning(
            "%s: %d keys are not known and were left out: %s", name, len(report.unknown), ", ".join(report.unknown[:10])
        )
    return Start(name if classifier_recipe(recipe) or "://" in name else path.name, sha256_file(path))


def _file(name: str, runs: Path, offline: bool) -> Path:
    if "://" in name:
        return downloads.fetch(
            [{"type": "url", "url": name}],
            name=f"backbone_{sha256_bytes(name.encode())[:16]}",
            sha256=None,
            offline=offline,
            command="the same without --offline",
        ).path
    if _is_classifier(name):
        return classifier_file(name, runs)
    return Path(name).expanduser()
