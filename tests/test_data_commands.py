"""`segbench data list | info | show | weights | prepare`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segbench
from segbench.data import catalogue, pictures, reading
from segbench.data.dataset import Fingerprint, as_arrays
from segbench.data.sets import shapes
from segbench.data.survey import survey
from tests.test_checking import camvid, voc, write_pair  # noqa: F401 - fixtures
from tests.test_layering import ROOT, RUN


@pytest.fixture
def folder(tmp_path):
    """Four classes, two pictures of different sizes, known labels, one class without a pixel."""
    root = tmp_path / "odd"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    (root / "dataset.yaml").write_text(
        "classes: [sky, road, car, sea]\npalette: ['#102030', '#ff0000', '#00ff00', '#0000ff']\n"
    )
    labels = np.zeros((20, 30), np.uint8)
    labels[10:] = 1
    labels[:, 20:] = 2
    labels[15:, :5] = 255
    for name, mask in {"a": labels, "b": np.zeros((600, 800), np.uint8)}.items():
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        Image.fromarray(np.full((*mask.shape, 3), (100, 150, 201), np.uint8)).save(root / "images" / f"{name}.png")
    return root


def test_list_names_every_variant(cli):
    code, out, err = cli("data", "list")
    assert (code, err) == (0, "")
    for text in ("pascal_voc/void-ignored", "cityscapes/512x1024", "short side 473", "shapes", "https://", "published"):
        assert text in out
    rows = {row["id"]: row for row in json.loads(cli("data", "list", "--json")[1])}
    known = [
        f"{name}/{each}" if each else name for name, family in catalogue.FAMILIES.items() for each in family.variants
    ]
    assert list(rows) == ["shapes", *known]
    assert rows["camvid"]["images"]["val"] == 101
    assert (rows["ade20k/150"]["classes"], rows["ade20k/150"]["class_weights"]) == (150, "published")
    assert rows["folder"]["classes"] is None
    for dataset_id in set(rows) - {"folder/<name>"}:
        assert catalogue.split_id(dataset_id)


@pytest.mark.slow
def test_data_commands_load_no_torch(camvid, tmp_path):  # noqa: F811
    given = ["camvid", "--root", str(camvid)]
    commands = [
        ["data", "list"], ["data", "info", *given], ["data", "check", *given], ["data", "weights", *given],
        ["data", "show", *given, "-o", str(tmp_path / "sheet.png")], ["data", "info", "shapes"],
    ]  # fmt: skip
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {"codes": [0] * len(commands), "heavy": []}, done.stderr
    assert time.monotonic() - begin < 20


def test_info_tells_the_facts_of_a_split(cli, folder):
    code, out, err = cli("data", "info", "folder", "--root", str(folder))
    assert (code, err) == (0, "")
    for text in ("30x20 .. 800x600", "2 images", "as stored", "val split (no training split found)", str(folder)):
        assert text in out
    found = json.loads(cli("data", "info", "folder", "--data-root", str(folder), "--json")[1])
    pixels = [200 + 480000, 175, 200, 0]
    assert [row["pixels"] for row in found["classes"]] == pixels
    assert [row["share"] for row in found["classes"]] == pytest.approx([each / sum(pixels) for each in pixels])
    assert found["ignored"] == {"pixels": 25, "share": pytest.approx(25 / 480600)}
    assert found["sizes"] == {"smallest": [30, 20], "largest": [800, 600]}
    assert found["fingerprint"] == segbench.load_dataset("folder", folder).fingerprint()
    assert (found["window"], found["split"], list(found["splits"])) == (None, "val", ["val"])


def test_info_says_plainly_what_is_partial_and_what_is_left_out(cli, voc):  # noqa: F811
    (voc / "ImageSets" / "Segmentation" / "trainval.txt").write_text("a\nd\n")
    (voc / "JPEGImages" / "e.jpg").unlink()
    code, out, _ = cli("data", "info", "pascal_voc", "--root", str(voc.parent))
    assert code == 0
    assert "partial: 3 of 1449; an entry measured on it is unofficial" in out
    assert "partial: 2 of 2913; 1 also in val, left out" in out
    assert "not usable: e of train.txt has no image" in out
    assert "473x473" in out
    assert "published values" in out
    code, _, err = cli("data", "info", "pascal_voc", "--root", str(voc), "--split", "train")
    assert (code, "e of train.txt has no image" in err) == (1, True)
    code, _, err = cli("data", "info", "pascal_voc", "--root", str(voc), "--split", "tset")
    assert (code, "has the splits" in err) == (1, True)


def test_info_reads_files_once_until_one_changes(cli, folder, monkeypatch):
    read, seen = reading.read_turned_image, []
    monkeypatch.setattr(reading, "read_turned_image", lambda path, *args: seen.append(path) or read(path, *args))
    first = cli("data", "info", "folder", "--root", str(folder), "--json")
    assert len(seen) == 2
    assert cli("data", "info", "folder", "--root", str(folder), "--json") == first
    assert cli("data", "weights", "folder", "--root", str(folder))[0] == 0  # its pixels are known already
    assert len(seen) == 2
    Image.fromarray(np.ones((20, 30), np.uint8)).save(folder / "masks" / "a.png")
    assert cli("data", "info", "folder", "--root", str(folder), "--json") != first


def test_another_meaning_of_labels_is_another_data_set(cli, folder):
    """Though no picture has changed."""
    first = json.loads(cli("data", "info", "folder", "--root", str(folder), "--json")[1])
    with (folder / "dataset.yaml").open("a") as stream:
        stream.write("ignore: [1, 255]\nlabel_map: {0: sky, 2: car}\n")
    second = json.loads(cli("data", "info", "folder", "--root", str(folder), "--json")[1])
    with (folder / "dataset.yaml").open("a") as stream:
        stream.write("#\n")
    (folder / "dataset.yaml").write_text((folder / "dataset.yaml").read_text().replace("2: car", "2: sea"))
    third = json.loads(cli("data", "info", "folder", "--root", str(folder), "--json")[1])
    assert [row["pixels"] for row in second["classes"]] == [480200, 0, 200, 0]
    assert [row["pixels"] for row in third["classes"]] == [480200, 0, 0, 200]
    assert len({each["fingerprint"] for each in (first, second, third)}) == 3


def test_arrays_are_bit_for_bit_those_of_torch():
    """All 256 values, so the fingerprint needs no torch and stays what it was."""
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    image, labels = as_arrays(pixels, np.asfortranarray(pixels[..., 0]))
    by_torch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)
    assert image.dtype == np.float32
    assert image.tobytes() == by_torch.numpy().tobytes()
    assert (labels.dtype, labels.flags.c_contiguous, (labels == pixels[..., 0]).all()) == (np.int64, True, True)


def test_the_three_ways_to_a_fingerprint_agree(camvid):  # noqa: F811
    data = segbench.load_dataset("camvid", camvid)
    by_samples = Fingerprint(data)
    for sample in data:
        by_samples.update(sample)
    expected = by_samples.finish()
    assert segbench.load_dataset("camvid", camvid).fingerprint() == expected
    assert survey(segbench.load_dataset("camvid", camvid)).fingerprint == expected
    assert survey(shapes.load_shapes()).fingerprint == shapes.load_shapes().fingerprint()


def sheet_of(data, number):
    return np.asarray(Image.open(io.BytesIO(pictures.contact_sheet(data, number))))


def test_panels_have_the_colours_of_the_classes(folder):
    data = segbench.load_dataset("folder", folder)
    pixels, labels = data.checked("a")
    image, label, overlay = pictures.panels(pixels, labels, pictures.palette_of(data))
    assert image.shape == label.shape == overlay.shape == (200, 300, 3)  # ten times as large, a whole number
    assert (image == pixels[0, 0]).all()
    places = {(50, 100): (16, 32, 48), (150, 100): (255, 0, 0), (100, 250): (0, 255, 0)}
    assert {place: tuple(label[place].tolist()) for place in places} == places
    ignored = {tuple(colour) for colour in label[150:, :50].reshape(-1, 3)}
    assert ignored == set(pictures.HATCH)
    assert overlay[50, 100].tolist() == [58, 91, 124]  # the mean of image and colour, rounded to even
    assert overlay[150, 100].tolist() == [178, 75, 100]
    assert overlay[180, 20].tolist() == [100, 150, 201]  # ignored: the bare image
    assert (overlay[99, :199] > overlay[50, 100]).all()  # the border of sky and road is lighter
    assert (label[99, :199] == (16, 32, 48)).all()  # and only in the overlay


def test_a_sheet_holds_rows_and_legend(cli, folder, tmp_path):
    code, out, err = cli("data", "show", "folder", "--root", str(folder), "-n", "50")  # there are two
    assert (code, out, err) == (0, "sheet.png\n", "")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 3 * pictures.PANEL_WIDTH + 2 * pictures.GAP + 2 * pictures.MARGIN
    left = [pictures.MARGIN + column * (pictures.PANEL_WIDTH + pictures.GAP) + 160 for column in range(3)]
    panels = [{tuple(colour) for colour in sheet[:, place]} for place in left]
    assert (100, 150, 201) in panels[0]
    assert {(16, 32, 48), (255, 0, 0)} <= panels[1]
    assert (58, 91, 124) in panels[2]
    assert (sheet[:, : pictures.MARGIN - 1] == 255).all()
    assert (sheet[: pictures.MARGIN] == 255).all()
    assert (sheet == (0, 0, 255)).all(axis=2).sum() > 300  # the swatch of sea, of which there is no pixel
    assert cli("data", "show", "folder", "--root", str(folder), "-n", "1")[0] == 0  # overwritten
    assert np.asarray(Image.open(tmp_path / "sheet.png")).shape[0] < sheet.shape[0]


def test_many_classes_are_in_the_legend_only_if_they_occur(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("".join(f"{index}\n" for index in range(40)))
    Image.fromarray(np.full((9, 9), 39, np.uint8)).save(tmp_path / "masks" / "a.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    data = segbench.load_dataset("folder", tmp_path)
    below = sheet_of(data, 1)[-80:]
    assert (below == data.palette[39]).all(axis=2).any()
    assert not (below == data.palette[38]).all(axis=2).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (700, 20), (20, 700)])
def test_pictures_of_any_shape_fit(size):
    image, *_ = pictures.panels(np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8), np.zeros((2, 3), np.uint8))
    assert 1 <= image.shape[0] <= pictures.PANEL_HEIGHT
    assert 1 <= image.shape[1] <= pictures.PANEL_WIDTH


@pytest.mark.parametrize("name", ["漢字 ünï", "b" * 200, "x\u202ey\u200b", "[red]", "🙂"])
def test_odd_names_are_drawn(tmp_path, name):
    rng = np.random.default_rng(0)
    write_pair(tmp_path / "images" / f"{name}.png", tmp_path / "masks" / f"{name}.png", rng, 2)
    (tmp_path / "classes.txt").write_text(f"{name}\n{name * 9}\n", encoding="utf-8")
    sheet = sheet_of(segbench.load_dataset("folder", tmp_path), 8)
    assert (sheet[:, -pictures.MARGIN + 1 :] == 255).all()  # nothing is written into the margin


def test_show_refuses_what_it_cannot_write(cli, folder, tmp_path):
    for out, text in {"gone/sheet.png": "does not exist", "sheet.jpg": "ends in .png", ".": "ends in .png"}.items():
        code, _, err = cli("data", "show", "folder", "--root", str(folder), "-o", out)
        assert (code, text in err) == (2, True), err
    (folder / "masks" / "b.png").write_text("")
    code, _, err = cli("data", "show", "folder", "--root", str(folder))
    assert (code, "masks/b.png" in err) == (1, True)
    assert not (tmp_path / "sheet.png").exists()


def test_samples_are_spread_over_the_split():
    assert pictures.spread(100, 4) == [0, 33, 66, 99]
    assert pictures.spread(3, 8) == [0, 1, 2]
    for length in range(1, 40):
        for number in range(1, 12):
            found = pictures.spread(length, number)
            assert sorted(set(found)) == found
            assert len(found) == min(length, number)


def test_published_weights_and_counted_ones(cli, voc):  # noqa: F811
    code, out, err = cli("data", "weights", "pascal_voc", "--root", str(voc))
    assert (code, err) == (0, "")
    assert "source: published values" in out
    given = json.loads(cli("data", "weights", "pascal_voc", "--root", str(voc), "--json")[1])
    assert (given["source"], given["pixels"], len(given["weights"])) == ("published values", None, 21)
    code, out, _ = cli("data", "weights", "pascal_voc", "--root", str(voc), "--json", "--count")
    counted = json.loads(out)
    assert counted["source"] == "training split (2 of 1464 images)"
    assert sum(counted["pixels"]) == 2 * 473 * 473
    assert sum(counted["weights"]) == pytest.approx(1)
    assert counted["weights"] != given["weights"]
    (voc / "ImageSets" / "Segmentation" / "train.txt").unlink()
    code, _, err = cli("data", "weights", "pascal_voc", "--root", str(voc), "--count")
    assert (code, "no training split to count on" in err) == (1, True)


def test_weights_say_which_class_has_no_pixel(cli, folder):
    code, out, err = cli("data", "weights", "folder", "--root", str(folder), "--json")
    found = json.loads(out)
    assert (code, err) == (0, "folder, val split: no pixel of sea, so the weight in mce_bal is 0.\n")
    assert (found["source"], found["weights"][3]) == ("val split (no training split found)", 0)
    assert found["weights"] == pytest.approx(segbench.load_dataset("folder", folder).class_weights().tolist())
    assert "0.533" in cli("data", "weights", "folder", "--root", str(folder))[1]


def test_weights_of_shapes_are_those_of_the_library(cli):
    found = json.loads(cli("data", "weights", "shapes", "--json")[1])
    assert found == {
        "source": "training split", "weights": list(shapes.CLASS_WEIGHTS), "pixels": None,
        "classes": list(shapes.CLASS_NAMES),
    }  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("quiet", "drawn"), [([], True), (["--quiet"], False)])
def test_a_bar_is_drawn_for_a_person_only(camvid, monkeypatch, quiet, drawn):  # noqa: F811
    """That nothing is drawn where standard error is no terminal, the other tests see: it is empty."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(SystemExit):
        segbench.cli.main(["data", "check", "camvid", "--root", str(camvid), *quiet])
    assert ("reading val" in stream.getvalue()) is drawn


