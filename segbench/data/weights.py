"""Class weights of `mce_bal`: published ones, or 1/N_c counted on the training split (SEA.md, section 2)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from segbench.data import cache
from segbench.data.parallel import in_order
from segbench.data.protocols import IGNORE_INDEX

if TYPE_CHECKING:
    from segbench.data.dataset import SegmentationDataset

PUBLISHED, COUNTED = "published values", "training split"


def inverse_frequency(pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """1/N_c normalised to sum 1; a class without a pixel gets 0.

    >>> inverse_frequency(np.array([1, 3, 0])).tolist()
    [0.75, 0.25, 0.0]
    """
    weights = np.divide(1.0, pixels, out=np.zeros(len(pixels)), where=pixels > 0)
    total = weights.sum()
    return weights / total if total else weights


def class_pixels(data: SegmentationDataset, report: Callable[[], None] = lambda: None) -> npt.NDArray[np.int64]:
    """(K,) pixels of each class, ignored ones not counted, as the model sees them. One pass over the masks.

    Remembered, with the fingerprint of the labels, by the path, size and time of change of the files.

    Args:
        data: the images.
        report: called after each image.
    """
    key = data.stamp() if data.files else ""
    if key and (known := cache.recall("pixels", key)) and len(known.get("pixels", ())) == data.num_classes:
        return np.array(known["pixels"], np.int64)
    pixels, digest = np.zeros(data.num_classes, np.int64), hashlib.sha256()
    labels_of = data.files.labels if data.files else lambda image_id: data.read(image_id)[1]
    for image_id, labels in zip(
        data.image_ids, in_order(labels_of, data.image_ids, None if data.files else 0), strict=True
    ):
        digest.update(f"\0{image_id}\0{labels.shape}\0".encode())
        digest.update(np.ascontiguousarray(labels).data)
        pixels += np.bincount(labels[labels != IGNORE_INDEX], minlength=data.num_classes)
        report()
    if key and key == data.stamp():
        cache.remember("pixels", key, {"labels_sha256": digest.hexdigest(), "pixels": pixels.tolist()})
    return pixels


def counted(data: SegmentationDataset, report: Callable[[], None] = lambda: None) -> npt.NDArray[np.float64]:
    """(K,) weights 1/N_c, normalised; says which classes have no pixel."""
    pixels = class_pixels(data, report)
    if empty := [name for name, number in zip(data.class_names, pixels, strict=True) if not number]:
        logging.getLogger("segbench").warning(
            "%s, %s split: no pixel of %s, so the weight in mce_bal is 0.", data.id, data.split, ", ".join(empty)
        )
    return inverse_frequency(pixels)
