"""Pascal VOC 2012 (Everingham et al. 2010), and the training masks of SBD (Hariharan et al. 2011)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from segbench.data.folders import by_stem, find_base, known_split, listed, read_ids
from segbench.data.protocols import IGNORE_INDEX, DataProtocol, LabelMap, published, voc_colours
from segbench.data.resizing import ShortSideCrop
from segbench.data.trees import Listing, Tree
from segbench.errors import DataError

LISTS = "ImageSets/Segmentation"
LAYOUT = """\
<data root>/                        VOC2012, or a folder above it: VOCdevkit, or the one that holds VOCdevkit
  ImageSets/Segmentation/val.txt    the ids of the split, one a line; also train.txt, trainval.txt
  JPEGImages/         2007_000033.jpg ...
  SegmentationClass/  2007_000033.png ...    indexed PNG, 0..20, 255 = void"""

SBD_LAYOUT = """\
<data root>/benchmark_RELEASE/dataset/      as SBD is distributed, anywhere from VOC2012 up to the data root
  train.txt  val.txt                        ids, one a line
  img/   2008_000002.jpg ...                (images of JPEGImages are taken first)
  cls/   2008_000002.mat ...                GTcls.Segmentation, 0..20
or, as many people keep it, in VOC2012:
  SegmentationClassAug/  2008_000002.png ...    one channel, 0..20, 255 = void
  ImageSets/Segmentation/trainaug.txt           ids, one a line"""

SBD_PLACES = ("benchmark_RELEASE/dataset", "SBD/benchmark_RELEASE/dataset", "SBD/dataset", "SBD", "sbd")
SBD_IMAGES = 8498  # of its training list
AUGMENTED_LISTS = ("trainaug.txt", "train_aug.txt")
VARIANTS = ("", "void-ignored")


@lru_cache(maxsize=2)
def protocol(variant: str) -> DataProtocol:
    """``""``: as published, void is background; ``void-ignored``: void pixels do not count."""
    facts, ignored = published("pascal_voc"), variant == "void-ignored"
    names = tuple(facts["class_names"])
    classes = {value: value for value in range(len(names))}
    void = IGNORE_INDEX if ignored else 0
    colours = dict(zip(voc_colours(len(names)), range(len(names)), strict=True)) | {(224, 224, 192): void}
    return DataProtocol(
        id="pascal_voc/void-ignored" if ignored else "pascal_voc",
        class_names=names,
        labels=LabelMap(classes | {IGNORE_INDEX: void}, colours),
        about_labels="void is ignored" if ignored else "void counts as background",
        resize=ShortSideCrop(473),
        images={"val": 1449, "train": 1464, "trainval": 2913},
        class_weights=tuple(facts["class_weights"]),
        palette=voc_colours(len(names)),
    )


def find(root: Path | None, variant: str) -> Tree:
    """The tree at ``root``, which may be ``VOC2012`` or one or two folders above it."""
    if root is not None and os.path.isdir(root) and (year := _other_year(root)):
        raise DataError(f"The data root {root} of 'pascal_voc' is {year}, another data set. Give the folder VOC2012.")
    inside = ("VOC2012", "VOCdevkit/VOC2012")
    base = find_base("pascal_voc", root, (LISTS,), LAYOUT, inside, accept=lambda folder: not _other_year(folder))
    sbd = _sbd(base, root or base)
    there = [split for split in ("val", "train", "trainval") if (base / LISTS / f"{split}.txt").exists()]
    there += ["sbd"] if sbd else []
    there += ["train_aug"] if sbd or _augmented_list(base) else []
    return Tree(protocol(variant), base, tuple(there), partial(_listing, base, sbd))


def _other_year(folder: Path) -> str:
    """The name of a folder of the challenge of another year: it has the same layout."""
    name = os.path.basename(os.path.realpath(folder))
    return name if re.fullmatch(r"VOC20\d\d", name) and name != "VOC2012" else ""


def _listing(base: Path, sbd: Path | None, split: str) -> Listing:
    known_split("pascal_voc", split, ("val", "train", "trainval", "sbd", "train_aug"))
    if split in ("sbd", "train_aug"):
        found = _sbd_listing(base, sbd, split)
    else:
        source, problems = base / LISTS / f"{split}.txt", list[str]()
        folders = (base / "JPEGImages", base / "SegmentationClass")
        ids = read_ids(source, LAYOUT)
        images, masks = (by_stem(folder, problems) for folder in folders)
        found = listed(ids, source, images, masks, folders, problems, protocol("").images[split])
    return found if split == "val" else _without_val(found, base, split)


def _sbd_listing(base: Path, sbd: Path | None, split: str) -> Listing:
    """``sbd``: the training list of SBD; ``train_aug``: the union of VOC's and SBD's ids, VOC's own masks first."""
    problems: list[str] = []
    folders = [folder for folder in (base / "SegmentationClassAug", *_in(sbd, "cls_png", "cls")) if folder.is_dir()]
    if split == "sbd" and sbd:
        source, ids = sbd / "train.txt", read_ids(sbd / "train.txt", SBD_LAYOUT)
    elif split == "train_aug" and (given := _augmented_list(base)):
        source, ids = given, read_ids(given, SBD_LAYOUT)
    elif split == "train_aug" and sbd:
        sources = [base / LISTS / "train.txt", sbd / "train.txt", sbd / "val.txt"]
        source, ids = sources[0], [image_id for path in sources for image_id in read_ids(path, SBD_LAYOUT)]
    else:
        raise DataError(f"pascal_voc: the split {split!r} needs the masks of SBD.\nExpected layout:\n{SBD_LAYOUT}")
    if split == "train_aug":
        folders.insert(0, base / "SegmentationClass")
    images: dict[str, Path] = {}
    for folder in (base / "JPEGImages", *_in(sbd, "img")):
        if folder.is_dir():
            images = by_stem(folder, problems) | images
    masks: dict[str, Path] = {}
    for folder in folders:
        masks = by_stem(folder, problems, (".png", ".mat")) | masks
    shown = (base / "JPEGImages", folders[-1] if folders else base / "SegmentationClassAug")
    return listed(ids, source, images, masks, shown, problems, SBD_IMAGES if split == "sbd" else None)


def _without_val(found: Listing, base: Path, split: str) -> Listing:
    """Training ids that are in VOC's validation list are left out: SBD and trainval share images with it."""
    path = base / LISTS / "val.txt"
    if not path.exists() and split == "train":  # VOC's own, which shares none
        return found
    try:
        if not path.exists():
            raise DataError(f"{path} is missing: without it images of val cannot be left out of training. Restore it.")
        val = set(read_ids(path, LAYOUT))
    except DataError as error:  # told with whatever else is wrong
        return replace(found, problems=(*found.problems, str(error)))
    return replace(found, leaks=tuple(sorted(image_id for image_id in found.pairs if image_id in val)))


def _sbd(base: Path, root: Path) -> Path | None:
    """The folder of SBD that holds ``train.txt`` and ``cls``, from VOC2012 up to the data root."""
    above = [base, *base.parents]
    places = above[: above.index(root) + 1] if root in above else [base, root]
    for folder in (*places, root.parent):
        for place in SBD_PLACES:
            if (folder / place / "train.txt").is_file():
                return folder / place
    return None


def _augmented_list(base: Path) -> Path | None:
    return next((base / LISTS / name for name in AUGMENTED_LISTS if (base / LISTS / name).is_file()), None)


def _in(folder: Path | None, *names: str) -> Iterator[Path]:
    return (folder / name for name in names) if folder else iter(())
