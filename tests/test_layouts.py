"""Tiny trees in the layouts of the real data sets: found, paired and mapped as their publishers say, or told apart."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

import segbench
from segbench.data.catalogue import FAMILIES, open_tree
from segbench.data.folders import join, read_ids
from segbench.data.reading import ORIENTATION
from segbench.data.sets import ade20k, camvid, cityscapes, pascal_voc
from segbench.data.trees import Pair
from segbench.errors import DataError

RNG = np.random.default_rng(0)
SIDES = (12, 16)


def photograph(path: Path, sides=SIDES, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*sides, 3), np.uint8)).save(path, **options)


def mask(path: Path, values=0, sides=SIDES):
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.broadcast_to(np.asarray(values, np.uint8), sides if np.ndim(values) < 2 else np.shape(values))
    Image.fromarray(np.ascontiguousarray(labels)).save(path)


def folder(root: Path, pairs) -> Path:
    """A data set ``folder`` of image and mask names."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("sky\nroad\n")
    for image, target in pairs:
        photograph(root / "images" / image)
        mask(root / "masks" / target)
    return root


def ids(root, dataset_id="folder", **options):
    return segbench.load_dataset(dataset_id, root, **options).image_ids


def problems(root, dataset_id="folder", split="val"):
    return open_tree(dataset_id, root).find(split).problems


# Names


@pytest.mark.parametrize(
    ("image", "target", "image_id"),
    [
        ("a b.png", "a b.png", "a b"),
        ("IMG_1.JPG", "IMG_1.PNG", "IMG_1"),
        ("IMG_1.JPG", "img_1.png", "IMG_1"),
        ("a.b.c.jpeg", "a.b.c.png", "a.b.c"),
        (unicodedata.normalize("NFC", "Zürich.jpg"), unicodedata.normalize("NFD", "Zürich.png"), "Zürich"),
        (unicodedata.normalize("NFD", "Zürich.jpg"), unicodedata.normalize("NFC", "Zürich.png"), "Zürich"),
        ("道路.png", "道路.tif", "道路"),
        ("x" * 240 + ".png", "x" * 240 + ".png", "x" * 240),
        ("[1]*?.png", "[1]*?.png", "[1]*?"),
    ],
)
def test_names_that_belong_together(tmp_path, image, target, image_id):
    root = folder(tmp_path, [(image, target)])
    assert ids(root) == (unicodedata.normalize("NFC", image_id),)
    assert segbench.load_dataset("folder", root)[0].label.shape == SIDES


def test_ids_are_sorted_whatever_the_order_on_disk(tmp_path):
    names = ["b", "a", "c10", "c2", "Ä"]
    for number, order in enumerate((names, names[::-1])):
        assert ids(folder(tmp_path / str(number), [(f"{name}.png", f"{name}.png") for name in order])) == tuple(
            sorted(names)
        )


def test_what_systems_leave_in_folders_is_no_picture(tmp_path):
    root = folder(tmp_path, [("a.png", "a.png")])
    for where in ("images", "masks"):
        for name in ("._a.png", ".hidden.png", "Thumbs.db", ".DS_Store", "desktop.ini", "notes.txt"):
            (root / where / name).write_bytes(b"nothing")
        photograph(root / where / "deeper" / "b.png")
    assert ids(root) == ("a",)
    assert problems(root) == ()


def test_names_that_differ_in_case_only_are_not_confused(tmp_path):
    """A mask goes to the image of its very name, never to two."""
    root = folder(tmp_path, [("a.png", "a.png")])
    photograph(root / "images" / "A.png")
    assert len(problems(root)) == 1
    assert "images/A.png has no mask in" in problems(root)[0]
    mask(root / "masks" / "A.png", 1)
    data = segbench.load_dataset("folder", root)
    assert [int(sample.label[0, 0]) for sample in data] == [1, 0]
    names = {name: Path(name) for name in ("IMG", "Img")}
    listing = join(names, {"img": Path("img")}, Path("masks"), [], None)
    assert (dict(listing.pairs), len(listing.problems)) == ({}, 2)
    listing = join({"IMG": Path("IMG")}, {"img": Path("img"), "Img": Path("Img")}, Path("masks"), [], None)
    assert len(listing.problems) == 1
    assert join({"Ä": Path("i")}, {"ä": Path("m")}, Path("masks"), [], None).pairs == {"Ä": Pair(Path("i"), Path("m"))}


