"""Pascal VOC 2012 and ADE20K, with the classes, crops and class weights of the published SEA numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segbench.data.crops import short_side_crop
from segbench.data.dataset import IGNORE_INDEX, Labels, Pixels, SegmentationDataset
from segbench.data.folders import by_stem, pairs, read_image, read_mask
from segbench.errors import DataError

VOC_SIZE, VOC_IMAGES = 473, {"val": 1449, "train": 1464}
ADE_SIZE, ADE_IMAGES = 512, {"val": 2000, "train": 20210}

VOC_LAYOUT = """\
<data root>/                        VOC2012, or a folder above it: VOCdevkit, or the one that holds VOCdevkit
  ImageSets/Segmentation/val.txt    the ids of the split, one a line
  JPEGImages/         2007_000033.jpg ...
  SegmentationClass/  2007_000033.png ...    indexed PNG, 0..20, 255 = void"""

ADE_LAYOUT = """\
<data root>/                        ADEChallengeData2016, or the folder that holds it
  images/validation/       ADE_val_00000001.jpg ...
  annotations/validation/  ADE_val_00000001.png ...    one channel, 0 = background, 1..150"""


def load_pascal_voc(root: Path | None, split: str = "val") -> SegmentationDataset:
    """Pascal VOC 2012 segmentation: 21 classes, void (255) is background, 473x473 (SEA.md, section 6).

    Args:
        root: ``VOC2012``, or one or two folders above it.
        split: ``val`` (1449 images) or ``train`` (the 1464 of VOC itself).

    Raises:
        DataError: no root, another layout, an unknown split, a missing or unreadable file.
    """
    base = _base("pascal_voc", root, ("", "VOC2012", "VOCdevkit/VOC2012"), "ImageSets/Segmentation", VOC_LAYOUT)
    _known_split("pascal_voc", split, VOC_IMAGES)
    listed = base / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        ids = listed.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the list {listed}: {error}\nExpected layout:\n{VOC_LAYOUT}") from error
    if not ids:
        raise DataError(f"The list {listed} is empty. Restore it.")
    images, masks = by_stem(base / "JPEGImages"), by_stem(base / "SegmentationClass")
    for kind, folder, found in (("image", "JPEGImages", images), ("mask", "SegmentationClass", masks)):
        if missing := [image_id for image_id in ids if image_id not in found]:
            raise DataError(
                f"pascal_voc: {len(missing)} of the {len(ids)} ids in {listed.name} have no {kind} in {base / folder}, "
                f"the first is {missing[0]}. Restore them."
            )
    chosen = {image_id: (images[image_id], masks[image_id]) for image_id in ids}
    return _dataset("pascal_voc", split, chosen, VOC_SIZE, VOC_IMAGES[split], background=IGNORE_INDEX)


def load_ade20k(root: Path | None, split: str = "val") -> SegmentationDataset:
    """ADE20K of the scene parsing challenge 2016: 151 classes with background, 512x512 (SEA.md, section 6).

    Args:
        root: ``ADEChallengeData2016``, or the folder above it.
        split: ``val`` (2000 images) or ``train`` (20210).

    Raises:
        DataError: no root, another layout, an unknown split, a missing or unreadable file.
    """
    base = _base("ade20k", root, ("", "ADEChallengeData2016"), "annotations", ADE_LAYOUT)
    _known_split("ade20k", split, ADE_IMAGES)
    folder = {"val": "validation", "train": "training"}[split]
    chosen = pairs("ade20k", base / "images" / folder, base / "annotations" / folder)
    return _dataset("ade20k", split, chosen, ADE_SIZE, ADE_IMAGES[split], background=None)


def _base(dataset_id: str, root: Path | None, places: tuple[str, ...], needed: str, layout: str) -> Path:
    """The folder that holds ``needed``, among the places where people point the data root to."""
    if root is None:
        raise DataError(
            f"The data set {dataset_id!r} needs a data root: --data-root FOLDER.\nExpected layout:\n{layout}"
        )
    for place in places:
        if (root / place / needed).is_dir():
            return root / place
    for above in list(root.resolve().parents)[:3]:
        if (above / needed).is_dir():
            raise DataError(f"The data root {root} of {dataset_id!r} lies too deep: give {above}.")
    raise DataError(f"The data root {root} of {dataset_id!r} has no {needed}.\nExpected layout:\n{layout}")


def _known_split(dataset_id: str, split: str, known: Mapping[str, int]) -> None:
    if split not in known:
        raise DataError(f"{dataset_id!r} has the splits {' and '.join(map(repr, known))}, not {split!r}.")


def _dataset(
    dataset_id: str,
    split: str,
    chosen: Mapping[str, tuple[Path, Path]],
    size: int,
    complete: int,
    *,
    background: int | None,
) -> SegmentationDataset:
    facts = _facts(dataset_id)

    def read(image_id: str) -> tuple[Pixels, Labels]:
        image, mask = chosen[image_id]
        pixels, labels = read_image(image), read_mask(mask, None)
        if pixels.shape[:2] != labels.shape or labels.dtype != np.uint8:
            return pixels, labels  # the data set tells what is wrong with it
        pixels, labels = short_side_crop(pixels, labels, size)
        return pixels, labels if background is None else np.where(labels == background, 0, labels)

    def weights() -> tuple[npt.NDArray[np.float64], str]:
        return np.array(facts["class_weights"]), "published values"

    def where(image_id: str) -> str:
        return " with ".join(map(str, chosen[image_id]))

    return SegmentationDataset(
        dataset_id, split, tuple(facts["class_names"]), tuple(sorted(chosen)), read, weights, where, complete
    )


@lru_cache(maxsize=1)
def _published() -> Any:
    return json.loads((files("segbench.data") / "files" / "published.json").read_text("utf-8"))


def _facts(dataset_id: str) -> Mapping[str, Any]:
    """Class names, and the class weights of the released code (index 0 of ADE20K carries the smallest)."""
    found: Mapping[str, Any] = _published()[dataset_id]
    return found
