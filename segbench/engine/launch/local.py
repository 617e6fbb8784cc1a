"""Runs units in this process, several streams side by side where that is faster."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import torch

from segbench import counts
from segbench.data import Sample
from segbench.data.dataset import Fingerprint
from segbench.engine.compute.prefetch import Prefetcher
from segbench.engine.compute.session import Session
from segbench.engine.compute.stream import Stream, run_unit
from segbench.engine.compute.worker import Worker, image_passes
from segbench.engine.launch.queue import RunProgress, UnitQueue, describe_unit
from segbench.engine.rundir.plan import FinishedUnit, Unit
from segbench.engine.telemetry.energy import EnergyMeter
from segbench.engine.telemetry.progress import progress_bar
from segbench.evidence import CLEAN


def run_units(
    session: Session,
    worker: Worker,
    units: Sequence[Unit],
    finish: Callable[[FinishedUnit], None],
    *,
    begin: Callable[[Unit], bool] = lambda _: True,
    drain: threading.Event | None = None,
    progress: bool,
) -> None:
    """Runs units, in several threads with one core each, or in one.

    ``begin`` is called with each unit before it runs, and says whether it need run; ``finish`` with each finished one.
    When ``drain`` is set, the units that have begun are finished, and no other one begins.
    """
    if not units:
        return
    total = sum(image_passes(unit, worker.protocol) for unit in units)
    queue = UnitQueue(deque(units), begin, drain or threading.Event())
    with (
        progress_bar(total, sum(len(unit.image_ids) for unit in units), progress) as report,
        closing(EnergyMeter(gpu_uuid(worker.device))) as energy,
    ):
        running = RunProgress(report, worker.protocol)

        def on_images(count: int) -> None:
            session.check_running()
            report.images(count)

        def work(_: int, images: Prefetcher) -> None:
            def take(unit: Unit) -> list[Sample]:
                running.begin(unit)
                return images.take(unit)

            def done(finished: FinishedUnit) -> None:
                finish(finished)
                running.done(finished)

            Stream(worker, take, done, on_images, energy.watts).run(lambda: queue.next(running.skip))

        session.run_streams(worker, units, work, jobs=len(units))


def first_pass(
    session: Session, worker: Worker, units: Sequence[Unit], mine: Sequence[Unit], *, progress: bool
) -> tuple[str, list[FinishedUnit]]:
    """Reads every image once: for the fingerprint, and for the clean units among ``mine``, which are run on the way.

    Returns the data set's fingerprint, and the finished units.
    """
    clean, wanted = [unit for unit in units if (unit.strength, unit.loss) == CLEAN], {unit.name for unit in mine}
    digest, finished, total = Fingerprint(worker.dataset), list[FinishedUnit](), sum(len(u.image_ids) for u in clean)
    with (
        progress_bar(total, total, progress) as report,
        closing(EnergyMeter(gpu_uuid(worker.device))) as energy,
        ThreadPoolExecutor(1) as hashing,
        session.one_stream(worker, clean) as images,
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
            report.unit(describe_unit(unit))
            finished.append(run_unit(worker, unit, samples, report.images, energy.watts))
            scored = counts.merge(done.group.counts for done in finished)
            report.done(describe_unit(unit), len(samples), scored.aacc())
        if hashed:
            hashed.result()
    return digest.finish(), finished


def gpu_uuid(device: torch.device) -> str | None:
    """The GPU by the name that nvidia-smi knows it by, whatever ``CUDA_VISIBLE_DEVICES`` says; None on a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def _update(digest: Fingerprint, samples: Sequence[Sample]) -> None:
    for sample in samples:
        digest.update(sample)
