"""Host memory of an evaluation against the number of images, and memory against the number of classes.

    python benchmarks/memory.py --out benchmarks/results/memory_cpu.json      # six minutes on two cores

Each row is a run in a process of its own, on images that are made when they are read, with a model of one convolution:
`segbench.evaluate` for the number of images, the attacks alone for the number of classes. The memory is the peak of the
process, minus that of a process that has only imported torch and segbench; on CUDA also the peak of the device.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import Any

import common
import numpy as np
import torch
from torch import nn

import segbench
from segbench.data import SegmentationDataset
from segbench.engine.compute.prefetch import PIXELS_AHEAD
from segbench.engine.compute.session import open_session
from segbench.engine.compute.worker import Worker
from segbench.engine.launch.local import run_units
from segbench.engine.rundir.plan import plan
from segbench.protocol import SEA_V1

SIDE, IMAGES = 128, [256, 1024, 2048, 3072]  # 8 classes
READ_AHEAD = PIXELS_AHEAD // SIDE**2  # images that wait, decoded; with fewer in all, all of them do
CLASSES = [2, 21, 151]  # at 512x512, 4 images
SLOPE_TARGET = 2000  # bytes for each image more: counts of 8 classes in 5 groups are 960


def made_up(images: int, classes: int, side: int) -> SegmentationDataset:
    """Random images, drawn when they are read."""

    def read(image_id: str) -> Any:
        rng = np.random.default_rng(int(image_id))
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
        return pixels, rng.integers(0, classes, (side, side)).astype(np.uint8)

    return SegmentationDataset(
        id="folder",
        split="val",
        class_names=tuple(map(str, range(classes))),
        image_ids=tuple(f"{number:06}" for number in range(images)),
        read=read,
        count_weights=lambda: (np.full(classes, 1 / classes), "made up"),
    )


def child(images: int, classes: int, side: int, device: torch.device) -> None:
    """Prints the peak memory of one run; of none without images."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, classes, 3, padding=1).eval()
    if side == SIDE and images:
        with tempfile.TemporaryDirectory() as folder:
            segbench.evaluate(
                model, made_up(images, classes, side), eps=8, iterations=1, out=folder, device=str(device),
                progress=False,
            )  # fmt: skip
    elif images:  # the attacks alone: the check at a huge radius would take an hour
        data, protocol = made_up(images, classes, side), replace(SEA_V1, iterations=1)
        worker = Worker(model, data, protocol, device)
        units = [
            unit for unit in plan(protocol.name, data.image_ids, [8.0], protocol.losses) if unit.loss in protocol.losses
        ]
        with open_session(worker.models, device) as session:
            run_units(session, worker, units, lambda _: None, progress=False)
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    print(json.dumps({"host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "device": on_device}))


def measured(images: int, classes: int, side: int, device: torch.device) -> dict[str, Any]:
    """Peaks of a process of its own, in bytes."""
    common.progress(f"{images} images of {side}x{side}, {classes} classes")
    command = [sys.executable, __file__, "--device", str(device), "--child", str(images), str(classes), str(side)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peaks: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def main() -> None:
    parser: argparse.ArgumentParser = common.arguments(__doc__)
    parser.add_argument("--images", nargs="+", type=int, default=IMAGES)
    parser.add_argument("--classes", nargs="+", type=int, default=CLASSES)
    parser.add_argument("--child", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child, options.device)
        return
    empty = measured(0, 8, 64, options.device)["host"]

    def row(images: int, classes: int, side: int) -> dict[str, Any]:
        peaks = measured(images, classes, side, options.device)
        return {
            "images": images, "classes": classes, "image": f"{side}x{side}",
            "host_bytes": peaks["host"] - empty, "device_bytes": peaks["device"],
        }  # fmt: skip

    by_images = [row(images, 8, SIDE) for images in options.images]
    by_classes = [row(4, classes, 512) for classes in options.classes]
    many = [(each["images"], each["host_bytes"]) for each in by_images if each["images"] >= READ_AHEAD]
    slope = np.polyfit(*zip(*many, strict=True), 1)[0]
    report = common.machine(options.device) | {
        "process_without_a_run_bytes": empty,
        "by_images": by_images,
        "bytes_per_image_more": round(float(slope)),
        "bytes_of_an_image": SIDE**2 * 12,
        "images_read_ahead": READ_AHEAD,
        "target_bytes_per_image": SLOPE_TARGET,
        "met": bool(slope <= SLOPE_TARGET),
        "by_classes": by_classes,
    }
    common.print_table(
        [">images", "size", ">classes", ">host MB", ">device MB"],
        [
            [
                each["images"], each["image"], each["classes"], round(each["host_bytes"] / 1e6, 1),
                each["device_bytes"] and round(each["device_bytes"] / 1e6, 1),
            ]
            for each in (*by_images, *by_classes)
        ],
    )  # fmt: skip
    print(f"{slope:.0f} bytes for each image more from {READ_AHEAD} images on; an image alone is {SIDE**2 * 12} bytes.")
    common.write(report, options.out)


if __name__ == "__main__":
    main()
