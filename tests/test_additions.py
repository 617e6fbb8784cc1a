"""External evaluations and reproductions beside an entry: what they give, and that every forgery is named."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segbench import entries, evidence, leaderboard, schemas
from segbench.counts import Counts
from segbench.entries import additions
from segbench.entries.reading import MAX_EVIDENCE_BYTES
from segbench.errors import ContentError, UsageError
from segbench.evidence import CHECK_LOSS, CLEAN, Evidence, Group, Key
from segbench.files import sha256_bytes
from segbench.protocol import LINF, TOLERANCES, Tolerance
from tests import samples

MODEL, OTHER = "at_convnext_mini_shapes", "clean_convnext_mini_shapes"
TOLERANCE = TOLERANCES["sea-v1"]
ROUNDING = 1e-12


@pytest.fixture
def entry_path(tmp_path: Path) -> Path:
    return samples.publish(samples.checkout(tmp_path / "checkout"), MODEL)


def stored(entry_path: Path) -> Evidence:
    return evidence.from_bytes(entry_path.with_suffix(".parquet").read_bytes(), source="f")


def problems(path: Path) -> list[str]:
    found = entries.validate_addition(path)
    assert all(text.startswith(f"{path}: ") for text in found)
    return found


# Counts of a pixel or two: rows are images, columns classes.


def two_classes(right: Sequence[tuple[int, int]], pixels: int = 10) -> Counts:
    """Images of ``pixels`` pixels of each of two classes, of which so many are right; the rest is the other class."""
    hits = np.array(right)
    target = np.full(hits.shape, pixels)
    return Counts(hits, hits + (target - hits)[:, ::-1], target)


def ids(number: int) -> tuple[str, ...]:
    return tuple(f"image_{row}" for row in range(number))


def found_evidence(groups: Mapping[Key, Counts], images: tuple[str, ...] | None = None) -> Evidence:
    return Evidence(
        {key: Group(images or ids(each.num_images), each) for key, each in groups.items()}, {"num_classes": 2}
    )


# Candidates.


def test_images_that_were_not_attacked_keep_their_clean_counts() -> None:
    clean = two_classes([(10, 9), (8, 7), (6, 5)])
    attack = two_classes([(1, 2), (3, 4)])
    external = Evidence({(8.0, "square"): Group(("image_2", "image_0"), attack)}, {"num_classes": 2})
    found = additions.candidates(found_evidence({CLEAN: clean}), external)
    assert set(found) == {(8.0, "square")}
    expected = two_classes([(3, 4), (8, 7), (1, 2)])
    for array, wanted in zip(found[8.0, "square"], expected, strict=True):
        assert np.array_equal(array, wanted)


def test_making_candidates_changes_no_stored_count() -> None:
    clean = two_classes([(10, 9), (8, 7)])
    before = [array.copy() for array in clean]
    external = Evidence({(8.0, "square"): Group(("image_1",), two_classes([(0, 0)]))}, {"num_classes": 2})
    additions.candidates(found_evidence({CLEAN: clean}), external)
    assert all(np.array_equal(array, old) for array, old in zip(clean, before, strict=True))


def test_clean_images_of_an_external_evaluation_are_no_candidate() -> None:
    clean = two_classes([(10, 9)])
    external = found_evidence({CLEAN: two_classes([(0, 0)]), (8.0, "square"): two_classes([(5, 5)])})
    assert set(additions.candidates(found_evidence({CLEAN: clean}), external)) == {(8.0, "square")}


def test_unknown_images_and_other_labels_are_refused() -> None:
    clean = found_evidence({CLEAN: two_classes([(10, 9)])})
    unknown = Evidence({(8.0, "square"): Group(("another",), two_classes([(5, 5)]))}, {})
    with pytest.raises(ContentError, match="holds the image 'another', which the entry's evidence does not"):
        additions.candidates(clean, unknown)
    relabelled = found_evidence({(8.0, "square"): two_classes([(5, 5)], pixels=11)})
    with pytest.raises(ContentError, match=r"labels at ε = 8/255, square are not those of the entry's evidence"):
        additions.candidates(clean, relabelled)


# Best known.


def random_attack(rng: np.random.Generator, clean: Counts) -> Counts:
    """Other predictions of the same pixels: each class loses some to a class next to it."""
    lost = rng.binomial(clean.target, rng.random(clean.target.shape) ** 2)
    return Counts(clean.target - lost, clean.target - lost + np.roll(lost, 1, axis=1), clean.target)


def random_case(seed: int) -> tuple[Evidence, list[tuple[str, Evidence]], list[dict[str, Any]]]:
    """3 images of 3 classes: the clean image, 1 or 2 attacks of the entry, 1 or 2 external evaluations of subsets."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 8, (3, 3))
    target[:, 0] += 1
    perfect = Counts(target, target, target)
    clean = random_attack(rng, perfect)
    own = {(8.0, f"own{row}"): random_attack(rng, perfect) for row in range(rng.integers(1, 3))}
    found = found_evidence({CLEAN: clean, **own, (64.0, CHECK_LOSS): Counts(*(np.zeros_like(target),) * 2, target)})
    externals = []
    for name in ("first", "second")[: rng.integers(1, 3)]:
        rows = np.sort(rng.permutation(3)[: rng.integers(1, 4)])
        group = Group(tuple(f"image_{row}" for row in rows), random_attack(rng, perfect).take(rows))
        externals.append((name, Evidence({(8.0, "attack"): group}, {"num_classes": 3})))
    scores = [clean, *own.values()]
    result = {
        "strength": 8.0,
        "aacc": min(aacc for aacc, _ in every_choice(scores)),
        "miou": min(miou for _, miou in every_choice(scores)),
    }
    return found, externals, [result]


def every_choice(candidates: Sequence[Counts]) -> list[tuple[float, float]]:
    """(aAcc, mIoU) of every choice of one candidate for each image, with Python's own numbers."""
    scores = []
    for choice in itertools.product(candidates, repeat=candidates[0].num_images):
        rows = [[array[row].tolist() for array in each] for row, each in enumerate(choice)]
        inter, predicted, target = ([sum(c) for c in zip(*(r[part] for r in rows), strict=True)] for part in range(3))
        ious = [i / (p + t - i) for i, p, t in zip(inter, predicted, target, strict=True) if p + t - i]
        scores.append((sum(inter) / max(sum(target), 1), sum(ious) / max(len(ious), 1)))
    return scores


