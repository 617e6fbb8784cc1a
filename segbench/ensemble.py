"""Worst case over candidates: one candidate per image, chosen to minimise aAcc or mIoU over the data set.

SEA.md, section 5. Sums are exact integers; only the final ratios are floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from segbench.counts import Counts, IntArray
from segbench.errors import UsageError

Choice = npt.NDArray[np.intp]
CERTAINTY = 0.975  # share of paired bootstrap samples in which the better one wins
MAX_PIXELS = 2**53  # of a class in the data set: the search holds sums as floats, which are exact up to here
MAX_FACTOR = math.isqrt(2**63 - 1)  # the product of two such sums is an int64


class WorstCase(NamedTuple):
    """The worst case.

    Attributes:
        aacc: pooled accuracy of `aacc_choice`, in [0,1]; the exact minimum.
        miou: mIoU of `miou_choice`, in [0,1]; the lowest found.
        miou_lower_bound: no choice has a mIoU below this.
        aacc_choice: (N,) index of the candidate with the fewest correct pixels, the first of equals.
        miou_choice: (N,) index of the candidate that the mIoU search chose.
        aacc_counts: counts of `aacc_choice`.
        miou_counts: counts of `miou_choice`.
    """

    aacc: float
    miou: float
    miou_lower_bound: float
    aacc_choice: Choice
    miou_choice: Choice
    aacc_counts: Counts
    miou_counts: Counts


class Intervals(NamedTuple):
    """Percentile bootstrap intervals (low, high) in [0,1]."""

    aacc: tuple[float, float]
    miou: tuple[float, float]


def worst_case(candidates: Sequence[Counts], *, seed: int = 0, orders: int = 8) -> WorstCase:
    """The worst case over candidates, e.g. the clean image and one adversarial image per loss.

    Args:
        candidates: counts of the same images in the same order, each (N,K).
        seed: of the orders in which the mIoU search visits the images.
        orders: number of searches; the lowest is kept.

    Raises:
        UsageError: no candidate or image, shapes or targets differ, or too many pixels.

    >>> one = Counts(*(np.array([row]) for row in ([2, 1], [2, 2], [3, 1])))
    >>> worst_case([one]).miou == one.miou()
    True
    """
    _check(candidates, orders)
    intersection = np.stack([candidate.intersection for candidate in candidates], axis=1)  # (N,A,K)
    union = np.stack([candidate.union for candidate in candidates], axis=1)
    aacc_choice = np.argmin(intersection.sum(axis=2), axis=1)
    start = int(np.argmin([candidate.miou() for candidate in candidates]))
    differing = np.flatnonzero(
        (intersection != intersection[:, :1]).any(axis=(1, 2)) | (union != union[:, :1]).any(axis=(1, 2))
    )
    choices = np.full((orders, len(intersection)), start, np.intp)
    rngs = [np.random.default_rng([seed, order]) for order in range(orders)]
    miou_choice = choices[_descend(intersection, union, candidates[0].target, choices, differing, rngs).argmin()]
    aacc_counts, miou_counts = chosen(candidates, aacc_choice), chosen(candidates, miou_choice)
    miou = miou_counts.miou()
    return WorstCase(
        aacc=aacc_counts.aacc(),
        miou=miou,
        miou_lower_bound=min(_lower_bound(intersection, union, candidates[0].target), miou),
        aacc_choice=aacc_choice,
        miou_choice=miou_choice,
        aacc_counts=aacc_counts,
        miou_counts=miou_counts,
    )


def chosen(candidates: Sequence[Counts], choice: Choice) -> Counts:
    """Counts of candidate ``choice[i]`` for image i."""
    rows = np.arange(len(choice))
    return Counts(*(np.stack(arrays)[choice, rows] for arrays in zip(*candidates, strict=True)))


def _check(candidates: Sequence[Counts], orders: int) -> None:
    if not candidates or not candidates[0].num_images:
        raise UsageError("worst_case needs at least one candidate and one image.")
    if orders < 1:
        raise UsageError(f"orders must be at least 1, not {orders}.")
    for candidate in candidates[1:]:
        if not np.array_equal(candidate.target, candidates[0].target):
            raise UsageError(
                "The candidates of worst_case differ in their targets: "
                "they are not counts of the same images in the same order."
            )
    if max(float(array.sum(axis=0, dtype=np.float64).max()) for each in candidates for array in each) > MAX_PIXELS:
        raise UsageError(f"worst_case computes exactly with up to {MAX_PIXELS} pixels per class; there are more.")


def _descend(
    intersection: IntArray,
    union: IntArray,
    target: IntArray,
    choices: Choice,
    images: npt.NDArray[np.intp],
    rngs: Sequence[np.random.Generator],
) -> npt.NDArray[np.float64]:
    """Greedy descents on mIoU, one for each generator; changes ``choices`` (O,N) in place.

    The descents do not know of each other. They run side by side because numpy takes about as long for one image as
    for one image of each. Sums are held as floats, which are exact below 2^53.

    Returns:
        (O,) the mIoU that each reached.
    """
    each = np.stack([intersection, union], axis=2).astype(np.float64)  # (N,A,2,K)
    totals = each[np.arange(len(each)), choices].sum(axis=1)  # (O,2,K)
    mious = _mean_of_ratios(target, union, totals)
    best = mious(totals)
    active = np.arange(len(rngs))
    while len(active):
        before, rows = best.copy(), np.arange(len(active))
        for visited in np.stack([rngs[order].permutation(images) for order in active.tolist()], axis=1):
            now = choices[active, visited]
            sums = each[visited]  # (O,A,2,K): what the totals would be if the image were switched to each candidate
            sums += (totals[active] - sums[rows, now])[:, None]
            values = mious(sums)
            candidate = values.argmin(axis=1)
            lower = np.flatnonzero(values[rows, candidate] < best[active])
            if len(lower):
                order, to = active[lower], candidate[lower]
                best[order], choices[order, visited[lower]] = values[lower, to], to
                totals[order] = sums[lower, to]
        active = active[best[active] < before[active]]
    return best


def _mean_of_ratios(
    target: IntArray, union: IntArray, totals: npt.NDArray[np.float64]
) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """`_mious` of sums (...,2,K) of intersection and union; cheaper, with the same bits, where no union can vanish.

    A labelled class always has a union. One that nobody labels or predicts gets a union of 1 in ``totals``.
    """
    labelled, possible = target.sum(axis=0) > 0, union.sum(axis=(0, 1)) > 0
    if (possible & ~labelled).any():
        return lambda sums: _mious(sums[..., 0, :], sums[..., 1, :])
    totals[:, 1, ~possible] += 1
    seen = max(int(possible.sum()), 1)

    def mious(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        means: npt.NDArray[np.float64] = (sums[..., 0, :] / sums[..., 1, :]).sum(axis=-1) / seen
        return means

    return mious


def _mious(intersection: npt.NDArray[Any], union: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """MIoU of sums (...,K)."""
    ratios = intersection / np.maximum(union, 1)  # an empty union has an empty intersection
    seen = np.minimum(union, 1).sum(axis=-1)
    means: npt.NDArray[np.float64] = ratios.sum(axis=-1) / np.maximum(seen, 1)
    return means


def _lower_bound(intersection: IntArray, union: IntArray, target: IntArray) -> float:
    """Each class alone picks its candidates: the mean of the per-class minima.

    A class without a labelled pixel counts as 0 wherever it is predicted and not at all elsewhere; the bound counts
    it as soon as some candidate predicts it, which can only lower the mean.
    """
    labelled = target.sum(axis=0) > 0
    possible = int(np.count_nonzero(labelled | (union.sum(axis=(0, 1)) > 0)))
    if not possible:
        return 0.0
    return float(_smallest_ratio(intersection[..., labelled], union[..., labelled]).sum() / possible)


def _smallest_ratio(intersection: IntArray, union: IntArray) -> npt.NDArray[np.float64]:
    """(K,) minimum over choices of sum I / sum U per class, in exact integers: Python's, where int64 may overflow."""
    large = union.max(axis=1).sum(axis=0) > MAX_FACTOR
    smallest = np.empty(len(large))
    for classes, dtype in ((~large, np.int64), (large, object)):
        if classes.any():
            smallest[classes] = _dinkelbach(*(array[..., classes].astype(dtype) for array in (intersection, union)))
    return smallest


