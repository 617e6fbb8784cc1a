"""ADE20K of the scene parsing challenge 2016 (Zhou et al. 2017)."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

from segbench.data.folders import find_base, known_split, paired
from segbench.data.protocols import IGNORE_INDEX, DataProtocol, LabelMap, Window, published, voc_colours
from segbench.data.resizing import ShortSideCrop, Whole
from segbench.data.trees import Listing, Tree

KINDS = ("images", "annotations")
FOLDERS = {"val": "validation", "train": "training"}
LAYOUT = """\
<data root>/                        ADEChallengeData2016, or the folder that holds it
  images/validation/       ADE_val_00000001.jpg ...
  annotations/validation/  ADE_val_00000001.png ...    one channel, 0 = background, 1..150"""
VARIANTS = ("", "150", "original")
MEND = "Masks of 0..149 and 255 were reduced by one: take those of the challenge, which hold 0..150."
OTHERS = {
    "index_ade20k.pkl": "the full release of ADE20K: use ADEChallengeData2016",
    "images/ADE": "the full release of ADE20K: use ADEChallengeData2016",
    "annotations_detectron2": "a copy made for Detectron2, its masks reduced by one: use annotations",
}


@lru_cache(maxsize=3)
def protocol(variant: str) -> DataProtocol:
    """``""``: 151 classes, as published; ``150``: background ignored; ``original``: 151 classes at stored size."""
    facts = published("ade20k")
    names, weights = tuple(facts["class_names"]), tuple(facts["class_weights"])
    images = {"val": 2000, "train": 20210}
    palette = voc_colours(len(names))
    # 255 is none of them: it would hide masks that were reduced by one, and with them shifted classes
    if variant == "150":
        total = sum(weights[1:])
        return DataProtocol(
            id="ade20k/150",
            class_names=names[1:],
            labels=LabelMap({0: IGNORE_INDEX} | {label + 1: label for label in range(150)}, mend=MEND),
            about_labels="background is ignored",
            resize=ShortSideCrop(512),
            images=images,
            class_weights=tuple(weight / total for weight in weights[1:]),
            palette=palette[1:],
        )
    original = variant == "original"
    return DataProtocol(
        id="ade20k/original" if original else "ade20k",
        class_names=names,
        labels=LabelMap({label: label for label in range(len(names))}, mend=MEND),
        about_labels="background is a class",
        resize=Whole() if original else ShortSideCrop(512),
        window=Window((512, 512), (341, 341)) if original else None,
        images=images,
        class_weights=weights,
        palette=palette,
    )


def find(root: Path | None, variant: str) -> Tree:
    """The tree at ``root``, which may be ``ADEChallengeData2016`` or the folder above it."""
    base = find_base("ade20k", root, KINDS, LAYOUT, ("ADEChallengeData2016",), OTHERS)
    there = [split for split in FOLDERS if all((base / kind / FOLDERS[split]).is_dir() for kind in KINDS)]
    return Tree(protocol(variant), base, tuple(there), partial(_listing, base))


def _listing(base: Path, split: str) -> Listing:
    known_split("ade20k", split, FOLDERS)
    folder = FOLDERS[split]
    return paired(base / "images" / folder, base / "annotations" / folder, protocol("").images[split])
