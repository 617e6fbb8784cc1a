"""The smallest radius at which an image falls, by bisection on a grid: what to try next, from what was tried.

Torch-free, and a function of the answers alone: a run that was killed goes on from the answers that were written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from segbench.evidence import CLEAN, Key


class Found(NamedTuple):
    """The end of a search: the smallest radius over 255 at which the image falls; 0 if it never stood, None if it
    stands at all of them.
    """

    eps_255: float | None


class Step(NamedTuple):
    """Where a search is: the (ε, attack) to try next, or what was found, and how many radii are decided."""

    then: Key | Found
    decided: int


def step(fallen: Mapping[Key, bool], radii_255: Sequence[float], attacks: Sequence[str]) -> Step:
    """Bisection, which takes for granted that an image that stands at ε stands at each smaller one.

    That is so of the strongest attack there is, not of each that we have: near the end it may stand at one radius and
    fall at a smaller one. What is found is a radius at which the image does fall: never below the true one.
    The other direction is no assumption: what was found within ε is within each larger one, so nothing is tried above a
    radius at which the image fell, be it of another grid.

    An image falls at a radius as soon as one of the attacks brings it down there; the others are not tried then.

    Args:
        fallen: (ε over 255, attack) to whether the image fell; the clean image is `CLEAN`.
        radii_255: the grid, rising.
        attacks: in the order in which they are tried.

    >>> step({CLEAN: False, (2.0, "js"): True}, [1.0, 2.0, 3.0], ["js"])
    Step(then=(1.0, 'js'), decided=1)
    """
    if CLEAN not in fallen:
        return Step(CLEAN, 0)
    if fallen[CLEAN]:
        return Step(Found(0.0), 0)
    known = min((eps for (eps, attack), fell in fallen.items() if fell and attack in attacks), default=math.inf)
    stands, falls, decided = -1, len(radii_255), 0
    while falls - stands > 1:
        middle = (stands + falls) // 2
        answers = [fallen.get((radii_255[middle], attack)) for attack in attacks]
        if radii_255[middle] >= known:
            falls = middle
        elif None in answers:
            return Step((radii_255[middle], attacks[answers.index(None)]), decided)
        else:
            stands = middle
        decided += 1
    return Step(Found(radii_255[falls] if falls < len(radii_255) else None), decided)
