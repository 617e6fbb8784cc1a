"""Models at work on a device: all that must hold while something is computed, assembled once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from segbench.attacks.problem import frozen
from segbench.engine.compute.prefetch import Prefetcher
from segbench.engine.compute.worker import Worker
from segbench.engine.rundir.plan import Unit
from segbench.models.contract import move, put_in_eval_mode
from segbench.models.devices import cpu_threads, memory_explained
from segbench.models.float32 import exact_float32, plain_torch


class Stopped(Exception):  # noqa: N818 - not an error: another stream failed, or the user pressed Ctrl-C
    """Ends the streams that still run when the run ends early."""


@dataclass
class Session:
    """Models at work on a device; ``was_training`` says which of them had to be put in eval mode."""

    device: torch.device
    was_training: list[bool]
    cuda_index: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def choose_device(self) -> None:
        """Makes the device the current one of this thread: each thread has its own, at first ``cuda:0``."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.cuda_index)

    def _images(self, worker: Worker, units: Sequence[Unit]) -> Prefetcher:
        return Prefetcher(worker.dataset, units, self.device, worker.stamps, self.choose_device)

    @contextmanager
    def one_stream(self, worker: Worker, units: Sequence[Unit]) -> Iterator[Prefetcher]:
        """The images of units, decoded ahead, for a stream in this thread; it has the CPU threads of one stream."""
        worker.streams = 1
        with closing(self._images(worker, units)) as images, worker.stream_threads():
            yield images

    def run_streams(
        self, worker: Worker, units: Sequence[Unit], work: Callable[[int, Prefetcher], None], *, jobs: int
    ) -> None:
        """Calls ``work(0, images)``, ``work(1, images)``, ... in threads: one per core if `Worker.one_core`, else one.

        ``images`` decodes those of ``units`` ahead. There are at most ``jobs`` streams; an error of one stops the
        others at their next `check_running`.
        """
        threads, self._stop = torch.get_num_threads(), threading.Event()
        worker.streams = max(1, min(threads, jobs)) if worker.one_core else 1

        def on_start() -> None:
            torch.set_num_threads(1 if worker.one_core else threads)
            self.choose_device()

        with (
            cpu_threads(threads),
            closing(self._images(worker, units)) as images,
            ThreadPoolExecutor(worker.streams, initializer=on_start) as pool,
        ):
            futures = [pool.submit(work, number, images) for number in range(worker.streams)]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def check_running(self) -> None:
        """To be called before each pass: raises Stopped if another stream has failed."""
        if self._stop.is_set():
            raise Stopped


@contextmanager
def open_session(models: Sequence[nn.Module], device: torch.device, *, threads: int | None = None) -> Iterator[Session]:
    """Puts models to work on a device, and leaves them as they were.

    Within, they are in eval mode on the device with frozen parameters, torch's settings are as it begins, float32 is
    exact, and the device is the current CUDA device. The CPU has so many ``threads``, by default one per core of this
    process. RunError where memory runs out and no smaller batch helps (`Worker.within_memory`).
    """
    with ExitStack() as stack:
        stack.enter_context(memory_explained(f"on {device}"))
        stack.enter_context(plain_torch())
        stack.enter_context(cpu_threads(threads))
        stack.enter_context(torch.cuda.device(device) if device.type == "cuda" else nullcontext())
        index = torch.cuda.current_device() if device.type == "cuda" else 0  # of ``cuda`` without a number, too
        was_training = [stack.enter_context(_eval_mode(model, device)) for model in models]
        for model in models:
            stack.enter_context(frozen(model))
        stack.enter_context(exact_float32())
        yield Session(device, was_training, index)


@contextmanager
def _eval_mode(model: nn.Module, device: torch.device) -> Iterator[bool]:
    """The model in eval mode on ``device``, afterwards as it was; yields whether a part of it was in training mode."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    before = None if tensor is None else tensor.device
    training = put_in_eval_mode(model)
    try:
        move(model, device)
        yield bool(training)
    finally:
        for part in training:
            part.training = True
        if before is not None:
            move(model, before)
