"""CamVid (Brostow, Fauqueur, Cipolla 2009), as SegNet gave it to the world, and as it was first distributed."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

from segbench.data.folders import by_stem, find_base, join, known_split, paired
from segbench.data.protocols import IGNORE_INDEX, DataProtocol, LabelMap, published
from segbench.data.trees import Listing, Tree
from segbench.errors import DataError

LAYOUT = """\
<data root>/                  in the layout of SegNet
  val/        0016E5_07959.png ...    photographs, any resolution
  valannot/   0016E5_07959.png ...    masks, one channel, 0..10, 11 = void
  train/      trainannot/             the same for training (class weights)
or as first distributed (data set camvid/original)
  701_StillsRaw_full/     0016E5_07959.png ...
  LabeledApproved_full/   0016E5_07959_L.png ...    colours of 32 classes"""
STILLS, COLOURS = "701_StillsRaw_full", "LabeledApproved_full"
IMAGES = {"val": 101, "train": 367, "test": 233}
VOID = 11
VARIANTS = ("", "original")
OTHERS = {
    "codes.txt": "CamVid as fastai has it, with 32 classes: use the layout of SegNet",
    "val_labels": "CamVid as Kaggle has it, in other splits: use the layout of SegNet",
    "class_dict.csv": "CamVid as Kaggle has it, in other splits: use the layout of SegNet",
}

# The 32 classes of the original masks, by their colour, in the 11 that are used (the grouping usual since SegNet).
GROUPS = {
    "sky": ((128, 128, 128),),
    "building": ((128, 0, 0), (0, 128, 64), (64, 192, 0), (64, 0, 64), (192, 0, 128)),  # bridge, wall, tunnel, archway
    "pole": ((192, 192, 128), (0, 0, 64)),  # column or pole, traffic cone
    "road": ((128, 64, 128), (128, 0, 192), (192, 0, 64)),  # and lane markings
    "sidewalk": ((0, 0, 192), (64, 192, 128), (128, 128, 192)),  # parking block, road shoulder
    "tree": ((128, 128, 0), (192, 192, 0)),  # vegetation
    "sign": ((192, 128, 128), (128, 128, 64), (0, 64, 64)),  # text, traffic light
    "fence": ((64, 64, 128),),
    "car": ((64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)),  # and trucks, trains
    "pedestrian": ((64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)),  # child, pram, animal
    "bicyclist": ((0, 128, 192), (192, 0, 192)),  # motorcycle
}  # fmt: skip


@lru_cache(maxsize=2)
def protocol(variant: str) -> DataProtocol:
    """``""``: the layout of SegNet; ``original``: colour-coded masks, 32 classes grouped to 11."""
    names = tuple(published("camvid")["class_names"])
    if variant == "original":
        grouped = {colour: names.index(name) for name, colours in GROUPS.items() for colour in colours}
        labels = LabelMap(colours=grouped | {(0, 0, 0): IGNORE_INDEX})
        about = "32 classes grouped to 11, void is ignored"
    else:
        classes = {value: value for value in range(len(names))}
        labels, about = LabelMap(classes | {VOID: IGNORE_INDEX, IGNORE_INDEX: IGNORE_INDEX}), "void is ignored"
    return DataProtocol(
        id="camvid/original" if variant else "camvid",
        class_names=names,
        labels=labels,
        about_labels=about,
        images=IMAGES,
        stored=(720, 960) if variant else (360, 480),
        palette=tuple(GROUPS[name][0] for name in names),
    )


def find(root: Path | None, variant: str) -> Tree:
    """The tree at ``root``, in either layout unless the variant says which."""
    there = [name for name in (STILLS, COLOURS, "val") if root is not None and os.path.isdir(root / name)]
    if variant == "original" or (there and "val" not in there):
        base = find_base("camvid", root, (STILLS, COLOURS), LAYOUT)
        if not variant:
            logging.getLogger("segbench").warning("%s has the layout of camvid/original, which is used.", base)
        return Tree(protocol("original"), base, ("val", "train", "test"), partial(_original, base))
    base = find_base("camvid", root, ("val", "valannot"), LAYOUT, others=OTHERS)
    splits = tuple(split for split in IMAGES if (base / split).is_dir() and (base / f"{split}annot").is_dir())
    return Tree(protocol(""), base, splits, partial(_listing, base, splits))


def _listing(base: Path, there: Sequence[str], split: str) -> Listing:
    known_split("camvid", split, IMAGES)
    if split not in there:
        raise DataError(f"camvid: {base} has no {split} and {split}annot.\nExpected layout:\n{LAYOUT}")
    return paired(base / split, base / f"{split}annot", IMAGES[split])


def _original(base: Path, split: str) -> Listing:
    known_split("camvid/original", split, IMAGES)
    problems: list[str] = []
    images = {stem: path for stem, path in by_stem(base / STILLS, problems).items() if split_of(stem) == split}
    masks = {stem.removesuffix("_L"): path for stem, path in by_stem(base / COLOURS, problems).items()}
    masks = {image_id: path for image_id, path in masks.items() if split_of(image_id) == split}
    if not images and not problems:
        problems.append(f"no image of the split {split!r} in {base / STILLS}.")
    return join(images, masks, base / COLOURS, problems, IMAGES[split])


def split_of(image_id: str) -> str:
    """The split of a frame: the sequences are cut as in SegNet's lists.

    >>> split_of("0016E5_07959"), split_of("0001TP_006690"), split_of("Seq05VD_f00000")
    ('val', 'train', 'test')
    """
    sequence, _, rest = image_id.partition("_")
    frame = int(digits[0]) if (digits := re.findall(r"\d+", rest)) else -1
    if sequence == "0016E5" and 7959 <= frame <= 8159 and frame % 2:
        return "val"
    if sequence == "Seq05VD" or (sequence == "0001TP" and frame > 8520):
        return "test"
    return "train"
