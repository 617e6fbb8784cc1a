"""Metrics of a run: what is written reads back, TensorBoard shows no undone epoch, curves show the numbers."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segbench.training import curves, metrics

SCORES = ("clean_aacc", "clean_miou", "robust_aacc", "robust_miou")
HOSTILE = 'a</text><script>alert("1")</script><image href="http://x.org/"/>&lt;\x00\x0b\ud800 \u202e {"expr": "1"} ]]>'


def make_rows(epochs, every=2, shift=0.0):
    """A run of ``epochs`` epochs that was measured ``every`` so many; ``shift`` tells two runs apart."""
    rows = []
    for epoch in range(1, epochs + 1):
        row = dict.fromkeys(metrics.COLUMNS)
        row |= {"epoch": epoch, "step": 10 * epoch, "loss": 2 / epoch + shift, "learning_rate": 1e-3 / epoch}
        row |= {"seconds": 60.0 * epoch + shift, "images_per_second": 23.5}
        if every and epoch % every == 0:
            row |= {name: (1 - 1 / epoch) / (number + 1) for number, name in enumerate(SCORES)}
        rows.append(row)
    return rows


def shown(folder):
    """What a TensorBoard that is opened now shows: tag to (step, time, value)."""
    accumulator = EventAccumulator(str(folder / metrics.BOARD), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [tuple(point) for point in points(accumulator, tag)] for tag in accumulator.Tags()["scalars"]}


def points(accumulator, tag):
    return [(event.step, event.wall_time, event.value) for event in accumulator.Scalars(tag)]


def expected(rows):
    """The same of rows; TensorBoard keeps four bytes of a number."""
    found = {
        tag: [(row["step"], row["seconds"], pytest.approx(row[column], rel=1e-6)) for row in rows if row[column]]
        for column, tag in metrics.TAGS.items()
    }
    return {tag: series for tag, series in found.items() if series}


def event_files(folder):
    return sorted((folder / metrics.BOARD).iterdir())


def test_csv_and_json_lines_read_back_as_they_were_written(tmp_path):
    rows = make_rows(5)
    metrics.write(tmp_path, rows)
    assert [json.loads(line) for line in (tmp_path / metrics.LINES).read_text().splitlines()] == rows
    with (tmp_path / metrics.CSV).open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert list(table[0]) == list(metrics.COLUMNS)
    assert [{key: float(text) if text else None for key, text in row.items()} for row in table] == rows


def test_what_was_not_measured_is_empty_and_null(tmp_path):
    metrics.write(tmp_path, make_rows(1))
    assert (tmp_path / metrics.CSV).read_text().splitlines()[1] == "1,10,2.0,0.001,60.0,23.5,,,,"
    assert (tmp_path / metrics.LINES).read_text().endswith('"clean_aacc": null, "clean_miou": null, '
                                                           '"robust_aacc": null, "robust_miou": null}\n')  # fmt: skip


def test_a_number_that_json_lacks_is_refused(tmp_path):
    rows = make_rows(1)
    rows[0]["loss"] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        metrics.write(tmp_path, rows)


def test_the_board_shows_each_epoch_once_and_scores_where_they_were_measured(tmp_path):
    rows = make_rows(5)
    for done in range(1, 6):
        metrics.board(tmp_path, rows[:done])
        assert shown(tmp_path) == expected(rows[:done])
    assert len(event_files(tmp_path)) == 1
    assert len(shown(tmp_path)["training/loss"]) == 5
    assert [step for step, _, _ in shown(tmp_path)["held_out/robust_miou"]] == [20, 40]


def test_an_open_board_reads_on_after_each_epoch_and_after_a_continued_run(tmp_path):
    rows, again = make_rows(4), make_rows(2) + make_rows(4, shift=0.5)[2:]
    metrics.board(tmp_path, rows[:1])
    accumulator = EventAccumulator(str(tmp_path / metrics.BOARD), size_guidance={"scalars": 0})
    for state in (rows[:2], rows[:3], rows, again[:3], again):
        metrics.board(tmp_path, state)
        accumulator.Reload()
        found = {tag: points(accumulator, tag) for tag in accumulator.Tags()["scalars"]}
        assert {tag: series for tag, series in found.items() if series} == expected(state)


def test_a_board_opened_after_a_continued_run_has_nothing_of_the_undone_epochs(tmp_path):
    rows = make_rows(8)
    for done in range(1, 9):
        metrics.board(tmp_path, rows[:done])
    again = rows[:3] + make_rows(8, shift=0.5)[3:]
    metrics.board(tmp_path, again[:5])  # epochs 6 and 8 had been measured, and are undone
    assert shown(tmp_path) == expected(again[:5])
    metrics.board(tmp_path, again)
    assert shown(tmp_path) == expected(again)
    third = again[:4] + make_rows(8, every=0, shift=0.7)[4:]  # and once more
    metrics.board(tmp_path, third)
    assert shown(tmp_path) == expected(third)
    assert [path.stat().st_size > 0 for path in event_files(tmp_path)] == [False, False, True]


@pytest.mark.slow
def test_a_process_killed_at_any_byte_of_the_board_leaves_one_that_reads_and_is_completed(tmp_path):
    rows = make_rows(2)
    metrics.board(tmp_path, rows)
    (path,) = event_files(tmp_path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size % 10 == 0:  # reading takes a while
            assert set(shown(tmp_path)) <= set(metrics.TAGS.values())
        metrics.board(tmp_path, rows)
        assert path.read_bytes() == whole
    assert event_files(tmp_path) == [path]


def test_a_process_killed_between_the_new_file_and_the_emptying_of_the_old_leaves_a_right_board(tmp_path):
    rows, again = make_rows(6), make_rows(4, shift=0.5)
    metrics.board(tmp_path, rows)
    (path,) = event_files(tmp_path)
    old = path.read_bytes()
    metrics.board(tmp_path, again[:3])
    path.write_bytes(old)
    assert shown(tmp_path)["training/loss"] == expected(again[:3])["training/loss"]
    metrics.board(tmp_path, again)
    assert shown(tmp_path) == expected(again)
    assert path.read_bytes() == b""


def test_files_of_others_in_the_folder_of_the_board_stay(tmp_path):
    folder = tmp_path / metrics.BOARD
    folder.mkdir()
    names = ["notes.txt", "events.out.tfevents.1700000000.host.1.0", "events.out.tfevents.0000000001.segbench.bak"]
    for name in names:
        (folder / name).write_text("mine")
    metrics.board(tmp_path, make_rows(3))
    metrics.board(tmp_path, make_rows(2, shift=0.5))
    assert [(folder / name).read_text() for name in names] == ["mine"] * 3


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The curves of 40 epochs, 8 of which were measured: SVG and PNG."""
    return curves.draw(tmp_path_factory.mktemp("run"), make_rows(40, every=5), HOSTILE)


