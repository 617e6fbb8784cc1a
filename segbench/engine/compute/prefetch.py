"""Images of the units to come, decoded in threads while the current units are attacked."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from segbench.data import Sample, SegmentationDataset
from segbench.data.parallel import default_workers
from segbench.engine.rundir.plan import Unit
from segbench.errors import DataError

Stamps = Mapping[str, Sequence[Any]]  # of each image's files
PIXELS_AHEAD = 1 << 24  # images of the next units wait up to this many pixels: 340 MB as float32 with int64 labels


class Prefetcher:
    """Gives the samples of a unit; those of the next units, roughly in this order, are decoded meanwhile.

    For CUDA they come in pinned memory, which belongs to the current device: ``begin_thread`` chooses it in each thread
    that decodes. Each image's files must still have their ``stamps`` when it has been read.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        units: Sequence[Unit],
        device: torch.device,
        stamps: Stamps,
        begin_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self._dataset = dataset
        self._stamps = stamps
        self._pinned = device.type == "cuda"
        self._rows = {image_id: row for row, image_id in enumerate(dataset.image_ids)}
        self._queue = deque(units)
        self._ready: dict[str, list[Future[Sample]]] = {}
        self._pixels = 1  # of the largest image so far
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(default_workers(), thread_name_prefix="segbench-data", initializer=begin_thread)

    def take(self, unit: Unit) -> list[Sample]:
        """The samples of a unit, in its order; each unit is taken once."""
        with self._lock:
            if self._queue and self._queue[0] == unit:
                self._queue.popleft()
            elif unit.name not in self._ready:
                self._queue = deque(other for other in self._queue if other != unit)
            futures = self._ready.pop(unit.name, [])
            futures += [self._pool.submit(self._read, image_id) for image_id in unit.image_ids[len(futures) :]]
        samples = [future.result() for future in futures]
        with self._lock:
            self._pixels = max(self._pixels, *(sample.label.numel() for sample in samples))
            self._read_ahead()
        return samples

    def _read_ahead(self) -> None:
        """Begins with images of the next units, one by one, up to the limit; at least with one."""
        waiting = sum(map(len, self._ready.values()))
        for _ in range(max(1, PIXELS_AHEAD // self._pixels) - waiting):
            if not self._queue:
                return
            unit = self._queue[0]
            begun = self._ready.setdefault(unit.name, [])
            begun.append(self._pool.submit(self._read, unit.image_ids[len(begun)]))
            if len(begun) == len(unit.image_ids):
                self._queue.popleft()

    def _read(self, image_id: str) -> Sample:
        sample = self._dataset[self._rows[image_id]]
        if self._dataset.files and self._dataset.files.stamps([image_id]) != self._stamps[image_id]:
            raise DataError(
                f"{self._dataset.where(image_id)} changed while the run was reading the data set. What is finished is "
                "kept. Put the files back and run the same command again, or give another --out."
            )
        if not self._pinned:
            return sample
        return sample._replace(image=sample.image.pin_memory(), label=sample.label.pin_memory())

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
