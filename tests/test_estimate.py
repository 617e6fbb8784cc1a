"""How long a run will take: before the first unit, after some, and in words."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import segbench
from segbench.engine.compute.session import open_session
from segbench.engine.compute.worker import Worker, image_passes
from segbench.engine.rundir.plan import plan
from segbench.engine.rundir.store import Store
from segbench.engine.telemetry import progress
from segbench.engine.telemetry.estimate import expected_time, seconds_per_pass
from segbench.engine.telemetry.progress import announce, format_duration, progress_bar
from segbench.protocol import SEA_V1
from tests.runs import MODEL


@pytest.fixture(scope="module")
def worker():
    """Of the model and the images of the reference."""
    data = segbench.load_dataset("shapes").first(5)
    return Worker(segbench.load_model(MODEL), data, SEA_V1, torch.device("cpu"))


def seconds_of(text: str) -> float:
    """What `duration` says, back in seconds."""
    found = re.match(r"(?:At most about|About) (.*) on this device", text)[1]
    scale = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    return sum(float(number) * scale[unit] for number, unit in re.findall(r"(\d+) (\w+)", found))


def test_before_the_first_unit_two_steps_are_measured(worker):
    units = plan("sea-v1", worker.dataset.image_ids, [8.0], SEA_V1.losses)
    text = expected_time(worker, units, {})
    assert re.fullmatch(r"At most about .* on this device \(cpu, \d+ cores\); Ctrl-C is safe\.", text)
    again = sum(image_passes(unit, SEA_V1) for unit in units) * seconds_per_pass(worker)
    assert again / 5 < seconds_of(text) < again * 5 + 1  # of two measurements, on a machine that does other things


def test_after_some_units_it_is_what_they_took(worker):
    units = plan("sea-v1", worker.dataset.image_ids, [4.0, 8.0], SEA_V1.losses)
    device = f"cpu, {os.cpu_count()} cores"
    costs = {
        unit.name: {"seconds": 3600.0 * len(unit.image_ids), "images": len(unit.image_ids), "device": device}
        for unit in units
        if unit.strength != 8
    }
    left = [unit for unit in units if unit.strength == 8]
    text = expected_time(worker, left, costs)
    assert text.startswith("About 15 h 0 min on this device")  # five images under three losses
    elsewhere = {name: cost | {"device": "NVIDIA H200"} for name, cost in costs.items()}
    assert expected_time(worker, left, elsewhere).startswith("At most about")


def test_the_measurement_leaves_threads_and_gradients_as_they_were(worker):
    parameter = next(worker.model.parameters())
    before = parameter.requires_grad
    torch.set_num_threads(2)
    with open_session(worker.models, worker.device, threads=2):
        assert seconds_per_pass(replace(worker, one_core=True)) > 0
    assert (torch.get_num_threads(), parameter.requires_grad, parameter.grad) == (2, before, None)


def test_passes_are_those_that_attacks_make_when_no_image_is_finished_early(reference):
    store = Store.open(reference.path)
    for unit in store.units():
        _, stats = store.read(unit)
        made = sum(stats["forwards"]) + len(unit.image_ids)
        protocol = replace(SEA_V1, iterations=4)
        if unit.loss == "check":
            assert made <= image_passes(unit, protocol)
        else:
            assert made == image_passes(unit, protocol)
    run = reference.entry()["run"]
    assert run["images_per_second"] == pytest.approx(run["forward_passes"] / run["seconds"], rel=1e-3)
    logged = [json.loads(line) for line in (reference.path / "log.jsonl").read_text().splitlines()]
    assert run["seconds"] == pytest.approx(sum(record["seconds"] for record in logged), abs=0.01)
    assert run["peak_memory_bytes"] == max(record["peak_memory_bytes"] for record in logged)
    assert run["gpu_hours"] is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1 s"), (59, "59 s"), (59.9, "60 s"), (60, "1 min"), (3569, "59 min"), (3599, "1 h 0 min"),
        (12_000, "3 h 20 min"), (172_799, "2 d 0 h"), (200_000, "2 d 8 h"), (1e7, "115 d 18 h"),
    ],
)  # fmt: skip
def test_durations_are_in_words(seconds, text):
    assert format_duration(seconds) == text


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal of 140 columns shows."""
    screen = io.StringIO()

    def console(**options):
        options.pop("stderr")
        return Console(file=screen, width=140, force_terminal=True, color_system=None, **options)

    monkeypatch.setattr(progress, "Console", console)
    return screen


def test_the_bar_tells_what_is_done(terminal):
    with progress_bar(400, 20, enabled=True) as report:
        report.unit("ε 8/255 mce")
        report.images(100)
        report.done("ε 8/255 mce", 5, 0.25)
    shown = terminal.getvalue()
    assert "ε 8/255 mce" in shown
    assert "25%" in shown
    assert "images 5/20" in shown
    assert "aAcc 0.250 at ε 8/255 mce" in shown


def test_a_line_is_told_as_it_is(terminal):
    announce("About 3 h [on] this device; " + "x" * 200)
    assert terminal.getvalue() == "About 3 h [on] this device; " + "x" * 200 + "\n"


def test_nothing_is_shown_when_nothing_is_wanted(terminal):
    with progress_bar(4, 2, enabled=False) as report:
        report.unit("clean")
        report.images(1)
        report.done("clean", 1, 0.5)
    assert terminal.getvalue() == ""