def texts(path):
    return ["".join(node.itertext()) for node in ElementTree.parse(path).iter() if node.tag.endswith("}text")]


def labels(path):
    """What the dots of a drawing say to a screen reader."""
    found = [node.get("aria-label", "") for node in ElementTree.parse(path).iter()]
    return [label for label in found if label.startswith("epoch: ")]


@pytest.mark.slow
def test_curves_are_a_picture_and_a_drawing_of_one_size(drawn):
    svg, png = drawn
    assert (svg.name, png.name) == ("curves.svg", "curves.png")
    root = ElementTree.parse(svg).getroot()
    with Image.open(png) as picture:
        assert picture.format == "PNG"
        assert picture.size == (2 * int(root.get("width")), 2 * int(root.get("height")))
        pixels = picture.convert("RGB")
        assert pixels.getpixel((0, 0)) == (255, 255, 255)
        colours = {colour for _, colour in pixels.getcolors(1 << 20)}
    for colour in (curves.INK, curves.RATE, curves.CLEAN, curves.ROBUST):
        assert tuple(bytes.fromhex(colour[1:])) in colours


def test_curves_name_their_axes_and_lines(drawn):
    shown = texts(drawn[0])
    for text in ("training loss", "learning rate", "score on held-out images (%)", "loss"):
        assert text in shown
    assert shown.count("epoch") == 2
    assert [text for text in shown if text.startswith(("clean ", "robust "))] == [
        "clean mIoU", "clean aAcc", "robust mIoU", "robust aAcc",
    ]  # fmt: skip


