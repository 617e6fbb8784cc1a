"""Units as tasks of Ray actors, which hold the model: a local cluster, or the one of ``RAY_ADDRESS``.

Only the driver writes the run directory, so the machines share nothing but the data set. In place of an actor that
dies another one is started, and its units are done again.
"""

from __future__ import annotations

import logging
import pickle
import queue
import signal
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from segbench.data import Sample
from segbench.engine.compute.batch_size import choose_batch_size
from segbench.engine.compute.precision import check_precision
from segbench.engine.compute.session import open_session
from segbench.engine.compute.stream import Stream
from segbench.engine.compute.worker import Worker, image_passes
from segbench.engine.launch.local import gpu_uuid
from segbench.engine.launch.options import RunOptions
from segbench.engine.launch.queue import RunProgress, UnitQueue
from segbench.engine.rundir.plan import FinishedUnit, Unit
from segbench.engine.telemetry.energy import EnergyMeter
from segbench.engine.telemetry.progress import progress_bar
from segbench.errors import ModelError, RunError, UsageError
from segbench.models.contract import move

RETRIES = 3  # of a unit whose actor dies
SECONDS = 1.0  # between two looks at the actors
AHEAD_CPU, AHEAD_GPU = 2, 8  # units that an actor has, so that its batch never runs empty


@dataclass
class _Setup:
    """What an actor needs; all tensors of the worker are on the CPU."""

    worker: Worker
    device: str
    threads: int


class Actor:
    """Holds the models and runs the units that it is given, all in one stream."""

    def __init__(self, pickled: bytes) -> None:
        setup: _Setup = pickle.loads(pickled)  # of the driver, which may run any code here anyway
        self._threads = setup.threads
        self._worker = replace(setup.worker, device=torch.device(setup.device))  # with the files of this machine
        self._units: queue.Queue[Unit] = queue.Queue()
        self._waiting: dict[str, Future[FinishedUnit]] = {}
        self._begun: list[Unit] = []  # units in the stream
        self._passes = 0
        self._error: BaseException | None = None  # why this actor cannot work at all
        threading.Thread(target=self._work, name="segbench-stream", daemon=True).start()

    def run(self, unit: Unit) -> FinishedUnit:
        """Runs a unit, beside others that this actor has been given."""
        future: Future[FinishedUnit] = Future()
        self._waiting[unit.name] = future
        if self._error is not None:
            raise self._error
        self._units.put(unit)
        return future.result()

    def passes(self) -> int:
        """Image passes so far."""
        return self._passes

    def _work(self) -> None:
        worker = self._worker
        try:
            check_precision(worker.precision, worker.device)  # with the environment of this machine
            with (
                open_session(worker.models, worker.device, threads=self._threads) as session,
                closing(EnergyMeter(gpu_uuid(worker.device))) as energy,
                session.one_stream(worker, []) as images,
            ):
                worker.probe_as_attacked()  # of this device, which need not be the driver's
                choose_batch_size(worker)

                def take(unit: Unit) -> list[Sample]:
                    self._begun.append(unit)
                    return images.take(unit)

                while True:
                    first: list[Unit] = [self._units.get()]
                    stream = Stream(worker, take, self._finish, self._count, energy.watts)
                    try:
                        stream.run(lambda first=first: first.pop() if first else self._at_once())  # type: ignore[misc]
                    except Exception as error:  # noqa: BLE001 - the driver is told, and decides
                        for unit in self._begun:
                            self._waiting.pop(unit.name).set_exception(error)
                        self._begun.clear()
        except BaseException as error:  # noqa: BLE001 - the driver is told, and decides
            self._error = error
            for future in list(self._waiting.values()):
                future.set_exception(error)

    def _at_once(self) -> Unit | None:
        try:
            return self._units.get_nowait()
        except queue.Empty:
            return None

    def _finish(self, done: FinishedUnit) -> None:
        self._begun.remove(done.unit)
        self._waiting.pop(done.unit.name).set_result(done)

    def _count(self, images: int) -> None:
        self._passes += images