def completed(found: Evidence, external: Evidence) -> list[Counts]:
    """The external attacks, clean counts where there is none: row by row, unlike the code."""
    clean = found.groups[CLEAN]
    result = []
    for group in external.groups.values():
        parts = []
        for row, image_id in enumerate(clean.image_ids):
            source = group.counts if image_id in group.image_ids else clean.counts
            place = group.image_ids.index(image_id) if image_id in group.image_ids else row
            parts.append([array[place] for array in source])
        result.append(Counts(*(np.stack(arrays) for arrays in zip(*parts, strict=True))))
    return result


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1))
def test_best_known_is_the_lowest_of_all_choices(seed: int) -> None:
    """Exactly for aAcc; for mIoU never below the lowest nor above SEA's own."""
    found, externals, results = random_case(seed)
    (known,) = additions.best_known(found, externals, results, (0, 8))
    own = [group.counts for key, group in found.groups.items() if key[1] != CHECK_LOSS]
    both = [*own, *(counts for _, external in externals for counts in completed(found, external))]
    scores = every_choice(both)
    assert known["aacc"] == pytest.approx(min(aacc for aacc, _ in scores), abs=ROUNDING)
    lowest = min(miou for _, miou in scores)
    assert lowest - ROUNDING <= known["miou"] <= results[0]["miou"]
    lowered = known["aacc"] < results[0]["aacc"] - ROUNDING or known["miou"] < results[0]["miou"] - ROUNDING
    assert not lowered or known["by"]
    assert set(known["by"]) <= {name for name, _ in externals}


def test_the_search_for_the_lowest_miou_nearly_always_finds_it() -> None:
    exact = 0
    for seed in range(100):
        found, externals, results = random_case(seed)
        (known,) = additions.best_known(found, externals, results, (0, 8))
        own = [group.counts for key, group in found.groups.items() if key[1] != CHECK_LOSS]
        both = [*own, *(counts for _, external in externals for counts in completed(found, external))]
        exact += known["miou"] <= min(miou for _, miou in every_choice(both)) + ROUNDING
    assert exact >= 97


def own_and(*externals: tuple[str, Counts], eps: float = 8.0) -> dict[str, Any]:
    """Best known of 5 images that are all right under SEA, with external attacks on all of them."""
    clean = two_classes([(10, 10)] * 5)
    found = found_evidence({CLEAN: clean, (8.0, "js"): clean})
    sets = [(name, found_evidence({(eps, "attack"): counts})) for name, counts in externals]
    (known,) = additions.best_known(found, sets, [{"strength": 8.0, "aacc": 1.0, "miou": 1.0}], (0, 8))
    return known


WHOLE, NONE = (10, 10), (0, 0)


def test_without_external_evaluations_best_known_is_the_result_itself() -> None:
    assert own_and() == {"aacc": 1.0, "miou": 1.0, "by": []}


def test_an_external_attack_at_another_radius_counts_for_nothing() -> None:
    assert own_and(("far", two_classes([NONE] * 5)), eps=9.0) == {"aacc": 1.0, "miou": 1.0, "by": []}


def test_an_external_attack_that_finds_nothing_is_not_named() -> None:
    assert own_and(("same", two_classes([WHOLE] * 5))) == {"aacc": 1.0, "miou": 1.0, "by": []}


def test_by_names_the_attack_that_lowered_a_score() -> None:
    """One of two images of five all wrong: 2 of 5 images lose all."""
    found = own_and(("weak", two_classes([WHOLE] * 5)), ("strong", two_classes([NONE, NONE, WHOLE, WHOLE, WHOLE])))
    assert found == {"aacc": 0.6, "miou": pytest.approx(30 / 70), "by": ["strong"]}


def test_by_names_both_where_each_lowered_other_images() -> None:
    found = own_and(
        ("one", two_classes([NONE, WHOLE, WHOLE, WHOLE, WHOLE])),
        ("two", two_classes([WHOLE, NONE, WHOLE, WHOLE, WHOLE])),
    )
    assert found == {"aacc": 0.6, "miou": pytest.approx(30 / 70), "by": ["one", "two"]}


def test_of_two_equal_attacks_the_first_is_named() -> None:
    both = two_classes([NONE, WHOLE, WHOLE, WHOLE, WHOLE])
    assert own_and(("one", both), ("two", both))["by"] == ["one"]


def test_by_does_not_name_an_attack_that_others_beat_on_every_image() -> None:
    """`middle` alone is the lowest of the three, so the search starts from it, and changes each image that differs."""
    found = own_and(
        ("left", two_classes([WHOLE, NONE, NONE, WHOLE, WHOLE])),
        ("middle", two_classes([WHOLE, (4, 4), (4, 4), (4, 4), (4, 4)])),
        ("right", two_classes([WHOLE, WHOLE, WHOLE, NONE, NONE])),
    )
    assert (found["aacc"], found["miou"]) == (0.2, pytest.approx(10 / 90))
    assert found["by"] == ["left", "right"]


@pytest.mark.parametrize(
    ("aacc", "miou", "said"),
    [(0.0, 0.0, False), (0.9, 0.9, False), (1.1, 0.0, True), (0.0, 1.1, True), (1.1, 1.1, True), (-1, -1, False)],
)
def test_sea_overestimates_beyond_the_tolerance_of_the_protocol_only(aacc: float, miou: float, said: bool) -> None:
    result = {"aacc": 0.5, "miou": 0.25}
    known = {"aacc": 0.5 - aacc * TOLERANCE.worst_case, "miou": 0.25 - miou * TOLERANCE.worst_case}
    assert additions.overestimates(result, known, "sea-v1") is said


def test_a_difference_of_just_the_tolerance_is_within_it() -> None:
    """0.005 and 0 are exact enough: their difference is the tolerance itself."""
    just = {"aacc": TOLERANCE.worst_case, "miou": 0.0}
    assert additions.overestimates(just, {"aacc": 0.0, "miou": 0.0}, "sea-v1") is False


# An external evaluation on disk.

DETAILS = {
    "name": "square", "description": "A random search, in some words.", "author": "Somebody",
    "url": "https://example.org/square", "date": "2026-02-01",
}  # fmt: skip


def weaker(entry_path: Path, wrong: int, eps: float = 8.0, images: int = 3) -> dict[Key, Group]:
    """An attack on the first images at ``eps`` that leaves ``wrong`` more pixels of each wrong than SEA's best loss."""
    found = stored(entry_path)
    groups = [found.groups[eps, loss] for loss in samples.PROTOCOL.losses]
    rows = np.arange(images)
    best = np.stack([group.counts.correct for group in groups]).argmin(axis=0)[:images]
    parts = [np.stack(arrays)[best, rows] for arrays in zip(*(group.counts for group in groups), strict=True)]
    inter, predicted, target = (np.array(part) for part in parts)
    for row in rows:
        for _ in range(wrong):
            hit = int(np.flatnonzero(inter[row])[0])
            inter[row, hit] -= 1
            predicted[row, hit] -= 1
            predicted[row, (hit + 1) % samples.NUM_CLASSES] += 1
    return {(eps, "square"): Group(samples.IMAGE_IDS[:images], Counts(inter, predicted, target))}


