"""Integer counts per image and class, from which every score is computed.

Metrics are count -> merge -> compute. aAcc and mIoU are those of SEA.md, section 5: pooled over the data set, and
the mean over the classes whose union is not empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from segbench.errors import UsageError

IntArray = npt.NDArray[np.int64]


class Counts(NamedTuple):
    """Pixels per image and class, each (N,K) int64.

    Attributes:
        intersection: valid pixels of the class that were predicted as it.
        predicted: valid pixels predicted as the class.
        target: valid pixels labelled as the class.
    """

    intersection: IntArray
    predicted: IntArray
    target: IntArray

    @property
    def num_images(self) -> int:
        return int(self.intersection.shape[0])

    @property
    def num_classes(self) -> int:
        return int(self.intersection.shape[1])

    @property
    def union(self) -> IntArray:
        return self.predicted + self.target - self.intersection

    @property
    def correct(self) -> IntArray:
        """(N,) correct valid pixels per image."""
        correct: IntArray = self.intersection.sum(axis=1)
        return correct

    def aacc(self) -> float:
        """Correct valid pixels over valid pixels, pooled, in [0,1]; 0 if no pixel is valid."""
        return _ratio(int(self.intersection.sum()), int(self.target.sum()))

    def macc(self) -> float:
        """Mean over the classes with a labelled pixel of correct over labelled pixels, in [0,1]."""
        return _mean_ratio(self.intersection.sum(axis=0), self.target.sum(axis=0))

    def iou(self) -> npt.NDArray[np.float64]:
        """(K,) intersection over union per class, pooled; NaN where the union is empty."""
        union = self.union.sum(axis=0)
        undefined = np.full(len(union), np.nan)
        iou: npt.NDArray[np.float64]
        iou = np.divide(self.intersection.sum(axis=0), union, out=undefined, where=union > 0)
        return iou

    def miou(self) -> float:
        """Mean over the classes with a non-empty union, in [0,1]; 0 if there is none."""
        return _mean_ratio(self.intersection.sum(axis=0), self.union.sum(axis=0))

    def take(self, rows: npt.NDArray[np.intp]) -> Counts:
        """The images ``rows``, in that order."""
        return Counts(*(array[rows] for array in self))


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else 0.0


def _mean_ratio(numerator: IntArray, denominator: IntArray) -> float:
    seen = denominator > 0
    return float(np.mean(numerator[seen] / denominator[seen])) if seen.any() else 0.0


def count(predictions: Any, labels: Any, num_classes: int, ignore_index: int = 255) -> Counts:
    """Counts of a batch.

    Args:
        predictions: (N,H,W) integers in 0..K-1; an array or a CPU tensor.
        labels: (N,H,W) integers in 0..K-1 or ``ignore_index``.
        num_classes: K.
        ignore_index: label of pixels that do not count.

    Raises:
        UsageError: shapes differ, values are not integers, or one is out of range on a valid pixel.

    >>> c = count(np.array([[[0, 1]]]), np.array([[[0, 0]]]), 2)
    >>> c.aacc(), c.miou()
    (0.5, 0.25)
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 3:
        raise UsageError(f"predictions {predictions.shape} and labels {labels.shape} must both be (N,H,W).")
    n = len(labels)
    valid = labels != ignore_index
    for name, array in (("labels", labels), ("predictions", predictions)):
        if not np.issubdtype(array.dtype, np.integer):
            raise UsageError(f"{name} are {array.dtype}; they must be integers.")
        outside = array[valid & ((array < 0) | (array >= num_classes))]
        if outside.size:
            raise UsageError(
                f"{name} contain {outside[0]}; allowed are 0..{num_classes - 1} (and {ignore_index} in labels)."
            )
    offset = np.broadcast_to((np.arange(n) * num_classes)[:, None, None], labels.shape)

    def per_class(classes: npt.NDArray[Any], where: npt.NDArray[np.bool_]) -> IntArray:
        flat = np.bincount((classes.astype(np.int64) + offset)[where], minlength=n * num_classes)
        return flat.reshape(n, num_classes).astype(np.int64)

    return Counts(
        intersection=per_class(labels, valid & (predictions == labels)),
        predicted=per_class(predictions, valid),
        target=per_class(labels, valid),
    )


def merge(parts: Iterable[Counts]) -> Counts:
    """Counts of several batches, one after the other.

    Raises:
        UsageError: no part, or parts of different numbers of classes.
    """
    parts = list(parts)
    if not parts:
        raise UsageError("There are no counts to merge.")
    if len({part.num_classes for part in parts}) > 1:
        raise UsageError("The counts to merge have different numbers of classes.")
    return Counts(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
