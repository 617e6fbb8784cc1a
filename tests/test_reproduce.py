"""Images of an entry attacked again: the same machine finds the same counts; other models and counts are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import segbench
from segbench import entries, evidence, schemas
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir.store import Store
from segbench.engine.studies.reproduce import reproduce
from segbench.entries import additions
from segbench.errors import DataError, ModelError, PreemptedError, UsageError
from segbench.evidence import Evidence, Group
from segbench.files import sha256_bytes
from tests.runs import ENVIRONMENT
from tests.runs import run as evaluate_shortly

MODEL, OTHER = "at_convnext_mini_shapes", "clean_convnext_mini_shapes"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """The entry of a short run on six images."""
    out = tmp_path_factory.mktemp("short") / "run"
    done = segbench.evaluate(MODEL, eps=[4, 8], limit=6, iterations=2, out=out, device="cpu", progress=False)
    return done.entry_path


@pytest.fixture
def entry(evaluated, tmp_path, monkeypatch) -> Path:
    """A copy that a test may change; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "entries" / evaluated.name
    path.parent.mkdir()
    path.write_bytes(evaluated.read_bytes())
    path.with_suffix(".parquet").write_bytes(evaluated.with_suffix(".parquet").read_bytes())
    return path


def run(path, **options):
    return reproduce(path, **{"sample": 3, "seed": 7, "options": RunOptions("cpu", progress=False)} | options)


@pytest.mark.slow
def test_the_same_machine_finds_the_same_counts(entry):
    done = run(entry, by="somebody")
    assert done.path.parent == additions.folder_of(entry, "reproduced")
    assert entries.validate_addition(done.path) == []
    record = done.record
    assert record["agrees"]
    assert [row["largest"] for row in record["comparison"]] == [0.0] * 7
    assert {(row["strength"], row["attack"]) for row in record["comparison"]} == {
        (0.0, "clean"), *((eps, loss) for eps in (4.0, 8.0) for loss in ("mce_bal", "mce", "js")),
    }  # fmt: skip
    stored = entries.evidence_of(entry, entries.read_entry(entry))
    found = evidence.from_bytes(done.path.with_suffix(".parquet").read_bytes(), source="f")
    ids = additions.sample_ids(stored.groups[evidence.CLEAN].image_ids, 3, 7)
    for key, group in found.groups.items():
        rows = [stored.groups[key].image_ids.index(image_id) for image_id in ids]
        assert group.image_ids == ids
        for mine, theirs in zip(group.counts, stored.groups[key].counts.take(np.array(rows)), strict=True):
            assert np.array_equal(mine, theirs)


@pytest.mark.slow
def test_sigterm_during_the_last_units_leaves_a_record_that_is_complete(entry, monkeypatch):
    """Else the same command would draw other images, and attack them all."""
    add, signalled = Store.add, []

    def terminated(store, done):
        add(store, done)
        if done.unit.strength == 8 and not signalled:
            signalled.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(Store, "add", terminated)
    with pytest.raises(PreemptedError, match=r"reproduction is complete, its record is .*_seed_7\.json\.") as caught:
        run(entry, radii=[8], sample=1)
    assert entries.validate_addition(caught.value.result.path) == []
    assert caught.value.result.record["agrees"]


@pytest.mark.slow
def test_chosen_radii_and_more_images_than_there_are(entry):
    record = run(entry, radii=["8/255"], sample=100).record
    assert record["strengths"] == [8.0]
    assert record["images"] == 6
    assert {row["strength"] for row in record["comparison"]} == {0.0, 8.0}
    assert record["by"] is None
    document = entries.read_entry(entry)
    document["claim"]["submitter"] = "alice"
    assert additions.tier(document, [record]) == "checked"  # nobody is named
    assert additions.tier(document, [{**record, "by": "somebody"}]) == "reproduced"


@pytest.mark.slow
def test_forged_counts_are_told(entry, cli, capsys):
    """Half of each image's wrong pixels are called right, consistently: every number fits the evidence."""
    document = entries.read_entry(entry)
    stored = entries.evidence_of(entry, document)

    def better(group: Group) -> Group:
        counts = group.counts
        moved = np.maximum(counts.target - counts.intersection, 0)
        # every wrong pixel is predicted as its label
        return Group(group.image_ids, type(counts)(counts.intersection + moved, counts.target.copy(), counts.target))

    groups = {key: group if key[0] == 0 or key[1] == "check" else better(group) for key, group in stored.groups.items()}
    forged = Evidence(groups, stored.metadata)
    data = evidence.to_bytes(forged)
    entry.with_suffix(".parquet").write_bytes(data)
    document |= entries.recompute(forged, seed=0, orders=8)
    document["flags"] = entries.reliability(forged, document)
    document["evidence"]["sha256"] = sha256_bytes(data)
    entry.write_text(schemas.dump(document))
    assert entries.validate_entry(entry, published=False) == []  # no check of the numbers alone can see it
    code, out, err = cli("reproduce", str(entry), "--sample", "3", "--seed", "7", "--device", "cpu", "--quiet")
    assert code == 1
    assert "DIFFERS" in out
    assert "was not reproduced within the tolerance" in err
    (record,) = additions.folder_of(entry, "reproduced").glob("*.json")
    assert entries.validate_addition(record) == []
    assert json.loads(record.read_text())["agrees"] is False


