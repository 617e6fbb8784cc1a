"""Run directories as a report reads them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segbench import evidence, schemas
from segbench.engine.rundir.savings import SavedPasses, saved_passes
from segbench.engine.rundir.store import Store
from segbench.errors import ContentError, RunError, UsageError, difference
from segbench.evidence import CHECKS, CLEAN, Group, Key
from segbench.protocol import COMPARISON, MINIMUM

MAX_DOCUMENT = 200_000_000  # characters; a search lists every image
TRANSFERRED = "_from_"  # in the name of an attack that was made on another model


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: of its directory.
        manifest: what was run.
        groups: counts by (ε over 255, attack), the clean images among them; empty for a search for the smallest ε.
        documents: by kind what it wrote: ``entry``, ``comparison``, ``targeted``, ``minimum``, ``sweep``.
        saved: passes of images that left early, where attacks ran for a fixed time and the run's log tells.
    """

    path: Path
    manifest: Mapping[str, Any]
    groups: Mapping[Key, Group]
    documents: Mapping[str, Any]
    saved: SavedPasses | None = None

    @property
    def attacks(self) -> dict[float, list[str]]:
        """The attacks on this model itself, away from the labels, by radius."""
        found: dict[float, list[str]] = {}
        for eps, name in self.groups:
            if eps and name not in CHECKS and TRANSFERRED not in name and not name.startswith("js_target_"):
                found.setdefault(eps, []).append(name)
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Material:
    """Runs of one model on one data set.

    Attributes:
        main: the one that scores, curves and pictures come from: an evaluation if there is one.
        documents: of all runs, by kind, in their order.
    """

    main: Run | None
    runs: Sequence[Run]
    documents: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def first(self) -> Run:
        """The run that names model and data set."""
        return self.main or self.runs[0]


def read_runs(paths: Sequence[Path]) -> Material:
    """Reads run directories.

    Raises:
        UsageError: none is given.
        RunError: one is unfinished, damaged, or of another model or data set.
    """
    if not paths:
        raise UsageError("Give a run directory, e.g. segbench report runs/MODEL-DATASET-1234abcd")
    runs = [each for path in paths for each in _read(path)]
    one = runs[0].manifest
    for each in runs[1:]:
        if differing := _differences(each.manifest, one):
            raise RunError(
                f"{each.path} is not a run of the same model and data set as {runs[0].path}: {'; '.join(differing)}. A "
                "report is of one model on one data set: make one for each."
            )
    scored = [each for each in runs if each.attacks]
    main = next((each for each in scored if "entry" in each.documents), scored[0] if scored else None)
    documents: dict[str, list[Any]] = {}
    for each in runs:
        for kind, document in each.documents.items():
            documents.setdefault(kind, []).append(document)
    return Material(main, runs, documents)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Model, data set, split and size, with both values; how many of the images may differ."""
    if there["identity"]["weights"] != here["identity"]["weights"]:
        about = [f"{each['model']['id']} ({each['identity']['weights'][:12]}...)" for each in (there, here)]
        return [difference("model", *about)]
    fields = {"data set": "id", "split": "split", "preprocessing": "preprocessing", "size": "other_size"}
    return [
        difference(name, there["dataset"].get(key), here["dataset"].get(key))
        for name, key in fields.items()
        if there["dataset"].get(key) != here["dataset"].get(key)
    ]


def _read(path: Path) -> list[Run]:
    if (path / "sweep.json").exists():
        folders = sorted(path.glob("iterations*_seed*/run.json"))
        if not folders:
            raise RunError(f"{path} has lost its run directories. Make it again: segbench attack compare --seeds 3")
        inner = Store.open(folders[0].parent)
        return [Run(path, inner.manifest, {}, {"sweep": _document(path / "sweep.json")})]
    if not (path / "run.json").exists():
        raise RunError(f"{path} is not a run directory. Make one: segbench evaluate --model MODEL --out {path}")
    store = Store.open(path)
    name = store.manifest["protocol"]["name"]
    if name == MINIMUM:
        return [Run(path, store.manifest, {}, {"minimum": _finished(path / "minimum.json", "attack minimum")})]
    saved = saved_passes(store.costs_of(store.units()))
    if name == COMPARISON:
        kinds = [kind for kind in ("comparison", "targeted") if (path / f"{kind}.json").exists()]
        if not kinds:
            raise RunError(f"{path} is not finished. Continue: the same `segbench attack` command again.")
        groups: dict[Key, Group] = {}
        for kind in kinds:
            groups |= _groups(path / f"{kind}.parquet", store)
        documents = {kind: _document(path / f"{kind}.json") for kind in kinds}
        return [Run(path, store.manifest, groups, documents, saved)]
    model = store.manifest["model"]["id"]
    entry = _finished(path / f"{model}.json", f"merge {path}")
    return [Run(path, store.manifest, _groups(path / f"{model}.parquet", store), {"entry": entry}, saved)]


def _finished(path: Path, command: str) -> Any:
    if not path.exists():
        raise RunError(
            f"{path.parent} is not finished: it has no {path.name}. When all units are there: segbench {command}"
        )
    return _document(path)


def _document(path: Path) -> Any:
    try:
        return schemas.parse(path.read_text("utf-8"), source=str(path), max_characters=MAX_DOCUMENT)
    except (OSError, UnicodeDecodeError, ContentError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _groups(path: Path, store: Store) -> dict[Key, Group]:
    try:
        found = evidence.from_bytes(path.read_bytes(), source=str(path))
    except (OSError, ContentError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if found.metadata.get("run_id") != store.manifest["run_id"] or CLEAN not in found.groups:
        raise RunError(f"{path} is not the evidence of this run. Make it again: the command that wrote it.")
    return dict(found.groups)
