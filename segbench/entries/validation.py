"""Checks an entry and what lies beside it: schema, meaning, place, and every number against the evidence."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segbench import content
from segbench.entries import additions
from segbench.entries.document import read_entry
from segbench.entries.placement import placement, same_images
from segbench.entries.reading import MAX_EVIDENCE_BYTES, read_evidence
from segbench.entries.recomputation import TOLERANCE, against_evidence, evidence_of, identity_problems
from segbench.errors import ContentError, SegbenchError
from segbench.evidence import CHECKS, CLEAN, Evidence
from segbench.protocol import OFFICIAL_RADII_255, PROTOCOLS, TOLERANCES, Protocol

# What only a run of segbench knows; a reported entry has none of it.
OF_A_RUN = {
    "protocol": ("digest", "seed", "iterations", "search_seed", "search_orders"),
    "model": ("weights_sha256",),
    "dataset": ("fingerprint", "class_weights_from", "preprocessing"),
    "clean": ("aacc", "macc"),
}


def validate_entry(path: Path, *, published: bool) -> list[str]:
    """What is wrong with an entry, each problem with its mend; empty when all is well.

    Args:
        path: the entry; its evidence lies beside it.
        published: it lies in ``entries/<protocol>/<dataset>/``: path, card and data set must agree too.
    """
    try:
        entry = read_entry(path)
    except ContentError as error:
        return [str(error)]
    wrong = _tier(entry)
    found = _semantics(entry) + wrong
    if published:
        found += placement(path, entry)
    if entry["evidence"] is not None and not wrong:
        try:
            found += _with_evidence(path, entry, published=published)
        except ContentError as error:
            found.append(str(error))
    return [f"{path}: {text}" for text in found]


def _tier(entry: Mapping[str, Any]) -> list[str]:
    """What each tier must state, and what it must not."""
    claim, found = entry["claim"], []
    if claim["tier"] == "reported":
        if claim["source"] is None:
            found.append("claim.source is null: a reported entry says where its numbers were published.")
        if entry["evidence"] is not None or entry["run"] is not None or entry["protocol"]["official"]:
            found.append(
                "claim.tier is 'reported', but evidence, run or protocol.official is that of a run: say 'checked'."
            )
        return found
    if claim["source"] is not None:
        found.append("claim.source is for reported numbers: set it to null.")
    if entry["run"] is None:
        found.append(f"run is null: a {claim['tier']} entry says how it was made.")
    if entry["evidence"] is None:
        found.append(f"claim.tier is {claim['tier']!r} without evidence: add the Parquet file, or say 'reported'.")
    found += [
        f"{part}.{field} is null: only reported entries may leave it out. "
        "Take the entry as `segbench evaluate` wrote it."
        for part, fields in OF_A_RUN.items()
        for field in fields
        if entry[part][field] is None
    ]
    return found


def _with_evidence(path: Path, entry: Mapping[str, Any], *, published: bool) -> list[str]:
    evidence = evidence_of(path, entry, most=MAX_EVIDENCE_BYTES if published else None)
    name = entry["evidence"]["file"]
    found = identity_problems(entry, evidence, name)
    if published:
        found += same_images(path, entry, evidence)
    found += [
        f"{each.field} states {each.stated!r}, the evidence gives {each.computed!r}: correct the entry."
        for each in against_evidence(entry, evidence, name)
        if not each.agrees
    ]
    return found


def validate_addition(path: Path) -> list[str]:
    """What is wrong with an external evaluation or a reproduction beside an entry; empty when all is well."""
    try:
        document = additions.read_addition(path)
        entry_path = path.parent.with_name(f"{path.parent.name.partition('.')[0]}.json")
        entry = read_entry(entry_path)
        found = _beside(path, document, entry)
        published = content.entries_above(entry_path.resolve()) is not None
        if wrong := validate_entry(entry_path.resolve(), published=published):
            return [f"{path}: mend the entry beside it first: {wrong[0]}"]
        if _is_outdated(document, entry):
            return [f"{path}: {text}" for text in found]  # what it says of an older evidence is no longer looked at
        stored = evidence_of(entry_path, entry)
        added = read_evidence(path.with_suffix(".parquet"), document["evidence"]["sha256"], most=MAX_EVIDENCE_BYTES)
        identity = added.metadata.get("identity")
        for name, stated in (
            ("weights", entry["model"]["weights_sha256"]),
            ("fingerprint", entry["dataset"]["fingerprint"]),
        ):
            if not isinstance(identity, dict) or identity.get(name) != stated:
                found.append(f"its evidence was made with another {name} than the entry's: attack the listed model.")
        if added.metadata.get("threat") != entry["protocol"]["threat"]:
            found.append("its evidence was made under another threat than the entry's: attack within its budget.")
        if added.metadata["num_classes"] != entry["dataset"]["num_classes"]:
            found.append("its evidence has another number of classes than the entry's.")
        elif additions.kind_of(path) == additions.EXTERNAL:
            found += _external(document, entry, stored, added)
        else:
            found += _reproduction(document, entry, stored, added)
    except SegbenchError as error:
        return [f"{path}: {error}"]
    return [f"{path}: {text}" for text in found]


def _is_outdated(document: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether a record reproduces an evidence that the entry had before; it raises no tier any more."""
    stated = document.get("entry_evidence_sha256")
    return stated is not None and entry["evidence"] is not None and stated != entry["evidence"]["sha256"]


