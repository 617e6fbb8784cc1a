"""The units of work of a run: (clean | loss x radius) x chunk of images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from segbench.evidence import CHECK_EPS_255, CHECK_LOSS, CHECK_SEARCH, CLEAN, SEARCH_EPS_255, Group
from segbench.protocol import MINIMUM, PROTOCOLS, SEA_V1

CHUNK = 16  # images in a unit: small enough to lose little in a kill, large enough to fill a batch
CHECK_ITERATIONS = 100  # 50 are too few for a robust Segmenter, whose gradients are not masked
STANDARDISED_CHECK = 200, 10.0  # iterations and largest margin since sea-v2: it leaves 1.3% there, with 100 and 20 2.1%
CHECK_IMAGES = 16


@dataclass(frozen=True)
class Unit:
    """One unit of work; ``loss`` is ``clean``, a loss of the protocol, or ``check`` (the attack at a huge ε)."""

    strength: float
    loss: str
    chunk: int
    image_ids: tuple[str, ...]

    @property
    def name(self) -> str:
        """File name without suffix, e.g. ``eps8_mce_0003``."""
        radius = repr(self.strength).removesuffix(".0")  # all digits: two radii never share a file
        return f"eps{radius}_{self.loss}_{self.chunk:04d}"


def loss_of_unit(name: str) -> str:
    """The loss in `Unit.name`; a ValueError or TypeError if it is none.

    >>> loss_of_unit("eps8_mce_bal_0003")
    'mce_bal'
    """
    if not (match := re.fullmatch(r"eps[^_]+_(\w+)_[0-9]{4,}", name)):
        raise ValueError(name)
    return match[1]


class FinishedUnit(NamedTuple):
    """A finished unit: counts, statistics that belong to the result, and its cost."""

    unit: Unit
    group: Group
    stats: dict[str, Any]
    cost: dict[str, Any]


def is_trial(protocol: Mapping[str, Any], *, images: int, available: int) -> bool:
    """Whether a run is a first look: fewer iterations than its protocol has, or fewer images than its checks need.

    ``protocol`` are the fields of a `segbench.protocol.Protocol`; ``available`` are the images of the data set.
    """
    official = PROTOCOLS.get(protocol["name"])
    return official is not None and (
        protocol["iterations"] < official.iterations or images < min(available, CHECK_IMAGES)
    )


def plan(
    protocol: str,
    image_ids: Sequence[str],
    strengths: Sequence[float],
    losses: Sequence[str],
    *,
    checked: bool = True,
) -> list[Unit]:
    """All units in the order in which they run: clean, the checks, then radius by radius, loss by loss.

    The checks are an attack at a huge ε, and since sea-v2 a search without gradients. Without them where it is not
    ``checked``: they would take most of the time of a trial (`is_trial`), and shortened they give false alarms. A
    comparison of attacks has none; in a search for the smallest ε only the clean images are units.

    >>> [unit.name for unit in plan("sea-v1", ["a"], [4.0], ["mce"])]
    ['eps0_clean_0000', 'eps64_check_0000', 'eps4_mce_0000']
    """
    if protocol == MINIMUM:
        strengths = ()
    chunks = [tuple(image_ids[start : start + CHUNK]) for start in range(0, len(image_ids), CHUNK)]
    groups = [CLEAN] + [(eps, loss) for eps in strengths for loss in losses]
    units = [Unit(eps, loss, number, ids) for eps, loss in groups for number, ids in enumerate(chunks)]
    if protocol in PROTOCOLS and checked:
        first = tuple(image_ids[:CHECK_IMAGES])
        checks = [Unit(CHECK_EPS_255, CHECK_LOSS, 0, first)]
        if protocol != SEA_V1.name and SEARCH_EPS_255 in strengths:
            checks.append(Unit(SEARCH_EPS_255, CHECK_SEARCH, 0, first))
        units[len(chunks) : len(chunks)] = checks
    return units
