"""A step of APGD for a batch: what is decided for each image, and the points that follow from it.

`segbench.attacks.reference` is the same for one image, as one plain loop: read that first. A decision is one number per
image. Tensors as large as the images are then changed in place, in memory that is already allocated, so that no step
fails halfway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from segbench.attacks.evaluator import Evaluation
from segbench.attacks.problem import COUNTERS
from segbench.attacks.stages import ScheduleRow

RHO = 0.75  # as in `reference`, which explains it
NUMBERS = (  # of each image, which `decide` reads
    "at", "eps", "by_loss", "tracked", "step_size", "was_halved", "rises", "best_tracked", "tracked_at_checkpoint",
    "correct", "best_loss", *COUNTERS,
)  # fmt: skip


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


class Change(NamedTuple):
    """What happens to each image: flags (N,) bool, and numbers (N,) float64.

    Attributes:
        better: this point is no worse than the best one so far.
        improved: it raises the tracked loss over all points of its stage.
        halve: the attack goes back to the point of the best tracked loss, with half the step.
        starts: a stage starts, from the best point so far.
        step_size: of the step that follows.
        a: its weight against the momentum.
        radius: of the ball, on the scale of the image.
    """

    better: Tensor
    improved: Tensor
    halve: Tensor
    starts: Tensor
    step_size: Tensor
    a: Tensor
    radius: Tensor


def decide(
    rows: dict[str, Tensor], at: ScheduleRow, table: Tensor, now: Evaluation
) -> tuple[dict[str, Tensor], Change]:
    """Counts the passes, finds what is better, and controls the steps.

    A few numbers of each image: NumPy is fastest with those on a CPU, and a GPU's must stay on it.

    Returns per-image numbers, which replace those of the rows, and what happens to the points.
    """
    gradient, extremes = now.gradient, list[Tensor]()
    if gradient is not None:
        extremes = [gradient.amin(dim=(1, 2, 3)), gradient.amax(dim=(1, 2, 3))]  # both NaN if one component is
    numbers = {name: rows[name] for name in NUMBERS}
    if table.is_cuda:
        return _decided(torch, numbers, at, table, now.tracked, now.correct, extremes)
    found, change = _decided(
        np,
        {name: values.numpy() for name, values in numbers.items()},
        ScheduleRow._make(values.numpy() for values in at),
        table.numpy(),
        now.tracked.numpy(),
        now.correct.numpy(),
        [values.double().numpy() for values in extremes],  # NumPy has no bfloat16
    )
    return {name: torch.from_numpy(values) for name, values in found.items()}, Change(*map(torch.from_numpy, change))


def _decided(
    xp: Any, rows: dict[str, Any], at: Any, table: Any, tracked: Any, correct: Any, extremes: Sequence[Any]
) -> tuple[dict[str, Any], Any]:
    """The rules of `decide`, when the step is halved among them, with the functions of ``xp``: NumPy or torch."""
    first, live, last, checkpoint = at.first != 0, at.live != 0, at.last != 0, at.checkpoint != 0
    tracked, by_loss = xp.asarray(tracked, dtype=xp.float64), rows["by_loss"]

    lower, higher = correct <= rows["correct"], tracked > rows["best_loss"]
    better = live & (first | xp.where(by_loss, higher, lower))
    best_loss = xp.where(first, tracked, xp.maximum(rows["best_loss"], tracked))
    numbers = {
        "forwards": rows["forwards"] + live,
        "correct": xp.where(better, correct, rows["correct"]),
        "best_loss": xp.where(live, best_loss, rows["best_loss"]),
    }
    if extremes:
        lowest, highest = extremes
        is_zero = (lowest == 0) & (highest == 0)
        is_finite = xp.isfinite(lowest) & xp.isfinite(highest)
        numbers["backwards"] = rows["backwards"] + ~last
        numbers["zero_gradients"] = rows["zero_gradients"] + (~last & is_zero & (correct > 0))
        numbers["nonfinite_gradients"] = rows["nonfinite_gradients"] + (~last & ~is_finite)

    rises = xp.where(first, 0, rows["rises"] + ((tracked > rows["tracked"]) | (at.rise != 0)))
    improved = first | (tracked > rows["best_tracked"])
    best_tracked = xp.where(improved, tracked, rows["best_tracked"])
    was_halved = first | rows["was_halved"]
    stalled = ~was_halved & (best_tracked <= rows["tracked_at_checkpoint"])
    halve = checkpoint & ((rises <= RHO * at.interval) | stalled)
    step_size = xp.where(first, at.step_size * rows["eps"], rows["step_size"])
    step_size = xp.where(halve, step_size / 2, step_size)

    ends = last | (~first & (correct == 0) & ~by_loss)
    row = xp.where(ends, xp.asarray(at.after, dtype=xp.int64), rows["at"] + 1)
    then = ScheduleRow._make(table[:, row])
    numbers |= {
        "at": row,
        "tracked": tracked,
        "step_size": step_size,
        "was_halved": xp.where(checkpoint, halve, was_halved),
        "rises": xp.where(checkpoint, 0, rises),
        "best_tracked": best_tracked,
        "tracked_at_checkpoint": xp.where(first | checkpoint, best_tracked, rows["tracked_at_checkpoint"]),
    }
    starts, radius = then.first != 0, then.radius * rows["eps"]
    return numbers, Change(better, improved, halve, starts, step_size, then.a, radius)


def move(rows: dict[str, Tensor], change: Change, now: Evaluation) -> dict[str, Tensor]:
    """Keeps the points that are better, and takes each image to its next one; all in place.

    Returns the buffers under their new names: the next points are written over the signs of the gradient, and the
    buffer of the previous points will hold the signs of the next iteration.
    """
    x, previous, direction = rows["x"], rows["previous"], rows["direction"]
    lowest, highest = rows["lowest"], rows["highest"]
    # All that takes memory comes first: below, a step that fails could not be repeated.
    step_size, a, radius = (_per_image(each.to(x.dtype)) for each in (change.step_size, change.a, change.radius))
    rest = 1 - a
    _keep(rows["adversarial"], x, change.better)
    _keep(rows["predictions"], now.predictions, change.better)
    if now.gradient is None:
        direction.zero_()
    else:
        torch.nan_to_num(now.gradient, nan=0.0, posinf=0.0, neginf=0.0, out=direction).sign_()  # such do not move
    _keep(rows["best_x"], x, change.improved)
    _keep(rows["best_direction"], direction, change.improved)
    _keep(x, rows["best_x"], change.halve)
    _keep(direction, rows["best_direction"], change.halve)

    on_host = not x.is_cuda
    if not on_host or bool(change.starts.any()):
        torch.sub(rows["image"], radius, out=lowest).clamp_(0, 1)
        torch.add(rows["image"], radius, out=highest).clamp_(0, 1)
    z = direction.mul_(step_size).add_(x)
    torch.clamp(z, lowest, highest, out=z)
    momentum = torch.sub(x, previous, out=previous).mul_(rest)
    then = z.sub_(x).mul_(a).add_(x).add_(momentum)
    _keep(then, rows["adversarial"], change.starts)
    torch.clamp(then, lowest, highest, out=then)
    return {"x": then, "previous": x, "direction": previous}


def _keep(old: Tensor, new: Tensor, where: Tensor) -> None:
    """Overwrites the images of ``old`` for which ``where`` (N,) holds; on a CPU image by image, which is fastest."""
    if old.is_cuda:
        _keep_on_device(old, new, where)
        return
    rows = where.nonzero().flatten().tolist()
    if len(rows) == len(old):
        old.copy_(new)
        return
    for row in rows:
        old[row].copy_(new[row])


def _keep_on_device(old: Tensor, new: Tensor, where: Tensor) -> None:
    """`_keep` without asking a GPU which images those are."""
    torch.where(where.view(-1, *[1] * (old.ndim - 1)), new, old, out=old)