def _dinkelbach(intersection: npt.NDArray[Any], union: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(K,) minimum over choices of sum I / sum U per class.

    (p, q) is the ratio so far; the choice that minimises sum(q I - p U) lowers it, until the minimum is 0.
    """
    p, q = intersection[:, 0].sum(axis=0), union[:, 0].sum(axis=0)
    while True:
        choice = np.argmin(q * intersection - p * union, axis=1)[:, None]
        new_p = np.take_along_axis(intersection, choice, axis=1)[:, 0].sum(axis=0)
        new_q = np.take_along_axis(union, choice, axis=1)[:, 0].sum(axis=0)
        lower = q * new_p - p * new_q < 0
        if not lower.any():
            return np.asarray(p / q)
        p, q = np.where(lower, new_p, p), np.where(lower, new_q, q)


class Replicates(NamedTuple):
    """Scores of bootstrap samples of the images, each (R,) in [0,1].

    Two models that were measured on the same images in the same order, with the same seed, see the same samples: their
    replicates may be subtracted one by one (a paired bootstrap).
    """

    aacc: npt.NDArray[np.float64]
    miou: npt.NDArray[np.float64]


def bootstrap(aacc_counts: Counts, miou_counts: Counts, *, seed: int = 0, resamples: int = 1000) -> Replicates:
    """Scores over resampled images, the choice of candidates held fixed.

    Args:
        aacc_counts: counts for aAcc.
        miou_counts: counts for mIoU.
        seed: of the resampling.
        resamples: R, number of bootstrap samples.
    """
    draws = _draws(aacc_counts.num_images, seed, resamples)
    correct, valid = draws @ aacc_counts.correct, draws @ aacc_counts.target.sum(axis=1)
    mious = _mious((draws @ miou_counts.intersection).astype(np.int64), (draws @ miou_counts.union).astype(np.int64))
    return Replicates(correct / np.maximum(valid, 1), mious)


@lru_cache(maxsize=2)
def _draws(images: int, seed: int, resamples: int) -> npt.NDArray[np.float64]:
    """(R,N) how often each image is in each sample; the same for every radius and model, so made once."""
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    found = draws.astype(np.float64)
    found.flags.writeable = False
    return found


def bootstrap_intervals(
    aacc_counts: Counts, miou_counts: Counts, *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Intervals:
    """Percentile intervals of `bootstrap`; ``level`` is the coverage in (0,1)."""
    found = bootstrap(aacc_counts, miou_counts, seed=seed, resamples=resamples)
    return Intervals(interval(found.aacc, level), interval(found.miou, level))


def interval(values: npt.NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of replicates."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def significantly_above(
    one: npt.NDArray[np.floating[Any]], others: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.bool_]:
    """Which of ``others`` (M,R) are above ``one`` (R,): in 97.5% of the paired bootstrap samples.

    >>> significantly_above(np.array([0.5, 0.6]), np.array([[0.6, 0.7], [0.5, 0.9], [0.4, 0.5]])).tolist()
    [True, False, False]
    """
    wins = np.add.reduce(others > one, axis=1, dtype=np.uint16 if len(one) < 2**16 else np.uint32)
    above: npt.NDArray[np.bool_] = wins >= CERTAINTY * len(one)
    return above
