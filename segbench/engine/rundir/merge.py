"""From finished units to evidence and entry. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from segbench import entries, evidence, schemas
from segbench.engine.rundir.lock import lock_merge
from segbench.engine.rundir.plan import Unit
from segbench.engine.rundir.store import FIX, Store
from segbench.errors import IncompleteError, RunError
from segbench.evidence import CHECKS, Evidence, Group, Key
from segbench.files import write_results
from segbench.protocol import COMPARISON, MINIMUM

PASSES, CHANGED = ("forwards", "backwards"), "changed_pixels"  # among a unit's statistics
FAULTS = ("zero_gradients", "nonfinite_gradients", "nonfinite_logits")
DATASET_FIELDS = ("id", "split", "available", "class_weights_from", "other_size")  # kept in the evidence, where known
NO_ENTRY = {
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


def merge(store: Store, strengths: Sequence[float] | None = None) -> Merged:
    """Merges these radii and all others that are complete, or all of the run, into ``<id>.parquet`` and ``<id>.json``.

    One process at a time; it reads ``run.json`` again, to which another shard may have added radii.
    """
    with lock_merge(store.path):
        store = Store.open(store.path)
        return _merge(store, None if strengths is None else sorted({*strengths, *store.complete_radii()}))


def _merge(store: Store, strengths: Sequence[float] | None) -> Merged:
    if reason := NO_ENTRY.get(store.manifest["protocol"]["name"]):
        raise RunError(f"{store.path} {reason} For an entry: segbench evaluate.")
    manifest, units = store.manifest, store.units(strengths)
    try:
        finished = store.read_all(units)
    except IncompleteError as error:
        radii = " ".join(f"{each:g}" for each in store.manifest["strengths"])
        raise IncompleteError(
            f"{error} Continue: the same `{store.verb}` with --eps {radii}, in all shards if there are several."
        ) from error
    totals = _totals(finished)
    about = {
        "num_classes": manifest["dataset"]["num_classes"],
        **{key: manifest[key] for key in ("run_id", "identity", "protocol", "checks")},
        "dataset": {key: manifest["dataset"][key] for key in DATASET_FIELDS if manifest["dataset"].get(key)},
        "gradients": {name: totals[name] for name in ("attacks", *FAULTS)},
        "passes": {name: totals[name] for name in PASSES},
        CHANGED: totals[CHANGED],
    }
    found = Evidence(merge_units(finished), about)
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
        run=_run_cost(store, units, totals),
        submitter=None,
        date=datetime.now(timezone.utc).date().isoformat(),
    )
    write_results({evidence_path: data, entry_path: schemas.dump(entry).encode()}, FIX)
    return Merged(entry, entry_path, evidence_path)


def merge_units(finished: Sequence[tuple[Unit, Group, Any]]) -> dict[Key, Group]:
    """The counts of finished units by (ε, loss)."""
    groups: dict[Key, list[Group]] = {}
    for unit, group, _ in finished:
        groups.setdefault((unit.strength, unit.loss), []).append(group)
    return {key: entries.merge_groups(parts) for key, parts in groups.items()}


def _totals(finished: Sequence[tuple[Unit, Group, dict[str, list[int]]]]) -> dict[str, int]:
    """Passes and changed pixels of all units; attacks, and those with a fault of each kind."""
    totals = dict.fromkeys(("attacks", *PASSES, CHANGED, *FAULTS), 0)
    for unit, _, stats in finished:
        is_attack = bool(unit.strength) and unit.loss not in CHECKS
        totals["attacks"] += is_attack * len(unit.image_ids)
        for name in (*PASSES, CHANGED):
            totals[name] += sum(stats[name])
        for name in FAULTS if is_attack else ():
            totals[name] += sum(value > 0 for value in stats[name])
        totals["forwards"] += len(unit.image_ids)  # the pass that counts
    return totals


def _run_cost(store: Store, units: Sequence[Unit], totals: dict[str, int]) -> dict[str, Any]:
    """The cost of the merged units; null where the log of a unit is lost."""
    records = store.costs()
    costs = [records[unit.name] for unit in units if unit.name in records]
    whole = len(costs) == len(units)
    environment = store.manifest["environment"]
    radii = sorted({unit.strength for unit in units if unit.strength and unit.loss not in CHECKS})
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
