"""Ranks that are shared where the difference may be chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from segbench import ensemble


class Contender(NamedTuple):
    """One score in a ranking.

    Attributes:
        value: the score; None if the entry lacks it.
        replicates: (R,) of a bootstrap over images; None without evidence.
        images: which images they were; replicates are paired among contenders that share it.
        measured: checked or reproduced, not reported: better at equal score.
    """

    value: float | None
    replicates: npt.NDArray[np.float32] | None
    images: str | None
    measured: bool


def ranks(contenders: Sequence[Contender]) -> list[int | None]:
    """One more than the number of contenders that are better beyond doubt; None without a score.

    Two that were measured on the same images are compared by the paired bootstrap over images, at 95%. Otherwise the
    higher score is better, and at equal score the measured one. Several may share a rank: it is not clear which of
    them is the better one.

    >>> ranks([Contender(0.5, None, None, True), Contender(0.5, None, None, False), Contender(None, None, None, True)])
    [1, 2, None]
    """
    found: list[int | None] = []
    # Rounded, so that a mean of three numbers does not differ from its equal in the last bit.
    values = np.array([np.nan if each.value is None else round(each.value, 9) for each in contenders])
    measured = np.array([each.measured for each in contenders], bool)
    groups: dict[str, list[int]] = {}
    for place, each in enumerate(contenders):
        if each.replicates is not None and each.images is not None and each.value is not None:
            groups.setdefault(each.images, []).append(place)
    samples = {name: np.stack([_replicates(contenders[place]) for place in group]) for name, group in groups.items()}
    extremes = {name: (each.min(axis=1), each.max(axis=1)) for name, each in samples.items()}
    row_of = {place: (name, row) for name, group in groups.items() for row, place in enumerate(group)}
    for place, each in enumerate(contenders):
        if each.value is None:
            found.append(None)
            continue
        above = (values > values[place]) | ((values == values[place]) & measured & (not each.measured))
        if place in row_of:
            name, row = row_of[place]
            members, own = np.array(groups[name]), samples[name][row]
            certain = extremes[name][0] > extremes[name][1][row]
            doubtful = np.flatnonzero(above[members] & ~certain)
            certain[doubtful] = ensemble.better(own, samples[name][doubtful])
            above[members] &= certain
        found.append(1 + int(above.sum()))
    return found


def _replicates(contender: Contender) -> npt.NDArray[np.float32]:
    if contender.replicates is None:
        raise ValueError("a contender without replicates is in no group")
    return contender.replicates
