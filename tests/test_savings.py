"""Passes that images without a correct pixel save, counted from the log of a run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from segbench.cli.zoo import printed
from segbench.data.sets.shapes import load_shapes
from segbench.engine.rundir.savings import SavedPasses, saved_passes
from segbench.engine.rundir.store import Store
from tests.runs import MODEL, run


def one_class(number: int) -> nn.Module:
    """Predicts one class, whatever is done to the image."""
    model = nn.Conv2d(3, 8, 1)
    with torch.no_grad():
        model.weight.mul_(0.1)
        model.bias.zero_()[number] = 50.0
    return model


def saved(out, model: nn.Module, iterations: int) -> SavedPasses:
    """Of two images whose pixels are all of class 0, at one radius under the three losses."""
    whole = load_shapes()

    def read(image_id: str):
        pixels, labels = whole.read(image_id)
        return pixels, np.zeros_like(labels)

    data = replace(whole, read=read)
    found = run(out, model=model, dataset=data, eps=[4], limit=2, iterations=iterations).saved_passes()
    assert found is not None
    return found


def test_a_model_that_is_fooled_at_once_saves_all_but_two_passes_of_each_stage(tmp_path):
    found = saved(tmp_path / "run", one_class(1), 10)
    attack, made = (3 + 1) + (3 + 1) + (4 + 1), 3 * 2  # stages of 3, 3 and 4 steps, and the start of each
    assert found.saved == 2 * (3 * (attack - made))
    assert found.most == 2 * (3 * (attack + 1))  # each result is predicted once
    assert str(found) == "Attacks that were decided early saved 50.0% of the forward passes (42 of 84)."


@pytest.mark.parametrize("iterations", [2, 4])  # of two, the wider radii get none
def test_a_model_that_cannot_be_fooled_saves_none(tmp_path, iterations):
    found = saved(tmp_path / "run", one_class(0), iterations)
    attack = {2: 2 + 1, 4: 4 + 3}[iterations]
    assert found == (0, 2 * 3 * (attack + 1))
    assert str(found) == f"No attack was decided early: 0 of {found.most} forward passes saved."


def test_the_command_the_status_and_the_report_say_it(cli, tmp_path):
    options = ["--limit", "1", "--iterations", "2", "--eps", "4", "--device", "cpu", "--quiet", "--json"]
    code, out, err = cli("evaluate", "--model", MODEL, *options, "--out", "run")
    entry = json.loads((tmp_path / "run" / f"{MODEL}.json").read_text())
    assert (code, json.loads(out)) == (0, printed(entry))
    store = Store.open(tmp_path / "run")
    found = saved_passes(store.costs_of(store.units()))
    assert found.most - found.saved == entry["run"]["forward_passes"] - 1  # that of the clean image
    assert str(found) in err.splitlines()

    code, out, _ = cli("status", "run")
    assert (code, str(found) in out.splitlines()) == (0, True)
    code, out, _ = cli("status", "run", "--json")
    assert (code, json.loads(out)["saved_passes"]) == (0, {"saved": found.saved, "most": found.most})
    code, _, _ = cli("report", "run", "--no-pictures", "--quiet", "--out", "report.html")
    assert (code, str(found) in (tmp_path / "report.html").read_text()) == (0, True)


def test_logs_of_older_versions_do_not_tell(tmp_path):
    found = run(tmp_path / "run", eps=[4], limit=1, iterations=2)
    log = tmp_path / "run" / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    for record in records:
        del record["forwards"], record["most_forwards"]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert found.saved_passes() is None
    assert found.entry()["run"]["seconds"] > 0
    assert len(Store.open(found.path).costs()) == len(records)


def test_clean_images_and_a_search_for_the_smallest_radius_tell_nothing():
    clean = {"forwards": 16, "most_forwards": 16}
    assert saved_passes({}) is None
    assert saved_passes({"eps0_clean_0000": clean, "eps0_clean_0001": clean}) is None
    assert saved_passes({"eps0_clean_0000": clean, "eps4_mce_0000": {"forwards": 3, "most_forwards": 8}}) == (5, 8)


def test_only_finished_units_of_the_result_count(tmp_path):
    """A radius that is not merged, a unit that is lost, and a line of no unit say nothing of the result."""
    both = run(tmp_path / "run", eps=[4, 40], limit=2, iterations=3)
    assert both.saved_passes().most == 2 * 2 * 3 * (3 + 1 + 1)
    (tmp_path / "run" / "units" / "eps40_js_0000.parquet").unlink()
    one = run(tmp_path / "run", eps=[4], limit=2, iterations=3)
    assert one.saved_passes().most == 2 * 3 * (3 + 1 + 1)
    foreign = {"unit": "eps9_mce_0007", "images": 2, "seconds": 1, "peak_memory_bytes": 1, "device": "cpu"}
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write(json.dumps(foreign | {"forwards": 4, "most_forwards": 100000}) + "\n")
    assert one.saved_passes().most == 2 * 3 * (3 + 1 + 1)


@pytest.mark.parametrize(
    "line",
    [
        {"unit": "x"}, {"unit": None}, {"unit": 3}, {"forwards": 1e999}, {"most_forwards": 0}, {"forwards": 400},
        {"images": 0}, {"seconds": -1}, {"seconds": float("nan")},
    ],
)  # fmt: skip
def test_a_damaged_line_of_the_log_breaks_nothing(cli, tmp_path, line):
    done = run(tmp_path / "run", eps=[4], limit=2, iterations=2)
    log = tmp_path / "run" / "log.jsonl"
    before = done.saved_passes()
    last = json.loads(log.read_text().splitlines()[-1])
    log.write_text(log.read_text() + json.dumps(last | line) + "\n")
    assert done.saved_passes() == before
    assert cli("status", "run")[0] == 0
    assert cli("merge", "run")[0] == 0


def test_a_log_that_tells_of_half_the_attacks_tells_nothing():
    told, older = {"forwards": 3, "most_forwards": 8}, {"forwards": None, "most_forwards": None}
    assert saved_passes({"eps4_mce_0000": told, "eps4_js_0000": older}) is None
    assert saved_passes({"eps4_mce_0000": told, "eps4_js_0000": None}) is None
