"""What a recipe trains on, and its batches: a function of (seed, epoch, rank) alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segbench.data import SegmentationDataset, load_dataset, load_whole
from segbench.data.dataset import Labels, Pixels
from segbench.data.parallel import default_workers, in_order
from segbench.data.sets.shapes import load_objects
from segbench.errors import DataError, RunError, UsageError
from segbench.files import sha256_bytes
from segbench.models.architectures import ARCHITECTURES
from segbench.training.augmentation import augment
from segbench.training.distributed import Processes
from segbench.training.recipe import CLASSIFICATION, MIN_SIDE, Recipe

ORDER, VIEW = 0, 1  # streams of random numbers: the order of an epoch, the views of its images


@dataclass(frozen=True)
class TrainingData:
    """The images of a run.

    Attributes:
        train: the training split without ``held_out``; as stored if the recipe scales or crops, else as evaluated.
        held_out: images of the training split as evaluation sees them; scores on them are shown while training.
        validation: as evaluation sees it.
    """

    train: SegmentationDataset
    held_out: SegmentationDataset
    validation: SegmentationDataset


class Batch(NamedTuple):
    """Images (N,3,H,W) and labels (N,H,W), both uint8."""

    images: Tensor
    labels: Tensor


def open_data(recipe: Recipe, root: str | Path | None = None) -> TrainingData:
    """The data that a recipe names.

    Raises:
        UsageError: a classifier of a data set that has no single objects; or training on the validation split.
        DataError: the data are missing or damaged.
    """
    if recipe.task == CLASSIFICATION:
        if recipe.dataset != "shapes":
            raise UsageError(f"Classifiers are trained on single objects of 'shapes', not on {recipe.dataset!r}.")
        whole = seen = load_objects("train")
        validation = load_objects("val")
    else:
        seen = whole = load_dataset(recipe.dataset, root, split=recipe.split)
        if recipe.base or recipe.crop:
            whole = load_whole(recipe.dataset, root, split=recipe.split)
        validation = load_dataset(recipe.dataset, root)
    if recipe.split == validation.split:
        raise UsageError(
            f"The recipe {recipe.id} trains on the split {recipe.split!r} of {recipe.dataset!r}, on which models are "
            "validated. Take another one: --set split=train"
        )
    kept_back = _evenly(whole.image_ids, min(recipe.held_out, len(whole) // 4))
    return TrainingData(_subset(whole, set(whole.image_ids) - kept_back), _subset(seen, kept_back), validation)


def _evenly(ids: tuple[str, ...], number: int) -> set[str]:
    """``number`` ids, evenly spaced: the same ones for every seed."""
    return {ids[index * len(ids) // number] for index in range(number)}


def _subset(data: SegmentationDataset, ids: set[str]) -> SegmentationDataset:
    return replace(data, image_ids=tuple(image_id for image_id in data.image_ids if image_id in ids))


def data_key(data: SegmentationDataset) -> str:
    """SHA-256 by which a checkpoint knows its training images: classes, ids, and the sizes of the files."""
    files = data.files
    sizes = [path.stat().st_size for name in data.image_ids for path in files.files(name)] if files else []
    return sha256_bytes(json.dumps([data.id, data.class_names, data.image_ids, sizes]).encode())


def steps_an_epoch(recipe: Recipe, data: SegmentationDataset, processes: Processes) -> int:
    """Optimiser steps of an epoch; the last images that fill no batch wait for another epoch's order.

    Raises:
        RunError: not one batch, a batch that cannot be divided, or parts too small for batch normalisation.
    """
    parts = processes.world * recipe.accumulation
    if recipe.batch_size % parts:
        raise RunError(
            f"A batch of {recipe.batch_size} images cannot be divided among {processes.world} processes with "
            f"accumulation {recipe.accumulation}: take a multiple of {parts}, --set batch_size=N."
        )
    synchronised = processes.device.type == "cuda" and processes.world > 1  # batch norms see the parts of all
    if recipe.batch_size == parts and not synchronised and ARCHITECTURES[recipe.architecture].has_batch_norm:
        raise RunError(
            f"A batch of {recipe.batch_size} images among {processes.world} processes with accumulation "
            f"{recipe.accumulation} has parts of one image, but batch normalisation needs two: "
            f"--set batch_size={2 * parts}, or take a lower accumulation or fewer processes."
        )
    if len(data) < recipe.batch_size:
        raise RunError(
            f"{len(data)} training images do not fill one batch of {recipe.batch_size}: lower batch_size, or give more."
        )
    return len(data) // recipe.batch_size


def batches(
    data: SegmentationDataset, recipe: Recipe, epoch: int, processes: Processes, first_step: int = 0
) -> Iterator[Batch]:
    """The share that this process has of each step's images, from ``first_step`` on.

    An image's view depends on the seed, the epoch and its place in the order, not on how a batch is divided.

    Raises:
        DataError: a damaged image; images of several sizes without a crop; or too small ones.
    """
    order = np.random.default_rng([recipe.seed, ORDER, epoch]).permutation(len(data))
    share = recipe.batch_size // processes.world

    def batch(step: int) -> Batch:
        start = step * recipe.batch_size + processes.rank * share
        examples = [_example(data, recipe, epoch, int(order[place]), place) for place in range(start, start + share)]
        shapes = {pixels.shape: order[start + row] for row, (pixels, _) in enumerate(examples)}
        if len(shapes) > 1:
            told = [
                f"{width}x{height} pixels ({data.where(data.image_ids[index])})"
                for (height, width, _), index in sorted(shapes.items())[:2]
            ]
            raise DataError(f"Images of {' and '.join(told)} do not fit one batch. Cut them to one size: --set crop=N")
        images = np.stack([pixels for pixels, _ in examples])
        labels = np.stack([label for _, label in examples])
        return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))

    steps = range(first_step, len(data) // recipe.batch_size)
    return in_order(batch, steps, default_workers() if data.files else 0)


def _example(data: SegmentationDataset, recipe: Recipe, epoch: int, index: int, place: int) -> tuple[Pixels, Labels]:
    pixels, labels = data.checked(data.image_ids[index])
    if not recipe.crop and min(labels.shape) < MIN_SIDE:
        raise DataError(
            f"Training needs images of {MIN_SIDE}x{MIN_SIDE} pixels or more: {data.where(data.image_ids[index])}. "
            "Give the recipe a crop."
        )
    rng = np.random.default_rng([recipe.seed, VIEW, epoch, place])
    pixels, labels = augment(pixels, labels, recipe, rng)
    return pixels, labels.astype(np.uint8)
