"""Scores by the size of what is labelled, from counts alone. Torch-free.

Counts know of each image and class the labelled pixels, not single objects: a segment is a class in an image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from segbench.counts import Counts

BOUNDS = (0.01, 0.1)  # shares of the image's valid pixels, between the strata
NAMES = ("below 1 %", "1 to 10 %", "above 10 %")


class Stratum(NamedTuple):
    """Segments of one size.

    Attributes:
        name: the share of the image that they take.
        segments: how many there are.
        aacc: their right pixels over their pixels, pooled; None without segments.
        iou: their intersection over union, pooled; pixels of the class that are seen elsewhere in the image count.
    """

    name: str
    segments: int
    aacc: float | None
    iou: float | None


def strata(counts: Counts) -> list[Stratum]:
    """The segments of an evaluation by size.

    >>> image = Counts(*(np.array([row]) for row in ([90, 1], [98, 2], [96, 4])))
    >>> [(each.name, each.segments, each.aacc) for each in strata(image)]
    [('below 1 %', 0, None), ('1 to 10 %', 1, 0.25), ('above 10 %', 1, 0.9375)]
    """
    target, union = counts.target, counts.union
    share = target / np.maximum(target.sum(axis=1, keepdims=True), 1)
    place = np.digitize(share, BOUNDS)
    found = []
    for number, name in enumerate(NAMES):
        chosen = (place == number) & (target > 0)
        right = int(counts.intersection[chosen].sum())
        found.append(Stratum(name, int(chosen.sum()), _ratio(right, target[chosen]), _ratio(right, union[chosen])))
    return found


def _ratio(right: int, pixels: npt.NDArray[np.int64]) -> float | None:
    total = int(pixels.sum())
    return right / total if total else None
