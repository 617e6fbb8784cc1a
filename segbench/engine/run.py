"""Does the units of a run, several side by side where that is faster, and stops cleanly."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from segbench import counts
from segbench.attacks.apgd import STAGES
from segbench.attacks.problem import frozen
from segbench.counts import Counts
from segbench.engine.batching import exact_float32
from segbench.engine.plan import CHECK_ITERATIONS, Unit
from segbench.engine.progress import Report, bar
from segbench.engine.store import Store
from segbench.engine.worker import Worker
from segbench.evidence import CHECK_LOSS, CLEAN, Key
from segbench.protocol import Protocol


class Stopped(Exception):  # noqa: N818 - not an error: another unit failed, or the user pressed Ctrl-C
    """Ends the units that still run when the run ends early."""


def run(store: Store, worker: Worker, units: Sequence[Unit], *, side_by_side: bool, progress: bool) -> None:
    """Does the units, several threads side by side with one core each, or one unit after the other.

    Args:
        store: where they are written.
        worker: does them; several threads share it.
        units: what is to be done.
        side_by_side: the model's forward keeps no state, so threads may share it, and images are small.
        progress: show a bar.
    """
    threads = torch.get_num_threads()
    worker.parallel = max(1, min(threads, len(units))) if side_by_side else 1
    total = sum(_passes(unit, worker.protocol) for unit in units)
    stop, lock = threading.Event(), threading.Lock()
    running: dict[Key, Counts] = {}  # per (ε, loss), for the aAcc that the bar shows

    def do(unit: Unit, report: Report) -> None:
        found, key = _do(store, worker, unit, report, stop), (unit.eps_255, unit.loss)
        with lock:
            running[key] = counts.merge([running[key], found]) if key in running else found
            report.done(len(unit.image_ids), running[key].aacc())

    try:
        with (
            bar(total, sum(len(unit.image_ids) for unit in units), progress) as report,
            exact_float32(),
            frozen(worker.model),
            ThreadPoolExecutor(
                worker.parallel, initializer=torch.set_num_threads, initargs=(1 if side_by_side else threads,)
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
    store.log(cost)
    store.write(unit, group, stats)
    report.images(left)  # the passes that finished images did not need
    return group.counts
