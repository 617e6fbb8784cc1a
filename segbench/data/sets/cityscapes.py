"""Cityscapes (Cordts et al. 2016): fine annotations, 34 ids to 19 training ids."""

from __future__ import annotations

import os
from functools import lru_cache, partial
from pathlib import Path

from segbench.data.folders import by_stem, find_base, join, known_split
from segbench.data.protocols import IGNORE_INDEX, DataProtocol, LabelMap, Window, published
from segbench.data.resizing import Resized, Whole
from segbench.data.trees import Listing, Tree
from segbench.errors import DataError

SPLITS, KINDS = ("val", "train"), ("leftImg8bit", "gtFine")
UNPACKED = tuple(f"{kind}_trainvaltest/{kind}" for kind in KINDS)  # each archive in a folder of its name
IMAGE, MASK = "_leftImg8bit", "_gtFine_labelIds"
LAYOUT = """\
<data root>/                        the folder into which both archives were unpacked
  leftImg8bit/val/frankfurt/  frankfurt_000000_000294_leftImg8bit.png ...
  gtFine/val/frankfurt/       frankfurt_000000_000294_gtFine_labelIds.png ...
  leftImg8bit/train/  gtFine/train/    the same for training (class weights)"""
VARIANTS = ("", "512x1024")
MEND = f"Are these training ids in a file of label ids? Take *{MASK}.png as distributed, which hold 0..33."

# Ids of the 19 classes in ``labelIds``; the others (0..33) are ignored.
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@lru_cache(maxsize=2)
def protocol(variant: str) -> DataProtocol:
    """``""``: full resolution in windows; ``512x1024``: the whole picture at half resolution."""
    facts, small = published("cityscapes"), variant == "512x1024"
    values = dict.fromkeys(range(34), IGNORE_INDEX)
    return DataProtocol(
        id="cityscapes/512x1024" if small else "cityscapes",
        class_names=tuple(facts["class_names"]),
        labels=LabelMap(values | {value: label for label, value in enumerate(IDS)}, mend=MEND),
        about_labels="34 ids to 19 classes, the others are ignored",
        resize=Resized(512, 1024) if small else Whole(),
        window=None if small else Window((1024, 1024), (768, 768)),
        images={"val": 500, "train": 2975},
        stored=(1024, 2048),
        palette=tuple((red, green, blue) for red, green, blue in facts["palette"]),
    )


def find(root: Path | None, variant: str) -> Tree:
    """The tree at ``root``: the folder that holds ``leftImg8bit`` and ``gtFine``, or those of their archives."""
    unpacked = root is not None and all(os.path.isdir(root / place) for place in UNPACKED)
    base = root if root and unpacked else find_base("cityscapes", root, KINDS, LAYOUT, ("cityscapes",))
    images, masks = (base / place for place in (UNPACKED if unpacked else KINDS))
    there = [split for split in SPLITS if (images / split).is_dir() and (masks / split).is_dir()]
    return Tree(protocol(variant), base, tuple(there), partial(_listing, images, masks))


def _listing(images: Path, masks: Path, split: str) -> Listing:
    known_split("cityscapes", split, SPLITS)
    problems: list[str] = []
    found = _by_id(images / split, IMAGE, problems)
    labels = _by_id(masks / split, MASK, problems)
    if not found and not problems:
        problems.append(f"no images *{IMAGE}.png in the folders of {images / split}.")
    if found and not labels and not problems:
        return Listing({}, (_without_labels(masks / split),))
    return join(found, labels, masks / split, problems, protocol("").images[split])


def _without_labels(folder: Path) -> str:
    names = (path.name.partition("_gtFine_")[2] for path in folder.glob("*/*_gtFine_*"))
    there = ", ".join(f"*_gtFine_{ending}" for ending in sorted(set(names))) or "none of gtFine"
    return (
        f"no masks *{MASK}.png in the folders of {folder}, which hold {there}. "
        "Unpack them from gtFine_trainvaltest.zip."
    )


def _by_id(folder: Path, ending: str, problems: list[str]) -> dict[str, Path]:
    """``<city>_<sequence>_<frame>`` to file, over the folders of the cities."""
    try:
        cities = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise DataError(f"Cannot read the folder {folder}: {error.strerror}.\nExpected layout:\n{LAYOUT}") from error
    found: dict[str, Path] = {}
    for city in cities:
        for stem, path in by_stem(city, problems).items():
            if stem.endswith(ending) and (first := found.setdefault(stem.removesuffix(ending), path)) != path:
                problems.append(f"{first} and {path} have the same name: image ids must be unique. Remove one.")
    return found
