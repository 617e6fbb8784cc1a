"""SIGTERM during the last units: they finish, their result is written, and the caller gets an error."""

from __future__ import annotations

import json
import os
import signal

import pytest

import segbench
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir.store import Store
from segbench.engine.rundir.trials import Trials
from segbench.engine.studies.compare import compare
from segbench.engine.studies.minimum import minimum
from segbench.engine.studies.sweep import sweep
from segbench.engine.studies.targeted import targeted
from segbench.errors import PreemptedError, ShardDoneError
from tests.runs import MODEL, run, units

OTHER = "at_convnext_mini_shapes"
ONE = {"eps": 8, "limit": 1, "iterations": 1}  # four units, one after the other
STUDY = ONE | {"options": RunOptions(progress=False)}
SEARCH = {"largest": 1, "resolution": 1, "limit": 1, "iterations": 1, "options": STUDY["options"]}


@pytest.fixture
def terminate(monkeypatch):
    """Sends SIGTERM to this process when ``method`` of ``owner`` has been called ``calls`` times."""

    def install(owner, method, calls):
        original, count = getattr(owner, method), 0

        def called(*arguments):
            nonlocal count
            found = original(*arguments)
            count += 1
            if count == calls:
                os.kill(os.getpid(), signal.SIGTERM)
            return found

        monkeypatch.setattr(owner, method, called)

    return install


def run_both(first, second):
    """A loop over models."""
    for model, out in ((MODEL, first), (OTHER, second)):
        run(out, model=model, **ONE)


@pytest.mark.slow
def test_a_loop_over_models_stops_when_the_first_result_is_written(tmp_path, terminate):
    whole = run(tmp_path / "whole", **ONE)
    terminate(Store, "add", 4)
    with pytest.raises(PreemptedError, match=r"this run is complete, its result is .*stopped/\w+\.json\.") as caught:
        run_both(tmp_path / "stopped", tmp_path / "next")
    result = caught.value.result
    assert result.evidence_path.read_bytes() == whole.evidence_path.read_bytes()
    assert result.entry() == json.loads(result.entry_path.read_text())
    assert result.entry()["results"] == whole.entry()["results"]
    assert units(result.path) == units(whole.path)
    assert json.loads((result.path / "workers" / "1-of-1.json").read_text())["state"] == "done"
    assert not (tmp_path / "next").exists()
    assert caught.value.exit_code == 3
    again = run(tmp_path / "stopped", **ONE)  # there is nothing left, and nobody asks to stop
    assert again.entry()["results"] == whole.entry()["results"]


def test_units_that_are_left_are_no_result(tmp_path, terminate):
    terminate(Store, "add", 1)
    with pytest.raises(PreemptedError, match="are left") as caught:
        run(tmp_path / "run")
    assert caught.value.result is None
    assert not list((tmp_path / "run").glob("*.parquet"))


@pytest.mark.slow
def test_the_command_names_the_result_and_does_not_begin_the_next_model(cli, tmp_path, terminate):
    terminate(Store, "add", 4)
    options = ["--limit", "1", "--iterations", "1", "--eps", "8", "--quiet", "--out", "many"]
    code, out, err = cli("evaluate", "--model", MODEL, OTHER, *options)
    assert (code, out) == (3, "")
    assert f"many/{MODEL}/{MODEL}.json. If more was to follow, run the same command again." in err
    assert [each.name for each in (tmp_path / "many").iterdir()] == [MODEL]
    code, _, err = cli("evaluate", "--model", MODEL, OTHER, *options)
    assert code == 0, err
    assert (tmp_path / "many" / OTHER / f"{OTHER}.json").exists()


@pytest.mark.parametrize(
    ("study", "owner", "method", "calls", "file"),
    [
        (lambda out: compare(MODEL, ["mce"], out=out, **STUDY), Store, "add", 2, "comparison.json"),
        (lambda out: targeted(MODEL, ["disc"], out=out, **STUDY), Store, "add", 2, "targeted.json"),
        (lambda out: minimum(MODEL, ["mce"], **SEARCH, out=out), Trials, "add", 1, "minimum.json"),
    ],
    ids=["compare", "targeted", "minimum"],
)  # fmt: skip
def test_a_study_is_written_too(tmp_path, terminate, study, owner, method, calls, file):
    terminate(owner, method, calls)
    with pytest.raises(PreemptedError, match=rf"this run is complete, its result is .*{file}") as caught:
        study(tmp_path / "run")
    assert caught.value.result.document() == json.loads((tmp_path / "run" / file).read_text())
    assert study(tmp_path / "run").document() == caught.value.result.document()


def test_no_radius_is_tried_after_sigterm_during_the_clean_images(tmp_path, terminate):
    terminate(Store, "add", 1)
    with pytest.raises(PreemptedError, match="1 of 1 images are left"):
        minimum(MODEL, ["mce"], **SEARCH, out=tmp_path)
    assert len(units(tmp_path)) == 1
    assert not (tmp_path / "tried.jsonl").exists()


@pytest.mark.slow
def test_a_sweep_begins_no_other_comparison(tmp_path, terminate):
    terminate(Store, "add", 2)
    options = {"eps": 8, "limit": 1, "out": tmp_path, "options": STUDY["options"]}
    with pytest.raises(PreemptedError, match=r"iterations1_seed0/comparison\.json"):
        sweep(MODEL, ["mce"], iterations=[1], seeds=[0, 1], **options)
    assert [each.name for each in tmp_path.iterdir()] == ["iterations1_seed0"]
    assert len(sweep(MODEL, ["mce"], iterations=[1], seeds=[0, 1], **options).rows) == 4


@pytest.mark.slow
def test_a_shard_that_is_done_stops_too(tmp_path, terminate):
    """Else the next model would begin, as after a shard that nobody has asked to stop."""
    terminate(Store, "add", 1)
    with pytest.raises(PreemptedError, match=r"^Stopped by SIGTERM\. Shard 2/3 is done\. \d of 4 units are missing"):
        run(tmp_path / "run", shard="2/3", **ONE)


@pytest.mark.slow
def test_a_signal_during_the_merge_is_no_missing_shard(tmp_path, monkeypatch):
    merge = segbench.engine.evaluate.merge

    def terminated(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return merge(*arguments)

    monkeypatch.setattr("segbench.engine.evaluate.merge", terminated)
    with pytest.raises(PreemptedError, match=r"^Stopped by SIGTERM between units\.") as caught:
        run(tmp_path / "run", **ONE)
    assert not isinstance(caught.value, ShardDoneError)
    monkeypatch.setattr("segbench.engine.evaluate.merge", merge)
    assert run(tmp_path / "run", **ONE).entry_path.exists()


CODE_OF_A_USER = """
import os, signal, time
from torch import nn

class Net(nn.Conv2d):
    def forward(self, images):
        stop("forward")
        return super().forward(images)

def stop(where):
    if os.environ["STOP"] == where:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

def build():
    stop("build")
    return Net(3, 8, 1)
"""


@pytest.mark.parametrize("where", ["build", "forward"])
def test_sigterm_in_the_code_of_a_user_is_no_fault_of_the_model(tmp_path, monkeypatch, where):
    """What calls that code catches every Exception of it."""
    monkeypatch.setenv("STOP", where)
    (tmp_path / "own.py").write_text(CODE_OF_A_USER)
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(PreemptedError, match="Stopped by SIGTERM"):
            segbench.evaluate(f"{tmp_path}/own.py:build", "shapes", out=tmp_path / "run", limit=2, progress=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]  # a handler of the caller's own hears of it too
    assert not (tmp_path / "run").exists()
