"""Data sets on disk: which image belongs to which mask, and everything that is wrong with the folders."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from segbench.data import reading
from segbench.data.dataset import Labels, Pixels, size_text
from segbench.data.protocols import DataProtocol
from segbench.errors import DataError

DEEP = 3  # levels above and below a wrong root that are searched for the right one


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
    """

    pairs: Mapping[str, Pair]
    problems: tuple[str, ...] = ()
    leaks: tuple[str, ...] = ()
    images: int | None = None


@dataclass(frozen=True)
class Tree:
    """A data set found on disk.

    Attributes:
        protocol: how it is used.
        base: the folder that holds it.
        splits: those that are there.
        find: lists the files of a split; raises `DataError` for one that is not there.
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
        pixels = reading.read_turned_image(image) if self.protocol.turned else reading.read_image(image)
        if pixels.shape[:2] != labels.shape and self.protocol.turned:
            pixels = reading.read_image(image)  # a mask drawn on the picture as stored
        if pixels.shape[:2] != labels.shape:
            raise DataError(
                f"{self.protocol.id}: the image is {size_text(pixels)}, its mask {size_text(labels)} pixels: "
                f"{self.where(image_id)}. Mend or remove the pair."
            )
        with self._named(image_id):
            return self.protocol.resize.image(pixels), self.protocol.resize.labels(labels)

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
        """Id, path, size and time of change of every file: by these the results of a pass are known again.

        Raises:
            DataError: a file is gone.
        """
        stamps: list[list[str | int]] = []
        for image_id in image_ids:
            for path in self.pairs[image_id]:
                try:
                    found = path.stat()
                except OSError as error:
                    raise DataError(f"{path} is gone ({error.strerror or error}). Restore it.") from error
                stamps.append([image_id, str(path.absolute()), found.st_size, found.st_mtime_ns])
        return stamps

    def _stored_labels(self, image_id: str) -> Labels:
        mask, labels = self.pairs[image_id].mask, self.protocol.labels
        raw = reading.read_mask(mask) if labels.values else reading.read_colour_mask(mask)
        if raw.ndim == 3 and not labels.colours:
            raise DataError(
                f"The mask {mask} is not a one-channel image of whole numbers (it holds colours). "
                "Convert it to indexed PNG."
            )
        return labels.apply(raw, f"{self.protocol.id}: {mask}")

    @contextmanager
    def _named(self, image_id: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.where(image_id)}: {error}") from error


def find_base(
    dataset_id: str, root: Path | None, needed: Sequence[str], layout: str, inside: Sequence[str] = ()
) -> Path:
    """The folder that holds all of ``needed``.

    Args:
        dataset_id: for messages.
        root: where the user says it is.
        needed: names of files or folders.
        layout: a drawing of what is expected.
        inside: folders below the root where people usually have it, e.g. ``VOCdevkit/VOC2012``.

    Raises:
        DataError: it is not there; says whether the root lies too high or too deep, and where it is.
    """
    expected = f"Expected layout:\n{layout}"
    if root is None:
        raise DataError(f"The data set {dataset_id!r} needs a data root: --data-root FOLDER.\n{expected}")
    if not root.is_dir():
        raise DataError(f"The data root {root} of {dataset_id!r} is not a folder.\n{expected}")

    def holds(folder: Path) -> bool:
        return all((folder / name).exists() for name in needed)

    for place in ("", *inside):
        if holds(root / place):
            return root / place
    for above in list(root.resolve().parents)[:DEEP]:
        if holds(above):
            raise DataError(f"The data root {root} of {dataset_id!r} lies too deep: give {above}.")
    for below in _folders_below(root, DEEP - 1):
        if holds(below):
            raise DataError(f"The data root {root} of {dataset_id!r} lies too high: give {below}.")
    missing = [name for name in needed if not (root / name).exists()]
    raise DataError(f"The data root {root} of {dataset_id!r} has no {', no '.join(missing)}.\n{expected}")


def _folders_below(root: Path, levels: int) -> list[Path]:
    """Folders below ``root``, the nearest first; not more than a look is worth."""
    found: list[Path] = []
    level = [root]
    for _ in range(levels):
        try:
            level = [path for folder in level for path in sorted(folder.iterdir()) if path.is_dir()][:200]
        except OSError:  # a folder that may not be read does not hold what the user can use
            return found
        found += level
    return found


def known_split(dataset_id: str, split: str, known: Iterable[str]) -> None:
    """Refuses a split that the data set does not have."""
    if split not in (names := list(known)):
        texts = [repr(name) for name in names]
        listed = " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]])) if texts else "no split"
        raise DataError(f"{dataset_id!r} has the splits {listed}, not {split!r}.")


def paired(dataset_id: str, images: Path, masks: Path, complete: int | None = None) -> Listing:
    """All images of a folder with the masks of the same name in another one."""
    problems: list[str] = []
    found, labels = by_stem(images, problems), by_stem(masks, problems)
    if not found and not problems:
        problems.append(f"{dataset_id}: no images in {images} (looked for {', '.join(reading.SUFFIXES)}).")
    return join(found, labels, masks, problems, complete)


def join(
    images: Mapping[str, Path], masks: Mapping[str, Path], folder: Path, problems: list[str], complete: int | None
) -> Listing:
    """Image with mask by name; names that differ in case only belong together if nothing fits better."""
    folded: dict[str, list[Path]] = {}
    for stem, path in masks.items():
        folded.setdefault(stem.casefold(), []).append(path)
    pairs = {}
    for image_id, image in images.items():
        mask = masks.get(image_id)
        if mask is None and len(near := folded.get(image_id.casefold(), [])) == 1:
            mask = near[0]
        if mask is None:
            problems.append(f"The image {image} has no mask in {folder}. Restore the mask, or remove the image.")
        else:
            pairs[image_id] = Pair(image, mask)
    return Listing(pairs, tuple(problems), images=complete)


def by_stem(folder: Path, problems: list[str], suffixes: Sequence[str] = reading.SUFFIXES) -> dict[str, Path]:
    """The pictures in a folder by name without suffix, composed as Unicode NFC; what is wrong goes to ``problems``."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        problems.append(f"Cannot read the folder {folder}: {error.strerror or error}. Restore it.")
        return {}
    found: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() not in suffixes or path.name.startswith("."):  # macOS leaves ._name.png
            continue
        if problem := _unusable(path):
            problems.append(problem)
            continue
        stem = unicodedata.normalize("NFC", path.stem)
        if stem in found:
            problems.append(f"{folder} has {found[stem].name} and {path.name}: image ids must be unique. Rename one.")
            continue
        found[stem] = path
    return found


