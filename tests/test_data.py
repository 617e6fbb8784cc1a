"""Data sets: the embedded one never changes, folders are read exactly, and broken trees are named."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import torch
from PIL import Image

import segbench
from segbench import entries
from segbench.data import reading
from segbench.data.sets import shapes
from segbench.data.weights import inverse_frequency
from segbench.errors import DataError, UnknownNameError


def test_shapes_never_changes():
    data = segbench.load_dataset("shapes")
    assert len(data) == 32
    assert data.num_classes == 8
    assert data.image_ids == tuple(sorted(data.image_ids))
    assert data.fingerprint() == entries.FINGERPRINTS["shapes"]
    sample = data[3]
    assert (sample.image.shape, sample.image.dtype, sample.label.dtype) == ((3, 64, 64), torch.float32, torch.int64)
    assert 0 <= float(sample.image.min()) < float(sample.image.max()) <= 1
    assert set(torch.cat([item.label.flatten() for item in data]).tolist()) == set(range(8))


def test_stored_validation_images_come_from_the_generator():
    images, labels = shapes.draw_split(shapes.VALIDATION_SEED, 4)
    stored, stored_labels = shapes._stored_validation()
    assert np.abs(images.astype(int) - stored[:4]).max() <= 1  # another libm may round differently
    assert (labels != stored_labels[:4]).mean() < 1e-3


def test_shapes_refuses_changed_files_and_unknown_splits(monkeypatch):
    monkeypatch.setattr(shapes, "VALIDATION_SHA256", "0" * 64)
    shapes._stored_validation.cache_clear()
    with pytest.raises(DataError, match=r"damaged.*--force-reinstall"):
        shapes.load_shapes()
    monkeypatch.undo()
    shapes._stored_validation.cache_clear()
    with pytest.raises(DataError, match="has the splits"):
        shapes.load_shapes("test")


def test_training_scenes_depend_on_seed_and_index_alone():
    first, second = shapes.draw_scene(0, 5), shapes.load_shapes("train", count=6).read("00005")
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert (shapes.draw_scene(1, 5)[0] != first[0]).any()


@pytest.mark.slow
def test_class_weights_of_shapes_follow_the_training_split():
    _, labels = shapes.draw_split(0, 400)
    expected = inverse_frequency(np.bincount(labels.ravel(), minlength=8))
    assert sum(shapes.CLASS_WEIGHTS) == pytest.approx(1, abs=1e-4)
    assert np.abs(np.array(shapes.CLASS_WEIGHTS) - expected).max() < 0.03


@pytest.fixture
def camvid(tmp_path):
    """A tiny tree in the SegNet layout."""
    rng = np.random.default_rng(0)
    for split, ids in {"val": ["b", "a", "c"], "train": ["t"]}.items():
        for folder in (split, f"{split}annot"):
            (tmp_path / folder).mkdir()
        for name in ids:
            Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).save(tmp_path / split / f"{name}.png")
            Image.fromarray(rng.integers(0, 12, (12, 16)).astype(np.uint8)).save(
                tmp_path / f"{split}annot" / f"{name}.png"
            )
    return tmp_path


def test_camvid_layout(camvid):
    data = segbench.load_dataset("camvid", root=str(camvid))
    assert data.image_ids == ("a", "b", "c")
    assert data.num_classes == 11
    raw = np.asarray(Image.open(camvid / "valannot" / "a.png"))
    assert (data[0].label.numpy() == np.where(raw == 11, 255, raw)).all()
    assert (
        data[0].image.numpy()
        == np.asarray(Image.open(camvid / "val" / "a.png")).transpose(2, 0, 1).astype(np.float32) / 255
    ).all()
    raw = np.asarray(Image.open(camvid / "trainannot" / "t.png"))
    expected = inverse_frequency(np.bincount(raw.ravel(), minlength=12)[:11])
    torch.testing.assert_close(data.class_weights().double(), torch.from_numpy(expected), rtol=1e-6, atol=0)
    assert data.count_weights()[1] == "training split (1 of 367 images)"
    assert segbench.load_dataset("camvid", camvid, split="train").image_ids == ("t",)


def test_fingerprint_sees_pixels_labels_and_ids(camvid):
    def fingerprint():
        return segbench.load_dataset("camvid", camvid).fingerprint()

    original = fingerprint()
    assert fingerprint() == original
    assert segbench.load_dataset("camvid", camvid).first(2).fingerprint() != original
    for folder in ("val", "valannot"):
        pixels = np.asarray(Image.open(camvid / folder / "a.png")).copy()
        changed = pixels.copy()
        changed.flat[0] = (changed.flat[0] + 1) % 11
        Image.fromarray(changed).save(camvid / folder / "a.png")
        assert fingerprint() != original
        Image.fromarray(pixels).save(camvid / folder / "a.png")
        assert fingerprint() == original
    for folder in ("val", "valannot"):
        (camvid / folder / "c.png").rename(camvid / folder / "d.png")
    assert fingerprint() != original


def test_folder_layout(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("sky\nroad\n\n")
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(tmp_path / "images" / "ä b.jpg")  # grey, odd name
    Image.fromarray(np.array([[0, 1, 255, 1, 1]] * 5, np.uint8).repeat(2, axis=1)[:, :7]).save(
        tmp_path / "masks" / "ä b.png"
    )
    data = segbench.load_dataset("folder", tmp_path)
    assert data.class_names == ("sky", "road")
    assert data.image_ids == ("ä b",)
    assert data[0].image.shape == (3, 5, 7)
    assert sorted(set(data[0].label.flatten().tolist())) == [0, 1, 255]
    assert "no training split" in data.count_weights()[1]


@pytest.mark.parametrize(
    ("breakage", "texts"),
    [
        ("label", ["valannot/a.png", "200", "0..10", "Correct the mask"]),
        ("size", ["val/a.png with", "valannot/a.png", "16x12", "8x8"]),
        ("truncated", ["Cannot read the image", "a.png"]),
        ("not an image", ["Cannot read the mask", "a.png"]),
        ("broken png", ["Cannot read the mask", "a.png", "broken PNG", "Restore"]),
        ("colour mask", ["a.png", "not a one-channel image"]),
        ("not utf-8", ["a\\udcff.png", "not valid UTF-8", "Rename"]),
        ("missing mask", ["val/a.png has no mask in", "valannot", "Restore the mask"]),
        ("no images", ["no images in"]),
        ("no folder", ["has no valannot", "Expected layout", "trainannot/"]),
        ("twice", ["a.jpg and a.png", "Rename one"]),
    ],
)
def test_broken_trees_are_named(camvid, breakage, texts):
    image, mask = camvid / "val" / "a.png", camvid / "valannot" / "a.png"
    if breakage == "label":
        Image.fromarray(np.full((12, 16), 200, np.uint8)).save(mask)
    elif breakage == "size":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(mask)
    elif breakage == "truncated":
        image.write_bytes(image.read_bytes()[:200])
    elif breakage == "not an image":
        mask.write_text("<html>")
    elif breakage == "broken png":
        data = mask.read_bytes()
        start = data.index(b"IDAT")
        mask.write_bytes(data[: start - 4] + (5).to_bytes(4, "big") + data[start:])  # a chunk that ends too early
    elif breakage == "not utf-8":
        image.rename(os.fsdecode(os.fsencode(image.with_suffix("")) + b"\xff.png"))
    elif breakage == "colour mask":
        Image.new("RGB", (16, 12), (128, 0, 0)).save(mask)
    elif breakage == "missing mask":
        mask.unlink()
    elif breakage == "no images":
        for path in (camvid / "val").iterdir():
            path.unlink()
    elif breakage == "no folder":
        for path in (camvid / "valannot").iterdir():
            path.unlink()
        (camvid / "valannot").rmdir()
    else:
        Image.open(image).save(image.with_suffix(".jpg"))
    with pytest.raises(DataError) as caught:
        list(segbench.load_dataset("camvid", camvid))
    assert all(text in str(caught.value) for text in texts), str(caught.value)


def test_missing_roots_draw_the_layout(tmp_path):
    for root, text in {None: "needs a data root: --data-root", str(tmp_path / "x"): "is not a folder"}.items():
        with pytest.raises(DataError, match=text) as caught:
            segbench.load_dataset("camvid", root)
        assert "valannot/" in str(caught.value)
    with pytest.raises(UnknownNameError, match="Did you mean 'camvid'"):
        segbench.load_dataset("camvd")
    with pytest.raises(DataError, match="Write the folder out"):
        segbench.load_dataset("camvid", "~no-such-user/x")


@pytest.mark.parametrize("value", [1.7, np.nan])
def test_masks_of_fractions_are_refused_not_truncated(camvid, value):
    for split in ("valannot", "trainannot"):
        for path in list((camvid / split).iterdir()):
            path.unlink()
            Image.fromarray(np.full((12, 16), value, np.float32)).save(path.with_suffix(".tif"))
    data = segbench.load_dataset("camvid", camvid)
    with pytest.raises(DataError, match=r"valannot/a\.tif is not a one-channel image of whole numbers \(it is F\)"):
        data[0]
    with pytest.raises(DataError, match=r"trainannot/t\.tif is not"):
        data.class_weights()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16, np.int32])
def test_masks_of_any_whole_numbers_are_read(tmp_path, depth):
    Image.fromarray(np.full((3, 4), 7, depth)).save(tmp_path / "mask.tif")
    assert (reading.read_mask(tmp_path / "mask.tif") == 7).all()


@pytest.mark.filterwarnings("ignore")
def test_damaged_images_never_raise_anything_but_a_data_error(tmp_path):
    """Whatever Pillow's readers say of flipped bytes."""
    rng = np.random.default_rng(0)
    for suffix in (".png", ".tif", ".bmp", ".jpg"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(rng.integers(0, 256, (6, 7), np.uint8)).save(path)
        data = path.read_bytes()
        for place in range(0, len(data), 3):
            path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
            for read in (reading.read_image, reading.read_turned_image, reading.read_mask, reading.read_colour_mask):
                with contextlib.suppress(DataError):
                    read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"sky\n\nroad\n", "line 2 is blank.*Name the class or remove"),
        (b"\nsky\nroad\n", "line 1 is blank"),
        ("Straße\nsky\n".encode("latin-1"), "Cannot read the class list.*UTF-8"),
        (None, "Cannot read the class list"),
        (b"", "lists 0 classes"),
        (b"sky\n\n \n", "lists 1 classes"),
        (b"class\nsky\nroad\n", r"line 1 looks like a head line \('class'\), but .*dataset\.yaml"),
        (b"Labels\nsky\nroad\n", "line 1 looks like a head line"),
        (b"names:\nsky\nroad\n", "line 1 looks like a head line"),
        (b"# of CVAT\nsky\nroad\n", r"line 1 is a comment \('# of CVAT'\)"),
        (b"sky\n// grey\nroad\n", "line 2 is a comment"),
        (b"__ignore__\n_background_\ncar\n", r"line 1 is no class \('__ignore__'\): ignored pixels are 255 in masks"),
        (b"sky\n[ignore]\n", "line 2 is no class"),
        (b"-1 ignore\n0 sky\n1 road\n", "line 1 is no class"),
        (b"Category\nsky\nroad\n", "line 1 looks like a head line"),
        (b"label_id\nsky\nroad\n", "line 1 looks like a head line"),
        (b"Classes (2)\nsky\nroad\n", "line 1 looks like a head line"),
        (b"nc: 2\nnames: [sky, road]\n", "line 1 looks like a head line"),
        (b"2\nsky\nroad\n", "line 1 looks like the number of classes"),
        (b"% of ours\nsky\nroad\n", "line 1 is a comment"),
        (b"- sky\n- road\n", "its lines are a list of YAML"),
        (b'"sky"\n"road"\n', "its lines are quoted"),
        (b"0,sky\n1,road\n", "its lines are rows of a table"),
        (b"name,r,g,b\nsky,1,2,3\n", "its lines are rows of a table"),
        (b"Idx\tName\n1\twall\n", "its lines are rows of a table"),
        (b"sky:128,0,0::\nroad:0,0,0::\n", "its lines are rows of a table"),
        (b"1 wall\n2 floor\n", r"line 1 is numbered otherwise \('1 wall'\)"),
        (b"0: wall\n2: floor\n", "line 2 is numbered otherwise"),
    ],
)
def test_class_lists_with_faults_are_refused(tmp_path, text, said):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    path = tmp_path / "classes.txt"
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text)
    with pytest.raises(DataError, match=said):
        segbench.load_dataset("folder", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "_background_\ncar",
        "0 wall\n1 floor",
        "door, double door\nfloor",
        "3 D\nclass",
        "traffic light, red\ntraffic light, green",
        "object\nvoid",
    ],
)
def test_class_lists_that_shift_nothing_are_read(tmp_path, text):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / name / "a.png")
    (tmp_path / "classes.txt").write_text(text)
    assert segbench.load_dataset("folder", tmp_path).class_names == tuple(text.splitlines())


def test_class_weights_are_counted_once(camvid, monkeypatch):
    """Until a file changes."""
    read, seen = reading.read_mask, []
    monkeypatch.setattr(reading, "read_mask", lambda path: seen.append(path) or read(path))
    data = segbench.load_dataset("camvid", camvid)
    weights = data.class_weights()
    assert torch.equal(weights, data.first(1).class_weights())
    assert torch.equal(segbench.load_dataset("camvid", camvid).class_weights(), weights)
    assert len(seen) == 1
    Image.fromarray(np.full((12, 16), 3, np.uint8)).save(camvid / "trainannot" / "t.png")
    assert segbench.load_dataset("camvid", camvid).class_weights().tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert len(seen) == 2
