"""Does the units of a run, several streams side by side where that is faster, and stops cleanly."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import torch

from segbench import counts
from segbench.attacks.catalogue import get_attack
from segbench.attacks.problem import frozen
from segbench.counts import Counts
from segbench.data import Sample
from segbench.data.dataset import Fingerprint
from segbench.engine.energy import EnergyMeter
from segbench.engine.plan import CHECK_ITERATIONS, Finished, Unit
from segbench.engine.prefetch import Prefetcher
from segbench.engine.progress import Report, bar
from segbench.engine.stream import Stream, do_unit
from segbench.engine.worker import Worker
from segbench.evidence import CHECK_LOSS, CLEAN, Key
from segbench.models.devices import exact_float32
from segbench.protocol import Protocol


class Stopped(Exception):  # noqa: N818 - not an error: another unit failed, or the user pressed Ctrl-C
    """Ends the units that still run when the run ends early."""


class Todo:
    """The units of a run that are still to be done, shared by its streams.

    Args:
        units: in order.
        begin: called with each unit that is handed out; False means that it is done already, by somebody else.
        drain: when set, nothing more is handed out.
    """

    def __init__(self, units: Sequence[Unit], begin: Callable[[Unit], bool], drain: threading.Event) -> None:
        self._units = deque(units)
        self._begin = begin
        self._drain = drain
        self._lock = threading.Lock()

    def next(self, skipped: Callable[[Unit], None]) -> Unit | None:
        """The next unit; None if there is none. ``skipped`` is called with those that somebody else did."""
        while True:
            with self._lock:
                if not self._units or self._drain.is_set():
                    return None
                unit = self._units.popleft()
            if self._begin(unit):
                return unit
            skipped(unit)


class Running:
    """What the bar shows: passes, images, and the aAcc so far of each (ε, loss)."""

    def __init__(self, report: Report, protocol: Protocol) -> None:
        self._report = report
        self._protocol = protocol
        self._lock = threading.Lock()
        self._counts: dict[Key, Counts] = {}

    def begin(self, unit: Unit) -> None:
        self._report.unit(_described(unit))

    def skip(self, unit: Unit) -> None:
        self._report.images(passes(unit, self._protocol))

    def done(self, done: Finished) -> None:
        found, key = done.group.counts, (done.unit.eps_255, done.unit.loss)
        spent = sum(done.stats["forwards"]) + len(done.unit.image_ids)
        self._report.images(passes(done.unit, self._protocol) - spent)  # those that finished images did not need
        with self._lock:
            self._counts[key] = counts.merge([self._counts[key], found]) if key in self._counts else found
            self._report.done(_described(done.unit), len(done.unit.image_ids), self._counts[key].aacc())


def _described(unit: Unit) -> str:
    return "clean" if not unit.eps_255 else f"ε {unit.eps_255:g}/255 {unit.loss}"


def run(
    worker: Worker,
    units: Sequence[Unit],
    finish: Callable[[Finished], None],
    *,
    begin: Callable[[Unit], bool] = lambda _: True,
    drain: threading.Event | None = None,
    side_by_side: bool,
    progress: bool,
) -> None:
    """Does the units, in several threads with one core each, or in one.

    Args:
        worker: does them; several threads share it.
        units: what is to be done.
        finish: called with each unit that is done, in the thread that did it.
        begin: called with each unit before it is done; False if it need not be.
        drain: when set, what has begun is finished, and nothing else.
        side_by_side: the model's forward keeps no state, so threads may share it, and images are small.
        progress: show a bar.
    """
    threads = torch.get_num_threads()
    worker.parallel = max(1, min(threads, len(units))) if side_by_side else 1
    total = sum(passes(unit, worker.protocol) for unit in units)
    stop, todo = threading.Event(), Todo(units, begin, drain or threading.Event())

    try:
        with (
            bar(total, sum(len(unit.image_ids) for unit in units), progress) as report,
            exact_float32(),
            frozen(worker.models),
            Prefetcher(worker.dataset, units, worker.device, worker.stamps) as images,
            EnergyMeter(gpu_of(worker.device)) as energy,
            ThreadPoolExecutor(
                worker.parallel, initializer=torch.set_num_threads, initargs=(1 if side_by_side else threads,)
            ) as pool,
        ):
            running = Running(report, worker.protocol)

            def on_images(count: int) -> None:
                if stop.is_set():
                    raise Stopped
                report.images(count)

            def take(unit: Unit) -> list[Sample]:
                running.begin(unit)
                return images.take(unit)

            def done(finished: Finished) -> None:
                finish(finished)
                running.done(finished)

            def work() -> None:
                Stream(worker, take, done, on_images, energy.watts).run(lambda: todo.next(running.skip))

            futures = [pool.submit(work) for _ in range(worker.parallel if units else 0)]
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
            frozen(worker.models),
            Prefetcher(worker.dataset, clean, worker.device, worker.stamps) as images,
            EnergyMeter(gpu_of(worker.device)) as energy,
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
                report.unit(_described(unit))
                finished.append(do_unit(worker, unit, samples, report.images, energy.watts))
                report.done(_described(unit), len(samples), counts.merge(done.group.counts for done in finished).aacc())
            if hashed:
                hashed.result()
    finally:
        torch.set_num_threads(threads)
    return digest.finish(), finished


def gpu_of(device: torch.device) -> str | None:
    """The GPU by the name that nvidia-smi knows it by, whatever ``CUDA_VISIBLE_DEVICES`` says; None on a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def _update(digest: Fingerprint, samples: Sequence[Sample]) -> None:
    for sample in samples:
        digest.update(sample)


def passes(unit: Unit, protocol: Protocol) -> int:
    """Image passes of a unit in which no image is finished early: those of the attack, and one to count."""
    if unit.loss in (CLEAN[1], CHECK_LOSS):
        attack = {CLEAN[1]: 0, CHECK_LOSS: CHECK_ITERATIONS + 1}[unit.loss]
    else:
        attack = get_attack(unit.loss, protocol.iterations).passes
    return len(unit.image_ids) * (attack + 1)
