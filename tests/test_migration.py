"""`segbench entries migrate`: files that schema 1 wrote, kept in tests/golden/schema_1, become valid files of today."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from segbench import entries, evidence
from segbench.engine.rundir.store import Store
from segbench.entries import migration
from segbench.errors import ContentError, RunError
from segbench.files import sha256_bytes, sha256_file
from segbench.protocol import LINF
from tests.runs import run

GOLDEN = Path(__file__).resolve().parent / "golden" / "schema_1"
ENTRY = Path("entries/sea-v1/shapes/at_convnext_mini_shapes.json")
RECORD = ENTRY.with_suffix(".reproduced") / "2026_02_01_seed_1.json"
EXTERNAL = ENTRY.with_suffix(".external") / "square.json"
OF_AN_ENTRY = (ENTRY, EXTERNAL, RECORD)
RUNS = ("evaluation", "comparison", "targeted", "minimum")
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "checkout", tmp_path / "checkout"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "runs", tmp_path / "runs"))


def document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def problems(folder: Path) -> list[str]:
    added = [each for path in (EXTERNAL, RECORD) for each in entries.validate_addition(folder / path)]
    return entries.validate_entry(folder / ENTRY, published=True) + added


# What is published.


def test_an_entry_and_what_others_added_are_valid_afterwards(old: Path) -> None:
    with pytest.raises(ContentError, match="entries migrate"):
        entries.read_entry(old / ENTRY)
    rewritten = migration.migrate(old / "entries")
    wanted = [path for each in OF_AN_ENTRY for path in (each, each.with_suffix(".parquet"))]
    assert rewritten == sorted(old / path for path in wanted)
    assert problems(old) == []


@pytest.mark.parametrize("path", OF_AN_ENTRY, ids=lambda path: path.stem)
def test_counts_and_scores_stay(old: Path, path: Path) -> None:
    migration.migrate(old / "entries")
    before, after = (pq.read_table((folder / path).with_suffix(".parquet")) for folder in (GOLDEN / "checkout", old))
    assert before.column_names[0] == "eps_255"
    assert after.column_names == ["strength", *before.column_names[1:]]
    assert after.to_pydict() == before.rename_columns(after.column_names).to_pydict()
    assert migration._renamed(_without_versions(GOLDEN / "checkout" / path)) == _without_versions(old / path)


def _without_versions(path: Path) -> dict[str, Any]:
    """What the change of the version may not touch: all but the version, the threat and the hashes."""
    found = document(path)
    del found["schema_version"]
    found.pop("threat", None)
    if isinstance(found["protocol"], dict):
        found["protocol"].pop("threat", None)
    found.pop("entry_evidence_sha256", None)
    del found["evidence"]["sha256"]
    return found


def test_the_threat_is_named(old: Path) -> None:
    migration.migrate(old / "entries")
    linf = {"kind": "linf", "measure": "max", "unit": "1/255"}
    assert LINF.fields() == linf
    assert document(old / ENTRY)["protocol"]["threat"] == linf
    assert document(old / EXTERNAL)["threat"] == document(old / RECORD)["threat"] == linf
    for path in OF_AN_ENTRY:
        stored = pq.read_schema((old / path).with_suffix(".parquet")).metadata[evidence.METADATA_KEY]
        metadata = json.loads(stored)
        assert metadata["schema_version"] == 2
        assert metadata.get("threat", metadata.get("protocol", {}).get("threat")) == linf


def test_hashes_follow(old: Path) -> None:
    migration.migrate(old / "entries")
    for path in OF_AN_ENTRY:
        new = document(old / path)["evidence"]["sha256"]
        assert new == sha256_file((old / path).with_suffix(".parquet"))
        assert new != document(GOLDEN / "checkout" / path)["evidence"]["sha256"]
    assert document(old / RECORD)["entry_evidence_sha256"] == document(old / ENTRY)["evidence"]["sha256"]


def test_migrating_twice_changes_nothing(old: Path) -> None:
    migration.migrate(old / "entries")
    once = contents(old)
    assert migration.migrate(old / "entries") == []
    assert contents(old) == once


def test_a_record_that_was_migrated_without_its_entry_follows_later(old: Path) -> None:
    migration.migrate(old / RECORD.parent)
    assert document(old / RECORD)["schema_version"] == 2
    migration.migrate(old / "entries")
    assert problems(old) == []


@pytest.mark.parametrize("files", range(1, 7))
def test_a_killed_migration_goes_on(old: Path, files: int) -> None:
    """Killed when it would write this file, the first being 1; the journal has been written."""
    write, written = migration.write_results, 0

    def until_killed(contents: dict[Path, bytes], fix: str) -> None:
        nonlocal written
        for path, data in contents.items():
            if written == files - 1:
                raise KeyboardInterrupt
            write({path: data}, fix)
            written += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migration, "write_results", until_killed)
        with pytest.raises(KeyboardInterrupt):
            migration.migrate(old / "entries")
    assert len(migration.migrate(old / "entries")) == 6 - written
    assert problems(old) == []
    assert not (old / "entries" / migration.JOURNAL).exists()


@pytest.mark.parametrize("path", OF_AN_ENTRY, ids=lambda path: path.stem)
def test_evidence_of_another_hash_is_refused_and_nothing_is_written(old: Path, path: Path) -> None:
    forged = document(old / path)
    forged["evidence"]["sha256"] = sha256_bytes(b"something else")
    (old / path).write_text(json.dumps(forged))
    before = contents(old)
    with pytest.raises(ContentError, match=r"another hash than .*\.parquet"):
        migration.migrate(old / "entries")
    assert contents(old) == before


def test_damaged_evidence_is_refused(old: Path) -> None:
    path = (old / ENTRY).with_suffix(".parquet")
    table = pq.read_table(path, read_dictionary=["loss", "image_id"])
    pixels = table["intersection"].to_pylist()
    pixels[0] -= 1
    place = table.column_names.index("intersection")
    changed = table.set_column(place, table.schema.field(place), [pixels])
    pq.write_table(changed, path)
    before = contents(old)
    with pytest.raises(ContentError, match="does not fit its digest"):
        migration.migrate(old / "entries")
    assert contents(old) == before


def test_a_document_that_never_fitted_is_refused(old: Path) -> None:
    wrong = document(old / ENTRY)
    del wrong["clean"]
    (old / ENTRY).write_text(json.dumps(wrong))
    with pytest.raises(ContentError, match=r"at_convnext_mini_shapes\.json does not fit schema version 1: .*clean"):
        migration.migrate(old / "entries")


@pytest.mark.parametrize("wrong", ["text", ["list"], 3])
@pytest.mark.parametrize("key", ["protocol", "evidence"])
def test_a_malformed_entry_is_refused_in_words(old: Path, key: str, wrong: object) -> None:
    (old / ENTRY).write_text(json.dumps({**document(old / ENTRY), key: wrong}))
    before = contents(old)
    with pytest.raises(ContentError, match=rf"at_convnext_mini_shapes\.json: {key} is not an object"):
        migration.migrate(old / "entries")
    assert contents(old) == before


@pytest.mark.parametrize("journal", ["{", "[]", '{"a": 1}'])
def test_a_damaged_journal_is_refused_in_words(old: Path, journal: str) -> None:
    (old / "entries" / migration.JOURNAL).write_text(journal)
    with pytest.raises(ContentError, match="is damaged"):
        migration.migrate(old / "entries")


def test_other_files_stay(old: Path) -> None:
    others = {"notes.json": b"[1, 2", "list.json": b"[]", "data.parquet": b"PAR1", "card.json": b'{"eps_255": 8}'}
    for name, data in others.items():
        (old / "entries" / name).write_bytes(data)
    migration.migrate(old / "entries")
    assert {name: (old / "entries" / name).read_bytes() for name in others} == others


# Run directories.


def test_a_run_goes_on_where_it_stopped(runs: Path) -> None:
    folder = runs / "evaluation"
    settings = {"limit": 2, "iterations": 3}
    with pytest.raises(RunError, match=f"segbench entries migrate .*{folder.name}"):
        run(folder, **settings)
    stored = document(folder / "clean_convnext_mini_shapes.json")
    migration.migrate(folder)
    kept = sorted((folder / "units").iterdir())
    lost = folder / "units" / "eps8_js_0000.parquet"
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in kept if path != lost}
    entry = run(folder, **settings).entry()
    assert {path: path.stat().st_mtime_ns for path in kept if path != lost} == times
    assert lost.exists()
    rows = zip(entry["results"], stored["results"], strict=True)
    assert all(new["per_loss"]["mce"] == before["per_loss"]["mce"] for new, before in rows)


def test_a_run_keeps_its_id(runs: Path) -> None:
    before = document(runs / "evaluation" / "run.json")["run_id"]
    migration.migrate(runs)
    store = Store.open(runs / "evaluation")
    assert store.manifest["run_id"] == before
    assert store.manifest["strengths"] == [4.0, 8.0]


@pytest.mark.parametrize("name", ["comparison", "targeted"])
def test_studies_have_both_names(runs: Path, name: str) -> None:
    migration.migrate(runs)
    before, after = (document(folder / name / f"{name}.json")["rows"] for folder in (GOLDEN / "runs", runs))
    assert [row["strength"] for row in after] == [row["eps_255"] for row in after] == [row["eps_255"] for row in before]
    assert [{**row, "strength": None} for row in after] == [{**row, "strength": None} for row in before]


def test_a_search_for_the_smallest_radius_goes_on(runs: Path) -> None:
    folder = runs / "minimum"
    migration.migrate(runs)
    tried = [json.loads(line) for line in (folder / "tried.jsonl").read_text().splitlines()]
    old_lines = [json.loads(line) for line in (GOLDEN / "runs/minimum/tried.jsonl").read_text().splitlines()]
    assert [{**line, "eps_255": line["strength"]} for line in tried] == [
        {**line, "strength": line["eps_255"]} for line in old_lines
    ]
    new, before = document(folder / "minimum.json"), document(GOLDEN / "runs/minimum/minimum.json")
    assert new == {**before, "strength": before["eps_255"]}


# The command.


def test_the_command_says_what_it_did(cli: Cli, old: Path) -> None:
    code, out, err = cli("entries", "migrate", str(old / "entries"))
    assert code == 0
    assert set(out.split()) == {
        str(old / each.with_suffix(end)) for each in OF_AN_ENTRY for end in (".json", ".parquet")
    }
    assert f"6 files upgraded. Check them: segbench validate {old / 'entries'}" in err
    code, out, err = cli("entries", "migrate", str(old / "entries"), "--json")
    assert (code, json.loads(out)) == (0, [])
    assert "Nothing to upgrade" in err


def test_old_files_are_refused_with_the_command(cli: Cli, old: Path, runs: Path) -> None:
    command = f"segbench entries migrate {(old / ENTRY).parent}"
    for path in OF_AN_ENTRY:
        code, _, err = cli("validate", str(old / path))
        assert code == 1, path
        assert command in err, path
    code, _, err = cli("verify", str(old / ENTRY))
    assert code == 1
    assert command in err
    for name in RUNS:
        code, _, err = cli("status", str(runs / name))
        assert code == 1
        assert f"segbench entries migrate {runs / name}" in err


def test_a_missing_folder(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("entries", "migrate", str(tmp_path / "nothing"))
    assert code != 0
    assert "is not a folder" in err
