"""The run directory: a manifest, one Parquet file per unit, a log. Torch-free.

``run.json`` says what is evaluated and carries the run's identity; ``units/<name>.parquet`` holds the counts of one
unit; ``log.jsonl`` the cost of each unit (not part of any result), ``log-3-of-16.jsonl`` if a shard did it: appending
to one file from two machines is safe on no network file system. Manifest and units are written atomically.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segbench import evidence, schemas
from segbench.engine.rundir.differences import differences
from segbench.engine.rundir.lock import lock_manifest
from segbench.engine.rundir.plan import FinishedUnit, Unit, is_trial, loss_of_unit, plan
from segbench.engine.rundir.workers import FOLDER, holds_only_workers
from segbench.errors import ContentError, IncompleteError, RunError
from segbench.evidence import Evidence, Group
from segbench.files import create_atomic, write_results

MANIFEST_VERSION = 3
FIX = "Fix this and run the same command again; finished units are kept."
OTHER_OUT = "Nothing was changed. Give another folder with --out."
MAX_MANIFEST = 100_000_000  # characters: the manifest lists the image ids
COST: Mapping[str, Callable[[Any], Any]] = {
    "seconds": float, "peak_memory_bytes": int, "device": str, "images": int, "joules": float, "batch_size": int,
    "forwards": int, "most_forwards": int,
}  # fmt: skip
# null or missing where the machine does not tell, or an older version did not
UNKNOWABLE = ("joules", "batch_size", "forwards", "most_forwards")


def run_id(identity: Mapping[str, str]) -> str:
    """Identity by content: protocol, weights, data set fingerprint, class weights; precision if it is not fp32."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()


