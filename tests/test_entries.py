"""Entries and cards: what is consistent validates, every forgery is named with its mend."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segbench import cards, content, entries, evidence, schemas
from segbench.cli.zoo import print_scores
from segbench.counts import Counts
from segbench.data import load_dataset
from segbench.entries import placement
from segbench.entries.placement import LABELS
from segbench.errors import ContentError, UnknownNameError
from segbench.evidence import CHECK_LOSS, CLEAN, Evidence, Group
from segbench.files import sha256_bytes
from tests import samples

MODEL, OTHER = "at_convnext_mini_shapes", "clean_convnext_mini_shapes"


@pytest.fixture
def entry_path(tmp_path: Path) -> Path:
    return samples.publish(samples.checkout(tmp_path), MODEL)


def problems(path: Path) -> list[str]:
    return entries.validate_entry(path, published=True)


def test_a_consistent_entry_is_valid(entry_path: Path) -> None:
    assert problems(entry_path) == []


def test_build_gives_the_scores_of_the_evidence(entry_path: Path) -> None:
    entry = entries.read_entry(entry_path)
    found = evidence.from_bytes(entry_path.with_suffix(".parquet").read_bytes(), source="f")
    assert entry["clean"]["miou"] == found.groups[CLEAN].counts.miou()
    for row in entry["results"]:
        for loss, scores in row["per_loss"].items():
            assert scores["aacc"] == found.groups[row["strength"], loss].counts.aacc()
        assert row["miou_lower_bound"] <= row["miou"] <= min(scores["miou"] for scores in row["per_loss"].values())
        assert sum(scores["won_aacc"] for scores in row["per_loss"].values()) == pytest.approx(1)
    assert [row["strength"] for row in entry["results"]] == list(samples.RADII)
    assert entry["protocol"]["official"] is True


Edit = Callable[[dict[str, Any]], Any]


def put(*path: str | int, value: Any) -> Edit:
    """Sets one field of an entry; a callable value gets the old one."""

    def edit(entry: dict[str, Any]) -> None:
        place = entry
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value(place[path[-1]]) if callable(value) else value

    return edit


def paper(url: str) -> dict[str, Any]:
    return {"title": "t", "authors": ["a"], "url": url, "venue": None, "year": 2024, "bibtex": None}


FORGERIES: dict[str, tuple[Edit, str]] = {
    "score": (put("results", 1, "miou", value=0.17), r"results\.1\.miou states 0.17, the evidence gives.*correct"),
    "clean score": (put("clean", "aacc", value=0.99), r"clean\.aacc states 0.99, the evidence gives"),
    "score by little": (put("clean", "macc", value=lambda old: old + 1e-7), r"clean\.macc states"),
    "interval": (
        put("results", 0, "interval", "miou", value=[0.4, 0.41]),
        r"results\.0\.interval\.miou\.0 states 0.4,.*correct",
    ),
    "interval backwards": (put("results", 0, "interval", "aacc", value=[0.6, 0.5]), "interval ends before it starts"),
    "bound": (put("results", 2, "miou_lower_bound", value=0.0), r"results\.2\.miou_lower_bound states 0"),
    "bound above miou": (put("results", 2, "miou_lower_bound", value=0.9), "miou_lower_bound is above miou: recompute"),
    "share of wins": (put("results", 0, "per_loss", "js", "won_miou", value=1), r"per_loss\.js\.won_miou states 1"),
    "worst above a loss": (
        put("results", 0, "aacc", value=0.64),
        r"worst case aacc 0.64 is above that of mce_bal, 0.63.*recompute",
    ),
    "worst above clean": (put("results", 0, "miou", value=0.9), "worst case miou 0.9 is above that of clean"),
    "flag": (put("flags", 3, "value", value=0), r"flags\.3\.value states 0, the evidence gives.*correct"),
    "flag level": (put("flags", 3, "level", value="ok"), r"flags\.3\.level states 'ok', the evidence gives 'note'"),
    "flag left out": (lambda entry: entry["flags"].pop(), "flags states"),
    "loss left out": (
        lambda entry: entry["results"][0]["per_loss"].pop("js"),
        r"results\.0\.per_loss.* js|results\.0\.per_loss\.js states None",
    ),
    "loss made up": (
        lambda entry: entry["results"][0]["per_loss"].update(other=entry["results"][0]["per_loss"]["js"]),
        r"results\.0\.per_loss\.other states",
    ),
    "radius left out": (lambda entry: entry["results"].pop(), r"ε = 12|results states"),
    "radius": (put("results", 2, "strength", value=16), r"results\.2\.strength states 16"),
    "radii out of order": (lambda entry: entry["results"].reverse(), "results must be sorted by strength"),
    "number of images": (put("dataset", "images", value=7), r"dataset\.images is 7"),
    "number of classes": (put("dataset", "num_classes", value=5), r"dataset\.num_classes is 5, the card"),
    "hash of the evidence": (
        put("evidence", "sha256", value="0" * 64),
        r"evidence\.sha256 is not the hash of.*Restore",
    ),
    "evidence elsewhere": (put("evidence", "file", value="other.parquet"), r"other\.parquet.*(beside|named)"),
    "weights": (put("model", "weights_sha256", value="0" * 64), r"model\.weights_sha256 is '0+', the card"),
    "fingerprint": (put("dataset", "fingerprint", value="0" * 64), r"dataset\.fingerprint is 0+, known is.*evaluate"),
    "data set": (put("dataset", "id", value="camvid"), r"belongs at entries/sea-v1/camvid/"),
    "model": (put("model", "id", value=OTHER), rf"belongs at entries/sea-v1/shapes/{OTHER}\.json: move it"),
    "architecture": (put("model", "architecture", value="vit"), r"model\.architecture is 'vit', the card"),
    "parameters": (put("model", "parameters", value=1), r"model\.parameters is 1, the card"),
    "protocol": (put("protocol", "name", value="sea-v9"), r"protocol\.name 'sea-v9' is unknown; known are sea-v1"),
    "digest": (put("protocol", "digest", value="0" * 64), r"protocol\.digest is not that of the official.*evaluate"),
    "deviations": (
        put("protocol", "deviations", value=["5 of 6 images"]),
        r"protocol\.official and protocol\.deviations contradict",
    ),
    "unofficial": (
        lambda entry: entry["protocol"].update(official=False, deviations=["30 iterations instead of 300"]),
        "not official .30 iterations instead of 300.: evaluate with the whole protocol",
    ),
    "iterations": (put("protocol", "iterations", value=30), r"protocol\.iterations is 30, sea-v1 says 300"),
    "seed": (put("protocol", "seed", value=1), r"protocol\.seed is 1, sea-v1 says 225"),
    "search seed": (put("protocol", "search_seed", value=1), r"protocol\.search_seed is 1, sea-v1 says 0"),
    "orders": (put("protocol", "search_orders", value=1), r"protocol\.search_orders is 1, sea-v1 says 8"),
    "no evidence": (put("evidence", value=None), r"claim\.tier is 'checked' without evidence: add.*or say 'reported'"),
    "unknown key": (put("extra", value=1), r"document: .*'extra' was unexpected"),
    "unknown key below": (put("clean", "fwiou", value=0.5), r"clean: .*'fwiou' was unexpected"),
    "missing key": (lambda entry: entry.pop("flags"), "document: 'flags' is a required property"),
    "percent": (put("clean", "miou", value=82.1), r"clean\.miou: 82.1 is greater than the maximum of 1"),
    "text for a number": (put("clean", "miou", value="0.82"), r"clean\.miou: '0.82' is not of type 'number'"),
    "null for a number": (put("clean", "miou", value=None), r"clean\.miou: None is not of type 'number'"),
    "truth for a number": (put("clean", "miou", value=True), r"clean\.miou: True is not of type 'number'"),
    "no result": (put("results", value=[]), "results: .*(non-empty|too short)"),
    "id with a line break": (put("model", "id", value=MODEL + "\n"), r"model\.id: .* does not match"),
    "path in the evidence": (put("evidence", "file", value="../x.parquet"), r"evidence\.file: .* does not match"),
    "http": (
        put("paper", value=paper("http://x.org")),
        r"paper\.url: .* is not an https:// link",
    ),
    "date": (put("claim", "date", value="31.1.2026"), r"claim\.date: .* does not match"),
    "tier": (put("claim", "tier", value="official"), r"claim\.tier: 'official' is not one of"),
    "tier that a record gives": (put("claim", "tier", value="reproduced"), r"claim\.tier: 'reproduced' is not one of"),
    "source": (put("claim", "source", value="A paper"), r"claim\.source is for reported numbers: set it to null"),
    "reported with evidence": (
        lambda entry: entry["claim"].update(tier="reported", source="A paper"),
        r"claim\.tier is 'reported', but evidence, run or protocol\.official is that of a run: say 'checked'",
    ),
    "seed left out": (put("protocol", "seed", value=None), r"protocol\.seed is null: only reported entries"),
    "weights left out": (put("model", "weights_sha256", value=None), r"model\.weights_sha256 is null: only reported"),
    "history": (put("history", value=[{"date": "2026-02-31", "text": "A day that is none."}]), r"history\.0\.date"),
    "huge number": (put("run", "seconds", value=1e308), r"run\.seconds: 1e\+308 is greater than the maximum"),
    "title of 100 kB": (put("model", "title", value="x" * 100_000), r"model\.title: .*is too long"),
    "link with a user name": (put("paper", value=paper("https://good.org@evil.org/")), r"paper\.url: .* is not an"),
    "link that ends an attribute": (put("paper", value=paper("https://x.org/\"onclick=1")), r"paper\.url: .* is not"),
    "script for a link": (put("paper", value=paper("javascript:alert(1)")), r"paper\.url: .* is not an https:// link"),
    "other version": (put("schema_version", value=3), r"has schema version 3; .* version 2\. Update segbench: pip"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_entry_is_named(entry_path: Path, name: str) -> None:
    edit, said = FORGERIES[name]
    entry = json.loads(entry_path.read_text())
    edit(entry)
    samples.write_json(entry_path, entry)
    found = problems(entry_path)
    assert any(matches(text, said) for text in found), found
    assert all(str(entry_path) in text for text in found)


def matches(text: str, pattern: str) -> bool:
    return re.search(pattern, text, re.DOTALL) is not None


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"seconds": 1.5', '"seconds": NaN', "NaN is not a number of JSON"),
        ('"seconds": 1.5', '"seconds": Infinity', "Infinity is not a number"),
        ('"seconds": 1.5', '"seconds": -Infinity', "-Infinity is not a number"),
        ('"seconds": 1.5', '"seconds": 1e999', "1e999 is too large"),
        ('"seconds": 1.5', f'"seconds": 1{"0" * 400}', "too large"),
        ('"seconds": 1.5', f'"seconds": 1{"0" * 5000}', "too large|valid JSON"),
        ('"seconds": 1.5', '"seconds": 1.5, "seconds": 1.5', "'seconds' occurs twice"),
        ('"seconds": 1.5', '"seconds": 1.5,', "not valid JSON"),
        ('"seconds": 1.5', '"seconds": ' + "[" * 90_000, "not valid JSON"),
        ("{", "", "not valid JSON"),
    ],
    ids=["nan", "inf", "-inf", "1e999", "400 digits", "5000 digits", "twice", "comma", "deep", "open"],
)
def test_what_is_not_strict_json_is_refused(entry_path: Path, before: str, after: str, said: str) -> None:
    text = entry_path.read_text()
    entry_path.write_text(text.replace(before, after, 1))
    (found,) = problems(entry_path)
    assert matches(found, said)
    assert entry_path.name in found


@pytest.mark.parametrize("number", [2**63, -(2**63), 10**30])
def test_integers_out_of_range_are_refused(number: int) -> None:
    with pytest.raises(ContentError, match="too large"):
        schemas.parse(f"[{number}]", source="f")
    assert schemas.parse("[9223372036854775807]", source="f") == [2**63 - 1]


@pytest.mark.parametrize("text", [r'"\ud800"', r'{"\udfff": 1}'])
def test_half_a_character_is_refused(text: str) -> None:
    with pytest.raises(ContentError, match="not valid JSON"):
        schemas.parse(text, source="f")
    assert schemas.parse(r'"\ud83d\ude00"', source="f") == "\U0001f600"


def test_a_file_that_is_not_text_is_refused(entry_path: Path) -> None:
    entry_path.write_bytes(b"\xff\xfe{}")
    (found,) = problems(entry_path)
    assert "Cannot read the entry" in found


def test_a_huge_file_is_refused(entry_path: Path) -> None:
    entry_path.write_text(" " * (schemas.MAX_CHARACTERS + 1))
    assert "has more than" in problems(entry_path)[0]


def test_a_missing_entry_is_refused(tmp_path: Path) -> None:
    assert "Cannot read the entry" in entries.validate_entry(tmp_path / "none.json", published=False)[0]


def test_an_entry_in_the_wrong_folder_is_named(entry_path: Path) -> None:
    wrong = entry_path.parents[1] / "ade20k"
    entry_path.parent.rename(wrong)
    assert any(
        f"belongs at entries/sea-v1/shapes/{MODEL}.json: move it" in text for text in problems(wrong / entry_path.name)
    )


def test_a_run_directory_has_no_path_card_or_fingerprint_to_agree_with(tmp_path: Path) -> None:
    entry, data = samples.build(MODEL, dataset="camvid")
    samples.write_json(tmp_path / f"{MODEL}.json", entry)
    (tmp_path / f"{MODEL}.parquet").write_bytes(data)
    assert entries.validate_entry(tmp_path / f"{MODEL}.json", published=False) == []


def test_the_first_entry_of_a_data_set_is_what_later_ones_are_held_to(tmp_path: Path) -> None:
    """Nobody has pinned the fingerprint of CamVid."""
    root = samples.checkout(tmp_path)
    first = samples.publish(root, MODEL, dataset="camvid")
    assert problems(first) == []
    later = samples.publish(root, OTHER, dataset="camvid")
    assert problems(later) == []
    entry = json.loads(later.read_text()) | {"claim": json.loads(later.read_text())["claim"] | {"date": "2026-02-01"}}
    entry["dataset"]["fingerprint"] = "e" * 64
    samples.write_json(later, entry)
    assert any(f"known {MODEL}.json has ffff" in text or f"{MODEL}.json has ffff" in text for text in problems(later))


def test_other_images_or_labels_than_the_known_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = samples.publish(samples.checkout(tmp_path), MODEL)
    found = evidence.from_bytes(path.with_suffix(".parquet").read_bytes(), source="f")
    monkeypatch.setattr(placement, "LABELS", {"shapes": placement.labels_digest(found)})
    assert problems(path) == []

    def fewer(found: Evidence) -> Evidence:
        rows = np.arange(5)
        groups = {
            key: Group(group.image_ids[:5], group.counts.take(rows[: len(group.image_ids)]))
            for key, group in found.groups.items()
        }
        return Evidence(groups, {**found.metadata, "dataset": {**found.metadata["dataset"], "available": 5}})

    entry = json.loads(path.read_text())
    entry["dataset"]["images"] = 5
    samples.write_json(path, entry)
    assert any("images are missing, or labels were changed" in text for text in rewrite(path, fewer))


def test_the_shipped_evidence_has_the_known_labels() -> None:
    path = content.folder("entries") / "sea-v1" / "shapes" / f"{MODEL}.parquet"
    found = evidence.from_bytes(path.read_bytes(), source="f")
    assert LABELS["shapes"] == placement.labels_digest(found)
    assert found.groups[CLEAN].image_ids == load_dataset("shapes").image_ids


def test_an_entry_without_card_is_named(entry_path: Path) -> None:
    card_path(entry_path).unlink()
    assert any("its card: Cannot read the card" in text and "Add the card" in text for text in problems(entry_path))


def card_path(entry_path: Path) -> Path:
    return entry_path.parents[3] / "model_zoo" / "shapes" / entry_path.name


def test_a_card_of_other_weights_is_named(entry_path: Path) -> None:
    samples.write_json(card_path(entry_path), samples.card(MODEL, sha256="1" * 64))
    (found,) = problems(entry_path)
    assert matches(
        found, rf"model\.weights_sha256 is '{samples.weights_hash(MODEL)}', the card {MODEL}\.json says '1+'"
    )


def test_a_reported_entry_needs_no_evidence(entry_path: Path) -> None:
    entry = json.loads(entry_path.read_text())
    entry["evidence"], entry["run"], entry["claim"]["tier"] = None, None, "reported"
    entry["protocol"].update(official=False, deviations=["of a paper"])
    samples.write_json(entry_path, entry)
    (text,) = problems(entry_path)
    assert "claim.source is null: a reported entry says where its numbers were published" in text
    entry["claim"]["source"] = "A paper, Table 2"
    samples.write_json(entry_path, entry)
    assert problems(entry_path) == []


# Evidence that does not belong to its entry.


def rewrite(entry_path: Path, change: Callable[[Evidence], Evidence]) -> list[str]:
    """Changes the evidence and states its hash, as a careful forger would; the problems found."""
    file = entry_path.with_suffix(".parquet")
    data = evidence.to_bytes(change(evidence.from_bytes(file.read_bytes(), source="f")))
    file.write_bytes(data)
    entry = json.loads(entry_path.read_text())
    entry["evidence"]["sha256"] = sha256_bytes(data)
    samples.write_json(entry_path, entry)
    return problems(entry_path)


def without(found: Evidence, *keys: tuple[float, str]) -> Evidence:
    return Evidence({key: group for key, group in found.groups.items() if key not in keys}, found.metadata)


def test_rewriting_evidence_unchanged_is_no_problem(entry_path: Path) -> None:
    """Or the tests below would show nothing."""
    assert rewrite(entry_path, lambda found: found) == []


def test_swapped_evidence_is_named(entry_path: Path) -> None:
    other = samples.publish(entry_path.parents[3], OTHER, quality=0.8)
    entry_path.with_suffix(".parquet").write_bytes(other.with_suffix(".parquet").read_bytes())
    (found,) = problems(entry_path)
    assert "evidence.sha256 is not the hash" in found


def test_evidence_of_another_model_is_named(entry_path: Path) -> None:
    """With its scores and its hash, so that only the identity differs."""
    entry, data = samples.build(OTHER, quality=0.95)
    entry_path.with_suffix(".parquet").write_bytes(data)
    mine = json.loads(entry_path.read_text())
    mine |= {key: entry[key] for key in ("clean", "results", "flags")}
    mine["evidence"]["sha256"] = entry["evidence"]["sha256"]
    samples.write_json(entry_path, mine)
    (found,) = problems(entry_path)
    assert "made with another model than the entry states: evaluate again" in found


def test_missing_evidence_is_named(entry_path: Path) -> None:
    entry_path.with_suffix(".parquet").unlink()
    (found,) = problems(entry_path)
    assert "its evidence cannot be read" in found
    assert "Put the file beside the entry" in found


def test_damaged_evidence_is_named(entry_path: Path) -> None:
    file = entry_path.with_suffix(".parquet")
    file.write_bytes(file.read_bytes()[:-20])
    entry = json.loads(entry_path.read_text())
    entry["evidence"]["sha256"] = sha256_bytes(file.read_bytes())
    samples.write_json(entry_path, entry)
    assert any("is damaged or not a Parquet file" in text for text in problems(entry_path))


def replaced(found: Evidence, key: tuple[float, str], group: Group) -> Evidence:
    return Evidence({**found.groups, key: group}, found.metadata)


def first_images(group: Group, number: int) -> Group:
    return Group(group.image_ids[:number], group.counts.take(np.arange(number)))


def test_an_image_missing_in_one_attack_is_named(entry_path: Path) -> None:
    key = (8.0, "mce")
    found = rewrite(entry_path, lambda found: replaced(found, key, first_images(found.groups[key], 5)))
    assert any("evidence of ε = 8/255, mce holds other images than the clean evidence" in text for text in found)


def test_an_image_missing_everywhere_is_named(entry_path: Path) -> None:
    def drop(found: Evidence) -> Evidence:
        groups = {key: first_images(group, min(5, len(group.image_ids))) for key, group in found.groups.items()}
        return Evidence(groups, found.metadata)

    assert any(
        "dataset.images is 6, the clean evidence holds another number" in text for text in rewrite(entry_path, drop)
    )


def test_other_labels_in_one_attack_are_named(entry_path: Path) -> None:
    def relabel(found: Evidence) -> Evidence:
        group = found.groups[4.0, "js"]
        swapped = Counts(*(np.roll(array, 1, axis=1) for array in group.counts))
        return replaced(found, (4.0, "js"), Group(group.image_ids, swapped))

    assert any("evidence of ε = 4/255 does not fit together" in text for text in rewrite(entry_path, relabel))


def restate(entry_path: Path) -> list[str]:
    """States what the evidence gives, as a careful forger would; the problems left."""
    entry = json.loads(entry_path.read_text())
    found = evidence.from_bytes(entry_path.with_suffix(".parquet").read_bytes(), source="f")
    scores = entries.recompute(found, seed=0, orders=8)
    entry |= scores
    entry["flags"] = entries.reliability(found, scores)
    samples.write_json(entry_path, entry)
    return problems(entry_path)


def test_the_strongest_loss_left_out_of_the_evidence_is_named(entry_path: Path) -> None:
    rewrite(entry_path, lambda found: without(found, (4.0, "mce_bal"), (8.0, "mce_bal"), (12.0, "mce_bal")))
    assert any("ε = 4/255: per_loss has mce, js" in text and "mce_bal, mce, js" in text for text in restate(entry_path))


def test_a_radius_left_out_of_the_evidence_is_named(entry_path: Path) -> None:
    rewrite(entry_path, lambda found: without(found, *((12.0, loss) for loss in samples.PROTOCOL.losses)))
    assert any("results lack ε = 12" in text for text in restate(entry_path))


def test_the_check_left_out_of_the_evidence_is_named(entry_path: Path) -> None:
    rewrite(entry_path, lambda found: without(found, (64.0, CHECK_LOSS)))
    assert any("no attack at a huge ε" in text for text in restate(entry_path))


def test_a_second_clean_group_is_named(entry_path: Path) -> None:
    """Under the name of an attack it would take the place of the clean candidate."""
    found = rewrite(entry_path, lambda found: replaced(found, (4.0, "clean"), found.groups[4.0, "js"]))
    assert any("ε = 4/255, clean" in text for text in found)


def test_evidence_without_clean_images_is_named(entry_path: Path) -> None:
    assert any("has no clean images" in text for text in rewrite(entry_path, lambda found: without(found, CLEAN)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checks", None),
        ("checks", 3),
        ("gradients", None),
        ("gradients", {}),
        ("gradients", {"attacks": "many", "zero_gradients": 0, "nonfinite_gradients": 0}),
        ("identity", None),
        ("identity", ["weights"]),
        ("identity", {}),
    ],
)
def test_foreign_metadata_is_named(entry_path: Path, key: str, value: Any) -> None:
    found = rewrite(entry_path, lambda found: Evidence(found.groups, {**found.metadata, key: value}))
    assert any("metadata" in text or "another" in text for text in found)


@pytest.mark.parametrize(("key", "name"), [("weights", "model"), ("fingerprint", "dataset"), ("protocol", "protocol")])
def test_evidence_of_another_identity_is_named(entry_path: Path, key: str, name: str) -> None:
    def change(found: Evidence) -> Evidence:
        identity = {**found.metadata["identity"], key: "0" * 64}
        return Evidence(found.groups, {**found.metadata, "identity": identity})

    found = rewrite(entry_path, change)
    assert any(f"made with another {name} than the entry states: evaluate again" in text for text in found)


def test_evidence_of_another_number_of_classes_is_named(entry_path: Path) -> None:
    found = rewrite(entry_path, lambda found: Evidence(found.groups, {**found.metadata, "num_classes": 5}))
    assert any("dataset.num_classes is 4, the evidence has 5" in text for text in found)


# Every number of an entry is checked.


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], float]]:
    """Places of all numbers in JSON data."""
    if isinstance(value, dict | list):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, step))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples.publish(samples.checkout(tmp_path_factory.mktemp("mutation") / "checkout"), MODEL)


@lru_cache(maxsize=1)
def numbers() -> list[tuple[tuple[str | int, ...], float]]:
    entry, _ = samples.build(MODEL)
    return list(leaves({key: entry[key] for key in ("clean", "results", "flags")}))


@pytest.mark.slow
@settings(deadline=None, max_examples=250)
@given(st.data())
def test_any_changed_number_is_reported(published: Path, data: st.DataObject) -> None:
    place, old = data.draw(st.sampled_from(numbers()))
    new = data.draw(
        st.floats(-1, 2).filter(lambda new: abs(new - old) > 1e-8)
        | st.sampled_from([old + 1e-7, old - 1e-7, -old or 1.0, 100 * old or 1.0, 1 - old if old != 0.5 else 0.6])
        | st.integers(-(10**400), 10**400).filter(lambda new: new != old)
    )
    text = published.read_text()
    entry = copy.deepcopy(json.loads(text))
    put(*place, value=new)(entry)
    try:
        samples.write_json(published, entry)
        assert problems(published) != []
    finally:
        published.write_text(text)


def test_the_mutations_reach_every_part() -> None:
    places = [".".join(map(str, place)) for place, _ in numbers()]
    assert {place.split(".")[0] for place in places} == {"clean", "results", "flags"}
    assert "results.2.interval.miou.1" in places
    assert "results.0.per_loss.js.won_aacc" in places


# Deviations from the protocol.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"iterations": 30}, ["30 iterations instead of 300"]),
        ({"images": 5}, ["5 of 6 images"]),
        ({"radii": [4.0, 8.0]}, ["without ε = 12 (/255)"]),
        ({"radii": [2.0, 4.0, 8.0, 12.0]}, []),
        ({"precision": "bf16"}, ["precision bf16"]),
        ({"split": "train"}, ["the train split"]),
        ({"class_weights_from": "val split"}, ["class weights from the val split"]),
    ],
)
def test_deviations(changes: dict[str, Any], said: list[str]) -> None:
    protocol = {"name": "sea-v1", "iterations": changes.get("iterations", 300)}
    rows = [{"strength": eps} for eps in changes.get("radii", samples.RADII)]
    dataset = {"images": 6, "available": 6, "split": "val", "class_weights_from": "training split"}
    dataset |= {key: value for key, value in changes.items() if key in dataset}
    found = entries.deviations(protocol, rows, dataset, changes.get("precision", "fp32"))
    assert found == said


# Reliability checks.


def checked(
    zero: int = 0, nonfinite: int = 0, left: float = 0.0, mious: tuple[float, ...] = (0.3, 0.2)
) -> dict[str, Any]:
    """Levels by name of the checks on 100 attacks, an aAcc left at a huge ε, and a clean mIoU of 0.5."""
    counts = Counts(np.array([[int(100 * left), 0]]), np.array([[100, 0]]), np.array([[100, 0]]))
    gradients = {"attacks": 100, "zero_gradients": zero, "nonfinite_gradients": nonfinite, "nonfinite_logits": 0}
    metadata = {"checks": [], "gradients": gradients}
    scores = {"clean": {"aacc": 0.5, "miou": 0.5}, "results": [{"aacc": miou, "miou": miou} for miou in mious]}
    found = Evidence({(64.0, CHECK_LOSS): Group(("a",), counts)}, metadata)
    return {flag["name"]: flag["level"] for flag in entries.reliability(found, scores)}


@pytest.mark.parametrize(
    ("name", "changes", "level"),
    [
        ("zero_gradients", {"zero": 0}, "ok"),
        ("zero_gradients", {"zero": 4}, "note"),
        ("zero_gradients", {"zero": 5}, "warning"),
        ("nonfinite_gradients", {"nonfinite": 0}, "ok"),
        ("nonfinite_gradients", {"nonfinite": 1}, "note"),
        ("nonfinite_gradients", {"nonfinite": 100}, "warning"),
        ("falls_to_zero", {"left": 0.02}, "ok"),
        ("falls_to_zero", {"left": 0.03}, "warning"),
        ("falls_with_eps", {"mious": (0.3, 0.2)}, "ok"),
        ("falls_with_eps", {"mious": (0.3, 0.3)}, "warning"),
        ("falls_with_eps", {"mious": (0.3, 0.0, 0.0)}, "ok"),
        ("falls_with_eps", {"mious": (0.3, 0.31)}, "warning"),
        ("falls_with_eps", {"mious": (0.6,)}, "warning"),
    ],
)
def test_levels_of_the_reliability_checks(name: str, changes: dict[str, Any], level: str) -> None:
    assert checked(**changes)[name] == level


# What is shipped.


def shipped(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in paths]


@pytest.mark.parametrize("path", shipped(entries.entry_paths()))
def test_shipped_entries_are_valid(path: Path) -> None:
    assert problems(path) == []


@pytest.mark.parametrize("path", shipped(cards.card_paths()))
def test_shipped_cards_are_valid_and_their_weights_have_the_stated_hash(path: Path) -> None:
    card = cards.read_card(path)
    assert (card.dataset, card.id) == (path.parent.name, path.stem)
    assert card.to_json() == path.read_text("utf-8")
    for weights in beside(path):
        assert sha256_bytes(weights.read_bytes()) == card.sha256


def beside(path: Path) -> list[Path]:
    """The weights that lie beside a card."""
    return [path.parent / source["file"] for source in cards.read_card(path).sources if source["type"] == "package"]


def test_every_shipped_file_belongs_to_a_card_or_an_entry() -> None:
    used = {*cards.card_paths(), *entries.entry_paths()}
    used |= {weights for path in cards.card_paths() for weights in beside(path)}
    used |= {path.with_suffix(".parquet") for path in entries.entry_paths() if entries.read_entry(path)["evidence"]}
    used |= {file for path in entries.addition_paths() for file in (path, path.with_suffix(".parquet"))}
    there = {path for name in ("model_zoo", "entries") for path in content.folder(name).rglob("*") if path.is_file()}
    assert there == used


# Cards.


def test_a_card_survives_the_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    samples.write_json(path, samples.card("m"))
    card = cards.read_card(path)
    assert card.document() == samples.card("m")
    assert card.to_json() == path.read_text()
    assert card.path == path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"more": 1}, "document: .*'more' was unexpected"),
        ({"id": "../etc"}, r"id: '../etc' does not match"),
        ({"id": "Upper"}, "id: 'Upper' does not match"),
        ({"id": ""}, "id: '' does not match"),
        ({"id": "x\n"}, "id: 'x.n' does not match"),
        ({"id": "_x"}, "id: '_x' does not match"),
        ({"dataset": "a/b/c"}, "dataset: .a/b/c. is not a data set id"),
        ({"sha256": "ABCDEF" + "0" * 58}, "sha256: .* is not a SHA-256: 64"),
        ({"sha256": "0" * 63}, "sha256: .* is not a SHA-256: 64"),
        ({"sha256": "0" * 64 + "\n"}, "sha256: .* is not a SHA-256: 64"),
        ({"num_classes": 1}, "num_classes: 1 is less than the minimum"),
        ({"num_classes": "4"}, "num_classes: '4' is not of type 'integer'"),
        ({"title": ""}, "title: "),
        ({"expected": {"aacc": 90.7, "miou": 0.6}}, r"expected\.aacc: 90.7 is greater"),
        ({"schema_version": 2}, "schema_version: 1 was expected"),
        ({"sources": [{"type": "package", "file": "../x.safetensors"}]}, r"sources\.0\.file: .* is not a file beside"),
        ({"sources": [{"type": "package", "file": "/x.safetensors"}]}, r"sources\.0\.file: .* is not a file beside"),
        ({"sources": [{"type": "package", "file": "a/../../x.safetensors"}]}, r"sources\.0\.file: .* is not a"),
        ({"sources": [{"type": "package", "file": "x.bin"}]}, r"sources\.0\.file: .* is not a file beside"),
        ({"sources": [{"type": "pickle", "file": "x.safetensors"}]}, r"sources\.0\.type: 'pickle' is not one of"),
        ({"sources": [{"type": "package"}]}, r"sources\.0: 'file' is a required property"),
        ({"paper": paper("http://x.org")}, r"paper\.url: 'http://x.org' is not an https:// link"),
        ({"paper": paper("javascript:alert(1)")}, r"paper\.url: .* is not an https:// link"),
    ],
)  # fmt: skip
def test_a_bad_card_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = tmp_path / "m.json"
    samples.write_json(path, samples.card("m", **changes))
    with pytest.raises(ContentError, match=said) as caught:
        cards.read_card(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", samples.card("m"))
def test_every_field_of_a_card_is_required(tmp_path: Path, key: str) -> None:
    path = tmp_path / "m.json"
    document = samples.card("m")
    del document[key]
    samples.write_json(path, document)
    with pytest.raises(ContentError, match=f"'{key}' is a required property"):
        cards.read_card(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "{", '{"id": "a", "id": "a"}', '{"id": NaN}'])
def test_a_card_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(ContentError, match=r"m\.json"):
        cards.read_card(path)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "model_zoo"
    for model_id, dataset in (("b_shapes", "shapes"), ("a_voc", "pascal_voc"), ("c_voc", "pascal_voc")):
        (root / dataset).mkdir(parents=True, exist_ok=True)
        samples.write_json(root / dataset / f"{model_id}.json", samples.card(model_id, dataset))
    monkeypatch.setattr(content, "folder", lambda name: tmp_path / name)
    return root


def test_list_models_sorts_and_filters(zoo: Path) -> None:
    assert [card.id for card in cards.list_models()] == ["a_voc", "b_shapes", "c_voc"]
    assert [card.id for card in cards.list_models("*voc*")] == ["a_voc", "c_voc"]
    assert cards.list_models("none*") == []


def test_get_card(zoo: Path) -> None:
    card = cards.get_card("a_voc")
    assert (card.id, card.dataset, card.path) == ("a_voc", "pascal_voc", zoo / "pascal_voc" / "a_voc.json")


def test_an_unknown_model_gets_the_nearest_names(zoo: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown model 'b_shape'\. Did you mean 'b_shapes'\?.*segbench models"):
        cards.get_card("b_shape")


@pytest.mark.parametrize("name", ["../pascal_voc/a_voc", "", "a_voc.json", "*"])
def test_a_path_is_no_model_id(zoo: Path, name: str) -> None:
    with pytest.raises(UnknownNameError, match="Unknown model"):
        cards.get_card(name)


def test_a_renamed_card_is_refused(zoo: Path) -> None:
    (zoo / "shapes" / "b_shapes.json").rename(zoo / "shapes" / "d_shapes.json")
    with pytest.raises(ContentError, match=r"says it is 'b_shapes'\. Rename the file or correct `id`"):
        cards.get_card("d_shapes")


def test_reported_entries_need_no_evidence_and_leave_out_what_papers_do_not_say(tmp_path: Path) -> None:
    entry = json.loads(entries.entry_paths()[0].read_text("utf-8"))
    entry |= {"evidence": None, "run": None, "flags": [], "clean": entry["clean"] | {"macc": None}}
    entry["claim"]["tier"] = "reported"
    for row in entry["results"]:
        row |= {"interval": None, "per_loss": None, "miou_lower_bound": None}
    path = tmp_path / "entry.json"
    samples.write_json(path, entry)
    assert entries.validate_entry(path, published=False) == []
    print_scores(entry)
    entry["claim"] |= {"tier": "checked", "date": "2026-02-30"}
    samples.write_json(path, entry)
    found = entries.validate_entry(path, published=False)
    assert any("without evidence" in text for text in found)
    assert any("2026-02-30 is not a day" in text for text in found)


def test_a_reworded_flag_keeps_an_entry_valid(tmp_path: Path) -> None:
    path = content.folder("entries") / "sea-v1" / "shapes" / f"{MODEL}.json"
    entry = json.loads(path.read_text("utf-8"))
    entry["flags"][0]["message"] = "Said in other words."
    samples.write_json(tmp_path / path.name, entry)
    (tmp_path / path.with_suffix(".parquet").name).write_bytes(path.with_suffix(".parquet").read_bytes())
    assert entries.validate_entry(tmp_path / path.name, published=False) == []
    entry["flags"][0]["level"] = "warning"
    samples.write_json(tmp_path / path.name, entry)
    assert any("flags.0.level" in text for text in entries.validate_entry(tmp_path / path.name, published=False))


# What an attacker tried.


def forged(path: Path, change: Callable[[Evidence], Evidence]) -> list[str]:
    """Evidence of another kind, and every number computed from it again."""
    found = change(evidence.from_bytes(path.with_suffix(".parquet").read_bytes(), source="f"))
    data, entry = evidence.to_bytes(found), json.loads(path.read_text())
    entry |= entries.recompute(found, seed=0, orders=8)
    entry["flags"] = entries.reliability(found, entry)
    entry["evidence"]["sha256"] = sha256_bytes(data)
    path.with_suffix(".parquet").write_bytes(data)
    samples.write_json(path, entry)
    return problems(path)


def test_a_radius_that_tables_would_call_by_another_name_is_refused(entry_path: Path) -> None:
    """4.0000001 would be shown as 4."""

    def more(found: Evidence) -> Evidence:
        groups = {
            (eps + 1e-7, loss): found.groups[CLEAN] for eps, loss in found.groups if loss in ("mce", "js", "mce_bal")
        }
        return Evidence({**found.groups, **groups}, found.metadata)

    assert any("tables name an ε with at most six digits" in text for text in forged(entry_path, more))


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"class_weights_from": "nothing at all"}, "it is not official: class weights from the nothing at all"),
        ({"other_size": "smaller"}, "it is not official: pictures of smaller pixels"),
        ({"available": 100}, "it is not official: 6 of 100 images"),
    ],
)
def test_whether_a_run_was_official_is_computed_from_its_evidence(
    entry_path: Path, about: dict[str, Any], said: str
) -> None:
    def other(found: Evidence) -> Evidence:
        return Evidence(found.groups, {**found.metadata, "dataset": {**found.metadata["dataset"], **about}})

    entry = json.loads(entry_path.read_text())
    entry["dataset"] |= {key: value for key, value in about.items() if key in entry["dataset"]}
    samples.write_json(entry_path, entry)
    assert any(said in text for text in forged(entry_path, other))


def test_the_reliability_check_must_be_that_of_the_protocol(entry_path: Path) -> None:
    def elsewhere(found: Evidence) -> Evidence:
        groups = {key: group for key, group in found.groups.items() if key[1] != CHECK_LOSS}
        return Evidence({**groups, (255.0, CHECK_LOSS): found.groups[64.0, CHECK_LOSS]}, found.metadata)

    assert any("no attack at a huge ε" in text for text in forged(entry_path, elsewhere))


def test_attacks_that_were_not_made_are_not_counted(entry_path: Path) -> None:
    def none(found: Evidence) -> Evidence:
        gradients = {**found.metadata["gradients"], "attacks": 0}
        return Evidence(found.groups, {**found.metadata, "gradients": gradients})

    assert any("counts 0 attacks on an image, it holds 54" in text for text in forged(entry_path, none))


def test_a_variant_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = samples.publish(samples.checkout(tmp_path), MODEL, dataset="camvid")
    entry = json.loads(path.read_text()) | {}
    entry["dataset"]["id"] = "camvid/official"
    samples.write_json(path, entry)
    assert any("Unknown data set 'camvid/official'" in text for text in problems(path))
