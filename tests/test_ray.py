"""The Ray engine on a local cluster: the same bytes, also when a worker is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import segbench
from segbench.engine.compute.worker import Worker
from segbench.engine.launch import ray as ray_engine
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir.plan import plan
from segbench.engine.rundir.store import Store
from segbench.engine.studies.compare import compare
from segbench.errors import DataError, RunError, UsageError
from segbench.evidence import CLEAN
from segbench.protocol import SEA_V1
from tests.runs import ENVIRONMENT, MODEL, SHORT, run, units

RAY = {"engine": "ray", "workers": 2}


# The actors are processes of their own, which import segbench as it is.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """A run in this process, of two units for each attack."""
    return run(tmp_path_factory.mktemp("longer") / "run", limit=20)


@pytest.fixture(scope="module")
def cluster():
    """Two workers' places, for all tests of this file."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, before)
    yield ray
    ray.shutdown()


def workers_of(out):
    return {json.loads(line)["worker"] for line in (out / "log.jsonl").read_text().splitlines()}


def test_two_workers_give_the_same_bytes(cluster, longer, tmp_path):
    result = run(tmp_path / "run", limit=20, **RAY)
    assert units(result.path) == units(longer.path)
    assert result.evidence_path.read_bytes() == longer.evidence_path.read_bytes()
    assert len(workers_of(result.path)) == 2
    assert not any(worker.endswith(f":{os.getpid()}") for worker in workers_of(result.path))
    assert run(result.path, limit=20).entry()["results"] == longer.entry()["results"]  # the engine is no identity
    left = [int(worker.split(":")[1]) for worker in workers_of(result.path)]
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{process}").exists() for process in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{process}").exists() for process in left), "an actor did not end with its run"


def test_workers_search_and_attack_another_model_like_one_process(cluster, tmp_path):
    options = {"eps": 8, "limit": 3, "iterations": 4, "sources": ["at_convnext_mini_shapes"]}
    here, there = (
        compare(MODEL, ["square", "mce"], out=tmp_path / name, options=how, **options)
        for name, how in (("here", RunOptions(progress=False)), ("there", RunOptions(progress=False, **RAY)))
    )
    assert (here.path / "comparison.parquet").read_bytes() == (there.path / "comparison.parquet").read_bytes()
    assert any("mce_from_" in name for name in units(there.path))


def test_a_killed_worker_is_replaced_and_its_units_are_done_again(cluster, longer, tmp_path, monkeypatch, caplog):
    add, killed = Store.add, []

    def kill(store, done):
        add(store, done)
        pid = int(done.cost["worker"].split(":")[1])
        if not killed and done.unit.strength == 4:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(Store, "add", kill)
    result = run(tmp_path / "run", limit=20, **RAY)
    assert killed
    assert "A worker died; another one does its units again: eps" in caplog.text
    assert result.evidence_path.read_bytes() == longer.evidence_path.read_bytes()
    assert units(result.path) == units(longer.path)
    assert len(workers_of(result.path)) == 3


def test_a_worker_that_dies_again_and_again_is_no_endless_loop(cluster, tmp_path, monkeypatch):
    class Fatal(ray_engine.Actor):
        def run(self, unit):
            os._exit(1)

    monkeypatch.setattr(ray_engine, "Actor", Fatal)
    monkeypatch.setattr(ray_engine, "RETRIES", 1)
    with pytest.raises(RunError, match=r"died 2 times.*fewer --workers"):
        run(tmp_path / "run", **(RAY | {"workers": 1}))


def test_what_goes_wrong_in_a_worker_is_told_as_it_is(cluster, tmp_path):
    data, owner = segbench.load_dataset("shapes").first(20), os.getpid()
    read = data.read

    def broken(image_id):
        if image_id == "00018" and os.getpid() != owner:
            raise DataError("Cannot read the image 18.")
        return read(image_id)

    with pytest.raises(DataError, match=r"^Cannot read the image 18\.$"):
        run(
            tmp_path / "run",
            model=segbench.load_model(MODEL),
            dataset=replace(data, read=broken),
            **(RAY | {"limit": None, "workers": 1}),
        )
    assert list((tmp_path / "run" / "units").glob("eps0_clean_0000.parquet"))


