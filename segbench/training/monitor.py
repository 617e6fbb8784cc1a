"""How a run is doing: scores on held-out images, and whether the loss explodes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segbench import attacks, counts, ensemble
from segbench.counts import Counts
from segbench.data import Sample, SegmentationDataset
from segbench.errors import RunError
from segbench.protocol import SEA_V1
from segbench.training.recipe import Recipe

SMOOTHING = 0.95  # of the loss that is watched: about the last 20 steps
EXPLODED = 3.0  # times chance level, and times the lowest so far
CHUNK = 16  # images attacked at once


class Scores(NamedTuple):
    """In [0,1]."""

    aacc: float
    miou: float


def clean_scores(model: nn.Module, data: SegmentationDataset, device: torch.device | str) -> Scores:
    """AAcc and mIoU on clean images."""
    parts = []
    with torch.no_grad():  # unlike inference_mode, it suits models that keep tensors for later passes
        for sample in data:
            parts.append(_counted(model, sample.image[None].to(device), sample.label[None], data.num_classes))
    merged = counts.merge(parts)
    return Scores(merged.aacc(), merged.miou())


def robust_scores(model: nn.Module, data: SegmentationDataset, recipe: Recipe, device: torch.device | str) -> Scores:
    """The worst case of a short SEA: the three losses of sea-v1, ``monitor_iterations`` each, at one radius.

    Args:
        model: in eval mode.
        data: images, of any sizes.
        recipe: its ``monitor_eps_255`` and ``monitor_iterations``.
        device: of the model.
    """
    eps = recipe.monitor_eps_255 / 255
    found: dict[str, list[Counts]] = {name: [] for name in ("clean", *SEA_V1.losses)}
    weights = data.class_weights().to(device)
    for samples in _chunks(data):
        images = torch.stack([sample.image for sample in samples]).to(device)
        labels = torch.stack([sample.label for sample in samples])
        with torch.no_grad():
            found["clean"].append(_counted(model, images, labels, data.num_classes))
        for loss in SEA_V1.losses:
            seeds = [SEA_V1.start_seed(sample.image_id, loss, recipe.monitor_eps_255) for sample in samples]
            result = attacks.red_eps_apgd(
                model,
                images,
                labels.to(device),
                eps=eps,
                loss=loss,
                iterations=recipe.monitor_iterations,
                start=attacks.random_start(images, eps=2 * eps, seeds=seeds),
                class_weights=weights,
            )
            with torch.no_grad():
                found[loss].append(_counted(model, result.adversarial, labels, data.num_classes))
    worst = ensemble.worst_case([counts.merge(parts) for parts in found.values()])
    return Scores(worst.aacc, worst.miou)


def _chunks(data: SegmentationDataset) -> Iterator[list[Sample]]:
    """Images of one size together, a few at a time."""
    waiting: list[Sample] = []
    for sample in data:
        if waiting and (len(waiting) == CHUNK or waiting[0].label.shape != sample.label.shape):
            yield waiting
            waiting = []
        waiting.append(sample)
    if waiting:
        yield waiting


def _counted(model: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> Counts:
    predictions = model(images).max(dim=1).indices.cpu().numpy()
    return counts.count(predictions, labels.numpy(), num_classes)


@dataclass
class LossWatch:
    """Stops a run whose loss is no number, or far above both chance and what it has been.

    Attributes:
        chance: the loss of a model that knows nothing.
        smoothed: the loss, averaged over about the last 20 steps.
        lowest: the lowest of these.
    """

    chance: float
    smoothed: float = math.nan
    lowest: float = math.inf

    def check(self, loss: float, where: str) -> None:
        """Takes the loss of the next step.

        Raises:
            RunError: training has diverged.
        """
        if not math.isfinite(loss):
            raise RunError(diverged(f"The loss is {loss}", where))
        self.smoothed = loss if math.isnan(self.smoothed) else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        self.lowest = min(self.lowest, self.smoothed)
        if self.smoothed > EXPLODED * max(self.chance, self.lowest):
            raise RunError(diverged(f"The loss exploded to {self.smoothed:.3g}, from {self.lowest:.3g}", where))


def diverged(what: str, where: str) -> str:
    """The message for a run that has diverged."""
    return (
        f"{what} in {where}: training has diverged. The last good checkpoint is kept. Lower learning_rate "
        "(--set learning_rate=...) or raise warmup_epochs, with another --out folder."
    )
