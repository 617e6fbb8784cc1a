"""What others add beside an entry: external evaluations of its model, and records of its reproduction.

``<id>.external/<name>.json`` and ``.parquet``: the counts of another attack on the same model and images. With
SEA as one set of candidates they give the best known robustness.
``<id>.reproduced/<name>.json`` and ``.parquet``: some images attacked again by somebody else, compared one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segbench import ensemble, evidence, schemas
from segbench.counts import Counts
from segbench.entries.reading import read_document
from segbench.errors import ContentError, UsageError
from segbench.evidence import CHECKS, CLEAN, Evidence, Group, Key
from segbench.files import sha256_bytes
from segbench.protocol import OFFICIAL_RADII_255, TOLERANCES, Tolerance

ADDITION_VERSION = 2
EXTERNAL, REPRODUCED = "external", "reproduced"
SAMPLE = 20  # images that a reproduction must have to raise a tier, if the entry has as many
SCHEMAS = {EXTERNAL: "external", REPRODUCED: "reproduction"}


def kind_of(path: Path) -> str | None:
    """``external`` or ``reproduced`` for a file beside an entry, by its folder; None for an entry.

    >>> kind_of(Path("entries/sea-v1/shapes/a_shapes.external/square.json"))
    'external'
    """
    kind = path.parent.name.partition(".")[2]
    return kind if kind in SCHEMAS else None


def folder_of(entry_path: Path, kind: str) -> Path:
    """The folder beside an entry that holds its additions of a kind."""
    return entry_path.with_name(f"{entry_path.stem}.{kind}")


def additions(entry_path: Path, kind: str) -> list[dict[str, Any]]:
    """The documents of a kind beside an entry, sorted by name; each fits its schema.

    Raises:
        ContentError: one is damaged.
    """
    return [read_addition(path) for path in sorted(folder_of(entry_path, kind).glob("*.json"))]


def read_addition(path: Path) -> dict[str, Any]:
    """An external evaluation or a reproduction, from its file.

    Raises:
        ContentError: missing, not JSON, or against the schema.
    """
    kind = kind_of(path)
    if kind is None:
        raise ContentError(f"{path} lies in no folder <model id>.external or <model id>.reproduced: move it.")
    return read_document(SCHEMAS[kind], path)


def candidates(found: Evidence, external: Evidence) -> dict[Key, Counts]:
    """The external attacks as candidates for all images: those that were not attacked keep their clean counts.

    Raises:
        ContentError: it holds images or labels that the entry's evidence does not.
    """
    if CLEAN not in found.groups:
        raise ContentError("The entry's evidence has no clean images: mend the entry first.")
    clean = found.groups[CLEAN]
    row_of = {image_id: row for row, image_id in enumerate(clean.image_ids)}
    result = {}
    for key, group in external.groups.items():
        if key == CLEAN:
            continue
        if key[0] == CLEAN[0] or key[1] in {CLEAN[1], *CHECKS}:
            raise ContentError(f"It has an attack named {key[1]} at ε = {key[0]:g}/255: give it a name of its own.")
        if unknown := [image_id for image_id in group.image_ids if image_id not in row_of]:
            raise ContentError(f"It holds the image {unknown[0]!r}, which the entry's evidence does not.")
        rows = np.array([row_of[image_id] for image_id in group.image_ids], np.intp)
        if not np.array_equal(clean.counts.target[rows], group.counts.target):
            raise ContentError(f"Its labels at ε = {key[0]:g}/255, {key[1]} are not those of the entry's evidence.")
        whole = [array.copy() for array in clean.counts]
        for array, part in zip(whole, group.counts, strict=True):
            array[rows] = part
        result[key] = Counts(*whole)
    return result


def best_known(
    found: Evidence,
    externals: Sequence[tuple[str, Evidence]],
    results: Sequence[Mapping[str, Any]],
    search: tuple[int, int],
) -> list[dict[str, Any]]:
    """The lowest scores that are known at each radius of an entry, with all candidates together.

    Args:
        found: the entry's evidence.
        externals: name and evidence of each external evaluation.
        results: of the entry.
        search: seed and orders of the mIoU search.

    Returns:
        For each result ``{"aacc", "miou", "by"}``; ``by`` names the external evaluations that lowered a score.

    Raises:
        ContentError: external evidence does not fit the entry's.
    """
    sets = [(name, candidates(found, external)) for name, external in externals]
    rows = []
    for result in results:
        eps, known = result["strength"], {"aacc": result["aacc"], "miou": result["miou"]}
        own = [group.counts for key, group in found.groups.items() if key == CLEAN or _is_attack(key, eps)]
        # What was found within a smaller ε is within this one, too.
        added = [(name, counts) for name, each in sets for key, counts in each.items() if key[0] <= eps]
        by: set[str] = set()
        if added:
            worst = ensemble.worst_case([*own, *(counts for _, counts in added)], seed=search[0], orders=search[1])
            for metric, choice in (("aacc", worst.aacc_choice), ("miou", worst.miou_choice)):
                names = {
                    name
                    for place, (name, counts) in enumerate(added, len(own))
                    if (_is_new(counts, own) & (choice == place)).any()
                }
                if names and getattr(worst, metric) < known[metric]:
                    known[metric] = getattr(worst, metric)
                    by |= names
        rows.append({**known, "by": sorted(by)})
    return rows


def _is_new(counts: Counts, own: Sequence[Counts]) -> Any:
    """(N,) images on which a candidate differs from every one of the entry's own."""
    same = [
        (counts.intersection == each.intersection).all(axis=1) & (counts.predicted == each.predicted).all(axis=1)
        for each in own
    ]
    return ~np.any(same, axis=0)