def test_links_are_followed_and_broken_ones_named(tmp_path):
    root, store = folder(tmp_path / "root", [("a.png", "a.png")]), tmp_path / "store"
    photograph(store / "b.png")
    mask(store / "m" / "b.png")
    (root / "images" / "b.png").symlink_to(store / "b.png")
    (root / "masks" / "b.png").symlink_to(Path("..") / ".." / "store" / "m" / "b.png")
    assert ids(root) == ("a", "b")
    assert len(list(segbench.load_dataset("folder", root))) == 2
    shutil.move(root / "images", store / "images")
    (root / "images").symlink_to(Path("..") / "store" / "images", target_is_directory=True)
    assert ids(root) == ("a", "b")
    (store / "b.png").unlink()
    (root / "masks" / "c.png").symlink_to("c.png")  # to itself
    found = problems(root)
    assert f"{root / 'images' / 'b.png'} is a link to {str(store / 'b.png')!r}, which does not exist" in found[0]
    assert "c.png is a link to 'c.png', which does not exist. Restore" in found[1]


def test_everything_that_is_wrong_is_listed_and_the_first_is_raised(tmp_path):
    root = folder(tmp_path, [(f"{name}.png", f"{name}.png") for name in "abcd"])
    (root / "masks" / "a.png").unlink()
    photograph(root / "images" / "b.jpg")
    (root / "images" / "e.png").mkdir()
    os.mkfifo(root / "images" / "f.png")
    (root / "images" / "c.png").rename(os.fsdecode(os.fsencode(root / "images") + b"/\xff.png"))
    found = "\n".join(problems(root))
    for text in (
        "images/a.png has no mask in",
        "b.jpg and b.png: image ids must be unique. Rename one",
        "e.png is not a file. Rename or remove it",
        "f.png is not a file",
        "\\udcff.png' is not valid UTF-8. Rename it",
    ):
        assert text in found
    assert len(problems(root)) == 5
    with pytest.raises(DataError, match=r"\(4 more: segbench data check folder --root "):
        segbench.load_dataset("folder", root)


def test_a_folder_of_folders_has_no_images(tmp_path):
    root = folder(tmp_path, [])
    for where in ("images", "masks"):
        photograph(root / where / "city" / "a.png")
    with pytest.raises(DataError, match=r"no images in .*images \(looked for \.png"):
        segbench.load_dataset("folder", root)


@pytest.mark.parametrize("dataset_id", [*FAMILIES, "camvid/original"])
@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "missing"])
def test_roots_that_cannot_be_are_said_with_the_layout(tmp_path, dataset_id, name):
    with pytest.raises(DataError, match=r"The data root .* is not a folder\.\nExpected layout"):
        segbench.load_dataset(dataset_id, tmp_path / name)


def test_pictures_in_sub_folders_are_answered_with_the_fields_of_the_description(tmp_path):
    root = folder(tmp_path, [])
    for where in ("images", "masks"):
        photograph(root / where / "val" / "a.png")
    with pytest.raises(DataError, match=r"sub-folders \(val\) are not searched") as caught:
        segbench.load_dataset("folder", root)
    assert "\n  val: {images: images/val, masks: masks/val}\n  train: {" in str(caught.value)
    assert str(caught.value).count("folder: ") == 1


@pytest.mark.parametrize("name", ["a_mask.png", "mask-a.png", "a.seg.png"])
def test_a_mask_of_nearly_the_name_is_named(tmp_path, name):
    """But not one that belongs to another image."""
    root = folder(tmp_path, [("a.jpg", name), ("b.jpg", "b_2.png"), ("b_2.jpg", "b_2.png")])
    first, second = problems(root)
    assert first.endswith(f"There is {name}: masks must be named like their images. Rename it.")
    assert second.endswith("Restore the mask, or remove the image.")


def test_masks_of_three_equal_channels_hold_numbers(tmp_path):
    root = folder(tmp_path, [("a.png", "a.png")])
    labels = RNG.integers(0, 2, SIDES).astype(np.uint8)
    colours = labels[..., None].repeat(3, axis=2)
    Image.fromarray(colours).save(root / "masks" / "a.png")
    assert (segbench.load_dataset("folder", root)[0].label.numpy() == labels).all()
    colours[0, 0] = (0, 0, 1)
    Image.fromarray(colours).save(root / "masks" / "a.png")
    with pytest.raises(DataError, match=r"masks/a\.png is not a one-channel image of whole numbers"):
        segbench.load_dataset("folder", root)[0]


