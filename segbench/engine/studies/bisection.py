"""The smallest radius that breaks an image, by bisection on a grid: what to try next, from what was tried.

Torch-free, and a function of the answers alone: a run that was killed continues from the answers that were written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from segbench.evidence import CLEAN, Key


class SmallestRadius(NamedTuple):
    """The end of a search: the smallest radius over 255 that breaks the image; 0 if it is broken without an attack,
    None if none does.
    """

    strength: float | None


class Search(NamedTuple):
    """The state of a search: the (ε, attack) to try next, or the result, and how many radii are decided."""

    then: Key | SmallestRadius
    decided: int


def next_step(broken: Mapping[Key, bool], strengths: Sequence[float], attacks: Sequence[str]) -> Search:
    """Bisection, which assumes that an image that withstands ε withstands each smaller one.

    That holds for the strongest attack there is, not for each that we have: near the end an image may withstand one
    radius and be broken at a smaller one. The result is a radius that does break the image: never below the true one.
    The other direction is no assumption: an attack within ε is one within each larger ε, so nothing is tried above a
    radius that broke the image, even one of another grid. The first attack that breaks an image at a radius is enough.

    >>> next_step({CLEAN: False, (2.0, "js"): True}, [1.0, 2.0, 3.0], ["js"])
    Search(then=(1.0, 'js'), decided=1)
    """
    if CLEAN not in broken:
        return Search(CLEAN, 0)
    if broken[CLEAN]:
        return Search(SmallestRadius(0.0), 0)
    known = min(
        (eps for (eps, attack), is_broken in broken.items() if is_broken and attack in attacks), default=math.inf
    )
    low, high, decided = -1, len(strengths), 0  # indices of the last radius withstood, and of the first that breaks
    while high - low > 1:
        middle = (low + high) // 2
        answers = [broken.get((strengths[middle], attack)) for attack in attacks]
        if strengths[middle] >= known:
            high = middle
        elif None in answers:
            return Search((strengths[middle], attacks[answers.index(None)]), decided)
        else:
            low = middle
        decided += 1
    return Search(SmallestRadius(strengths[high] if high < len(strengths) else None), decided)
