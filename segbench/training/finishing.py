"""What a run leaves behind: weights, and the card of a model or the report of a classifier."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from segbench import schemas
from segbench.cards import CARD_VERSION, ModelCard, read_card
from segbench.errors import ContentError, DataError, RunError, UsageError
from segbench.files import sha256_bytes, sha256_file, write_atomic
from segbench.models.sliding import in_windows
from segbench.training.checkpoint import Position
from segbench.training.classifier import Classifier
from segbench.training.curves import PNG, draw
from segbench.training.data import TrainingData
from segbench.training.initialisation import public_name
from segbench.training.monitor import clean_scores, robust_scores
from segbench.training.recipe import CLASSIFICATION, Recipe


@dataclass(frozen=True)
class Trained:
    """What `train` wrote.

    Attributes:
        recipe: of the run.
        card: of a segmentation model; None for a classifier.
        document_path: the card, or the report of a classifier.
        weights_path: safetensors.
        scores: clean aAcc and mIoU on the validation split; of a classifier, clean and robust accuracy. In [0,1].
        curves: the picture; None without the libraries of the extra ``train``.
    """

    recipe: Recipe
    card: ModelCard | None
    document_path: Path
    weights_path: Path
    scores: dict[str, float]
    curves: Path | None = None


@dataclass(frozen=True)
class Draft:
    """A run before it starts: its card without what training finds. A classifier has none."""

    recipe: Recipe
    card: ModelCard | None


def draft(recipe: Recipe, data: TrainingData, model: nn.Module, device: torch.device) -> Draft:
    """The card of the run before it starts, without losses, seconds, scores and hash.

    Raises:
        UsageError: it is not valid, so the run could not end with a valid one.
    """
    if recipe.task == CLASSIFICATION:
        return Draft(recipe, None)
    card = ModelCard(
        schema_version=CARD_VERSION,
        id=recipe.id,
        title=recipe.title,
        architecture={"name": recipe.architecture, "arguments": dict(recipe.architecture_arguments)},
        backbone=recipe.paper_backbone or recipe.architecture_arguments.get("backbone"),
        dataset=data.validation.id,  # which may be a variant: --data-root decides the layout of camvid
        num_classes=data.train.num_classes,
        parameters=sum(p.numel() for p in model.parameters()),
        sources=[{"type": "package", "file": f"{recipe.id}.safetensors"}],
        sha256=None,
        licence="MIT",
        paper=None,
        training={
            "method": recipe.method,
            "eps_255": recipe.eps_255,
            "attack_steps": recipe.attack_steps,
            "epochs": recipe.epochs,
            "initialisation": recipe.init,
            "extra_data": recipe.extra_data or None,
            "recipe": _public(recipe),
            "log": {"images": len(data.train), "device": device.type, "torch": str(torch.__version__)},
        },
        preprocessing=f"images in [0,1]; {data.validation.preprocessing}",
        expected=None,
    )
    try:
        found = schemas.problems("card", schemas.parse(card.to_json(), source="it"))
    except (ContentError, TypeError, ValueError) as error:
        found = [str(error)]
    if found:
        raise UsageError("The recipe's card would not be valid; correct the recipe:\n  " + "\n  ".join(found[:10]))
    return Draft(recipe, card)


def finish(
    started: Draft, model: nn.Module, data: TrainingData, out: Path, position: Position, device: torch.device
) -> Trained:
    """Writes the weights, scores the model, then writes what tells of them.

    Raises:
        RunError, DataError: it cannot be scored; the weights are written.
    """
    recipe, card = started.recipe, started.card
    weights_path, document_path = out / f"{recipe.id}.safetensors", out / f"{recipe.id}.json"
    state = model.weights() if isinstance(model, Classifier) else model.state_dict()
    weights = safetensors.torch.save({key: value.contiguous().cpu() for key, value in state.items()})
    write_atomic(weights_path, weights)
    log: dict[str, Any] = {
        "loss_first_epoch": position.rows[0]["loss"],
        "loss_last_epoch": position.rows[-1]["loss"],
        "seconds": round(position.seconds, 1),
        "backbone": position.backbone,
    }
    fed = in_windows(model, data.validation)
    try:
        clean = clean_scores(fed, data.validation, device)
    except (DataError, RunError) as error:
        raise type(error)(
            f"{error}\nTraining is done, and {weights_path} is written. The same command goes on from here."
        ) from error
    if card is None:
        robust = robust_scores(fed, data.validation, recipe, device)
        scores = {"accuracy": clean.aacc, "robust_accuracy": robust.aacc}
        document = _report(recipe, sha256_bytes(weights), scores, len(data.validation), log)
    else:
        scores = {"aacc": round(clean.aacc, 6), "miou": round(clean.miou, 6)}
        training = {**card.training, "log": {**log, **card.training["log"]}}
        card = replace(card, sha256=sha256_bytes(weights), training=training, expected=scores)
        document = card.to_json()
    write_atomic(document_path, document.encode())
    drawn = draw(out, position.rows, recipe.title)
    return Trained(recipe, card, document_path, weights_path, scores, drawn[1] if drawn else None)


def found(started: Draft, out: Path) -> Trained | None:
    """What a finished run has written, as it stands; None if it is not all there."""
    recipe = started.recipe
    weights_path, document_path = out / f"{recipe.id}.safetensors", out / f"{recipe.id}.json"
    try:
        document = json.loads(document_path.read_text("utf-8"))
        if document["sha256"] != sha256_file(weights_path):
            return None
        card = read_card(document_path) if started.card else None
        names = ("aacc", "miou") if card else ("accuracy", "robust_accuracy")
        scores = {name: (document["expected"] if card else document)[name] for name in names}
    except (OSError, ValueError, KeyError, ContentError):
        return None
    curves = out / PNG
    return Trained(recipe, card, document_path, weights_path, scores, curves if curves.is_file() else None)


def _public(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe, with what its backbone may be called in public."""
    return dataclasses.asdict(recipe) | {"backbone": public_name(recipe.backbone)}


def _report(recipe: Recipe, sha256: str, scores: dict[str, float], images: int, log: dict[str, Any]) -> str:
    """What is known of a classifier, as JSON."""
    report = {
        "id": recipe.id,
        "title": recipe.title,
        "sha256": sha256,
        **scores,
        "robust_eps_255": recipe.monitor_eps_255,
        "images": images,
        "recipe": _public(recipe),
        "log": {**log, "torch": str(torch.__version__)},
    }
    return json.dumps(report, indent=2, allow_nan=False) + "\n"
