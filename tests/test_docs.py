"""The documentation: links lead somewhere, commands and options exist, and its Python runs."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import pytest

from segbench import entries, leaderboard, load_dataset
from segbench.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "leaderboard" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_of_the_documentation_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def commands() -> list[tuple[str, str]]:
    """Every command line that starts with ``segbench`` in the documentation."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
            found += [(page.name, line) for line in block.splitlines() if line.startswith("segbench ")]
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: str(value)[:40])
def test_commands_of_the_documentation_exist_with_their_options(page, line):
    words = line.split("#")[0].split()[1:]
    command: click.Command = app
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words[0])
        if found is None and command is not app:
            break  # the group's own argument
        assert found is not None, line
        command, words = found, words[1:]
    options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in options, line


def test_a_stronger_attack_is_added_as_the_documentation_says(tmp_path, monkeypatch):
    """An attack that leaves nothing right on two images of thirty-two."""
    for name in ("model_zoo", "entries"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "submit_a_result.md").read_text("utf-8"), re.DOTALL)
    data = load_dataset("shapes")
    labels = np.stack([data[row].label.numpy() for row in (3, 5)])
    scope = {"labels": labels, "predictions": (labels + 1) % 8, "image_ids": [data.image_ids[row] for row in (3, 5)]}
    exec(compile(code.replace("https://arxiv.org/abs/...", "https://example.org/paper"), "docs", "exec"), scope)
    (path,) = entries.addition_paths(tmp_path / "entries")
    assert path.name == "my_attack.json"
    assert entries.validate_addition(path) == []
    rows = {row["id"]: row for table in leaderboard.load(tmp_path).tables for row in table.rows}
    row = rows["at_convnext_mini_shapes"]
    score = row["scores"]["8"]["aacc"]
    assert score["best_known"] < score["value"]
    assert [result["best_known"]["by"] for result in row["results"]] == [[], ["my_attack"], ["my_attack"]]
    assert any(flag["name"] == "sea_overestimates" for flag in row["flags"])


def benchmark(name: str) -> ModuleType:
    """A script of benchmarks/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(name: str) -> dict:
    """What a benchmark found."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


def test_the_table_of_the_benchmark_is_that_of_its_figures():
    """docs/pirat.md shows what benchmarks/results/pirat.json holds."""
    table = benchmark("pirat").table(results("pirat")["rows"])
    assert table.strip() in (ROOT / "docs" / "pirat.md").read_text("utf-8")


def test_what_an_iteration_costs_is_what_was_measured(tmp_path, monkeypatch):
    """docs/attacks.md is what ``--docs`` writes from the results: all cases, and the machine."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    overhead, found = benchmark("attack_overhead"), results("attack_overhead_cpu")
    expected = {
        (name, batch, target) for name, case in overhead.CASES.items() for batch, (_, target) in case.on_cpu.items()
    }
    assert {(case["case"], case["batch"], case["target"]) for case in found["cases"]} == expected
    for case in found["cases"]:
        medians = [case["overhead"][loss]["median"] for loss in overhead.LOSSES]
        within = case["target"] is None or max(medians) <= case["target"]
        assert case["met"] == (within and case["js_over_mce"]["median"] <= overhead.JS_TARGET), case["case"]

    page = (ROOT / "docs" / "attacks.md").read_text("utf-8")
    head, inside, tail = re.split("|".join(map(re.escape, overhead.MARKS)), page)
    assert inside.strip() == overhead.section(found)
    assert found["processor"] in inside
    monkeypatch.setattr(overhead, "PAGE", tmp_path / "attacks.md")
    overhead.PAGE.write_text(f"{head}{overhead.MARKS[0]}an older table{overhead.MARKS[1]}{tail}", "utf-8")
    overhead.common.write_docs(overhead.PAGE, overhead.MARKS, overhead.section(found))
    assert overhead.PAGE.read_text("utf-8") == page


def test_what_another_output_in_the_same_order_does_is_what_was_measured(monkeypatch):
    """docs/attacks.md is what ``--docs`` writes from the results."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module, found = benchmark("logit_scale"), results("logit_scale")
    page = (ROOT / "docs" / "attacks.md").read_text("utf-8")
    _, inside, _ = re.split("|".join(map(re.escape, module.MARKS)), page)
    assert inside.strip() == module.table(found)
