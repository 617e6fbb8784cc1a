"""Who works in a run directory, and what `segbench status` makes of it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from segbench.engine.rundir import workers
from segbench.engine.rundir.lock import claim_shard
from segbench.engine.rundir.plan import loss_of_unit, plan
from segbench.engine.rundir.status import estimate_seconds, run_status
from segbench.engine.rundir.store import Store
from segbench.engine.rundir.workers import LOST_SECONDS, list_workers, read_worker
from segbench.errors import DataError, PreemptedError, RunError, ShardDoneError
from tests.runs import run


def states(path):
    return [(who.shard, who.state) for who in list_workers(path)]


def fail(path, shard, error, *units):
    """A process that is doing these units when something goes wrong."""
    with claim_shard(path, shard, "cpu") as heartbeat:
        for unit in units:
            heartbeat.begin(unit)
        raise error


def test_a_process_is_seen_while_it_works_and_afterwards(tmp_path):
    with claim_shard(tmp_path, "2/3", "cpu, 2 cores") as heartbeat:
        heartbeat.begin("eps8_mce_0001")
        heartbeat.begin("eps8_mce_0002")
        heartbeat.end("eps8_mce_0001")
        heartbeat.write("running")
        (who,) = list_workers(tmp_path)
        assert (who.shard, who.pid, who.device, who.state) == ("2/3", os.getpid(), "cpu, 2 cores", "running")
        assert who.units == ("eps8_mce_0002",)
        assert 0 <= who.seconds < 10
    assert states(tmp_path) == [("2/3", "done")]


@pytest.mark.parametrize(
    ("error", "state", "text"),
    [
        (DataError("no image"), "failed", "DataError: no image"),
        (ValueError("x" * 9999), "failed", ("ValueError: " + "x" * 9999)[:2000]),
        (PreemptedError("SIGTERM"), "stopped", None),
        (KeyboardInterrupt(), "stopped", None),
    ],
)
def test_how_a_process_ended_is_told(tmp_path, error, state, text):
    with pytest.raises(type(error)):
        fail(tmp_path, "1/1", error, "eps8_mce_0001")
    (who,) = list_workers(tmp_path)
    assert (who.state, who.error, who.units) == (state, text, ("eps8_mce_0001",))


def test_it_says_again_and_again_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "HEARTBEAT_SECONDS", 0.05)
    with claim_shard(tmp_path, "1/1", "cpu") as heartbeat:
        os.utime(heartbeat.path, (1, 1))
        deadline = time.monotonic() + 20
        while heartbeat.path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heartbeat.path.stat().st_mtime > 2


def test_a_process_that_falls_silent_is_lost(tmp_path):
    with claim_shard(tmp_path, "1/1", "cpu") as heartbeat:
        now = heartbeat.path.stat().st_mtime
        assert read_worker(heartbeat.path, now + LOST_SECONDS - 1).state == "running"
        assert read_worker(heartbeat.path, now + LOST_SECONDS + 1).state == "lost"
    assert read_worker(heartbeat.path, now + 9e9).state == "done"


def test_a_file_system_whose_clock_is_ahead_makes_nobody_lost(tmp_path):
    with claim_shard(tmp_path, "1/2", "cpu") as heartbeat, claim_shard(tmp_path, "2/2", "cpu") as other:
        tomorrow = time.time() + 86400
        os.utime(heartbeat.path, (tomorrow, tomorrow))
        os.utime(other.path, (tomorrow - 10, tomorrow - 10))
        assert states(tmp_path) == [("1/2", "running"), ("2/2", "running")]
        assert [round(who.seconds) for who in list_workers(tmp_path)] == [0, 10]


def test_damaged_files_are_nobody(tmp_path):
    with claim_shard(tmp_path, "1/3", "cpu"):
        pass
    folder = tmp_path / "workers"
    whole = json.loads((folder / "1-of-3.json").read_text())
    for number, content in enumerate(
        [
            b"",
            b"{",
            b"[]",
            b"\xff",
            json.dumps(whole | {"state": "king"}).encode(),
            json.dumps(whole | {"units": 3}).encode(),
        ]
    ):
        (folder / f"{number + 4}-of-9.json").write_bytes(content)
    (folder / "x-of-y.json").write_text(json.dumps(whole | {"shard": "x/y"}))
    (folder / "2-of-3.json").mkdir()
    assert sorted(states(tmp_path)) == [("1/3", "done"), ("x/y", "done")]


def test_shards_are_listed_by_number(tmp_path):
    for number in (10, 2, 1):
        with claim_shard(tmp_path, f"{number}/10", "cpu"):
            pass
    assert [who.shard for who in list_workers(tmp_path)] == ["1/10", "2/10", "10/10"]


HOLDER = """
import sys, time
from pathlib import Path
from segbench.engine.rundir.lock import claim_shard
with claim_shard(Path(sys.argv[1]), "1/1", "cpu"):
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_shard_belongs_to_one_process_until_that_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "ready\n"
    with (
        pytest.raises(RunError, match=rf"is in use: process {holder.pid} on .*--shard 1/2 and --shard 2/2"),
        claim_shard(tmp_path, "1/1", "cpu"),
    ):
        pass
    assert states(tmp_path) == [("1/1", "running")]  # the refused one has said nothing
    with claim_shard(tmp_path, "1/2", "cpu"):  # another shard is free
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=60)
    with claim_shard(tmp_path, "1/1", "cpu"):
        pass
    assert ("1/1", "done") in states(tmp_path)


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError("flock")])
def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog, error):
    def refuse(lock, timeout):
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with claim_shard(tmp_path, "1/1", "cpu"):
        assert states(tmp_path) == [("1/1", "running")]
    assert "cannot be locked" in caplog.text
    assert "Take care that no other process does this shard" in caplog.text


