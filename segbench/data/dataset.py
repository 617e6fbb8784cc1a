"""One data set, whatever it is read from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from segbench.data import cache
from segbench.data.parallel import in_order
from segbench.data.protocols import IGNORE_INDEX, Colour, Window, spans
from segbench.errors import DataError

if TYPE_CHECKING:  # torch is loaded with the first sample: `segbench data` needs it for nothing else
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]


class Sample(NamedTuple):
    """One item: image (3,H,W) float32 in [0,1], label (H,W) int64 in 0..K-1 or 255, and the image's stable id."""

    image: Tensor
    label: Tensor
    image_id: str


class Files(Protocol):
    """What is known of images that come from files (`segbench.data.trees.PairedFiles`)."""

    def labels(self, image_id: str) -> Labels:
        """The labels alone, as `SegmentationDataset.read` gives them."""

    def files(self, image_id: str) -> Sequence[Any]:
        """The paths."""

    def stamps(self, image_ids: Sequence[str]) -> list[list[str | int]]:
        """Path, size and time of change of every file."""


@dataclass(frozen=True)
class SegmentationDataset:
    """Images with labels, in the order of their sorted ids. It can be pickled if its functions can.

    Attributes:
        id: name of the data set and its variant, e.g. ``camvid`` or ``pascal_voc/void-ignored``.
        split: ``train``, ``val`` or another one that the data set has.
        class_names: index = label.
        image_ids: unique, sorted.
        read: image id to pixels (H,W,3) uint8 and labels (H,W) of integers, as the model sees them.
        count_weights: computes the class weights (K,) of `mce_bal` and says what they were counted on.
        where: image id to the words that name its image and mask in a message.
        complete: number of images of the whole split where it is known, so that a partial copy is seen.
        preprocessing: what was done to the pictures, in words.
        window: how models are applied to large pictures; None for the whole picture at once.
        palette: class colours for pictures; index = label.
        files: where the images come from files.
        other_size: how the stored pictures differ in size from those that the id means, in words; empty if they do not.
        left_out: ids of training images that are also in the validation split; they are not in ``image_ids``.
    """

    id: str
    split: str
    class_names: tuple[str, ...]
    image_ids: tuple[str, ...]
    read: Callable[[str], tuple[Pixels, Labels]]
    count_weights: Callable[[], tuple[npt.NDArray[np.float64], str]]
    where: Callable[[str], str] = repr
    complete: int | None = None
    preprocessing: str = "as stored"
    window: Window | None = None
    palette: tuple[Colour, ...] = ()
    files: Files | None = None
    other_size: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def ignore_index(self) -> int:
        return IGNORE_INDEX

    @property
    def is_partial(self) -> bool:
        """Whether images are missing of a split whose number of images is known; those left out do not count."""
        return self.complete is not None and len(self) + len(self.left_out) < self.complete

    def __len__(self) -> int:
        return len(self.image_ids)

    def __iter__(self) -> Iterator[Sample]:
        return self.samples()

    def samples(self, workers: int | None = None) -> Iterator[Sample]:
        """All items in order, decoded ahead by ``workers`` threads; 0 for none, None for one a core."""
        return in_order(self.__getitem__, range(len(self)), workers if self.files else 0)

    def __getitem__(self, index: int) -> Sample:
        import torch

        image_id = self.image_ids[index]
        image, labels = self.arrays(image_id)
        return Sample(torch.from_numpy(image), torch.from_numpy(labels), image_id)

    def arrays(self, image_id: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Image (3,H,W) float32 in [0,1] and label (H,W) int64 of a sample, without torch.

        Raises:
            DataError: a damaged file, a label without meaning, or an image and a mask of different sizes.
        """
        return as_arrays(*self.checked(image_id))

    def checked(self, image_id: str) -> tuple[Pixels, Labels]:
        """What `read` gives, refused if sizes or labels are wrong.

        Raises:
            DataError: as `arrays`.
        """
        pixels, labels = self.read(image_id)
        if pixels.shape[:2] != labels.shape:
            raise DataError(
                f"{self.id}: the image is {size_text(pixels)}, its mask {size_text(labels)} pixels: "
                f"{self.where(image_id)}. Mend or remove the pair."
            )
        check_labels(labels, self.num_classes, f"{self.id}: {self.where(image_id)}")
        return pixels, labels

    def class_weights(self) -> Tensor:
        """(K,) float32, proportional to 1/N_c, sum 1 (0 for a class without a pixel): the weights of `mce_bal`."""
        import torch

        return torch.from_numpy(self.count_weights()[0]).float()

    def first(self, limit: int | None) -> SegmentationDataset:
        """The first ``limit`` images; None for all."""
        return self if limit is None else replace(self, image_ids=self.image_ids[:limit])

    def fingerprint(self) -> str:
        """SHA-256 over ids, pixels and labels as the model sees them, in order of id, class names and window.

        Remembered by the path, size and time of change of the files, where there are files.
        """
        if (known := self.known_fingerprint()) is not None:
            return known
        digest = Fingerprint(self)
        for image_id, (image, labels) in zip(
            self.image_ids, in_order(self.arrays, self.image_ids, None if self.files else 0), strict=True
        ):
            digest.add(image_id, image, labels)
        return digest.finish()

    def known_fingerprint(self) -> str | None:
        """The fingerprint, if an earlier pass over the same files has computed it."""
        found = cache.recall("fingerprint", self.stamp()) if self.files else None
        return found.get("fingerprint") if found else None

    def stamp(self) -> str:
        """A key of the files, by path, size and time of change, and of what is made of them.

        Raises:
            DataError: a file has vanished.
        """
        stamps = self.files.stamps(self.image_ids) if self.files else []
        return cache.key_of(self.id, self.split, self.preprocessing, self.class_names, stamps)


class Fingerprint:
    """The fingerprint of a data set, computed while its samples pass by in order."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self._dataset = dataset
        self._key = dataset.stamp() if dataset.files else None
        self._digest = hashlib.sha256("\0".join(dataset.class_names).encode())
        if dataset.window:
            self._digest.update(f"\0{dataset.window}".encode())
        self._seen = 0

    def update(self, sample: Sample) -> None:
        """Takes the next sample."""
        self.add(sample.image_id, sample.image.numpy(), sample.label.numpy())

    def add(self, image_id: str, image: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
        """Takes the arrays of the next sample, as `SegmentationDataset.arrays` gives them."""
        if image_id != self._dataset.image_ids[self._seen]:
            raise ValueError(f"{image_id!r} is not the next image; {self._dataset.image_ids[self._seen]!r} is")
        self._seen += 1
        self._digest.update(f"\0{image_id}\0{image.shape}\0".encode())
        self._digest.update(np.ascontiguousarray(image, "<f4").data)
        self._digest.update(np.ascontiguousarray(labels, "<i8").data)

    def finish(self) -> str:
        """The fingerprint, after the last sample; remembered if no file has changed meanwhile."""
        if self._seen != len(self._dataset):
            raise ValueError(f"{self._seen} of {len(self._dataset)} samples were seen")
        found = self._digest.hexdigest()
        if self._key and self._key == self._dataset.stamp():
            cache.remember("fingerprint", self._key, {"dataset": self._dataset.id, "fingerprint": found})
        return found


def as_arrays(pixels: Pixels, labels: Labels) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Image (3,H,W) float32 in [0,1] and label (H,W) int64; bit for bit what torch's ``.float().div_(255)`` gives.

    numpy, because torch would start threads in each of ours.

    >>> as_arrays(np.full((2, 1, 3), 51, np.uint8), np.zeros((2, 1)))[0].shape
    (3, 2, 1)
    """
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return np.divide(planes, np.float32(255), dtype=np.float32), np.array(labels, np.int64, order="C")


def check_labels(labels: Labels, num_classes: int, where: str) -> None:
    """Refuses labels outside 0..K-1 that are not 255.

    Raises:
        DataError: says ``where``, the value, and what to do.
    """
    if labels.dtype == np.uint8 and labels.size and labels.max() < num_classes:
        return
    wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= num_classes))]
    if wrong.size:
        raise DataError(
            f"{where}: the mask has the label {int(wrong[0])}; allowed are {spans(list(range(num_classes)))} and "
            f"{IGNORE_INDEX} (ignored). Correct the mask or the class list."
        )


def size_text(array: npt.NDArray[Any]) -> str:
    """Width and height for people.

    >>> size_text(np.zeros((3, 4)))
    '4x3'
    """
    return f"{array.shape[1]}x{array.shape[0]}"
