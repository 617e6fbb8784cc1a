"""`segbench attack external`: what a comparison found beyond SEA, beside an entry and on its row."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

import segbench
from segbench import entries, evidence
from segbench.engine.launch.options import RunOptions
from segbench.engine.studies.compare import compare
from segbench.engine.studies.external import add_external
from segbench.entries import additions
from segbench.errors import ContentError, RunError
from segbench.leaderboard.assessment import assess
from tests.masked import Quantised
from tests.runs import MODEL, run

pytestmark = pytest.mark.slow

OPTIONS = {"dataset": "shapes", "eps": 8, "limit": 3, "iterations": 20}
BY = {"author": "A. Nobody", "url": "https://example.org/attacks"}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """An evaluation of a model with masked gradients, and the comparison that finds it out."""
    folder, model = tmp_path_factory.mktemp("external"), Quantised(segbench.load_model(MODEL))
    entry = segbench.evaluate(model, out=folder / "run", progress=False, **OPTIONS).entry_path
    found = compare(model, ["mce", "square"], out=folder / "comparison", options=RunOptions(progress=False), **OPTIONS)
    return entry, found


@pytest.fixture
def entry_path(masked, tmp_path):
    for file in (masked[0], masked[0].with_suffix(".parquet")):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / masked[0].name


def test_the_row_of_the_entry_has_the_best_known_score_and_its_warning(masked, entry_path):
    path = add_external(masked[1].path, entry_path, **BY)
    assert path.parent.name == f"{entry_path.stem}.external"
    document = additions.read_addition(path)
    assert "20 iterations, seed 225: square" in document["description"]
    assert document["author"] == "A. Nobody"
    stored = evidence.from_bytes(path.with_suffix(".parquet").read_bytes(), source="external")
    assert list(stored.groups) == [(8.0, "square")]  # mce is the entry's own
    entry, assessment = assess(entry_path)
    (result,), (known,) = entry["results"], assessment.best_known
    row = next(row for row in masked[1].rows if row["attack"] == "square")
    assert known["by"] == ["sea_plus"]
    assert known["aacc"] <= row["aacc"] < result["aacc"]
    assert additions.overestimates(result, known, "sea-v1")
    assert entries.read_entry(entry_path) == entries.read_entry(masked[0])


def test_a_comparison_of_another_model_is_refused(masked, entry_path, tmp_path):
    other = compare(
        "at_convnext_mini_shapes", ["square"], out=tmp_path / "other", options=RunOptions(progress=False), **OPTIONS
    )
    with pytest.raises(ContentError, match="with other weights than the entry's"):
        add_external(other.path, entry_path, **BY)
    assert not additions.folder_of(entry_path, additions.EXTERNAL).exists()


def test_other_images_of_the_same_ids_and_labels_are_refused(entry_path, tmp_path):
    data = segbench.load_dataset("shapes")
    brighter = dataclasses.replace(data, read=lambda image_id: _brighter(*data.read(image_id)), files=None)
    model = Quantised(segbench.load_model(MODEL))
    found = compare(
        model, ["square"], out=tmp_path / "run", options=RunOptions(progress=False), **OPTIONS | {"dataset": brighter}
    )
    with pytest.raises(ContentError, match="attacks other images than the entry's"):
        add_external(found.path, entry_path, **BY)


def _brighter(pixels, labels):
    return np.minimum(pixels.astype(np.int64) + 60, 255).astype(np.uint8), labels


def test_more_iterations_of_the_entrys_own_losses_are_something_new(entry_path, tmp_path):
    model = Quantised(segbench.load_model(MODEL))
    found = compare(
        model, ["mce"], out=tmp_path / "run", seed=7, options=RunOptions(progress=False), **OPTIONS | {"iterations": 30}
    )
    path = add_external(found.path, entry_path, **BY)
    stored = evidence.from_bytes(path.with_suffix(".parquet").read_bytes(), source="external")
    assert list(stored.groups) == [(8.0, "mce_30_seed7")]
    assert "30 iterations, seed 7" in additions.read_addition(path)["description"]


def test_what_somebody_else_has_written_stays(masked, entry_path):
    path = add_external(masked[1].path, entry_path, **BY)
    before = path.read_bytes()
    with pytest.raises(ContentError, match=r"is there already, of A\. Nobody\. Give another --name"):
        add_external(masked[1].path, entry_path, **BY | {"author": "B"})
    assert path.read_bytes() == before
    assert add_external(masked[1].path, entry_path, name="mine", **BY).exists()


def test_what_is_no_comparison_or_has_nothing_to_add_is_told(masked, entry_path, tmp_path, cli):
    with pytest.raises(RunError, match=r"not a finished comparison\. Make one: segbench attack compare"):
        add_external(run(tmp_path / "evaluation", eps=8, limit=2).path, entry_path, **BY)
    found = compare(
        Quantised(segbench.load_model(MODEL)),
        ["mce"],
        out=tmp_path / "own",
        options=RunOptions(progress=False),
        **OPTIONS,
    )
    with pytest.raises(ContentError, match="no attack beyond the entry's own"):
        add_external(found.path, entry_path, **BY)
    code, _, err = cli("attack", "external", str(tmp_path / "nothing"), "--entry", str(entry_path), "--author", "A",
                       "--url", "https://example.org/")  # fmt: skip
    assert code == 1
    assert "is not a usable run directory" in err


def test_the_command_tells_where_it_lies(masked, entry_path, cli):
    options = ["--entry", str(entry_path), "--author", "A. Nobody", "--url", "https://example.org/attacks"]
    code, _, err = cli("attack", "external", str(masked[1].path), *options)
    assert code == 0, err
    assert "sea_plus.json" in err
    code, _, err = cli("attack", "external", str(masked[1].path), "--name", "c", "--author", "\x1b[31mA", *options[:2],
                       *options[4:])  # fmt: skip
    assert code == 1
    assert "a name without control characters" in err
    code, _, err = cli("attack", "external", str(masked[1].path), "--name", "b", *options[:-1], "http://example.org")
    assert code == 1
    assert "url" in err
