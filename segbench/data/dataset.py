"""One data set, whatever it is read from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from segbench.errors import DataError

IGNORE_INDEX = 255

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]


class Sample(NamedTuple):
    """One item: image (3,H,W) float32 in [0,1], label (H,W) int64 in 0..K-1 or 255, and the image's stable id."""

    image: Tensor
    label: Tensor
    image_id: str


@dataclass(frozen=True)
class SegmentationDataset:
    """Images with labels, in the order of their sorted ids.

    Attributes:
        id: name of the data set, e.g. ``camvid``.
        split: ``train`` or ``val``.
        class_names: index = label.
        image_ids: unique, sorted.
        read: image id to pixels (H,W,3) uint8 and labels (H,W) of integers, as the model sees them.
        count_weights: computes the class weights (K,) of `mce_bal` and says what they were counted on.
        where: image id to the words that name its image and mask in a message.
        complete: number of images of the whole split where it is known, so that a partial copy is seen.
    """

    id: str
    split: str
    class_names: tuple[str, ...]
    image_ids: tuple[str, ...]
    read: Callable[[str], tuple[Pixels, Labels]]
    count_weights: Callable[[], tuple[npt.NDArray[np.float64], str]]
    where: Callable[[str], str] = repr
    complete: int | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def ignore_index(self) -> int:
        return IGNORE_INDEX

    def __len__(self) -> int:
        return len(self.image_ids)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        image_id = self.image_ids[index]
        pixels, labels = self.read(image_id)
        if pixels.shape[:2] != labels.shape:
            raise DataError(
                f"{self.id}: the image is {_size(pixels)}, its mask {_size(labels)} pixels: {self.where(image_id)}. "
                "Mend or remove the pair."
            )
        check_labels(labels, self.num_classes, f"{self.id}: {self.where(image_id)}")
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)
        return Sample(image, torch.from_numpy(labels.astype(np.int64)), image_id)

    def class_weights(self) -> Tensor:
        """(K,) float32, proportional to 1/N_c, sum 1 (0 for a class without a pixel): the weights of `mce_bal`."""
        return torch.from_numpy(self.count_weights()[0]).float()

    def first(self, limit: int | None) -> SegmentationDataset:
        """The first ``limit`` images; None for all."""
        return self if limit is None else replace(self, image_ids=self.image_ids[:limit])

    def fingerprint(self) -> str:
        """SHA-256 over ids, pixels and labels as the model sees them, in order of id, and over the class names."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for image, label, image_id in self:
            digest.update(f"\0{image_id}\0{tuple(image.shape)}\0".encode())
            digest.update(image.numpy().astype("<f4").tobytes())
            digest.update(label.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def check_labels(labels: Labels, num_classes: int, where: str) -> None:
    """Refuses labels outside 0..K-1 that are not 255.

    Raises:
        DataError: says ``where``, the value, and what to do.
    """
    wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= num_classes))]
    if wrong.size:
        raise DataError(
            f"{where}: the mask has the label {int(wrong[0])}; allowed are 0..{num_classes - 1} and "
            f"{IGNORE_INDEX} (ignored). Correct the mask or the class list."
        )


def inverse_frequency(pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """1/N_c normalised to sum 1; a class without a pixel gets 0.

    >>> inverse_frequency(np.array([1, 3, 0])).tolist()
    [0.75, 0.25, 0.0]
    """
    weights = np.divide(1.0, pixels, out=np.zeros(len(pixels)), where=pixels > 0)
    total = weights.sum()
    return weights / total if total else weights


def _size(array: npt.NDArray[Any]) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"
