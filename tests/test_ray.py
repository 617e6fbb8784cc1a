"""The Ray engine on a local cluster: the same bytes, also when a worker is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

import segbench
from segbench.engine import ray_engine
from segbench.engine.store import Store
from segbench.errors import DataError, UsageError
from tests.runs import MODEL, SHORT, run, units

RAY = {"engine": "ray", "workers": 2}


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """A run in this process, of two units for each attack."""
    return run(tmp_path_factory.mktemp("longer") / "run", limit=20)


@pytest.fixture(scope="module")
def cluster():
    """Two workers' places, for all tests of this file."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
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


def test_a_killed_worker_is_replaced_and_its_units_are_done_again(cluster, longer, tmp_path, monkeypatch, caplog):
    add, killed = Store.add, []

    def kill(store, done):
        add(store, done)
        pid = int(done.cost["worker"].split(":")[1])
        if not killed and done.unit.eps_255 == 4:
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
        def do(self, unit):
            os._exit(1)

    monkeypatch.setattr(ray_engine, "Actor", Fatal)
    monkeypatch.setattr(ray_engine, "RETRIES", 1)
    with pytest.raises(segbench.errors.RunError, match=r"died 2 times.*fewer --workers"):
        run(tmp_path / "run", **RAY)


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
            **(RAY | {"limit": None}),
        )
    assert list((tmp_path / "run" / "units").glob("eps0_clean_0000.parquet"))


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


def test_the_command_line_starts_a_cluster_and_ends_it(tmp_path):
    command = [
        sys.executable, "-m", "segbench", "evaluate", "--model", MODEL, "--eps", "8", "--limit", "3", "--iterations",
        "2", "--engine", "ray", "--workers", "1", "--out", str(tmp_path / "run"), "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["eps_255"] == 8
    assert "Traceback" not in done.stderr


def test_without_ray_the_mend_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'segbench\[ray\]'"):
        segbench.evaluate(MODEL, out=tmp_path / "run", engine="ray", **SHORT)