def publish_external(entry_path: Path, groups: Mapping[Key, Group], **changes: str) -> Path:
    details = DETAILS | changes
    document, data = additions.build_external(entries.read_entry(entry_path), stored(entry_path), groups, **details)
    path = additions.folder_of(entry_path, additions.EXTERNAL) / f"{details['name']}.json"
    path.parent.mkdir(exist_ok=True)
    samples.write_json(path, document)
    path.with_suffix(".parquet").write_bytes(data)
    return path


@pytest.fixture
def external(entry_path: Path) -> Path:
    return publish_external(entry_path, weaker(entry_path, 4))


def rewrite_document(path: Path, edit: Callable[[dict[str, Any]], Any]) -> list[str]:
    document = json.loads(path.read_text("utf-8"))
    edit(document)
    samples.write_json(path, document)
    return problems(path)


def rewrite_evidence(path: Path, change: Callable[[Evidence], Evidence]) -> list[str]:
    """Changes the evidence and states its hash, as a careful forger would."""
    data = evidence.to_bytes(change(stored(path)))
    path.with_suffix(".parquet").write_bytes(data)
    return rewrite_document(path, lambda document: document["evidence"].update(sha256=sha256_bytes(data)))


def with_group(found: Evidence, key: Key, group: Group) -> Evidence:
    return Evidence({**found.groups, key: group}, found.metadata)


def with_identity(found: Evidence, **changes: Any) -> Evidence:
    return Evidence(found.groups, {**found.metadata, "identity": {**found.metadata["identity"], **changes}})


def test_an_external_evaluation_as_it_is_built_is_valid(external: Path) -> None:
    assert problems(external) == []
    assert additions.kind_of(external) == "external"
    document = additions.read_addition(external)
    assert {key: document[key] for key in DETAILS} == DETAILS
    assert [row["strength"] for row in document["results"]] == [8.0]
    assert rewrite_evidence(external, lambda found: found) == []  # or the tests below would show nothing


def test_its_results_are_its_own(entry_path: Path, external: Path) -> None:
    """The attacked images, and the clean ones where none was attacked; nothing of SEA, which may be measured again."""
    found, added = stored(entry_path), stored(external)
    (row,) = additions.read_addition(external)["results"]
    clean = found.groups[CLEAN]
    group = added.groups[8.0, "square"]
    right = dict(zip(clean.image_ids, clean.counts.correct.tolist(), strict=True))
    for image_id, correct in zip(group.image_ids, group.counts.correct.tolist(), strict=True):
        right[image_id] = min(right[image_id], correct)
    assert row["aacc"] == pytest.approx(sum(right.values()) / clean.counts.target.sum(), abs=ROUNDING)


def test_an_evaluation_that_finds_nothing_repeats_the_clean_scores(entry_path: Path) -> None:
    found = stored(entry_path)
    path = publish_external(entry_path, {(4.0, "square"): found.groups[CLEAN]})
    assert problems(path) == []
    clean = entries.read_entry(entry_path)["clean"]
    assert additions.read_addition(path)["results"] == [{"strength": 4.0, "aacc": clean["aacc"], "miou": clean["miou"]}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "../x"}, "name: '../x' does not match"),
        ({"name": "Square"}, "name: 'Square' does not match"),
        ({"description": "short"}, "description: "),
        ({"description": "x" * 1001}, "description: "),
        ({"author": ""}, "author: "),
        ({"url": "http://example.org"}, "url: 'http://example.org' is not an https:// link"),
        ({"url": "javascript:alert(1)"}, "url: .* is not an https:// link"),
        ({"date": "yesterday"}, "date: 'yesterday' does not match"),
    ],
)
def test_texts_that_are_not_acceptable_are_refused_before_anything_is_written(
    entry_path: Path, changes: dict[str, str], said: str
) -> None:
    with pytest.raises(ContentError, match=said):
        publish_external(entry_path, weaker(entry_path, 4), **changes)


def test_a_radius_that_the_entry_lacks_and_no_attack_at_all_are_refused(entry_path: Path) -> None:
    found = stored(entry_path)
    with pytest.raises(ContentError, match=r"attacks at ε = 2/255, where the entry has no result to compare with"):
        publish_external(entry_path, {(2.0, "square"): found.groups[4.0, "js"]})
    with pytest.raises(ContentError, match="holds no attack"):
        publish_external(entry_path, {CLEAN: found.groups[CLEAN]})


FORGED_DOCUMENTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "aacc": (lambda document: document["results"][0].update(aacc=0.0), "results are .* the evidence gives"),
    "miou by little": (
        lambda document: document["results"][0].update(miou=document["results"][0]["miou"] + 1e-7),
        "results are .* the evidence gives .*: correct them",
    ),
    "another radius": (lambda document: document["results"][0].update(strength=4.0), "results are .* evidence gives"),
    "a result more": (
        lambda document: document["results"].append({"strength": 12.0, "aacc": 0.0, "miou": 0.0}),
        "results are .* the evidence gives",
    ),
    "no result": (lambda document: document.update(results=[]), "results: "),
    "hash": (
        lambda document: document["evidence"].update(sha256="0" * 64),
        r"evidence\.sha256 is not the hash of square\.parquet: the evidence was changed or swapped\. Restore it",
    ),
    "evidence elsewhere": (
        lambda document: document["evidence"].update(file="other.parquet"),
        r"evidence\.file is 'other\.parquet': it must be named square\.parquet",
    ),
    "path in the evidence": (
        lambda document: document["evidence"].update(file=f"../{MODEL}.parquet"),
        r"evidence\.file: .* does not match",
    ),
    "name": (lambda document: document.update(name="circle"), r"name is 'circle', the file is square\.json: make them"),
    "model": (lambda document: document.update(model=OTHER), f"model is '{OTHER}', the entry beside it says '{MODEL}'"),
    "data set": (lambda document: document.update(dataset="camvid"), "dataset is 'camvid', the entry beside it says"),
    "protocol": (lambda document: document.update(protocol="sea-v9"), "protocol is 'sea-v9', the entry beside it says"),
    "date": (lambda document: document.update(date="2026-02-30"), "date 2026-02-30 is not a day: write YYYY-MM-DD"),
    "unknown key": (lambda document: document.update(tier="checked"), "'tier' was unexpected"),
    "missing key": (lambda document: document.pop("url"), "'url' is a required property"),
    "percent": (lambda document: document["results"][0].update(aacc=12.5), r"results\.0\.aacc: 12.5 is greater"),
}


