"""`segbench attack targeted`: how much of an image is drawn to a class, from ordinary evidence."""

from __future__ import annotations

import json

import numpy as np
import pytest

import segbench
from segbench import evidence
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir.store import Store
from segbench.engine.studies.targeted import targeted
from segbench.errors import ShardDoneError, UsageError
from tests.runs import MODEL

pytestmark = pytest.mark.slow

QUIET = RunOptions(progress=False)
SHORT = {"eps": [4, 16], "limit": 4, "iterations": 20}


def found_by(out, targets=("disc", 0), options=QUIET, **changes):
    return targeted(MODEL, targets, out=out, options=options, **(SHORT | changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return found_by(tmp_path_factory.mktemp("targeted") / "run")


def test_more_of_an_image_is_drawn_to_its_class_at_a_larger_radius(small):
    names = segbench.load_dataset("shapes").class_names
    for target in (names.index("disc"), 0):
        rows = [row for row in small.rows if row["target"] == target]
        assert [(row["class"], row["eps_255"]) for row in rows] == [(names[target], eps) for eps in (0, 4, 16)]
        shares = [row["success"] for row in rows]
        assert shares[0] < shares[1] < shares[2]
        assert shares[2] > shares[0] + 0.1
        for row in rows:
            assert row["success_95"][0] <= row["success"] <= row["success_95"][1]
            assert 0 <= row["whole"] <= 1


def test_success_is_the_share_of_pixels_that_the_evidence_counts(small):
    groups = evidence.from_bytes((small.path / "targeted.parquet").read_bytes(), source="targeted").groups
    counts = groups[16, "js_target_0"].counts
    (row,) = (row for row in small.rows if (row["target"], row["eps_255"]) == (0, 16))
    assert row["success"] == counts.predicted[:, 0].sum() / counts.target.sum()
    shares = counts.predicted[:, 0] / counts.target.sum(axis=1)
    assert row["whole"] == np.mean(shares >= 0.99)


def test_more_classes_and_radii_are_added_and_nothing_is_done_twice(small):
    before = [record["unit"] for record in map(json.loads, (small.path / "log.jsonl").read_text().splitlines())]
    found_by(small.path, targets=["disc", "star"], eps=[4])
    after = [record["unit"] for record in map(json.loads, (small.path / "log.jsonl").read_text().splitlines())]
    number = segbench.load_dataset("shapes").class_names.index("star")
    assert after == [*before, f"eps4_js_target_{number}_0000"]
    assert len(Store.open(small.path).manifest["protocol"]["losses"]) == 3
    command = Store.open(small.path).manifest["environment"]["command"]
    assert command.startswith("segbench attack targeted --target 1 0 --model ")


def test_shards_give_the_same_bytes(tmp_path):
    options = {"targets": [0], "limit": 3, "iterations": 3}
    whole = found_by(tmp_path / "whole", **options)
    with pytest.raises(ShardDoneError, match="the same command without --shard"):
        found_by(tmp_path / "run", options=RunOptions(progress=False, shard="2/2"), **options)
    parts = found_by(tmp_path / "run", options=RunOptions(progress=False, shard="1/2"), **options)
    assert (whole.path / "targeted.parquet").read_bytes() == (parts.path / "targeted.parquet").read_bytes()


def test_an_unknown_class_is_told_with_those_there_are(tmp_path):
    with pytest.raises(UsageError, match=r"Unknown class 'dics'.*disc"):
        found_by(tmp_path / "run", targets=["dics"])
    with pytest.raises(UsageError, match="Unknown class '99'"):
        found_by(tmp_path / "run", targets=[99])
    with pytest.raises(UsageError, match=r"Which class\?.*--target.*disc"):
        found_by(tmp_path / "run", targets=[])
    assert not (tmp_path / "run").exists()


def test_the_command_prints_the_table(cli):
    options = ["--model", MODEL, "--eps", "4", "--limit", "2", "--iterations", "2", "--quiet", "--out", "run"]
    code, out, err = cli("attack", "targeted", *options, "--target", "disc", "0")
    assert code == 0, err
    assert [line.split()[:2] for line in out.splitlines() if "clean" in line or "/255" in line][-4:] == [
        ["disc", "clean"], ["disc", "4/255"], ["background", "clean"], ["background", "4/255"],
    ]  # fmt: skip
    assert "targeted.json" in err
    code, out, _ = cli("attack", "targeted", *options, "--target", "disc", "--json")
    assert code == 0
    assert [row["class"] for row in json.loads(out)["rows"]] == ["disc", "disc"]
    code, out, err = cli("attack", "targeted", *options)
    assert code == 2
    assert "--target" in err
