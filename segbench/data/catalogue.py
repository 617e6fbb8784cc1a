"""The data sets by name: where each is found on disk, in which variants, and how it becomes a `SegmentationDataset`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segbench.data import weights
from segbench.data.dataset import SegmentationDataset
from segbench.data.protocols import DataProtocol
from segbench.data.resizing import ShortSideCrop, Whole
from segbench.data.sets import ade20k, camvid, cityscapes, folder, pascal_voc, shapes
from segbench.data.trees import PairedFiles, Tree, other_size
from segbench.errors import DataError, UnknownNameError, unknown_name

Report = Callable[[], None]  # called after each image


@dataclass(frozen=True)
class Family:
    """A data set and its variants.

    Attributes:
        title: in words.
        find: the tree at a root, for a variant.
        variants: ``""`` is the data set itself.
        layout: a drawing of what is expected.
        url: where it comes from.
        protocol: how a variant is used; None if only its folder says so.
    """

    title: str
    find: Callable[[Path | None, str], Tree]
    variants: tuple[str, ...]
    layout: str
    url: str
    protocol: Callable[[str], DataProtocol] | None = None


FAMILIES: Mapping[str, Family] = {
    "pascal_voc": Family(
        "Pascal VOC 2012", pascal_voc.find, pascal_voc.VARIANTS, pascal_voc.LAYOUT,
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/", pascal_voc.protocol,
    ),
    "ade20k": Family(
        "ADE20K, scene parsing challenge 2016", ade20k.find, ade20k.VARIANTS, ade20k.LAYOUT,
        "https://sceneparsing.csail.mit.edu/", ade20k.protocol,
    ),
    "cityscapes": Family(
        "Cityscapes, fine annotations", cityscapes.find, cityscapes.VARIANTS, cityscapes.LAYOUT,
        "https://www.cityscapes-dataset.com/", cityscapes.protocol,
    ),
    "camvid": Family(
        "CamVid, 11 classes", camvid.find, camvid.VARIANTS, camvid.LAYOUT,
        "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/", camvid.protocol,
    ),
    "folder": Family("any folder of images and masks", folder.find, folder.VARIANTS, folder.LAYOUT, ""),
}  # fmt: skip
EMBEDDED = "shapes"


def split_id(dataset_id: str) -> tuple[str, str]:
    """Family and variant of an id, checked.

    Raises:
        UnknownNameError: no data set, or no variant, of that name.

    >>> split_id("pascal_voc/void-ignored")
    ('pascal_voc', 'void-ignored')
    """
    name, _, variant = dataset_id.partition("/")
    if name not in FAMILIES and dataset_id != EMBEDDED:
        raise UnknownNameError(unknown_name("data set", dataset_id, [*FAMILIES, EMBEDDED]))
    known_variant = variant in FAMILIES[name].variants or name == "folder" if name in FAMILIES else True
    if not known_variant or dataset_id.endswith("/"):
        known = [f"{name}/{other}" if other else name for other in FAMILIES[name].variants]
        raise UnknownNameError(unknown_name("data set", dataset_id, known))
    return name, variant


def open_tree(dataset_id: str, root: str | Path | None) -> Tree:
    """The tree of a data set that is read from a folder.

    Raises:
        UnknownNameError: no data set of that name.
        DataError: it is not there; the message says what is expected, or where it is.
    """
    name, variant = split_id(dataset_id)
    try:
        place = None if root is None else Path(root).expanduser()
    except RuntimeError as error:  # ~name of a user who does not exist
        raise DataError(f"The data root {root} cannot be found: {error} Write the folder out.") from error
    return FAMILIES[name].find(place, variant)


def overview() -> list[dict[str, Any]]:
    """What is known of every data set and variant without a copy of it; None where only its folder says so."""
    images = {"val": shapes.VALIDATION_IMAGES, "train": shapes.TRAINING_IMAGES}
    rows: list[dict[str, Any]] = [
        {
            "id": EMBEDDED, "title": "procedural scenes, in the package", "classes": len(shapes.CLASS_NAMES),
            "images": images, "preprocessing": "as stored", "class_weights": "counted", "url": None,
        }
    ]  # fmt: skip
    for name, family in FAMILIES.items():
        for variant in family.variants:
            used = family.protocol(variant) if family.protocol else None
            rows.append(
                {
                    "id": f"{name}/{variant}" if variant else name,
                    "title": family.title,
                    "classes": len(used.class_names) if used else None,
                    "images": dict(used.images) if used else {},
                    "preprocessing": used.preprocessing if used else "as dataset.yaml says",
                    "class_weights": "published" if used and used.class_weights else "counted",
                    "url": family.url or None,
                }
            )
    return rows


def class_names(dataset_id: str) -> tuple[str, ...] | None:
    """The names of the classes, index = label; None where only a folder's description, or nobody, knows them."""
    if dataset_id == EMBEDDED:
        return shapes.CLASS_NAMES
    known = _known_protocol(dataset_id)
    return known.class_names if known else None


def crop_and_images(dataset_id: str) -> tuple[int, int] | None:
    """The side of the square images of ``val`` in pixels, and their number; None where they are not known."""
    known = _known_protocol(dataset_id)
    if known is None or not isinstance(known.resize, ShortSideCrop):
        return None
    return known.resize.size, known.images["val"]


def _known_protocol(dataset_id: str) -> DataProtocol | None:
    name, _, variant = dataset_id.partition("/")
    family = FAMILIES.get(name)
    if family is None or family.protocol is None or variant not in family.variants:
        return None
    return family.protocol(variant)