def test_options_have_variables(cli, camvid, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SEGBENCH_DATA_CHECK_ROOT", str(camvid))
    monkeypatch.setenv("SEGBENCH_DATA_CHECK_JSON", "1")
    code, out, _ = cli("data", "check", "camvid")
    assert (code, json.loads(out)["problems"]) == (0, [])


def test_prepare_passes_on_what_it_is_told(cli, monkeypatch):
    from segbench.data.preparation import preparing

    told = {}

    def prepare(dataset_id, root, **options):
        told.update(options, dataset_id=dataset_id, root=root)
        return ["a line", "evil \x1b[31m"]

    monkeypatch.setattr(preparing, "prepare", prepare)
    code, out, _ = cli("data", "prepare", "pascal_voc", "--root", "here", "--sbd", "--offline", "--quiet")
    assert (code, out) == (0, "a line\nevil ?[31m\n")
    assert told == {
        "dataset_id": "pascal_voc", "root": Path("here"), "sbd": True, "keep_archive": False, "offline": True,
        "progress": False,
    }  # fmt: skip
    assert cli("data", "prepare", "pascal_voc")[0] == 2


def test_names_of_strangers_reach_no_terminal_through_the_log(cli, folder):
    (folder / "classes.txt").write_text("sky\nroad\n\x1b]0;owned\x07car\nsea\x1b[31m\n")
    _, _, err = cli("data", "weights", "folder", "--root", str(folder), "--quiet")
    assert "no pixel of" in err
    assert "\x1b" not in err
