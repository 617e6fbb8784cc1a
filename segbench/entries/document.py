"""The entry as a document: built from a finished run, read from its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segbench import content, schemas
from segbench.cards import ModelCard
from segbench.entries.additions import kind_of
from segbench.entries.reading import read_document
from segbench.entries.scores import deviations, recompute, reliability
from segbench.errors import ContentError
from segbench.evidence import Evidence
from segbench.files import sha256_bytes

ENTRY_VERSION = 2


def build(
    manifest: Mapping[str, Any],
    found: Evidence,
    *,
    evidence_name: str,
    evidence_bytes: bytes,
    run: Mapping[str, Any],
    submitter: str | None,
    date: str,
) -> dict[str, Any]:
    """The entry of a finished run.

    Args:
        manifest: of the run directory.
        found: merged evidence.
        evidence_name: name of its file, beside the entry.
        evidence_bytes: its content.
        run: versions, device and cost.
        submitter: who made the entry, if known.
        date: ISO date of the claim.

    Raises:
        ContentError: the result does not fit the schema, which is a fault of segbench.
    """
    protocol = manifest["protocol"]
    scores = recompute(found, seed=protocol["search_seed"], orders=protocol["search_orders"])
    model, dataset = manifest["model"], manifest["dataset"]
    differences = deviations(protocol, scores["results"], dataset, run["precision"])
    entry = {
        "schema_version": ENTRY_VERSION,
        "model": {key: model[key] for key in ("id", "title", "architecture", "parameters", "weights_sha256")},
        "paper": model["paper"],
        "dataset": {
            key: dataset[key]
            for key in ("id", "split", "images", "num_classes", "fingerprint", "class_weights_from", "preprocessing")
        },
        "protocol": {
            "name": protocol["name"],
            "threat": protocol["threat"],
            "digest": manifest["identity"]["protocol"],
            "seed": protocol["seed"],
            "iterations": protocol["iterations"],
            "search_seed": protocol["search_seed"],
            "search_orders": protocol["search_orders"],
            "official": not differences,
            "deviations": differences,
        },
        **scores,
        "flags": reliability(found, scores),
        "evidence": {"file": evidence_name, "sha256": sha256_bytes(evidence_bytes)},
        "run": dict(run),
        "claim": {"tier": "checked", "submitter": submitter, "date": date, "source": None},
        "history": [],
    }
    if wrong := schemas.problems("entry", entry):
        raise ContentError("The entry does not fit its schema:\n  " + "\n  ".join(wrong[:10]))
    return entry


def entry_paths(root: Path | None = None) -> list[Path]:
    """All entry files, sorted; the installed ones by default. Those at a wrong depth are there to be told."""
    return [path for path in _documents(root) if kind_of(path) is None]


def addition_paths(root: Path | None = None) -> list[Path]:
    """All external evaluations and reproductions, sorted; the installed ones by default."""
    return [path for path in _documents(root) if kind_of(path) is not None]


def _documents(root: Path | None) -> list[Path]:
    return sorted((root or content.folder("entries")).rglob("*.json"))


def entries_of(card: ModelCard, root: Path | None = None) -> list[dict[str, Any]]:
    """The entries of a card's model on its data set and the variants of it.

    Raises:
        ContentError: one is damaged.
    """
    found = [read_entry(path) for path in entry_paths(root) if path.stem == card.id]
    return [entry for entry in found if content.family(entry["dataset"]["id"]) == content.family(card.dataset)]


def read_entry(path: Path) -> dict[str, Any]:
    """An entry that fits the schema.

    Raises:
        ContentError: missing, not JSON, or against the schema.
    """
    return read_document("entry", path)
