"""What the recipes of the paper cost: memory and seconds of two iterations, and on a GPU images per second.

    python benchmarks/paper_recipes.py [--json FILE.json]
    python benchmarks/paper_recipes.py --device cpu --small --iterations 2 --warmup 1 --crop 64 --batch 2   # a check

Memory: `segbench.training.loop.train` by a PIR-AT recipe of each architecture (five attack steps), with random weights,
on the CPU, two images of a reduced crop an iteration, two iterations, each recipe in a process of its own. The peak is
its ``ru_maxrss``, Python and torch included. Processor seconds are of all threads: other work changes them little.

Speed, where there is a GPU, or with ``--device``: the recipe pirat_convnext_t_voc with random weights and the share of
one of its 8 GPUs (16 images of 473x473). Images and labels are random and in memory at the size of the crop, and
nothing is scaled or blurred, so that no way waits for data. All ways go through the same loop, one after the other
in one run, and the seconds of ``--iterations`` steps count, after ``--warmup`` others:

- ``released``: the habits of the released code. The network is the one of tests/plain.py, which is the released one
  written out: contiguous tensors, norms of feature maps as means and variances, no stochastic depth (a little less work
  than the recipe asks for). float32, without TF32, not compiled. The images that the loop gives are made contiguous.
- ``released_tf32``: the same with what torch does by default: convolutions in TF32, matrix products not.
- ``float32``: our network by the recipe as it is (channels_last; TF32 as torch does by default).
- ``bf16``: with precision=bf16. The target is on its images per second over those of ``released``.
- ``bf16_compile``: with precision=bf16 compile=true.

What a loop for released code would do otherwise (augmentation in processes, several GPUs) is not part of this.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from segbench.data import FAMILIES, SegmentationDataset
from segbench.models.architectures.upernet import UPerNet
from segbench.models.float32 import exact_float32
from segbench.training import loop
from segbench.training.data import TrainingData
from segbench.training.distributed import Processes
from segbench.training.loop import Progress
from segbench.training.recipe import Recipe, load_recipe
from tests import plain

# recipe: side of the crop for the memory on a CPU
MEMORY = {
    "pirat_convnext_t_voc": 64,
    "pirat_convnext_s_ade20k": 64,
    "pirat_vit_s_ade20k": 64,
    "pirat_resnet50_voc": 65,
}
SPEED = "pirat_convnext_t_voc"
# way: settings of the recipe
WAYS: dict[str, dict[str, str]] = {
    "released": {},
    "released_tf32": {},
    "float32": {},
    "bf16": {"precision": "bf16"},
    "bf16_compile": {"precision": "bf16", "compile": "true"},
}
TARGET = 2.5
SMALL = "{depths: [1, 1, 2, 1], widths: [16, 24, 32, 48], channels: 16, auxiliary_channels: 16, drop_path_rate: 0.4}"
# Random weights and images at the size of the crop, and no time for anything but steps.
BARE = {
    "init": "random", "backbone": "''", "extra_data": "''", "base": "0", "blur": "0", "held_out": "0",
    "monitor_every": "0",
}  # fmt: skip


class DoneError(Exception):
    """Ends a run after enough steps, before it writes checkpoint or weights."""


class Released(UPerNet):
    """The network of tests/plain.py in the place of ours: contiguous, whatever the loop asks for."""

    def __init__(self, num_classes: int, arguments: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self.net = plain.UPerNet(num_classes, **{k: v for k, v in arguments.items() if k != "drop_path_rate"})

    @property
    def backbone(self) -> nn.Module:  # of which the optimiser asks
        return self.net.backbone

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **options: Any) -> Released:
        return super().to(*args, **options)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.contiguous())

    def forward_with_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.both(images.contiguous())


def released(recipe: Recipe, num_classes: int) -> nn.Module:
    torch.manual_seed(recipe.seed)
    return Released(num_classes, dict(recipe.architecture_arguments))


def noise(recipe: Recipe, images: int) -> TrainingData:
    """``images`` ids of random pixels and labels, which share 32 pictures in memory."""
    names = FAMILIES[recipe.dataset].protocol("").class_names  # type: ignore[misc]
    rng, size = np.random.default_rng(0), (recipe.crop, recipe.crop)
    pictures = [
        (rng.integers(0, 256, (*size, 3), np.uint8), rng.integers(0, len(names), size, np.uint8))
        for _ in range(min(32, images))
    ]
    data = SegmentationDataset(
        id=recipe.dataset,
        split=recipe.split,
        class_names=names,
        image_ids=tuple(f"{number:05}" for number in range(images)),
        read=lambda image_id: pictures[int(image_id) % len(pictures)],
        count_weights=lambda: (np.full(len(names), 1 / len(names)), "not counted"),
    )
    return TrainingData(data, data.first(0), data.first(1))


def run(recipe: Recipe, data: TrainingData, device: torch.device, show: Callable[[Progress], None]) -> None:
    """The loop, until ``show`` raises `DoneError`."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(DoneError):
        loop.train(recipe, data, Path(folder), processes=Processes(device), offline=True, progress=show)