@pytest.mark.parametrize("name", FORGED_DOCUMENTS)
def test_a_forged_external_evaluation_is_named(external: Path, name: str) -> None:
    edit, said = FORGED_DOCUMENTS[name]
    found = rewrite_document(external, edit)
    assert any(_says(text, said) for text in found), found


def _says(text: str, pattern: str) -> bool:
    return re.search(pattern, text, re.DOTALL) is not None


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"aacc": ', '"aacc": NaN, "x": ', "NaN is not a number of JSON"),
        ('"aacc": ', '"aacc": Infinity, "x": ', "Infinity is not a number of JSON"),
        ('"aacc": ', '"aacc": 0.1, "aacc": ', "the key 'aacc' occurs twice"),
        ('"name": ', '"name": "circle", "name": ', "the key 'name' occurs twice"),
        ("{", "", "not valid JSON"),
        ("{", "[" * 50_000, "not valid JSON"),
    ],
    ids=["nan", "infinity", "score twice", "name twice", "open", "deep"],
)
def test_what_is_not_strict_json_is_named(external: Path, before: str, after: str, said: str) -> None:
    external.write_text(external.read_text("utf-8").replace(before, after, 1), "utf-8")
    (found,) = problems(external)
    assert said in found


def test_a_swapped_parquet_is_named(entry_path: Path, external: Path) -> None:
    external.with_suffix(".parquet").write_bytes(entry_path.with_suffix(".parquet").read_bytes())
    (found,) = problems(external)
    assert "evidence.sha256 is not the hash of square.parquet" in found


def test_the_evidence_of_the_entry_itself_is_no_external_evaluation_of_other_results(
    entry_path: Path, external: Path
) -> None:
    """With its hash: it holds the reliability check too, which is no attack to compare with."""
    data = entry_path.with_suffix(".parquet").read_bytes()
    external.with_suffix(".parquet").write_bytes(data)
    (found,) = rewrite_document(external, lambda document: document["evidence"].update(sha256=sha256_bytes(data)))
    assert "It has an attack named check at ε = 64/255: give it a name of its own" in found


def test_a_damaged_and_a_missing_parquet_are_named(external: Path) -> None:
    parquet = external.with_suffix(".parquet")
    data = parquet.read_bytes()[:-20]
    parquet.write_bytes(data)
    (found,) = rewrite_document(external, lambda document: document["evidence"].update(sha256=sha256_bytes(data)))
    assert "is damaged or not a Parquet file" in found
    parquet.unlink()
    (found,) = problems(external)
    assert "its evidence cannot be read" in found


@pytest.mark.parametrize("key", ["weights", "fingerprint"])
@pytest.mark.parametrize("value", ["0" * 64, None, ["x"]])
def test_evidence_of_another_model_or_data_set_is_named(external: Path, key: str, value: Any) -> None:
    found = rewrite_evidence(external, lambda found: with_identity(found, **{key: value}))
    assert any(f"made with another {key} than the entry's: attack the listed model" in text for text in found)


@pytest.mark.parametrize("identity", [None, "x", [], {}])
def test_evidence_without_identity_is_named(external: Path, identity: Any) -> None:
    found = rewrite_evidence(external, lambda found: Evidence(found.groups, {**found.metadata, "identity": identity}))
    assert any("another weights" in text for text in found)
    assert any("another fingerprint" in text for text in found)


def test_evidence_of_another_number_of_classes_is_named(external: Path) -> None:
    found = rewrite_evidence(external, lambda found: Evidence(found.groups, {**found.metadata, "num_classes": 5}))
    assert any("another number of classes" in text for text in found)


def test_other_labels_are_named(external: Path) -> None:
    def relabel(found: Evidence) -> Evidence:
        group = found.groups[8.0, "square"]
        rolled = Counts(*(np.roll(array, 1, axis=1) for array in group.counts))
        return with_group(found, (8.0, "square"), Group(group.image_ids, rolled))

    (found,) = rewrite_evidence(external, relabel)
    assert "labels at ε = 8/255, square are not those of the entry's evidence" in found


def test_an_unknown_image_is_named(external: Path) -> None:
    def rename(found: Evidence) -> Evidence:
        group = found.groups[8.0, "square"]
        return with_group(found, (8.0, "square"), Group((*group.image_ids[:-1], "image_99"), group.counts))

    (found,) = rewrite_evidence(external, rename)
    assert "holds the image 'image_99', which the entry's evidence does not" in found


def test_images_of_each_other_are_named(external: Path) -> None:
    """The ids of the entry, its labels in another order: counts of other images."""

    def exchange(found: Evidence) -> Evidence:
        group = found.groups[8.0, "square"]
        return with_group(found, (8.0, "square"), Group(group.image_ids[::-1], group.counts))

    (found,) = rewrite_evidence(external, exchange)
    assert "labels at ε = 8/255, square are not those" in found


@pytest.mark.parametrize("eps", [2.0, 16.0, 64.0])
def test_a_radius_that_the_entry_lacks_is_named(external: Path, eps: float) -> None:
    """Also that of the reliability check, which is no result."""
    found = rewrite_evidence(external, lambda found: with_group(found, (eps, "x"), found.groups[8.0, "square"]))
    assert any(f"attacks at ε = {eps:g}/255, where the entry has no result" in text for text in found)


def test_an_attack_at_radius_0_is_named(external: Path) -> None:
    """It would be a clean image that is counted otherwise."""
    found = rewrite_evidence(external, lambda found: with_group(found, (0.0, "square"), found.groups[8.0, "square"]))
    assert any("ε = 0/255" in text for text in found)


def test_attacks_left_out_of_the_evidence_are_named(external: Path) -> None:
    (found,) = rewrite_evidence(external, lambda found: Evidence({}, found.metadata))
    assert "holds no attack" in found


def test_an_external_evaluation_beside_another_model_is_named(entry_path: Path, external: Path) -> None:
    other = samples.publish(entry_path.parents[3], OTHER, quality=0.5)
    moved = additions.folder_of(other, additions.EXTERNAL)
    external.parent.rename(moved)
    found = problems(moved / external.name)
    assert any(f"model is '{MODEL}', the entry beside it says '{OTHER}'" in text for text in found)
    assert any("made with another weights" in text for text in found)


def test_a_renamed_file_is_named(external: Path) -> None:
    for suffix in (".json", ".parquet"):
        external.with_suffix(suffix).rename(external.with_name(f"circle{suffix}"))
    found = problems(external.with_name("circle.json"))
    assert any("evidence.file is 'square.parquet': it must be named circle.parquet" in text for text in found)
    assert any("name is 'square', the file is circle.json" in text for text in found)