def test_curves_have_a_dot_for_each_number_with_scores_in_percent(drawn):
    found = {}
    for label in labels(drawn[0]):
        if match := re.fullmatch(r"epoch: (\d+); score on held-out images \(%\): ([\d.]+); series: (\S+ \S+)", label):
            found[match[3], int(match[1])] = float(match[2])
    assert found == {
        (curves.SERIES[column][0], row["epoch"]): pytest.approx(100 * row[column])
        for row in make_rows(40, every=5)
        for column in SCORES
        if row[column] is not None
    }
    assert sum(": loss" in label for label in labels(drawn[0])) >= 40


def test_a_hostile_title_is_only_text(drawn):
    root = ElementTree.parse(drawn[0]).getroot()
    assert {node.tag.rpartition("}")[2] for node in root.iter()} <= {
        "svg",
        "g",
        "path",
        "rect",
        "line",
        "text",
        "tspan",
    }
    attributes = {name.rpartition("}")[2] for node in root.iter() for name in node.attrib}
    assert not [name for name in attributes if name.startswith("on") or name in ("href", "style", "src")]
    text = " ".join(texts(drawn[0]))
    assert 'a</text><script>alert("1")</script><image href="http://x.org/"/>&lt;' in text
    assert '{"expr": "1"} ]]>' in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epochs", "every", "dots"),
    [(1, 1, {"loss": 1, "learning rate": 1, "clean mIoU": 1}), (3, 0, {"loss": 3}), (1000, 1, {})],
    ids=["one epoch", "no scores", "many epochs"],
)
def test_curves_of_short_long_and_unmeasured_runs(tmp_path, epochs, every, dots):
    rows = make_rows(epochs, every)
    rows[-1]["learning_rate"] = 0.0  # as the schedule ends
    svg, png = curves.draw(tmp_path, rows, "A run of " + 20 * "many words ")
    with Image.open(png) as picture:
        picture.load()
        assert picture.width < 2400
    assert ("score on held-out images (%)" in texts(svg)) == bool(every)
    for name, number in dots.items():
        points = [label for label in labels(svg) if label.endswith((f"line: {name}", f"series: {name}"))]
        assert len(set(points)) == number
    numbers = [float(text) for text in texts(svg) if re.fullmatch(r"[\d.]+", text)]
    assert max(numbers) == max(epochs, 100 if every else 0)
    assert (tmp_path / "curves.svg").stat().st_size < 200_000


@pytest.mark.slow
def test_without_the_libraries_training_goes_on_and_the_note_says_what_to_install(tmp_path):
    code = """
import json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from segbench.training import curves, metrics
folder, rows = Path(sys.argv[2]), json.loads(sys.argv[3])
metrics.write(folder, rows)
metrics.board(folder, rows)
print(curves.draw(folder, rows, "title"))
print(curves.NOTE)
"""
    for number, missing in enumerate(("altair tensorboard", "vl_convert tensorboard")):
        folder = tmp_path / str(number)
        command = [sys.executable, "-c", code, missing, str(folder), json.dumps(make_rows(2))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        nothing, note = done.stdout.splitlines()
        assert nothing == "None"
        assert note.endswith("pip install 'segbench[train]'")
        assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "metrics.jsonl"]


def test_a_tensorboard_that_does_not_fit_its_libraries_is_as_good_as_none(tmp_path, monkeypatch):
    broken = tmp_path / "libraries" / "tensorboard"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise TypeError('Descriptors cannot be created directly.')")
    for name in [name for name in sys.modules if re.match(r"tensorboard\b|torch\.utils\.tensorboard\b", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(broken.parent)
    metrics.board(tmp_path, make_rows(2))
    assert not (tmp_path / metrics.BOARD).exists()