def load_dataset(
    dataset_id: str, root: str | Path | None = None, *, split: str = "val", keep_leaks: bool = False
) -> SegmentationDataset:
    """A data set by name; items are `Sample(image, label, image_id)`.

    Args:
        dataset_id: ``shapes`` (embedded), ``pascal_voc``, ``ade20k``, ``cityscapes``, ``camvid`` or ``folder``, or a
            variant as ``pascal_voc/void-ignored``; `segbench data list` names them all.
        root: the folder that holds the data; not needed by ``shapes``.
        split: ``val`` or ``train``; ``pascal_voc`` also has ``trainval``, ``sbd`` and ``train_aug``.
        keep_leaks: keep training images that are also in the validation split (SBD and ``trainval`` of Pascal VOC).

    Raises:
        UnknownNameError: no data set of that name.
        DataError: missing or damaged data; the message says what is expected.
    """
    if dataset_id == EMBEDDED:
        return shapes.load_shapes(split)
    return of_tree(open_tree(dataset_id, root), split, keep_leaks=keep_leaks)


def load_whole(dataset_id: str, root: str | Path | None = None, *, split: str = "train") -> SegmentationDataset:
    """A split with its pictures at the size in which they are stored, for training that scales and crops them itself.

    Arguments and errors as in `load_dataset`.
    """
    if dataset_id == EMBEDDED:
        return shapes.load_shapes(split)
    tree = open_tree(dataset_id, root)
    return of_tree(replace(tree, protocol=replace(tree.protocol, resize=Whole())), split)


def of_tree(tree: Tree, split: str, *, keep_leaks: bool = False) -> SegmentationDataset:
    """A split of a tree.

    Raises:
        DataError: the split is not there, or something is wrong with its folders.
    """
    protocol, listing = tree.protocol, tree.find(split)
    if listing.problems:
        more = len(listing.problems) - 1
        text = f"\n({more} more: segbench data check {protocol.id} --root {tree.base})" if more else ""
        raise DataError(f"{protocol.id}: {listing.problems[0]}{text}")
    left_out = () if keep_leaks else listing.leaks
    used = {image_id: pair for image_id, pair in listing.pairs.items() if image_id not in set(left_out)}
    if not used:
        raise DataError(f"{protocol.id}: the split {split!r} in {tree.base} has no images that are not in val.")
    files = PairedFiles(protocol, used)
    data = SegmentationDataset(
        id=protocol.id,
        split=split,
        class_names=protocol.class_names,
        image_ids=tuple(sorted(used)),
        read=files.read,
        count_weights=_CountedWeights(tree, split),
        where=files.where,
        complete=listing.images,
        preprocessing=protocol.preprocessing,
        window=protocol.window,
        palette=protocol.palette,
        files=files,
        other_size=other_size(protocol, used),
        left_out=left_out,
    )
    log = logging.getLogger("segbench")
    if data.is_partial and split == "val":
        log.warning(
            "%s: a partial copy, %d of %d images of %r in %s. An entry measured on it is unofficial.",
            data.id, len(data), data.complete, split, tree.base,
        )  # fmt: skip
    if data.other_size and split == "val":
        log.warning("%s: pictures of %s pixels. An entry measured on them is unofficial.", data.id, data.other_size)
    if left_out:
        log.warning(
            "%s: %d of the %d images of %r are also in the validation split and are left out (%s, ...).",
            protocol.id, len(left_out), len(listing.pairs), split, left_out[0],
        )  # fmt: skip
    return data


@dataclass(frozen=True)
class _CountedWeights:
    """`SegmentationDataset.count_weights` of a tree; a class, so that a data set can be pickled."""

    tree: Tree
    split: str

    def __call__(self) -> tuple[npt.NDArray[np.float64], str]:
        return self._found.values, self._found.source

    @cached_property  # every training mask is read: once is enough
    def _found(self) -> weights.ClassWeights:
        return class_weights(self.tree, self.split)


def class_weights(
    tree: Tree,
    split: str = "val",
    *,
    count: bool = False,
    report: Callable[[int], Report] = lambda total: _quiet,
) -> weights.ClassWeights:
    """The class weights of `mce_bal`: published ones where there are some, else counted on the training split.

    Args:
        tree: the data set.
        split: counted on if there is no training split.
        count: count also if there are published values.
        report: called with the number of images to count, gives what is called after each.

    Raises:
        DataError: a damaged mask.
    """
    if tree.protocol.class_weights is not None and not count:
        return weights.ClassWeights(np.array(tree.protocol.class_weights), weights.PUBLISHED)
    chosen, source = _counted_on(tree, split)
    data = of_tree(tree, chosen)
    return weights.counted(data, source, report(len(data)))


def weights_source(tree: Tree, split: str = "val") -> str:
    """What `class_weights` would call its source."""
    return weights.PUBLISHED if tree.protocol.class_weights is not None else _counted_on(tree, split)[1]


def _counted_on(tree: Tree, split: str) -> tuple[str, str]:
    """The split to count on, and how it is called; counts of a part of a split are no official ones."""
    if "train" not in tree.splits:
        return split, f"{split} split (no training split found)"
    listing = tree.find("train")
    there, complete = len(listing.pairs), listing.images
    return "train", weights.COUNTED + (f" ({there} of {complete} images)" if complete and there < complete else "")


def _quiet() -> None:
    pass
