"""Whether a published entry lies where it belongs, and agrees with its card and with the data set as others have it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segbench import cards, content
from segbench.data.catalogue import split_id
from segbench.entries.reading import read_document, read_evidence
from segbench.errors import ContentError, UnknownNameError
from segbench.evidence import CLEAN, Evidence
from segbench.files import sha256_file

# SHA-256 of the data as a model sees it (`SegmentationDataset.fingerprint`), for data that is the same everywhere.
FINGERPRINTS: Mapping[str, str] = {
    "shapes": "2e52644c808c020aa73ecc72d855a4de60a4630d4b0638cc0dda4c7de67b6eb3",
}
# SHA-256 of image ids and labelled pixels per image and class (`labels_digest`), which every evidence repeats.
LABELS: Mapping[str, str] = {
    "shapes": "ef930dd257b3d2d8a3f951271fad76440aebebd9de7f1a1c37403d3b284432ad",
}
MAX_WEIGHTS_BYTES = 10_000_000  # of a file in the repository: everybody downloads it with the package


def labels_digest(found: Evidence) -> str:
    """What an evidence file says of the data alone: ids of the images, and labelled pixels per image and class."""
    clean = found.groups[CLEAN]
    digest = hashlib.sha256(json.dumps(clean.image_ids).encode())
    digest.update(np.ascontiguousarray(clean.counts.target, "<i8").tobytes())
    return digest.hexdigest()


def expected_path(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """Where an entry belongs below ``entries/``."""
    folder = content.dataset_folder(entry["dataset"]["id"])
    return entry["protocol"]["name"], folder, f"{entry['model']['id']}.json"


def card_placement(file: Path, card: cards.ModelCard) -> list[str]:
    """Whether a card of the zoo lies where its model belongs."""
    expected = content.dataset_folder(card.dataset), card.id
    if (file.resolve().parent.name, file.stem) == expected:
        return []
    return [f"{file}: the card belongs at model_zoo/{'/'.join(expected)}.json: move it, or correct `id` or `dataset`."]


def card_problems(file: Path, card: cards.ModelCard) -> list[str]:
    """What is wrong with the weights beside a card, and with sources that nobody else could use."""
    found = []
    for source in card.sources:
        if source["type"] == "url" and source["url"].startswith("http:"):
            found.append(f"{file}: {source['url']} leads to this machine only: give an https:// link.")
        if source["type"] != "package":
            continue
        weights = file.parent / source["file"]
        if not weights.is_file():
            found.append(f"{file}: its weights {weights.name} are missing: put them beside it.")
            continue
        if card.sha256 is None:
            found.append(f"{file}: `sha256` is null; that of {weights.name} is {sha256_file(weights)}.")
        elif sha256_file(weights) != card.sha256:
            found.append(
                f"{file}: {weights.name} does not have the SHA-256 of the card: restore the file, or correct `sha256`."
            )
        if weights.suffix != ".safetensors":
            found.append(f"{file}: {weights.name} is not safetensors. Convert it: segbench publish --dry-run.")
        if (size := weights.stat().st_size) > MAX_WEIGHTS_BYTES:
            found.append(f"{file}: {weights.name} has {size} bytes; larger weights go to the Hub: segbench publish.")
    return found


def placement(path: Path, entry: Mapping[str, Any]) -> list[str]:
    """What is wrong with the place of a published entry, each problem with its mend."""
    found = []
    expected = expected_path(entry)
    above = content.entries_above(path) or path.parents[2]
    if path.relative_to(above).parts != expected:
        found.append(
            f"the entry belongs at entries/{'/'.join(expected)}: "
            "move it, or correct protocol.name, dataset.id or model.id."
        )
    radii = [row["strength"] for row in entry["results"]]
    if odd := [eps for eps in radii if float(f"{eps:g}") != eps]:
        found.append(f"results have ε = {odd[0]!r}/255: tables name an ε with at most six digits. Evaluate with such.")
    try:
        split_id(entry["dataset"]["id"])
    except UnknownNameError as error:
        found.append(f"dataset.id: {error}")
    found += _agrees_with_card(above.parent / "model_zoo", entry)
    if entry["claim"]["tier"] == "reported":
        return found
    if not entry["protocol"]["official"]:
        found.append(
            f"it is not official ({'; '.join(entry['protocol']['deviations'])}): evaluate with the whole protocol."
        )
    evidence_name = f"{entry['model']['id']}.parquet"
    if entry["evidence"] is not None and entry["evidence"]["file"] != evidence_name:
        found.append(f"evidence.file is {entry['evidence']['file']!r}: it must be named {evidence_name}.")
    return found + _known_fingerprint(path, entry)


def _agrees_with_card(zoo: Path, entry: Mapping[str, Any]) -> list[str]:
    card_path = _card_path(zoo, entry)
    try:
        card = cards.read_card(card_path)
    except ContentError as error:
        return [f"its card: {error} Add the card."]
    pairs: dict[str, tuple[Any, Any]] = {
        "dataset.id": (content.family(entry["dataset"]["id"]), content.family(card.dataset)),
        "model.id": (entry["model"]["id"], card.id),
        "model.architecture": (entry["model"]["architecture"], card.architecture["name"]),
        "model.title": (entry["model"]["title"], card.title),
        "paper": (entry["paper"], card.paper),
        "dataset.num_classes": (entry["dataset"]["num_classes"], card.num_classes),
    }
    if card.parameters is not None:
        pairs["model.parameters"] = (entry["model"]["parameters"], card.parameters)
    found = []
    if entry["claim"]["tier"] != "reported":  # the authors' numbers name no file
        if card.sha256 is None:
            found.append(
                f"the card {card_path.name} pins no weights: set its `sha256` to "
                f"{entry['model']['weights_sha256']!r}, or to that of the file that is meant."
            )
        else:
            pairs["model.weights_sha256"] = (entry["model"]["weights_sha256"], card.sha256)
    return found + [
        f"{field} is {stated!r}, the card {card_path.name} says {known!r}: correct the wrong one, or evaluate again."
        for field, (stated, known) in pairs.items()
        if stated != known
    ]


def _card_path(zoo: Path, entry: Mapping[str, Any]) -> Path:
    """The card of the entry's model: that of a variant may lie with the data set itself."""
    file, dataset = f"{entry['model']['id']}.json", entry["dataset"]["id"]
    own = zoo / content.dataset_folder(dataset) / file
    return own if own.exists() else zoo / content.dataset_folder(content.family(dataset)) / file