def test_another_model_is_told_before_the_attack(entry):
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"not the model of the entry: its weights have the hash .* with --model"):
        run(entry, model=OTHER)
    assert not Path("runs").exists()
    assert time.monotonic() - started < 60


def test_other_data_are_told(entry):
    document = json.loads(entry.read_text())
    document["dataset"]["images"] = 5  # consistent with no data here
    entry.write_text(schemas.dump(document))
    with pytest.raises(Exception, match=r"dataset\.images is 5"):
        run(entry)
    document["dataset"]["images"] = 6
    document["dataset"]["fingerprint"] = "0" * 64
    found = evidence.from_bytes(entry.with_suffix(".parquet").read_bytes(), source="f")
    identity = {**found.metadata["identity"], "fingerprint": "0" * 64}
    data = evidence.to_bytes(Evidence(found.groups, {**found.metadata, "identity": identity}))
    entry.with_suffix(".parquet").write_bytes(data)
    document["evidence"]["sha256"] = sha256_bytes(data)
    entry.write_text(schemas.dump(document))
    with pytest.raises(DataError, match="are not those of the entry"):
        run(entry)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sample": 0}, "at least 1 image"),
        ({"radii": [12]}, "no result at ε = 12/255; it has 4, 8"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"by": "a\nb"}, "not a name of 1 to 200 printable characters"),
    ],
)
def test_bad_options_are_told(entry, options, said):
    with pytest.raises(UsageError, match=said):
        run(entry, **options)


def test_a_reported_entry_cannot_be_reproduced(cli):
    code, _, err = cli("reproduce", "pirat_convnext_t_voc")
    assert code == 1
    assert "has no evidence: its numbers are reported" in err


def test_verify_shows_both_values_and_names_what_differs(entry, cli):
    code, out, err = cli("verify", str(entry))
    assert code == 0
    assert "ε = 8/255 miou_lower_bound" in out
    assert "values recomputed from the counts of 6 images: all agree" in err
    assert cli("verify", "pirat_convnext_t_voc")[0] == 1
    document = json.loads(entry.read_text())
    document["results"][1]["miou"] -= 0.001
    entry.write_text(schemas.dump(document))
    code, out, err = cli("verify", str(entry))
    assert code == 1
    assert next(line for line in out.splitlines() if "differs" in line).split()[:4] == ["ε", "=", "8/255", "miou"]
    found = json.loads(cli("verify", str(entry), "--json")[1])
    assert found["agrees"] is False
    assert [each["field"] for each in found["values"] if not each["agrees"]] == ["results.1.miou"]


@pytest.mark.slow
def test_a_killed_reproduction_goes_on_with_the_same_images(tmp_path):
    """At one radius, with so many iterations that there is time to kill it between two units."""
    entry = evaluate_shortly(tmp_path / "run", eps=12, limit=6, iterations=60).entry_path
    command = [
        sys.executable, "-m", "segbench", "reproduce", str(entry), "--sample", "6", "--out", "record",
        "--device", "cpu", "--quiet",
    ]  # fmt: skip
    environment = ENVIRONMENT
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/units/eps12_*.parquet")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until, "no unit was written"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (folder,) = (tmp_path / "runs").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "units").iterdir()}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "an unfinished reproduction goes on" in done.stderr
    assert list((tmp_path / "runs").iterdir()) == [folder]
    assert {
        path.name: path.stat().st_mtime_ns for path in (folder / "units").iterdir() if path.name in before
    } == before
    (record,) = (tmp_path / "record").glob("*.json")
    assert f"seed{json.loads(record.read_text())['seed']}" in folder.name


@pytest.mark.slow
def test_counts_moved_between_classes_are_told(entry, cli):
    """Every image keeps its accuracy; right pixels of one class become those of another: only mIoU can see it."""
    document = entries.read_entry(entry)
    stored = entries.evidence_of(entry, document)

    def moved(group: Group) -> Group:
        counts = group.counts
        intersection = counts.intersection.copy()
        predicted = counts.predicted.copy()
        for row in range(len(intersection)):
            right = int(intersection[row].sum())
            for column in np.argsort(counts.target[row]):  # small classes first, they weigh most
                intersection[row, column] = min(right, counts.target[row, column])
                right -= intersection[row, column]
            left = counts.target[row].sum() - intersection[row].sum()
            predicted[row] = intersection[row]
            predicted[row, np.argmax(counts.target[row])] += left
        return Group(group.image_ids, type(counts)(intersection, predicted, counts.target))

    groups = {
        key: moved(group) if key[1] in ("mce_bal", "mce", "js") else group for key, group in stored.groups.items()
    }
    forged = Evidence(groups, stored.metadata)
    data = evidence.to_bytes(forged)
    entry.with_suffix(".parquet").write_bytes(data)
    document |= entries.recompute(forged, seed=0, orders=8)
    document["flags"] = entries.reliability(forged, document)
    document["evidence"]["sha256"] = sha256_bytes(data)
    entry.write_text(schemas.dump(document))
    assert entries.validate_entry(entry, published=False) == []
    code, out, _ = cli("reproduce", str(entry), "--sample", "6", "--seed", "7", "--device", "cpu", "--quiet", "--json")
    assert code == 1
    rows = [row for row in json.loads(out)["comparison"] if row["attack"] != "clean"]
    assert all(row["stored_aacc"] == row["found_aacc"] and row["largest"] == 0 for row in rows)
    assert not any(row["agrees"] for row in rows)
