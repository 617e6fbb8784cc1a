"""How long a run will take, told before it starts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from segbench.attacks.batch import AttackBatch
from segbench.attacks.problem import frozen
from segbench.data import Sample
from segbench.engine.plan import Unit
from segbench.engine.progress import duration
from segbench.engine.run import passes
from segbench.engine.status import loss_of
from segbench.engine.worker import Worker, device_name
from segbench.evidence import CHECK_LOSS
from segbench.models.devices import exact_float32


def expected(
    worker: Worker, units: Sequence[Unit], costs: Mapping[str, Mapping[str, Any]], sample: Sample, *, one_core: bool
) -> str:
    """One line for the user: about how long these units take on this device.

    From what units of the run took on this device before, where there are some; else from two steps of an attack, as
    if no image were finished early.
    """
    device = device_name(worker.device)
    known: dict[str, list[float]] = {}  # seconds per image, by loss
    for name, cost in costs.items():
        if cost["device"] == device:
            known.setdefault(loss_of(name), []).append(cost["seconds"] / cost["images"])
    pass_seconds = None
    total, upper = 0.0, False
    for unit in units:
        if unit.loss in known:
            total += len(unit.image_ids) * statistics.median(known[unit.loss])
            continue
        if pass_seconds is None:
            pass_seconds = seconds_per_pass(worker, sample, one_core=one_core)
        total += passes(unit, worker.protocol) * pass_seconds
        upper = True
    return f"{'At most about' if upper else 'About'} {duration(total)} on this device ({device}); Ctrl-C is safe."


def seconds_per_pass(worker: Worker, sample: Sample, *, one_core: bool) -> float:
    """Seconds of a pass forward and backward of one image in a full batch, with what `run` does side by side."""
    size, threads = worker.size(*sample.image.shape[-2:]), torch.get_num_threads()
    batch = AttackBatch(worker.evaluator(*sample.image.shape[-2:]))
    unit = Unit(1.0, CHECK_LOSS, 0, (sample.image_id,))
    torch.set_num_threads(1 if one_core else threads)
    try:
        with exact_float32(), frozen(worker.models):
            batch.add([worker.job(unit, sample)] * size)
            batch.step()
            _wait(worker.device)
            started = time.monotonic()
            batch.step()
            _wait(worker.device)
    finally:
        torch.set_num_threads(threads)
    return (time.monotonic() - started) / size / (threads if one_core else 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