@pytest.mark.parametrize("folder", [f"{MODEL}.extern", MODEL, "external", f"{MODEL}.external.old"])
def test_a_folder_of_another_name_is_named(entry_path: Path, external: Path, folder: str) -> None:
    moved = external.parent.with_name(folder)
    external.parent.rename(moved)
    assert additions.kind_of(moved / external.name) is None
    (found,) = problems(moved / external.name)
    assert "lies in no folder <model id>.external or <model id>.reproduced: move it" in found
    assert moved / external.name in entries.entry_paths(entry_path.parents[2])  # where `validate` finds and refuses it
    assert entries.validate_entry(moved / external.name, published=True) != []


def test_an_external_evaluation_in_the_folder_of_reproductions_is_named(external: Path) -> None:
    moved = external.parent.with_name(f"{MODEL}.reproduced")
    external.parent.rename(moved)
    (found,) = problems(moved / external.name)
    assert "is not valid" in found


def test_an_addition_without_its_entry_is_named(entry_path: Path, external: Path) -> None:
    entry_path.unlink()
    (found,) = problems(external)
    assert "Cannot read the entry" in found


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_link_is_named(external: Path, tmp_path: Path, suffix: str) -> None:
    file = external.with_suffix(suffix)
    outside = tmp_path / f"outside{suffix}"
    file.rename(outside)
    file.symlink_to(outside)
    (found,) = problems(external)
    assert "it is a link; put the file itself there" in found


def test_evidence_over_5_mb_is_not_even_read(external: Path) -> None:
    file = external.with_suffix(".parquet")
    file.unlink()
    with file.open("wb") as stream:
        os.truncate(stream.fileno(), MAX_EVIDENCE_BYTES + 1)
    (found,) = problems(external)
    assert f"square.parquet has {MAX_EVIDENCE_BYTES + 1} bytes; evidence of at most {MAX_EVIDENCE_BYTES}" in found


def test_a_reported_entry_cannot_be_attacked(entry_path: Path, external: Path) -> None:
    entry = json.loads(entry_path.read_text("utf-8")) | {"evidence": None, "run": None}
    entry["claim"] |= {"tier": "reported", "source": "A paper"}
    samples.write_json(entry_path, entry)
    (found,) = problems(external)
    assert "mend the entry beside it first" in found


def test_a_changed_evidence_of_the_entry_is_named_at_its_additions_too(entry_path: Path, external: Path) -> None:
    entry_path.with_suffix(".parquet").write_bytes(b"x")
    (found,) = problems(external)
    assert "mend the entry beside it first" in found
    assert "evidence.sha256 is not the hash" in found


def test_additions_are_no_entries(entry_path: Path, external: Path) -> None:
    root = entry_path.parents[2]
    assert entries.entry_paths(root) == [entry_path]
    assert entries.addition_paths(root) == [external]


# On the board.


def board_row(entry_path: Path) -> dict[str, Any]:
    (table,) = leaderboard.load(entry_path.parents[3]).tables
    (row,) = table.rows
    return row


def flags(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [flag for flag in row["flags"] if flag["name"] == "sea_overestimates"]


def test_without_external_evaluations_nothing_is_overestimated(entry_path: Path) -> None:
    row = board_row(entry_path)
    assert row["external"] == []
    assert flags(row) == []
    assert all(result["best_known"] == {**_scores(result), "by": []} for result in row["results"])


def _scores(result: Mapping[str, Any]) -> dict[str, float]:
    return {metric: result[metric] for metric in ("aacc", "miou")}


def test_an_external_attack_that_beats_sea_by_more_than_the_tolerance_is_flagged(
    entry_path: Path, external: Path
) -> None:
    row = board_row(entry_path)
    (stated,) = additions.read_addition(external)["results"]
    assert [each["name"] for each in row["external"]] == ["square"]
    sea, known = row["results"][1], row["results"][1]["best_known"]
    assert known["by"] == ["square"]
    assert all(known[metric] < min(sea[metric], stated[metric]) for metric in ("aacc", "miou"))  # images of both
    assert sea["aacc"] - known["aacc"] == pytest.approx(12 / 384, abs=ROUNDING)
    for metric in ("aacc", "miou"):
        assert row["scores"]["8"][metric]["value"] == sea[metric]  # SEA's own score stays what it is
        assert row["scores"]["8"][metric]["best_known"] == known[metric]
        mean = sum(result["best_known"][metric] for result in row["results"]) / 3
        assert row["scores"]["mean"][metric]["best_known"] == pytest.approx(mean, abs=ROUNDING)
    (flag,) = flags(row)
    assert flag["level"] == "warning"
    assert flag["value"] == pytest.approx(max(sea[m] - known[m] for m in ("aacc", "miou")), abs=ROUNDING)
    assert flag["message"] == "square found lower scores at ε = 8/255."
    assert flag["explanation"]
    assert "sea\\_overestimates" in leaderboard.render(leaderboard.load(entry_path.parents[3]))


def test_one_within_the_tolerance_lowers_best_known_but_is_not_flagged(entry_path: Path) -> None:
    """1 of 384 pixels: 0.0026, and about as much of mIoU."""
    path = publish_external(entry_path, weaker(entry_path, 1, images=1))
    row = board_row(entry_path)
    sea, known = row["results"][1], row["results"][1]["best_known"]
    gaps = [sea[metric] - known[metric] for metric in ("aacc", "miou")]
    assert gaps[0] == pytest.approx(1 / 384, abs=ROUNDING)
    assert all(0 < gap < TOLERANCE.worst_case for gap in gaps)
    assert known["by"] == ["square"]
    assert flags(row) == []
    assert problems(path) == []


def test_two_external_evaluations_count_together(entry_path: Path) -> None:
    publish_external(entry_path, weaker(entry_path, 4, images=2), name="first")
    (group,) = weaker(entry_path, 5, images=4).values()
    other = {(8.0, "square"): Group(group.image_ids[2:], group.counts.take(np.arange(2, 4)))}
    publish_external(entry_path, other, name="second")
    row = board_row(entry_path)
    known = row["results"][1]["best_known"]
    assert known["by"] == ["first", "second"]
    assert row["results"][1]["aacc"] - known["aacc"] == pytest.approx(18 / 384, abs=ROUNDING)
    assert [flag["message"] for flag in flags(row)] == ["first, second found lower scores at ε = 8/255."]


def test_a_damaged_external_evaluation_stops_the_board(entry_path: Path, external: Path) -> None:
    external.with_suffix(".parquet").write_bytes(b"x")
    with pytest.raises(ContentError, match=r"evidence\.sha256 is not the hash of square\.parquet"):
        leaderboard.load(entry_path.parents[3])


# The images of a reproduction.

ALL = tuple(f"image_{number}" for number in range(50))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(0, 2**63 - 1))
def test_a_sample_is_distinct_and_in_the_order_of_the_evidence(images: int, seed: int) -> None:
    found = additions.sample_ids(ALL, images, seed)
    assert len(found) == len(set(found)) == min(images, 50)
    places = [ALL.index(image_id) for image_id in found]
    assert places == sorted(places)
    assert additions.sample_ids(ALL, images, seed) == found
    assert set(additions.sample_ids(ALL, max(images - 1, 1), seed)) <= set(found)  # a larger sample adds images


