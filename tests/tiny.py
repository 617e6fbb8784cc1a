"""Recipes and data so small that a training run takes less than a second."""

from __future__ import annotations

import csv
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import yaml
from PIL import Image
from torch import Tensor

from segbench.data import SegmentationDataset
from segbench.data.sets.shapes import CLASS_NAMES, draw_scene, load_shapes
from segbench.training.data import TrainingData
from segbench.training.recipe import Recipe, load_recipe

CONVNEXT = {
    "architecture": "upernet_convnext",
    "architecture_arguments": {
        "depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8], "channels": 8, "auxiliary_channels": 8,
    },
}  # fmt: skip
VIT = {
    "architecture": "segmenter_vit",
    "architecture_arguments": {
        "width": 16, "depth": 1, "heads": 2, "patch": 8, "image_size": 32, "decoder_depth": 1,
    },
    "auxiliary_weight": 0,
}  # fmt: skip
RESNET = {
    "architecture": "pspnet_resnet",
    "architecture_arguments": {"depths": [1, 1, 1, 1], "width": 8, "channels": 8, "auxiliary_channels": 8},
}
FIELDS = CONVNEXT | {
    "init": "random", "backbone": "", "extra_data": "", "epochs": 2, "batch_size": 4, "attack_steps": 2,
    "held_out": 0, "monitor_every": 0, "monitor_iterations": 2,
}  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # the cores are shared by the workers of the tests


def tiny(**changes: Any) -> Recipe:
    """Adversarial training of a tiny ConvNeXt from random weights."""
    values = FIELDS | changes
    return load_recipe("at_convnext_mini_shapes", {key: yaml.safe_dump(value) for key, value in values.items()})


def recipe_file(path: Path, **changes: Any) -> Path:
    """The same as a file."""
    path.write_text(yaml.safe_dump({"extends": "at_convnext_mini_shapes"} | FIELDS | changes), "utf-8")
    return path


@cache
def scenes(count: int = 12) -> SegmentationDataset:
    """Training scenes of shapes; a part of each is ignored, another part of each."""
    whole = load_shapes("train", count=count)

    def read(image_id: str) -> tuple[Any, Any]:
        pixels, labels = whole.read(image_id)
        labels = labels.copy()
        labels[: 5 * int(image_id) % 60] = 255
        return pixels, labels

    return replace(whole, read=read)


def data(count: int = 12, held_out: int = 0) -> TrainingData:
    """Scenes of which the first are held out, and one validation image."""
    whole = scenes(count)
    return TrainingData(
        replace(whole, image_ids=whole.image_ids[held_out:]), whole.first(held_out), load_shapes().first(1)
    )


def folder(root: Path, *, train: int = 12, val: int = 2, sizes: tuple[tuple[int, int], ...] = ((32, 32),)) -> Path:
    """The same scenes as files in the layout of `folder`: height and width of the pictures from ``sizes`` in turn."""
    root.mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n", "utf-8")
    for below, count, seed in (("", val, 1), ("train", train, 0)):
        for name in ("images", "masks"):
            (root / below / name).mkdir(parents=True)
        for number in range(count):
            pixels, labels = draw_scene(seed, number)
            labels = labels.copy()
            labels[: number % 8] = 255
            height, width = sizes[number % len(sizes)]
            for name, array in (("images", pixels), ("masks", labels)):
                picture = Image.fromarray(np.ascontiguousarray(array[:height, :width]))
                picture.save(root / below / name / f"{number:03}.png")
    return root


def weights(folder: Path) -> dict[str, Tensor]:
    """Of the only model in a folder."""
    (path,) = folder.glob("*.safetensors")
    return safetensors.torch.load_file(path)


def measured(folder: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` without what depends on the clock."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def segbench(*arguments: Any) -> list[str]:
    """A command line in a process of its own."""
    return [sys.executable, "-m", "segbench", *map(str, arguments)]