def _is_attack(key: Key, eps: float) -> bool:
    return key[0] == eps and key[1] not in CHECKS


def overestimates(result: Mapping[str, Any], known: Mapping[str, Any], protocol: str) -> bool:
    """Whether the best known score is below SEA's by more than the tolerance of the protocol."""
    return any(result[metric] - known[metric] > TOLERANCES[protocol].worst_case for metric in ("aacc", "miou"))


def build_external(
    entry: Mapping[str, Any],
    found: Evidence,
    groups: Mapping[Key, Group],
    *,
    name: str,
    description: str,
    author: str,
    url: str,
    date: str,
) -> tuple[dict[str, Any], bytes]:
    """An external evaluation: its document and its Parquet file.

    Args:
        entry: of the model that was attacked.
        found: the entry's evidence.
        groups: (strength, name of the attack) to the counts of the images that were attacked; some may be left out.
        name: lower case letters, digits and _; the name of both files.
        description: of the attack, in words.
        author: who made it.
        url: https link to its paper or code.
        date: ISO date.

    Raises:
        ContentError: counts, names or texts are not acceptable.
    """
    identity = {
        "weights": entry["model"]["weights_sha256"],
        "fingerprint": entry["dataset"]["fingerprint"],
    }
    about = {
        "num_classes": entry["dataset"]["num_classes"],
        "identity": identity,
        "threat": entry["protocol"]["threat"],
    }
    external = Evidence(dict(groups), about)
    data = evidence.to_bytes(external)
    document = {
        "schema_version": ADDITION_VERSION,
        "model": entry["model"]["id"],
        "dataset": entry["dataset"]["id"],
        "protocol": entry["protocol"]["name"],
        "threat": entry["protocol"]["threat"],
        "name": name,
        "description": description,
        "author": author,
        "url": url,
        "date": date,
        "results": external_results(entry, found, external),
        "evidence": {"file": f"{name}.parquet", "sha256": sha256_bytes(data)},
    }
    if wrong := schemas.problems("external", document):
        raise ContentError("The external evaluation is not valid:\n  " + "\n  ".join(wrong[:10]))
    return document, data


