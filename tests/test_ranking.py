"""Ranks against a naive implementation, the paired bootstrap, and the rows that are ranked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segbench import entries, leaderboard
from segbench.counts import Counts
from segbench.ensemble import bootstrap, bootstrap_intervals, interval, significantly_above
from segbench.errors import ContentError
from segbench.leaderboard import assessment
from segbench.leaderboard.board import tidy
from segbench.leaderboard.ranking import Contender, ranks
from tests import samples

REPLICATES = 40


def naive(contenders: list[Contender]) -> list[int | None]:
    """One more than the number of those that are surely better, pair by pair."""

    def images(each: Contender) -> str | None:
        return each.images if each.replicates is not None and each.measured else None  # a reported one has none

    def surely_better(other: Contender, one: Contender) -> bool:
        assert other.value is not None
        assert one.value is not None
        mine, theirs = round(one.value, 9), round(other.value, 9)
        if theirs < mine or (theirs == mine and not (other.measured and not one.measured)):
            return False
        if images(one) is None or images(one) != images(other):
            return True
        assert one.replicates is not None
        assert other.replicates is not None
        wins = sum(bool(a > b) for a, b in zip(other.replicates, one.replicates, strict=True))
        return wins >= 0.975 * len(one.replicates)

    scored = [one for one in contenders if one.value is not None]
    counted = {id(one): 1 + sum(surely_better(other, one) for other in scored if other is not one) for one in scored}

    def stands(one: Contender) -> tuple[float, bool]:
        return (round(one.value or 0.0, 9), one.measured)

    return [
        None
        if one.value is None
        else max(counted[id(other)] for other in scored if other is one or stands(other) > stands(one))
        for one in contenders
    ]


@st.composite
def contender(draw: st.DrawFn) -> Contender:
    """Values on a coarse grid, so that ties are many; replicates around them, by little or by much."""
    value = draw(st.none() | st.sampled_from([0.0, 0.1, 0.11, 0.12, 0.2, 0.3, 0.1 + 0.2, 1.0]))
    measured = draw(st.booleans())
    images = draw(st.none() | st.sampled_from(["one", "two"]))
    replicates = None
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        spread = draw(st.sampled_from([0.0, 0.005, 0.02, 0.2]))
        replicates = ((value or 0.0) + spread * rng.standard_normal(REPLICATES)).astype(np.float32)
    return Contender(value, replicates, images, measured)


lists = st.lists(contender(), max_size=9)


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(lists)
def test_ranks_are_those_of_the_naive_implementation(contenders: list[Contender]) -> None:
    assert ranks(contenders) == naive(contenders)


@settings(deadline=None, max_examples=80)
@given(lists, st.randoms(use_true_random=False))
def test_ranks_do_not_depend_on_the_order(contenders: list[Contender], random: Any) -> None:
    order = list(range(len(contenders)))
    random.shuffle(order)
    found = ranks(contenders)
    assert ranks([contenders[place] for place in order]) == [found[place] for place in order]


@settings(deadline=None, max_examples=80)
@given(lists)
def test_the_best_score_has_rank_1_and_no_rank_is_above_the_number_of_scores(contenders: list[Contender]) -> None:
    found = [rank for rank in ranks(contenders) if rank is not None]
    assert len(found) == sum(each.value is not None for each in contenders)
    assert all(1 <= rank <= len(found) for rank in found)
    assert 1 in found or not found


def plain(*values: float | None, measured: bool = True) -> list[Contender]:
    return [Contender(value, None, None, measured) for value in values]


def test_without_replicates_ranks_are_those_of_sports() -> None:
    assert ranks(plain(0.3, 0.5, 0.5, 0.1, None, 0.0)) == [3, 1, 1, 4, None, 5]
    assert ranks([]) == []
    assert ranks(plain(None)) == [None]


def test_a_reported_score_is_below_an_equal_measured_one_but_above_a_lower_one() -> None:
    measured, reported = plain(0.5, 0.4), plain(0.5, 0.45, measured=False)
    assert ranks([*measured, *reported]) == [1, 4, 2, 3]
    assert ranks([*reported, *measured]) == [2, 3, 1, 4]


def test_equal_means_that_differ_in_the_last_bit_share_a_rank() -> None:
    assert 0.1 + 0.2 != 0.3
    assert ranks(plain(0.1 + 0.2, 0.3)) == [1, 1]
    assert ranks(plain(0.3 + 2e-9, 0.3)) == [1, 2]


def paired(value: float, offset: np.ndarray, images: str | None = "same") -> Contender:
    return Contender(value, (value + offset).astype(np.float32), images, True)


def test_a_difference_that_holds_in_every_sample_counts_however_wide_the_intervals() -> None:
    """Paired: both rise and fall together."""
    noise = np.random.default_rng(0).normal(0, 0.1, 1000)
    assert ranks([paired(0.50, noise), paired(0.51, noise)]) == [2, 1]


def test_a_difference_that_may_be_chance_shares_the_rank() -> None:
    rng = np.random.default_rng(0)
    noise, other = rng.normal(0, 0.1, 1000), rng.normal(0, 0.1, 1000)
    assert ranks([paired(0.50, noise), paired(0.51, other)]) == [1, 1]
    assert ranks([paired(0.50, noise, "here"), paired(0.51, other, "there")]) == [2, 1]
    assert ranks([paired(0.50, noise, None), paired(0.51, other, None)]) == [2, 1]


@pytest.mark.parametrize(("wins", "rank"), [(974, 1), (975, 2), (1000, 2)])
def test_beyond_doubt_is_975_of_1000_samples(wins: int, rank: int) -> None:
    signs = np.where(np.arange(1000) < wins, 0.1, -0.1)
    low = Contender(0.5, np.full(1000, 0.5, np.float32), "same", True)
    high = Contender(0.6, (0.5 + signs).astype(np.float32), "same", True)
    assert ranks([low, high]) == [rank, 1]


def test_several_share_a_rank_and_the_next_one_counts_who_is_surely_better() -> None:
    step = np.where(np.arange(1000) < 900, 0.01, -0.01)
    flat = np.full(1000, 0.5)
    contenders = [
        Contender(value, replicates.astype(np.float32), "same", True)
        for value, replicates in ((0.53, flat + 0.02), (0.52, flat + step), (0.50, flat), (0.4, flat - 0.1))
    ]
    assert ranks(contenders) == [1, 2, 2, 4]
    assert ranks(contenders[1:3]) == [1, 1]
    # The first is surely above the third; the second is surely neither below the one nor above the other.
    wide = np.where(np.arange(1000) < 500, 0.05, -0.05)
    middle = Contender(0.51, (flat + wide).astype(np.float32), "same", True)
    assert ranks([contenders[0], middle, contenders[2]]) == [1, 1, 2]


# The bootstrap.


def random_counts(seed: int, images: int = 12) -> Counts:
    return samples.counts(0.6, seed, images)


def draws(n: int, seed: int, resamples: int = 1000) -> np.ndarray:
    """How often each image is in each sample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def test_the_bootstrap_scores_resampled_images() -> None:
    """Each replicate is the score of a data set in which images are repeated or missing."""
    one, other = random_counts(1, 6), random_counts(2, 6)
    found = bootstrap(one, other, seed=3, resamples=50)
    for row, times in enumerate(draws(6, 3, 50)):
        images = np.repeat(np.arange(6), times)
        assert found.aacc[row] == pytest.approx(one.take(images).aacc(), abs=1e-12)
        assert found.miou[row] == pytest.approx(other.take(images).miou(), abs=1e-12)