def _beside(path: Path, document: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    stated = {
        "model": entry["model"]["id"],
        "dataset": entry["dataset"]["id"],
        "protocol": entry["protocol"]["name"],
        "threat": entry["protocol"]["threat"],
    }
    found = [
        f"{key} is {document[key]!r}, the entry beside it says {value!r}: correct it, or move the file."
        for key, value in stated.items()
        if document[key] != value
    ]
    if document["evidence"]["file"] != f"{path.stem}.parquet":
        found.append(f"evidence.file is {document['evidence']['file']!r}: it must be named {path.stem}.parquet.")
    if "name" in document and document["name"] != path.stem:
        found.append(f"name is {document['name']!r}, the file is {path.name}: make them the same.")
    return found + _day("date", document["date"])


def _external(document: Mapping[str, Any], entry: Mapping[str, Any], stored: Evidence, added: Evidence) -> list[str]:
    computed = additions.external_results(entry, stored, added)
    return (
        []
        if _same(computed, document["results"])
        else [f"results are {document['results']}, the evidence gives {computed}: correct them."]
    )


def _reproduction(
    document: Mapping[str, Any], entry: Mapping[str, Any], stored: Evidence, added: Evidence
) -> list[str]:
    found = []
    clean = stored.groups[CLEAN]
    ids = additions.sample_ids(clean.image_ids, document["images"], document["seed"])
    if len(ids) != document["images"]:
        found.append(f"images is {document['images']}, the entry has {len(ids)}: correct it.")
    losses = {loss for eps, loss in stored.groups if eps in document["strengths"]} - CHECKS
    wanted = {CLEAN, *((eps, loss) for eps in document["strengths"] for loss in losses)}
    present = {key for key in added.groups if key[1] not in CHECKS}
    if present != wanted or any(added.groups[key].image_ids != ids for key in present):
        found.append("its evidence does not hold the images that its seed draws, under every attack of its radii.")
    rows = additions.compare(stored, added, TOLERANCES[entry["protocol"]["name"]])
    if not _same(rows, document["comparison"]) or document["agrees"] != all(row["agrees"] for row in rows):
        found.append("comparison or agrees is not what the evidence gives: take the record as it was written.")
    return found


def _same(computed: list[dict[str, Any]], stated: list[dict[str, Any]]) -> bool:
    """Whether two lists of flat rows agree up to rounding."""
    return len(computed) == len(stated) and all(
        one.keys() == other.keys()
        and all(
            abs(value - other[key]) <= TOLERANCE if isinstance(value, float) else value == other[key]
            for key, value in one.items()
        )
        for one, other in zip(computed, stated, strict=True)
    )


def _day(field: str, text: str) -> list[str]:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return [f"{field} {text} is not a day: write YYYY-MM-DD."]
    return []


def _semantics(entry: Mapping[str, Any]) -> list[str]:
    found = _day("claim.date", entry["claim"]["date"])
    for place, line in enumerate(entry["history"]):
        found += _day(f"history.{place}.date", line["date"])
    protocol = PROTOCOLS.get(entry["protocol"]["name"])
    if protocol is None:
        found.append(f"protocol.name {entry['protocol']['name']!r} is unknown; known are {', '.join(PROTOCOLS)}.")
    elif entry["protocol"]["threat"] != protocol.threat.fields():
        found.append(f"protocol.threat is not that of {protocol.name}, {protocol.threat.fields()}: correct the entry.")
    elif entry["protocol"]["official"]:
        found += _official(entry, protocol)
    if entry["protocol"]["official"] == bool(entry["protocol"]["deviations"]):
        found.append(
            "protocol.official and protocol.deviations contradict each other: an official entry has no deviation."
        )
    radii = [row["strength"] for row in entry["results"]]
    if radii != sorted(set(radii)):
        found.append("results must be sorted by strength, each ε once.")
    for row in entry["results"]:
        where = f"results at ε = {row['strength']:g}/255"
        for metric in ("aacc", "miou"):
            losses = protocol.losses if protocol else ()  # a reported entry may name other attacks
            limits = {
                "clean": entry["clean"][metric],
                **{loss: scores[metric] for loss, scores in (row["per_loss"] or {}).items() if loss in losses},
            }
            found += [
                f"{where}: the worst case {metric} {row[metric]} is above that of {name}, {value}: "
                "recompute it from the evidence."
                for name, value in limits.items()
                if value is not None and row[metric] > value + TOLERANCE
            ]
        if (row["miou_lower_bound"] or 0) > row["miou"]:
            found.append(f"{where}: miou_lower_bound is above miou: recompute it from the evidence.")
        if any(low > high for low, high in (row["interval"] or {}).values()):
            found.append(f"{where}: an interval ends before it starts.")
    return found


def _official(entry: Mapping[str, Any], protocol: Protocol) -> list[str]:
    """In what an entry that calls itself official differs from the protocol."""
    stated, found = entry["protocol"], []
    if stated["digest"] != protocol.digest():
        found.append(
            "protocol.digest is not that of the official protocol: "
            "evaluate again with this version, or set `official` to false."
        )
    found += [
        f"protocol.{field} is {stated[field]}, {protocol.name} says {getattr(protocol, field)}: correct the entry, "
        "or evaluate again."
        for field in ("seed", "iterations", "search_seed", "search_orders")
        if stated[field] != getattr(protocol, field)
    ]
    missing = [f"{eps:g}" for eps in OFFICIAL_RADII_255 if eps not in {row["strength"] for row in entry["results"]}]
    if missing:
        found.append(f"results lack ε = {', '.join(missing)} (/255): evaluate with every radius of the protocol.")
    found += [
        f"results at ε = {row['strength']:g}/255: per_loss has {', '.join(row['per_loss'])}, {protocol.name} has "
        f"{', '.join(protocol.losses)}: evaluate with every loss of the protocol."
        for row in entry["results"]
        if row["per_loss"] is not None and set(row["per_loss"]) != set(protocol.losses)
    ]
    return found
