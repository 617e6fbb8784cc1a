"""APGD for segmentation, at one radius and with progressive radius reduction.

Source: Croce, Singh, Hein, ECCV 2024, section 4 and appendix; Croce & Hein, ICML 2020 for APGD. SEA.md, sections 3
and 4, is the exact specification, and the symbols below are its symbols.

Everything is per image: a batch is only a way to compute. A finished image leaves the batch, so no forward or
backward pass is spent on it. The functions are pure: no I/O, no randomness, the model's parameters end as they began.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segbench.attacks.losses import Context
from segbench.attacks.problem import AttackResult, Problem, Tally, evaluate, frozen, pose, project, usable

MOMENTUM = 0.75
RHO = 0.75
STAGES = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))  # radius over ε, share of the iterations


def run_stage(problem: Problem, tally: Tally, start: Tensor, *, eps: float, iterations: int) -> None:
    """One run of APGD at radius ``eps`` from ``start``; the best points end up in ``tally`` (SEA.md, section 3)."""
    tally.reset()
    index = torch.arange(len(start), device=start.device)
    context = Context(1, iterations, problem.class_weights)
    images = problem.images
    x = project(start, images, eps)
    now = evaluate(problem, index, x, context, backward=True)
    tally.record(index, x, now)
    gradient = usable(now.gradient)
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
        gradient = usable(now.gradient)
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


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


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
    problem = pose(
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
    problem = pose(
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
