"""Checks an entry: schema, meaning, place, and every number against the evidence."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segbench import cards, content, evidence
from segbench.entries.document import read_entry
from segbench.entries.scores import recompute, reliability
from segbench.errors import ContentError
from segbench.evidence import CHECK_LOSS, CLEAN
from segbench.files import sha256_bytes
from segbench.protocol import OFFICIAL_RADII_255, PROTOCOLS, Protocol, digest_of

# SHA-256 of the data as a model sees it (`SegmentationDataset.fingerprint`), for data that is the same everywhere.
FINGERPRINTS: Mapping[str, str] = {
    "shapes": "2e52644c808c020aa73ecc72d855a4de60a4630d4b0638cc0dda4c7de67b6eb3",
}
TOLERANCE = 1e-9
PROBE_CHECKS = {"deterministic", "logits", "eval_mode"}  # what `segbench.engine.checks.probe` stores


def validate_entry(path: Path, *, published: bool) -> list[str]:
    """What is wrong with an entry, each problem with its mend; empty when all is well.

    Args:
        path: the entry; its evidence lies beside it.
        published: it lies in ``entries/<protocol>/<dataset>/``: path, card and fingerprint must agree too.
    """
    try:
        entry = read_entry(path)
    except ContentError as error:
        return [str(error)]
    found = _semantics(entry)
    if published:
        found += _placement(path, entry)
    if entry["claim"]["tier"] == "reproduced":
        found.append("claim.tier is 'reproduced': only a reproduction by the maintainers raises it. Say 'checked'.")
    if entry["claim"]["tier"] != "reported" and entry["run"] is None:
        found.append(f"run is null: a {entry['claim']['tier']} entry says how it was made.")
    if entry["evidence"] is None:
        if entry["claim"]["tier"] != "reported":
            found.append(
                f"claim.tier is {entry['claim']['tier']!r} without evidence: add the Parquet file, or say 'reported'."
            )
        return [f"{path}: {text}" for text in found]
    try:
        found += _against_evidence(path, entry)
    except ContentError as error:
        found.append(str(error))
    return [f"{path}: {text}" for text in found]


def _semantics(entry: Mapping[str, Any]) -> list[str]:
    found = []
    try:
        datetime.date.fromisoformat(entry["claim"]["date"])
    except ValueError:
        found.append(f"claim.date {entry['claim']['date']} is not a day: write YYYY-MM-DD.")
    protocol = PROTOCOLS.get(entry["protocol"]["name"])
    if protocol is None:
        found.append(f"protocol.name {entry['protocol']['name']!r} is unknown; known are {', '.join(PROTOCOLS)}.")
    elif entry["protocol"]["official"]:
        found += _official(entry, protocol)
    if entry["protocol"]["official"] == bool(entry["protocol"]["deviations"]):
        found.append(
            "protocol.official and protocol.deviations contradict each other: an official entry has no deviation."
        )
    radii = [row["eps_255"] for row in entry["results"]]
    if radii != sorted(set(radii)):
        found.append("results must be sorted by eps_255, each ε once.")
    for row in entry["results"]:
        where = f"results at ε = {row['eps_255']:g}/255"
        for metric in ("aacc", "miou"):
            limits = {
                "clean": entry["clean"][metric],
                **{loss: scores[metric] for loss, scores in (row["per_loss"] or {}).items()},
            }
            found += [
                f"{where}: the worst case {metric} {row[metric]} is above that of {name}, {value}: "
                "recompute it from the evidence."
                for name, value in limits.items()
                if row[metric] > value + TOLERANCE
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
    missing = [f"{eps:g}" for eps in OFFICIAL_RADII_255 if eps not in {row["eps_255"] for row in entry["results"]}]
    if missing:
        found.append(f"results lack ε = {', '.join(missing)} (/255): evaluate with every radius of the protocol.")
    found += [
        f"results at ε = {row['eps_255']:g}/255: per_loss has {', '.join(row['per_loss'])}, {protocol.name} has "
        f"{', '.join(protocol.losses)}: evaluate with every loss of the protocol."
        for row in entry["results"]
        if row["per_loss"] is not None and set(row["per_loss"]) != set(protocol.losses)
    ]
    return found


def _placement(path: Path, entry: Mapping[str, Any]) -> list[str]:
    found = []
    folder = content.dataset_folder(entry["dataset"]["id"])
    expected = (entry["protocol"]["name"], folder, f"{entry['model']['id']}.json")
    above = content.entries_above(path) or path.parents[2]
    if path.relative_to(above).parts != expected:
        found.append(
            f"the entry belongs at entries/{'/'.join(expected)}: "
            "move it, or correct protocol.name, dataset.id or model.id."
        )
    if not entry["protocol"]["official"]:
        found.append(
            f"it is not official ({'; '.join(entry['protocol']['deviations'])}): evaluate with the whole protocol."
        )
    evidence_name = f"{entry['model']['id']}.parquet"
    if entry["evidence"] is not None and entry["evidence"]["file"] != evidence_name:
        found.append(f"evidence.file is {entry['evidence']['file']!r}: it must be named {evidence_name}.")
    known = FINGERPRINTS.get(entry["dataset"]["id"])
    if known is None:
        found.append(
            f"the fingerprint of {entry['dataset']['id']} is not known to this version: "
            "add it to FINGERPRINTS in segbench/entries/validation.py."
        )
    elif entry["dataset"]["fingerprint"] != known:
        found.append(
            f"dataset.fingerprint is {entry['dataset']['fingerprint']}, known is {known}: "
            "evaluate on the unchanged data set."
        )
    card_path = _card_path(above.parent / "model_zoo", entry)
    try:
        card = cards.read_card(card_path)
    except ContentError as error:
        return [*found, f"its card: {error} Add the card."]
    pairs: dict[str, tuple[Any, Any]] = {
        "dataset.id": (content.family(entry["dataset"]["id"]), content.family(card.dataset)),
        "model.id": (entry["model"]["id"], card.id),
        "model.weights_sha256": (entry["model"]["weights_sha256"], card.sha256),
        "model.architecture": (entry["model"]["architecture"], card.architecture["name"]),
        "model.title": (entry["model"]["title"], card.title),
        "paper": (entry["paper"], card.paper),
        "dataset.num_classes": (entry["dataset"]["num_classes"], card.num_classes),
    }
    if card.parameters is not None:
        pairs["model.parameters"] = (entry["model"]["parameters"], card.parameters)
    if card.sha256 is None:
        del pairs["model.weights_sha256"]
        found.append(
            f"the card {card_path.name} pins no weights: set its `sha256` to {entry['model']['weights_sha256']!r}, "
            "or to that of the file that is meant."
        )
    found += [
        f"{field} is {stated!r}, the card {card_path.name} says {known!r}: correct the wrong one, or evaluate again."
        for field, (stated, known) in pairs.items()
        if stated != known
    ]
    return found


def _card_path(zoo: Path, entry: Mapping[str, Any]) -> Path:
    """The card of the entry's model: that of a variant may lie with the data set itself."""
    file, dataset = f"{entry['model']['id']}.json", entry["dataset"]["id"]
    own = zoo / content.dataset_folder(dataset) / file
    return own if own.exists() else zoo / content.dataset_folder(content.family(dataset)) / file


