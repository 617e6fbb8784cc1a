"""Upgrades files of schema 1 to schema 2, which names a threat and strengths in place of ``eps_255``.

Covers entries, external evaluations, records of reproductions, their evidence, and run directories. Counts and scores
stay the same; the evidence files get new hashes, and every document that names one is updated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from segbench import evidence, schemas
from segbench.errors import ContentError
from segbench.evidence import Evidence
from segbench.files import sha256_bytes, write_atomic, write_results
from segbench.protocol import LINF, LINF_OF_SCHEMA_1

JOURNAL = ".segbench-migration.json"  # old hash -> new hash: what a killed migration needs to go on
FIX = "Files already upgraded are kept; run the same command again to continue."
STUDIES = ("comparison", "targeted", "sweep", "minimum")  # documents of runs, which have no version


def migrate(folder: Path) -> list[Path]:
    """Upgrades all files of schema 1 below ``folder`` and returns their paths.

    Nothing is written unless all of them can be upgraded. A migration that was killed continues when called again.

    Raises:
        ContentError: a file cannot be read, or does not fit the evidence that it names.
        RunError: a file cannot be written.
    """
    if not folder.is_dir():
        raise ContentError(f"{folder} is not a folder. Give the one that holds the entries or the run.")
    journal = folder / JOURNAL
    hashes = _hashes(journal) if journal.exists() else {}
    rewritten: dict[Path, bytes] = {}
    for path in _files(folder, "*.parquet"):
        data = _read(path)
        if (new := _evidence(data, path)) is not None:
            rewritten[path] = new
            hashes[sha256_bytes(data)] = sha256_bytes(new)
    for path in _files(folder, "*.json"):
        document = _parsed(path)
        if isinstance(document, dict) and (new_document := _document(document, path, hashes)) is not None:
            rewritten[path] = schemas.dump(new_document).encode()
    for path in _files(folder, "tried*.jsonl"):
        lines = _read(path)
        if (renamed := lines.replace(b'"eps_255":', b'"strength":')) != lines:
            rewritten[path] = renamed
    if rewritten:
        write_atomic(journal, json.dumps(hashes).encode())
        write_results(rewritten, FIX)  # the evidence first, then what names its hash
    journal.unlink(missing_ok=True)
    return sorted(rewritten)


def _hashes(journal: Path) -> dict[str, str]:
    found = _parsed(journal)
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise ContentError(
            f"{journal}, left by a migration that was killed, is damaged. Restore the folder from a copy."
        )
    return found


def _files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(folder.rglob(pattern)) if path.is_file() and not path.is_symlink()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ContentError(f"Cannot read {path}: {error}") from error


def _parsed(path: Path) -> Any:
    """A document; None if it is not JSON, which is said by whoever reads it."""
    try:
        return schemas.parse(_read(path).decode("utf-8"), source=str(path), max_characters=2**28)
    except (UnicodeDecodeError, ContentError):
        return None


def _evidence(data: bytes, path: Path) -> bytes | None:
    """Evidence of schema 1 as that of schema 2; None if it is something else."""
    try:
        first = pq.read_schema(pa.BufferReader(data)).names[:1]
    except pa.ArrowException:
        return None  # damaged: said by whoever reads it
    if first != [evidence.STRENGTH[1]]:
        return None
    found = evidence.from_bytes(data, source=str(path), schema_version=1)
    about = dict(found.metadata)
    if "protocol" in about:
        about["protocol"] = _protocol(about["protocol"], path)
    elif "identity" in about:
        about["threat"] = LINF.fields()  # of what others add; units of a run name neither
    return evidence.to_bytes(Evidence(found.groups, about))


def _protocol(fields: Any, path: Path) -> dict[str, Any]:
    if not isinstance(fields, dict) or fields.get("threat_model") != LINF_OF_SCHEMA_1:
        raise ContentError(f"{path} names no threat model of schema 1: {LINF_OF_SCHEMA_1}. Restore the file.")
    return {("threat" if key == "threat_model" else key): value for key, value in fields.items()} | {
        "threat": LINF.fields()
    }


def _document(old: dict[str, Any], path: Path, hashes: Mapping[str, str]) -> dict[str, Any] | None:
    """A document of schema 1 as that of schema 2; None if it is something else."""
    stated = old.get("schema_version")
    if "run_id" in old and "radii_255" in old and stated == 2:
        kind, new = "manifest", {**old, "schema_version": 3, "protocol": _protocol(old.get("protocol"), path)}
    elif "claim" in old and stated == 1:
        protocol = {"name": None, "threat": LINF.fields(), **_object(old, "protocol", path)}
        kind, new = "entry", {**old, "schema_version": 2, "protocol": protocol}
    elif "radii_255" in old and stated == 1:
        kind, new = "reproduction", _with_threat(old)
    elif "results" in old and "evidence" in old and stated == 1:
        kind, new = "external", _with_threat(old)
    elif str(old.get("entry_evidence_sha256")) in hashes:  # a record that was rewritten without its entry
        return _follow(dict(old), hashes)
    elif path.stem in STUDIES and '"eps_255"' in (text := json.dumps(old)) and '"strength"' not in text:
        return dict(LINF.printed(_renamed(old)))
    else:
        return None
    new = dict(_renamed(new))
    _follow(new, hashes)
    if new.get("evidence"):
        named = _object(new, "evidence", path)
        known = hashes.get(str(named.get("sha256")))
        if known is None:
            raise ContentError(
                f"{path} names evidence of another hash than {named.get('file')} beside it: restore the file."
            )
        new["evidence"] = {**named, "sha256": known}
    if wrong := schemas.problems(kind, new):
        raise ContentError(f"{path} does not fit schema version 1: {wrong[0]}. Restore the file.")
    return new


def _object(document: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = document.get(key)
    if not isinstance(found, dict):
        raise ContentError(f"{path}: {key} is not an object. Restore the file.")
    return found


def _follow(record: dict[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """A record of a reproduction names the evidence that its entry has now."""
    named = record.get("entry_evidence_sha256")
    if isinstance(named, str) and named in hashes:
        record["entry_evidence_sha256"] = hashes[named]
    return record


def _with_threat(old: Mapping[str, Any]) -> dict[str, Any]:
    """A document of what others add: the threat after the protocol."""
    new: dict[str, Any] = {}
    for key, value in old.items():
        new[key] = value
        if key == "protocol":
            new["threat"] = LINF.fields()
    return {**new, "schema_version": 2}


def _renamed(data: Any) -> Any:
    """JSON data with strengths under their new names."""
    names = {"eps_255": "strength", "radii_255": "strengths"}
    if isinstance(data, list):
        return [_renamed(each) for each in data]
    if isinstance(data, dict):
        return {names.get(key, key): _renamed(value) for key, value in data.items()}
    return data