def _known_fingerprint(path: Path, entry: Mapping[str, Any]) -> list[str]:
    """The data must be those that this version, or the other entries of the data set, know."""
    dataset = entry["dataset"]["id"]
    known, where = FINGERPRINTS.get(dataset), "known is"
    if known is None:
        other = first_other(path)
        if other is None:
            return []  # the first one is what the later ones are held to
        known, where = other[1]["dataset"]["fingerprint"], f"{other[0].name} has"
    if entry["dataset"]["fingerprint"] == known:
        return []
    return [
        f"dataset.fingerprint is {entry['dataset']['fingerprint']}, {where} {known}: "
        "evaluate on the unchanged data set."
    ]


def first_other(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The first other entry with evidence beside ``path``, by date and name; None if there is none."""
    found = []
    for file in sorted(path.parent.glob("*.json")):
        if file == path:
            continue
        try:
            entry = read_document("entry", file)
        except ContentError:
            continue  # what is wrong with it is said where it is validated itself
        if entry["evidence"] is not None:
            found.append((entry["claim"]["date"], file, entry))
    return min(found, key=lambda each: each[:2])[1:] if found else None


def same_images(path: Path, entry: Mapping[str, Any], found: Evidence) -> list[str]:
    """The evidence must hold the images and labels that this version, or the other entries, know."""
    known, where = LABELS.get(entry["dataset"]["id"]), "the data set"
    if known is None:
        other = first_other(path)
        if other is None:
            return []
        file, document = other
        try:
            known = labels_digest(read_evidence(file.with_suffix(".parquet"), document["evidence"]["sha256"]))
        except ContentError:
            return []  # that other entry is refused itself
        where = file.name
    if labels_digest(found) == known:
        return []
    return [
        f"the evidence does not hold the images and labels of {where}: images are missing, or labels were changed. "
        "Evaluate on the unchanged data set."
    ]
