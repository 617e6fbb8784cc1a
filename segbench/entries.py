"""Entries: the result of one model under one protocol, every number computed from its evidence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segbench import cards, content, counts, ensemble, evidence, schemas
from segbench.errors import ContentError, SegbenchError
from segbench.evidence import CHECK_LOSS, CLEAN, Evidence, Group
from segbench.files import sha256_bytes
from segbench.protocol import OFFICIAL_RADII_255, PROTOCOLS, Protocol

ENTRY_VERSION = 1
# SHA-256 of the data as a model sees it (`SegmentationDataset.fingerprint`), for data that is the same everywhere.
FINGERPRINTS: Mapping[str, str] = {
    "shapes": "2e52644c808c020aa73ecc72d855a4de60a4630d4b0638cc0dda4c7de67b6eb3",
}
TOLERANCE = 1e-9


def recompute(found: Evidence, *, seed: int, orders: int) -> dict[str, Any]:
    """``clean`` and ``results`` of an entry from its evidence.

    Args:
        found: evidence with the clean group and the groups of every radius.
        seed: of the mIoU search and the bootstrap.
        orders: number of orders in the mIoU search.

    Raises:
        ContentError: a group is missing or of no use, or groups hold different images.
    """
    for eps, loss in found.groups:
        if (eps == CLEAN[0]) != (loss == CLEAN[1]):
            raise ContentError(f"The evidence has a group of ε = {eps:g}/255, {loss}; only clean images have ε = 0.")
    clean = found.groups.get(CLEAN)
    if clean is None:
        raise ContentError("The evidence has no clean images.")
    results = []
    for eps in sorted({eps for eps, loss in found.groups if eps > 0 and loss != CHECK_LOSS}):
        losses = {loss: group for (radius, loss), group in found.groups.items() if radius == eps and loss != CHECK_LOSS}
        candidates = {"clean": clean, **losses}
        for loss, group in losses.items():
            if group.image_ids != clean.image_ids:
                raise ContentError(
                    f"The evidence of ε = {eps:g}/255, {loss} holds other images than the clean evidence."
                )
        try:
            worst = ensemble.worst_case([group.counts for group in candidates.values()], seed=seed, orders=orders)
        except SegbenchError as error:
            raise ContentError(f"The evidence of ε = {eps:g}/255 does not fit together: {error}") from error
        interval = ensemble.bootstrap_intervals(worst.aacc_counts, worst.miou_counts, seed=seed)
        results.append(
            {
                "eps_255": eps,
                "aacc": worst.aacc,
                "miou": worst.miou,
                "miou_lower_bound": worst.miou_lower_bound,
                "interval": {"aacc": list(interval.aacc), "miou": list(interval.miou)},
                "per_loss": {
                    loss: {
                        "aacc": group.counts.aacc(),
                        "miou": group.counts.miou(),
                        "won_aacc": float((worst.aacc_choice == position).mean()),
                        "won_miou": float((worst.miou_choice == position).mean()),
                    }
                    for position, (loss, group) in enumerate(candidates.items())
                    if loss != "clean"
                },
            }
        )
    scores = clean.counts
    return {"clean": {"aacc": scores.aacc(), "macc": scores.macc(), "miou": scores.miou()}, "results": results}


def flag(name: str, value: float | None, level: str, message: str) -> dict[str, Any]:
    """One reliability check: ``level`` is ``ok``, ``note`` or ``warning``."""
    return {"name": name, "level": level, "value": value, "message": message}


def reliability(found: Evidence, scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The reliability checks of an entry: those of the probe (in the metadata), and those on gradients and scores."""
    flags = list(found.metadata["checks"])
    gradients = found.metadata["gradients"]
    for name, text in (("zero_gradients", "zero everywhere"), ("nonfinite_gradients", "not finite")):
        share = gradients[name] / max(gradients["attacks"], 1)
        level = "ok" if share == 0 else "note" if share < 0.05 else "warning"
        flags.append(flag(name, share, level, f"Share of attacks on an image in which some input gradient was {text}."))
    rises = [b[m] - a[m] for a, b in _neighbours(scores) for m in ("aacc", "miou")]
    rise = max(rises, default=0.0)
    flags.append(
        flag(
            "falls_with_eps",
            rise,
            "ok" if rise <= 0 else "warning",
            "Largest rise of a robust score from one ε to the next larger one.",
        )
    )
    huge = [(eps, group) for (eps, loss), group in found.groups.items() if loss == CHECK_LOSS]
    for eps, group in huge:
        left = group.counts.aacc()
        level = "ok" if left <= 0.02 else "warning"
        flags.append(
            flag(
                "falls_to_zero",
                left,
                level,
                f"aAcc left by APGD on {group.counts.num_images} images at ε = {eps:g}/255; "
                "above 0.02 hints at masked gradients.",
            )
        )
    return flags


def _neighbours(scores: Mapping[str, Any]) -> list[tuple[Mapping[str, float], Mapping[str, float]]]:
    rows = [scores["clean"], *scores["results"]]
    return list(itertools.pairwise(rows))


