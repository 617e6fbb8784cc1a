"""Images of a run attacked again, to be looked at: adversarial images are never stored with a run.

They are made by the same jobs as in the run, so on the same kind of device they are the same. What was made is kept in
``pictures/`` of the run directory.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from segbench.attacks import AttackResult
from segbench.attacks.batch import AttackBatch
from segbench.attacks.catalogue import get_attack
from segbench.attacks.problem import frozen
from segbench.data import Sample, SegmentationDataset
from segbench.engine.plan import Unit
from segbench.engine.preparation import How, Ready, prepared
from segbench.engine.progress import counted
from segbench.engine.run import passes
from segbench.engine.store import MEND
from segbench.engine.worker import Worker
from segbench.errors import RunError, UnknownNameError, UsageError
from segbench.evidence import CLEAN
from segbench.files import write_atomic
from segbench.models.devices import exact_float32
from segbench.protocol import Protocol, ThreatModel
from segbench.reporting.runs import Run


class Wanted(NamedTuple):
    """One picture: an image (its row in the run) under one attack; `CLEAN` is the image itself."""

    row: int
    eps_255: float
    attack: str


class Seen(NamedTuple):
    """What there is to see.

    Attributes:
        image: (3,H,W) float32 in [0,1], attacked.
        predictions: (H,W) of the model there.
    """

    image: npt.NDArray[np.float32]
    predictions: npt.NDArray[np.uint16]


@contextmanager
def opened(run: Run, model: str | nn.Module | None, data_root: str | Path | None, how: How) -> Iterator[Ready]:
    """The model and the data of a run, checked to be those that it was made with.

    Args:
        run: an evaluation or a comparison.
        model: what loads the model, if it is not the id that the run names.
        data_root: folder of the data set, where it needs one.
        how: how it is computed.

    Raises:
        UsageError: nothing is known by the model's id.
        RunError: it is another model, or other images.
    """
    about, data = run.manifest["model"], run.manifest["dataset"]
    limit = data["images"] if data["images"] < data["available"] else None
    protocol = _protocol(run.manifest["protocol"])
    radii, how = run.manifest["radii_255"], how._replace(precision=run.manifest["environment"]["precision"])
    with ExitStack() as stack:
        whole = prepared(model or about["id"], data["id"], radii, protocol, how, data_root, run.path, limit, "report")
        try:
            ready = stack.enter_context(whole)
        except UnknownNameError as error:
            if model is not None:
                raise
            raise UsageError(
                f"The run names its model {about['id']}, which nothing here is known by. Say what loads it with "
                "--model, or leave the pictures out with --no-pictures."
            ) from error
        yield ready


def _protocol(fields: Mapping[str, Any]) -> Protocol:
    return Protocol(
        **{**fields, "threat_model": ThreatModel(**fields["threat_model"]), "losses": tuple(fields["losses"])}
    )


def attack_again(ready: Ready, wanted: Sequence[Wanted], *, progress: bool) -> dict[Wanted, Seen]:
    """The pictures, those that are kept and those that are made now.

    Raises:
        RunError: what was made cannot be kept.
    """
    folder, data = ready.store.path / "pictures", ready.worker.dataset
    found: dict[Wanted, Seen] = {}
    missing = []
    for each in dict.fromkeys(wanted):
        kept = _read(folder / _name(each, data), data[each.row], each.eps_255)
        if kept is None:
            missing.append(each)
        else:
            found[each] = kept
    total = sum(passes(_unit(each, data), ready.worker.protocol) for each in missing)
    with counted(total, "attacking again", progress and bool(missing)) as advance, _threads(ready):
        for group in _alike(missing, data, ready.worker):
            made = _attacked(ready.worker, group, advance)
            for each, seen in zip(group, made, strict=True):
                found[each] = seen
                _write(folder / _name(each, data), seen)
    return found


@contextmanager
def _threads(ready: Ready) -> Iterator[None]:
    """As many as a unit of the run had: on a CPU the rounding may depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if ready.one_core else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _alike(wanted: Sequence[Wanted], data: SegmentationDataset, worker: Worker) -> Iterator[list[Wanted]]:
    """Parts that may share a batch: of one size, and for an attack that has a batch of its own of one attack."""
    groups: dict[tuple[Any, ...], list[Wanted]] = {}
    for each in wanted:
        shape = tuple(data[each.row].image.shape)
        own = each[1:] if (each.eps_255, each.attack) == CLEAN or get_attack(each.attack).alone else ()
        groups.setdefault((shape, own), []).append(each)
    for (shape, _), members in groups.items():
        size = worker.size(*shape[-2:])
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _attacked(worker: Worker, group: Sequence[Wanted], on_images: Callable[[int], None]) -> list[Seen]:
    samples, units = [worker.dataset[each.row] for each in group], [_unit(each, worker.dataset) for each in group]
    with exact_float32(), frozen(worker.models):
        if (group[0].eps_255, group[0].attack) == CLEAN:
            points = [sample.image for sample in samples]
        elif get_attack(group[0].attack).alone:
            points = [result.adversarial for result in worker.alone(units[0], samples, on_images)]
        else:
            points = [result.adversarial for result in _in_batch(worker, units, samples, on_images)]
        images = torch.stack([point.to(worker.device) for point in points]).float()
        predictions, _ = worker.predict(images)
    on_images(len(group))
    return [
        Seen(image, seen.astype(np.uint16))
        for image, seen in zip(images.cpu().numpy(), predictions.cpu().numpy(), strict=True)
    ]


def _in_batch(
    worker: Worker, units: Sequence[Unit], samples: Sequence[Sample], on_images: Callable[[int], None]
) -> list[AttackResult]:
    batch = AttackBatch(worker.evaluator(*samples[0].image.shape[-2:]))
    keys = batch.add([worker.job(unit, sample) for unit, sample in zip(units, samples, strict=True)])
    found = batch.run(on_images)
    return [found[key] for key in keys]


def _unit(each: Wanted, data: SegmentationDataset) -> Unit:
    return Unit(each.eps_255, each.attack, each.row, (data.image_ids[each.row],))


def _name(each: Wanted, data: SegmentationDataset) -> str:
    image = hashlib.sha256(data.image_ids[each.row].encode()).hexdigest()[:16]
    return f"eps{each.eps_255:g}_{each.attack}_{image}.npz"


def _write(path: Path, seen: Seen) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, image=seen.image, predictions=seen.predictions)
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, file.getvalue())
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error}. {MEND}") from error


def _read(path: Path, sample: Sample, eps_255: float) -> Seen | None:
    """What is kept, if it is whole and may be true."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            seen = Seen(archive["image"], archive["predictions"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = seen.image.dtype == np.float32 and seen.image.shape == tuple(sample.image.shape)
    if not whole or seen.predictions.dtype != np.uint16 or seen.predictions.shape != seen.image.shape[1:]:
        return None
    change = np.abs(seen.image.astype(np.float64) - sample.image.numpy()).max()
    return seen if change <= eps_255 / 255 + 1e-6 else None
