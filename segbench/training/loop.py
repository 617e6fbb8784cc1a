"""The training loop: clean, or PGD adversarial training with all inputs adversarial (SEA.md, section 8)."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbench import counts, schemas
from segbench.cards import CARD_VERSION, ModelCard
from segbench.data import SegmentationDataset
from segbench.errors import ContentError, DataError, ModelError, RunError, UsageError
from segbench.files import sha256_bytes, write_atomic
from segbench.models.architectures import build_described
from segbench.models.upernet import UPerNet
from segbench.training.recipe import MIN_SIDE, Recipe


class Progress(NamedTuple):
    """State of a training run after a step: what a progress bar shows."""

    epoch: int
    step: int
    steps: int
    loss: float


class Split(NamedTuple):
    """A whole split in memory: images (N,H,W,3) uint8 and labels (N,H,W) uint8."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Trained:
    """What `train` wrote."""

    card: ModelCard
    card_path: Path
    weights_path: Path


def load_split(dataset: SegmentationDataset) -> Split:
    """Reads every image; training on sets larger than memory is not what this first loop is for.

    Raises:
        DataError: a damaged image, images of several sizes, or too small ones.
    """
    samples = list(dataset)
    for sample in samples:
        if sample.image.shape != samples[0].image.shape:
            (height, width), (other, wide) = samples[0].image.shape[1:], sample.image.shape[1:]
            raise DataError(
                f"Training needs images of one size: {samples[0].image_id!r} is {width}x{height}, "
                f"{sample.image_id!r} is {wide}x{other} pixels. Crop or resize the files of {dataset.id}."
            )
    if min(samples[0].label.shape) < MIN_SIDE:
        raise DataError(
            f"Training needs images of {MIN_SIDE}x{MIN_SIDE} pixels or more; those of {dataset.id} are smaller."
        )
    images = torch.stack([(sample.image * 255).round().to(torch.uint8) for sample in samples])
    return Split(images, torch.stack([sample.label.to(torch.uint8) for sample in samples]))