def test_an_actor_goes_on_after_a_unit_that_failed(cluster, longer):
    """Ray may hand two units over in either order: the one behind a broken one must be done all the same."""
    data = segbench.load_dataset("shapes").first(20)
    read = data.read

    def broken(image_id):
        if image_id == "00018":
            raise DataError("Cannot read the image 18.")
        return read(image_id)

    model = segbench.load_model(MODEL).eval()
    worker = Worker(model, replace(data, read=broken), SEA_V1, torch.device("cpu"), one_core=True)
    actor = ray_engine.Actor(ray_engine._pickled(cluster.cloudpickle, ray_engine._Setup(worker, "cpu", 1)))
    good, bad = (unit for unit in plan("sea-v1", data.image_ids, [4], []) if (unit.strength, unit.loss) == CLEAN)
    with pytest.raises(DataError, match="image 18"):
        actor.run(bad)
    done = actor.run(good)
    expected, _ = Store.open(longer.path).read(good)
    assert done.group.image_ids == expected.image_ids
    assert (done.group.counts.intersection == expected.counts.intersection).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"workers": 3}, "has 2 cores: --workers must be from 1 to 2, not 3"),
        ({"gpus_per_worker": 1}, r"has 0 GPUs; 2 workers with 1 each do not fit"),
    ],
)
def test_a_cluster_that_is_too_small_is_told(cluster, tmp_path, options, text):
    with pytest.raises(UsageError, match=text):
        run(tmp_path / "run", **(RAY | options))


def command(*options):
    return [sys.executable, "-m", "segbench", "evaluate", "--engine", "ray", "--quiet", *options]


def test_the_command_line_starts_a_cluster_and_a_model_of_ones_own_comes_along(tmp_path):
    """From a file that imports another one beside it, which no other process would find."""
    (tmp_path / "parts.py").write_text("import torch\n\ndef conv():\n    return torch.nn.Conv2d(3, 8, 3, padding=1)\n")
    (tmp_path / "net.py").write_text(
        "import parts\nimport torch\n\nclass Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        torch.manual_seed(0)\n"
        "        self.conv = parts.conv()\n\n    def forward(self, x):\n        return self.conv(x)\n\n"
        "def build():\n    return Net()\n"
    )
    options = ["--model", f"{tmp_path}/net.py:build", "--dataset", "shapes", "--eps", "8", "--limit", "3"]
    done = subprocess.run(
        command(*options, "--iterations", "2", "--workers", "1", "--out", str(tmp_path / "run"), "--json"),
        capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["eps_255"] == 8
    assert "Traceback" not in done.stderr


def test_sigterm_finishes_what_the_actors_have_begun(tmp_path):
    out = tmp_path / "run"
    options = ["--model", MODEL, "--eps", "4", "8", "--iterations", "30", "--workers", "1", "--out", str(out)]
    process = subprocess.Popen(command(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not list(out.glob("units/eps4_*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 3, errors
    assert "Stopped by SIGTERM; the units that had begun are finished and kept" in errors
    state = json.loads((out / "workers" / "1-of-1.json").read_text())
    assert (state["state"], state["units"]) == ("stopped", [])
    assert not list(out.glob("*.parquet"))


def test_workers_that_cannot_start_say_why(cluster, tmp_path, monkeypatch):
    class Broken(ray_engine.Actor):
        def __init__(self, pickled):
            raise ModuleNotFoundError("No module named 'left_at_home'")

    monkeypatch.setattr(ray_engine, "Actor", Broken)
    with pytest.raises(RunError, match=r"^The workers cannot start: ModuleNotFoundError: No module named 'left_at_ho"):
        run(tmp_path / "run", **(RAY | {"workers": 1}))


def test_without_ray_the_mend_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'segbench\[ray\]'"):
        segbench.evaluate(MODEL, out=tmp_path / "run", engine="ray", **SHORT)