def _unusable(path: Path) -> str:
    try:
        path.name.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 come as half characters, which nothing can write
        return f"The name of the file {str(path)!r} is not valid UTF-8. Rename it."
    if path.is_symlink() and not path.exists():
        return f"{path} is a link to {os.readlink(path)}, which does not exist. Restore the file."
    return ""


def read_ids(path: Path, layout: str) -> list[str]:
    """The ids in a list, one a line; the first word counts (VOC adds a flag in some lists).

    Raises:
        DataError: it cannot be read, or is empty.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the list {path}: {error}\nExpected layout:\n{layout}") from error
    ids = [line.split()[0] for line in lines if line.strip()]
    if not ids:
        raise DataError(f"The list {path} is empty. Restore it.")
    return ids


def listed(
    ids: Sequence[str], source: Path, images: Mapping[str, Path], masks: Mapping[str, Path], folders: tuple[Path, Path],
    problems: list[str], complete: int | None = None,
) -> Listing:  # fmt: skip
    """The pairs of the ids of a list."""
    pairs = {}
    for image_id in dict.fromkeys(ids):
        missing = False
        for kind, found, folder in zip(("image", "mask"), (images, masks), folders, strict=True):
            if image_id not in found:
                problems.append(f"{image_id} of {source.name} has no {kind} in {folder}. Restore it.")
                missing = True
        if not missing:
            pairs[image_id] = Pair(images[image_id], masks[image_id])
    return Listing(pairs, tuple(problems), images=complete)