def test_the_same_number_of_images_and_seed_give_the_same_samples() -> None:
    """That is what makes two models comparable sample by sample."""
    shares = np.linspace(0.1, 0.9, 6)
    right, zero, valid = np.round(1000 * shares).astype(np.int64), np.zeros(6, np.int64), np.full(6, 1000)
    counts = Counts(*(np.stack(pair, axis=1) for pair in ((right, zero), (right, valid - right), (valid, zero))))
    found = bootstrap(counts, counts, seed=5)
    assert found.aacc == pytest.approx(draws(6, 5) @ right / 6000, abs=1e-12)
    assert not np.array_equal(bootstrap(counts, counts, seed=6).aacc, found.aacc)


def test_a_model_is_not_better_than_itself() -> None:
    found = bootstrap(random_counts(1, 6), random_counts(1, 6))
    assert significantly_above(found.miou, found.miou[None]).tolist() == [False]
    assert significantly_above(found.aacc, found.aacc[None]).tolist() == [False]


def test_a_model_that_is_better_on_every_image_is_better_beyond_doubt() -> None:
    low, high = random_counts(1, 6), samples.counts(0.9, 1, 6)
    assert (high.correct > low.correct).all()
    one, other = bootstrap(low, low), bootstrap(high, high)
    assert significantly_above(one.aacc, other.aacc[None]).tolist() == [True]
    assert significantly_above(other.aacc, one.aacc[None]).tolist() == [False]


