"""APGD for segmentation, at one radius and with progressive radius reduction.

Source: Croce, Singh, Hein, ECCV 2024, section 4 and appendix; Croce & Hein, ICML 2020 for APGD. SEA.md, sections 3
and 4, is the exact specification, and the symbols below are its symbols.

Everything is per image: a batch is only a way to compute. A finished image leaves the batch, so no forward or
backward pass is spent on it. The functions are pure: no I/O, no randomness, the model's parameters end as they began.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segbench.attacks.losses import Context, Loss, PixelTerms, get_loss, pixel_terms
from segbench.errors import UsageError

MOMENTUM = 0.75
RHO = 0.75
STAGES = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))  # radius over ε, share of the iterations


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


def run_stage(problem: Problem, tally: Tally, start: Tensor, *, eps: float, iterations: int) -> None:
    """One run of APGD at radius ``eps`` from ``start``; the best points end up in ``tally`` (SEA.md, section 3)."""
    tally.reset()
    index = torch.arange(len(start), device=start.device)
    context = Context(1, iterations, problem.class_weights)
    images = problem.images
    x = project(start, images, eps)
    now = evaluate(problem, index, x, context, backward=True)
    tally.record(index, x, now)
    gradient = _usable(now.gradient)
    previous, tracked = x, now.tracked
    best_x, best_gradient, best_tracked = x.clone(), gradient.clone(), tracked.clone()
    step_size = torch.full((len(x), 1, 1, 1), 2 * eps, dtype=x.dtype, device=x.device)
    was_halved = torch.ones(len(x), dtype=torch.bool, device=x.device)
    tracked_at_checkpoint = tracked.clone()
    rises = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    interval, since = max(int(0.22 * iterations), 1), 0

    for step in range(1, iterations + 1):
        a = 1.0 if step == 1 else MOMENTUM
        z = project(x + step_size * gradient.sign(), images, eps)
        x, previous = project(x + a * (z - x) + (1 - a) * (x - previous), images, eps), x
        now = evaluate(problem, index, x, context._replace(step=step + 1), backward=step < iterations)
        tally.record(index, x, now)
        if step == iterations:
            return
        gradient = _usable(now.gradient)
        rises += (now.tracked > tracked) | (step == 1)
        tracked = now.tracked
        improved = tracked > best_tracked
        best_x = torch.where(_per_image(improved), x, best_x)
        best_gradient = torch.where(_per_image(improved), gradient, best_gradient)
        best_tracked = torch.where(improved, tracked, best_tracked)

        since += 1
        if since == interval:
            halve = (rises <= RHO * interval) | (~was_halved & (best_tracked <= tracked_at_checkpoint))
            step_size = torch.where(_per_image(halve), step_size / 2, step_size)
            x = torch.where(_per_image(halve), best_x, x)
            gradient = torch.where(_per_image(halve), best_gradient, gradient)
            was_halved, tracked_at_checkpoint = halve, best_tracked.clone()
            rises = torch.zeros_like(rises)
            interval, since = max(interval - max(int(0.03 * iterations), 1), max(int(0.06 * iterations), 1)), 0

        active = now.correct > 0
        if not bool(active.all()):
            if not bool(active.any()):
                return
            keep = active.nonzero().squeeze(1)
            index, images, x, previous, gradient = index[keep], images[keep], x[keep], previous[keep], gradient[keep]
            tracked, best_x, best_gradient, best_tracked = (
                tracked[keep],
                best_x[keep],
                best_gradient[keep],
                best_tracked[keep],
            )
            step_size, was_halved, rises = step_size[keep], was_halved[keep], rises[keep]
            tracked_at_checkpoint = tracked_at_checkpoint[keep]


def _usable(gradient: Tensor | None) -> Tensor:
    """The gradient with non-finite components set to 0: such a component does not move."""
    assert gradient is not None  # an invariant of run_stage, not a user's mistake
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _problem(
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
    """Checks the arguments of an attack."""
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
    problem = _problem(
        model, images, labels, eps=eps, loss=loss, iterations=iterations, start=start,
        class_weights=class_weights, ignore_index=ignore_index,
    )  # fmt: skip
    return _staged(problem, start, [(eps, iterations)])


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
    problem = _problem(
        model, images, labels, eps=eps, loss=loss, iterations=iterations, start=start,
        class_weights=class_weights, ignore_index=ignore_index,
    )  # fmt: skip
    return _staged(problem, start, stages(eps, iterations))


def stages(eps: float, iterations: int) -> list[tuple[float, int]]:
    """Radius and iterations of each stage.

    >>> stages(4.0, 300)
    [(8.0, 90), (6.0, 90), (4.0, 120)]
    """
    early = [(factor * eps, int(share * iterations)) for factor, share in STAGES[:-1]]
    return [*early, (STAGES[-1][0] * eps, iterations - sum(count for _, count in early))]


def _staged(problem: Problem, start: Tensor | None, plan: Sequence[tuple[float, int]]) -> AttackResult:
    point = problem.images if start is None else start
    tally = Tally(problem)
    if len(problem.images):
        with frozen(problem.model):
            for radius, iterations in plan:
                if iterations:
                    run_stage(problem, tally, point, eps=radius, iterations=iterations)
                    point = tally.adversarial.clone()
    return tally.result()