@dataclass
class Store:
    """One run directory, opened. This process writes the log ``log_name``; all are read."""

    path: Path
    manifest: dict[str, Any]
    log_name: str = "log.jsonl"

    @classmethod
    def create(cls, path: Path, manifest: dict[str, Any]) -> Store:
        """Opens ``path`` for the run that ``manifest`` describes, or creates it; radii are added to those it has.

        RunError if the directory belongs to another run, or holds something else; nothing is changed then.
        """
        store = cls.find(path, manifest)
        if store is not None and store._extended(manifest) is None:
            return store
        with lock_manifest(path):
            try:
                if create_atomic(path / "run.json", schemas.dump(manifest).encode()):
                    return cls(path, manifest)
            except OSError as error:
                raise RunError(f"Cannot write into {path}: {error}") from error
            store = cls.open(path)  # again: another process may have changed it
            store._check_same_run(manifest)
            if (extended := store._extended(manifest)) is not None:
                write_results({path / "run.json": schemas.dump(extended).encode()}, FIX)
                store.manifest = extended
            return store

    @classmethod
    def find(cls, path: Path, manifest: Mapping[str, Any]) -> Store | None:
        """The run that ``manifest`` describes, as it is in ``path``; None if nothing is there yet. Only reads.

        RunError if the directory belongs to another run, or holds something else.
        """
        if not (path / "run.json").exists():
            if _is_foreign(path) and not (path / "run.json").exists():
                raise RunError(f"{path} exists and is not a run directory. {OTHER_OUT}")
            return None
        store = cls.open(path)
        store._check_same_run(manifest)
        return store

    def _check_same_run(self, new: Mapping[str, Any]) -> None:
        old = self.manifest
        if found := differences(old, new):
            raise RunError(f"{self.path} is a run with other settings: {'; '.join(found)}. {OTHER_OUT}")
        if old["dataset"]["id"] != new["dataset"]["id"]:
            raise RunError(
                f"{self.path} is the run of the data set {old['dataset']['id']}, not {new['dataset']['id']}, though "
                f"the pictures are the same. {OTHER_OUT}"
            )
        if not same_probe(old["probe"], new["probe"]):
            raise RunError(
                f"{self.path} is the run of another model: the same weights, but other logits or gradients on the same "
                "images. Its code has changed, or it draws random numbers that torch.manual_seed does not govern. "
                f"{OTHER_OUT}"
            )

    def _extended(self, new: Mapping[str, Any]) -> dict[str, Any] | None:
        """The manifest with the radii and attacks that the run does not have yet; None if it has them all."""
        old, losses = self.manifest, self.manifest["protocol"]["losses"]
        all_radii = sorted({*old["strengths"], *new["strengths"]})
        all_losses = list(dict.fromkeys([*losses, *new["protocol"]["losses"]]))
        if all_radii == old["strengths"] and all_losses == losses:
            return None
        return {**old, "strengths": all_radii, "protocol": {**old["protocol"], "losses": all_losses}}

    @classmethod
    def open(cls, path: Path) -> Store:
        """Opens an existing run directory; RunError if there is none, or its manifest is damaged."""
        file = path / "run.json"
        try:
            manifest = schemas.parse(file.read_text("utf-8"), source=str(file), max_characters=MAX_MANIFEST)
        except (OSError, UnicodeDecodeError, ContentError) as error:
            raise RunError(f"{path} is not a usable run directory: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("schema_version") != MANIFEST_VERSION:
            stated = manifest.get("schema_version") if isinstance(manifest, dict) else None
            raise RunError(schemas.other_version(str(file), stated, MANIFEST_VERSION, str(path)))
        if wrong := schemas.problems("manifest", manifest):
            raise RunError(f"{file} is damaged ({wrong[0]}). Restore it, or give another --out folder.")
        if run_id(manifest["identity"]) != manifest["run_id"]:
            raise RunError(
                f"{file} was changed by hand: its run_id does not fit its content. "
                "Restore it, or give another --out folder."
            )
        return cls(path, manifest)

    @property
    def verb(self) -> str:
        """The command that makes this run, without its options: ``segbench evaluate`` or one of the attacks."""
        command: str = self.manifest["environment"]["command"]
        return command.partition(" --")[0]

    def units(self, strengths: Sequence[float] | None = None) -> list[Unit]:
        """The units of these radii, or of all radii of the run, in order."""
        radii = self.manifest["strengths"] if strengths is None else strengths
        protocol, ids = self.manifest["protocol"], self.manifest["image_ids"]
        trial = is_trial(protocol, images=len(ids), available=self.manifest["dataset"]["available"])
        return plan(protocol["name"], ids, radii, protocol["losses"], checked=not trial)

    def check_source(self, source: str, sample: Sequence[float]) -> None:
        """Remembers the probe of a source model of transfer attacks, or checks it against the first one."""
        if not self.knows_source(source, sample):
            file = self._source_file(source)
            try:
                create_atomic(file, json.dumps(list(sample)).encode())
            except OSError as error:
                raise RunError(f"Cannot write {file}: {error}. {FIX}") from error
            self.knows_source(source, sample)  # the first one may be another process's

    def knows_source(self, source: str, sample: Sequence[float]) -> bool:
        """Whether there are attacks on this source model; RunError if its first probe was another one.

        Weights alone do not identify a model.
        """
        file = self._source_file(source)
        if not file.exists():
            return False
        try:
            if same_probe(json.loads(file.read_bytes()), sample):
                return True
        except (OSError, ValueError) as error:
            raise RunError(f"Cannot read {file}: {error}. {FIX}") from error
        raise RunError(
            f"{self.path} has attacks on another model of the weights {source}...: the same weights, but other logits "
            f"or gradients. {OTHER_OUT}"
        )

    def _source_file(self, source: str) -> Path:
        return self.path / "sources" / f"{source}.json"

    def complete_radii(self) -> list[float]:
        """The radii of which every unit is there."""
        return [
            eps
            for eps in self.manifest["strengths"]
            if all(self.file(unit).exists() for unit in self.units([eps]) if unit.strength == eps)
        ]

    def file(self, unit: Unit) -> Path:
        return self.path / "units" / f"{unit.name}.parquet"

    def add(self, done: FinishedUnit) -> None:
        """Logs what a finished unit cost, and writes it; several threads may."""
        self.log(done.cost)
        self.write(done.unit, done.group, done.stats)

    def write(self, unit: Unit, group: Group, stats: Mapping[str, Any]) -> None:
        """Writes a finished unit, unless somebody else has; the same unit gives the same bytes."""
        metadata = {
            "run_id": self.manifest["run_id"],
            "unit": unit.name,
            "num_classes": group.counts.num_classes,
            "stats": stats,
        }
        data = evidence.to_bytes(Evidence({(unit.strength, unit.loss): group}, metadata))
        try:
            create_atomic(self.file(unit), data)
        except OSError as error:
            raise RunError(f"Cannot write {self.file(unit)}: {error}. {FIX}") from error

    def read(self, unit: Unit) -> tuple[Group, dict[str, Any]] | None:
        """Counts and statistics of a unit, or None if it is not done; RunError if its file is damaged."""
        file = self.file(unit)
        if not file.exists():
            return None
        fix = f"Nothing was overwritten. Delete the file and run `{self.verb}` again: only this unit is repeated."
        try:
            found = evidence.from_bytes(file.read_bytes(), source=str(file))
        except OSError as error:
            raise RunError(f"Cannot read {file}: {error}. {fix}") from error
        except ContentError as error:
            raise RunError(f"{error} {fix}") from error
        if found.metadata.get("run_id") != self.manifest["run_id"] or found.metadata.get("unit") != unit.name:
            raise RunError(f"{file} belongs to another run or unit. {fix}")
        group = found.groups.get((unit.strength, unit.loss))
        if group is None or group.image_ids != unit.image_ids:
            raise RunError(f"{file} does not hold the images of its unit. {fix}")
        return group, found.metadata["stats"]

    def read_all(self, units: Sequence[Unit]) -> list[tuple[Unit, Group, dict[str, Any]]]:
        """Each unit with its counts and statistics; IncompleteError if any is missing."""
        found = [(unit, self.read(unit)) for unit in units]
        if missing := [unit for unit, content in found if content is None]:
            raise IncompleteError(f"{len(missing)} of {len(units)} units are missing, the first is {missing[0].name}.")
        return [(unit, *content) for unit, content in found if content is not None]

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends the cost of a unit to the log, before the unit is written, so that a kill loses no cost."""
        append_line(self.path / self.log_name, record)

    def costs(self) -> dict[str, dict[str, Any]]:
        """Unit name to its last record; damaged lines (of a killed run) are skipped."""
        records: dict[str, dict[str, Any]] = {}
        for record in read_lines(self.path, "log*.jsonl"):
            with suppress(ValueError, TypeError, KeyError, OverflowError):  # the merge says if a cost is unknown
                unit, cost = _unit_and_cost(record)
                records[unit] = cost
        return records

    def costs_of(self, units: Sequence[Unit]) -> dict[str, dict[str, Any] | None]:
        """Unit name to cost, of those units that are finished; None where the log does not tell."""
        costs = self.costs()
        return {unit.name: costs.get(unit.name) for unit in units if self.file(unit).exists()}


def _unit_and_cost(record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A line of the log; any error if it is damaged."""
    cost: dict[str, Any] = {
        name: None if name in UNKNOWABLE and record.get(name) is None else kind(record[name])
        for name, kind in COST.items()
    }
    loss_of_unit(record["unit"])
    forwards, most = cost["forwards"], cost["most_forwards"]
    numbers = [value for value in cost.values() if isinstance(value, float | int)]
    sound = cost["images"] > 0 and all(0 <= value < math.inf for value in numbers)
    if not sound or (forwards is not None and most is not None and not 0 < forwards <= most):
        raise ValueError(record)
    return record["unit"], cost


def _is_foreign(path: Path) -> bool:
    """Whether ``path`` holds something else than a run.

    Hidden files are nobody's work: a file browser's, or what a kill left behind. Locks come before ``run.json``.
    """
    try:
        names = [file.name for file in path.iterdir() if not file.name.startswith(".")]
        return any(name != FOLDER for name in names) or (bool(names) and not holds_only_workers(path))
    except FileNotFoundError:  # or made this very moment, by another shard
        return False
    except NotADirectoryError:
        return True


def append_line(file: Path, record: Mapping[str, Any]) -> None:
    """Appends a line of JSON; several threads may."""
    line = json.dumps(dict(record)).encode() + b"\n"
    try:
        with file.open("a+b") as stream:
            cut = stream.tell() and (stream.seek(-1, os.SEEK_END), stream.read(1))[1] != b"\n"
            stream.write(b"\n" + line if cut else line)  # a kill or a full disk cut the line before
    except OSError as error:
        raise RunError(f"Cannot write {file}: {error}. {FIX}") from error


def read_lines(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """The lines of JSON in these files; those that a kill or a full disk cut are skipped."""
    try:
        texts = [file.read_bytes() for file in sorted(folder.glob(pattern))]
    except OSError as error:
        raise RunError(f"Cannot read {folder}: {error}") from error
    for line in b"\n".join(texts).decode("utf-8", "replace").splitlines():
        with suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                yield record


def check_writable(path: Path) -> None:
    """Checks that a run directory can be written, before anything is computed; leaves nothing behind."""
    folder = next(folder for folder in (path / "units", path, *path.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(f"Cannot write into {folder}: {error.strerror}. Give another folder with --out.") from error


def same_probe(old: Sequence[float], new: Sequence[float]) -> bool:
    """Whether two probes show one model, up to the rounding of another device.

    The first half are logits, the second an input gradient, each with its own scale.
    """
    if not old or not new:
        return old == new
    halves = [(values[: len(values) // 2], values[len(values) // 2 :]) for values in (old, new)]
    return all(_near(a, b) for a, b in zip(*halves, strict=True))


def _near(old: Sequence[float], new: Sequence[float]) -> bool:
    scale = max(map(abs, (*old, *new)), default=0.0)
    return len(old) == len(new) and all(abs(a - b) <= 1e-3 * scale for a, b in zip(old, new, strict=True))
