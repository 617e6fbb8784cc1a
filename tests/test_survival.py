"""Runs that are killed, preempted, starved of disk and started twice: nothing is lost, nothing counted twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import segbench
from segbench import files
from segbench.engine.rundir.store import Store
from segbench.errors import IncompleteError, PreemptedError, RunError
from segbench.signals import raised
from tests import forks as forked
from tests.runs import ENVIRONMENT, command, is_temporary, run, units

pytestmark = pytest.mark.slow


def forks(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.forks", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def evidence_of(path: Path) -> bytes:
    (file,) = path.glob("*.parquet")
    return file.read_bytes()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The undisturbed run of which the others are copies."""
    path = tmp_path_factory.mktemp("tiny") / "run"
    forked.run(path, forked.tiny())
    return path


def continues(path: Path, tiny: Path) -> bool:
    """Whether the run goes on to the same bytes."""
    forked.run(path, forked.tiny())
    return (evidence_of(path), units(path)) == (evidence_of(tiny), units(tiny))


def test_fifty_kills_at_random_moments_change_no_byte(tmp_path):
    assert forks("once", tmp_path / "once").returncode == 0
    killed = forks("kills", tmp_path / "killed", 50, 0)
    assert killed.stdout == "50\n", killed.stderr
    assert evidence_of(tmp_path / "killed") == evidence_of(tmp_path / "once")
    assert units(tmp_path / "killed") == units(tmp_path / "once") | {
        file.name: file.read_bytes() for file in (tmp_path / "killed" / "units").iterdir() if is_temporary(file)
    }


def test_a_kill_before_any_operation_on_a_file_changes_no_byte(tiny, tmp_path):
    killed = forks("operations", tmp_path)
    assert killed.returncode == 0, killed.stderr
    runs = sorted(tmp_path.iterdir())
    assert len(runs) == int(killed.stdout) > 40
    assert {evidence_of(path) for path in runs} == {evidence_of(tiny)}