def batches(split: Split, recipe: Recipe, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, flipped and cropped batches: a function of (seed, epoch) alone. The last, short batch is dropped."""
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
    order = torch.randperm(len(split.images), generator=generator)
    height, width = split.labels.shape[1:]
    size = (min(recipe.crop or height, height), min(recipe.crop or width, width))
    for chunk in torch.split(order, recipe.batch_size):
        if len(chunk) < recipe.batch_size:
            return
        top = int(torch.randint(height - size[0] + 1, (), generator=generator))
        left = int(torch.randint(width - size[1] + 1, (), generator=generator))
        window = (slice(None), ..., slice(top, top + size[0]), slice(left, left + size[1]))
        images, labels = split.images[chunk][window].clone(), split.labels[chunk][window].clone()
        flip = torch.rand(len(chunk), generator=generator) < 0.5
        images[flip], labels[flip] = images[flip].flip(-1), labels[flip].flip(-1)
        yield images.float() / 255, labels.long()


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, frozen statistics and parameters without gradients while attacking; training mode afterwards."""
    model.eval()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        model.train()


def training_attack(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    """The last iterate of PGD on cross-entropy from δ = 0."""
    eps, step_size = recipe.eps_255 / 255, recipe.step_size_255 / 255
    x = images
    with attack_mode(model):
        for _ in range(recipe.attack_steps):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels, ignore_index=255), x)
            x = torch.minimum(
                torch.maximum(x.detach() + step_size * gradient.sign(), images - eps), images + eps
            ).clamp(0, 1)
    return x.detach()


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up over ``warmup`` steps, then linear decay to 0 at ``steps``.

    >>> [learning_rate_factor(step, 2, 6) for step in (0, 1, 2, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(steps - warmup, 1)


def train(
    recipe: Recipe,
    dataset: SegmentationDataset,
    validation: SegmentationDataset,
    out: Path,
    *,
    device: str = "cpu",
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trained:
    """Trains one model; writes ``<id>.safetensors``, ``<id>.json`` (card) and ``log.csv`` into ``out``.

    A checkpoint is written after each epoch; a killed run continues from it, on one machine's CPU to the same weights.

    Raises:
        UsageError: the recipe would end in a card that is not valid.
        ModelError: the architecture does not take the recipe's arguments.
        DataError: damaged images, or several sizes.
        RunError: ``out`` cannot be used, holds a damaged checkpoint or one of another recipe, or the loss is no longer
            finite.
    """
    torch.manual_seed(recipe.seed)
    architecture = {"name": recipe.architecture, "arguments": dict(recipe.architecture_arguments)}
    model = build_described(architecture, num_classes=dataset.num_classes)
    if not isinstance(model, UPerNet):
        raise ModelError(f"Training needs an architecture with an auxiliary head; {recipe.architecture} has none.")
    card = _card(recipe, architecture, dataset, model, device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"Cannot write to {out}: {error}. Give another --out folder.") from error
    model.to(device).train()
    split = load_split(dataset)
    steps_an_epoch = len(split.images) // recipe.batch_size
    if not steps_an_epoch:
        raise RunError(
            f"{len(split.images)} training images do not fill one batch of {recipe.batch_size}: lower batch_size."
        )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps_an_epoch, steps_an_epoch * recipe.epochs)
    )
    log, seconds = _resume(out / "checkpoint.pt", recipe, model, optimizer, scheduler)
    for epoch in range(len(log), recipe.epochs):
        started, total = time.monotonic(), 0.0
        for number, (images, labels) in enumerate(batches(split, recipe, epoch)):
            images, labels = images.to(device), labels.to(device)
            if recipe.eps_255:
                images = training_attack(model, images, labels, recipe)
            logits, auxiliary = model.forward_with_auxiliary(images)
            loss = F.cross_entropy(logits, labels, ignore_index=255)
            loss = loss + recipe.auxiliary_weight * F.cross_entropy(auxiliary, labels, ignore_index=255)
            if not math.isfinite(loss.item()):
                raise RunError(
                    f"The loss is {loss.item()} in epoch {epoch + 1}; lower learning_rate. "
                    "The last good checkpoint is kept."
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            total += loss.item()
            progress(Progress(epoch, epoch * steps_an_epoch + number + 1, recipe.epochs * steps_an_epoch, loss.item()))
        seconds += time.monotonic() - started
        log.append(total / steps_an_epoch)
        _save(out / "checkpoint.pt", recipe, model, optimizer, scheduler, log, seconds)
    return _finish(card, model.eval(), validation, out, log, seconds, device)


def _save(
    path: Path, recipe: Recipe, model: nn.Module, optimizer: Any, scheduler: Any, log: list[float], seconds: float
) -> None:
    buffer = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({"recipe": _recipe_json(recipe), **state, "log": log, "seconds": seconds}, buffer)
    write_atomic(path, buffer.getvalue())


def _resume(path: Path, recipe: Recipe, model: nn.Module, optimizer: Any, scheduler: Any) -> tuple[list[float], float]:
    """The losses of the epochs done and the seconds they took; the rest of the state goes where it belongs."""
    if not path.exists():
        return [], 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["recipe"] != _recipe_json(recipe):
            raise RunError(f"{path} belongs to another recipe. Give another --out folder, or delete the checkpoint.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        return state["log"], state["seconds"]
    except RunError:
        raise
    except Exception as error:  # what a damaged file gives is not known
        raise RunError(
            f"The checkpoint {path} is damaged ({type(error).__name__}). Delete it to start again, "
            "or give another --out folder."
        ) from error


def _recipe_json(recipe: Recipe) -> str:
    return json.dumps(asdict(recipe), sort_keys=True)


def clean_scores(model: nn.Module, dataset: SegmentationDataset, device: str) -> tuple[float, float]:
    """Clean aAcc and mIoU in [0,1]."""
    parts = []
    with torch.no_grad():  # unlike inference_mode, it suits models that keep tensors for later passes
        for sample in dataset:
            prediction = model(sample.image[None].to(device)).max(dim=1).indices.cpu().numpy()
            parts.append(counts.count(prediction, sample.label[None].numpy(), dataset.num_classes))
    merged = counts.merge(parts)
    return merged.aacc(), merged.miou()


def _card(
    recipe: Recipe, architecture: dict[str, Any], dataset: SegmentationDataset, model: nn.Module, device: str
) -> ModelCard:
    """The card of the run before it starts, without what training finds: losses, seconds, scores and hash.

    Raises:
        UsageError: it is not valid, so the run could not end with a valid one.
    """
    card = ModelCard(
        schema_version=CARD_VERSION,
        id=recipe.id,
        title=recipe.title,
        architecture=architecture,
        backbone=architecture["arguments"].get("backbone"),
        dataset=dataset.id,  # which may be a variant: --data-root decides the layout of camvid
        num_classes=dataset.num_classes,
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
            "initialisation": "random",
            "extra_data": None,
            "recipe": asdict(recipe),
            "log": {"images": len(dataset), "device": device, "torch": str(torch.__version__)},
        },
        preprocessing="images in [0,1] at the size of the data set; nothing else",
        expected=None,
    )
    try:
        found = schemas.problems("card", schemas.parse(card.to_json(), source="it"))
    except (ContentError, TypeError, ValueError) as error:
        found = [str(error)]
    if found:
        raise UsageError("The recipe's card would not be valid; correct the recipe:\n  " + "\n  ".join(found[:10]))
    return card


def _finish(
    card: ModelCard,
    model: nn.Module,
    validation: SegmentationDataset,
    out: Path,
    log: list[float],
    seconds: float,
    device: str,
) -> Trained:
    aacc, miou = clean_scores(model, validation, device)
    weights = safetensors.torch.save({key: value.contiguous().cpu() for key, value in model.state_dict().items()})
    weights_path, card_path = out / f"{card.id}.safetensors", out / f"{card.id}.json"
    write_atomic(weights_path, weights)
    rows = "".join(f"{epoch},{loss:.6f}\n" for epoch, loss in enumerate(log, 1))
    write_atomic(out / "log.csv", ("epoch,loss\n" + rows).encode())
    found = {"loss_first_epoch": log[0], "loss_last_epoch": log[-1], "seconds": round(seconds, 1)}
    card = replace(
        card,
        sha256=sha256_bytes(weights),
        training={**card.training, "log": {**found, **card.training["log"]}},
        expected={"aacc": float(np.round(aacc, 6)), "miou": float(np.round(miou, 6))},
    )
    write_atomic(card_path, card.to_json().encode())
    return Trained(card, card_path, weights_path)
