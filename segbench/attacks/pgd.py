"""PGD with a fixed step: the optimiser of the SegPGD and CosPGD baselines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segbench.attacks.losses import Context
from segbench.attacks.problem import AttackResult, Tally, evaluate, frozen, pose, project, usable
from segbench.errors import UsageError


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    loss: str,
    iterations: int,
    step_size: float,
    start: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
) -> AttackResult:
    """Signed gradient ascent x <- P(x + step_size * sign(g)); the lowest-accuracy point is returned.

    Arguments and errors as in `segbench.attacks.apgd`, and ``step_size`` on the scale of the images. An image whose
    accuracy is 0 after a step leaves the batch.
    """
    if not step_size > 0:
        raise UsageError(f"step_size must be positive, not {step_size}.")
    problem = pose(
        model, images, labels, eps=eps, loss=loss, iterations=iterations, start=start,
        class_weights=class_weights, ignore_index=ignore_index,
    )  # fmt: skip
    tally = Tally(problem)
    tally.reset()
    index = torch.arange(len(images), device=images.device)
    x = project(images if start is None else start, images, eps)
    with frozen(model):
        for step in range(1, iterations + 2):
            if not len(index):
                break
            context = Context(step, iterations, problem.class_weights)
            now = evaluate(problem, index, x, context, backward=step <= iterations)
            tally.record(index, x, now)
            if step > iterations:
                break
            x = project(x + step_size * usable(now.gradient).sign(), images[index], eps)
            if step > 1:
                keep = (now.correct > 0).nonzero().squeeze(1)
                index, x = index[keep], x[keep]
    return tally.result()
