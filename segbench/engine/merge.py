"""From finished units to evidence and entry. Torch-free."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from segbench import entries, evidence, schemas
from segbench.engine.plan import Unit
from segbench.engine.store import MEND, Store
from segbench.errors import IncompleteError, RunError
from segbench.evidence import CHECK_LOSS, Evidence, Group
from segbench.files import write_atomic
from segbench.protocol import COMPARISON, MINIMUM

PASSES = ("forwards", "backwards")
ABOUT = ("id", "split", "available", "class_weights_from", "other_size")  # of the data set, where it says so
FAULTS = ("zero_gradients", "nonfinite_gradients", "nonfinite_logits")

OTHERS = {
    COMPARISON: "compares attacks; it makes no entry. `segbench attack compare` with the same --out writes "
    "comparison.json.",
    MINIMUM: "looks for the smallest ε of each image; it makes no entry. `segbench attack minimum` with the same --out "
    "writes minimum.json.",
}


class Merged(NamedTuple):
    """What `merge` wrote."""

    entry: dict[str, Any]
    entry_path: Path
    evidence_path: Path


def merge(store: Store, radii_255: Sequence[float] | None = None) -> Merged:
    """Merges these radii, or all radii of the run directory, into ``<id>.parquet`` and ``<id>.json``.

    Raises:
        IncompleteError: units are missing.
        RunError: a unit is damaged or belongs to another run.
    """
    if other := OTHERS.get(store.manifest["protocol"]["name"]):
        raise RunError(f"{store.path} {other} For an entry: segbench evaluate.")
    groups: dict[tuple[float, str], list[Group]] = {}
    totals = dict.fromkeys((*PASSES, "attacks", *FAULTS, "changed_pixels"), 0)
    missing = []
    units = store.units(radii_255)
    for unit in units:
        done = store.read(unit)
        if done is None:
            missing.append(unit)
            continue
        group, stats = done
        groups.setdefault((unit.eps_255, unit.loss), []).append(group)
        _add(totals, unit, stats)
    if missing:
        raise IncompleteError(
            f"{len(missing)} of {len(units)} units are missing, the first is {missing[0].name}. "
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
            "dataset": {key: manifest["dataset"][key] for key in ABOUT if manifest["dataset"].get(key)},
            "gradients": {name: totals[name] for name in ("attacks", *FAULTS)},
            "passes": {name: totals[name] for name in PASSES},
            "changed_pixels": totals["changed_pixels"],
        },
    )
    if not found.groups[evidence.CLEAN].counts.target.any():
        raise RunError(
            f"No pixel of {manifest['dataset']['id']} counts: every label is ignored. Nothing was merged. "
            "Correct the masks, and start again with another --out folder."
        )
    data = evidence.to_bytes(found)
    model_id = manifest["model"]["id"]
    entry_path, evidence_path = store.path / f"{model_id}.json", store.path / f"{model_id}.parquet"
    entry = entries.build(
        manifest,
        found,
        evidence_name=evidence_path.name,
        evidence_bytes=data,
        run=_run(store, units, totals),
        submitter=None,
        date=datetime.now(timezone.utc).date().isoformat(),
    )
    try:
        write_atomic(evidence_path, data)
        write_atomic(entry_path, schemas.dump(entry).encode())
    except OSError as error:
        raise RunError(f"Cannot write into {store.path}: {error}. {MEND}") from error
    return Merged(entry, entry_path, evidence_path)


def _add(totals: dict[str, int], unit: Unit, stats: dict[str, list[int]]) -> None:
    totals["forwards"] += sum(stats["forwards"]) + len(unit.image_ids)  # and one pass to count
    totals["backwards"] += sum(stats["backwards"])
    totals["changed_pixels"] += sum(stats["changed_pixels"])
    if unit.eps_255 and unit.loss != CHECK_LOSS:
        totals["attacks"] += len(unit.image_ids)
        for name in FAULTS:
            totals[name] += sum(value > 0 for value in stats[name])


def _run(store: Store, units: Sequence[Unit], totals: dict[str, int]) -> dict[str, Any]:
    """What the merged units cost; null if the log of a unit is lost."""
    records = store.costs()
    costs = [records[unit.name] for unit in units if unit.name in records]
    whole = len(costs) == len(units)
    environment = store.manifest["environment"]
    radii = sorted({unit.eps_255 for unit in units if unit.eps_255 and unit.loss != CHECK_LOSS})
    devices, sizes = {cost["device"] for cost in costs}, {cost["batch_size"] for cost in costs}
    seconds = sum(cost["seconds"] for cost in costs) if whole else None
    on_gpu = not any(device.startswith(("cpu", "mps")) for device in devices)
    energy = [cost["joules"] for cost in costs]
    return {
        **environment,
        "command": f"{environment['command']} --eps {' '.join(f'{eps:g}' for eps in radii)}",
        "device": "; ".join(sorted(devices)) or "unknown",
        "batch_size": sizes.pop() if len(sizes) == 1 else None,
        "seconds": None if seconds is None else round(seconds, 3),
        "gpu_hours": round(seconds / 3600, 4) if seconds is not None and on_gpu else None,
        "forward_passes": totals["forwards"],
        "backward_passes": totals["backwards"],
        "images_per_second": round(totals["forwards"] / seconds, 3) if seconds else None,
        "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs) if whole else None,
        "energy_joules": round(sum(energy), 1) if whole and None not in energy else None,
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
