"""What every run begins with: model, data, probe, run directory, and this process's part; then its units are done."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGTERM
from typing import NamedTuple

import torch
from torch import nn

from segbench import content
from segbench.attacks.catalogue import SOURCE_DIGITS
from segbench.cards import ModelCard
from segbench.data import Sample, SegmentationDataset, load_dataset
from segbench.engine.batch_size import find_batch_size
from segbench.engine.batching import small_on_cpu
from segbench.engine.checks import probe
from segbench.engine.estimate import expected
from segbench.engine.manifest import command_line, describe
from segbench.engine.plan import Finished, Unit, plan
from segbench.engine.precision import check_precision
from segbench.engine.presence import file_name, present
from segbench.engine.progress import announce
from segbench.engine.run import first_pass, run
from segbench.engine.shards import own_device, own_shard, parse_shard
from segbench.engine.store import Store, alike, check_writable
from segbench.engine.worker import Worker, device_name
from segbench.errors import DataError, IncompleteError, ModelError, PreemptedError, ShardDoneError, UsageError
from segbench.models import adapters
from segbench.models.architectures import STATELESS
from segbench.models.devices import cpu_threads, exact_float32
from segbench.models.load import Subject, find, resolve
from segbench.models.sliding import as_fed
from segbench.protocol import SEA_V1, Protocol
from segbench.signals import stop_signals

ENGINES = ("local", "ray")
PREEMPTED = "Stopped by SIGTERM between units. Run the same command again to continue."
DRAINING = "SIGTERM: the units that have begun are finished, then this stops. The same command goes on."


class How(NamedTuple):
    """How a run is computed, which is no part of what comes out: the options of `evaluate` of the same names."""

    device: str = "auto"
    batch_size: int | str = "auto"
    precision: str = "fp32"
    shard: str | None = None
    engine: str = "local"
    progress: bool = True
    offline: bool = False
    compile: bool = False
    workers: int | None = None
    gpus_per_worker: float | None = None

    def part(self) -> tuple[int, int]:
        """Which part of the units this process does, and of how many."""
        return parse_shard(self.shard) if self.shard else own_shard()


class Ready(NamedTuple):
    """A run that may begin: what computes, the run directory, and this process's part.

    Attributes:
        worker: with the model in eval mode on its device.
        store: the run directory.
        units: this process's part.
        part, parts: which part of the images or units it does, from 1, and of how many.
        one_core: several threads of one core each are faster than one of all, and the model allows it.
    """

    worker: Worker
    store: Store
    units: list[Unit]
    part: int
    parts: int
    one_core: bool

    @property
    def label(self) -> str:
        """Of the shard."""
        return f"{self.part}/{self.parts}"


@contextmanager
def prepared(
    model_or_id: str | nn.Module,
    dataset: str | SegmentationDataset | None,
    radii: Sequence[float],
    protocol: Protocol,
    how: How,
    data_root: str | Path | None,
    out: str | Path | None,
    limit: int | None,
    verb: str,
    sources: Sequence[Subject] = (),
) -> Iterator[Ready]:
    """Everything before the first unit: data, model, probe, run directory; the model is left as it was.

    Arguments and errors as in `segbench.engine.evaluate.evaluate`; ``verb`` is the command that repeats it, with what
    it needs besides the options of all runs, and ``sources`` are other models that attacks of the protocol are made on.
    """
    if how.engine not in ENGINES:
        raise UsageError(f"engine must be one of {', '.join(ENGINES)}, not {how.engine!r}.")
    size, (number, shards) = _batch_size(how.batch_size), how.part()
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}.")
    device = own_device(how.device)
    check_precision(how.precision, device)
    data = open_dataset(model_or_id, dataset, data_root)  # first: weights may have to be downloaded
    subject = resolve(model_or_id, num_classes=data.num_classes, offline=how.offline, progress=how.progress)
    used = data.first(limit)
    if not len(used):
        raise UsageError("The data set has no images.")
    module, others = as_fed(subject.module, used), {source_name(each): as_fed(each.module, used) for each in sources}
    iterations = None if protocol.iterations == SEA_V1.iterations else protocol.iterations

    with cpu_threads(), ExitStack() as modes:
        was_training, *trained = [
            modes.enter_context(in_eval_mode(each, device)) for each in (module, *others.values())
        ]
        with exact_float32():
            found = probe(module, _probe_images(used, device), data.num_classes, was_training=was_training)
            samples = [
                _probe_source(each, module_, _probe_images(used, device), data.num_classes, was_training=training)
                for each, module_, training in zip(sources, others.values(), trained, strict=True)
            ]
        for each, sample in zip(sources, samples, strict=True):
            if source_name(each) == source_name(subject) and alike(sample, found.sample):
                raise UsageError(f"{each.id} is the model that is attacked. Transfer needs another one.")
        command = command_line(model_or_id, used.id, limit, iterations, how.precision, compiled=how.compile, verb=verb)
        worker = Worker(module, used, protocol, device, size, how.precision, how.compile, sources=others)
        units = plan(protocol.name, used.image_ids, radii, protocol.losses)
        mine = [unit for position, unit in enumerate(units) if position % shards == number - 1]
        one_core = small_on_cpu(device, *used[0].image.shape[-2:]) and all(map(_is_stateless, (subject, *sources)))
        check_writable(Path("runs" if out is None else out))
        fingerprint, clean = used.known_fingerprint() if used.files else used.fingerprint(), list[Finished]()
        if fingerprint is None:
            fingerprint, clean = first_pass(worker, units, mine, one_core=one_core, progress=how.progress)
            if shards == 1:
                _look_at_labels(used, clean, whole=limit is None and not used.is_partial)
        manifest = describe(
            subject, data, used, fingerprint, protocol, radii, found, how.precision, command, how.compile
        )
        name = f"{subject.id}-{content.dataset_folder(used.id)}-{manifest['run_id'][:8]}"
        store = Store.create(Path("runs") / name if out is None else Path(out), manifest)
        for each, sample in zip(sources, samples, strict=True):
            store.remember(source_name(each), sample)
        ready = Ready(worker, store, mine, number, shards, one_core)
        if shards > 1 and how.shard is None and how.progress:
            announce(f"Shard {ready.label}, as torchrun or SLURM say. For everything in this process: --shard 1/1")
        if shards > 1:
            store.log_name = f"log-{file_name(ready.label)}.jsonl"
        for done in clean:
            if store.read(done.unit) is None:
                store.add(done)
        yield ready


def do(ready: Ready, how: How) -> None:
    """Does what of this process's units is not there yet."""
    worker, store, mine, one_core = ready.worker, ready.store, ready.units, ready.one_core
    todo, sample = [unit for unit in mine if store.read(unit) is None], worker.dataset[0]
    if mine and not todo:
        logging.getLogger("segbench").warning(
            "%s: everything was there already, nothing is computed again. For a new run: another --out.", store.path
        )
    with (
        present(store.path, ready.label, device_name(worker.device)) as me,
        stop_signals((SIGTERM,), DRAINING) as drain,
    ):

        def begin(unit: Unit) -> bool:
            if store.file(unit).exists():  # somebody else did it meanwhile
                return False
            me.begin(unit.name)
            return True

        def finish(done: Finished) -> None:
            store.add(done)
            me.end(done.unit.name)

        if how.engine == "ray":
            from segbench.engine.ray_engine import run_on_ray

            run_on_ray(
                worker, todo, finish, begin=begin, drain=drain, one_core=one_core, workers=how.workers,
                gpus_per_worker=how.gpus_per_worker, progress=how.progress,
            )  # fmt: skip
        elif todo:
            fill_memory(worker, sample)
            if how.progress:
                announce(expected(worker, todo, store.costs(), sample, one_core=one_core))
            run(worker, todo, finish, begin=begin, drain=drain, side_by_side=one_core, progress=how.progress)
        if drain.is_set() and (left := [unit for unit in mine if not store.file(unit).exists()]):
            raise PreemptedError(
                f"Stopped by SIGTERM; the units that had begun are finished and kept, {len(left)} of {len(mine)} "
                "are left. Run the same command again to continue."
            )