def test_better_compares_with_each_of_many() -> None:
    one = np.linspace(0, 1, 1000)
    others = np.stack([one + 0.1, one, one - 0.1, np.where(np.arange(1000) < 975, one + 0.1, one - 0.1)])
    assert significantly_above(one, others).tolist() == [True, False, False, True]


def test_intervals_are_quantiles_of_the_replicates() -> None:
    values = np.arange(1001) / 1000
    assert interval(values) == pytest.approx((0.025, 0.975))
    assert interval(values, 0.5) == pytest.approx((0.25, 0.75))
    one, other = random_counts(1, 6), random_counts(2, 6)
    found, intervals = bootstrap(one, other, seed=7), bootstrap_intervals(one, other, seed=7)
    assert intervals.aacc == interval(found.aacc)
    assert intervals.miou == interval(found.miou)


# The rows.

QUALITIES = {"d_shapes": 0.3, "a_shapes": 0.9, "c_shapes": 0.5, "b_shapes": 0.88}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = samples.checkout(tmp_path / "checkout")
    for model_id, quality in QUALITIES.items():
        samples.publish(root, model_id, quality)
    return root


def edit(root: Path, model_id: str, change: Any) -> None:
    path = root / "entries" / "sea-v1" / "shapes" / f"{model_id}.json"
    entry = json.loads(path.read_text("utf-8"))
    change(entry)
    samples.write_json(path, entry)


def reported(entry: dict[str, Any]) -> None:
    entry |= {"evidence": None, "run": None, "flags": []}
    entry["claim"] |= {"tier": "reported", "source": "A paper, Table 1"}


def table(root: Path) -> leaderboard.Table:
    (found,) = leaderboard.load(root).tables
    return found


def mean(row: dict[str, Any]) -> float:
    return float(np.mean([result["miou"] for result in row["results"] if result["strength"] in samples.RADII]))


def test_rows_are_sorted_by_the_mean_over_the_radii_and_carry_their_scores(root: Path) -> None:
    found = table(root)
    assert (found.dataset, found.protocol) == ("shapes", "sea-v1")
    assert found.views == ["clean", "mean", "4", "8", "12"]
    assert found.radii == list(samples.RADII)
    means = {row["id"]: mean(row) for row in found.rows}
    assert [row["id"] for row in found.rows] == sorted(means, key=lambda model_id: -means[model_id])
    for row in found.rows:
        entry = entries.read_entry(root / row["entry_file"])
        assert row["scores"]["mean"]["miou"]["value"] == pytest.approx(means[row["id"]], abs=1e-12)
        assert row["scores"]["clean"]["aacc"]["value"] == entry["clean"]["aacc"]
        for result in entry["results"]:
            for metric in ("aacc", "miou"):
                score = row["scores"][f"{result['strength']:g}"][metric]
                assert (score["value"], score["interval"]) == (result[metric], result["interval"][metric])
                assert score["best_known"] == result[metric]


