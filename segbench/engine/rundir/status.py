"""Which units of a run directory are done, running, failed or missing, and how long the rest will take. Torch-free."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segbench.engine.rundir.plan import Unit, loss_of_unit
from segbench.engine.rundir.savings import SavedPasses, saved_passes
from segbench.engine.rundir.store import Store
from segbench.engine.rundir.workers import WorkerStatus, list_workers
from segbench.evidence import Key
from segbench.protocol import Threat


@dataclass
class Tally:
    """Numbers of units; what is neither done, running nor failed is missing."""

    units: int = 0
    done: int = 0
    running: int = 0
    failed: int = 0

    @property
    def missing(self) -> int:
        return self.units - self.done - self.running - self.failed


@dataclass(frozen=True)
class RunStatus:
    """The state of a run directory: tallies by (ε, loss), and their sum.

    ``seconds`` of the finished units are summed over all devices; ``seconds_left`` are for the processes that run
    now, None while no unit is finished; ``saved`` are the passes of images that left early, None if no log tells.
    """

    model: str
    dataset: str
    threat: Threat
    groups: Mapping[Key, Tally]
    total: Tally
    seconds: float
    seconds_left: float | None
    saved: SavedPasses | None
    workers: Sequence[WorkerStatus]

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        groups = [
            {**self.threat.names(strength), "loss": loss, **dataclasses.asdict(row), "missing": row.missing}
            for (strength, loss), row in self.groups.items()
        ]
        return {
            "model": self.model,
            "dataset": self.dataset,
            **dataclasses.asdict(self.total),
            "missing": self.total.missing,
            "seconds": self.seconds,
            "seconds_left": self.seconds_left,
            "saved_passes": None if self.saved is None else self.saved._asdict(),
            "groups": groups,
            "workers": [worker._asdict() for worker in self.workers],
        }


def run_status(store: Store) -> RunStatus:
    """Reads every unit of a run directory."""
    workers = list_workers(store.path)
    running = {unit for worker in workers if worker.state == "running" for unit in worker.units}
    failed = {unit for worker in workers if worker.state == "failed" for unit in worker.units}
    groups: dict[Key, Tally] = {}
    left: list[Unit] = []
    for unit in store.units():
        row = groups.setdefault((unit.strength, unit.loss), Tally())
        row.units += 1
        if store.read(unit) is not None:
            row.done += 1
            continue
        left.append(unit)
        row.running += unit.name in running
        row.failed += unit.name in failed and unit.name not in running
    total = Tally(*(sum(column) for column in zip(*map(dataclasses.astuple, groups.values()), strict=True)))
    costs = store.costs()
    processes = max(1, sum(worker.state == "running" for worker in workers))
    return RunStatus(
        store.manifest["model"]["id"],
        store.manifest["dataset"]["id"],
        Threat(**store.manifest["protocol"]["threat"]),
        groups,
        total,
        sum(cost["seconds"] for cost in costs.values()),
        estimate_seconds(left, costs, processes),
        saved_passes(store.costs_of(store.units())),
        workers,
    )


def estimate_seconds(units: Sequence[Unit], costs: Mapping[str, Mapping[str, Any]], processes: int) -> float | None:
    """Seconds for these units on so many processes, from finished units of the same loss; None without any."""
    by_loss: dict[str, list[float]] = {}
    for name, cost in costs.items():
        by_loss.setdefault(loss_of_unit(name), []).append(cost["seconds"] / cost["images"])
    attacks = [value for loss, values in by_loss.items() if loss != "clean" for value in values]
    if units and not attacks:
        return None
    seconds = 0.0
    for unit in units:
        seconds += len(unit.image_ids) * statistics.median(by_loss.get(unit.loss, attacks))
    return seconds / processes
