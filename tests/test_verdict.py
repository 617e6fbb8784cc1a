"""Who may have a rank: a model that only looks robust has its scores, and a sentence in the place of a rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segbench import entries
from segbench.entries.recomputation import identity_problems
from segbench.entries.scores import recompute, reliability
from segbench.evidence import CHECK_SEARCH, CLEAN, SEARCH_EPS_255, Evidence, Group
from segbench.leaderboard import board, markdown
from segbench.leaderboard.explanations import OVERESTIMATES
from segbench.leaderboard.verdict import ALWAYS, SINCE_V2, why_unranked
from segbench.protocol import SEA_V1, SEA_V2, Protocol
from tests import samples


def flags(name: str, level: str) -> list[dict]:
    return [entries.flag("eval_mode", 0.0, "ok", ""), entries.flag(name, 1.0, level, "")]


@pytest.mark.parametrize("name", [*ALWAYS, *SINCE_V2])
def test_a_failed_check_takes_the_rank_and_says_why(name: str) -> None:
    text = why_unranked(flags(name, "warning"), "sea-v2")
    assert text == f"No rank: {({**ALWAYS, **SINCE_V2})[name]}."
    assert (why_unranked(flags(name, "warning"), "sea-v1") is not None) == (name in ALWAYS)
    for level in ("ok", "note"):
        assert why_unranked(flags(name, level), "sea-v2") is None


def test_other_warnings_and_no_flags_take_nothing() -> None:
    assert why_unranked(flags("falls_with_eps", "warning"), "sea-v2") is None
    assert why_unranked([], "sea-v2") is None
    assert OVERESTIMATES in SINCE_V2


@pytest.mark.parametrize("protocol", [SEA_V1, SEA_V2])
@pytest.mark.parametrize("failed", ["output_scale", "deterministic"])
def test_the_best_scores_have_no_rank_and_the_others_move_up(tmp_path: Path, protocol: Protocol, failed: str) -> None:
    root = samples.checkout(tmp_path / "board")
    samples.publish(root, "masked", 0.99, failed=failed, protocol=protocol)
    samples.publish(root, "good", 0.9, protocol=protocol)
    samples.publish(root, "fair", 0.5, protocol=protocol)
    (table,) = board.load(root).tables
    assert [row["id"] for row in table.rows] == ["good", "fair", "masked"]
    assert [row["unranked"] is None for row in table.rows] == [True, True, False]
    for view in ("clean", "mean", "8"):
        assert [row["scores"][view]["miou"]["rank"] for row in table.rows] == [1, 2, None]
    assert table.rows[2]["scores"]["mean"]["miou"]["value"] > table.rows[0]["scores"]["mean"]["miou"]["value"]
    text = markdown.render(board.load(root))
    assert f"`masked`: {table.rows[2]['unranked']}" in text
    assert "| – | `masked` |" in text


def test_protocols_never_share_a_table_and_the_newer_one_comes_first(tmp_path: Path) -> None:
    root = samples.checkout(tmp_path / "board")
    for protocol in (SEA_V1, SEA_V2):
        samples.publish(root, "good", 0.9, protocol=protocol)
        samples.publish(root, "other", 0.9, protocol=protocol, dataset="folder")
    tables = board.load(root).tables
    assert [(table.dataset, table.protocol) for table in tables] == [
        ("folder", "sea-v2"), ("folder", "sea-v1"), ("shapes", "sea-v2"), ("shapes", "sea-v1"),
    ]  # fmt: skip
    assert [len(table.rows) for table in tables] == [1, 1, 1, 1]


@pytest.mark.parametrize(("accuracy", "level"), [(0.95, "ok"), (0.0, "warning")])
def test_a_search_without_gradients_is_held_against_the_worst_case_of_its_images(accuracy: float, level: str) -> None:
    found = samples.make_evidence(samples.manifest("model", protocol=SEA_V2))
    search = Group(samples.IMAGE_IDS[:4], samples.counts(accuracy, 2, 4))
    found = Evidence({**found.groups, (SEARCH_EPS_255, CHECK_SEARCH): search}, found.metadata)
    scores = recompute(found, seed=0, orders=2)
    assert {row["strength"]: set(row["per_loss"]) for row in scores["results"]} == {
        eps: set(SEA_V2.losses) for eps in samples.RADII
    }
    (flag,) = (each for each in reliability(found, scores) if each["name"] == "search_is_weaker")
    worst = [
        min(int(found.groups[key].counts.correct[row]) for key in [CLEAN, *((8.0, loss) for loss in SEA_V2.losses)])
        for row in range(4)
    ]
    pixels = int(search.counts.target.sum())
    assert flag["value"] == pytest.approx((sum(worst) - int(search.counts.correct.sum())) / pixels)
    assert flag["level"] == level


@pytest.mark.parametrize("change", ["missing", "other images", "other radius", "too many images"])
def test_an_official_entry_of_sea_v2_holds_the_search(tmp_path: Path, change: str) -> None:
    path = samples.publish(samples.checkout(tmp_path / "board"), "model", protocol=SEA_V2)
    entry = entries.read_entry(path)
    found = entries.evidence_of(path, entry)
    assert identity_problems(entry, found, "evidence") == []
    groups = dict(found.groups)
    search = groups.pop((SEARCH_EPS_255, CHECK_SEARCH))
    if change == "other images":
        groups[SEARCH_EPS_255, CHECK_SEARCH] = Group(samples.IMAGE_IDS[1:5], search.counts)
    if change == "other radius":
        groups[4.0, CHECK_SEARCH] = search
    if change == "too many images":
        more = Group((*samples.IMAGE_IDS, "another"), samples.counts(0.9, 1).take(np.array([0, 1, 2, 3, 4, 5, 5])))
        groups[SEARCH_EPS_255, CHECK_SEARCH] = more
    problems = identity_problems(entry, Evidence(groups, found.metadata), "evidence")
    assert any("search without gradients" in text for text in problems)