def test_ranks_of_rows_are_those_of_their_replicates(root: Path) -> None:
    """Made again from the evidence, without the board's own steps."""
    found = table(root)
    paths = [root / row["entry_file"] for row in found.rows]
    assessed = [assessment.assess(path)[1] for path in paths]
    for view in found.views:
        for metric in ("aacc", "miou"):
            contenders = []
            for row, each in zip(found.rows, assessed, strict=True):
                assert each is not None
                names = ["4", "8", "12"] if view == "mean" else [view]
                samples_of = np.mean([each.replicates[name][metric] for name in names], axis=0)
                contenders.append(Contender(row["scores"][view][metric]["value"], samples_of, each.images, True))
            assert [row["scores"][view][metric]["rank"] for row in found.rows] == naive(contenders), (view, metric)


def test_entries_that_chance_cannot_tell_apart_share_a_rank(root: Path) -> None:
    samples.publish(root, "e_shapes", QUALITIES["a_shapes"])  # the same counts under another name
    rows = {row["id"]: row["scores"]["mean"]["miou"]["rank"] for row in table(root).rows}
    assert rows["a_shapes"] == rows["e_shapes"] == 1
    assert rows["d_shapes"] > rows["a_shapes"]


def test_a_reported_entry_stands_below_its_measured_equal(root: Path) -> None:
    samples.publish(root, "0_shapes", QUALITIES["a_shapes"])
    edit(root, "0_shapes", reported)
    rows = table(root).rows
    assert [row["id"] for row in rows][:2] == ["a_shapes", "0_shapes"]
    assert [row["scores"]["mean"]["miou"]["rank"] for row in rows][:2] == [1, 2]
    assert [row["tier"] for row in rows][:2] == ["checked", "reported"]
    assert rows[1]["detail"] is rows[1]["evidence_file"] is None
    assert (rows[1]["source"], rows[1]["flags"]) == ("A paper, Table 1", [])


def test_best_known_of_a_reported_row_names_only_who_holds_the_lowest_score(root: Path) -> None:
    edit(root, "a_shapes", reported)

    def attacks(entry: dict[str, Any]) -> None:
        sea = {metric: entry["results"][0][metric] for metric in ("aacc", "miou")}
        none = {"won_aacc": None, "won_miou": None}
        entry["results"][0]["per_loss"] = {
            "near": {metric: value - 0.01 for metric, value in sea.items()} | none,
            "nearest": {metric: value - 0.02 for metric, value in sea.items()} | none,
        }

    edit(root, "a_shapes", attacks)
    (row,) = (row for row in table(root).rows if row["id"] == "a_shapes")
    result = row["results"][0]
    assert result["best_known"]["aacc"] == result["aacc"] - 0.02
    assert result["best_known"]["by"] == ["nearest"]


@pytest.mark.parametrize("measured", [True, False])
def test_the_mean_needs_every_radius_of_the_protocol(root: Path, measured: bool) -> None:
    edit(root, "a_shapes", lambda entry: entry["results"].pop())
    if not measured:
        edit(root, "a_shapes", reported)
    found = table(root)
    rows = {row["id"]: row for row in found.rows}
    assert found.rows[-1]["id"] == "a_shapes"
    assert rows["a_shapes"]["scores"]["mean"] is None
    assert rows["a_shapes"]["scores"]["12"] is None
    assert rows["a_shapes"]["scores"]["4"]["miou"]["rank"] == 1
    assert {row["scores"]["mean"]["miou"]["rank"] for row in found.rows[:-1]} <= {1, 2, 3}


def test_other_radii_are_views_of_their_own_and_no_part_of_the_mean(root: Path) -> None:
    def add(entry: dict[str, Any]) -> None:
        reported(entry)
        row = dict(entry["results"][0], strength=0.25, interval=None, per_loss=None)
        entry["results"].insert(0, row)

    before = {row["id"]: row["scores"]["mean"]["miou"]["value"] for row in table(root).rows}
    edit(root, "a_shapes", add)
    found = table(root)
    assert found.views == ["clean", "mean", "0.25", "4", "8", "12"]
    assert {row["id"]: row["scores"]["mean"]["miou"]["value"] for row in found.rows} == pytest.approx(before)
    rows = {row["id"]: row for row in found.rows}
    assert rows["b_shapes"]["scores"]["0.25"] is None
    assert rows["a_shapes"]["scores"]["0.25"]["miou"]["rank"] == 1


