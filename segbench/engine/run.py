"""Does the units of a run, several side by side where that is faster, and stops cleanly."""

from __future__ import annotations

import copy
import dataclasses
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from segbench import counts
from segbench.attacks.apgd import STAGES
from segbench.attacks.problem import frozen
from segbench.counts import Counts
from segbench.engine.batching import exact_float32, small_on_cpu
from segbench.engine.plan import CHECK_ITERATIONS, Unit
from segbench.engine.progress import Report, bar
from segbench.engine.store import Store
from segbench.engine.worker import Worker
from segbench.evidence import CHECK_LOSS, CLEAN, Key
from segbench.protocol import Protocol


class Stopped(Exception):  # noqa: N818 - not an error: another unit failed, or the user pressed Ctrl-C
    """Ends the units that still run when the run ends early."""


def run(store: Store, worker: Worker, units: Sequence[Unit], progress: bool) -> None:
    """Does the units: side by side with one core each when images are small, else one after the other."""
    threads = torch.get_num_threads()
    small = small_on_cpu(worker.device, *worker.dataset[0].image.shape[-2:])
    workers = _workers(worker, min(threads, len(units)) if small else 1)
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for each in workers:
        free.put(each)
    total = sum(_passes(unit, worker.protocol) for unit in units)
    stop = threading.Event()
    running: dict[Key, Counts] = {}  # per (ε, loss), for the aAcc that the bar shows
    lock = threading.Lock()

    def do(unit: Unit, report: Report) -> None:
        mine = free.get()
        try:
            found = _do(store, mine, unit, report, stop)
        finally:
            free.put(mine)
        key = (unit.eps_255, unit.loss)
        with lock:
            running[key] = counts.merge([running[key], found]) if key in running else found
            report.done(len(unit.image_ids), running[key].aacc())

    try:
        with (
            bar(total, sum(len(unit.image_ids) for unit in units), progress) as report,
            exact_float32(),
            frozen(worker.model),
            ThreadPoolExecutor(
                len(workers), initializer=torch.set_num_threads, initargs=(1 if small else threads,)
            ) as pool,
        ):
            futures = [pool.submit(do, unit, report) for unit in units]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)


def _workers(worker: Worker, count: int) -> list[Worker]:
    """``count`` workers, each with its own copy of the module, so that a forward that keeps state is safe.

    The copies share the parameters and buffers, which nobody changes. A module that cannot be copied works alone.
    """
    shared = [*worker.model.parameters(), *worker.model.buffers()]
    try:
        copies = [copy.deepcopy(worker.model, {id(tensor): tensor for tensor in shared}) for _ in range(count - 1)]
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):  # non-leaf tensors, locks, open files, ...
        copies = []
    parallel = 1 + len(copies)
    return [dataclasses.replace(worker, model=model, parallel=parallel) for model in (worker.model, *copies)]


def _passes(unit: Unit, protocol: Protocol) -> int:
    """Image passes of a unit in which no image is finished early."""
    iterations = {CLEAN[1]: 0, CHECK_LOSS: CHECK_ITERATIONS + 1}.get(unit.loss, protocol.iterations + len(STAGES))
    return len(unit.image_ids) * (iterations + 1)


def _do(store: Store, worker: Worker, unit: Unit, report: Report, stop: threading.Event) -> Counts:
    report.unit("clean" if not unit.eps_255 else f"ε {unit.eps_255:g}/255 {unit.loss}")
    left = _passes(unit, worker.protocol)

    def on_images(count: int) -> None:
        nonlocal left
        if stop.is_set():
            raise Stopped
        left -= count
        report.images(count)

    group, stats, cost = worker.do(unit, on_images)
    store.write(unit, group, stats)
    store.log(cost)
    report.images(left)  # the passes that finished images did not need
    return group.counts