# Turned pictures


@pytest.mark.parametrize("orientation", [3, 6])
def test_pictures_of_a_folder_are_turned_and_those_of_published_data_sets_are_not(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    root = folder(tmp_path / "folder", [])
    photograph(root / "images" / "a.png", exif=exif)
    with Image.open(root / "images" / "a.png") as image:
        stored = np.asarray(image).transpose(2, 0, 1)
    turned = np.rot90(stored, {3: 2, 6: -1}[orientation], axes=(1, 2))
    mask(root / "masks" / "a.png", sides=turned.shape[1:])
    found = segbench.load_dataset("folder", root)[0].image.numpy() * 255
    assert (found.round() == turned).all()
    if orientation == 6:  # a mask drawn on the picture as stored
        mask(root / "masks" / "a.png")
        assert (segbench.load_dataset("folder", root)[0].image.numpy() * 255).round().tolist() == stored.tolist()
    published = tmp_path / "camvid"
    shutil.copytree(root / "images", published / "val")
    mask(published / "valannot" / "a.png")
    assert ((segbench.load_dataset("camvid", published)[0].image.numpy() * 255).round() == stored).all()


def test_only_folders_turn_pictures():
    """The released preprocessing of the published ones does not."""
    for module in (pascal_voc, ade20k, cityscapes, camvid):
        assert not any(module.protocol(variant).turned for variant in module.VARIANTS)


def test_a_long_thin_picture_is_named_and_not_blown_up(tmp_path):
    base = voc(tmp_path, val=["a"])
    photograph(base / "JPEGImages" / "a.jpg", (1, 20_000))
    mask(base / "SegmentationClass" / "a.png", sides=(1, 20_000))
    data = segbench.load_dataset("pascal_voc", base)
    for read in (data.read, data.files.labels):
        with pytest.raises(DataError, match=r"a\.jpg with .*a\.png: resized it would have 9460000x473 pixels"):
            read("a")


# Pascal VOC


def voc(root: Path, **lists) -> Path:
    """``VOC2012`` with the ids of the lists; every mask holds a class, a rim of void, and background."""
    base = root / "VOC2012"
    for name, listed in lists.items():
        place = base / "ImageSets" / "Segmentation" / f"{name}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(f"{image_id}\n" for image_id in listed))
        for image_id in listed:
            voc_pair(base, image_id)
    return base


def voc_pair(base: Path, image_id: str, label=15):
    labels = np.zeros(SIDES, np.uint8)
    labels[2:10, 3:13], labels[4:8, 5:11] = 255, label
    photograph(base / "JPEGImages" / f"{image_id}.jpg")
    mask(base / "SegmentationClass" / f"{image_id}.png", labels)


def sbd(base: Path, train, val=(), label=7, images=()) -> Path:
    place = base / "benchmark_RELEASE" / "dataset"
    (place / "cls").mkdir(parents=True)
    for name, listed in {"train": train, "val": val}.items():
        (place / f"{name}.txt").write_text("".join(f"{image_id}\n" for image_id in listed))
        for image_id in listed:
            content = {"GTcls": {"Segmentation": np.full(SIDES, label, np.uint8)}}
            scipy.io.savemat(place / "cls" / f"{image_id}.mat", content, do_compression=True)
    for image_id in images:
        photograph(place / "img" / f"{image_id}.jpg", SIDES)
    return place


def test_voc_is_found_from_three_folders(tmp_path):
    base = voc(tmp_path / "data" / "VOCdevkit", val=["2007_000033"])
    for root in (base, base.parent, base.parent.parent):
        assert ids(root, "pascal_voc") == ("2007_000033",)
    for root in (tmp_path, base.parents[2]):
        with pytest.raises(DataError, match=r"lies too high: give .*VOC2012"):
            segbench.load_dataset("pascal_voc", root)
    deep = base / "ImageSets" / "Segmentation"
    for root in (base / "JPEGImages", deep.parent, deep):
        with pytest.raises(DataError) as caught:
            segbench.load_dataset("pascal_voc", root)
        assert str(caught.value).endswith(f"lies too deep: give {base.resolve()}.")
    (elsewhere := tmp_path / "data" / "a" / "b" / "c" / "d" / "e").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"has no ImageSets/Segmentation\.\nExpected layout:\n<data root>/ .*VOC2012"
    ) as caught:
        segbench.load_dataset("pascal_voc", elsewhere)
    assert "SegmentationClass/  2007_000033.png" in str(caught.value)


