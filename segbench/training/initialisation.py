"""``init: robust | clean | random``: where the backbone's first weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from torch import nn

from segbench import downloads
from segbench.errors import ModelError, UnknownNameError, UsageError, unknown_name
from segbench.files import sha256_bytes, sha256_file
from segbench.models.backbones import BACKBONES, fetch_backbone, load_backbone
from segbench.models.normalization import NORMALIZATIONS, Normalization
from segbench.models.weights import read_weights
from segbench.training.recipe import CLASSIFICATION, Recipe, list_recipes, load_recipe

RUNS = Path("runs")  # where `segbench train` writes, below the current folder
BACKBONE_NORMALIZATIONS: Mapping[str, Normalization | None] = {
    "none": None,
    "imagenet": NORMALIZATIONS["imagenet"],
    "inception": NORMALIZATIONS["half"],
}  # what the recipe's backbone_normalization may say
PUBLIC_IN_LINKS = ("id", "dl", "export")  # parameters of share links that name a file and open nothing


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
    name, normalization = recipe.backbone, BACKBONE_NORMALIZATIONS[recipe.backbone_normalization]
    if not name:
        raise UsageError(
            f"Recipe {recipe.id}: init is {recipe.init}, but no backbone is named. Give the weights of a "
            f"{recipe.init}ly trained classifier, a file or a link: --set backbone=FILE"
        )
    if name in BACKBONES:
        normalization = BACKBONES[name].normalization
    path = _file(name, runs, offline)
    if not path.is_file():
        if path.exists():
            raise ModelError(f"The backbone {name} is no file. Give the file of its weights: --set backbone=FILE")
        if _is_classifier(name):
            raise ModelError(f"The classifier {name} is not trained yet ({path} is missing): segbench train {name}")
        if "/" not in name and "." not in name:
            known = [*BACKBONES, *filter(_is_classifier, list_recipes())]
            raise UnknownNameError(unknown_name("backbone", name, known))
        raise ModelError(f"The backbone {name} does not exist. Correct its path: --set backbone=FILE")
    source = f"{public_name(name)} ({path})" if name in BACKBONES or "://" in name else str(path)
    load_backbone(model, read_weights(path), source=source, normalization=normalization)
    return Start(public_name(name), sha256_file(path))


def public_name(backbone: str) -> str:
    """What may stand on a card: a file's name without its folders, a link without what may be a key to it.

    >>> public_name("/home/me/weights.pt"), public_name("https://example.org/a.pt?id=7&sig=secret")
    ('weights.pt', 'https://example.org/a.pt?id=7')
    """
    if "://" not in backbone:
        return Path(backbone).name
    parts = urlsplit(backbone)
    kept = [(key, value) for key, value in parse_qsl(parts.query) if key in PUBLIC_IN_LINKS]
    return urlunsplit(parts._replace(query=urlencode(kept), fragment=""))


def _file(name: str, runs: Path, offline: bool) -> Path:
    if name in BACKBONES:
        return fetch_backbone(name, offline=offline)
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
