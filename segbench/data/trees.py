"""A data set on disk: its splits, which image belongs to which mask, and how a pair is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from segbench.data import reading
from segbench.data.dataset import Labels, Pixels, size_text
from segbench.data.protocols import DataProtocol
from segbench.errors import DataError


class Pair(NamedTuple):
    """An image and its mask."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class Listing:
    """The files of a split.

    Attributes:
        pairs: image id to its files.
        problems: what is wrong with the folders, each naming a file; a split with problems is not loaded.
        leaks: ids in ``pairs`` of training images that are also in the validation split.
        images: number of images of the complete split, where it is known.
        notes: files that are not used, in words.
    """

    pairs: Mapping[str, Pair]
    problems: tuple[str, ...] = ()
    leaks: tuple[str, ...] = ()
    images: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tree:
    """A data set found on disk.

    Attributes:
        protocol: how it is used.
        base: the folder that holds it.
        splits: those that are there.
        find: lists the files of a split; raises `DataError` for one that is not there. A function of a module with
            its arguments (`functools.partial`), so that data sets can be pickled.
    """

    protocol: DataProtocol
    base: Path
    splits: tuple[str, ...]
    find: Callable[[str], Listing] = field(repr=False)


@dataclass(frozen=True)
class PairedFiles:
    """Reads the pairs of a listing as the protocol says."""

    protocol: DataProtocol
    pairs: Mapping[str, Pair]

    def read(self, image_id: str) -> tuple[Pixels, Labels]:
        """Pixels (H,W,3) uint8 and labels (H,W) uint8 as the model sees them.

        Raises:
            DataError: a damaged file, a label without meaning, or an image and a mask of different sizes.
        """
        image, labels = self.pairs[image_id].image, self._stored_labels(image_id)
        picture = self.picture(image_id)
        if picture.size != labels.shape[::-1] and self.protocol.turned:
            picture = reading.read_image(image, self.protocol.bits)  # a mask drawn on the picture as stored
        if picture.size != labels.shape[::-1]:
            raise DataError(
                f"{self.protocol.id}: the image is {picture.width}x{picture.height}, its mask {size_text(labels)} "
                f"pixels: {self.where(image_id)}. Mend or remove the pair."
            )
        with self._named(image_id):
            return self.protocol.resize.image(picture), self.protocol.resize.labels(labels)

    def picture(self, image_id: str) -> Image.Image:
        """The picture alone, before it is resized."""
        read = reading.read_turned_image if self.protocol.turned else reading.read_image
        return read(self.pairs[image_id].image, self.protocol.bits)

    def labels(self, image_id: str) -> Labels:
        """The labels alone."""
        labels = self._stored_labels(image_id)
        with self._named(image_id):
            return self.protocol.resize.labels(labels)

    def files(self, image_id: str) -> Pair:
        """Image and mask."""
        return self.pairs[image_id]

    def where(self, image_id: str) -> str:
        """Image and mask in words."""
        return " with ".join(map(str, self.pairs[image_id]))

    def stamps(self, image_ids: Iterable[str]) -> list[list[str | int]]:
        """Id, path, size and times of change of every file: by these the results of a pass are known again.

        Device, inode and the time of its last change belong to it: another folder behind the same link, or a
        file with its old time put back, is another one.

        Raises:
            DataError: a file is gone.
        """
        used = self.protocol  # what is made of the files belongs to the key as well
        stamps: list[list[str | int]] = [["as", repr(used.labels), repr(used.resize), used.turned, used.bits or 0]]
        for image_id in image_ids:
            for path in self.pairs[image_id]:
                try:
                    found = path.stat()
                except OSError as error:
                    raise DataError(f"{path} is gone ({error.strerror or error}). Restore it.") from error
                times = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino]
                stamps.append([image_id, str(path.absolute()), *times])
        return stamps

    def _stored_labels(self, image_id: str) -> Labels:
        mask, labels = self.pairs[image_id].mask, self.protocol.labels
        raw = reading.read_mask(mask) if labels.values else reading.read_colour_mask(mask)
        if raw.ndim == 3 and not labels.colours and (raw == raw[..., :1]).all():
            raw = raw[..., 0]  # numbers, written three times
        if raw.ndim == 3 and not labels.colours:
            raise DataError(
                f"The mask {mask} is not a one-channel image of whole numbers (it holds colours). "
                f"Convert it to indexed PNG{self._colours_edit()}."
            )
        return labels.apply(raw, f"{self.protocol.id}: {mask}")

    def _colours_edit(self) -> str:
        if not (file := self.protocol.labels.description):
            return ""
        example = f'colours: {{"#804080": {self.protocol.class_names[0]}}}'
        return f", or name the colour of each class in {file}, as {example}"

    @contextmanager
    def _named(self, image_id: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.where(image_id)}: {error}") from error


def other_size(protocol: DataProtocol, pairs: Mapping[str, Pair]) -> str:
    """How the first or the last picture differs from the stored size of the id: copies are reduced as a whole."""
    if protocol.stored is None:
        return ""
    for image_id in (min(pairs), max(pairs)):
        try:
            found = reading.read_size(pairs[image_id].image)
        except DataError:  # told when it is read
            continue
        if found != protocol.stored:
            return " instead of ".join(f"{width}x{height}" for height, width in (found, protocol.stored))
    return ""