def test_a_root_three_above_is_told_where_to_look(tmp_path):
    base = voc(tmp_path / "x" / "y" / "VOCdevkit", val=["a"])
    with pytest.raises(DataError) as caught:
        segbench.load_dataset("pascal_voc", tmp_path)
    assert str(caught.value).endswith(f"lies too high: give {base}.")


@pytest.mark.parametrize(
    "text",
    [
        "2007_000033\n2007_000042\n",
        "2007_000033\r\n2007_000042\r\n",
        "\ufeff2007_000033 \n2007_000042\t\n\n   \n",
        "2007_000033  1\n2007_000042 -1\n2007_000033  1",
        "/JPEGImages/2007_000033.jpg /SegmentationClassAug/2007_000033.png\nJPEGImages/2007_000042.jpg x\n",
    ],
)
def test_lists_of_ids_as_people_keep_them(tmp_path, text):
    base = voc(tmp_path, val=["2007_000033", "2007_000042"])
    (base / "ImageSets" / "Segmentation" / "val.txt").write_bytes(text.encode())
    assert ids(base, "pascal_voc") == ("2007_000033", "2007_000042")


def test_ids_of_lists_are_composed_like_the_names(tmp_path):
    (tmp_path / "list.txt").write_text(unicodedata.normalize("NFD", "ä.b\n"), encoding="utf-8")
    assert read_ids(tmp_path / "list.txt", "") == [unicodedata.normalize("NFC", "ä.b")]


