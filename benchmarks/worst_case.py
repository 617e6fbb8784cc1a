"""Seconds of the worst-case search and its lower bound at the size of ADE20K, on one core.

    python benchmarks/worst_case.py [--images 2000] [--candidates 4] [--classes 151] [--rounds 5] [--out FILE.json]

The counts are made up, seeded and sparse like real ones: class frequencies fall like 1/rank, an image shows 5 to 14
classes, and the attacks are about equally strong, so that the search has to choose for nearly every image. The target
of 3 s is for the default size. The process is pinned to one core where the system allows it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from segbench.counts import Counts
from segbench.ensemble import bootstrap_intervals, worst_case

PIXELS = 512 * 512
TARGET_SECONDS = 3.0


def shares(rng: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """``total`` pixels split at random in ``parts``."""
    pixels = (rng.dirichlet(np.full(parts, 0.7)) * total).astype(np.int64)
    pixels[0] += total - pixels.sum()
    return pixels


def made_up(images: int, candidates: int, classes: int, seed: int = 0) -> list[Counts]:
    """Candidate 0 is good on most classes like a clean image, the others are right on a fifth of the pixels."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, classes + 1)
    frequency /= frequency.sum()
    target = np.zeros((images, classes), np.int64)
    for row in target:
        seen = rng.choice(classes, size=min(classes, int(rng.integers(5, 15))), replace=False, p=frequency)
        row[seen] = shares(rng, PIXELS, len(seen))
    result = []
    for candidate in range(candidates):
        right = rng.beta(1, 4, target.shape) if candidate else rng.beta(5, 2, target.shape)
        intersection = (target * right).astype(np.int64)
        predicted = intersection.copy()
        for row, correct, labelled in zip(predicted, intersection, target, strict=True):
            present = np.flatnonzero(labelled)
            instead = np.unique(np.r_[rng.choice(present, 3), rng.choice(classes, 6, p=frequency)])
            row[instead] += shares(rng, PIXELS - int(correct.sum()), len(instead))
        result.append(Counts(intersection, predicted, target))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--classes", type=int, default=151)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    candidates = made_up(options.images, options.candidates, options.classes)
    search, interval = [], []
    for _ in range(options.rounds):
        started = time.perf_counter()
        worst = worst_case(candidates)
        searched = time.perf_counter()
        bootstrap_intervals(worst.aacc_counts, worst.miou_counts)
        search.append(searched - started)
        interval.append(time.perf_counter() - searched)
    report = {
        "machine": f"{platform.machine()}, one core",
        "numpy": np.__version__,
        "images": options.images,
        "candidates": options.candidates,
        "classes": options.classes,
        "rounds": options.rounds,
        "search_and_bound_seconds": {"median": statistics.median(search), "min": min(search), "max": max(search)},
        "bootstrap_seconds": statistics.median(interval),
        "target_seconds": TARGET_SECONDS,
        "aacc": worst.aacc,
        "miou": worst.miou,
        "miou_lower_bound": worst.miou_lower_bound,
        "miou_best_candidate": min(candidate.miou() for candidate in candidates),
    }
    print(json.dumps(report, indent=2))
    print("\n| images x candidates x classes | search and bound | bootstrap | target |\n| :-- | --: | --: | --: |")
    size = f"{options.images} x {options.candidates} x {options.classes}"
    print(
        f"| {size} | {statistics.median(search):.2f} s | {report['bootstrap_seconds']:.2f} s | <= {TARGET_SECONDS} s |"
    )
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
