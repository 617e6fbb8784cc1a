"""Does the units of a run, several side by side where that is faster, and stops cleanly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import torch

from segbench import counts
from segbench.attacks.apgd import STAGES
from segbench.attacks.problem import frozen
from segbench.counts import Counts
from segbench.data import Sample
from segbench.data.dataset import Fingerprint
from segbench.engine.plan import CHECK_ITERATIONS, Finished, Unit
from segbench.engine.prefetch import Prefetcher
from segbench.engine.progress import Report, bar
from segbench.engine.worker import Worker
from segbench.evidence import CHECK_LOSS, CLEAN, Key
from segbench.models.devices import exact_float32
from segbench.protocol import Protocol


class Stopped(Exception):  # noqa: N818 - not an error: another unit failed, or the user pressed Ctrl-C
    """Ends the units that still run when the run ends early."""


def run(
    worker: Worker, units: Sequence[Unit], finish: Callable[[Finished], None], *, side_by_side: bool, progress: bool
) -> None:
    """Does the units, several threads side by side with one core each, or one unit after the other.

    Args:
        worker: does them; several threads share it.
        units: what is to be done.
        finish: called with each unit that is done, in the thread that did it.
        side_by_side: the model's forward keeps no state, so threads may share it, and images are small.
        progress: show a bar.
    """
    threads = torch.get_num_threads()
    worker.parallel = max(1, min(threads, len(units))) if side_by_side else 1
    total = sum(_passes(unit, worker.protocol) for unit in units)
    stop, lock = threading.Event(), threading.Lock()
    running: dict[Key, Counts] = {}  # per (ε, loss), for the aAcc that the bar shows

    def do(unit: Unit, report: Report) -> None:
        done = _do(worker, unit, images.take(unit), report, stop)
        finish(done)
        found, key = done.group.counts, (unit.eps_255, unit.loss)
        with lock:
            running[key] = counts.merge([running[key], found]) if key in running else found
            report.done(len(unit.image_ids), running[key].aacc())

    try:
        with (
            bar(total, sum(len(unit.image_ids) for unit in units), progress) as report,
            exact_float32(),
            frozen(worker.model),
            Prefetcher(worker.dataset, units, worker.device, worker.stamps) as images,
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


def first_pass(
    worker: Worker, units: Sequence[Unit], mine: Sequence[Unit], *, one_core: bool, progress: bool
) -> tuple[str, list[Finished]]:
    """Reads every image once: for the fingerprint, and for the clean units among ``mine``, which are done on the way.

    Args:
        worker: does the units.
        units: all units of the run.
        mine: those that this process is to do.
        one_core: compute with one thread, as `run` does when units run side by side.
        progress: show a bar.

    Returns:
        The data set's fingerprint, and the finished units.
    """
    clean, wanted = [unit for unit in units if (unit.eps_255, unit.loss) == CLEAN], {unit.name for unit in mine}
    digest, finished = Fingerprint(worker.dataset), list[Finished]()
    threads, total = torch.get_num_threads(), sum(len(unit.image_ids) for unit in clean)
    torch.set_num_threads(1 if one_core else threads)
    try:
        with (
            bar(total, total, progress) as report,
            exact_float32(),
            frozen(worker.model),
            Prefetcher(worker.dataset, clean, worker.device, worker.stamps) as images,
            ThreadPoolExecutor(1) as hashing,
        ):
            hashed: Future[None] | None = None
            for unit in clean:
                samples = images.take(unit)
                if hashed:
                    hashed.result()  # the digest takes the images in order
                hashed = hashing.submit(_update, digest, samples)
                if unit.name not in wanted:
                    report.images(len(samples))
                    continue
                finished.append(_do(worker, unit, samples, report, threading.Event()))
                report.done(len(samples), counts.merge(done.group.counts for done in finished).aacc())
            if hashed:
                hashed.result()
    finally:
        torch.set_num_threads(threads)
    return digest.finish(), finished


def _update(digest: Fingerprint, samples: Sequence[Sample]) -> None:
    for sample in samples:
        digest.update(sample)


def _passes(unit: Unit, protocol: Protocol) -> int:
    """Image passes of a unit in which no image is finished early."""
    iterations = {CLEAN[1]: 0, CHECK_LOSS: CHECK_ITERATIONS + 1}.get(unit.loss, protocol.iterations + len(STAGES))
    return len(unit.image_ids) * (iterations + 1)


def _do(worker: Worker, unit: Unit, samples: Sequence[Sample], report: Report, stop: threading.Event) -> Finished:
    report.unit("clean" if not unit.eps_255 else f"ε {unit.eps_255:g}/255 {unit.loss}")
    left = _passes(unit, worker.protocol)

    def on_images(count: int) -> None:
        nonlocal left
        if stop.is_set():
            raise Stopped
        left -= count
        report.images(count)

    done = worker.do(unit, samples, on_images)
    report.images(left)  # the passes that finished images did not need
    return done
