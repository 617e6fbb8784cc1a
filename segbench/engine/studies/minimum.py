"""The smallest ε that breaks an image: at which at most a small share of its pixels is still right.

Source: Croce, Singh, Hein, ECCV 2024, Figure 6: the smallest radius at which 99% of the pixels are wrong. Each image
has its own radius, so images at many radii are in a batch together. The start of an attack is drawn as in an
evaluation, so that the result at (image, ε, attack) is that of an evaluation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from signal import SIGTERM
from typing import Any

import numpy as np
import torch
from torch import nn

from segbench.attacks.catalogue import get_attack
from segbench.data import SegmentationDataset
from segbench.engine.compute.batch_size import choose_batch_size
from segbench.engine.compute.prefetch import Prefetcher
from segbench.engine.compute.stream import Stream
from segbench.engine.launch.dispatch import PREEMPTED, finish_run, run_missing_units
from segbench.engine.launch.options import RunOptions
from segbench.engine.launch.prepare import PreparedRun, Request, prepare_run
from segbench.engine.rundir.plan import FinishedUnit, Unit
from segbench.engine.rundir.store import Store
from segbench.engine.rundir.trials import Trial, Trials
from segbench.engine.rundir.workers import shard_file_name
from segbench.engine.studies.bisection import Search, SmallestRadius, next_step
from segbench.engine.studies.common import WITHOUT_SHARD, as_list, describe_run, study_command, write_study
from segbench.engine.telemetry.estimate import seconds_per_pass, time_text
from segbench.engine.telemetry.progress import announce, counting_bar
from segbench.errors import IncompleteError, PreemptedError, UsageError
from segbench.evidence import Key
from segbench.models.sources.names import parse
from segbench.protocol import SEA_V1
from segbench.protocol import minimum as protocol_of
from segbench.signals import raised

MAX_RADII = 100_000  # of the grid
DECIMALS = 9  # of a radius over 255


@dataclass(frozen=True)
class Minimum:
    """A finished search.

    Attributes:
        path: the run directory, with ``minimum.json`` and the trials it was computed from.
        image_ids: of all images.
        eps_255: for each the smallest radius over 255 that breaks it; 0 if it is broken without an attack, None if the
            largest one does not break it. An image without a valid pixel is broken.
    """

    path: Path
    image_ids: list[str]
    eps_255: list[float | None]
    _about: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        return {**self._about, "image_ids": self.image_ids, "strength": self.eps_255, "eps_255": self.eps_255}

    @property
    def unbroken(self) -> int:
        """The number of images that the largest radius does not break."""
        return self.eps_255.count(None)

    def share_broken(self, eps_255: float) -> float:
        """The share of images that are broken at this radius, in [0,1]."""
        radius = round(eps_255, DECIMALS)  # 0.1 * 3 is more than 0.3, 1 - 0.9 less than 0.1
        return sum(each is not None and each <= radius for each in self.eps_255) / len(self.eps_255)

    def quantile(self, share: float) -> float | None:
        """The smallest radius of the grid that breaks this share of the images; None if it is never reached."""
        if not 0 <= share <= 1:
            raise UsageError(f"A share of the images is in [0, 1], e.g. 0.5 for the median, not {share}.")
        values = sorted(np.inf if each is None else each for each in self.eps_255)
        value = values[max(1, math.ceil(_as_written(share) * len(values))) - 1]
        return None if value == np.inf else float(value)


@raised(SIGTERM, PreemptedError, PREEMPTED)
def minimum(
    model_or_id: str | nn.Module,
    attacks: str | Sequence[str] = SEA_V1.losses,
    dataset: str | SegmentationDataset | None = None,
    share: float = 0.01,
    largest: float = 32.0,
    resolution: float = 0.25,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    iterations: int = SEA_V1.iterations,
    seed: int = SEA_V1.seed,
    options: RunOptions | None = None,
) -> Minimum:
    """Finds the smallest ε of each image by bisection on the radii resolution, 2 resolution, ..., and largest.

    It assumes that an image that withstands one radius withstands each smaller one (see `bisection.next_step`). With
    another ``largest`` or ``resolution`` in the same run directory all earlier trials count.

    Arguments and errors of `segbench.evaluate` mean the same here; ``options`` holds the other arguments. Besides:

    - ``attacks``: of the catalogue, without restarts; at each radius they are tried in this order until one breaks the
      image. ``iterations`` of each, at each radius; ``seed`` of the random starts.
    - ``share``: of the valid pixels that may be right in a broken image, in [0,1).
    - ``largest``, ``resolution``: radius, and step of the radii, over 255.
    """
    options, radii = options or RunOptions(), grid(largest, resolution)
    names = list(dict.fromkeys(as_list(attacks)))
    if not names:
        raise UsageError("Which attacks? See: segbench attack list")
    for attack in (get_attack(name, iterations) for name in names):
        if attack.restarts > 1 or attack.target is not None or attack.source:
            raise UsageError(f"{attack.name} cannot be tried at many radii: take one of a single start on this model.")
    if not 0 <= share < 1:
        raise UsageError(f"share must be in [0, 1), e.g. 0.01 for 99% of the pixels wrong, not {share}.")
    if options.engine != "local":
        raise UsageError("The smallest ε is searched in one process; on several machines: --shard 1/4, 2/4, ...")
    command = study_command("minimum --attacks", names, seed)
    request = Request(parse(model_or_id), dataset, data_root, out, limit, command)
    with prepare_run(request, radii[-1:], protocol_of(names, iterations, seed), options) as run:
        if any(run.store.read(unit) is None for unit in run.units):
            run_missing_units(run)
        _Bisection(run, radii, names, share).run()
    return finish_run(run, lambda: _summarise(run.store, radii, names, share), "minimum.json", WITHOUT_SHARD)


def grid(largest: float, resolution: float) -> list[float]:
    """The radii of a search, over 255: the multiples of ``resolution``, and ``largest``.

    >>> grid(1, 0.25), grid(32, 10)
    ([0.25, 0.5, 0.75, 1.0], [10.0, 20.0, 30.0, 32.0])
    """
    if not 0.001 <= resolution <= largest <= 255:
        raise UsageError(
            f"The radii go from resolution to largest, 0.001 <= resolution <= largest <= 255, not {resolution} to "
            f"{largest}."
        )
    step = _as_written(resolution)
    number = _as_written(largest) // step
    if number > MAX_RADII:
        raise UsageError(f"{number} radii are too many; at most {MAX_RADII}: a larger resolution.")
    radii = [round(float(index * step), DECIMALS) for index in range(1, number + 1)]
    last = round(float(largest), DECIMALS)
    return radii if radii[-1] >= last else [*radii, last]


def _as_written(number: float) -> Fraction:
    """A number as people write it: 0.07 * 100 is more than 7, 0.29 * 100 less than 29."""
    return Fraction(str(number))


class _Bisection:
    """The images of this process, each at its own radius of the grid."""

    def __init__(self, run: PreparedRun, radii: Sequence[float], attacks: Sequence[str], share: float) -> None:
        self._run = run
        self._radii = radii
        self._attacks = attacks
        self._share = share
        name = "tried.jsonl" if run.shards == 1 else f"tried-{shard_file_name(run.shard_label)}.jsonl"
        self._trials = Trials(run.store.path, name)
        known = self._trials.read()
        ids = run.worker.dataset.image_ids
        self._mine = {row: ids[row] for row in range(run.shard - 1, len(ids), run.shards)}
        self._broken = {image_id: _broken(known.get(image_id, {}), share) for image_id in self._mine.values()}
        self._rounds = len(radii).bit_length()  # radii that decide an image

    def run(self) -> None:
        """Until each image's radius is found; PreemptedError after SIGTERM."""
        waiting = self._undecided()
        if not waiting:
            return
        worker, session = self._run.worker, self._run.session
        heartbeat, drain = self._run.heartbeat, self._run.drain
        progress = self._run.options.progress
        choose_batch_size(worker)  # the clean images may have been there, or done on the way
        if progress:
            announce(self._expected_time(len(waiting)))
        with counting_bar(len(self._mine) * self._rounds, "radii", progress) as advance:
            advance(sum(map(self._decided, self._mine)))

            def work(number: int, images: Prefetcher) -> None:
                """A stream: its share of the images, in one batch that is always full."""
                queue = deque(waiting[number :: worker.streams])

                def following() -> Unit | None:
                    unit = None if drain.is_set() else self._next(queue)
                    if unit is not None:
                        heartbeat.begin(unit.name)
                    return unit

                def finish(done: FinishedUnit) -> None:
                    row = done.unit.chunk
                    before = self._decided(row)
                    self._add(done)
                    heartbeat.end(done.unit.name)
                    advance(self._decided(row) - before)
                    queue.append(row)

                stream = Stream(worker, images.take, finish, lambda _: session.check_running())
                while queue and not drain.is_set():  # a stream ends when nothing waits, and its last image may go on
                    stream.run(following)

            session.run_streams(worker, [], work, jobs=len(waiting))
            if left := self._undecided():
                raise PreemptedError(f"{PREEMPTED} {len(left)} of {len(self._mine)} images are left.")

    def _undecided(self) -> list[int]:
        return [row for row in self._mine if not isinstance(self._search(row).then, SmallestRadius)]

    def _search(self, row: int) -> Search:
        return next_step(self._broken[self._mine[row]], self._radii, self._attacks)

    def _decided(self, row: int) -> int:
        """Radii of the image that need not be tried any more, of `_rounds`."""
        search = self._search(row)
        return self._rounds if isinstance(search.then, SmallestRadius) else search.decided

    def _next(self, queue: deque[int]) -> Unit | None:
        """The next trial of an image that waits for one; None when none does."""
        while queue:
            row = queue.popleft()
            then = self._search(row).then
            if not isinstance(then, SmallestRadius):
                return Unit(*then, row, (self._mine[row],))
        return None

    def _add(self, done: FinishedUnit) -> None:
        counts, unit = done.group.counts, done.unit
        trial = Trial(unit.image_ids[0], unit.strength, unit.loss, int(counts.correct[0]), int(counts.target.sum()))
        self._trials.add(trial)
        self._broken[trial.image_id] |= _broken({(trial.strength, trial.attack): trial}, self._share)

    def _expected_time(self, images: int) -> str:
        """One line for the user: an upper bound of the time."""
        worker = self._run.worker
        passes = sum(get_attack(name, worker.protocol.iterations).passes for name in self._attacks)
        seconds = seconds_per_pass(worker)
        if worker.fixed_shape:  # a batch that is not full takes as long as a full one
            streams = min(torch.get_num_threads(), images) if worker.one_core else 1
            together = streams * worker.images_at_once(*worker.dataset[0].image.shape[-2:])
            images = -(-images // together) * together
        return time_text(images * self._rounds * passes * seconds, worker, upper_bound=True)


def _broken(trials: Mapping[Key, Trial], share: float) -> dict[Key, bool]:
    limit = _as_written(share)
    return {key: trial.right <= limit * trial.valid for key, trial in trials.items()}


def _summarise(store: Store, radii: Sequence[float], attacks: Sequence[str], share: float) -> Minimum:
    """Reads the trials of all shards, and writes ``minimum.json``; IncompleteError if images are missing."""
    ids, known = store.manifest["image_ids"], Trials(store.path).read()
    ends = [next_step(_broken(known.get(image_id, {}), share), radii, attacks).then for image_id in ids]
    found = [end.strength for end in ends if isinstance(end, SmallestRadius)]
    if len(found) < len(ids):
        raise IncompleteError(f"{len(ids) - len(found)} of {len(ids)} images are missing.")
    described = describe_run(store)
    about = {key: described[key] for key in ("model", "dataset", "environment", "run_id")} | {
        "attacks": list(attacks),
        "iterations": described["iterations"],
        "seed": described["seed"],
        "share_right": share,
        "largest_eps_255": radii[-1],
        "resolution_255": radii[0],
    }
    result = Minimum(store.path, list(ids), found, about)
    write_study(store, "minimum", result.document())
    return result