def test_a_word_that_cannot_be_written_is_no_reason_to_stop(tmp_path, monkeypatch, caplog):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers, "write_atomic", full)
    with caplog.at_level(logging.DEBUG, "segbench"), claim_shard(tmp_path, "1/1", "cpu") as heartbeat:
        heartbeat.begin("eps8_mce_0001")
    assert "No space left on device" in caplog.text
    assert list_workers(tmp_path) == []


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Half of a run: every second unit."""
    out = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(ShardDoneError):
        run(out, shard="1/2")
    return out


def test_a_survey_adds_up(half):
    store = Store.open(half)
    found = run_status(store)
    assert (found.total.units, found.total.done, found.total.missing) == (7, 4, 3)
    assert found.total.running == found.total.failed == 0
    assert sum(row.units for row in found.groups.values()) == 7
    assert found.seconds == pytest.approx(sum(cost["seconds"] for cost in store.costs().values()))
    assert found.seconds_left > 0
    assert [who.state for who in found.workers] == ["done"]
    document = json.loads(json.dumps(found.document()))
    assert (document["done"], document["missing"], document["seconds_left"]) == (4, 3, found.seconds_left)


def test_what_runs_and_what_failed_is_neither_missing_nor_done(half):
    left = [unit.name for unit in Store.open(half).units() if not (half / "units" / f"{unit.name}.parquet").exists()]
    with pytest.raises(ValueError, match="burnt"):
        fail(half, "4/9", ValueError("burnt"), *left[:2])
    alone = run_status(Store.open(half))
    with claim_shard(half, "5/9", "cpu") as one, claim_shard(half, "6/9", "cpu") as two:
        one.begin(left[1])  # somebody does again what failed
        two.begin(left[2])
        one.write("running")
        two.write("running")
        found = run_status(Store.open(half))
        assert (found.total.done, found.total.running, found.total.failed, found.total.missing) == (4, 2, 1, 0)
        assert found.seconds_left == pytest.approx(alone.seconds_left / 2)
    (half / "workers" / "4-of-9.json").unlink()


def test_the_time_left_is_that_of_units_of_the_same_loss():
    units = plan("sea-v1", ["a", "b"], [4.0], ["mce", "js"])
    costs = {
        "eps4_mce_0000": {"seconds": 10.0, "images": 2},
        "eps8_mce_0000": {"seconds": 30.0, "images": 2},
        "eps0_clean_0000": {"seconds": 2.0, "images": 2},
    }
    assert [loss_of_unit(unit.name) for unit in units] == ["clean", "check", "mce", "js"]
    assert estimate_seconds(units[2:3], costs, 1) == 20  # the median of two
    assert estimate_seconds(units[2:3], costs, 4) == 5
    assert estimate_seconds(units[3:], costs, 1) == 20  # of the other attacks, as none is known of its own
    assert estimate_seconds(units[:1], costs, 1) == 2
    assert estimate_seconds(units, {"eps0_clean_0000": costs["eps0_clean_0000"]}, 1) is None
    assert estimate_seconds([], {}, 1) == 0


def test_the_command_shows_it(half, cli):
    code, out, err = cli("status", str(half))
    assert code == 3
    assert "4 of 7 units done in" in out
    assert "0 running, 0 failed, 3 missing; about" in out
    assert "3 units are missing. Continue: run the same `segbench evaluate` again." in err
    assert "1/2     done" in out
    code, out, _ = cli("status", str(half), "--json")
    assert code == 3
    found = json.loads(out)
    assert (found["units"], found["done"], found["missing"]) == (7, 4, 3)
    assert found["workers"][0]["shard"] == "1/2"


def test_the_command_shows_why_a_shard_failed(half, cli):
    with pytest.raises(ValueError, match="disk"):
        fail(half, "7/9", ValueError("the disk \x1b[31m burnt"), "eps4_mce_0000")
    out = cli("status", str(half))[1]
    assert "Shard 7/9 failed on" in out
    assert "ValueError: the disk" in out
    assert "\x1b" not in out
    (half / "workers" / "7-of-9.json").unlink()


def test_a_finished_run_is_zero(reference, cli):
    code, out, _ = cli("status", str(reference.path))
    assert code == 0
    assert "7 of 7 units done" in out
    assert "left" not in out.splitlines()[0]


def test_a_damaged_unit_is_told(half, cli):
    file = next((half / "units").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    try:
        code, _, err = cli("status", str(half))
    finally:
        file.write_bytes(content)
    assert code == 1
    assert file.name in err