@dataclass
class _Member:
    """An actor as the driver sees it."""

    start: Callable[[], Any]
    handle: Any = None
    running: dict[Any, Unit] = field(default_factory=dict)  # by the reference of their result
    asked: Any = None  # the reference of its answer to `Actor.passes`
    passes: int = 0

    def __post_init__(self) -> None:
        self.handle = self.start()


def run_on_ray(
    worker: Worker,
    units: Sequence[Unit],
    finish: Callable[[FinishedUnit], None],
    *,
    begin: Callable[[Unit], bool],
    drain: threading.Event,
    options: RunOptions,
) -> None:
    """Runs units on the actors of a Ray cluster; arguments as in `segbench.engine.launch.local.run_units`.

    An actor without a GPU computes on one core if `Worker.one_core`; else the machine's cores are divided among them.
    """
    if not units:
        return
    ray = _ray()
    started_here = not ray.is_initialized()
    if started_here:
        with _own_sigterm():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        gpus = options.gpus_per_worker
        gpus = (1.0 if worker.device.type == "cuda" else 0.0) if gpus is None else gpus
        number, cores = _division(ray.cluster_resources(), options.workers, gpus, one_core=worker.one_core)
        number = min(number, len(units))
        for model in worker.models:
            move(model, torch.device("cpu"))
        on_cpu = replace(worker, device=torch.device("cpu"), one_core=False)
        pickled = ray.put(_pickled(ray.cloudpickle, _Setup(on_cpu, "cuda" if gpus else "cpu", cores)))
        ahead = AHEAD_GPU if gpus else AHEAD_CPU
        remote = ray.remote(num_cpus=cores, num_gpus=gpus, max_concurrency=ahead + 1)(Actor)
        members = [_Member(lambda: remote.remote(pickled)) for _ in range(number)]
        total = sum(image_passes(unit, worker.protocol) for unit in units)
        with progress_bar(total, sum(len(unit.image_ids) for unit in units), options.progress) as report:
            progress = RunProgress(report, worker.protocol)
            _Driver(ray, members, UnitQueue(deque(units), begin, drain), finish, progress, ahead).run()
    finally:
        for model in worker.models:
            move(model, worker.device)
        if started_here:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError("The engine 'ray' needs Ray:\n\n    pip install 'segbench[ray]'\n") from error
    return ray


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """What SIGTERM does stays as it is: Ray would have it end the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _pickled(cloudpickle: Any, setup: _Setup) -> bytes:
    """With the code of a user's own model, which other machines and processes need not find."""
    own = _own_modules(setup.worker.model)
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        found: bytes = cloudpickle.dumps(setup)
    except Exception as error:  # what a user's model cannot be pickled for is not known
        raise ModelError(
            f"The model cannot be sent to the actors of Ray: {type(error).__name__}: {error}. Run without Ray: "
            "--engine local."
        ) from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)
    return found


def _own_modules(model: nn.Module) -> list[ModuleType]:
    """The modules that the model's classes come from and those beside them, as far as nobody installed them."""
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]

    def folder(name: str) -> Path | None:
        file = getattr(sys.modules.get(name), "__file__", None)
        if not file or name == "__main__" or name.partition(".")[0] == "segbench":
            return None
        path = Path(file).resolve()
        return None if any(path.is_relative_to(place) for place in installed) else path.parent

    classes = {base for part in model.modules() for base in type(part).__mro__}
    folders = {folder(each.__module__) for each in classes} - {None}
    return [module for name, module in list(sys.modules.items()) if folder(name) in folders]


