"""`segbench attack compare` with several numbers of iterations and seeds."""

from __future__ import annotations

import json
import statistics

import pytest

from segbench.engine.launch.options import RunOptions
from segbench.engine.studies.compare import compare
from segbench.engine.studies.sweep import sweep
from segbench.errors import ShardDoneError, UsageError
from tests.runs import MODEL

pytestmark = pytest.mark.slow

QUIET = RunOptions(progress=False)
OPTIONS = {"eps": 8, "limit": 3, "options": QUIET}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "run"
    return sweep(MODEL, ["mce", "js"], iterations=[20, 3], seeds=[225, 226], out=out, **OPTIONS)


def test_each_comparison_is_the_one_that_is_made_by_itself(small, tmp_path):
    alone = compare(MODEL, ["mce", "js"], iterations=3, seed=226, out=tmp_path / "run", **OPTIONS)
    rows = [row for row in small.rows if (row["iterations"], row["seed"]) == (3, 226)]
    costs = ("seconds", "iterations", "seed")
    assert [{k: v for k, v in row.items() if k not in costs} for row in rows] == [
        {k: v for k, v in row.items() if k not in costs} for row in alone.rows
    ]
    ours = (small.path / "iterations3_seed226" / "comparison.parquet").read_bytes()
    assert ours == (alone.path / "comparison.parquet").read_bytes()


def test_the_summary_is_over_the_seeds(small):
    assert [(row["attack"], row["iterations"]) for row in small.summary if row["eps_255"]] == [
        (attack, number) for number in (3, 20) for attack in ("mce", "js", "all")
    ]
    for line in small.summary:
        key = ("eps_255", "attack", "iterations")
        values = [row["aacc"] for row in small.rows if all(row[name] == line[name] for name in key)]
        assert line["seeds"] == len(values) == 2
        assert line["aacc"] == pytest.approx(sum(values) / 2)
        assert line["aacc_std"] == pytest.approx(statistics.stdev(values))
        assert line["aacc_range"] == [min(values), max(values)]
        assert (line["aacc_std"] == 0) == (line["eps_255"] == 0)
    few, many = (row["aacc"] for row in small.summary if row["attack"] == "all")
    assert many < few
    assert json.loads((small.path / "sweep.json").read_text()) == small.document()


def test_it_goes_on_where_it_stopped(small):
    before = {file: file.stat().st_mtime_ns for file in small.path.glob("*/units/*")}
    again = sweep(MODEL, ["mce", "js"], iterations=[3, 20], seeds=[225, 226], out=small.path, **OPTIONS)
    assert again.summary == small.summary
    assert {file: file.stat().st_mtime_ns for file in small.path.glob("*/units/*")} == before


def test_a_shard_does_its_part_of_each(tmp_path):
    options = OPTIONS | {"limit": 2}
    arguments = {"iterations": [2, 3], "seeds": [1], "out": tmp_path / "run"}
    with pytest.raises(ShardDoneError, match=r"Shard 2/2 is done"):
        sweep(MODEL, ["mce"], **arguments, **(options | {"options": RunOptions(progress=False, shard="2/2")}))
    done = [len(list((tmp_path / "run" / f"iterations{n}_seed1" / "units").iterdir())) for n in (2, 3)]
    assert done == [1, 1]
    found = sweep(MODEL, ["mce"], **arguments, **(options | {"options": RunOptions(progress=False, shard="1/2")}))
    assert len(found.summary) == 4


def test_status_knows_a_sweep(small, cli):
    code, out, _ = cli("status", str(small.path))
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines() if "iterations" in line] == [
        [f"iterations{number}_seed{seed}", "3"] for number in (20, 3) for seed in (225, 226)
    ]
    assert set(json.loads(cli("status", str(small.path), "--json")[1])) == {
        each.name for each in small.path.glob("it*")
    }


def test_nothing_to_sweep_is_told():
    with pytest.raises(UsageError, match="at least one number of iterations and one seed"):
        sweep(MODEL, ["mce"], iterations=[], seeds=[1])


def test_the_command_prints_mean_spread_and_range(cli):
    options = ["--model", MODEL, "--eps", "8", "--limit", "2", "--quiet", "--attacks", "mce"]
    code, out, err = cli("attack", "compare", *options, "--iterations", "2", "3", "--seeds", "2")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines() if line.strip().startswith("8/255")]
    assert [line[1:4] for line in lines] == [["mce", "2", "2"], ["mce", "3", "2"]]
    assert "sweep.json" in err
    code, out, _ = cli("attack", "compare", *options, "--iterations", "2", "3", "--seeds", "2", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["iterations"], document["seeds"]) == ([2, 3], [225, 226])
    code, out, _ = cli("attack", "compare", *options, "--iterations", "2", "--schedule", "--out", "one")
    assert code == 2  # three restarts need three iterations
    code, out, err = cli("attack", "compare", *options, "--iterations", "3", "--schedule", "--out", "one")
    assert code == 0, err
    assert [line.split()[1] for line in out.splitlines() if line.strip().startswith("8/255")] == [
        "mce_const", "mce_3x100", "mce", "all",
    ]  # fmt: skip
