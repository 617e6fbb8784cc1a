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
        replicates: (R,) of a bootstrap over images; None without evidence. Only measured ones have any.
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
    higher score is better, and at equal score the measured one. Nobody gets a better rank than one with a higher score.
    Several may share a rank: it is not clear which of them is the better one.

    >>> ranks([Contender(0.5, None, None, True), Contender(0.5, None, None, False), Contender(None, None, None, True)])
    [1, 2, None]
    """
    # Rounded, so that a mean of three numbers does not differ from its equal in the last bit.
    values = np.array([np.nan if each.value is None else round(each.value, 9) for each in contenders])
    measured = np.array([each.measured for each in contenders], bool)
    groups: dict[str, list[tuple[int, npt.NDArray[np.float32]]]] = {}
    for place, each in enumerate(contenders):
        if each.replicates is not None and each.images is not None and each.value is not None and each.measured:
            groups.setdefault(each.images, []).append((place, each.replicates))
    found: list[int | None] = [None] * len(contenders)
    for place in np.flatnonzero(~np.isnan(values)).tolist():
        ties = (values == values[place]) & measured & (not measured[place])
        found[place] = 1 + int(((values > values[place]) | ties).sum())
    for group in groups.values():
        _among_the_same_images(group, values, found)
    ahead, highest, last = 0, 0, None  # nobody stands above one with a higher score
    for place in np.lexsort((~measured, -values))[: np.count_nonzero(~np.isnan(values))].tolist():
        if (values[place], measured[place]) != last:
            ahead, last = highest, (values[place], measured[place])
        found[place] = max(ahead, found[place] or 0)
        highest = max(highest, found[place] or 0)
    return found


def _among_the_same_images(
    group: list[tuple[int, npt.NDArray[np.float32]]], values: npt.NDArray[np.float64], found: list[int | None]
) -> None:
    """Takes from the ranks those of the group that are higher, but not better beyond doubt."""
    group.sort(key=lambda each: -values[each[0]])
    places, samples = [place for place, _ in group], np.stack([each for _, each in group])
    descending = values[places]
    # If all but k samples of one are above all but k samples of another, at most 2k pairs can go the other way.
    k = int((1 - ensemble.CERTAINTY) * samples.shape[1]) // 2
    ordered = np.sort(samples, axis=1)
    low, high = ordered[:, k], ordered[:, -1 - k]
    for row, place in enumerate(places):
        above = int(np.searchsorted(-descending, -descending[row], side="left"))
        doubtful = int(np.argmin(np.append(low[:above] > high[row], False)))
        certain = doubtful + int(ensemble.significantly_above(samples[row], samples[doubtful:above]).sum())
        rank = found[place]
        found[place] = rank - (above - certain) if rank is not None else None