def external_results(entry: Mapping[str, Any], found: Evidence, external: Evidence) -> list[dict[str, Any]]:
    """The worst case over the clean images and these attacks alone, at each of their radii.

    Raises:
        ContentError: a radius that the entry lacks, or evidence that does not fit.
    """
    added = candidates(found, external)
    radii = sorted({key[0] for key in added})
    known = {row["strength"] for row in entry["results"]}
    if lacking := [eps for eps in radii if eps not in known]:
        raise ContentError(f"It attacks at ε = {lacking[0]:g}/255, where the entry has no result to compare with.")
    if not radii:
        raise ContentError("It holds no attack.")
    seed, orders = entry["protocol"]["search_seed"], entry["protocol"]["search_orders"]
    rows = []
    for eps in radii:
        own = [found.groups[CLEAN].counts, *(counts for key, counts in added.items() if key[0] == eps)]
        worst = ensemble.worst_case(own, seed=seed, orders=orders)
        rows.append({"strength": eps, "aacc": worst.aacc, "miou": worst.miou})
    return rows


def sample_ids(image_ids: Sequence[str], images: int, seed: int) -> tuple[str, ...]:
    """The images of a reproduction, drawn by ``seed``, in the order of the evidence.

    Raises:
        UsageError: not a number from 1.

    >>> sample_ids(["a", "b", "c"], 2, 0)
    ('a', 'c')
    """
    if images < 1:
        raise UsageError(f"The sample must have at least 1 image, not {images}.")
    chosen = np.random.default_rng(seed).permutation(len(image_ids))[:images]
    return tuple(image_ids[row] for row in sorted(chosen.tolist()))


def compare(stored: Evidence, found: Evidence, tolerance: Tolerance) -> list[dict[str, Any]]:
    """Clean images and attacks that were made again, against the stored counts of the same images.

    Returns:
        For each (ε, attack): aAcc and mIoU of these images, stored and found, the ``largest`` difference of one
        image's accuracy, and whether all are within the tolerance; of fewer than `SAMPLE` images (and not all of
        them) only single images are judged. Scores in [0,1].

    Raises:
        ContentError: the images, labels or attacks are not those of the stored evidence.
    """
    rows = []
    for key, group in found.groups.items():
        if key[1] in CHECKS:
            continue
        if key not in stored.groups:
            raise ContentError(f"The entry's evidence has no attack {key[1]} at ε = {key[0]:g}/255.")
        old = stored.groups[key]
        row_of = {image_id: row for row, image_id in enumerate(old.image_ids)}
        if not set(group.image_ids) <= set(row_of):
            raise ContentError("The reproduction holds images that the entry's evidence does not.")
        before = old.counts.take(np.array([row_of[image_id] for image_id in group.image_ids], np.intp))
        if not np.array_equal(before.target, group.counts.target):
            raise ContentError("The reproduction's labels are not those of the entry's evidence.")
        pixels = np.maximum(before.target.sum(axis=1), 1)
        largest = float((np.abs(before.correct - group.counts.correct) / pixels).max())
        scores = before.aacc(), group.counts.aacc()
        mious = before.miou(), group.counts.miou()
        gap = max(abs(scores[0] - scores[1]), abs(mious[0] - mious[1]))
        limit = tolerance.clean if key == CLEAN else tolerance.image
        enough = len(group.image_ids) >= min(SAMPLE, len(old.image_ids))  # else sums of so few say little
        rows.append(
            {
                "strength": key[0],
                "attack": key[1],
                "stored_aacc": scores[0],
                "found_aacc": scores[1],
                "stored_miou": mious[0],
                "found_miou": mious[1],
                "largest": largest,
                "agrees": largest <= limit and (gap <= tolerance.pooled or not enough),
            }
        )
    return rows


def account(name: str) -> str:
    """A name as GitHub compares it."""
    return name.strip().removeprefix("@").casefold()


def tier(entry: Mapping[str, Any], reproductions: Sequence[Mapping[str, Any]]) -> str:
    """``reported``, ``checked``, or ``reproduced`` when somebody else's record agrees with the entry's evidence."""
    stated: str = entry["claim"]["tier"]
    if stated != "checked":
        return stated
    agreeing = [
        record
        for record in reproductions
        if record["agrees"]
        and set(record["strengths"]) & set(OFFICIAL_RADII_255)
        and record["images"] >= min(SAMPLE, entry["dataset"]["images"])
        and record["by"] is not None
        and entry["claim"]["submitter"] is not None
        and account(record["by"]) != account(entry["claim"]["submitter"])
        and record["entry_evidence_sha256"] == entry["evidence"]["sha256"]
    ]
    return "reproduced" if agreeing else "checked"