def test_a_sample_of_all_images_is_the_whole_set_whatever_the_seed() -> None:
    assert {additions.sample_ids(ALL, 50, seed) for seed in range(20)} == {ALL}


def test_seeds_draw_different_images_and_every_image_is_drawn() -> None:
    drawn = [additions.sample_ids(ALL, 20, seed) for seed in range(100)]
    assert len(set(drawn)) == 100
    often = [sum(image_id in each for each in drawn) for image_id in ALL]
    assert 20 <= min(often) <= max(often) <= 60  # 40 expected, standard deviation 4.9


def test_a_sample_is_pinned_for_ever() -> None:
    """Or the records that were merged would no longer fit their seeds."""
    assert additions.sample_ids(ALL, 5, 0) == PINNED


PINNED = ("image_2", "image_4", "image_18", "image_23", "image_36")


@pytest.mark.parametrize("images", [0, -1])
def test_a_sample_of_no_image_is_refused(images: int) -> None:
    with pytest.raises(UsageError, match=f"at least 1 image, not {images}"):
        additions.sample_ids(ALL, images, 0)


# Comparing.

LIMITS = Tolerance(clean=0.1, image=0.3, pooled=0.2, worst_case=0.0)


def compared(before: Sequence[int], after: Sequence[int], key: Key = (8.0, "js")) -> dict[str, Any]:
    """The row of one attack on images of 20 pixels, of which so many are right before and after."""
    groups = [{key: two_classes([(each // 2, each - each // 2) for each in right])} for right in (before, after)]
    (row,) = additions.compare(found_evidence(groups[0]), found_evidence(groups[1]), LIMITS)
    return row


def test_equal_counts_agree() -> None:
    assert compared([20, 10, 0], [20, 10, 0]) == {
        "strength": 8.0, "attack": "js", "stored_aacc": 0.5, "found_aacc": 0.5, "stored_miou": pytest.approx(1 / 3),
        "found_miou": pytest.approx(1 / 3), "largest": 0.0, "agrees": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "largest", "agrees"),
    [
        ([10, 10, 10], [16, 10, 10], 0.3, True),
        ([10, 10, 10], [17, 10, 10], 0.35, False),
        ([10, 10, 10], [3, 10, 10], 0.35, False),
        ([10, 10, 10], [17, 3, 10], 0.35, False),  # pooled they are the same
        ([10, 10], [13, 13], 0.15, True),
        ([10, 10], [14, 14], 0.2, False),  # mIoU: from 1/3 to 7/13
        ([10, 10], [15, 14], 0.25, False),
        ([10, 10], [5, 6], 0.25, False),
    ],
    ids=["at image", "image", "image below", "opposite", "in all", "mIoU", "pooled", "pooled below"],
)  # fmt: skip
def test_one_image_or_all_together_beyond_the_tolerance_disagree(
    before: list[int], after: list[int], largest: float, agrees: bool
) -> None:
    row = compared(before, after)
    assert row["largest"] == pytest.approx(largest)
    assert row["agrees"] is agrees
    assert row["stored_aacc"] == sum(before) / (20 * len(before))
    assert row["found_aacc"] == sum(after) / (20 * len(after))


@pytest.mark.parametrize(("after", "agrees"), [(20, True), (18, True), (17, False)])
def test_clean_images_have_a_tolerance_of_their_own(after: int, agrees: bool) -> None:
    assert compared([20, 20, 20], [after, 20, 20], key=CLEAN)["agrees"] is agrees


def test_only_the_images_that_were_made_again_are_compared() -> None:
    old = found_evidence({(8.0, "js"): two_classes([(10, 10), (0, 0), (5, 5)])})
    new = Evidence({(8.0, "js"): Group(("image_2", "image_0"), two_classes([(5, 5), (10, 10)]))}, {})
    (row,) = additions.compare(old, new, LIMITS)
    assert (row["stored_aacc"], row["found_aacc"], row["largest"]) == (0.75, 0.75, 0.0)


def test_the_reliability_check_is_not_compared() -> None:
    groups = {CLEAN: two_classes([(10, 10)]), (64.0, CHECK_LOSS): two_classes([(0, 0)])}
    rows = additions.compare(found_evidence({CLEAN: groups[CLEAN]}), found_evidence(groups), LIMITS)
    assert [row["attack"] for row in rows] == ["clean"]


def test_images_without_a_valid_pixel_agree() -> None:
    empty = Counts(*(np.zeros((1, 2), np.int64),) * 3)
    (row,) = additions.compare(found_evidence({CLEAN: empty}), found_evidence({CLEAN: empty}), LIMITS)
    assert (row["largest"], row["agrees"]) == (0.0, True)


def test_what_cannot_be_compared_is_told() -> None:
    old = found_evidence({(8.0, "js"): two_classes([(10, 10)])})
    with pytest.raises(ContentError, match=r"no attack mce at ε = 8/255"):
        additions.compare(old, found_evidence({(8.0, "mce"): two_classes([(10, 10)])}), LIMITS)
    with pytest.raises(ContentError, match="images that the entry's evidence does not"):
        additions.compare(old, found_evidence({(8.0, "js"): two_classes([(1, 1)] * 2)}), LIMITS)
    with pytest.raises(ContentError, match="labels are not those of the entry's evidence"):
        additions.compare(old, found_evidence({(8.0, "js"): two_classes([(1, 1)], pixels=9)}), LIMITS)


# Tiers.


def entry_of(tier: str = "checked", images: int = 100, submitter: str | None = "alice") -> dict[str, Any]:
    return {
        "claim": {"tier": tier, "submitter": submitter},
        "dataset": {"images": images},
        "evidence": None if tier == "reported" else {"sha256": "a" * 64},
    }


def record_of(**changes: Any) -> dict[str, Any]:
    return {"agrees": True, "strengths": [8.0], "images": 20, "by": "bob", "entry_evidence_sha256": "a" * 64} | changes


@pytest.mark.parametrize(
    ("entry", "records", "tier"),
    [
        (entry_of(), [], "checked"),
        (entry_of(), [record_of()], "reproduced"),
        (entry_of(), [record_of(images=100)], "reproduced"),
        (entry_of(submitter=None), [record_of()], "checked"),  # somebody else than whom?
        (entry_of(), [record_of(by=None)], "checked"),
        (entry_of(), [record_of(by="alice")], "checked"),
        (entry_of(), [record_of(by="Alice")], "checked"),  # accounts of GitHub ignore case
        (entry_of(), [record_of(images=19)], "checked"),
        (entry_of(images=6), [record_of(images=6)], "reproduced"),
        (entry_of(images=6), [record_of(images=5)], "checked"),
        (entry_of(), [record_of(entry_evidence_sha256="b" * 64)], "checked"),
        (entry_of(), [record_of(agrees=False)], "checked"),
        (entry_of(), [record_of(strengths=[0.001])], "checked"),  # no radius of the protocol
        (entry_of(), [record_of(by="alice"), record_of(images=19), record_of(agrees=False)], "checked"),
        (entry_of(), [record_of(agrees=False), record_of()], "reproduced"),
        (entry_of("reported"), [], "reported"),
        (entry_of("reported"), [record_of()], "reported"),
    ],
)
def test_only_somebody_elses_agreeing_record_of_enough_images_raises_the_tier(
    entry: dict[str, Any], records: list[dict[str, Any]], tier: str
) -> None:
    assert additions.tier(entry, records) == tier


# A record on disk.


def publish_record(
    entry_path: Path,
    *,
    images: int = 4,
    seed: int = 1,
    radii: Sequence[float] = (4.0, 12.0),
    by: str | None = "bob",
    change: Callable[[Key, Counts], Counts] = lambda key, counts: counts,
) -> Path:
    """A record of a reproduction that found the stored counts of the images that its seed draws, or changed ones."""
    entry, found = entries.read_entry(entry_path), stored(entry_path)
    chosen = additions.sample_ids(samples.IMAGE_IDS, images, seed)
    rows = np.array([samples.IMAGE_IDS.index(image_id) for image_id in chosen])
    groups = {
        key: Group(chosen, change(key, group.counts.take(rows)))
        for key, group in found.groups.items()
        if key == CLEAN or key[0] in radii
    }
    identity = {key: found.metadata["identity"][key] for key in ("weights", "fingerprint")}
    added = Evidence(groups, {"num_classes": samples.NUM_CLASSES, "identity": identity, "threat": LINF.fields()})
    data = evidence.to_bytes(added)
    rows_found = additions.compare(found, added, TOLERANCE)
    name = f"2026_02_01_seed_{seed}"
    record = {
        "schema_version": 2, "model": MODEL, "dataset": "shapes", "protocol": "sea-v1", "threat": LINF.fields(),
        "entry_evidence_sha256": entry["evidence"]["sha256"], "by": by, "date": "2026-02-01", "seed": seed,
        "images": images, "strengths": list(radii), "comparison": rows_found,
        "agrees": all(row["agrees"] for row in rows_found),
        "run": {"versions": {"segbench": "0.1.0"}, "device": "cpu", "seconds": 1.5},
        "evidence": {"file": f"{name}.parquet", "sha256": sha256_bytes(data)},
    }  # fmt: skip
    path = additions.folder_of(entry_path, additions.REPRODUCED) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    samples.write_json(path, record)
    path.with_suffix(".parquet").write_bytes(data)
    return path


@pytest.fixture
def record(entry_path: Path) -> Path:
    return publish_record(entry_path)


def test_a_record_as_it_is_made_is_valid(record: Path) -> None:
    assert problems(record) == []
    document = additions.read_addition(record)
    assert document["agrees"] is True
    assert [(row["strength"], row["attack"]) for row in document["comparison"]] == [
        (0.0, "clean"), *((eps, loss) for eps in (4.0, 12.0) for loss in samples.PROTOCOL.losses),
    ]  # fmt: skip
    assert {row["largest"] for row in document["comparison"]} == {0.0}
    assert rewrite_evidence(record, lambda found: found) == []  # or the tests below would show nothing


def spoil(pixels: int, only: Key | None = None) -> Callable[[Key, Counts], Counts]:
    """Makes so many right pixels of the first image wrong, under one attack or all."""

    def change(key: Key, counts: Counts) -> Counts:
        if only is not None and key != only:
            return counts
        inter, predicted, target = (array.copy() for array in counts)
        for _ in range(pixels):
            hit = int(inter[0].argmax())
            assert inter[0, hit] > 0
            inter[0, hit] -= 1
            predicted[0, hit] -= 1
            predicted[0, (hit + 1) % samples.NUM_CLASSES] += 1
        return Counts(inter, predicted, target)

    return change


POOLED = int(TOLERANCE.pooled * 4 * 64)  # pixels of 4 images of 64 that may differ


@pytest.mark.parametrize(("pixels", "agrees"), [(POOLED, True), (POOLED + 1, True), (16, True), (17, False)])
def test_a_record_that_disagrees_is_valid_too_if_it_says_so(entry_path: Path, pixels: int, agrees: bool) -> None:
    """17 are more than a quarter of the image; of so few images the sums say little, and are not judged."""
    path = publish_record(entry_path, change=spoil(pixels, (4.0, "mce")))
    document = additions.read_addition(path)
    assert document["agrees"] is agrees
    assert [row["agrees"] for row in document["comparison"]].count(False) == (not agrees)
    assert problems(path) == []
    (row,) = [row for row in document["comparison"] if row["largest"]]
    assert (row["strength"], row["attack"], row["largest"]) == (4.0, "mce", pixels / 64)


FORGED_RECORDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "agrees": (lambda record: record.update(agrees=False), "comparison or agrees is not what the evidence gives"),
    "a row that agrees": (
        lambda record: record["comparison"][2].update(agrees=False),
        "comparison or agrees is not what the evidence gives: take the record as it was written",
    ),
    "stored score": (lambda record: record["comparison"][0].update(stored_aacc=0.5), "comparison or agrees"),
    "found score by little": (
        lambda record: record["comparison"][1].update(found_aacc=record["comparison"][1]["found_aacc"] + 1e-7),
        "comparison or agrees",
    ),
    "largest": (lambda record: record["comparison"][1].update(largest=0.01), "comparison or agrees"),
    "row left out": (lambda record: record["comparison"].pop(), "comparison or agrees"),
    "rows exchanged": (lambda record: record["comparison"].reverse(), "comparison or agrees"),
    "attack": (lambda record: record["comparison"][1].update(attack="pgd"), "comparison or agrees"),
    "seed": (lambda record: record.update(seed=2), "does not hold the images that its seed draws"),
    "negative seed": (lambda record: record.update(seed=-1), "seed: -1 is less than the minimum"),
    "more images": (lambda record: record.update(images=5), "does not hold the images that its seed draws"),
    "fewer images": (lambda record: record.update(images=3), "does not hold the images that its seed draws"),
    "no image": (lambda record: record.update(images=0), "images: 0 is less than the minimum"),
    "radius more": (lambda record: record["strengths"].append(8.0), "under every attack of its radii"),
    "radius less": (lambda record: record["strengths"].pop(), "under every attack of its radii"),
    "radius that the entry lacks": (lambda record: record["strengths"].append(2.0), "under every attack of its radii"),
    "model": (lambda record: record.update(model=OTHER), f"model is '{OTHER}', the entry beside it says '{MODEL}'"),
    "evidence elsewhere": (lambda record: record["evidence"].update(file="other.parquet"), "it must be named 2026_02"),
    "day": (lambda record: record.update(date="2026-13-01"), "date 2026-13-01 is not a day"),
    "unknown key": (lambda record: record.update(tier="reproduced"), "'tier' was unexpected"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED_RECORDS)
def test_a_forged_record_is_named(record: Path, name: str) -> None:
    edit, said = FORGED_RECORDS[name]
    found = rewrite_document(record, edit)
    assert any(_says(text, said) for text in found), found


def test_a_disagreeing_record_that_says_it_agrees_is_named(entry_path: Path) -> None:
    path = publish_record(entry_path, change=spoil(17, CLEAN))

    def lie(document: dict[str, Any]) -> None:
        document["agrees"] = True
        for row in document["comparison"]:
            row["agrees"] = True

    (found,) = rewrite_document(path, lie)
    assert "comparison or agrees is not what the evidence gives" in found


def test_more_images_than_the_entry_has_are_named(entry_path: Path) -> None:
    """The sample is then the whole set; a record of 1000 images would still be a lie."""
    path = publish_record(entry_path, images=6)
    assert problems(path) == []
    assert rewrite_document(path, lambda document: document.update(images=1000)) != []


def test_other_images_than_the_seed_draws_are_named(entry_path: Path, record: Path) -> None:
    """With their true counts and a true comparison: chosen images, not drawn ones."""
    other = publish_record(entry_path, seed=2)
    assert stored(other).groups[CLEAN].image_ids != stored(record).groups[CLEAN].image_ids
    data = other.with_suffix(".parquet").read_bytes()
    comparison = json.loads(other.read_text("utf-8"))["comparison"]
    record.with_suffix(".parquet").write_bytes(data)

    def choose(document: dict[str, Any]) -> None:
        document["comparison"] = comparison
        document["evidence"]["sha256"] = sha256_bytes(data)

    (found,) = rewrite_document(record, choose)
    assert "does not hold the images that its seed draws" in found


def test_an_attack_left_out_or_made_up_is_named(record: Path) -> None:
    def less(found: Evidence) -> Evidence:
        return Evidence({key: group for key, group in found.groups.items() if key != (4.0, "mce")}, found.metadata)

    found = rewrite_evidence(record, less)
    assert any("under every attack of its radii" in text for text in found)
    found = rewrite_evidence(record, lambda found: with_group(found, (4.0, "pgd"), found.groups[4.0, "js"]))
    assert any("no attack pgd at ε = 4/255" in text for text in found)


def test_an_image_left_out_of_one_attack_is_named(record: Path) -> None:
    def less(found: Evidence) -> Evidence:
        group = found.groups[4.0, "mce"]
        return with_group(found, (4.0, "mce"), Group(group.image_ids[:3], group.counts.take(np.arange(3))))

    assert any("does not hold the images that its seed draws" in text for text in rewrite_evidence(record, less))


def test_a_record_of_other_labels_is_named(record: Path) -> None:
    def relabel(found: Evidence) -> Evidence:
        return Evidence(
            {
                key: Group(group.image_ids, Counts(*(np.roll(array, 1, axis=1) for array in group.counts)))
                for key, group in found.groups.items()
            },
            found.metadata,
        )

    assert any("labels are not those of the entry's evidence" in text for text in rewrite_evidence(record, relabel))


@pytest.mark.parametrize("key", ["weights", "fingerprint"])
def test_a_record_of_another_model_or_data_set_is_named(record: Path, key: str) -> None:
    found = rewrite_evidence(record, lambda found: with_identity(found, **{key: "0" * 64}))
    assert any(f"made with another {key} than the entry's" in text for text in found)


def test_a_record_of_an_entry_that_was_evaluated_again_stays_and_raises_no_tier(entry_path: Path, record: Path) -> None:
    samples.publish(entry_path.parents[3], MODEL, quality=0.8)
    assert problems(record) == []
    assert board_row(entry_path)["tier"] == "checked"


def test_a_record_raises_the_tier_on_the_board(entry_path: Path) -> None:
    assert board_row(entry_path)["tier"] == "checked"
    path = publish_record(entry_path, images=5)
    assert board_row(entry_path)["tier"] == "checked"  # 5 of 6 images
    path = publish_record(entry_path, images=6, seed=7, change=spoil(1, (12.0, "js")))
    row = board_row(entry_path)
    assert row["tier"] == "reproduced"
    assert [each["name"] for each in row["reproductions"]] == ["2026_02_01_seed_1", "2026_02_01_seed_7"]
    assert row["reproductions"][1] == {
        "name": path.stem, "by": "bob", "date": "2026-02-01", "images": 6, "radii": [4.0, 12.0], "device": "cpu",
        "difference": pytest.approx(1 / 384), "agrees": True,
    }  # fmt: skip


def test_a_record_by_the_submitter_does_not_raise_the_tier_on_the_board(entry_path: Path) -> None:
    entry = json.loads(entry_path.read_text("utf-8"))
    entry["claim"]["submitter"] = "bob"
    samples.write_json(entry_path, entry)
    publish_record(entry_path, images=6)
    assert board_row(entry_path)["tier"] == "checked"


@pytest.mark.parametrize("name", ["external", "reproduction"])
def test_the_schemas_refuse_what_they_do_not_know(name: str) -> None:
    """Every object is closed, every list and text has a limit."""
    todo: list[tuple[str, Any]] = [(name, dict(schemas.validator(name).schema))]
    while todo:
        where, node = todo.pop()
        if isinstance(node, dict):
            if node.get("type") == "object":
                assert "additionalProperties" in node, where
            if node.get("type") == "array":
                assert "maxItems" in node, where
            if node.get("type") in ("string", ["string", "null"]):
                assert {"maxLength", "pattern"} & set(node), where
            todo += [(f"{where}.{key}", each) for key, each in node.items()]
        elif isinstance(node, list):
            todo += [(where, each) for each in node]