def shard_done(how: How, store: Store, error: IncompleteError, mend: str) -> ShardDoneError:
    """What is said when this process has done its part, and others are missing."""
    number, shards = how.part()
    return ShardDoneError(f"Shard {number}/{shards} is done. {error} The last shard to finish merges; or: {mend}")


def _probe_source(
    source: Subject, module: nn.Module, images: torch.Tensor, num_classes: int, *, was_training: bool
) -> list[float]:
    """By what it is known again; refuses a model that cannot be attacked in the place of the evaluated one."""
    try:
        return probe(module, images, num_classes, was_training=was_training).sample
    except ModelError as error:
        raise ModelError(f"The model to transfer from, {source.id}: {error}") from error


def fill_memory(worker: Worker, sample: Sample) -> None:
    """On a GPU, and unless the user said how many: as many images at once as its memory holds."""
    if worker.device.type == "cuda" and worker.batch_size is None:
        worker.batch_size = find_batch_size(worker, sample)


@contextmanager
def in_eval_mode(module: nn.Module, device: torch.device) -> Iterator[bool]:
    """The module in eval mode on ``device``, and afterwards as it was; yields whether it was in training mode."""
    training = [part for part in module.modules() if part.training]
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    module.eval().to(device)
    try:
        yield bool(training)
    finally:
        for part in training:
            part.training = True
        if tensor is not None:
            module.to(tensor.device)


