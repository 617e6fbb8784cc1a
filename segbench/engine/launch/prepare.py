"""Everything before the first unit: the model and its probe, the data set, the run directory, this process's shard."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM
from typing import Any, NamedTuple

import torch
from torch import nn

from segbench import content
from segbench.attacks.catalogue import SOURCE_DIGITS
from segbench.data import SegmentationDataset
from segbench.engine.compute.batching import small_on_cpu
from segbench.engine.compute.checks import Probe, first_images, probe
from segbench.engine.compute.precision import check_precision
from segbench.engine.compute.session import Session, open_session
from segbench.engine.compute.worker import Worker, device_name
from segbench.engine.launch.dataset import check_labels, open_dataset
from segbench.engine.launch.local import first_pass
from segbench.engine.launch.options import ENGINES, RunOptions
from segbench.engine.launch.shards import process_device
from segbench.engine.rundir.lock import claim_shard
from segbench.engine.rundir.manifest import FP32, build_manifest
from segbench.engine.rundir.plan import FinishedUnit, Unit, is_trial, plan
from segbench.engine.rundir.store import Store, check_writable, same_probe
from segbench.engine.rundir.workers import Heartbeat, shard_file_name
from segbench.engine.telemetry.progress import announce
from segbench.errors import ModelError, UsageError
from segbench.models.devices import cpu_threads
from segbench.models.load import LoadedModel, load
from segbench.models.sliding import in_windows
from segbench.models.sources.names import ModelSource
from segbench.protocol import PROTOCOLS, SEA_V1, Protocol
from segbench.signals import stop_signals

DRAINING = "SIGTERM: the units that have begun are finished, then this stops. The same command goes on."


class Request(NamedTuple):
    """What is attacked: the model's name, parsed, and the arguments of `segbench.evaluate`; ``command`` repeats it."""

    source: ModelSource
    dataset: str | SegmentationDataset | None
    data_root: str | Path | None
    out: str | Path | None
    limit: int | None
    command: str


class Draft(NamedTuple):
    """A run of which nothing is written yet: its model at work, and what goes into its directory ``path``.

    Attributes:
        units: those of this process.
        clean: the clean ones among them that were run on the way.
        sources: name to probe of the models that attacks are made on.
    """

    session: Session
    worker: Worker
    path: Path
    manifest: dict[str, Any]
    units: list[Unit]
    clean: list[FinishedUnit]
    sources: dict[str, list[float]]


class PreparedRun(NamedTuple):
    """A run that can begin, and belongs to this process, which runs ``shard`` (from 1) of ``shards``: its ``units``.

    SIGTERM sets ``drain``: what has begun is finished, and nothing else begins.
    """

    session: Session
    worker: Worker
    store: Store
    units: list[Unit]
    options: RunOptions
    shard: int
    shards: int
    heartbeat: Heartbeat
    drain: threading.Event

    @property
    def shard_label(self) -> str:
        return f"{self.shard}/{self.shards}"


@contextmanager
def prepare_run(
    request: Request,
    strengths: Sequence[float],
    protocol: Protocol,
    options: RunOptions,
    sources: Sequence[LoadedModel] = (),
) -> Iterator[PreparedRun]:
    """Prepares a run, and claims its shard until the end; the models are left as they were.

    ``sources`` are models that attacks are made on. A run that another process has, or another run in its directory,
    is a RunError, and nothing is changed.
    """
    shard, shards = options.shard_number()
    label = f"{shard}/{shards}"
    with draft_run(request, strengths, protocol, options, sources) as draft:
        if (found := Store.find(draft.path, draft.manifest)) is not None:
            for name, sample in draft.sources.items():
                found.knows_source(name, sample)
        with claim_shard(draft.path, label, device_name(draft.worker.device)) as heartbeat:
            store = Store.create(draft.path, draft.manifest)
            for name, sample in draft.sources.items():
                store.check_source(name, sample)
            if shards > 1:
                store.log_name = f"log-{shard_file_name(label)}.jsonl"
                if options.shard is None and options.progress:
                    announce(f"Shard {label}, as torchrun or SLURM say. For everything in this process: --shard 1/1")
            for done in draft.clean:
                if store.read(done.unit) is None:
                    store.add(done)
            with stop_signals((SIGTERM,), DRAINING) as drain:
                yield PreparedRun(
                    draft.session, draft.worker, store, draft.units, options, shard, shards, heartbeat, drain
                )


