"""The schedule of an attack: radius, step size, momentum and checkpoints of each step, as a table.

Source: Croce, Singh, Hein, ECCV 2024, section 4 (radius reduction); Croce & Hein, ICML 2020 (checkpoints). SEA.md,
sections 3 and 4, is the exact specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

MOMENTUM = 0.75
STAGES = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))  # radius over ε, share of the iterations


class Stage(NamedTuple):
    """A part of an attack: ``radius`` is a multiple of ε, and so is ``fixed_step``, the step size of plain PGD."""

    radius: float
    iterations: int
    fixed_step: float | None = None


class ScheduleRow(NamedTuple):
    """One evaluation of an attack, the start of a stage or a step; as float64.

    Attributes:
        radius: over ε.
        first: 1 at the start of a stage.
        rise: 1 if it counts as a rise of the tracked loss anyway: the first step of a stage.
        last: 1 at the last step of a stage, and at the end of the schedule.
        a: weight of the step that leads here.
        checkpoint: 1 at a checkpoint of the step control.
        interval: steps since the previous checkpoint.
        after: row of the next stage.
        step: number of the gradient step that follows, from 1.
        iterations: of the stage.
        step_size: over ε, at the start of the stage.
        live: 0 at the end of the schedule.
    """

    radius: Tensor
    first: Tensor
    rise: Tensor
    last: Tensor
    a: Tensor
    checkpoint: Tensor
    interval: Tensor
    after: Tensor
    step: Tensor
    iterations: Tensor
    step_size: Tensor
    live: Tensor


def schedule(stages: Sequence[Stage], offset: int = 0) -> list[tuple[float, ...]]:
    """The rows of an attack, for a table in which they begin at ``offset``; the last one is the end.

    >>> len(schedule([Stage(2.0, 3), Stage(1.0, 4)]))  # a start and the steps of each stage, and the end
    10
    """
    found: list[tuple[float, ...]] = []
    for radius, n, fixed_step in stages:
        after = offset + len(found) + n + 1
        interval, checkpoint = max(int(0.22 * n), 1), 0
        intervals: dict[int, int] = {}
        while fixed_step is None and (checkpoint := checkpoint + interval) < n:
            intervals[checkpoint] = interval
            interval = max(interval - max(int(0.03 * n), 1), max(int(0.06 * n), 1))
        for step in range(n + 1):
            found.append(
                (
                    radius,
                    step == 0,
                    step == 1,
                    step == n,
                    1.0 if step <= 1 or fixed_step is not None else MOMENTUM,
                    step in intervals,
                    intervals.get(step, 1),
                    after,
                    step + 1,
                    n,
                    2 * radius if fixed_step is None else fixed_step,
                    True,
                )
            )
    radius = stages[-1].radius
    found.append((radius, False, False, True, 1.0, False, 1, offset + len(found), 1, 1, 0.0, False))
    return [tuple(map(float, row)) for row in found]


def reduced(iterations: int) -> tuple[Stage, ...]:
    """The stages of progressive radius reduction.

    >>> [(stage.radius, stage.iterations) for stage in reduced(300)]
    [(2.0, 90), (1.5, 90), (1.0, 120)]
    """
    early = [Stage(factor, int(share * iterations)) for factor, share in STAGES[:-1]]
    return (*early, Stage(STAGES[-1][0], iterations - sum(stage.iterations for stage in early)))
