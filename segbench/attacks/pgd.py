"""PGD with a fixed step: the optimiser of the SegPGD and CosPGD baselines."""

from __future__ import annotations

from torch import Tensor, nn

from segbench.attacks.apgd import attack
from segbench.attacks.problem import AttackResult, check_arguments
from segbench.attacks.stages import Stage
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
    check_arguments(images, labels, eps=eps, loss=loss, iterations=iterations, start=start)
    stages = (Stage(1.0, iterations, fixed_step=step_size / eps),)
    return attack(model, images, labels, eps, loss, stages, start, class_weights, ignore_index)
