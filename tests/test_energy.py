"""Energy: from the counters that a kernel shows, from nvidia-smi, and from nobody."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path

import pytest

from segbench.engine.telemetry import energy
from segbench.engine.telemetry.energy import EnergyMeter, gpu_watts, processor_joules
from tests.runs import run


def package(folder: Path, name: str, microjoules: int, top: int = 1_000_000_000) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{top}\n")


def smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_each_processor_is_counted_once(tmp_path):
    package(tmp_path, "intel-rapl:0", 5_000_000)
    package(tmp_path, "intel-rapl:0:0", 4_000_000)  # its cores, which are in it
    package(tmp_path, "intel-rapl:1", 7_000_000)
    assert processor_joules(tmp_path) == {"intel-rapl:0": (5.0, 1000.0), "intel-rapl:1": (7.0, 1000.0)}


@pytest.mark.parametrize("content", ["", "no number", None])
def test_counters_that_cannot_be_read_are_not_known(tmp_path, content):
    package(tmp_path, "intel-rapl:0", 5_000_000)
    if content is None:
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    else:
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text(content)
    assert processor_joules(tmp_path) is None
    assert processor_joules(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("after", "joules"), [(90_000_000, 40), (20_000_000, 70)])  # the second begins again at 100 J
def test_mean_power_is_what_the_counter_rose_by(tmp_path, monkeypatch, after, joules):
    monkeypatch.setattr(energy.processor_joules, "__defaults__", (tmp_path,))
    package(tmp_path, "intel-rapl:0", 50_000_000, top=100_000_000)
    with closing(EnergyMeter(None)) as meter:
        started = meter._started
        package(tmp_path, "intel-rapl:0", after, top=100_000_000)
        time.sleep(0.05)
        watts = meter.watts()
        seconds = time.monotonic() - started
    assert joules / seconds <= watts <= joules / 0.05


def test_a_gpu_is_asked_for_its_power(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    smi(tmp_path, '[ "$1 $2" = "-i 3" ] && echo 412.50')
    assert gpu_watts("3") == 412.5
    assert gpu_watts("4") is None


@pytest.mark.parametrize("script", ["echo '[N/A]'", "echo 100; exit 9", "exit 0", "echo 1 2"])
def test_an_answer_that_is_no_number_is_not_known(tmp_path, monkeypatch, script):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    smi(tmp_path, script)
    assert gpu_watts("0") is None


def test_the_power_of_a_gpu_is_the_mean_of_many_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "SECONDS", 0.01)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    smi(tmp_path, f'cd "{tmp_path}"; if [ -e on ]; then rm on; echo 300; else : > on; echo 100; fi')
    with closing(EnergyMeter("0")) as meter:
        deadline = time.monotonic() + 20
        while len(meter._sampled) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert meter._sampled[:4] == [100, 300, 100, 300]
    assert meter.watts() == pytest.approx(200, abs=25)


def test_without_nvidia_smi_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with closing(EnergyMeter("0")) as meter:
        assert meter.watts() is None
    assert gpu_watts("0") is None


def test_the_entry_has_the_sum_of_the_units(tmp_path, monkeypatch):
    monkeypatch.setattr(EnergyMeter, "watts", lambda meter: 50.0)
    result = run(tmp_path / "run", eps=8, limit=2, iterations=1)
    logged = [json.loads(line) for line in (result.path / "log.jsonl").read_text().splitlines()]
    assert all(record["joules"] == pytest.approx(50 * record["seconds"]) for record in logged)
    assert result.entry()["run"]["energy_joules"] == pytest.approx(sum(record["joules"] for record in logged), abs=0.1)


def test_a_unit_of_unknown_energy_makes_that_of_the_run_unknown(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(energy.processor_joules, "__defaults__", (tmp_path,))
    result = run(tmp_path / "run", eps=8, limit=1, iterations=1)
    assert result.entry()["run"]["energy_joules"] is None
