"""From finished units to evidence and entry. Torch-free."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from segbench import entries, evidence, schemas
from segbench.engine.plan import Unit
from segbench.engine.store import Store
from segbench.errors import IncompleteError
from segbench.evidence import CHECK_LOSS, Evidence, Group
from segbench.files import write_atomic


class Merged(NamedTuple):
    """What `merge` wrote."""

    entry: dict[str, Any]
    entry_path: Path
    evidence_path: Path


def merge(store: Store) -> Merged:
    """Merges a complete run directory into ``<id>.parquet`` and ``<id>.json``.

    Raises:
        IncompleteError: units are missing.
        RunError: a unit is damaged or belongs to another run.
    """
    groups: dict[tuple[float, str], list[Group]] = {}
    totals = dict.fromkeys(
        ("attacks", "forwards", "backwards", "zero_gradients", "nonfinite_gradients", "changed_pixels"), 0
    )
    missing = []
    for unit in store.units():
        done = store.read(unit)
        if done is None:
            missing.append(unit)
            continue
        group, stats = done
        groups.setdefault((unit.eps_255, unit.loss), []).append(group)
        _add(totals, unit, stats)
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {len(store.units())} units are missing, the first is {missing[0].name}. "
            "Continue: run the same `segbench evaluate` again."
        )
    manifest = store.manifest
    found = Evidence(
        {key: entries.merge_groups(parts) for key, parts in groups.items()},
        {
            "num_classes": manifest["dataset"]["num_classes"],
            "run_id": manifest["run_id"],
            "identity": manifest["identity"],
            "protocol": manifest["protocol"],
            "checks": manifest["checks"],
            "gradients": {name: totals[name] for name in ("attacks", "zero_gradients", "nonfinite_gradients")},
            "changed_pixels": totals["changed_pixels"],
        },
    )
    data = evidence.to_bytes(found)
    model_id = manifest["model"]["id"]
    entry_path, evidence_path = store.path / f"{model_id}.json", store.path / f"{model_id}.parquet"
    entry = entries.build(
        manifest,
        found,
        evidence_name=evidence_path.name,
        evidence_bytes=data,
        run=_run(store, totals),
        submitter=None,
        date=datetime.now(timezone.utc).date().isoformat(),
    )
    write_atomic(evidence_path, data)
    write_atomic(entry_path, schemas.dump(entry).encode())
    return Merged(entry, entry_path, evidence_path)


def _add(totals: dict[str, int], unit: Unit, stats: dict[str, list[int]]) -> None:
    totals["forwards"] += sum(stats["forwards"]) + len(unit.image_ids)  # and one pass to count
    totals["backwards"] += sum(stats["backwards"])
    totals["changed_pixels"] += sum(stats["changed_pixels"])
    if unit.eps_255 and unit.loss != CHECK_LOSS:
        totals["attacks"] += len(unit.image_ids)
        for name in ("zero_gradients", "nonfinite_gradients"):
            totals[name] += sum(value > 0 for value in stats[name])


def _run(store: Store, totals: dict[str, int]) -> dict[str, Any]:
    costs = store.costs()
    environment = store.manifest["environment"]
    return {
        **environment,
        "seconds": round(sum(cost["seconds"] for cost in costs), 3),
        "forward_passes": totals["forwards"],
        "backward_passes": totals["backwards"],
        "peak_memory_bytes": max((cost["peak_memory_bytes"] for cost in costs), default=None),
    }


def versions(packages: Iterable[str] = ("segbench", "torch", "timm", "numpy", "pyarrow")) -> dict[str, str]:
    """Versions of Python and the packages that decide a result; ``unknown`` in a plain checkout."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout at ``folder``; None outside a checkout or without git."""
    if shutil.which("git") is None or not (folder / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else None