@contextmanager
def draft_run(
    request: Request,
    strengths: Sequence[float],
    protocol: Protocol,
    options: RunOptions,
    sources: Sequence[LoadedModel] = (),
) -> Iterator[Draft]:
    """Everything that is known of a run before anything is written; the models are left as they were."""
    if options.engine not in ENGINES:
        raise UsageError(f"engine must be one of {', '.join(ENGINES)}, not {options.engine!r}.")
    batch_size, (shard, shards) = options.fixed_batch_size(), options.shard_number()
    if request.limit is not None and request.limit < 1:
        raise UsageError(f"limit must be at least 1, not {request.limit}.")
    device = process_device(options.device)
    check_precision(options.precision, device)
    data = open_dataset(request.source, request.dataset, request.data_root)  # first: weights may have to be downloaded
    model = load(request.source, num_classes=data.num_classes, offline=options.offline, progress=options.progress)
    used = data.first(request.limit)
    if not len(used):
        raise UsageError("The data set has no images.")
    models = [model, *sources]
    modules = [in_windows(each.module, used) for each in models]

    with open_session(modules, device) as session:
        one_core = small_on_cpu(device, *used[0].image.shape[-2:]) and all(each.is_stateless for each in models)
        # Probed on as many threads as they are attacked on.
        with cpu_threads(1 if one_core else torch.get_num_threads()):
            probes = probe_models(session, models, modules, used)
        worker = Worker(
            modules[0], used, protocol, device, batch_size, options.precision, options.compile,
            one_core=one_core,
            sources={source_name(each): module for each, module in zip(sources, modules[1:], strict=True)},
        )  # fmt: skip
        worker.probe_as_attacked()
        trial = is_trial(protocol.fields(), images=len(used), available=data.complete or len(data))
        units = plan(protocol.name, used.image_ids, strengths, protocol.losses, checked=not trial)
        mine = units[shard - 1 :: shards]
        check_writable(Path("runs" if request.out is None else request.out))
        fingerprint, clean = used.known_fingerprint() if used.files else used.fingerprint(), list[FinishedUnit]()
        if fingerprint is None:
            fingerprint, clean = first_pass(session, worker, units, mine, progress=options.progress)
            if shards == 1:
                check_labels(used, clean, is_whole=request.limit is None and not used.is_partial)
        manifest = build_manifest(
            model.describe(), data, used, fingerprint, protocol, strengths, checks=probes[0].flags,
            probe=probes[0].sample, precision=options.precision, compiled=options.compile,
            command=_command_line(request, used, protocol, options),
        )  # fmt: skip
        name = f"{model.id}-{content.dataset_folder(used.id)}-{manifest['run_id'][:8]}"
        path = Path("runs") / name if request.out is None else Path(request.out)
        samples = {source_name(each): found.sample for each, found in zip(sources, probes[1:], strict=True)}
        yield Draft(session, worker, path, manifest, mine, clean, samples)


def probe_models(
    session: Session, models: Sequence[LoadedModel], modules: Sequence[nn.Module], data: SegmentationDataset
) -> list[Probe]:
    """Runs each model once on the first images, and refuses one that does not keep to what the engine relies on.

    The evaluated model comes first, then those that attacks are made on; ``modules`` are the same in windows.
    """
    images = first_images(data, session.device)
    probes = list[Probe]()
    for model, module, was_training in zip(models, modules, session.was_training, strict=True):
        try:
            probes.append(probe(module, images, data.num_classes, was_training=was_training))
        except ModelError as error:
            if not probes:
                raise
            raise ModelError(f"The model to transfer from, {model.id}: {error}") from error
        is_evaluated = source_name(model) == source_name(models[0]) and same_probe(probes[-1].sample, probes[0].sample)
        if len(probes) > 1 and is_evaluated:
            raise UsageError(f"{model.id} is the model that is attacked. Transfer needs another one.")
    return probes


def source_name(model: LoadedModel) -> str:
    """The name of a model in the names of attacks made on it."""
    return model.weights_sha256[:SOURCE_DIGITS]


def _command_line(request: Request, used: SegmentationDataset, protocol: Protocol, options: RunOptions) -> str:
    """The command that repeats this run, but for its radii. It is published, so it names no folder of this machine."""
    parts = [
        f"segbench {request.command} --model",
        shlex.quote(request.source.public_name),
        "--dataset",
        shlex.quote(used.id),
    ]
    parts += ["--protocol", protocol.name] if protocol.name in PROTOCOLS and protocol.name != SEA_V1.name else []
    parts += ["--limit", str(request.limit)] if request.limit is not None else []
    parts += ["--iterations", str(protocol.iterations)] if protocol.iterations != SEA_V1.iterations else []
    parts += ["--precision", options.precision] if options.precision != FP32 else []
    parts += ["--compile"] if options.compile else []
    return " ".join(parts)[:2000]
