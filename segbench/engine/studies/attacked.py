"""Images of a run attacked again, to be looked at: adversarial images are never stored with a run.

They are made by the same jobs as in the run, so on the same kind of device they are the same. What was made is kept in
``pictures/`` of the run directory.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from segbench.attacks.catalogue import get_attack
from segbench.data import Sample, SegmentationDataset
from segbench.engine.compute.worker import Worker, image_passes
from segbench.engine.launch.options import RunOptions
from segbench.engine.launch.prepare import Request, draft_run
from segbench.engine.rundir.plan import Unit
from segbench.engine.rundir.store import FIX, Store
from segbench.engine.telemetry.progress import counting_bar
from segbench.errors import RunError, UnknownNameError, UsageError
from segbench.evidence import CLEAN
from segbench.files import write_results
from segbench.models.sources.names import parse
from segbench.protocol import Protocol, Threat


class PictureKey(NamedTuple):
    """One picture: an image (its row in the run) under one attack; `CLEAN` is the image itself."""

    row: int
    strength: float
    attack: str


class AttackedImage(NamedTuple):
    """An image under attack, (3,H,W) float32 in [0,1], and the predictions (H,W) of the model there."""

    image: npt.NDArray[np.float32]
    predictions: npt.NDArray[np.uint16]


class ReopenedRun(NamedTuple):
    """A run to be read, and its model at work."""

    worker: Worker
    store: Store
    options: RunOptions


@contextmanager
def reopen_run(
    store: Store, model: str | nn.Module | None, data_root: str | Path | None, options: RunOptions
) -> Iterator[ReopenedRun]:
    """The model and the data of an evaluation or a comparison, checked to be those that it was made with.

    It may be running meanwhile: nothing of it is changed.

    ``model`` loads the model, if it is not the id that the run names.
    """
    about, data = store.manifest["model"], store.manifest["dataset"]
    limit = data["images"] if data["images"] < data["available"] else None
    try:
        source = parse(model or about["id"])
    except UnknownNameError as error:
        if model is not None:
            raise
        raise UsageError(
            f"The run names its model {about['id']}, which nothing here is known by. Say what loads it with "
            "--model, or leave the pictures out with --no-pictures."
        ) from error
    request = Request(source, data["id"], data_root, store.path, limit, "report")
    options = options._replace(precision=store.manifest["environment"]["precision"])
    with draft_run(request, store.manifest["strengths"], _protocol(store.manifest["protocol"]), options) as draft:
        if (found := Store.find(store.path, draft.manifest)) is None:
            raise RunError(f"{store.path} is gone.")
        yield ReopenedRun(draft.worker, found, options)


def _protocol(fields: Mapping[str, Any]) -> Protocol:
    return Protocol(**{**fields, "threat": Threat(**fields["threat"]), "losses": tuple(fields["losses"])})


def attack_again(run: ReopenedRun, wanted: Sequence[PictureKey]) -> dict[PictureKey, AttackedImage]:
    """The pictures: those that were kept, and the others made now."""
    folder, worker = run.store.path / "pictures", run.worker
    data = worker.dataset
    kept = {key: _read(folder / _file_name(key, data), data[key.row], key.strength) for key in dict.fromkeys(wanted)}
    missing = [key for key, picture in kept.items() if picture is None]
    found = {key: picture for key, picture in kept.items() if picture is not None}
    total = sum(image_passes(_unit(key, data), worker.protocol) for key in missing)
    progress = run.options.progress and bool(missing)
    with counting_bar(total, "attacking again", progress) as advance, worker.stream_threads():
        for batch in _batches(missing, worker):
            while batch:
                shape = data[batch[0].row].image.shape
                made = worker.within_memory(partial(_attack_first, worker, batch, advance), len(batch), shape)
                for key, picture in zip(batch, made, strict=False):
                    found[key] = picture
                    _write(folder / _file_name(key, data), picture)
                batch = batch[len(made) :]
    return found


def _batches(wanted: Sequence[PictureKey], worker: Worker) -> Iterator[list[PictureKey]]:
    """Parts that may share a batch: of one size, and of one attack if it `runs_outside_batch`."""
    groups: dict[tuple[Any, ...], list[PictureKey]] = {}
    for key in wanted:
        shape = tuple(worker.dataset[key.row].image.shape)
        outside = (key.strength, key.attack) == CLEAN or get_attack(key.attack).runs_outside_batch
        groups.setdefault((shape, key[1:] if outside else ()), []).append(key)
    for (shape, _), members in groups.items():
        size = worker.images_at_once(*shape[-2:])
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _attack_first(
    worker: Worker, keys: Sequence[PictureKey], on_images: Callable[[int], None], number: int
) -> list[AttackedImage]:
    keys = keys[:number]
    samples, units = [worker.dataset[key.row] for key in keys], [_unit(key, worker.dataset) for key in keys]
    if (keys[0].strength, keys[0].attack) == CLEAN:
        points = [sample.image for sample in samples]
    else:
        points = [result.adversarial for result in worker.attack(units, samples, on_images)]
    images = torch.stack([point.to(worker.device) for point in points]).float()
    predictions, _ = worker.predict(images)
    on_images(len(keys))
    return [
        AttackedImage(image, labels.astype(np.uint16))
        for image, labels in zip(images.cpu().numpy(), predictions.cpu().numpy(), strict=True)
    ]


def _unit(key: PictureKey, data: SegmentationDataset) -> Unit:
    return Unit(key.strength, key.attack, key.row, (data.image_ids[key.row],))


def _file_name(key: PictureKey, data: SegmentationDataset) -> str:
    image = hashlib.sha256(data.image_ids[key.row].encode()).hexdigest()[:16]
    return f"eps{key.strength:g}_{key.attack}_{image}.npz"


def _write(path: Path, picture: AttackedImage) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, image=picture.image, predictions=picture.predictions)
    write_results({path: file.getvalue()}, FIX)


def _read(path: Path, sample: Sample, strength: float) -> AttackedImage | None:
    """The picture that was kept, if it is whole and within the budget."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            picture = AttackedImage(archive["image"], archive["predictions"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = picture.image.dtype == np.float32 and picture.image.shape == tuple(sample.image.shape)
    if not whole or picture.predictions.dtype != np.uint16 or picture.predictions.shape != picture.image.shape[1:]:
        return None
    change = np.abs(picture.image.astype(np.float64) - sample.image.numpy()).max()
    return picture if change <= strength / 255 + 1e-6 else None