def _division(resources: dict[str, float], workers: int | None, gpus: float, *, one_core: bool) -> tuple[int, int]:
    """Number of actors, and cores of each."""
    cores = int(resources.get("CPU", 1))
    if gpus:
        fitting = int(resources.get("GPU", 0) / gpus)
        if fitting < (workers or 1):
            raise UsageError(
                f"The Ray cluster has {resources.get('GPU', 0):g} GPUs; {workers or 1} workers with {gpus:g} each do "
                "not fit. Lower --workers or --gpus-per-worker."
            )
        number = workers or fitting
        return number, max(1, cores // max(number, 1))
    number = workers or (cores if one_core else 1)
    if not 1 <= number <= cores:
        raise UsageError(f"The Ray cluster has {cores} cores: --workers must be from 1 to {cores}, not {number}.")
    return number, 1 if one_core else max(1, cores // number)


@dataclass
class _Driver:
    """Hands out units, takes the results, and hands out again the units of an actor that died."""

    ray: Any
    members: Sequence[_Member]
    units: UnitQueue
    finish: Callable[[FinishedUnit], None]
    progress: RunProgress
    ahead: int
    again: list[Unit] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)
    error: BaseException | None = None  # of a task; what else has begun is finished before it is raised

    def run(self) -> None:
        """Until nothing is left."""
        self._hand_out()
        while doing := [reference for member in self.members for reference in member.running]:
            done, _ = self.ray.wait(doing, timeout=SECONDS)
            for reference in done:
                member = next((each for each in self.members if reference in each.running), None)
                if member is not None:  # else it was given up with its actor
                    self._take(member, reference)
            self._look()
            self._hand_out()
        if self.error is not None:
            raise self.error

    def _hand_out(self) -> None:
        """Gives each actor units in turn, so that none has two while another has none."""
        if self.error is not None:
            return
        for _ in range(self.ahead):
            for member in sorted(self.members, key=lambda member: len(member.running)):
                if len(member.running) >= self.ahead:
                    continue
                unit = self.again.pop(0) if self.again else self.units.next(self.progress.skip)
                if unit is None:
                    return
                self.progress.begin(unit)
                member.running[member.handle.run.remote(unit)] = unit

    def _take(self, member: _Member, reference: Any) -> None:
        try:
            done = self.ray.get(reference)
        except self.ray.exceptions.RayActorError as error:
            self._replace(member, error)
        except self.ray.exceptions.RayTaskError as error:
            del member.running[reference]
            self.error = self.error or getattr(error, "cause", None) or error
        else:
            del member.running[reference]
            self.finish(done)
            self.progress.done(done)

    def _replace(self, member: _Member, error: Exception) -> None:
        """Another actor for one that died; what it was doing is done again."""
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        if "creation task" in said[0]:
            raise RunError(
                f"The workers cannot start: {said[-1]}. Finished units are kept. Every machine of the cluster needs "
                "the same packages, and the data set at the same path."
            ) from error
        lost, member.running = list(member.running.values()), {}
        names = ", ".join(unit.name for unit in lost)
        for unit in lost:
            self.deaths[unit.name] = self.deaths.get(unit.name, 0) + 1
            if self.deaths[unit.name] > RETRIES:
                raise RunError(
                    f"The worker of unit {unit.name} died {RETRIES + 1} times ({said[0]}). "
                    "Finished units are kept. Memory is the usual reason: fewer --workers, or a smaller --batch-size."
                ) from error
        logging.getLogger("segbench").warning("A worker died; another one does its units again: %s", names)
        self.again = lost + self.again
        member.handle, member.asked, member.passes = member.start(), None, 0

    def _look(self) -> None:
        """Moves the bar by the passes of each actor since the last look."""
        for member in self.members:
            if member.asked is not None:
                ready, _ = self.ray.wait([member.asked], timeout=0)
                if not ready:
                    continue
                try:
                    now = self.ray.get(member.asked)
                except self.ray.exceptions.RayError:
                    continue  # it died, which its units will tell
                self.progress.report.images(now - member.passes)
                member.passes = now
            member.asked = member.handle.passes.remote()
