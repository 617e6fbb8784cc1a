"""Images a second of the published preprocessing of Pascal VOC (473x473 crops), ours against a plain loop of Pillow.

    python benchmarks/data_loading.py [--root FOLDER] [--images 100] [--rounds 7] [--out FILE.json]

The plain loop opens, converts, resizes and crops image and mask one after the other and makes tensors of them. Ours
gives the same tensors (checked) through `segbench.load_dataset("pascal_voc", root)`, without workers and with two. All
three read the same files in turns, and each image is dropped before the next; the ratio is the median over the rounds.
Without ``--root``, pictures of the usual
size (500x375, JPEG) are drawn.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageFilter

import segbench
from segbench.data import SegmentationDataset

Pair = tuple[torch.Tensor, torch.Tensor]
TARGETS = {"no workers": 1.0, "two workers": 1.8}  # at least


def draw(root: Path, images: int) -> None:
    """A tree of Pascal VOC: soft blotches with grain, as hard to decode as photographs, and blotches of classes."""
    base, rng = root / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / name).mkdir(parents=True)
    ids = [f"2007_{number:06}" for number in range(images)]
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(ids))
    for image_id in ids:
        blotches = (
            Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((500, 375)).filter(ImageFilter.DETAIL)
        )
        grain = np.asarray(blotches).astype(int) + rng.integers(-12, 13, (375, 500, 3))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(base / "JPEGImages" / f"{image_id}.jpg", quality=90)
        mask = Image.fromarray(rng.integers(0, 22, (8, 10)).astype(np.uint8)).resize((500, 375), 0)
        mask = mask.point([*range(21), *[255] * 235])
        mask.putpalette([value for index in range(256) for value in (index, 255 - index, index // 2)])
        mask.save(base / "SegmentationClass" / f"{image_id}.png")


def plain(data: SegmentationDataset) -> Iterator[Pair]:
    """What one writes without thinking of speed."""
    for image_id in data.image_ids:
        image_path, mask_path = data.files.files(image_id)
        image, mask = Image.open(image_path).convert("RGB"), Image.open(mask_path)
        wide, high = (473 if side == min(image.size) else int(side * 473 / min(image.size)) for side in image.size)
        left, top = round((wide - 473) / 2), round((high - 473) / 2)
        box = (left, top, left + 473, top + 473)
        pixels = np.array(image.resize((wide, high), Image.BILINEAR).crop(box))
        labels = np.array(mask.resize((wide, high), Image.NEAREST).crop(box)).astype(np.int64)
        labels[labels == 255] = 0
        yield torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, torch.from_numpy(labels)


def ours(data: SegmentationDataset, workers: int) -> Iterator[Pair]:
    for sample in data.samples(workers):
        yield sample.image, sample.label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("segbench").setLevel(logging.ERROR)  # that so few images are a partial copy
    with tempfile.TemporaryDirectory() as folder:
        if options.root is None:
            draw(Path(folder), options.images)
        data = segbench.load_dataset("pascal_voc", options.root or folder).first(options.images)
        ways: dict[str, Callable[[], Iterator[Pair]]] = {
            "plain loop": lambda: plain(data),
            "no workers": lambda: ours(data, 0),
            "two workers": lambda: ours(data, 2),
        }
        for way in ways.values():
            for found, expected in zip(way(), plain(data), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                deque(way(), maxlen=0)
                seconds[name].append(time.perf_counter() - started)
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds["plain loop"], seconds[name], strict=True))
        for name in TARGETS
    }
    report = {
        "command": "python benchmarks/data_loading.py",
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "pillow": PIL.__version__,
        "images": len(data),
        "rounds": options.rounds,
        "images_per_second": {name: round(len(data) / statistics.median(each), 1) for name, each in seconds.items()},
        "times_as_fast_as_the_plain_loop": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "targets": TARGETS,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
