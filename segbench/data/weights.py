"""Class weights of `mce_bal`: published ones, or 1/N_c counted on the training split (SEA.md, section 2)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from segbench.data import cache
from segbench.data.parallel import in_order
from segbench.data.protocols import IGNORE_INDEX

if TYPE_CHECKING:
    from segbench.data.dataset import Labels, SegmentationDataset

PUBLISHED, COUNTED = "published values", "training split"


class ClassWeights(NamedTuple):
    """Weights (K,), what they were counted on, and the pixels (K,) of each class; None if nothing was counted here."""

    values: npt.NDArray[np.float64]
    source: str
    pixels: npt.NDArray[np.int64] | None = None


def inverse_frequency(pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """1/N_c normalised to sum 1; a class without a pixel gets 0.

    >>> inverse_frequency(np.array([1, 3, 0])).tolist()
    [0.75, 0.25, 0.0]
    """
    weights = np.divide(1.0, pixels, out=np.zeros(len(pixels)), where=pixels > 0)
    total = weights.sum()
    return weights / total if total else weights


class PixelCount:
    """Counts the pixels of each class while the labels of a data set pass by in order.

    Attributes:
        pixels: (K,) pixels of each class so far.
        ignored: ignored pixels so far.
    """

    def __init__(self, data: SegmentationDataset) -> None:
        self._data = data
        self._key = data.stamp() if data.files else ""
        self.pixels = np.zeros(data.num_classes, np.int64)
        self.ignored = 0

    def known(self) -> npt.NDArray[np.int64] | None:
        """(K,) what an earlier pass over the same files has counted."""
        found = (cache.recall("pixels", self._key) or {}).get("pixels") if self._key else None
        if not isinstance(found, list) or len(found) != self._data.num_classes:
            return None
        return np.array(found, np.int64) if all(isinstance(number, int) for number in found) else None

    def add(self, labels: Labels) -> None:
        """Takes the labels (H,W) of the next image."""
        kept = labels[labels != IGNORE_INDEX]
        self.pixels += np.bincount(kept, minlength=self._data.num_classes)
        self.ignored += labels.size - kept.size

    def finish(self) -> npt.NDArray[np.int64]:
        """(K,) pixels of each class; remembered if no file has changed meanwhile."""
        if self._key and self._key == self._data.stamp():
            cache.remember("pixels", self._key, {"pixels": self.pixels.tolist()})
        return self.pixels


def class_pixels(data: SegmentationDataset, report: Callable[[], None] = lambda: None) -> npt.NDArray[np.int64]:
    """(K,) pixels of each class, ignored ones not counted, as the model sees them. One pass over the masks.

    Remembered by the path, size and time of change of the files.

    Args:
        data: the images.
        report: called after each image.
    """
    count = PixelCount(data)
    if (known := count.known()) is not None:
        return known
    labels_of = data.files.labels if data.files else lambda image_id: data.read(image_id)[1]
    for labels in in_order(labels_of, data.image_ids, None if data.files else 0):
        count.add(labels)
        report()
    return count.finish()


def counted(data: SegmentationDataset, source: str, report: Callable[[], None] = lambda: None) -> ClassWeights:
    """Weights 1/N_c, normalised; says which classes have no pixel.

    Args:
        data: the split to count on.
        source: what to call it.
        report: called after each image.
    """
    pixels = class_pixels(data, report)
    if empty := [name for name, number in zip(data.class_names, pixels, strict=True) if not number]:
        logging.getLogger("segbench").warning(
            "%s, %s split: no pixel of %s, so the weight in mce_bal is 0.", data.id, data.split, ", ".join(empty)
        )
    return ClassWeights(inverse_frequency(pixels), source, pixels)
