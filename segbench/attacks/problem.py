"""What all attacks share: the result, the evaluation of a batch of points, and the best point per image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segbench.attacks.losses import Context, Loss, PixelTerms, get_loss, pixel_terms
from segbench.errors import UsageError


class AttackResult(NamedTuple):
    """The outcome of an attack, per image.

    Attributes:
        adversarial: the visited point with the lowest pixel accuracy, the latest of equals, (N,3,H,W).
        accuracy: its share of correct valid pixels, (N,) float64; 0 for an image without valid pixels.
        predictions: the model's argmax there, (N,H,W) int64.
        tracked_loss: best plain cross-entropy seen in the last stage, summed over valid pixels / (H*W), (N,).
        forwards: forward passes spent, (N,) int64.
        backwards: backward passes spent, (N,) int64.
        zero_gradients: gradients that were zero everywhere although pixels were still correct, (N,) int64.
        nonfinite_gradients: gradients with a NaN or infinity, (N,) int64; such components do not move.
    """

    adversarial: Tensor
    accuracy: Tensor
    predictions: Tensor
    tracked_loss: Tensor
    forwards: Tensor
    backwards: Tensor
    zero_gradients: Tensor
    nonfinite_gradients: Tensor


class Problem(NamedTuple):
    """What stays the same during an attack."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    loss: Loss
    class_weights: Tensor | None
    ignore_index: int


class Evaluation(NamedTuple):
    """One evaluation of a batch of points: tracked loss (N,), correct pixels (N,), predictions, gradient or None."""

    tracked: Tensor
    correct: Tensor
    predictions: Tensor
    gradient: Tensor | None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Takes the parameters' gradients away for the time of an attack."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def image_sum(values: Tensor) -> Tensor:
    """(N,H,W) to (N,): rows first, so that rounding does not depend on how many images are in the batch."""
    return values.sum(dim=-1).sum(dim=-1)


def project(x: Tensor, images: Tensor, eps: float) -> Tensor:
    """Projection on the l_inf ball of radius ``eps`` around ``images`` and then on [0,1]."""
    return torch.minimum(torch.maximum(x, images - eps), images + eps).clamp_(0, 1)


def evaluate(problem: Problem, index: Tensor, x: Tensor, context: Context, *, backward: bool) -> Evaluation:
    """Forward, and if asked backward, of the images ``index`` at the points ``x``."""
    labels = problem.labels[index]
    with torch.enable_grad():
        x = x.detach().requires_grad_(backward)
        terms: PixelTerms = pixel_terms(problem.model(x), labels, problem.ignore_index)
        gradient = None
        if backward:
            objective = problem.loss(terms, context).sum()
            (gradient,) = torch.autograd.grad(objective, x)
    return Evaluation(
        tracked=image_sum(terms.ce.detach()) / labels[0].numel(),
        correct=terms.correct.flatten(1).sum(dim=1),
        predictions=terms.predictions,
        gradient=gradient,
    )


class Tally:
    """What an attack returns, kept while it runs: the best point per image and the passes spent."""

    def __init__(self, problem: Problem) -> None:
        n, shape = len(problem.images), problem.labels.shape
        device = problem.images.device
        self.valid = (problem.labels != problem.ignore_index).flatten(1).sum(dim=1)
        self.adversarial = problem.images.clone()
        self.correct = torch.zeros(n, dtype=torch.int64, device=device)
        self.predictions = torch.zeros(shape, dtype=torch.int64, device=device)
        self.tracked = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
        self.counters = torch.zeros(4, n, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """A new stage: points of the stages before no longer count."""
        self.correct.fill_(torch.iinfo(torch.int64).max)
        self.tracked.fill_(-torch.inf)

    def record(self, index: Tensor, x: Tensor, evaluation: Evaluation) -> None:
        """Counts the passes and keeps the points that have no more correct pixels than the best so far."""
        self.counters[0, index] += 1
        if evaluation.gradient is not None:
            self.counters[1, index] += 1
            largest = evaluation.gradient.flatten(1).abs().amax(dim=1)
            self.counters[2, index] += (largest == 0) & (evaluation.correct > 0)
            self.counters[3, index] += ~torch.isfinite(largest)
        better = (evaluation.correct <= self.correct[index]).nonzero().squeeze(1)
        chosen = index[better]
        self.adversarial[chosen] = x[better]
        self.correct[chosen] = evaluation.correct[better]
        self.predictions[chosen] = evaluation.predictions[better]
        self.tracked[index] = torch.maximum(self.tracked[index], evaluation.tracked.double())

    def result(self) -> AttackResult:
        """The result so far."""
        return AttackResult(
            self.adversarial,
            self.correct.double() / self.valid.clamp(min=1),
            self.predictions,
            self.tracked,
            *self.counters,
        )


def usable(gradient: Tensor | None) -> Tensor:
    """The gradient with non-finite components set to 0: such a component does not move."""
    assert gradient is not None  # an invariant of run_stage, not a user's mistake
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def pose(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    loss: str,
    iterations: int,
    start: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
) -> Problem:
    """The problem, its arguments checked (see `segbench.attacks.apgd`)."""
    if images.ndim != 4 or not images.is_floating_point():
        raise UsageError(f"images must be a float tensor (N,C,H,W), not {images.dtype} {tuple(images.shape)}.")
    if labels.shape != (images.shape[0], *images.shape[2:]):
        raise UsageError(f"labels must be (N,H,W) = {(images.shape[0], *images.shape[2:])}, not {tuple(labels.shape)}.")
    if not 0 < eps <= 1:
        raise UsageError(f"eps must be in (0, 1], on the scale of the images (8/255 = 0.0314), not {eps}.")
    if iterations < 1:
        raise UsageError(f"iterations must be at least 1, not {iterations}.")
    if start is not None and start.shape != images.shape:
        raise UsageError(f"start must have the shape of images, {tuple(images.shape)}, not {tuple(start.shape)}.")
    if class_weights is not None:
        class_weights = class_weights.to(images.device)
    return Problem(model, images, labels, get_loss(loss), class_weights, ignore_index)
