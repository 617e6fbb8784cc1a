"""How a run is doing: scores on held-out images, and whether the loss explodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segbench import attacks, counts, ensemble
from segbench.attacks.memory import is_out_of_memory
from segbench.counts import Counts
from segbench.data import Sample, SegmentationDataset
from segbench.errors import RunError
from segbench.models.float32 import exact_float32
from segbench.protocol import SEA_V1
from segbench.training.recipe import Recipe

SMOOTHING = 0.95  # of the loss that is watched: about the last 20 steps
EXPLODED = 3.0  # times chance level, and times the lowest so far
CHUNK = 16  # images attacked at once, or fewer where memory is short


class Scores(NamedTuple):
    """In [0,1]."""

    aacc: float
    miou: float


def clean_scores(model: nn.Module, data: SegmentationDataset, device: torch.device | str) -> Scores:
    """AAcc and mIoU on clean images, as the protocol measures them.

    Args:
        model: in eval mode, in the windows of ``data`` (`segbench.models.sliding.in_windows`).
        data: images, of any sizes.
        device: of the model.

    Raises:
        RunError: not enough memory for one image.
    """

    def counted(samples: Sequence[Sample]) -> dict[str, Counts]:
        return {"clean": _counted(model, *_stacked(samples, device), data.num_classes)}

    clean = counts.merge([found["clean"] for found in _on_all(counted, ([sample] for sample in data))])
    return Scores(clean.aacc(), clean.miou())


def robust_scores(model: nn.Module, data: SegmentationDataset, recipe: Recipe, device: torch.device | str) -> Scores:
    """The worst case of a short SEA: the three losses of sea-v1, ``monitor_iterations`` each, at one radius.

    Args:
        model: in eval mode, in the windows of ``data``.
        data: images, of any sizes.
        recipe: its ``monitor_eps_255`` and ``monitor_iterations``.
        device: of the model.

    Raises:
        RunError: not enough memory for one image.
    """
    eps = recipe.monitor_eps_255 / 255
    weights = data.class_weights().to(device)

    def attacked(samples: Sequence[Sample]) -> dict[str, Counts]:
        images, labels = _stacked(samples, device)
        found = {"clean": _counted(model, images, labels, data.num_classes)}
        for loss in SEA_V1.losses:
            seeds = [SEA_V1.start_seed(sample.image_id, loss, recipe.monitor_eps_255) for sample in samples]
            result = attacks.red_eps_apgd(
                model,
                images,
                labels,
                eps=eps,
                loss=loss,
                iterations=recipe.monitor_iterations,
                start=attacks.random_start(images, eps=2 * eps, seeds=seeds),
                class_weights=weights,
            )
            found[loss] = _counted(model, result.adversarial, labels, data.num_classes)
        return found

    parts = list(_on_all(attacked, _chunks(data)))
    worst = ensemble.worst_case([counts.merge([part[name] for part in parts]) for name in parts[0]])
    return Scores(worst.aacc, worst.miou)


def _on_all(
    do: Callable[[Sequence[Sample]], dict[str, Counts]], chunks: Iterable[Sequence[Sample]]
) -> Iterator[dict[str, Counts]]:
    """What ``do`` finds on each chunk, in exact float32; where memory is short, on each of its halves."""
    for chunk in chunks:
        found = None
        try:
            with exact_float32():
                found = do(chunk)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(chunk) == 1:
                raise RunError(
                    f"Not enough memory to score {chunk[0].image_id} of {tuple(chunk[0].image.shape[1:])} pixels. Use "
                    "a device with more, or no scores meanwhile: --set monitor_every=0 (what is trained goes on)."
                ) from error
        if found is None:  # outside the except clause, which would keep the tensors alive
            half = len(chunk) // 2
            yield from _on_all(do, [chunk[:half], chunk[half:]])
        else:
            yield found


def _stacked(samples: Sequence[Sample], device: torch.device | str) -> tuple[Tensor, Tensor]:
    return (
        torch.stack([sample.image for sample in samples]).to(device),
        torch.stack([sample.label for sample in samples]).to(device),
    )


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
    with torch.no_grad():  # unlike inference_mode, it suits models that keep tensors for later passes
        predictions = model(images).max(dim=1).indices.cpu().numpy()
    return counts.count(predictions, labels.cpu().numpy(), num_classes)


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
        f"{what} in {where}: training has diverged. The folder's checkpoint, if there is one, is an earlier, good "
        "one. Lower learning_rate (--set learning_rate=...) or raise warmup_epochs, with another --out folder."
    )