def source_name(subject: Subject) -> str:
    """By which the attacks made on this model are named."""
    return subject.weights_sha256[:SOURCE_DIGITS]


def open_dataset(
    model: str | nn.Module, dataset: str | SegmentationDataset | None, data_root: str | Path | None
) -> SegmentationDataset:
    """The data set as `evaluate` takes it: an object, an id, or that of the model's card."""
    if isinstance(dataset, SegmentationDataset):
        return dataset
    if dataset:
        return load_dataset(dataset, data_root)
    found = find(model) if isinstance(model, str) and not adapters.is_spec(model) else None
    if not isinstance(found, ModelCard):
        raise UsageError(
            "A model of your own needs a data set: dataset='camvid' in Python, --dataset camvid on the command line."
        )
    return load_dataset(found.dataset, data_root)


def _look_at_labels(data: SegmentationDataset, clean: Sequence[Finished], *, whole: bool) -> None:
    """Refuses a data set in which nothing counts; says which classes are missing in a whole one."""
    target = sum(done.group.counts.target.sum(axis=0) for done in clean)
    if not target.sum():
        raise DataError(
            f"No pixel of {data.id} counts: every label is {data.ignore_index} (ignored). Look at the masks: "
            f"segbench data check {data.id}, segbench data show {data.id}"
        )
    if whole and not target.all():
        empty = [name for name, pixels in zip(data.class_names, target, strict=True) if not pixels]
        logging.getLogger("segbench").warning(
            "%s: no pixel of %s in %r. Is it so? segbench data info %s", data.id, ", ".join(empty), data.split, data.id
        )


def _batch_size(value: int | str) -> int | None:
    if value == "auto":
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise UsageError(f"batch_size must be 'auto' or a whole number from 1, not {value!r}.")
    return int(value)


def _is_stateless(subject: Subject) -> bool:
    """Whether threads may share the module: of a user's module nobody knows what it keeps from pass to pass."""
    return subject.card is not None and subject.card.architecture["name"] in STATELESS


def _probe_images(data: SegmentationDataset, device: torch.device) -> torch.Tensor:
    images = [data[row].image for row in range(min(2, len(data)))]
    return torch.stack([image for image in images if image.shape == images[0].shape]).to(device)
