"""The training loop: clean, or PGD adversarial training with all inputs adversarial (SEA.md, section 8)."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbench import counts
from segbench.cards import CARD_VERSION, ModelCard
from segbench.data import SegmentationDataset
from segbench.errors import RunError, SegbenchError
from segbench.files import sha256_bytes, write_atomic
from segbench.models.architectures import build
from segbench.models.upernet import UPerNet
from segbench.training.recipe import Recipe


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
    """Reads every image; training on sets larger than memory is not what this first loop is for."""
    samples = list(dataset)
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
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in model.parameters():
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
        RunError: ``out`` holds a checkpoint of another recipe, or the loss is no longer finite.
    """
    torch.manual_seed(recipe.seed)
    model = build(recipe.architecture, num_classes=dataset.num_classes, **recipe.architecture_arguments)
    if not isinstance(model, UPerNet):
        raise SegbenchError(f"Training needs an architecture with an auxiliary head; {recipe.architecture} has none.")
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
    state = _resume(out / "checkpoint.pt", recipe, model, optimizer, scheduler)
    log, seconds = state["log"], state["seconds"]
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
    return _finish(recipe, model.eval(), dataset, validation, out, log, seconds, device)


def _save(
    path: Path, recipe: Recipe, model: nn.Module, optimizer: Any, scheduler: Any, log: list[float], seconds: float
) -> None:
    buffer = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({"recipe": _recipe_json(recipe), **state, "log": log, "seconds": seconds}, buffer)
    write_atomic(path, buffer.getvalue())


def _resume(path: Path, recipe: Recipe, model: nn.Module, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    if not path.exists():
        return {"log": [], "seconds": 0.0}
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["recipe"] != _recipe_json(recipe):
        raise RunError(f"{path} belongs to another recipe. Give another --out folder, or delete the checkpoint.")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state


def _recipe_json(recipe: Recipe) -> str:
    return json.dumps(asdict(recipe), sort_keys=True)


def clean_scores(model: nn.Module, dataset: SegmentationDataset, device: str) -> tuple[float, float]:
    """Clean aAcc and mIoU in [0,1]."""
    parts = []
    with torch.inference_mode():
        for sample in dataset:
            prediction = model(sample.image[None].to(device)).max(dim=1).indices.cpu().numpy()
            parts.append(counts.count(prediction, sample.label[None].numpy(), dataset.num_classes))
    merged = counts.merge(parts)
    return merged.aacc(), merged.miou()


def _finish(
    recipe: Recipe,
    model: nn.Module,
    dataset: SegmentationDataset,
    validation: SegmentationDataset,
    out: Path,
    log: list[float],
    seconds: float,
    device: str,
) -> Trained:
    aacc, miou = clean_scores(model, validation, device)
    weights = safetensors.torch.save({key: value.contiguous().cpu() for key, value in model.state_dict().items()})
    weights_path, card_path = out / f"{recipe.id}.safetensors", out / f"{recipe.id}.json"
    write_atomic(weights_path, weights)
    rows = "".join(f"{epoch},{loss:.6f}\n" for epoch, loss in enumerate(log, 1))
    write_atomic(out / "log.csv", ("epoch,loss\n" + rows).encode())
    card = ModelCard(
        schema_version=CARD_VERSION,
        id=recipe.id,
        title=recipe.title,
        architecture={"name": recipe.architecture, "arguments": dict(recipe.architecture_arguments)},
        dataset=recipe.dataset,
        num_classes=dataset.num_classes,
        parameters=sum(p.numel() for p in model.parameters()),
        sources=[{"type": "package", "file": weights_path.name}],
        sha256=sha256_bytes(weights),
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
            "log": {
                "loss_first_epoch": log[0],
                "loss_last_epoch": log[-1],
                "images": len(dataset),
                "seconds": round(seconds, 1),
                "device": device,
                "torch": str(torch.__version__),
            },
        },
        preprocessing="images in [0,1] at the size of the data set; nothing else",
        expected={"aacc": float(np.round(aacc, 6)), "miou": float(np.round(miou, 6))},
    )
    write_atomic(card_path, card.to_json().encode())
    return Trained(card, card_path, weights_path)
