"""`reproduce`: random images of an entry attacked again, and compared with its stored counts one by one."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from segbench import entries, evidence, schemas
from segbench.data import SegmentationDataset, load_dataset
from segbench.engine.evaluate import Result, evaluate
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir.manifest import class_weights_hash
from segbench.engine.rundir.store import Store
from segbench.entries import additions
from segbench.errors import ContentError, DataError, ModelError, PreemptedError, UsageError
from segbench.evidence import CHECKS, Evidence
from segbench.files import sha256_bytes, write_results
from segbench.models.load import load
from segbench.models.sources.names import parse
from segbench.protocol import PROTOCOLS, TOLERANCES, parse_eps


class Reproduced(NamedTuple):
    """The record, and the file that holds it."""

    record: dict[str, Any]
    path: Path


def reproduce(
    entry_path: Path,
    *,
    sample: int = 20,
    radii: Sequence[str | float] = (),
    model: str | None = None,
    data_root: str | Path | None = None,
    seed: int | None = None,
    by: str | None = None,
    out: Path | None = None,
    options: RunOptions | None = None,
) -> Reproduced:
    """Attacks random images of an entry again, with its model, and writes a record of what came out.

    The work is a run directory ``runs/reproduce-...``: an interrupted call goes on where it stopped.

    - ``sample``: number of images, chosen at random: by ``seed``, or so that nobody knows them before.
    - ``radii``: numerators over 255; none for all radii of the entry.
    - ``model``: what loads the model, if it is not the entry's model id.
    - ``by``: who reproduces; a record without it does not raise the tier.
    - ``out``: folder of the record; None for ``<model id>.reproduced`` beside the entry.

    Raises:
        ContentError: the entry or its evidence is damaged, or it has none.
        ModelError, DataError: the model or the data are not those of the entry.
    """
    options, entry = options or RunOptions(), entries.read_entry(entry_path)
    stored = entries.evidence_of(entry_path, entry)
    if problems := entries.identity_problems(entry, stored, entry["evidence"]["file"]):
        raise ContentError(f"{entry_path}: {problems[0]}")
    known = [row["strength"] for row in entry["results"]]
    chosen = parse_eps(radii) if radii else tuple(known)
    if lacking := [f"{eps:g}" for eps in chosen if eps not in known]:
        raise UsageError(
            f"The entry has no result at ε = {lacking[0]}/255; it has {', '.join(f'{e:g}' for e in known)}."
        )
    if by is not None and not (by.isprintable() and 0 < len(by) <= 200):
        raise UsageError(f"--by {by[:40]!r} is not a name of 1 to 200 printable characters.")
    if sample < 1:
        raise UsageError(f"The sample must have at least 1 image, not {sample}.")
    clean = stored.groups[evidence.CLEAN]
    images = min(sample, len(clean.image_ids))
    seed, run = _run_directory(entry, images, chosen, seed)
    data = _data(entry, data_root)
    ids = additions.sample_ids(clean.image_ids, images, seed)
    named = model or entry["model"]["id"]
    loaded = load(parse(named), num_classes=data.num_classes, offline=options.offline, progress=options.progress)
    _check_weights(entry, loaded.weights_sha256)
    _check_class_weights(stored, data)
    iterations = entry["protocol"]["iterations"]
    stopped: PreemptedError | None = None
    try:
        result: Result = evaluate(
            named,
            dataclasses.replace(data, image_ids=ids, complete=data.complete or len(data)),
            eps=chosen,
            protocol=entry["protocol"]["name"],
            out=run,
            iterations=None if iterations == PROTOCOLS[entry["protocol"]["name"]].iterations else iterations,
            **options._replace(precision=entry["run"]["precision"])._asdict(),
        )
    except PreemptedError as error:
        if error.result is None:
            raise
        result, stopped = error.result, error  # the record is a matter of a moment
    record, added = _record(entry, stored, result, seed=seed, images=images, radii=chosen, by=by)
    folder = out or additions.folder_of(entry_path, additions.REPRODUCED)
    path = folder / f"{record['evidence']['file'].removesuffix('.parquet')}.json"
    fix = f"Nothing is computed again: the same command with --seed {seed} --out FOLDER"
    write_results({path.with_suffix(".parquet"): added, path: schemas.dump(record).encode()}, fix)
    if stopped is not None:
        raise PreemptedError(
            f"Stopped by SIGTERM, during the last units: the reproduction is complete, its record is {path}.",
            Reproduced(record, path),
        ) from stopped
    return Reproduced(record, path)


def _run_directory(entry: dict[str, Any], images: int, radii: Sequence[float], seed: int | None) -> tuple[int, Path]:
    """The seed and the run directory: those of an unfinished run of the same kind, if no seed is given."""
    about = [entry["evidence"]["sha256"][:8], str(images), *(f"{eps:g}" for eps in radii)]
    stem = f"reproduce-{entry['model']['id']}-{'-'.join(about)}-seed"
    if seed is not None:
        if seed < 0:
            raise UsageError(f"The seed must be 0 or more, not {seed}.")
        return seed, Path("runs") / f"{stem}{seed}"
    for folder in sorted(Path("runs").glob(f"{stem}*")):
        text = folder.name.removeprefix(stem)
        finished = any(file.name != "run.json" for file in folder.glob("*.json"))
        if text.isdigit() and not finished:
            logging.getLogger("segbench").warning("%s: an unfinished reproduction goes on.", folder)
            return int(text), folder
    seed = secrets.randbelow(2**31)
    return seed, Path("runs") / f"{stem}{seed}"


def _data(entry: dict[str, Any], data_root: str | Path | None) -> SegmentationDataset:
    data = load_dataset(entry["dataset"]["id"], data_root, split=entry["dataset"]["split"])
    if entry["dataset"]["images"] < len(data):
        data = data.first(entry["dataset"]["images"])  # an entry of the first images only
    if data.fingerprint() != entry["dataset"]["fingerprint"]:
        raise DataError(
            f"The images or labels of {data.id} here are not those of the entry (another fingerprint). Look at them: "
            f"segbench data check {data.id}"
        )
    return data


def _check_weights(entry: dict[str, Any], found: str) -> None:
    if found != entry["model"]["weights_sha256"]:
        raise ModelError(
            f"This is not the model of the entry: its weights have the hash {found[:12]}..., the entry's "
            f"{entry['model']['weights_sha256'][:12]}.... Give the right one with --model."
        )


def _check_class_weights(stored: Evidence, data: SegmentationDataset) -> None:
    known = stored.metadata["identity"].get("class_weights")
    if known is not None and class_weights_hash(data) != known:
        raise DataError(
            f"The class weights of {data.id} here are not those of the entry: its training split differs. Look at it: "
            f"segbench data weights {data.id}"
        )


def _record(
    entry: dict[str, Any],
    stored: Evidence,
    result: Result,
    *,
    seed: int,
    images: int,
    radii: Sequence[float],
    by: str | None,
) -> tuple[dict[str, Any], bytes]:
    """The record and its evidence, whose identity is that of the entry: the sample is a part of its images."""
    manifest = Store.open(result.path).manifest
    found = evidence.from_bytes(result.evidence_path.read_bytes(), source=str(result.evidence_path))
    identity, own = stored.metadata["identity"], found.metadata["identity"]
    _check_weights(entry, own["weights"])
    groups = {
        key: group
        for key, group in found.groups.items()
        if key[1] not in CHECKS and (key == evidence.CLEAN or key[0] in radii)
    }
    added = Evidence(
        groups,
        {
            "num_classes": found.metadata["num_classes"],
            "identity": {"weights": identity["weights"], "fingerprint": identity["fingerprint"]},
            "threat": entry["protocol"]["threat"],
            "sample": {"seed": seed, "fingerprint": own["fingerprint"]},
        },
    )
    data = evidence.to_bytes(added)
    date = datetime.now(timezone.utc).date().isoformat()
    comparison = additions.compare(stored, added, TOLERANCES[entry["protocol"]["name"]])
    run = result.entry()["run"]
    record = {
        "schema_version": additions.ADDITION_VERSION,
        "model": entry["model"]["id"],
        "dataset": entry["dataset"]["id"],
        "protocol": entry["protocol"]["name"],
        "threat": entry["protocol"]["threat"],
        "entry_evidence_sha256": entry["evidence"]["sha256"],
        "by": by,
        "date": date,
        "seed": seed,
        "images": images,
        "strengths": list(radii),
        "comparison": comparison,
        "agrees": all(row["agrees"] for row in comparison),
        "run": {"versions": manifest["environment"]["versions"], "device": run["device"], "seconds": run["seconds"]},
        "evidence": {"file": f"{date.replace('-', '_')}_seed_{seed}.parquet", "sha256": sha256_bytes(data)},
    }
    if wrong := schemas.problems("reproduction", record):
        raise ContentError("The record does not fit its schema:\n  " + "\n  ".join(wrong[:10]))
    return record, data
