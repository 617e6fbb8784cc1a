"""`segbench report` and `attack show`: the numbers are the entry's, the pictures the run's, and all is in one file."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import segbench
from segbench import counts
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir.store import Store
from segbench.engine.studies import attacked
from segbench.engine.studies.attacked import PictureKey, attack_again, reopen_run
from segbench.engine.studies.compare import compare
from segbench.engine.studies.minimum import minimum
from segbench.engine.studies.targeted import targeted
from segbench.errors import RunError, UsageError
from segbench.reporting import charts
from segbench.reporting.analysis import extremes, middle, views
from segbench.reporting.figures import picture
from segbench.reporting.gallery import Pictures
from segbench.reporting.panels import Row, panel
from segbench.reporting.report import make, page
from segbench.reporting.runs import read_runs
from segbench.reporting.strata import strata
from tests.runs import MODEL, run

pytestmark = pytest.mark.slow

QUIET = RunOptions(progress=False, shard="1/1")
OTHER = "at_convnext_mini_shapes"


def pictures(**changes):
    return dataclasses.replace(Pictures(1, (), None, None, QUIET), **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One run of each kind, of one model."""
    root = tmp_path_factory.mktemp("runs")
    options = {"limit": 4, "iterations": 3, "options": QUIET}
    return {
        "evaluation": run(root / "evaluation").path,
        "comparison": compare(
            MODEL, ["mce", "square"], eps=[4, 8], out=root / "comparison", sources=[OTHER], **options
        ).path,
        "targeted": targeted(MODEL, ["disc"], eps=8, out=root / "targeted", **options).path,
        "minimum": minimum(MODEL, ["mce"], share=0.5, resolution=4, out=root / "minimum", **options).path,
    }


@pytest.fixture(scope="module")
def report(folders):
    return make(read_runs(list(folders.values())), pictures())


def test_the_numbers_are_those_of_the_entry(report, reference):
    entry = reference.entry()
    clean, *attacked_views = report.views
    assert (clean.aacc, clean.miou) == (entry["clean"]["aacc"], entry["clean"]["miou"])
    for view, row in zip(attacked_views, entry["results"], strict=True):
        assert (view.strength, view.aacc, view.miou) == (row["strength"], row["aacc"], row["miou"])
        assert view.bound == row["miou_lower_bound"]
        assert [list(view.aacc_95), list(view.miou_95)] == [row["interval"]["aacc"], row["interval"]["miou"]]
        for loss, scores in row["per_loss"].items():
            assert view.won(view.aacc_choice)[loss] == scores["won_aacc"]
            assert view.won(view.miou_choice)[loss] == scores["won_miou"]