def test_a_score_that_nobody_published_has_no_rank(root: Path) -> None:
    edit(root, "a_shapes", reported)
    edit(root, "a_shapes", lambda entry: entry["clean"].update(aacc=None))
    rows = {row["id"]: row for row in table(root).rows}
    assert rows["a_shapes"]["scores"]["clean"]["aacc"] is None
    assert rows["a_shapes"]["scores"]["clean"]["miou"]["rank"] == 1
    assert rows["b_shapes"]["scores"]["clean"]["aacc"]["rank"] == 1


def test_tables_are_sorted_by_data_set(root: Path) -> None:
    samples.publish(root, "a_camvid", dataset="camvid")
    assert [each.dataset for each in leaderboard.load(root).tables] == ["camvid", "shapes"]


def test_text_of_strangers_is_tidied_and_line_breaks_stay() -> None:
    hostile = {"a\u200b": ["\x1b[31mred", "x\u202ey", "two\nlines", "\x00", "é ✓ 猫", 1, None, 0.5, True, {"b": "\r"}]}
    assert tidy(hostile) == {"a": ["[31mred", "xy", "two\nlines", "", "é ✓ 猫", 1, None, 0.5, True, {"b": ""}]}


def test_rows_hold_no_control_characters(root: Path) -> None:
    card = root / "model_zoo" / "shapes" / "a_shapes.json"
    samples.write_json(
        card, json.loads(card.read_text("utf-8")) | {"title": "\x1b[31m\u202eevil", "backbone": "\u2066x"}
    )
    rows = {row["id"]: row for row in table(root).rows}
    assert (rows["a_shapes"]["title"], rows["a_shapes"]["backbone"]) == ("[31mevil", "x")
    text = json.dumps(leaderboard.document(leaderboard.load(root)), ensure_ascii=False)
    assert all(char.isprintable() for char in text)


# Many entries.


Assessed = tuple[dict[str, Any], assessment.Assessment | None]


def same(one: Assessed, other: Assessed) -> bool:
    (entry, mine), (other_entry, theirs) = one, other
    if mine is None or theirs is None:
        return mine is theirs and entry == other_entry
    return (
        (entry, mine.images, mine.best_known, mine.detail)
        == (other_entry, theirs.images, theirs.best_known, theirs.detail)
        and mine.replicates.keys() == theirs.replicates.keys()
        and all(
            np.array_equal(mine.replicates[view][metric], theirs.replicates[view][metric])
            for view in mine.replicates
            for metric in ("aacc", "miou")
        )
    )


@pytest.mark.slow
def test_many_entries_are_assessed_by_several_processes_with_the_same_result(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(root, "c_shapes", reported)
    paths = entries.entry_paths(root / "entries")
    alone = assessment.assess_all(paths)
    before = leaderboard.document(leaderboard.load(root))
    assert [found is None for _, found in alone] == [path.stem == "c_shapes" for path in paths]
    monkeypatch.setattr(assessment, "SIDE_BY_SIDE", 1)
    monkeypatch.setattr(assessment, "assess", _only_elsewhere)
    together = assessment.assess_all(paths, 2)
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))
    assert leaderboard.document(leaderboard.load(root, processes=2)) == before


def _only_elsewhere(path: Path) -> Assessed:
    """`assess`, but not in the process that patched it."""
    assert assessment.SIDE_BY_SIDE != 1
    return assessment.assess(path)


@pytest.mark.slow
def test_damage_in_another_process_is_told_as_ever(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assessment, "SIDE_BY_SIDE", 1)
    (root / "entries" / "sea-v1" / "shapes" / "b_shapes.parquet").write_bytes(b"PAR1")
    with pytest.raises(ContentError, match=r"b_shapes\.parquet: the evidence was changed"):
        leaderboard.load(root, processes=2)
