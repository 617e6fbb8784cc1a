"""The units of a run on their way through this process, whatever computes them: the queue, and the progress bar."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from segbench import counts
from segbench.counts import Counts
from segbench.engine.compute.worker import image_passes
from segbench.engine.rundir.plan import FinishedUnit, Unit
from segbench.engine.telemetry.progress import ProgressReport
from segbench.evidence import CHECK_LOSS, CHECK_SEARCH, Key
from segbench.protocol import Protocol


@dataclass
class UnitQueue:
    """The missing units of a run, shared by its streams.

    ``begin`` is called with each unit that is handed out, and is False if another process has finished it; once
    ``drain`` is set nothing more is handed out.
    """

    units: deque[Unit]
    begin: Callable[[Unit], bool]
    drain: threading.Event
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, skipped: Callable[[Unit], None]) -> Unit | None:
        """The next unit; None if there is none. ``skipped`` is called with those that others have finished."""
        while True:
            with self._lock:
                if not self.units or self.drain.is_set():
                    return None
                unit = self.units.popleft()
            if self.begin(unit):
                return unit
            skipped(unit)


@dataclass
class RunProgress:
    """What the bar shows: passes, images, and the aAcc so far of each (ε, loss)."""

    report: ProgressReport
    protocol: Protocol
    _counts: dict[Key, Counts] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, unit: Unit) -> None:
        self.report.unit(describe_unit(unit))

    def skip(self, unit: Unit) -> None:
        self.report.images(image_passes(unit, self.protocol))

    def done(self, done: FinishedUnit) -> None:
        found, key = done.group.counts, (done.unit.strength, done.unit.loss)
        spent = sum(done.stats["forwards"]) + len(done.unit.image_ids)
        self.report.images(image_passes(done.unit, self.protocol) - spent)  # those that finished images did not need
        with self._lock:
            self._counts[key] = counts.merge([self._counts[key], found]) if key in self._counts else found
            self.report.done(describe_unit(done.unit), len(done.unit.image_ids), self._counts[key].aacc())


def describe_unit(unit: Unit) -> str:
    """For the progress line."""
    if unit.loss == CHECK_LOSS:
        return f"check for masked gradients, ε {unit.strength:g}/255"
    if unit.loss == CHECK_SEARCH:
        return f"check by a search without gradients, ε {unit.strength:g}/255"
    return "clean" if not unit.strength else f"ε {unit.strength:g}/255 {unit.loss}"