@given(st.integers(0, 2**32 - 1))
def test_strata_are_what_counting_the_masks_finds(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(5, (3, 20, 30), p=[0.7, 0.2, 0.085, 0.01, 0.005])
    labels[rng.random(labels.shape) < 0.1] = 255
    predictions = np.where(rng.random(labels.shape) < 0.5, np.where(labels == 255, 0, labels), rng.integers(0, 5))
    found = strata(counts.count(predictions, labels, 5))
    sums = np.zeros((3, 4), np.int64)  # segments, right, labelled, union
    for image, seen in zip(labels, predictions, strict=True):
        valid = image != 255
        for number in np.unique(image[valid]):
            share = (image == number).sum() / valid.sum()
            row = 0 if share < 0.01 else 1 if share < 0.1 else 2
            both = ((image == number) | (seen == number)) & valid
            right = ((image == number) & (seen == number)).sum()
            sums[row] += [1, right, (image == number).sum(), both.sum()]
    assert [each.segments for each in found] == sums[:, 0].tolist()
    for each, (number, right, pixels, union) in zip(found, sums, strict=True):
        assert (each.aacc, each.iou) == ((right / pixels, right / union) if number else (None, None))


def test_worst_class_and_images_at_zero(report):
    for view in report.views:
        numbers, value = view.worst_classes()
        iou = view.miou_counts.iou()
        assert numbers == np.flatnonzero(iou == value).tolist()
        assert value == np.nanmin(iou[view.miou_counts.target.sum(axis=0) > 0])
        assert view.at_zero == (view.aacc_counts.correct == 0).mean()


def test_images_are_chosen_by_their_right_pixels_and_none_twice(report):
    view = middle(list(report.views))
    best, worst = extremes(view, 2)
    accuracy = view.accuracy
    assert worst == np.argsort(accuracy, kind="stable")[:2].tolist()
    assert accuracy[best[0]] == accuracy.max()
    for number in (1, 3, 50):
        best, worst = extremes(view, number)
        assert not set(best) & set(worst)
        assert len(best) + len(worst) == min(2 * number, len(accuracy))


def test_attacked_again_an_image_is_what_the_evidence_counted(folders):
    """Bit for bit on the same machine: no pixel more or fewer is right."""
    material = read_runs([folders["evaluation"]])
    main, found = material.main, views(material.main)
    wanted = [PictureKey(row, 8.0, loss) for row in range(5) for loss in ("mce_bal", "mce", "js")]
    with reopen_run(Store(main.path, main.manifest), None, None, QUIET) as ready:
        data = ready.worker.dataset
        seen = attack_again(ready, wanted)
        for each in wanted:
            sample = data[each.row]
            change = np.abs(seen[each].image - sample.image.numpy()).max()
            assert 0 < change <= 8 / 255 + 1e-6
            again = counts.count(seen[each].predictions[None].astype(np.int64), sample.label[None].numpy(), 8)
            stored = main.groups[8.0, each.attack].counts
            assert (again.intersection[0] == stored.intersection[each.row]).all()
    assert len(found) == 3


def test_a_comparison_alone_has_its_pictures_too(folders):
    made = make(read_runs([folders["comparison"]]), pictures())
    pixels = made.views[0].aacc_counts.target.sum(axis=0)
    known = (pixels > 0) & (made.views[0].aacc_counts.predicted.sum(axis=0) > 0)
    rarest = int(np.argmin(np.where(known, pixels, pixels.max() + 1)))
    names = [each.name for each in made.figures["pictures"]]
    assert names == ["best_1", "worst_1", f"target_{pixels.argmax()}", f"target_{rarest}"]
    assert made.remarks == []
    assert set(made.views[1].attacks) == {"clean", "mce", "square"}  # none that was made on another model


def test_what_was_attacked_is_kept_and_what_is_damaged_is_made_again(folders, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(folders["evaluation"], copy)
    shutil.rmtree(copy / "pictures", ignore_errors=True)
    first = make(read_runs([copy]), pictures())
    kept = {file: file.read_bytes() for file in (copy / "pictures").iterdir()}
    made = []
    real = attacked._attack_first
    monkeypatch.setattr(attacked, "_attack_first", lambda *given: made.extend(given[1]) or real(*given))
    again = make(read_runs([copy]), pictures())
    assert made == []
    assert [each.png for each in again.all_figures()] == [each.png for each in first.all_figures()]
    one, other, *_ = sorted(kept)
    one.write_bytes(kept[one][:100])
    with np.load(io.BytesIO(kept[other])) as archive:
        wrong = archive["image"] + 0.5
        np.savez_compressed(other.with_suffix(""), image=wrong, predictions=archive["predictions"])
    assert [each.png for each in make(read_runs([copy]), pictures()).all_figures()] == [
        each.png for each in first.all_figures()
    ]
    assert len(made) == 2


def test_another_device_that_finds_something_else_is_told(folders, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folders["evaluation"], copy)
    make(read_runs([copy]), pictures())
    for file in (copy / "pictures").iterdir():
        if "_clean_" in file.name:
            with np.load(file) as archive:
                np.savez_compressed(
                    file.with_suffix(""), image=archive["image"], predictions=(archive["predictions"] + 1) % 8
                )
    made = make(read_runs([copy]), pictures())
    assert len(made.remarks) == 2
    assert all("under clean at 0/255 has" in text for text in made.remarks)
    assert "more or fewer right pixels than in the run" in page(made).decode()


def test_the_page_is_one_file_with_every_section(report):
    text = page(report).decode()
    assert re.findall(r'(?:src|href)="(?!data:|#)', text) == []
    anchors = re.findall(r'href="#([^"]+)"', text)
    assert anchors == ["numbers", "other-attacks", "targeted-section", "minimum-section", "pictures"]
    assert all(text.count(f'id="{anchor}"') == 1 for anchor in anchors)
    assert "<script" not in text
    names = {each.name for each in report.all_figures()}
    assert names >= {"curve", "classes", "attacks", "sizes", "images", "comparison", "targeted", "minimum", "best_1"}
    for name in names:
        assert text.count(f'id="{name}"') == 1
    for view in report.views:
        assert f"{100 * view.aacc:.1f}" in text
    assert f"mce from {OTHER}" in text
    assert "5 of 32 images of val" in text
    assert "Not official: 4 iterations instead of 300; 5 of 32 images;" in text
    for uri in re.findall(r'src="data:image/png;base64,([^"]+)"', text):
        assert Image.open(io.BytesIO(base64.b64decode(uri))).width > 500


def test_words_of_strangers_are_only_words(report):
    hostile = "<script>alert(1)</script> & \"'"
    about = report.material.first
    manifest = {**about.manifest, "model": {**about.manifest["model"], "title": hostile}}
    material = dataclasses.replace(report.material, main=None, runs=[dataclasses.replace(about, manifest=manifest)])
    figures = {"scores": charts.of_views(report.views, [hostile] * 8), "comparison": [], "sweep": [], "targeted": [],
               "minimum": []}  # fmt: skip
    documents = {"comparison": [], "entry": report.material.documents["entry"]}
    made = dataclasses.replace(
        report, material=dataclasses.replace(material, documents=documents), names=[hostile] * 8, figures=figures
    )
    text = page(made).decode()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    for figure in figures["scores"]:
        assert b"<script" not in figure.svg
    image = picture("x", hostile, "", Image.new("RGB", (2, 2)))
    assert b"<script" not in image.svg


def test_flags_come_before_the_numbers(report):
    document = {**report.material.documents["comparison"][0]}
    document["flags"] = [{"attack": "square", "strength": 8.0, "metric": "miou", "below": 0.123}]
    material = dataclasses.replace(report.material, documents={**report.material.documents, "comparison": [document]})
    text = page(dataclasses.replace(report, material=material)).decode()
    assert "At 8/255 square, which needs no gradient of this model, is 12.3 points of mIoU below SEA" in text
    assert text.index("Read this first") < text.index('id="numbers"')


def test_a_sheet_shows_the_perturbation_and_where_it_is_wrong():
    data = segbench.load_dataset("shapes")
    clean, label = np.full((3, 64, 64), 0.5, np.float32), np.zeros((64, 64), np.int64)
    label[:8] = 255
    predictions = np.zeros((64, 64), np.uint16)
    predictions[32:] = 3
    attack = clean.copy()
    attack[:, :, 32:] += 8 / 255
    attack[:, :, :32] -= 8 / 255
    rows = [Row("clean", clean, predictions, 0.0, label), Row("8/255", attack, predictions, 8.0, label)]
    pixels = np.asarray(panel(data, "an image", "words", clean, label, rows))
    colours, numbers = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    found = {tuple(colour): int(number) for colour, number in zip(colours.tolist(), numbers.tolist(), strict=True)}
    side = 4 * 64
    assert found[200, 62, 30] == 2 * side * side // 2  # half of either picture is wrong
    assert found[214, 226, 235] == 2 * side * (side // 2 - 8 * 4)  # less what is ignored
    assert found[0, 0, 0] >= side * side // 2  # the half at -ε, and the background


def test_runs_of_others_and_unfinished_ones_are_told(folders, tmp_path):
    with pytest.raises(UsageError, match="segbench report runs/"):
        read_runs([])
    with pytest.raises(RunError, match=r"is not a run directory\. Make one: segbench evaluate"):
        read_runs([tmp_path])
    other = run(tmp_path / "other", model=OTHER, eps=8, limit=2)
    with pytest.raises(RunError, match=r"is not a run of the same model and data set as .*model: "):
        read_runs([folders["evaluation"], other.path])
    other.entry_path.unlink()
    with pytest.raises(RunError, match=r"has no .*\.json\. When all units are there: segbench merge"):
        read_runs([other.path])
    copy = tmp_path / "comparison"
    shutil.copytree(folders["comparison"], copy)
    (copy / "comparison.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="cannot be read"):
        read_runs([copy])
    (copy / "comparison.json").unlink()
    with pytest.raises(RunError, match=r"not finished\. Continue"):
        read_runs([copy])


def test_a_model_that_has_no_name_here_is_asked_for(tmp_path):
    class Mine(type(segbench.load_model(MODEL))):
        pass

    module = segbench.load_model(MODEL)
    module.__class__ = Mine
    result = segbench.evaluate(module, "shapes", eps=8, limit=2, iterations=2, out=tmp_path / "run", progress=False)
    with pytest.raises(UsageError, match=r"names its model mine.*--model.*--no-pictures"):
        make(read_runs([result.path]), pictures())
    with pytest.raises(RunError, match=rf"other settings: model: mine there, {OTHER} here"):
        make(read_runs([result.path]), pictures(model=OTHER))
    assert make(read_runs([result.path]), None).all_figures()


def test_the_commands(folders, tmp_path, cli):
    copy = tmp_path / "run"
    shutil.copytree(folders["evaluation"], copy)
    code, _, err = cli("report", str(copy), "--images", "1", "--target", "disc", "star", "--quiet")
    assert code == 0, err
    assert f"report  {copy / 'report.html'}" in err
    assert "Targeted: everything is to be star" in (copy / "report.html").read_text()
    code, out, err = cli("attack", "show", str(copy), "--no-pictures", "--quiet")
    assert code == 0, err
    files = [copy / "figures" / name for name in ("curve.png", "curve.svg", "classes.png", "images.svg")]
    assert {str(file) for file in files} <= set(out.split())
    assert Image.open(files[0]).width > 1000
    assert files[1].read_text().startswith("<svg")
    code, out, _ = cli("attack", "show", str(copy), "--no-pictures", "--format", "svg", "--out", "here")
    assert [line for line in out.split() if line.endswith(".png")] == []
    code, _, err = cli("report", str(copy), "--target", "moon", "--quiet")
    assert code == 2
    assert "Unknown class 'moon'" in err
    code, _, err = cli("report", str(tmp_path / "nothing"))
    assert code == 1
    assert "is not a run directory" in err
