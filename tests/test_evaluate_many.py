"""Several models in one call: rows as they come, failures told, nothing done twice."""

from __future__ import annotations

import json

import pytest

import segbench
from segbench.cli.evaluate import cost_text
from segbench.cli.zoo import printed
from segbench.engine.rundir.plan import plan
from segbench.errors import PreemptedError

CLEAN, AT, PIRAT = (f"{name}_convnext_mini_shapes" for name in ("clean", "at", "pirat"))
SHORT = ["--limit", "2", "--iterations", "1", "--eps", "8", "--quiet"]


@pytest.mark.slow
def test_each_model_gets_a_row_and_a_folder(cli, tmp_path):
    code, out, err = cli("evaluate", "--model", CLEAN, AT, CLEAN, *SHORT, "--out", "many")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == [AT, CLEAN]
    assert [line for line in err.splitlines() if line.startswith("Model ")] == [
        f"Model 1 of 2: {CLEAN}", f"Model 2 of 2: {AT}",
    ]  # fmt: skip
    rows = [line.split()[0] for line in out.splitlines() if line.strip().startswith((CLEAN, AT))]
    assert rows == [CLEAN, AT, CLEAN, AT]  # one by one, then the whole table
    assert err.index(f"{CLEAN}.json") < err.index("Model 2 of 2")  # the first is there before the second begins
    entries = [json.loads((tmp_path / "many" / name / f"{name}.json").read_text()) for name in (CLEAN, AT)]
    for entry in entries:
        assert f"{100 * entry['results'][0]['aacc']:.2f} / {100 * entry['results'][0]['miou']:.2f}" in out
    code, out, _ = cli("evaluate", "--model", CLEAN, AT, *SHORT, "--out", "many", "--json")
    assert json.loads(out) == list(map(printed, entries))  # and nothing was computed again


@pytest.mark.slow
def test_all_are_those_of_the_data_set(cli, tmp_path):
    code, out, _ = cli("evaluate", "--all", "--dataset", "shapes", *SHORT, "--json", "--out", "all")
    assert code == 0
    cards = [card.id for card in segbench.list_models() if card.dataset == "shapes"]
    assert [entry["model"]["id"] for entry in json.loads(out)] == cards
    assert len(cards) == 4


def test_a_model_that_fails_does_not_stop_the_others(cli, tmp_path):
    code, out, err = cli("evaluate", "--model", "nothing.json", AT, *SHORT, "--out", "many")
    assert code == 1
    assert AT in out
    assert "Traceback" not in err
    assert (
        err.strip()
        .splitlines()[-1]
        .startswith("Error: 1 of 2 models have no entry. The first is nothing.json: Cannot read the card")
    )


@pytest.mark.slow
def test_shards_of_several_models(cli):
    options = ["evaluate", "--model", CLEAN, AT, *SHORT, "--out", "many"]
    code, _, err = cli(*options, "--shard", "1/2")
    assert code == 3
    assert "2 of 2 models wait for other shards" in err
    code, out, _ = cli(*options, "--shard", "2/2", "--json")
    assert code == 0
    assert [entry["model"]["id"] for entry in json.loads(out)] == [CLEAN, AT]


def test_a_signal_stops_all(cli, monkeypatch):
    calls = []

    def preempted(*arguments, **options):
        calls.append(arguments[0])
        raise PreemptedError("Stopped by SIGTERM.")

    monkeypatch.setattr("segbench.engine.evaluate.evaluate", preempted)
    code, _, err = cli("evaluate", "--model", CLEAN, AT, *SHORT)
    assert (code, calls) == (3, [CLEAN])
    assert "Stopped by SIGTERM." in err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--all"], "--all --dataset shapes, without --model"),
        (["--all", "--dataset", "shapes", "--model", CLEAN], "--all --dataset shapes, without --model"),
        (["--all", "--dataset", "cityscapes"], "The zoo has no model for 'cityscapes'. See: segbench models"),
    ],
)
def test_what_all_needs_is_told(cli, options, text):
    code, out, err = cli("evaluate", *options)
    assert (code, out) == (2, "")
    assert text in err


COST = {
    "seconds": 7322.4, "gpu_hours": 2.034, "forward_passes": 1000, "backward_passes": 990, "images_per_second": 12.345,
    "peak_memory_bytes": 3_210_000_000, "energy_joules": 1.8e6, "device": "NVIDIA H200",
}  # fmt: skip


def test_the_cost_is_a_line():
    assert cost_text(COST) == (
        "7322 s, 2.03 GPU-hours, 1000 forward, 990 backward passes, 12.3 images per second, peak memory 3.21 GB, "
        "0.5 kWh; on NVIDIA H200"
    )
    unknown = dict.fromkeys(("seconds", "gpu_hours", "images_per_second", "peak_memory_bytes", "energy_joules"))
    assert cost_text(COST | unknown) == "1000 forward, 990 backward passes; on NVIDIA H200"


def test_the_first_radius_is_whole_before_the_second_begins():
    units = plan("sea-v1", [str(number) for number in range(40)], [4.0, 8.0], ["mce", "js"])
    radii = [unit.strength for unit in units if unit.strength not in (0, 64)]
    assert radii == sorted(radii)
    assert [unit.strength for unit in units[:4]] == [0, 0, 0, 64]