def _against_evidence(path: Path, entry: Mapping[str, Any]) -> list[str]:
    file = path.parent / entry["evidence"]["file"]
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ContentError(f"its evidence cannot be read: {error}. Put the file beside the entry.") from error
    if sha256_bytes(data) != entry["evidence"]["sha256"]:
        raise ContentError(
            f"evidence.sha256 is not the hash of {file.name}: the evidence was changed or swapped. Restore it."
        )
    found = evidence.from_bytes(data, source=file.name)
    stated = {
        "model": entry["model"]["weights_sha256"],
        "dataset": entry["dataset"]["fingerprint"],
        "protocol": entry["protocol"]["digest"],
    }
    carried = {"model": "weights", "dataset": "fingerprint", "protocol": "protocol"}
    identity, about, protocol = (found.metadata.get(key) for key in ("identity", "dataset", "protocol"))
    if not (isinstance(identity, dict) and isinstance(about, dict) and isinstance(protocol, dict)):
        raise ContentError(f"{file.name} lacks the metadata of a run: identity, dataset or protocol.")
    problems = [
        f"the evidence was made with another {name} than the entry states: evaluate again."
        for name, value in stated.items()
        if identity.get(carried[name]) != value
    ]
    if digest_of(protocol) != identity.get("protocol"):
        problems.append("the evidence's protocol does not fit its digest: evaluate again.")
    problems += [
        f"dataset.{key} is {entry['dataset'][key]!r}, the evidence says {about.get(key)!r}: correct the entry."
        for key in ("id", "split", "class_weights_from")
        if entry["dataset"][key] != about.get(key)
    ]
    if found.metadata["num_classes"] != entry["dataset"]["num_classes"]:
        problems.append(
            f"dataset.num_classes is {entry['dataset']['num_classes']}, the evidence has "
            f"{found.metadata['num_classes']}: correct the entry."
        )
    if entry["protocol"]["official"] and not any(loss == CHECK_LOSS for _, loss in found.groups):
        problems.append("the evidence holds no attack at a huge ε, a reliability check: evaluate again.")
    if found.groups.get(CLEAN) is None or len(found.groups[CLEAN].image_ids) != entry["dataset"]["images"]:
        problems.append(
            f"dataset.images is {entry['dataset']['images']}, the clean evidence holds another number of images."
        )
    try:
        scores = recompute(found, seed=entry["protocol"]["search_seed"], orders=entry["protocol"]["search_orders"])
        flags = reliability(found, scores)
        passes = found.metadata["passes"]
        checks = {check["name"] for check in found.metadata["checks"]}
    except (KeyError, TypeError, ArithmeticError) as error:
        raise ContentError(f"{file.name} lacks the metadata of a run: {error}") from error
    for field, value in scores.items():
        problems += _differences(field, value, entry[field])
    if checks != PROBE_CHECKS:
        problems.append(f"the evidence must hold the checks {', '.join(sorted(PROBE_CHECKS))}: evaluate again.")
    if entry["run"] is not None:
        stated_passes = {key: entry["run"][f"{key[:-1]}_passes"] for key in ("forwards", "backwards")}
        problems += _differences("run", passes, stated_passes)
    problems += _differences("flags", _judgements(flags), _judgements(entry["flags"]))
    return problems


def _judgements(flags: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Flags without their messages, which may be reworded."""
    return [{key: flag[key] for key in ("name", "level", "value")} for flag in flags]


def _differences(where: str, computed: Any, stated: Any) -> list[str]:
    """Where a stated value differs from the computed one by more than rounding."""
    if isinstance(computed, dict) and isinstance(stated, dict):
        keys = sorted(computed.keys() | stated.keys())
        return [text for key in keys for text in _differences(f"{where}.{key}", computed.get(key), stated.get(key))]
    if isinstance(computed, list) and isinstance(stated, list) and len(computed) == len(stated):
        return [
            text
            for i, pair in enumerate(zip(computed, stated, strict=True))
            for text in _differences(f"{where}.{i}", *pair)
        ]
    numbers = isinstance(computed, float | int) and isinstance(stated, float | int)
    if numbers and math.isclose(computed, stated, rel_tol=0, abs_tol=TOLERANCE):
        return []
    return (
        []
        if computed == stated
        else [f"{where} states {stated!r}, the evidence gives {computed!r}: correct the entry."]
    )
