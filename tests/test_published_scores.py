"""The reported entries hold what was published, all of it and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from segbench import content, entries, leaderboard
from tests.conftest import GOLDEN

PUBLISHED = json.loads((GOLDEN / "published_scores.json").read_text("utf-8"))
ROWS = {row["id"]: row for row in PUBLISHED["rows"]}
PER_ATTACK = {row["id"]: row for row in PUBLISHED["per_attack_table_1"]}
ATTACKS = {"mce_bal", "mce", "js", "segpgd", "cospgd"}
METRICS = ("aacc", "miou")
FOLDERS = {"pascal_voc", "ade20k"}


def dataset_of(model_id: str) -> str:
    return "pascal_voc" if model_id.endswith("_voc") else "ade20k"


def paths() -> dict[str, Path]:
    return {path.stem: path for path in entries.entry_paths() if path.parent.name in FOLDERS}


def expected_scores(model_id: str) -> dict[float, dict[str, float | None]]:
    """ε over 255 -> scores in percent, clean ones at 0: Table 2 or 3 counts, Table 1 adds the radii that they lack."""
    found: dict[float, dict[str, float | None]] = {}
    if model_id in PER_ATTACK:
        table = PER_ATTACK[model_id]
        found[0] = dict(zip(METRICS, table["clean"], strict=True))
        found |= {row["eps_255"]: row["sea"] for row in table["rows"]}
    if model_id in ROWS:
        found |= {row["eps_255"]: {name: row[name] for name in METRICS} for row in ROWS[model_id]["results"]}
    return found


def expected_attacks(model_id: str) -> dict[float, dict[str, dict[str, float]]]:
    """ε over 255 -> attack -> scores in percent."""
    rows = PER_ATTACK[model_id]["rows"] if model_id in PER_ATTACK else []
    return {row["eps_255"]: {name: row[name] for name in row if name not in ("eps_255", "sea")} for row in rows}


def same(stated: float | None, percent: float | None) -> bool:
    if stated is None or percent is None:
        return stated is percent
    return stated == pytest.approx(percent / 100, abs=1e-12)


def test_the_golden_file_is_what_these_tests_expect_of_it() -> None:
    """Or a number could go unnoticed."""
    assert set(PUBLISHED) == {"about", "rows", "per_attack_table_1"}
    assert "Table 2 counts" in PUBLISHED["about"]
    assert len(ROWS) == len(PUBLISHED["rows"]) == 20
    assert len(PER_ATTACK) == len(PUBLISHED["per_attack_table_1"]) == 6
    for row in ROWS.values():
        assert set(row) == {"id", "dataset", "source", "results"}
        assert row["dataset"] == dataset_of(row["id"])
        assert [result["eps_255"] for result in row["results"]] == [0, 4, 8, 12]
        assert all(set(result) == {"eps_255", *METRICS} for result in row["results"])
    for row in PER_ATTACK.values():
        assert set(row) == {"id", "model", "clean", "rows"}
        assert row["model"].startswith(dataset_of(row["id"]))
        for result in row["rows"]:
            assert set(result) == {"eps_255", "sea", *ATTACKS}
            assert all(set(result[name]) == set(METRICS) for name in ("sea", *ATTACKS))


def test_every_published_model_has_an_entry_and_no_other_has() -> None:
    found = paths()
    assert set(found) == {*ROWS, *PER_ATTACK}
    for model_id, path in found.items():
        assert path.parts[-3:] == ("sea-v1", dataset_of(model_id), f"{model_id}.json")
        assert entries.read_entry(path)["dataset"]["id"] == dataset_of(model_id)


@pytest.mark.parametrize("model_id", sorted({*ROWS, *PER_ATTACK}))
def test_every_published_number_stands_in_its_entry_and_nothing_else(model_id: str) -> None:
    entry = entries.read_entry(paths()[model_id])
    wanted, attacks = expected_scores(model_id), expected_attacks(model_id)
    assert entry["clean"]["macc"] is None
    assert all(same(entry["clean"][name], wanted[0][name]) for name in METRICS)
    assert [row["strength"] for row in entry["results"]] == sorted(eps for eps in wanted if eps)
    for row in entry["results"]:
        eps = row["strength"]
        assert all(same(row[name], wanted[eps][name]) for name in METRICS), row
        assert row["miou_lower_bound"] is row["interval"] is None
        if eps not in attacks:
            assert row["per_loss"] is None
            continue
        assert set(row["per_loss"]) == ATTACKS
        for attack, scores in row["per_loss"].items():
            assert set(scores) == {*METRICS, "won_aacc", "won_miou"}
            assert scores["won_aacc"] is scores["won_miou"] is None
            assert all(same(scores[name], attacks[eps][attack][name]) for name in METRICS), (eps, attack)
    assert {row["strength"] for row in entry["results"] if row["per_loss"]} == set(attacks)


@pytest.mark.parametrize("model_id", sorted(ROWS.keys() & PER_ATTACK))
def test_where_tables_disagree_table_2_counts(model_id: str) -> None:
    entry = entries.read_entry(paths()[model_id])
    results = {0: entry["clean"], **{row["strength"]: row for row in entry["results"]}}
    for row in ROWS[model_id]["results"]:
        assert all(same(results[row["eps_255"]][name], row[name]) for name in METRICS)


def test_the_tables_do_disagree() -> None:
    """Or the test above would show nothing."""
    clean = {model_id: ROWS[model_id]["results"][0] for model_id in ROWS if model_id in PER_ATTACK}
    assert {
        model_id for model_id, row in clean.items() if [row[name] for name in METRICS] != PER_ATTACK[model_id]["clean"]
    } == {"ddcat_resnet50_voc", "pirat_convnext_t_voc"}


@pytest.mark.parametrize("model_id", sorted({*ROWS, *PER_ATTACK}))
def test_the_source_of_every_number_is_cited(model_id: str) -> None:
    entry = entries.read_entry(paths()[model_id])
    source = entry["claim"]["source"]
    if model_id in ROWS:
        assert source.startswith(ROWS[model_id]["source"])
    else:
        assert source.startswith("arXiv 2306.12941v2")
    assert ("Table 1" in source) == (model_id in PER_ATTACK)
    assert "2306.12941" in entry["paper"]["url"] or "2306.12941" in source


@pytest.mark.parametrize("model_id", sorted({*ROWS, *PER_ATTACK}))
def test_a_reported_entry_claims_no_measurement(model_id: str) -> None:
    path = paths()[model_id]
    entry = entries.read_entry(path)
    assert entry["claim"]["tier"] == "reported"
    assert entry["claim"]["submitter"] is None
    assert entry["evidence"] is entry["run"] is None
    assert entry["protocol"]["official"] is False
    assert entry["model"]["weights_sha256"] is entry["dataset"]["fingerprint"] is entry["protocol"]["digest"] is None
    assert entry["flags"] == entry["history"] == []
    assert {file.name for file in path.parent.iterdir() if file.name.startswith(f"{model_id}.")} == {path.name}


def test_best_known_of_a_reported_row_is_the_lowest_of_its_published_attacks() -> None:
    board = leaderboard.load(content.folder("entries").parent)
    rows = {row["id"]: row for table in board.tables for row in table.rows if table.dataset in FOLDERS}
    assert set(rows) == {*ROWS, *PER_ATTACK}
    for model_id, row in rows.items():
        wanted, attacks = expected_scores(model_id), expected_attacks(model_id)
        for result in row["results"]:
            _check_lowest(result, wanted[result["strength"]], attacks.get(result["strength"], {}))
        assert row["flags"] == []


def _check_lowest(
    result: Mapping[str, Any], sea: Mapping[str, float | None], attacks: Mapping[str, Mapping[str, float]]
) -> None:
    by = set()
    for name in METRICS:
        lowest = min(
            value for value in (sea[name], *(scores[name] for scores in attacks.values())) if value is not None
        )
        assert same(result["best_known"][name], lowest)
        if lowest != sea[name]:
            by |= {attack for attack, scores in attacks.items() if scores[name] == lowest}
    assert set(result["best_known"]["by"]) <= by
    assert bool(result["best_known"]["by"]) == bool(by)


def test_one_published_attack_is_below_sea() -> None:
    """SegPGD at ε = 4/255 by a tenth of a percent: the only place where best known differs from SEA."""
    board = leaderboard.load(content.folder("entries").parent)
    found = [
        (row["id"], result["strength"], result["best_known"]["by"])
        for table in board.tables
        for row in table.rows
        if row["tier"] == "reported"
        for result in row["results"]
        if result["best_known"]["by"]
    ]
    assert found == [("pirat_convnext_t_voc", 4.0, ["segpgd"])]
