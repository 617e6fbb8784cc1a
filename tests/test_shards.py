"""Many processes, one run: whatever divides the work, the evidence is the same."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from segbench.engine.launch import shards
from segbench.engine.launch.shards import launcher_shard, parse_shard, process_device
from segbench.engine.rundir.merge import merge
from segbench.engine.rundir.store import Store
from segbench.errors import IncompleteError, ShardDoneError, UsageError
from tests.runs import ENVIRONMENT, MODEL, command, run, units

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("total", [1, 2, 5])
def test_shards_in_a_shared_folder_give_the_same_bytes_in_any_order(reference, tmp_path, total):
    orders = list(itertools.permutations(range(1, total + 1)))
    for order in orders[:: max(1, len(orders) // 2)]:
        out = tmp_path / "-".join(map(str, order))
        for number in order[:-1]:
            with pytest.raises(ShardDoneError, match=rf"^Shard {number}/{total} is done\. .* units are missing"):
                run(out, shard=f"{number}/{total}")
        result = run(out, shard=f"{order[-1]}/{total}")
        assert units(out) == units(reference.path)
        assert result.evidence_path.read_bytes() == reference.evidence_path.read_bytes()
        same = ("forward_passes", "backward_passes", "device")
        assert all(result.entry()["run"][key] == reference.entry()["run"][key] for key in same)
        assert result.entry()["run"]["seconds"] > 0
        logs = {file.name: len(file.read_text().splitlines()) for file in out.glob("log*.jsonl")}
        assert sum(logs.values()) == len(units(out))
        assert len(logs) == total


def test_units_from_machines_that_share_no_folder_are_merged_in_any_order(reference, tmp_path):
    for number in range(1, 6):
        with pytest.raises(ShardDoneError):
            run(tmp_path / str(number), shard=f"{number}/5")
    for order in ((1, 2, 3, 4, 5), (4, 2, 5, 1, 3)):
        out = tmp_path / "".join(map(str, order))
        for number in order:
            with pytest.raises(IncompleteError) if number != order[0] else pytest.raises(Exception, match="usable"):
                merge(Store.open(out))
            shutil.copytree(tmp_path / str(number), out, dirs_exist_ok=True)
        merged = merge(Store.open(out))
        assert merged.evidence_path.read_bytes() == reference.evidence_path.read_bytes()
        assert merged.entry["results"] == reference.entry()["results"]
        assert merged.entry["run"]["seconds"] > 0  # of all machines: each has a log of its own


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_torchrun_works_as_it_is(reference, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    done = subprocess.run(
        [*launcher, str(free_port()), *command(tmp_path / "run")[1:]],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # also of the process that is ready first
    assert "Traceback" not in done.stderr
    assert f"{MODEL} on shapes (5 images)" in done.stdout
    (evidence,) = (tmp_path / "run").glob("*.parquet")
    assert evidence.read_bytes() == reference.evidence_path.read_bytes()
    workers = [json.loads(file.read_text()) for file in sorted((tmp_path / "run" / "workers").glob("*.json"))]
    assert [(who["shard"], who["state"]) for who in workers] == [("1/2", "done"), ("2/2", "done")]


def test_a_slurm_array_works_as_it_is(reference, tmp_path):
    """The elements one after the other, as on a busy cluster; the last one prints the table."""
    out = tmp_path / "run"
    for number, last in ((3, False), (5, False), (1, True)):
        array = {
            "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1",
            "SLURM_ARRAY_TASK_MAX": "5", "SLURM_ARRAY_TASK_STEP": "2",
        }  # fmt: skip
        done = subprocess.run(command(out), env=ENVIRONMENT | array, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert bool(done.stdout) == last
        assert ("The last shard to finish merges" in done.stderr) != last
    assert units(out) == units(reference.path)


def test_an_explicit_shard_tells_that_units_are_missing(tmp_path):
    done = subprocess.run(
        [*command(tmp_path / "run"), "--shard", "2/2"], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "Shard 2/2 is done. 4 of 7 units are missing" in done.stderr


SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, (1, 1)),
        ({"RANK": "0", "WORLD_SIZE": "4"}, (1, 4)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (4, 4)),
        ({"RANK": "3"}, (1, 1)),
        (SLURM | {"SLURM_ARRAY_TASK_MIN": "4"}, (4, 4)),
        (SLURM | {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "3"}, (3, 4)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (2, 2)),
        (SLURM | {"SLURM_ARRAY_TASK_MIN": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (4, 4)),
        (SLURM | {"SLURM_ARRAY_TASK_MIN": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (8, 8)),
        (SLURM | {"SLURM_ARRAY_TASK_MIN": "6", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, (3, 8)),
        (SLURM | {"RANK": "1", "WORLD_SIZE": "8"}, (2, 8)),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}, (1, 1)),  # sbatch without an array or srun
    ],
)
def test_the_launcher_says_which_shard_it_is(environment, shard):
    assert launcher_shard(environment) == shard


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"RANK": "-1", "WORLD_SIZE": "4"},
        {"RANK": "x", "WORLD_SIZE": "4"},
        {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4"},  # an array from 4 on that does not say so
    ],
)
def test_launchers_that_contradict_themselves_are_refused(environment):
    with pytest.raises(UsageError, match=r"do not tell a shard\. Say it yourself: --shard 1/1 for everything"):
        launcher_shard(environment)


def test_what_is_asked_counts_more_than_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ShardDoneError, match="Shard 2/2 is done"):
        run(tmp_path / "run")
    assert run(tmp_path / "other", shard="1/1").entry()["results"]


@pytest.mark.parametrize("shard", ["3", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1.0/2", "²/3", " 1/2"])
def test_what_is_no_shard_is_refused(shard):
    with pytest.raises(UsageError, match="A shard is written 3/16"):
        parse_shard(shard)


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    """As far as it can be told without one: which of four is chosen."""
    monkeypatch.setattr(shards, "choose_compute_device", lambda name: torch.device("cuda" if name == "auto" else name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    local = {"LOCAL_RANK": "2"}
    assert process_device("auto", local) == process_device("cuda", local) == torch.device("cuda", 2)
    assert process_device("cuda", {"LOCAL_RANK": "5"}) == torch.device("cuda", 1)
    assert process_device("cuda:3", local) == torch.device("cuda", 3)
    assert process_device("cpu", local) == torch.device("cpu")
    assert process_device("cuda", {}) == torch.device("cuda")