def test_lists_that_are_no_text_are_refused(tmp_path):
    base = voc(tmp_path, val=["a"])
    (base / "ImageSets" / "Segmentation" / "val.txt").write_bytes("a\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"Cannot read the list .*val\.txt: .*utf-8"):
        segbench.load_dataset("pascal_voc", base)


def test_void_is_background_as_published_or_ignored(tmp_path):
    base = voc(tmp_path, val=["a"])
    published, ignored = (segbench.load_dataset(name, base)[0] for name in ("pascal_voc", "pascal_voc/void-ignored"))
    assert (published.image == ignored.image).all()
    void = ignored.label == 255
    assert set(published.label[void].tolist()) == {0}
    assert (published.label[~void] == ignored.label[~void]).all()
    assert set(ignored.label.flatten().tolist()) == {0, 15, 255}


def test_voc_masks_in_colours_are_understood(tmp_path):
    base = voc(tmp_path, val=["a"])
    expected = segbench.load_dataset("pascal_voc/void-ignored", base)[0].label
    path = base / "SegmentationClass" / "a.png"
    colours = {0: (0, 0, 0), 15: (192, 128, 128), 255: (224, 224, 192)}  # person is light red in the development kit
    with Image.open(path) as image:
        stored = np.asarray(image)
    Image.fromarray(np.array([[colours[value] for value in row] for row in stored.tolist()], np.uint8)).save(path)
    assert (segbench.load_dataset("pascal_voc/void-ignored", base)[0].label == expected).all()


def test_trainval_leaves_out_the_validation_images(tmp_path, caplog):
    base = voc(tmp_path, val=["a"], train=["t", "u"], trainval=["a", "t", "u"])
    assert open_tree("pascal_voc", base).splits == ("val", "train", "trainval")
    data = segbench.load_dataset("pascal_voc", base, split="trainval")
    assert (data.image_ids, data.left_out) == (("t", "u"), ("a",))
    assert "1 of the 3 images of 'trainval' are also in the validation split" in caplog.text
    assert ids(base, "pascal_voc", split="trainval", keep_leaks=True) == ("a", "t", "u")
    assert ids(base, "pascal_voc", split="train") == ("t", "u")


@pytest.mark.parametrize("place", ["VOC2012", "VOCdevkit", "root"])
def test_sbd_as_distributed(tmp_path, place):
    base = voc(tmp_path / "VOCdevkit", val=["v"], train=["t"])
    for image_id in ("s1", "s2"):
        photograph(base / "JPEGImages" / f"{image_id}.jpg")
    where = {"VOC2012": base, "VOCdevkit": base.parent, "root": tmp_path}[place]
    found = sbd(where, ["s1", "v", "t"], ["s2"], images=["s1", "t"])
    root = tmp_path
    data = segbench.load_dataset("pascal_voc", root, split="sbd")
    assert (data.image_ids, data.left_out) == (("s1", "t"), ("v",))
    assert set(data[0].label.flatten().tolist()) == {7}
    assert ids(root, "pascal_voc", split="sbd", keep_leaks=True) == ("s1", "t", "v")
    data = segbench.load_dataset("pascal_voc", root, split="train_aug")
    assert (data.image_ids, data.left_out) == (("s1", "s2", "t"), ("v",))
    pairs = open_tree("pascal_voc", root).find("train_aug").pairs
    assert pairs["t"].mask == base / "SegmentationClass" / "t.png"
    assert pairs["s2"].mask == found / "cls" / "s2.mat"
    assert pairs["s1"].image == base / "JPEGImages" / "s1.jpg"
    assert [int(sample.label[236, 236]) for sample in data] == [7, 7, 15]
    (base / "JPEGImages" / "s1.jpg").unlink()
    assert open_tree("pascal_voc", root).find("sbd").pairs["s1"].image == found / "img" / "s1.jpg"
    (found / "cls" / "s1.mat").unlink()
    with pytest.raises(DataError, match=r"s1 of train\.txt has no mask in .*cls. Restore it"):
        segbench.load_dataset("pascal_voc", root, split="sbd")


def test_sbd_as_png(tmp_path):
    base = voc(tmp_path, val=["v"], train=["t"])
    (base / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("s\nt\nv\n")
    photograph(base / "JPEGImages" / "s.jpg")
    for image_id in "stv":
        mask(base / "SegmentationClassAug" / f"{image_id}.png", 7)
    assert open_tree("pascal_voc", base).splits == ("val", "train", "train_aug")
    data = segbench.load_dataset("pascal_voc", base, split="train_aug")
    assert (data.image_ids, data.left_out) == (("s", "t"), ("v",))
    assert [int(sample.label[236, 236]) for sample in data] == [7, 15]


def test_without_sbd_its_layout_is_drawn(tmp_path):
    base = voc(tmp_path, val=["v"])
    for split in ("sbd", "train_aug"):
        with pytest.raises(DataError, match=f"{split!r} needs the masks of SBD.\nExpected layout:") as caught:
            segbench.load_dataset("pascal_voc", base, split=split)
        assert "SegmentationClassAug/" in str(caught.value)


def test_training_lists_without_the_validation_list_are_refused(tmp_path):
    """Images of val could not be left out; VOC's own training list shares none."""
    base = voc(tmp_path, val=["v"], train=["t"], trainval=["v", "t"])
    sbd(base, ["v"], ["t"])
    (base / "ImageSets" / "Segmentation" / "val.txt").unlink()
    for split in ("trainval", "sbd", "train_aug"):
        with pytest.raises(DataError, match=r"val\.txt is missing: .* cannot be left out of training\. Restore it\."):
            segbench.load_dataset("pascal_voc", base, split=split)
    assert ids(base, "pascal_voc", split="train") == ("t",)


def test_a_part_of_sbd_is_partial(tmp_path):
    base = voc(tmp_path, val=["v"], train=["t"])
    sbd(base, ["t"])
    data = segbench.load_dataset("pascal_voc", base, split="sbd")
    assert (data.complete, data.is_partial) == (8498, True)


def test_voc_of_another_year_is_refused_and_never_recommended(tmp_path):
    base = voc(tmp_path / "VOCdevkit", val=["a"])
    other = base.rename(base.with_name("VOC2007"))
    with pytest.raises(DataError, match=r"is VOC2007, another data set\. Give the folder VOC2012\."):
        segbench.load_dataset("pascal_voc", other)
    for root in (tmp_path, tmp_path / "VOCdevkit", other / "JPEGImages"):
        with pytest.raises(DataError, match="has no ImageSets/Segmentation"):
            segbench.load_dataset("pascal_voc", root)


def test_training_lists_of_validation_images_only_are_refused(tmp_path):
    base = voc(tmp_path, val=["v"])
    sbd(base, ["v"])
    with pytest.raises(DataError, match="no images that are not in val"):
        segbench.load_dataset("pascal_voc", base, split="sbd")


# ADE20K


def ade_tree(root: Path, labels) -> Path:
    for split, prefix in {"validation": "val", "training": "train"}.items():
        photograph(root / "images" / split / f"ADE_{prefix}_00000001.jpg", np.shape(labels))
        mask(root / "annotations" / split / f"ADE_{prefix}_00000001.png", labels)
    return root


def test_ade_and_its_variants(tmp_path):
    labels = np.arange(151, dtype=np.uint8)[:, None].repeat(200, axis=1)
    root = ade_tree(tmp_path / "ADEChallengeData2016", labels)
    whole = segbench.load_dataset("ade20k/original", tmp_path)
    assert whole.image_ids == ("ADE_val_00000001",)
    assert (whole[0].label.numpy() == labels).all()
    assert (whole.window.size, whole.num_classes) == ((512, 512), 151)
    published, shifted = (segbench.load_dataset(name, root) for name in ("ade20k", "ade20k/150"))
    assert (published.num_classes, shifted.num_classes) == (151, 150)
    assert published.class_names[1:] == shifted.class_names
    assert published[0].image.shape == (3, 512, 512)
    assert (published[0].image == shifted[0].image).all()
    stored = published[0].label.numpy()
    assert len(np.unique(stored)) == 151
    assert (shifted[0].label.numpy() == np.where(stored == 0, 255, stored - 1)).all()
    weights, others = published.class_weights(), shifted.class_weights()
    np.testing.assert_allclose(others, weights[1:] / weights[1:].sum(), rtol=1e-5)
    assert len({data.fingerprint() for data in (whole, published, shifted)}) == 3
    assert ids(root, "ade20k", split="train") == ("ADE_train_00000001",)


def test_ade_labels_beyond_150_are_refused(tmp_path):
    root = ade_tree(tmp_path, np.full((30, 40), 151))
    for name in ("ade20k", "ade20k/150", "ade20k/original"):
        with pytest.raises(DataError, match=r"ADE_val_00000001\.png: the mask has the label 151; allowed are"):
            segbench.load_dataset(name, root)[0]


@pytest.mark.parametrize("name", ["ade20k", "ade20k/150", "ade20k/original"])
def test_ade_masks_reduced_by_one_are_refused(tmp_path, name):
    """Their 0..149 would be read as the classes before."""
    labels = np.full((30, 40), 5)
    labels[0, 0] = 255
    with pytest.raises(DataError, match=r"label 255; allowed are .*\. Masks of 0\.\.149 and 255 were reduced by one"):
        segbench.load_dataset(name, ade_tree(tmp_path, labels))[0]


# Cityscapes

# labelIds of the classes of the paper (Cordts et al. 2016), in the order of its label definitions; the others are void
TRAIN_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip


def cityscapes_tree(root: Path, frames=("frankfurt_000000_000294",), labels=0, split="val") -> Path:
    for frame in frames:
        city = frame.split("_")[0]
        photograph(root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png", (34, 68))
        for kind in ("labelIds", "instanceIds", "labelTrainIds"):
            mask(root / "gtFine" / split / city / f"{frame}_gtFine_{kind}.png", labels, (34, 68))
    return root


def test_cityscapes_ids_become_training_ids(tmp_path):
    labels = np.arange(34, dtype=np.uint8)[:, None].repeat(68, axis=1)
    root = cityscapes_tree(tmp_path / "cityscapes", labels=labels)
    data = segbench.load_dataset("cityscapes", tmp_path)
    assert data.class_names == tuple(TRAIN_IDS)
    expected = [list(TRAIN_IDS.values()).index(value) if value in TRAIN_IDS.values() else 255 for value in range(34)]
    assert data[0].label[:, 0].tolist() == expected
    assert data.window is not None
    assert (data.window.size, data.window.stride) == ((1024, 1024), (768, 768))
    small = segbench.load_dataset("cityscapes/512x1024", root)
    assert (small[0].image.shape, small[0].label.shape, small.window) == ((3, 512, 1024), (512, 1024), None)
    assert set(small[0].label.flatten().tolist()) == set(expected)


def test_cityscapes_cities_and_splits(tmp_path):
    frames = ("munster_000000_000019", "frankfurt_000001_000000", "lindau_000000_000019")
    root = cityscapes_tree(tmp_path, frames)
    (root / "leftImg8bit" / "train").mkdir()
    assert open_tree("cityscapes", root).splits == ("val",)  # no masks for training
    with pytest.raises(DataError, match=r"Cannot read the folder .*gtFine/train: No such file.*\nExpected layout"):
        segbench.load_dataset("cityscapes", root, split="train")
    cityscapes_tree(root, ("aachen_000000_000019",), split="train")
    assert ids(root, "cityscapes") == tuple(sorted(frames))
    assert ids(root, "cityscapes", split="train") == ("aachen_000000_000019",)
    shutil.copytree(root / "gtFine" / "val" / "lindau", root / "gtFine" / "val" / "lindau (copy)")
    with pytest.raises(DataError, match=r"lindau/.*labelIds.png and .*lindau \(copy\)/.* have the same name"):
        segbench.load_dataset("cityscapes", root)


def test_cityscapes_without_label_ids_is_one_problem(tmp_path):
    root = cityscapes_tree(tmp_path, ("munster_000000_000019", "munster_000001_000019"))
    for path in root.glob("gtFine/val/munster/*_labelIds.png"):
        path.unlink()
    (found,) = problems(root, "cityscapes")
    assert "no masks *_gtFine_labelIds.png in the folders of" in found
    assert "which hold *_gtFine_instanceIds.png, *_gtFine_labelTrainIds.png. Unpack" in found


def test_cityscapes_with_each_archive_in_its_own_folder(tmp_path):
    root = cityscapes_tree(tmp_path)
    for kind in ("leftImg8bit", "gtFine"):
        (root / f"{kind}_trainvaltest").mkdir()
        (root / kind).rename(root / f"{kind}_trainvaltest" / kind)
    assert ids(root, "cityscapes") == ("frankfurt_000000_000294",)
    assert open_tree("cityscapes", root).splits == ("val",)


def test_training_ids_among_label_ids_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"label 255; .* Are these training ids in a file of label ids\?"):
        segbench.load_dataset("cityscapes", cityscapes_tree(tmp_path, labels=255))[0]


@pytest.mark.parametrize("label", [34, 200])
def test_unknown_ids_of_cityscapes_are_refused(tmp_path, label):
    root = cityscapes_tree(tmp_path, labels=label)
    with pytest.raises(
        DataError, match=rf"frankfurt_000000_000294_gtFine_labelIds\.png: the mask has the label {label};"
    ):
        segbench.load_dataset("cityscapes", root)[0]


# CamVid

# label_colors.txt of CamVid, and the class that each of the 32 belongs to in SegNet's 11
ORIGINAL = {
    "Animal": ((64, 128, 64), "pedestrian"),
    "Archway": ((192, 0, 128), "building"),
    "Bicyclist": ((0, 128, 192), "bicyclist"),
    "Bridge": ((0, 128, 64), "building"),
    "Building": ((128, 0, 0), "building"),
    "Car": ((64, 0, 128), "car"),
    "CartLuggagePram": ((64, 0, 192), "pedestrian"),
    "Child": ((192, 128, 64), "pedestrian"),
    "Column_Pole": ((192, 192, 128), "pole"),
    "Fence": ((64, 64, 128), "fence"),
    "LaneMkgsDriv": ((128, 0, 192), "road"),
    "LaneMkgsNonDriv": ((192, 0, 64), "road"),
    "Misc_Text": ((128, 128, 64), "sign"),
    "MotorcycleScooter": ((192, 0, 192), "bicyclist"),
    "OtherMoving": ((128, 64, 64), "car"),
    "ParkingBlock": ((64, 192, 128), "sidewalk"),
    "Pedestrian": ((64, 64, 0), "pedestrian"),
    "Road": ((128, 64, 128), "road"),
    "RoadShoulder": ((128, 128, 192), "sidewalk"),
    "Sidewalk": ((0, 0, 192), "sidewalk"),
    "SignSymbol": ((192, 128, 128), "sign"),
    "Sky": ((128, 128, 128), "sky"),
    "SUVPickupTruck": ((64, 128, 192), "car"),
    "TrafficCone": ((0, 0, 64), "pole"),
    "TrafficLight": ((0, 64, 64), "sign"),
    "Train": ((192, 64, 128), "car"),
    "Tree": ((128, 128, 0), "tree"),
    "Truck_Bus": ((192, 128, 192), "car"),
    "Tunnel": ((64, 0, 64), "building"),
    "VegetationMisc": ((192, 192, 0), "tree"),
    "Void": ((0, 0, 0), None),
    "Wall": ((64, 192, 0), "building"),
}


def original_camvid(root: Path, colours=None, frames=("0016E5_07959",)) -> Path:
    colours = np.array([colour for colour, _ in ORIGINAL.values()] if colours is None else colours, np.uint8)
    for frame in frames:
        photograph(root / "701_StillsRaw_full" / f"{frame}.png", (3, len(colours)))
        path = root / "LabeledApproved_full" / f"{frame}_L.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(colours[None].repeat(3, axis=0)).save(path)
    return root


@pytest.mark.parametrize("dataset_id", ["camvid", "camvid/original"])
def test_camvid_as_first_distributed(tmp_path, dataset_id):
    root = original_camvid(tmp_path, frames=("0016E5_07959", "0016E5_07960", "0001TP_006690", "Seq05VD_f00000"))
    data = segbench.load_dataset(dataset_id, root)
    assert (data.id, data.image_ids) == ("camvid/original", ("0016E5_07959",))
    names = [*data.class_names, None]
    expected = [names.index(name) if name else 255 for _, name in ORIGINAL.values()]
    assert data[0].label.tolist() == [expected] * 3
    assert sorted(set(expected)) == [*range(11), 255]
    assert ids(root, dataset_id, split="test") == ("Seq05VD_f00000",)
    assert ids(root, dataset_id, split="train") == ("0001TP_006690", "0016E5_07960")


def test_unknown_colours_of_camvid_are_refused_with_the_file(tmp_path):
    root = original_camvid(tmp_path, [(0, 0, 0), (1, 2, 254)])
    with pytest.raises(
        DataError, match=r"0016E5_07959_L\.png: the mask has the colour #0102fe, which belongs to no class"
    ):
        segbench.load_dataset("camvid", root)[0]


def test_camvid_splits_are_those_of_segnet():
    frames = [f"0001TP_{frame:06}" for frame in range(6690, 10381, 30)]
    frames += [f"Seq05VD_f{frame:05}" for frame in range(0, 5101, 30)]
    frames += [f"0016E5_{frame:05}" for frame in range(7959, 8160, 2)]
    frames += [f"0006R0_f{frame:05}" for frame in range(930, 3931, 30)]
    found = {
        split: [frame for frame in frames if camvid.split_of(frame) == split] for split in ("train", "val", "test")
    }
    assert {split: len(each) for split, each in found.items()} == {"train": 62 + 101, "val": 101, "test": 62 + 171}
    assert (found["val"][0], found["val"][-1]) == ("0016E5_07959", "0016E5_08159")
    assert camvid.split_of("0016E5_08160") == camvid.split_of("0016E5_00390") == "train"


def test_camvid_of_segnet_wins_where_both_layouts_are(tmp_path):
    root = original_camvid(tmp_path)
    photograph(root / "val" / "x.png")
    mask(root / "valannot" / "x.png", 11)
    data = segbench.load_dataset("camvid", root)
    assert (data.id, data.image_ids) == ("camvid", ("x",))
    assert set(data[0].label.flatten().tolist()) == {255}
    assert segbench.load_dataset("camvid/original", root).image_ids == ("0016E5_07959",)
    with pytest.raises(DataError, match="has no train and trainannot"):
        segbench.load_dataset("camvid", root, split="train")


def test_half_of_an_original_camvid_is_said(tmp_path):
    root = original_camvid(tmp_path)
    shutil.rmtree(root / "LabeledApproved_full")
    with pytest.raises(DataError, match="has no LabeledApproved_full"):
        segbench.load_dataset("camvid", root)


# Other distributions


@pytest.mark.parametrize(
    ("dataset_id", "marker", "said"),
    [
        ("ade20k", "index_ade20k.pkl", "the full release of ADE20K: use ADEChallengeData2016"),
        ("ade20k", "images/ADE", "the full release of ADE20K: use ADEChallengeData2016"),
        ("ade20k/150", "annotations_detectron2", "made for Detectron2, its masks reduced by one: use annotations"),
        ("camvid", "codes.txt", "CamVid as fastai has it"),
        ("camvid", "val_labels", "CamVid as Kaggle has it"),
        ("camvid", "class_dict.csv", "CamVid as Kaggle has it"),
    ],
)
def test_other_distributions_are_recognised(tmp_path, dataset_id, marker, said):
    (tmp_path / marker).mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        segbench.load_dataset(dataset_id, tmp_path)
    (line,) = [line for line in str(caught.value).splitlines() if "looks like" in line]
    assert said in line
    assert line.endswith(", or describe it as a folder (docs/data.md).")