def test_sigterm_finishes_the_units_that_have_begun(tmp_path):
    radii = [4, 8, 12, 16, 20, 24]  # more units than can have begun together when the first one is finished
    out, whole = tmp_path / "run", run(tmp_path / "whole", iterations=12, eps=radii)
    process = subprocess.Popen(
        command(out, 12, radii), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("units/eps4_*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, printed) == (3, ""), errors
    assert "SIGTERM: the units that have begun are finished, then this stops. The same command goes on." in errors
    assert "Stopped by SIGTERM; the units that had begun are finished and kept" in errors
    assert "Traceback" not in errors
    assert json.loads((out / "workers" / "1-of-1.json").read_text())["state"] == "stopped"
    assert json.loads((out / "workers" / "1-of-1.json").read_text())["units"] == []
    assert 0 < len(units(out)) < len(units(whole.path))
    assert units(out).items() <= units(whole.path).items()
    subprocess.run(command(out, 12, radii), env=ENVIRONMENT, capture_output=True, check=True)
    assert evidence_of(out) == whole.evidence_path.read_bytes()


def test_sigterm_before_the_first_attack_is_resumable_too(tmp_path, monkeypatch):
    create = Store.create

    def terminated(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return create(*arguments)

    monkeypatch.setattr(Store, "create", terminated)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match=r"Stopped by SIGTERM between units\. Run the same command again"):
        run(tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) == before
    assert PreemptedError("").exit_code == 3


def test_a_signal_raises_within_and_means_what_it_did_afterwards():
    with pytest.raises(PreemptedError, match=r"^now$"), raised(signal.SIGUSR1, PreemptedError, "now"):
        signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_file_that_the_system_refuses_ends_the_run_and_nothing_is_lost(tiny, tmp_path):
    """The kernel's own refusal in the middle of writing a unit, as of a full disk or a quota."""
    out = tmp_path / "run"
    stopped = forks("small-files", out, 2000)
    assert stopped.returncode == 1
    assert "File too large" in stopped.stderr
    assert "Fix this and run the same command again; finished units are kept." in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert len(units(out)) == 1  # and no piece of another
    assert continues(out, tiny)


def test_a_full_disk_ends_the_run_before_a_unit_without_its_cost(tiny, tmp_path):
    out = shutil.copytree(tiny, tmp_path / "run")
    for name in ("log.jsonl", "units/eps8_js_0000.parquet"):
        (out / name).unlink()
    (out / "log.jsonl").symlink_to("/dev/full")
    stopped = forks("tiny", out)
    assert stopped.returncode == 1
    assert "No space left on device" in stopped.stderr
    assert not (out / "units" / "eps8_js_0000.parquet").exists()
    (out / "log.jsonl").unlink()
    assert continues(out, tiny)


@pytest.mark.parametrize("place", [".", "units"])
def test_a_read_only_folder_is_told_before_anything_is_computed(tiny, tmp_path, place):
    out = shutil.copytree(tiny, tmp_path / "run")
    (out / "units" / "eps8_js_0000.parquet").unlink()
    if place == ".":
        shutil.rmtree(out / "units")
    (out / place).chmod(0o555)
    try:
        stopped = forks("read-only", out)
    finally:
        (out / place).chmod(0o755)
    assert stopped.returncode == 1
    assert f"Cannot write into {(out / place).resolve()}: Permission denied. Give another folder" in stopped.stderr
    assert continues(out, tiny)


def test_a_new_run_where_nothing_can_be_written_is_told(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o555)
    stopped = forks("read-only", folder / "new" / "run")
    assert stopped.returncode == 1
    assert f"Cannot write into {folder}: Permission denied" in stopped.stderr
    assert list(folder.iterdir()) == []


def test_what_a_power_loss_leaves_behind_is_no_unit(tiny, tmp_path):
    """A file that was written, not yet renamed, and the unit it was to become."""
    out = shutil.copytree(tiny, tmp_path / "run")
    unit = out / "units" / "eps8_mce_0000.parquet"
    unit.rename(unit.with_name(f".{unit.name}.0123456789abcdef.tmp"))
    (out / "log.jsonl").write_text((out / "log.jsonl").read_text()[:-20])
    with pytest.raises(IncompleteError, match="1 of 4 units are missing"):
        segbench.engine.rundir.merge.merge(Store.open(out))
    leftover = next(file for file in (out / "units").iterdir() if is_temporary(file))
    (evidence,) = out.glob("*.parquet")
    before = evidence.read_bytes()
    forked.run(out, forked.tiny())
    assert evidence.read_bytes() == before
    leftover.unlink()
    assert units(out) == units(tiny)


def test_a_line_of_the_log_that_was_cut_costs_no_other(tiny, tmp_path):
    out = shutil.copytree(tiny, tmp_path / "run")
    log = out / "log.jsonl"
    whole = log.read_text().splitlines()
    log.write_text("\n".join(whole)[:-20])
    Store.open(out).log(json.loads(whole[-1]))
    assert Store.open(out).costs() == Store.open(tiny).costs()


def test_data_reach_the_disk_before_their_name_does(tmp_path, monkeypatch):
    """Else a power loss leaves a name without content: sync of the file, then the name, then sync of the folder."""
    done = []

    class System:
        def __getattr__(self, name):
            found = getattr(os, name)
            if name not in ("fsync", "link", "replace"):
                return found

            def call(*arguments):
                done.append((name, os.path.isdir(arguments[0]) if name == "fsync" else None))
                return found(*arguments)

            return call

    monkeypatch.setattr(files, "os", System())
    files.create_atomic(tmp_path / "a", b"1")
    files.write_atomic(tmp_path / "a", b"2")
    expected = [("fsync", False), ("link", None), ("fsync", True), ("fsync", False), ("replace", None), ("fsync", True)]
    assert done == expected


def test_a_clock_that_jumps_changes_nothing(reference, tmp_path, monkeypatch):
    rng = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + rng.uniform(-4e7, 4e7))
    result = run(tmp_path / "run")
    assert result.evidence_path.read_bytes() == reference.evidence_path.read_bytes()
    assert 0 < result.entry()["run"]["seconds"] < 1000


def test_a_second_process_in_a_run_directory_is_refused_and_the_first_goes_on(reference, tmp_path):
    out = tmp_path / "run"
    first = subprocess.Popen(command(out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (out / "workers" / "1-of-1.json").exists() and first.poll() is None:
        time.sleep(0.01)
    with pytest.raises(RunError, match=rf"is in use: process {first.pid} on .* is doing it\. Nothing was changed"):
        run(out)
    assert first.wait(timeout=120) == 0
    assert evidence_of(out) == reference.evidence_path.read_bytes()
    assert len((out / "log.jsonl").read_text().splitlines()) == len(units(reference.path))


def test_two_processes_without_locks_count_nothing_twice(tiny, tmp_path):
    both = forks("unlocked", tmp_path / "run")
    assert both.returncode == 0, both.stderr
    assert "cannot be locked" in both.stderr
    assert units(tmp_path / "run") == units(tiny)
    assert evidence_of(tmp_path / "run") == evidence_of(tiny)
