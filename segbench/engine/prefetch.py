"""Images of the units to come, decoded in threads while the current units are attacked."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from segbench.data import Sample, SegmentationDataset
from segbench.data.parallel import default_workers
from segbench.engine.plan import Unit

PIXELS_AHEAD = 1 << 24  # images of the next units wait up to this many pixels: 340 MB as float32 with int64 labels


class Prefetcher:
    """Gives the samples of a unit; those of the units behind it are being decoded meanwhile.

    Args:
        dataset: gives the images.
        units: in the order in which they will be taken, roughly.
        device: where they are going; for CUDA they are put in pinned memory.
    """

    def __init__(self, dataset: SegmentationDataset, units: Sequence[Unit], device: torch.device) -> None:
        self._dataset = dataset
        self._pinned = device.type == "cuda"
        self._rows = {image_id: row for row, image_id in enumerate(dataset.image_ids)}
        self._queue = deque(units)
        self._ready: dict[str, list[Future[Sample]]] = {}
        self._pixels = 1  # of the largest image so far
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(default_workers(), thread_name_prefix="segbench-data")

    def take(self, unit: Unit) -> list[Sample]:
        """The samples of a unit, in its order; each unit is taken once.

        Raises:
            DataError: an image cannot be read.
        """
        with self._lock:
            futures = self._ready.pop(unit.name, None)
            if futures is None:
                self._queue = deque(other for other in self._queue if other.name != unit.name)
                futures = self._submit(unit)
        samples = [future.result() for future in futures]
        with self._lock:
            self._pixels = max(self._pixels, *(sample.label.numel() for sample in samples))
            while self._queue and self._waiting() < max(1, PIXELS_AHEAD // self._pixels):
                following = self._queue.popleft()
                self._ready[following.name] = self._submit(following)
        return samples

    def _waiting(self) -> int:
        return sum(map(len, self._ready.values()))

    def _submit(self, unit: Unit) -> list[Future[Sample]]:
        return [self._pool.submit(self._read, image_id) for image_id in unit.image_ids]

    def _read(self, image_id: str) -> Sample:
        sample = self._dataset[self._rows[image_id]]
        if not self._pinned:
            return sample
        return sample._replace(image=sample.image.pin_memory(), label=sample.label.pin_memory())

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
