"""What the evidence of one entry says beyond its entry: best known, replicates, classes, single images."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from segbench import ensemble, entries
from segbench.counts import Counts
from segbench.entries import additions
from segbench.entries.placement import labels_digest
from segbench.entries.reading import read_evidence
from segbench.errors import ContentError
from segbench.evidence import CHECKS, CLEAN, Evidence

BINS = 20  # of the histogram of per-image accuracy
SIDE_BY_SIDE = 50  # entries from which processes are worth their start

Scores = dict[str, npt.NDArray[np.float32]]  # metric -> (R,)


class Assessment(NamedTuple):
    """What was found.

    Attributes:
        images: digest of image ids and labels: entries that share it may be compared image by image.
        replicates: view (``clean`` or ε as text) -> metric -> (R,) bootstrap replicates.
        best_known: for each result ``{"aacc", "miou", "by"}``.
        detail: per-class IoU and histogram of per-image accuracy, for each view.
    """

    images: str
    replicates: dict[str, Scores]
    best_known: list[dict[str, Any]]
    detail: dict[str, Any]


def view_of(strength: float) -> str:
    """The name of the view at a radius, its numerator over 255.

    >>> view_of(8.0), view_of(0.25)
    ('8', '0.25')
    """
    return f"{strength:g}"


def assess_all(paths: Sequence[Path], processes: int = 1) -> list[tuple[dict[str, Any], Assessment | None]]:
    """`assess` for many entries, in their order, in several processes where they are many."""
    if processes < 2 or len(paths) < SIDE_BY_SIDE:
        return [assess(path) for path in paths]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(assess, paths, chunksize=16))


def assess(path: Path) -> tuple[dict[str, Any], Assessment | None]:
    """Reads the entry at ``path``, its evidence and its external evaluations.

    Returns:
        The entry, and what its evidence says; None without evidence.

    Raises:
        ContentError: something is damaged or does not fit together.
    """
    entry = entries.read_entry(path)
    if entry["evidence"] is None:
        return entry, None
    found = entries.evidence_of(path, entry)
    if CLEAN not in found.groups:
        raise ContentError(f"{path}: the evidence has no clean images.")
    if entry["protocol"]["search_seed"] is None or entry["protocol"]["search_orders"] is None:
        raise ContentError(f"{path}: an entry with evidence names the seed and orders of its search. segbench validate")
    search = entry["protocol"]["search_seed"], entry["protocol"]["search_orders"]
    clean = found.groups[CLEAN].counts
    replicates = {"clean": _replicates(clean, clean, search[0])}
    iou, histogram = {"clean": _iou(clean)}, {"clean": _histogram(clean)}
    for result in entry["results"]:
        eps, view = result["strength"], view_of(result["strength"])
        attacks = [group.counts for key, group in found.groups.items() if key[0] == eps and key[1] not in CHECKS]
        worst = ensemble.worst_case([clean, *attacks], seed=search[0], orders=search[1])
        replicates[view] = _replicates(worst.aacc_counts, worst.miou_counts, search[0])
        iou[view], histogram[view] = _iou(worst.miou_counts), _histogram(worst.aacc_counts)
    known = additions.best_known(found, list(_externals(path)), entry["results"], search)
    detail = {"images": clean.num_images, "iou": iou, "histogram": histogram}
    return entry, Assessment(labels_digest(found), replicates, known, detail)


def _externals(path: Path) -> list[tuple[str, Evidence]]:
    folder = additions.folder_of(path, additions.EXTERNAL)
    return [
        (document["name"], read_evidence(folder / document["evidence"]["file"], document["evidence"]["sha256"]))
        for document in additions.additions(path, additions.EXTERNAL)
    ]


def _replicates(aacc_counts: Counts, miou_counts: Counts, seed: int) -> Scores:
    found = ensemble.bootstrap(aacc_counts, miou_counts, seed=seed)
    return {"aacc": found.aacc.astype(np.float32), "miou": found.miou.astype(np.float32)}


def _iou(counts: Counts) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in counts.iou()]


def _histogram(counts: Counts) -> list[int]:
    """Number of images by accuracy, in `BINS` equal bins; images without a valid pixel are left out."""
    pixels = counts.target.sum(axis=1)
    accuracy = counts.correct[pixels > 0] / pixels[pixels > 0]
    found: list[int] = np.histogram(accuracy, BINS, (0, 1))[0].tolist()
    return found
