"""APGD for segmentation, at one radius and with progressive radius reduction.

Source: Croce, Singh, Hein, ECCV 2024, section 4 and appendix; Croce & Hein, ICML 2020 for APGD. The functions are
pure: no I/O, no randomness, the model's parameters end as they began.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.evaluator import Evaluator
from segbench.attacks.problem import COUNTERS, AttackResult, check_arguments, frozen, outside_inference_mode
from segbench.attacks.stages import Stage, reduced


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    loss: str,
    iterations: int,
    start: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
) -> AttackResult:
    """APGD at one radius: n+1 forward and n backward passes per image at most.

    Args:
        model: images (N,3,H,W) to logits (N,K,H,W); used in the mode that it is in.
        images: in [0,1], any device and float dtype.
        labels: (N,H,W) int64 in 0..K-1 or ``ignore_index``.
        eps: l_inf radius on the scale of the images, e.g. 8/255.
        loss: a name in `segbench.attacks.losses.LOSSES`.
        iterations: number of steps n >= 1.
        start: first point, projected on the ball; None for the images themselves.
        class_weights: (K,), needed by ``mce_bal``.
        ignore_index: label of pixels that do not count.

    Raises:
        UsageError: an argument is out of range.
    """
    check_arguments(images, labels, eps=eps, loss=loss, iterations=iterations, start=start)
    return attack(model, images, labels, eps, loss, (Stage(1.0, iterations),), start, class_weights, ignore_index)


def red_eps_apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    loss: str,
    iterations: int,
    start: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
) -> AttackResult:
    """APGD at 2ε, 1.5ε and ε in turn, each stage from the lowest-accuracy point of the one before (SEA.md, section 4).

    Arguments and errors as in `apgd`; n iterations are split as int(0.3n), int(0.3n) and the rest, and only points of
    the last stage count. At most n + 3 forward passes per image.
    """
    check_arguments(images, labels, eps=eps, loss=loss, iterations=iterations, start=start)
    return attack(model, images, labels, eps, loss, reduced(iterations), start, class_weights, ignore_index)


def attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    loss: str,
    stages: tuple[Stage, ...],
    start: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
) -> AttackResult:
    """All images together through the stages."""
    with torch.inference_mode(False), torch.no_grad():
        return _attack(
            model, outside_inference_mode(images), outside_inference_mode(labels), outside_inference_mode(start),
            outside_inference_mode(class_weights), eps, loss, stages, ignore_index,
        )  # fmt: skip


def _attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    start: Tensor | None,
    class_weights: Tensor | None,
    eps: float,
    loss: str,
    stages: tuple[Stage, ...],
    ignore_index: int,
) -> AttackResult:
    if class_weights is not None:
        class_weights = class_weights.to(images.device)
    batch = AttackBatch(Evaluator(model, class_weights=class_weights, ignore_index=ignore_index))
    found: dict[int, AttackResult] = {}
    if len(images):
        starts = [None] * len(images) if start is None else list(start)
        with frozen(model):
            batch.add([Job(x, y, loss, eps, stages, s) for x, y, s in zip(images, labels, starts, strict=True)])
            found = batch.run()
    if not found:
        return _nothing(images, labels)
    return AttackResult(*(torch.stack(values) for values in zip(*(found[k] for k in sorted(found)), strict=True)))


def _nothing(images: Tensor, labels: Tensor) -> AttackResult:
    """The result of an attack on no image."""
    numbers, counters = images.new_zeros(0, dtype=torch.float64), labels.new_zeros(0)
    return AttackResult(images, numbers, labels, numbers, *([counters] * len(COUNTERS)))
