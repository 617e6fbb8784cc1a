"""Units of work, one image after the other entering a batch that is always full.

An image that is finished makes room for the next one, of the same unit or of those behind it; a unit is finished when
its last image is. Nothing that is counted depends on who shared the batch.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from segbench import counts
from segbench.attacks import AttackResult
from segbench.attacks.batch import AttackBatch
from segbench.attacks.evaluator import Evaluator
from segbench.data import Sample
from segbench.engine.compute.worker import STATISTICS, Worker, attack_of, device_name, image_passes, peak_memory
from segbench.engine.rundir.plan import CHUNK, FinishedUnit, Unit
from segbench.errors import SegbenchError
from segbench.evidence import CHECK_LOSS, CLEAN, Group

Shape = tuple[int, ...]


@dataclass
class _OpenUnit:
    """A unit that has begun."""

    unit: Unit
    unattacked: int  # images that wait for a place in the batch, or are in it
    seconds: float = 0.0
    counts: dict[str, counts.Counts] = field(default_factory=dict)
    numbers: dict[str, dict[str, int]] = field(default_factory=dict)

    def finished(self, cost: Mapping[str, Any]) -> FinishedUnit:
        ids = self.unit.image_ids
        stats = {name: [self.numbers[image_id].get(name, 0) for image_id in ids] for name in STATISTICS}
        return FinishedUnit(
            self.unit,
            Group(ids, counts.merge(self.counts[image_id] for image_id in ids)),
            stats,
            {
                "unit": self.unit.name,
                "images": len(ids),
                "seconds": self.seconds,
                "forwards": sum(stats["forwards"]) + len(ids),  # and the pass that counts
                **cost,
            },
        )


@dataclass
class _Item:
    """An image of a unit, and what its attack found."""

    unit: _OpenUnit
    sample: Sample
    result: AttackResult | None = None


@dataclass
class Stream:
    """Runs units; several streams may share a worker.

    ``take`` gives the samples of a unit, ``finish`` gets each finished one, ``on_images`` the number of images before
    each pass (what it raises ends the stream), and ``watts`` is the power drawn, if it is known.
    """

    worker: Worker
    take: Callable[[Unit], Sequence[Sample]]
    finish: Callable[[FinishedUnit], None]
    on_images: Callable[[int], None] = lambda _: None
    watts: Callable[[], float | None] = lambda: None
    _batch: AttackBatch | None = None
    _shape: Shape = ()  # of the images in the batch
    _evaluators: dict[tuple[Shape, int], Evaluator] = field(default_factory=dict)
    _attacked: dict[int, _Item] = field(default_factory=dict)  # by their key in the batch
    _waiting: dict[Shape, deque[_Item]] = field(default_factory=dict)  # for a place in the batch
    _unscored: list[_Item] = field(default_factory=list)
    _charged: float = 0.0  # seconds of this step that a unit has been charged already
    _no_more: bool = False
    _error: SegbenchError | None = None  # why no more units can be taken

    def run(self, next_unit: Callable[[], Unit | None]) -> None:
        """Runs all units that ``next_unit`` gives, until it gives None. An error of ``take`` is raised after them."""
        if self.worker.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.worker.device)
        while True:
            started = time.monotonic()
            self._no_more = self._error is not None  # else it is asked again: there may be more by now
            self._fill(next_unit)
            busy = [item.unit for item in self._attacked.values()]
            if self._attacked:
                self._step()
            scored = self._score() if self._due() else []
            self._charge(started, busy + [item.unit for item in scored])
            self._close(scored)
            if self._no_more and not (self._attacked or self._unscored or any(self._waiting.values())):
                if self._error is not None:
                    raise self._error
                return

    def _fill(self, next_unit: Callable[[], Unit | None]) -> None:
        """Takes images into the batch while there is room and there are any of its size."""
        while not self._unscored_clean():
            if not self._attacked:
                self._shape = next((shape for shape, items in self._waiting.items() if items), ())
            queue = self._waiting.get(self._shape, deque())
            room = self.worker.images_at_once(*self._shape[-2:]) - len(self._attacked) if self._shape else 1
            if queue and room > 0:
                self._admit(queue, room)
            elif room > 0 and not self._no_more and sum(map(len, self._waiting.values())) < CHUNK:
                self._open(next_unit())
            else:
                return

    def _unscored_clean(self) -> bool:
        return any(item.result is None for item in self._unscored)

    def _open(self, unit: Unit | None) -> None:
        if unit is None:
            self._no_more = True
            return
        is_clean = (unit.strength, unit.loss) == CLEAN
        opened = _OpenUnit(unit, 0 if is_clean else len(unit.image_ids))
        try:
            items = [_Item(opened, sample) for sample in self.take(unit)]
        except SegbenchError as error:
            self._error, self._no_more = error, True
            return
        if is_clean:
            self._unscored += items
            return
        if unit.loss != CHECK_LOSS and attack_of(unit, self.worker.protocol).runs_outside_batch:
            self._attack_outside_batch(opened, items)
            return
        for item in items:
            self._waiting.setdefault(tuple(item.sample.image.shape), deque()).append(item)

    def _attack_outside_batch(self, opened: _OpenUnit, items: Sequence[_Item]) -> None:
        """An attack that has no place in the batch, e.g. without gradients: all images of a unit at once."""
        started, worker = time.monotonic(), self.worker
        for shape in dict.fromkeys(tuple(item.sample.image.shape) for item in items):
            left = [item for item in items if tuple(item.sample.image.shape) == shape]
            while left:

                def attack(size: int, left: Sequence[_Item] = left) -> list[AttackResult]:
                    samples = [item.sample for item in left[:size]]
                    return worker.attack([opened.unit] * len(samples), samples, self.on_images)

                results = worker.within_memory(attack, min(len(left), worker.images_at_once(*shape[-2:])), shape)
                for item, result in zip(left, results, strict=False):
                    item.result = result
                left = left[len(results) :]
        opened.unattacked = 0
        taken = time.monotonic() - started
        opened.seconds += taken / worker.streams
        self._charged += taken
        self._unscored += items

    def _admit(self, queue: deque[_Item], room: int) -> None:
        """Takes images of the queue into the batch: as many as there is room and memory for."""
        if self._batch is None or not len(self._batch):
            self._batch = AttackBatch(self._evaluator())
        batch, inside = self._batch, len(self._attacked)

        def add(size: int) -> dict[int, _Item]:
            items = list(islice(queue, max(0, size - inside)))
            keys = batch.add([self.worker.job(item.unit.unit, item.sample) for item in items])
            return dict(zip(keys, items, strict=True))

        added = self.worker.within_memory(add, inside + min(room, len(queue)), self._shape)
        for _ in added:
            queue.popleft()
        self._attacked |= added

    def _evaluator(self) -> Evaluator:
        """The same for each batch of one shape: what was compiled, or could not be, it knows."""
        key = (self._shape, self.worker.images_at_once(*self._shape[-2:]))
        if key not in self._evaluators:
            self._evaluators[key] = self.worker.evaluator(*self._shape[-2:])
        return self._evaluators[key]

    def _step(self) -> None:
        batch = self._batch
        assert batch is not None  # there are images in it
        self.on_images(len(self._attacked))
        largest = batch.evaluator.size or len(batch)
        # of one pass, which is filled up however few images there are, or is not
        images = largest if batch.evaluator.fill else min(largest, len(batch))

        def step(size: int) -> None:
            if size < images:  # memory ran out: nothing that is in the batch is lost
                batch.evaluator.size = size
            batch.step()

        self.worker.within_memory(step, images, self._shape)
        for key, result in batch.finished():
            item = self._attacked.pop(key)
            item.result = result
            item.unit.unattacked -= 1
            self._unscored.append(item)

    def _due(self) -> bool:
        """Whether to score: a unit is complete then, or enough images have come together, or there is nothing else."""
        if not self._unscored:
            return False
        enough = self.worker.images_at_once(*self._unscored[0].sample.image.shape[-2:])
        return len(self._unscored) >= enough or any(item.unit.unattacked == 0 for item in self._unscored)

    def _score(self) -> list[_Item]:
        scored, self._unscored = self._unscored, []
        groups: dict[Shape, list[_Item]] = {}
        for item in scored:
            groups.setdefault(tuple(item.sample.image.shape), []).append(item)
        for shape, items in groups.items():
            while items:
                size = min(len(items), self.worker.images_at_once(*shape[-2:]))
                items = items[self.worker.within_memory(partial(self._score_first, items), size, shape) :]
        return scored

    def _score_first(self, items: Sequence[_Item], size: int) -> int:
        """Scores the first ``size`` of some images of one size; returns how many those are."""
        part = items[:size]
        self.on_images(0)
        found, numbers = self.worker.score(
            [item.unit.unit.strength for item in part],
            [item.sample for item in part],
            [item.result for item in part],
        )
        for row, (item, values) in enumerate(zip(part, numbers, strict=True)):
            item.unit.counts[item.sample.image_id] = found.take(np.array([row]))
            item.unit.numbers[item.sample.image_id] = values
        self.on_images(len(part))
        return len(part)

    def _charge(self, started: float, units: Sequence[_OpenUnit]) -> None:
        """Divides the time since ``started`` among the images of a step."""
        rest, self._charged = time.monotonic() - started - self._charged, 0.0
        share = rest / max(len(units), 1) / self.worker.streams
        for unit in units:
            unit.seconds += share

    def _close(self, scored: Sequence[_Item]) -> None:
        for opened in {id(item.unit): item.unit for item in scored}.values():
            if len(opened.counts) == len(opened.unit.image_ids):
                watts = self.watts()
                self.finish(
                    opened.finished(
                        {
                            "most_forwards": image_passes(opened.unit, self.worker.protocol),
                            "peak_memory_bytes": peak_memory(self.worker.device),
                            "device": device_name(self.worker.device),
                            "joules": None if watts is None else watts * opened.seconds,
                            "batch_size": self.worker.batch_size,
                            "worker": f"{socket.gethostname()}:{os.getpid()}",
                        }
                    )
                )


def run_unit(
    worker: Worker,
    unit: Unit,
    samples: Sequence[Sample],
    on_images: Callable[[int], None] = lambda _: None,
    watts: Callable[[], float | None] = lambda: None,
) -> FinishedUnit:
    """Runs one unit by itself."""
    done: list[FinishedUnit] = []
    units = iter([unit])
    Stream(worker, lambda _: samples, done.append, on_images, watts).run(lambda: next(units, None))
    return done[0]
