"""The smallest ε at which an image falls: at which at most a small share of its pixels is still right.

Source: Croce, Singh, Hein, ECCV 2024, Figure 6: the smallest radius at which 99% of the pixels are wrong. Each image
has its own radius, so images at many radii are in a batch together. The start of an attack is drawn as in an
evaluation, so that what is found at (image, ε, attack) is what an evaluation finds there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from signal import SIGTERM
from typing import Any

import numpy as np
import torch
from torch import nn

from segbench import schemas
from segbench.attacks.catalogue import get_attack
from segbench.attacks.problem import frozen
from segbench.data import SegmentationDataset
from segbench.engine.bisection import Found, Step, step
from segbench.engine.compare import command_of, several
from segbench.engine.estimate import seconds_per_pass
from segbench.engine.plan import Finished, Unit
from segbench.engine.prefetch import Prefetcher
from segbench.engine.preparation import DRAINING, PREEMPTED, How, Ready, do, fill_memory, prepared, shard_done
from segbench.engine.presence import Presence, file_name, present
from segbench.engine.progress import announce, counted, duration
from segbench.engine.run import Stopped
from segbench.engine.store import MEND, Store
from segbench.engine.stream import Stream
from segbench.engine.trials import Trial, Trials
from segbench.engine.worker import device_name
from segbench.errors import IncompleteError, PreemptedError, RunError, UsageError
from segbench.evidence import Key
from segbench.files import write_atomic
from segbench.models.devices import exact_float32
from segbench.protocol import SEA_V1
from segbench.protocol import minimum as protocol_of
from segbench.signals import raised, stop_signals

FILE = "minimum.json"
MAX_RADII = 100_000  # of the grid


@dataclass(frozen=True)
class Minimum:
    """A finished search.

    Attributes:
        path: the run directory; ``minimum.json`` lies in it, and the trials that it comes of.
        image_ids: of all images.
        eps_255: for each the smallest radius over 255 at which it falls; 0 if the clean image has fallen, None if it
            stands at the largest one. An image without a valid pixel has fallen.
    """

    path: Path
    image_ids: list[str]
    eps_255: list[float | None]
    _about: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        return {**self._about, "image_ids": self.image_ids, "eps_255": self.eps_255}

    @property
    def standing(self) -> int:
        """The number of images that stand at the largest radius."""
        return self.eps_255.count(None)

    def fallen(self, eps_255: float) -> float:
        """The share of images that have fallen at this radius, in [0,1]."""
        return sum(each is not None and each <= eps_255 for each in self.eps_255) / len(self.eps_255)

    def quantile(self, share: float) -> float | None:
        """The smallest radius of the grid at which this share of the images has fallen; None if it is never reached."""
        values = sorted(np.inf if each is None else each for each in self.eps_255)
        value = values[max(0, int(np.ceil(share * len(values))) - 1)]
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
    how: How | None = None,
) -> Minimum:
    """Looks for the smallest ε of each image by bisection on the radii resolution, 2 resolution, ..., largest.

    It takes for granted that an image that stands at one radius stands at each smaller one (see `bisection.step`). Of
    several attacks the first that brings the image down at a radius is enough there. With another ``largest`` or
    ``resolution`` in the same run directory all that was tried there counts.

    Args:
        model_or_id: whatever `segbench.evaluate` takes.
        attacks: of the catalogue, without restarts, in the order in which they are tried.
        dataset: data set id or object; None for the one of the model's card.
        share: of the valid pixels that may be right when an image has fallen, in [0,1).
        largest: radius over 255.
        resolution: of the radii, over 255.
        data_root: folder of the data set, where it needs one.
        out: run directory; None for ``runs/<model>-<data set>-<identity>``.
        limit: only the first images.
        iterations: of each attack at each radius.
        seed: of the random starts.
        how: how it is computed; in this process, or divided by ``shard``.

    Raises:
        UsageError, ModelError, DataError, RunError: what is wrong, and how to mend it.
        ShardDoneError: this shard is done, images of others are missing.
        PreemptedError: SIGTERM stopped it, images are missing.
    """
    how, radii = how or How(), grid(largest, resolution)
    names = list(dict.fromkeys(several(attacks)))
    if not names:
        raise UsageError("Which attacks? See: segbench attack list")
    for attack in (get_attack(name, iterations) for name in names):
        if attack.restarts > 1 or attack.target is not None or attack.source:
            raise UsageError(f"{attack.name} cannot be tried at many radii: take one of a single start on this model.")
    if not 0 <= share < 1:
        raise UsageError(f"share must be in [0, 1), e.g. 0.01 for 99% of the pixels wrong, not {share}.")
    if how.engine != "local":
        raise UsageError("The smallest ε is looked for in one process; on several machines: --shard 1/4, 2/4, ...")
    protocol, verb = protocol_of(names, iterations, seed), command_of("minimum --attacks", names, seed)
    with prepared(model_or_id, dataset, radii[-1:], protocol, how, data_root, out, limit, verb) as ready:
        if any(ready.store.read(unit) is None for unit in ready.units):
            do(ready, how)
        _Search(ready, radii, names, share).run(how)
        store = ready.store
    try:
        return _summarise(store, radii, names, share)
    except IncompleteError as error:
        raise shard_done(how, store, error, "the same command without --shard") from error


def grid(largest: float, resolution: float) -> list[float]:
    """The radii that are tried, over 255.

    Raises:
        UsageError: out of range.

    >>> grid(1, 0.25)
    [0.25, 0.5, 0.75, 1.0]
    """
    if not 0.001 <= resolution <= largest <= 255:
        raise UsageError(
            f"The radii go from resolution to largest, 0.001 <= resolution <= largest <= 255, not {resolution} to "
            f"{largest}."
        )
    number = int(largest / resolution + 1e-9)
    if number > MAX_RADII:
        raise UsageError(f"{number} radii are too many; at most {MAX_RADII}: a larger resolution.")
    return [round(place * resolution, 9) for place in range(1, number + 1)]


class _Search:
    """The images of this process, each at its own radius.

    Args:
        ready: the prepared run.
        radii: the grid.
        attacks: in order.
        share: of right pixels at which an image has fallen.
    """

    def __init__(self, ready: Ready, radii: Sequence[float], attacks: Sequence[str], share: float) -> None:
        self._ready = ready
        self._radii = radii
        self._attacks = attacks
        self._share = share
        name = "tried.jsonl" if ready.parts == 1 else f"tried-{file_name(ready.label)}.jsonl"
        self._trials = Trials(ready.store.path, name)
        known = self._trials.read()
        ids = ready.worker.dataset.image_ids
        self._mine = {place: ids[place] for place in range(ready.part - 1, len(ids), ready.parts)}
        self._fallen = {image_id: _fallen(known.get(image_id, {}), share) for image_id in self._mine.values()}
        self._stop = threading.Event()

    def run(self, how: How) -> None:
        """Until each image's radius is found.

        Raises:
            PreemptedError: SIGTERM stopped it.
        """
        waiting = self._open()
        if not waiting:
            return
        worker, threads = self._ready.worker, torch.get_num_threads()
        fill_memory(worker, worker.dataset[0])  # the clean images may have been there, or done on the way
        worker.parallel = max(1, min(threads, len(waiting))) if self._ready.one_core else 1
        if how.progress:
            announce(self._expected(len(waiting)))
        try:
            with (
                present(self._ready.store.path, self._ready.label, device_name(worker.device)) as me,
                stop_signals((SIGTERM,), DRAINING) as drain,
                counted(len(self._mine) * self._rounds, "radii", how.progress) as advance,
                exact_float32(),
                frozen(worker.models),
                Prefetcher(worker.dataset, [], worker.device, worker.stamps) as images,
                ThreadPoolExecutor(
                    worker.parallel,
                    initializer=torch.set_num_threads,
                    initargs=(1 if self._ready.one_core else threads,),
                ) as pool,
            ):
                advance(sum(map(self._decided, self._mine)))
                parts = [waiting[first :: worker.parallel] for first in range(worker.parallel)]
                futures = [pool.submit(self._stream, part, images, me, advance, drain) for part in parts]
                try:
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise
                if left := self._open():
                    raise PreemptedError(f"{PREEMPTED} {len(left)} of {len(self._mine)} images are left.")
        finally:
            torch.set_num_threads(threads)

    def _stream(
        self,
        places: Sequence[int],
        images: Prefetcher,
        me: Presence,
        advance: Callable[[int], None],
        drain: threading.Event,
    ) -> None:
        """Does these images, in one batch that is always full."""
        queue = deque(places)

        def following() -> Unit | None:
            unit = None if drain.is_set() else self._next(queue)
            if unit is not None:
                me.begin(unit.name)
            return unit

        def finish(done: Finished) -> None:
            place = done.unit.chunk
            before = self._decided(place)
            self._add(done)
            me.end(done.unit.name)
            advance(self._decided(place) - before)
            queue.append(place)

        stream = Stream(self._ready.worker, images.take, finish, self._check)
        while queue and not drain.is_set():  # a stream ends when nothing waits for it, and its last image may go on
            stream.run(following)

    def _open(self) -> list[int]:
        return [place for place in self._mine if not isinstance(self._at(place).then, Found)]

    def _at(self, place: int) -> Step:
        return step(self._fallen[self._mine[place]], self._radii, self._attacks)

    def _decided(self, place: int) -> int:
        """Radii of the image that need not be tried any more, of `_rounds`."""
        at = self._at(place)
        return self._rounds if isinstance(at.then, Found) else at.decided

    @property
    def _rounds(self) -> int:
        return len(self._radii).bit_length()

    def _next(self, queue: deque[int]) -> Unit | None:
        """The next trial of an image that waits for one; None when none does."""
        while queue:
            place = queue.popleft()
            then = self._at(place).then
            if not isinstance(then, Found):
                return Unit(*then, place, (self._mine[place],))
        return None

    def _add(self, done: Finished) -> None:
        counts, unit = done.group.counts, done.unit
        trial = Trial(unit.image_ids[0], unit.eps_255, unit.loss, int(counts.correct[0]), int(counts.target.sum()))
        self._trials.add(trial)
        self._fallen[trial.image_id] |= _fallen({(trial.eps_255, trial.attack): trial}, self._share)

    def _check(self, _: int) -> None:
        if self._stop.is_set():
            raise Stopped

    def _expected(self, images: int) -> str:
        """One line for the user: an upper limit of the time."""
        worker = self._ready.worker
        passes = sum(get_attack(name, worker.protocol.iterations).passes for name in self._attacks)
        seconds = seconds_per_pass(worker, worker.dataset[0], one_core=self._ready.one_core)
        if worker.fixed_shape:  # a batch that is not full takes as long as a full one
            together = worker.parallel * worker.size(*worker.dataset[0].image.shape[-2:])
            images = -(-images // together) * together
        total = images * self._rounds * passes * seconds
        return f"At most about {duration(total)} on this device ({device_name(worker.device)}); Ctrl-C is safe."


def _fallen(trials: Mapping[Key, Trial], share: float) -> dict[Key, bool]:
    limit = Fraction(str(share))  # as it was written: 0.29 * 100 is less than 29
    return {key: trial.right <= limit * trial.valid for key, trial in trials.items()}


def _summarise(store: Store, radii: Sequence[float], attacks: Sequence[str], share: float) -> Minimum:
    """Reads the trials of all shards, and writes ``minimum.json``.

    Raises:
        IncompleteError: images are missing.
        RunError: nothing can be written.
    """
    manifest, known = store.manifest, Trials(store.path).read()
    found, missing = list[float | None](), 0
    for image_id in manifest["image_ids"]:
        then = step(_fallen(known.get(image_id, {}), share), radii, attacks).then
        if isinstance(then, Found):
            found.append(then.eps_255)
        else:
            missing += 1
    if missing:
        raise IncompleteError(f"{missing} of {len(manifest['image_ids'])} images are missing.")
    about = {key: manifest[key] for key in ("model", "dataset", "environment", "run_id")} | {
        "attacks": list(attacks),
        "iterations": manifest["protocol"]["iterations"],
        "seed": manifest["protocol"]["seed"],
        "share_right": share,
        "largest_eps_255": radii[-1],
        "resolution_255": radii[0],
    }
    result = Minimum(store.path, list(manifest["image_ids"]), found, about)
    try:
        write_atomic(store.path / FILE, schemas.dump(result.document()).encode())
    except OSError as error:
        raise RunError(f"Cannot write into {store.path}: {error}. {MEND}") from error
    return result
