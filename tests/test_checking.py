"""`segbench data check`: everything that is wrong is told in one run, and nothing else is a problem."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import segbench
from segbench.data import checking
from segbench.data.catalogue import open_tree
from segbench.errors import DataError
from tests.test_reading import COLOURS, with_exif

SIZE = (12, 16)


def write_pair(image: Path, mask: Path, rng: np.random.Generator, classes: int) -> None:
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(image)
    labels = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % classes
    Image.fromarray(labels.astype(np.uint8)).save(mask)


@pytest.fixture
def camvid(tmp_path):
    """A whole tiny tree in the SegNet layout, as far as its number of images allows."""
    rng, root = np.random.default_rng(0), tmp_path / "camvid"
    for split, ids in {"val": "abcdefgh", "train": "tuv"}.items():
        for name in ids:
            write_pair(root / split / f"{name}.png", root / f"{split}annot" / f"{name}.png", rng, 12)
    return root


@pytest.fixture
def voc(tmp_path):
    """VOC2012 with three images of val and two of train."""
    rng, root = np.random.default_rng(0), tmp_path / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, ids in {"val": "abc", "train": "de"}.items():
        for name in ids:
            write_pair(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png", rng, 21)
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    return root


def texts(findings):
    return [each.text for each in findings]


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 60000x60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_good_tree_has_no_problems(cli, camvid):
    code, out, err = cli("data", "check", "camvid", "--root", str(camvid))
    assert code == 0
    assert "partial: 8 of 101 images; an entry measured on it is unofficial" in out
    assert "partial: 3 of 367 images." in out
    assert "problem," not in out
    assert err == "No problems, 4 notes. Images with masks: 8 of val, 3 of train.\n"


def test_all_problems_are_told_in_one_run(cli, camvid):
    val, masks, train = camvid / "val", camvid / "valannot", camvid / "train"
    (masks / "a.png").unlink()  # missing mask
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(masks / "b.png")  # another size
    Image.fromarray(np.full(SIZE, 200, np.uint8)).save(masks / "c.png")  # label, and its image is damaged too
    Image.open(val / "c.png").save(val / "c.jpg", quality=95)
    (val / "c.jpg").write_bytes((val / "c.jpg").read_bytes()[:-40])
    (val / "c.png").unlink()
    (val / "d.png").write_bytes(bomb())
    (val / "e.png").unlink()
    (val / "e.png").symlink_to(camvid / "nowhere.png")
    (masks / "f.png").write_text("<html>")
    (val / "g.png").write_bytes(b"")
    shutil.copy(val / "h.png", train / "renamed.png")  # a leak under another name
    shutil.copy(masks / "h.png", camvid / "trainannot" / "renamed.png")
    (camvid / "trainannot" / "u.png").unlink()
    code, out, err = cli("data", "check", "camvid", "--data-root", str(camvid))
    problems = [line for line in out.splitlines() if line.startswith("problem")]
    expected = [
        ("val", "val/a.png has no mask in"),
        ("val", "val/b.png with"),
        ("val", "valannot/c.png: the mask has the label 200"),
        ("val", "Cannot read the image", "val/c.jpg", "truncated"),
        ("val", "val/d.png is too large"),
        ("val", "val/e.png is a link to"),
        ("val", "Cannot read the mask", "valannot/f.png"),
        ("val", "Cannot read the image", "val/g.png"),
        ("train", "train/renamed.png is the same picture as", "val/h.png"),
        ("train", "train/u.png has no mask"),
    ]
    for split, *parts in expected:
        fitting = [line for line in problems if line.startswith(f"problem, {split}:")]
        assert sum(all(part in line for part in parts) for line in fitting) == 1, (parts, out)
    assert len(problems) == len(expected), out
    assert code == 1
    assert err.startswith("Error: 10 problems in camvid")


def test_problems_as_json_name_file_and_split(cli, camvid):
    Image.fromarray(np.full(SIZE, 200, np.uint8)).save(camvid / "valannot" / "c.png")
    (camvid / "trainannot" / "t.png").unlink()
    code, out, _ = cli("data", "check", "camvid", "--root", str(camvid), "--json")
    found = json.loads(out)
    assert code == 1
    listed, label = found["problems"]
    assert (listed["split"], "file" in listed, "train/t.png has no mask" in listed["text"]) == ("train", False, True)
    mask = str(camvid / "valannot" / "c.png")
    assert (label["split"], label["file"], label["files"]) == ("val", mask, [mask])
    assert found["splits"]["val"] == {"images": 8, "complete": 101, "left_out": 0}
    assert found["splits"]["train"]["images"] == 2
    assert [each["text"] for each in found["notes"] if each["split"] == "val"] == [
        "partial: 8 of 101 images; an entry measured on it is unofficial.",
        "pictures of 16x12 instead of 480x360 pixels: a reduced copy; an entry measured on it is unofficial.",
    ]


def test_a_wrong_root_says_where_it_is(cli, camvid, tmp_path):
    for root, text in {tmp_path: "lies too high", camvid / "val": "lies too deep"}.items():
        code, out, err = cli("data", "check", "camvid", "--root", str(root))
        assert (code, out) == (1, "")
        assert text in err
        assert f"give {camvid}." in err
    code, _, err = cli("data", "check", "camvd", "--root", str(camvid))
    assert (code, "Did you mean 'camvid'" in err) == (2, True)
    code, _, err = cli("data", "check", "camvid")
    assert (code, "needs a data root" in err) == (1, True)


def test_an_empty_list_of_voc_is_named(cli, voc):
    """Once, and it does not hide what is wrong with the training split."""
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    (voc / "JPEGImages" / "d.jpg").write_bytes(b"")
    code, out, _ = cli("data", "check", "pascal_voc", "--root", str(voc))
    assert code == 1
    assert out.count("Segmentation/val.txt is empty") == 1
    assert "JPEGImages/d.jpg" in out


def test_ids_of_a_list_without_files_are_problems_not_a_partial_copy(voc):
    (voc / "JPEGImages" / "a.jpg").unlink()
    found = checking.check(open_tree("pascal_voc", voc))
    assert len(found.problems) == 1
    assert "a of val.txt has no image in" in found.problems[0].text
    assert [each.text for each in found.notes if "partial" in each.text] == ["partial: 2 of 1464 images."]


def test_leaks_by_id_are_left_out_and_noted(voc):
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "trainval.txt").write_text("a\nb\nc\nd\ne\n")
    found = checking.check(open_tree("pascal_voc", voc))
    assert found.problems == []
    assert "a, b, c: also in val, so left out when the split is loaded." in texts(found.notes)
    assert found.splits["trainval"] == (5, 2913, 3)


def test_same_names_in_training_are_noted_until_they_are_the_same_picture(camvid):
    rng = np.random.default_rng(7)
    write_pair(camvid / "train" / "a.png", camvid / "trainannot" / "a.png", rng, 12)
    found = checking.check(open_tree("camvid", camvid))
    assert found.problems == []
    assert any("a.png: an image of val has the same id" in text for text in texts(found.notes))
    shutil.copy(camvid / "val" / "a.png", camvid / "train" / "a.png")
    found = checking.check(open_tree("camvid", camvid))
    assert len(found.problems) == 1
    assert "train/a.png is the same picture as" in found.problems[0].text
    assert not any("same id" in text for text in texts(found.notes))


def test_notes_are_no_problems(cli, tmp_path):
    """EXIF, masks without a label, duplicates and classes without a pixel."""
    rng = np.random.default_rng(0)
    for place in ("images", "train/images"):
        for name in "abcd":
            folder = tmp_path / "set" / place
            write_pair(folder / f"{name}.jpg", folder.with_name("masks") / f"{name}.png", rng, 2)
    root = tmp_path / "set"
    (root / "classes.txt").write_text("sky\nroad\nsea\n")
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(root / "images" / "a.jpg") as image:
        image.save(root / "images" / "a.jpg", exif=exif)
    Image.fromarray(np.full(SIZE, 255, np.uint8)).save(root / "masks" / "b.png")
    shutil.copy(root / "images" / "c.jpg", root / "images" / "d.jpg")
    code, out, err = cli("data", "check", "folder", "--root", str(root))
    assert code == 0, out
    for text in (
        "note, val: a.jpg: 1 picture with an EXIF orientation, used as stored, because only so the mask fits.",
        "note, val: no pixel of sea; 25% of the pixels are ignored. Did you mean label_map: {0: sky, 1: road, ",
        "note, val: b.png: every pixel of the mask is ignored.",
        "note, val: c.jpg, d.jpg: the same picture.",
        "note, train: no pixel of sea: its weight in mce_bal is 0.",
        "note, train: a.jpg, b.jpg, c.jpg and 1 more: an image of val has the same id.",
    ):
        assert text in out, out
    assert err.startswith("No problems, 6 notes.")


def described(root: Path, name: str, masks, text="classes: [sky, road]\n") -> Path:
    """A folder with a description and an image for each mask."""
    for number, labels in enumerate(masks):
        for kind in ("images", "masks"):
            (root / kind).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (*labels.shape, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}{number}.png")
        Image.fromarray(labels.astype(np.uint8)).save(root / "masks" / f"{name}{number}.png")
    (root / "dataset.yaml").write_text(text)
    return root


def notes(root):
    found = checking.check(open_tree("folder", root))
    assert found.problems == []
    return texts(found.notes)


def test_a_foreground_of_255_is_asked_for(tmp_path):
    labels = np.zeros((10, 10))
    labels[:5] = labels[5, 0] = 255
    root = described(tmp_path, "a", [labels])
    hint = "no pixel of road; 51% of the pixels are ignored. Did you mean label_map: {0: sky, 255: road}?"
    assert hint in notes(root)
    labels[:5] = 0  # one ignored pixel is not worth its share, but the class is still missing
    described(tmp_path, "a", [labels])
    assert "no pixel of road. Did you mean label_map: {0: sky, 255: road}?" in notes(root)
    described(tmp_path, "a", [labels], "classes: [sky, road]\nlabel_map: {0: sky, 1: road}\n")
    assert "no pixel of road." in notes(root)
    described(tmp_path, "a", [labels], "classes: [sky, road]\nlabel_map: {0: sky, 255: road}\n")
    assert not [text for text in notes(root) if "no pixel" in text]


def test_classes_without_pixel_are_counted_over_the_whole_split(voc):
    """Also over images that another split has shown before; those left out as leaks do not count."""
    lists = voc / "ImageSets" / "Segmentation"
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(voc / "SegmentationClass" / "d.png")
    (lists / "trainval.txt").write_text("a\nd\ne\n")
    found = checking.check(open_tree("pascal_voc", voc))
    assert [each for each in texts(found.notes) if "no pixel" in each] == []
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(voc / "SegmentationClass" / "e.png")
    found = checking.check(open_tree("pascal_voc", voc))
    few = "no pixel of aeroplane, bicycle, bird and 17 more"
    assert [(each.split, each.text) for each in found.notes if "no pixel" in each.text] == [
        ("train", f"{few}: the published class weights are used."),
        ("trainval", f"{few}."),
    ]


def test_files_that_are_not_read_are_noted(tmp_path):
    root = described(tmp_path, "a", [np.arange(100).reshape(10, 10) % 2])
    for name in ("b.jfif", "c.gif", "Thumbs.db", ".hidden.gif"):
        (root / "images" / name).write_bytes(b"")
    for name in ("x.png", "y.png"):
        shutil.copy(root / "masks" / "a0.png", root / "masks" / name)
    found = notes(root)
    known = ".png, .jpg, .jpeg, .bmp, .tif, .tiff, .webp"
    assert f"2 files in {root / 'images'} are not read (.gif, .jfif): suffixes are {known}." in found
    assert f"2 masks in {root / 'masks'} have no image, the first is x.png." in found


def test_masks_of_other_splits_are_not_noted(voc, tmp_path):
    found = checking.check(open_tree("pascal_voc", voc))
    assert not [text for text in texts(found.notes) if " no image, the first" in text]
    for kind, ending in {"701_StillsRaw_full": "", "LabeledApproved_full": "_L"}.items():
        (tmp_path / "original" / kind).mkdir(parents=True)
        for frame in ("0016E5_07959", "0001TP_006690", "Seq05VD_f00000"):
            picture = Image.new("RGB", (4, 4), (128, 128, 128 * (ending == "_L")))
            picture.save(tmp_path / "original" / kind / f"{frame}{ending}.png")
    found = checking.check(open_tree("camvid/original", tmp_path / "original"))
    assert not [text for text in texts(found.notes) if " no image, the first" in text]


def test_what_becomes_of_turned_pictures_is_told(tmp_path):
    """1 turned, 1 as stored because only so its mask fits, and those of half a turn and of a square are ambiguous."""
    tall, wide, square = (np.arange(np.prod(size)).reshape(size) % 2 for size in ((12, 8), (8, 12), (8, 8)))
    root = described(tmp_path, "a", [tall, wide, wide, square, wide])
    for number, orientation in {0: 6, 1: 6, 2: 3, 3: 8}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = np.zeros((*(wide.shape if number == 0 else (wide, wide, wide, square)[number].shape), 3), np.uint8)
        Image.fromarray(stored + number).save(root / "images" / f"a{number}.png", exif=exif)
    look = f"Look: segbench data show folder --root {root}"
    assert [text for text in notes(root) if "EXIF" in text] == [
        "a0.png: 1 picture with an EXIF orientation, turned as it says.",
        "a1.png: 1 picture with an EXIF orientation, used as stored, because only so the mask fits.",
        "a2.png, a3.png: 2 pictures with an EXIF orientation, turned as it says, but the mask fits both ways. " + look,
    ]
    Image.fromarray(wide.astype(np.uint8)).save(root / "masks" / "a0.png")
    (root / "dataset.yaml").write_text("classes: [sky, road]\nturned: false\n")
    assert [text for text in notes(root) if "EXIF" in text] == [
        "a0.png, a1.png, a2.png and 1 more: 4 pictures with an EXIF orientation, which is not applied: used as stored."
    ]


def test_readers_that_raise_anything_become_problems(camvid, monkeypatch):
    def broken(path, bits):
        raise MemoryError("no room")

    monkeypatch.setattr("segbench.data.reading.read_image", broken)
    found = checking.check(open_tree("camvid", camvid))
    assert [len(each.files) for each in found.problems] == [8, 3]  # one line for all of a split
    said = f"Cannot read {camvid / 'val' / 'a.png'}: MemoryError: no room. Restore the file."
    assert texts(found.problems)[0] == f"8 files (a.png, b.png, c.png and 5 more): {said}"


def test_labels_outside_of_the_class_list_are_one_line_with_the_edit_that_fixes_it(cli, tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "own"
    for index in range(12):
        write_pair(root / "images" / f"{index}.png", root / "masks" / f"{index}.png", rng, 11)
    (root / "classes.txt").write_text("".join(f"class {label}\n" for label in range(11)))
    for index in range(12):
        labels = np.full(SIZE, 11, np.uint8)
        labels[0, 0], labels[0, 1] = 255, 254 if index == 5 else 0
        Image.fromarray(labels).save(root / "masks" / f"{index}.png")
    code, out, err = cli("data", "check", "folder", "--root", str(root))
    problems = [line for line in out.splitlines() if line.startswith("problem")]
    assert (code, err.startswith("Error: 1 problem in folder"), len(problems)) == (1, True, 1)
    assert "val: 12 files (0.png, 1.png, 10.png and 9 more): the mask has the labels 11, 254; " in problems[0]
    edit = problems[0].rpartition("ignore: ")[2]
    assert edit == "[11, 254, 255]"
    names = json.dumps([f"class {label}" for label in range(11)])
    (root / "dataset.yaml").write_text(f"classes: {names}\nignore: {edit}\n")  # as it says
    code, out, _ = cli("data", "check", "folder", "--root", str(root))
    assert (code, "problem" in out) == (0, False)


def test_other_problems_are_one_line_of_a_kind_as_well(camvid):
    for name, side in (("a", 8), ("b", 9)):
        Image.fromarray(np.zeros((side, 8), np.uint8)).save(camvid / "valannot" / f"{name}.png")
    for name in "cd":
        (camvid / "valannot" / f"{name}.png").write_bytes(b"GIF89a")
    sides, damaged = checking.check(open_tree("camvid", camvid)).problems
    assert sides.text.startswith("2 files (a.png, b.png): camvid: the image is 16x12, its mask 8x8 pixels")
    assert damaged.text.startswith("2 files (c.png, d.png): Cannot read the mask")
    assert [path.name for path in damaged.files] == ["c.png", "d.png"]


def test_pictures_of_16_bits_that_hold_fewer_are_a_problem_until_it_is_said(cli, tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "own"
    (root / "images").mkdir(parents=True)
    for index, largest in enumerate((200, 4095, 3000)):
        write_pair(root / "images" / "x.png", root / "masks" / f"{index}.png", rng, 2)
        numbers = np.linspace(0, largest, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE)
        Image.fromarray(numbers).save(root / "images" / f"{index}.png")
    (root / "images" / "x.png").unlink()
    (root / "dataset.yaml").write_text("classes: [a, b]\n")
    code, out, _ = cli("data", "check", "folder", "--root", str(root))
    assert code == 1
    assert "problem, val: 3 files (0.png, 1.png, 2.png): 16 bits a channel, but the largest number is 4095: " in out
    assert "e.g. bits: 12." in out
    with pytest.raises(DataError, match=r"The image .*0\.png: 16 bits a channel, but the largest number is 200"):
        segbench.load_dataset("folder", root)[0]
    (root / "dataset.yaml").write_text("classes: [a, b]\nbits: 12\n")
    assert cli("data", "check", "folder", "--root", str(root))[0] == 0
    data = segbench.load_dataset("folder", root)
    assert data.preprocessing == "as stored; 12 bits in 16"
    assert [round(float(sample.image.max()) * 255) for sample in data] == [200 >> 4, 255, 3000 >> 4]
    (root / "dataset.yaml").write_text("classes: [a, b]\nbits: 8\n")
    code, out, _ = cli("data", "check", "folder", "--root", str(root))
    assert code == 1
    assert "2 files (1.png, 2.png): the number 4095 has more than the 8 bits that the data set has" in out
    (root / "dataset.yaml").write_text("classes: [a, b]\nbits: 16\n")
    assert cli("data", "check", "folder", "--root", str(root))[0] == 0


def test_damaged_exif_is_noted(tmp_path):
    root = tmp_path / "own"
    write_pair(root / "images" / "a.png", root / "masks" / "a.png", np.random.default_rng(0), 2)
    (root / "images" / "a.png").write_bytes(with_exif(b"garbage garbage"))
    Image.fromarray(np.zeros(COLOURS.shape[:2], np.uint8)).save(root / "masks" / "a.png")
    (root / "classes.txt").write_text("sky\nroad\n")
    found = checking.check(open_tree("folder", root))
    assert found.problems == []
    assert "a.png: the EXIF cannot be read, nor whether it turns; used as stored." in texts(found.notes)


def test_every_pair_and_file_is_reported(camvid):
    seen = []
    checking.check(open_tree("camvid", camvid), lambda *step: seen.append(step))
    assert seen[0] == ("reading val", 0, 8)
    assert ("reading val", 8, 8) in seen
    assert ("reading train", 3, 3) in seen
    assert seen[-1][0] == "comparing files"


def test_a_missing_val_split_is_a_problem_and_a_missing_training_split_a_note(camvid, voc):
    shutil.rmtree(camvid / "train")
    found = checking.check(open_tree("camvid", camvid))
    assert found.problems == []
    assert any("no training split: class weights are counted on val" in text for text in texts(found.notes))
    (voc / "ImageSets" / "Segmentation" / "val.txt").unlink()
    found = checking.check(open_tree("pascal_voc", voc))
    assert "Cannot read the list" in found.problems[0].text


def test_the_embedded_data_set_is_checked(cli):
    code, out, _ = cli("data", "check", "shapes")
    assert (code, "the checksum is right" in out) == (0, True)
