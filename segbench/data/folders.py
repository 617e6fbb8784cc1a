"""Data sets read from folders: CamVid in the SegNet layout, and any pair of folders with a class list."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from segbench.data.dataset import IGNORE_INDEX, Labels, Pixels, SegmentationDataset, check_labels, inverse_frequency
from segbench.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "sidewalk", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
CAMVID_VOID = 11
CAMVID_LAYOUT = """\
<data root>/
  val/        0016E5_07959.png ...    photographs, any resolution
  valannot/   0016E5_07959.png ...    masks, one channel, 0..10, 11 = void
  train/      trainannot/             the same for training (class weights)"""

FOLDER_LAYOUT = """\
<data root>/
  classes.txt                     one class name a line; the line's number from 0 is the label
  images/  a.jpg  b.png ...       photographs
  masks/   a.png  b.png ...       one channel, 0..K-1, 255 = ignored
  train/images/  train/masks/     optional: the split on which class weights are counted"""


def load_camvid(root: Path | None, split: str = "val") -> SegmentationDataset:
    """CamVid (Brostow, Fauqueur, Cipolla 2009), SegNet layout: 11 classes, label 11 (void) is ignored.

    Raises:
        DataError: no root, a missing folder or mask, an unreadable file.
    """
    root = _root("camvid", root, CAMVID_LAYOUT, (split, f"{split}annot"))
    files = pairs("camvid", root / split, root / f"{split}annot")
    training = (root / "train", root / "trainannot")
    return _dataset("camvid", split, CAMVID_CLASSES, files, training, void=CAMVID_VOID)


def load_folder(root: Path | None, split: str = "val") -> SegmentationDataset:
    """Any data set as ``images/``, ``masks/`` and ``classes.txt``.

    ``split="train"`` reads ``train/images`` and ``train/masks``.

    Raises:
        DataError: no root, a missing folder, mask or class list, an unreadable file.
    """
    root = _root("folder", root, FOLDER_LAYOUT, ("images", "masks", "classes.txt"))
    names = _class_names(root / "classes.txt")
    base = root / "train" if split == "train" else root
    files = pairs("folder", base / "images", base / "masks")
    training = (root / "train" / "images", root / "train" / "masks")
    return _dataset("folder", split, names, files, training, void=None)


def _class_names(path: Path) -> tuple[str, ...]:
    """One name a line; blank lines only at the end, because the line's number is the label."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the class list {path}: {error}. It must be a text file in UTF-8.") from error
    names = tuple(line.strip() for line in text.rstrip().splitlines())
    if not all(names):
        raise DataError(
            f"{path}: line {names.index('') + 1} is blank, but the line's number is the label. Name the class or "
            "remove the line."
        )
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"{path} lists {len(names)} classes; 2 to {IGNORE_INDEX} are possible, one name a line.")
    return names


def _dataset(
    dataset_id: str,
    split: str,
    class_names: tuple[str, ...],
    files: Mapping[str, tuple[Path, Path]],
    training: tuple[Path, Path],
    *,
    void: int | None,
) -> SegmentationDataset:
    def read(image_id: str) -> tuple[Pixels, Labels]:
        image, mask = files[image_id]
        return read_image(image), read_mask(mask, void)

    @cache  # every training mask is read: once is enough
    def count_weights() -> tuple[npt.NDArray[np.float64], str]:
        if all(path.is_dir() for path in training):
            masks = [mask for _, mask in pairs(dataset_id, *training).values()]
            source = "training split"
        else:
            masks = [mask for _, mask in files.values()]
            source = f"{split} split (no training split found)"
        pixels = np.zeros(len(class_names), np.int64)
        for path in masks:
            labels = read_mask(path, void)
            check_labels(labels, len(class_names), f"{dataset_id}: {path}")
            pixels += np.bincount(labels[labels != IGNORE_INDEX], minlength=len(class_names))
        return inverse_frequency(pixels), source

    def where(image_id: str) -> str:
        return " with ".join(map(str, files[image_id]))

    return SegmentationDataset(dataset_id, split, class_names, tuple(sorted(files)), read, count_weights, where)


def _root(dataset_id: str, root: Path | None, layout: str, needed: tuple[str, ...]) -> Path:
    expected = f"Expected layout:\n{layout}"
    if root is None:
        raise DataError(f"The data set {dataset_id!r} needs a data root: --data-root FOLDER.\n{expected}")
    if not root.is_dir():
        raise DataError(f"The data root {root} of {dataset_id!r} is not a folder.\n{expected}")
    missing = [name for name in needed if not (root / name).exists()]
    if missing:
        raise DataError(f"The data root {root} of {dataset_id!r} has no {', no '.join(missing)}.\n{expected}")
    return root


def pairs(dataset_id: str, images: Path, masks: Path) -> dict[str, tuple[Path, Path]]:
    """Image id (the file's name without suffix) to its image and mask."""
    found = by_stem(images)
    if not found:
        raise DataError(f"{dataset_id}: no images in {images} (looked for {', '.join(SUFFIXES)}).")
    labels = by_stem(masks)
    missing = [path for stem, path in found.items() if stem not in labels]
    if missing:
        raise DataError(f"{dataset_id}: {len(missing)} images have no mask in {masks}, the first is {missing[0].name}.")
    return {stem: (path, labels[stem]) for stem, path in found.items()}


def by_stem(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        raise DataError(f"{directory} is not a folder.")
    found: dict[str, Path] = {}
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        raise DataError(f"Cannot read the folder {directory}: {error}") from error
    for path in paths:
        if path.suffix.lower() in SUFFIXES and path.is_file():
            if not _is_text(path.name):
                raise DataError(f"The name of the file {str(path)!r} is not valid UTF-8. Rename it.")
            if path.stem in found:
                raise DataError(
                    f"{directory} has {found[path.stem].name} and {path.name}: image ids must be unique. Rename one."
                )
            found[path.stem] = path
    return found


def _is_text(name: str) -> bool:
    """False for a file name whose bytes are not UTF-8: it holds half characters, which nothing can write."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_image(path: Path) -> Pixels:
    """(H,W,3) uint8.

    Raises:
        DataError: not an image, or a damaged one.
    """
    return _read(path, "image", "RGB")[0]


def read_mask(path: Path, void: int | None) -> Labels:
    """(H,W) integers; ``void`` becomes 255.

    Raises:
        DataError: not an image, a damaged one, or not one channel of whole numbers.
    """
    labels, mode = _read(path, "mask", None)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise DataError(
            f"The mask {path} is not a one-channel image of whole numbers (it is {mode}). Convert it to indexed PNG."
        )
    return labels if void is None else np.where(labels == void, IGNORE_INDEX, labels)


def _read(path: Path, kind: str, mode: str | None) -> tuple[npt.NDArray[Any], str]:
    """The pixels, converted to ``mode`` if one is given, and the mode of the file."""
    try:
        with Image.open(path) as image:
            image.load()
            return np.asarray(image.convert(mode) if mode else image), image.mode
    except Exception as error:  # Pillow's readers raise anything on damaged files, SyntaxError among it
        raise DataError(f"Cannot read the {kind} {path}: {error}. Restore or convert the file.") from error
