"""How long a run will take, estimated before it starts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from segbench.attacks.batch import AttackBatch
from segbench.engine.compute.worker import Worker, device_name, image_passes
from segbench.engine.rundir.plan import Unit, loss_of_unit
from segbench.engine.telemetry.progress import format_duration
from segbench.evidence import CHECK_LOSS


def expected_time(worker: Worker, units: Sequence[Unit], costs: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for the user: about how long these units take on this device; in a session.

    From finished units of the run on this device, where there are some; else from two steps of an attack, as if no
    image were finished early.
    """
    device = device_name(worker.device)
    known: dict[str, list[float]] = {}  # seconds per image, by loss
    for name, cost in costs.items():
        if cost["device"] == device:
            known.setdefault(loss_of_unit(name), []).append(cost["seconds"] / cost["images"])
    unknown = [unit for unit in units if unit.loss not in known]
    total = sum(len(unit.image_ids) * statistics.median(known[unit.loss]) for unit in units if unit.loss in known)
    if unknown:
        total += sum(image_passes(unit, worker.protocol) for unit in unknown) * seconds_per_pass(worker)
    return time_text(total, worker, upper_bound=bool(unknown))


def time_text(seconds: float, worker: Worker, *, upper_bound: bool) -> str:
    """The line that begins a run."""
    about, device = "At most about" if upper_bound else "About", device_name(worker.device)
    return f"{about} {format_duration(seconds)} on this device ({device}); Ctrl-C is safe."


def seconds_per_pass(worker: Worker) -> float:
    """Seconds of a forward and backward pass of one image, in full batches and with all streams at work."""
    sample = worker.dataset[0]
    shape = sample.image.shape
    streams = torch.get_num_threads() if worker.one_core else 1

    def measure(size: int) -> float:
        batch = AttackBatch(worker.evaluator(*shape[-2:]))
        batch.add([worker.job(Unit(1.0, CHECK_LOSS, 0, (sample.image_id,)), sample)] * size)
        batch.step()
        _wait(worker.device)
        started = time.monotonic()
        batch.step()
        _wait(worker.device)
        return (time.monotonic() - started) / size / streams

    with worker.stream_threads():
        return worker.within_memory(measure, worker.images_at_once(*shape[-2:]), shape)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
