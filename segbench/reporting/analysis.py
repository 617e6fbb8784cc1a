"""What the evidence of a run says: worst cases with intervals, classes, losses, sizes, images. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from segbench.counts import Counts
from segbench.ensemble import Choice, bootstrap_intervals, worst_case
from segbench.evidence import CLEAN
from segbench.reporting.runs import Run
from segbench.reporting.strata import Stratum, strata


@dataclass(frozen=True)
class View:
    """The model on the clean images, or attacked at one radius.

    Attributes:
        strength: 0 for the clean images.
        attacks: names of the candidates, the clean image first.
        aacc_counts, miou_counts: of the worst case for either score.
        aacc_choice, miou_choice: (N,) which candidate it takes of each image.
        aacc, miou: in [0,1].
        aacc_95, miou_95: bootstrap intervals over images.
        bound: of the mIoU: no choice among these candidates is below; it says nothing of other attacks.
    """

    strength: float
    attacks: tuple[str, ...]
    aacc_counts: Counts
    miou_counts: Counts
    aacc_choice: Choice
    miou_choice: Choice
    aacc: float
    miou: float
    aacc_95: tuple[float, float]
    miou_95: tuple[float, float]
    bound: float

    @property
    def label(self) -> str:
        return f"{self.strength:g}/255" if self.strength else "clean"

    @property
    def accuracy(self) -> Any:
        """(N,) share of right pixels of each image; NaN without a valid one."""
        pixels = self.aacc_counts.target.sum(axis=1)
        return np.where(pixels > 0, self.aacc_counts.correct / np.maximum(pixels, 1), np.nan)

    @property
    def at_zero(self) -> float:
        """The share of images without a right pixel."""
        accuracy = self.accuracy
        return float((accuracy[~np.isnan(accuracy)] == 0).mean())

    @property
    def strata(self) -> list[Stratum]:
        """By size, in the worst case for aAcc."""
        return strata(self.aacc_counts)

    def worst_classes(self) -> tuple[list[int], float]:
        """The labelled classes of the lowest IoU, and that."""
        iou = np.where(self.miou_counts.target.sum(axis=0) > 0, self.miou_counts.iou(), np.inf)
        return np.flatnonzero(iou == iou.min()).tolist(), float(iou.min())

    def won(self, choice: Choice) -> dict[str, float]:
        """The share of images on which each candidate is the worst."""
        return {name: float((choice == place).mean()) for place, name in enumerate(self.attacks)}


def views(run: Run) -> list[View]:
    """The clean images, and each radius of a run with scores, the attacks of a radius together."""
    clean = run.groups[CLEAN].counts
    protocol = run.manifest["protocol"]
    found = [_view(0.0, {"clean": clean}, protocol)]
    for eps, names in run.attacks.items():
        found.append(_view(eps, {"clean": clean} | {name: run.groups[eps, name].counts for name in names}, protocol))
    return found


def _view(eps: float, candidates: dict[str, Counts], protocol: Any) -> View:
    seed = protocol["search_seed"]
    worst = worst_case(list(candidates.values()), seed=seed, orders=protocol["search_orders"])
    intervals = bootstrap_intervals(worst.aacc_counts, worst.miou_counts, seed=seed)
    return View(
        eps, tuple(candidates), worst.aacc_counts, worst.miou_counts, worst.aacc_choice, worst.miou_choice, worst.aacc,
        worst.miou, intervals.aacc, intervals.miou, worst.miou_lower_bound,
    )  # fmt: skip


def middle(views_: list[View]) -> View:
    """The attacked view by which images are chosen: that of the middle radius."""
    attacked = views_[1:]
    return attacked[(len(attacked) - 1) // 2]


def extremes(view: View, number: int) -> tuple[list[int], list[int]]:
    """The rows of the images with the most and with the fewest right pixels, none twice; the first of equals."""
    accuracy = view.accuracy
    rows = [int(row) for row in np.argsort(accuracy, kind="stable") if not np.isnan(accuracy[row])]
    worst = rows[: min(number, (len(rows) + 1) // 2)]
    best = [row for row in rows[::-1][:number] if row not in worst]
    return best, worst