def measure_memory(name: str) -> dict[str, Any]:
    """Two iterations in this process."""
    recipe = load_recipe(name, {**BARE, "crop": str(MEMORY[name]), "batch_size": "2", "epochs": "2",
                                "warmup_epochs": "1"})  # fmt: skip
    marks: list[float] = []
    rows: list[dict[str, Any]] = []

    def show(at: Progress) -> None:
        marks.append(time.process_time())
        if at.row is not None:
            rows.append(at.row)
            raise DoneError

    run(recipe, noise(recipe, 4), torch.device("cpu"), show)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "recipe": name,
        "architecture": recipe.architecture,
        "images": f"2x3x{recipe.crop}x{recipe.crop}",
        "attack_steps": recipe.attack_steps,
        "peak_memory_mib": round(peak / 2**20),
        "seconds_of_2_iterations": round(rows[0]["seconds"], 2),
        "processor_seconds_of_the_second": round(marks[1] - marks[0], 2),
    }


def in_a_process(name: str) -> dict[str, Any]:
    print(f"memory of {name} ...", file=sys.stderr)
    command = [sys.executable, __file__, "--child", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_speed(way: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Images per second of one way."""
    print(f"speed of {way} ...", file=sys.stderr)
    settings = {**BARE, **WAYS[way], "batch_size": str(options.batch)}
    settings |= {"crop": str(options.crop)} if options.crop else {}
    settings |= {"architecture_arguments": SMALL} if options.small else {}
    recipe = load_recipe(SPEED, settings)
    last = options.warmup + options.iterations
    marks: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def show(at: Progress) -> None:
        if at.step in (options.warmup, last):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            marks.append(time.perf_counter())
        if at.step == last:
            raise DoneError

    with contextlib.ExitStack() as stack:
        if way.startswith("released"):
            stack.enter_context(mock.patch.object(loop, "build_model", released))
        if way == "released":
            stack.enter_context(exact_float32())
        started = time.perf_counter()
        run(recipe, noise(recipe, max(8498, (last + 1) * options.batch)), device, show)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    seconds = marks[1] - marks[0]
    return {
        "way": way,
        "images_per_second": round(options.iterations * options.batch / seconds, 3),
        "milliseconds_an_iteration": round(1000 * seconds / options.iterations, 1),
        "seconds_until_measured": round(marks[0] - started, 1),
        "peak_memory_gib": peak and round(peak, 2),
    }


def speed(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.init()  # else there are no statistics of memory to reset
    recipe = load_recipe(SPEED)
    side = options.crop or recipe.crop
    rows = [measure_speed(way, options, device) for way in options.way]
    rates = {row["way"]: row["images_per_second"] for row in rows}
    for row in rows:
        row["ratio_to_released"] = (
            round(row["images_per_second"] / rates["released"], 3) if "released" in rates else None
        )
    real = device.type == "cuda" and side == recipe.crop and not options.small
    return {
        "recipe": SPEED,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine(),
        "network": "a small one" if options.small else "as in the recipe",
        "images": f"{options.batch}x3x{side}x{side}",
        "attack_steps": recipe.attack_steps,
        "iterations": options.iterations,
        "warmup": options.warmup,
        "target_of_bf16": TARGET if real else None,
        "about": "" if real else "A check that this runs, reduced or without a GPU: the ratios mean nothing.",
        "ways": rows,
    }


def machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="*", choices=MEMORY, default=list(MEMORY), help="whose memory is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "", help="on which speed is")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=10, help="steps before those that count; at least 1")
    parser.add_argument("--batch", type=int, default=16, help="images an iteration")
    parser.add_argument("--crop", type=int, help="side of the images in pixels, instead of the recipe's")
    parser.add_argument("--small", action="store_true", help="a network of few weights, to see whether all ways run")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--child", choices=MEMORY, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warmup < 1 or options.iterations < 1:
        parser.error("--warmup and --iterations must be 1 or more")
    if options.child:
        print(json.dumps(measure_memory(options.child)))
        return
    report = {
        "command": " ".join(["python benchmarks/paper_recipes.py", *_without_json(sys.argv[1:])]),
        "machine": machine(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "memory": [in_a_process(name) for name in options.recipe],
        "speed": speed(options, torch.device(options.device)) if options.device else None,
    }
    print(json.dumps(report, indent=2))
    print("\n| recipe | images | peak MiB | s for 2 iterations | processor s of the second |")
    print("| :-- | :-- | --: | --: | --: |")
    for row in report["memory"]:
        print(
            f"| {row['recipe']} | {row['images']} | {row['peak_memory_mib']} | {row['seconds_of_2_iterations']} "
            f"| {row['processor_seconds_of_the_second']} |"
        )
    if found := report["speed"]:
        print(f"\n{found['device']}, {found['images']}. {found['about']}")
        print("\n| way | images/s | ms an iteration | peak GiB | ratio | target |")
        print("| :-- | --: | --: | --: | --: | --: |")
        for row in found["ways"]:
            target = f">= {found['target_of_bf16']}" if row["way"] == "bf16" and found["target_of_bf16"] else ""
            print(
                f"| {row['way']} | {row['images_per_second']} | {row['milliseconds_an_iteration']} "
                f"| {row['peak_memory_gib'] or ''} | {row['ratio_to_released'] or ''} | {target} |"
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _without_json(arguments: list[str]) -> list[str]:
    """A command without where it writes to."""
    if "--json" not in arguments:
        return arguments
    place = arguments.index("--json")
    return arguments[:place] + arguments[place + 2 :]


if __name__ == "__main__":
    main()