def deviations(
    protocol: Mapping[str, Any], results: list[Mapping[str, Any]], images: int, available: int, precision: str
) -> list[str]:
    """In what a run differs from its official protocol; empty makes the entry official."""
    official = PROTOCOLS[protocol["name"]]
    found = []
    if protocol["iterations"] != official.iterations:
        found.append(f"{protocol['iterations']} iterations instead of {official.iterations}")
    if images != available:
        found.append(f"{images} of {available} images")
    missing = [f"{eps:g}" for eps in OFFICIAL_RADII_255 if eps not in {row["eps_255"] for row in results}]
    if missing:
        found.append(f"without ε = {', '.join(missing)} (/255)")
    if precision != "fp32":
        found.append(f"precision {precision}")
    return found


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
    differences = deviations(protocol, scores["results"], dataset["images"], dataset["available"], run["precision"])
    entry = {
        "schema_version": ENTRY_VERSION,
        "model": {key: model[key] for key in ("id", "title", "architecture", "parameters", "weights_sha256")},
        "paper": model["paper"],
        "dataset": {
            key: dataset[key] for key in ("id", "split", "images", "num_classes", "fingerprint", "class_weights_from")
        },
        "protocol": {
            "name": protocol["name"],
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
        "claim": {"tier": "checked", "submitter": submitter, "date": date},
    }
    if wrong := schemas.problems("entry", entry):
        raise ContentError("The entry does not fit its schema:\n  " + "\n  ".join(wrong[:10]))
    return entry


def merge_groups(parts: list[Group]) -> Group:
    """Chunks of one (ε, loss), in order."""
    return Group(
        tuple(image_id for part in parts for image_id in part.image_ids), counts.merge(part.counts for part in parts)
    )


def entry_paths(root: Path | None = None) -> list[Path]:
    """All entry files ``<protocol>/<dataset>/<id>.json``, sorted; the installed ones by default."""
    return sorted((root or content.folder("entries")).glob("*/*/*.json"))


def read_entry(path: Path) -> dict[str, Any]:
    """An entry that fits the schema.

    Raises:
        ContentError: missing, not JSON, or against the schema.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ContentError(f"Cannot read the entry {path}: {error}") from error
    entry: dict[str, Any] = schemas.parse(text, source=str(path))
    if wrong := schemas.problems("entry", entry):
        raise ContentError(f"The entry {path} is not valid:\n  " + "\n  ".join(wrong[:10]))
    return entry


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
                **{loss: scores[metric] for loss, scores in row["per_loss"].items()},
            }
            found += [
                f"{where}: the worst case {metric} {row[metric]} is above that of {name}, {value}: "
                "recompute it from the evidence."
                for name, value in limits.items()
                if row[metric] > value + TOLERANCE
            ]
        if row["miou_lower_bound"] > row["miou"]:
            found.append(f"{where}: miou_lower_bound is above miou: recompute it from the evidence.")
        if any(low > high for low, high in row["interval"].values()):
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
        if set(row["per_loss"]) != set(protocol.losses)
    ]
    return found


def _placement(path: Path, entry: Mapping[str, Any]) -> list[str]:
    found = []
    expected = (entry["protocol"]["name"], entry["dataset"]["id"], f"{entry['model']['id']}.json")
    if path.parts[-3:] != expected:
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
            "add it to FINGERPRINTS in segbench/entries.py."
        )
    elif entry["dataset"]["fingerprint"] != known:
        found.append(
            f"dataset.fingerprint is {entry['dataset']['fingerprint']}, known is {known}: "
            "evaluate on the unchanged data set."
        )
    card_path = path.parents[3] / "model_zoo" / entry["dataset"]["id"] / f"{entry['model']['id']}.json"
    try:
        card = cards.read_card(card_path)
    except ContentError as error:
        return [*found, f"its card: {error} Add the card."]
    pairs: dict[str, tuple[Any, Any]] = {
        "dataset.id": (entry["dataset"]["id"], card.dataset),
        "model.id": (entry["model"]["id"], card.id),
        "model.weights_sha256": (entry["model"]["weights_sha256"], card.sha256),
        "model.architecture": (entry["model"]["architecture"], card.architecture["name"]),
        "dataset.num_classes": (entry["dataset"]["num_classes"], card.num_classes),
    }
    if card.parameters is not None:
        pairs["model.parameters"] = (entry["model"]["parameters"], card.parameters)
    found += [
        f"{field} is {stated!r}, the card {card_path.name} says {known!r}: correct the wrong one, or evaluate again."
        for field, (stated, known) in pairs.items()
        if stated != known
    ]
    return found


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
    identity = found.metadata.get("identity")
    if not isinstance(identity, dict):
        raise ContentError(f"{file.name} lacks the metadata of a run: identity.")
    problems = [
        f"the evidence was made with another {name} than the entry states: evaluate again."
        for name, value in stated.items()
        if identity.get(carried[name]) != value
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
        scores["flags"] = reliability(found, scores)
    except (KeyError, TypeError) as error:
        raise ContentError(f"{file.name} lacks the metadata of a run: {error}") from error
    for field, value in scores.items():
        problems += _differences(field, value, entry[field])
    return problems


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
