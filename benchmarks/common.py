"""What the benchmarks of the engine share: the machine in words, timing, tables, and the report as JSON."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from segbench import load_model
from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.evaluator import Evaluator
from segbench.attacks.stages import reduced
from segbench.data import SegmentationDataset
from segbench.engine.compute.batching import small_on_cpu
from segbench.engine.compute.session import open_session
from segbench.engine.compute.worker import Worker, device_name
from segbench.engine.launch.local import run_units
from segbench.engine.rundir.manifest import versions
from segbench.engine.rundir.plan import FinishedUnit, plan
from segbench.entries import merge_groups
from segbench.evidence import Evidence, Group, Key
from segbench.models.architectures import build
from segbench.models.devices import choose_device
from segbench.protocol import Protocol

MINI = {"depths": (1, 1, 2, 1), "widths": (16, 24, 32, 48), "channels": 16, "auxiliary_channels": 16}
# architecture, its arguments, classes
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "convnext_mini": ("upernet_convnext", MINI, 8),
    "convnext_t": ("upernet_convnext", {}, 21),
    "vit_s": ("segmenter_vit", {}, 21),
    "lraspp": ("torchvision", {"name": "lraspp_mobilenet_v3_large"}, 21),
    "tiny_21": ("tiny", {}, 21),
    "tiny_151": ("tiny", {}, 151),
}
Size = tuple[int, int]  # height, width
ITERATIONS = 300  # of an attack, as in the protocol


def arguments(doc: str, **options: Any) -> argparse.ArgumentParser:
    """A parser with ``--device`` and ``--out``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    parser.add_argument("--device", default="auto", type=choose_device, help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, help="write the report there, as JSON")
    return parser


def random_model(name: str, device: torch.device, size: Size) -> tuple[nn.Module, int]:
    """A model with random weights that calls every pixel the last class, so that no image is finished early."""
    torch.manual_seed(0)
    architecture, options, num_classes = MODELS[name]
    model: nn.Module
    if architecture == "tiny":
        model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, num_classes, 1))
    elif architecture == "torchvision":
        model = load_model("torchvision:{name}@none".format(**options))
    else:
        if architecture == "segmenter_vit":
            options = options | {"image_size": size[0]}
        model = build(architecture, num_classes=num_classes, **options)
    return Unfoolable(model, num_classes).eval().to(device), num_classes


class Unfoolable(nn.Module):
    """Logits made so small, and shifted so far, that the last class wins everywhere; there still is a gradient."""

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("shift", torch.linspace(0, 10, num_classes).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images) * 1e-3 + self.shift


def full_batch(
    evaluator: Evaluator,
    batch: int,
    size: Size,
    num_classes: int,
    device: torch.device,
    losses: Sequence[str],
    largest_margin: float | None = None,
) -> AttackBatch:
    """Images of the last class under attack, the losses in turn, 300 iterations with radius reduction."""
    torch.manual_seed(1)
    attacked = AttackBatch(evaluator)
    label = torch.full(size, num_classes - 1, device=device)
    attacked.add(
        [
            Job(
                torch.rand(3, *size, device=device),
                label,
                losses[k % len(losses)],
                4 / 255,
                reduced(ITERATIONS),
                largest_margin=largest_margin,
            )
            for k in range(batch)
        ]
    )
    return attacked


def bare(model: nn.Module, images: torch.Tensor, passes: int = 1) -> None:
    """Forward passes and input gradients of the summed logits."""
    for _ in range(passes):
        x = images.detach().requires_grad_()
        torch.autograd.grad(model(x).sum(), x)


def attack(
    model_id: str,
    data: SegmentationDataset,
    strengths: Sequence[float],
    protocol: Protocol,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Evidence:
    """Every image under every attack of a protocol, which need not be one that `segbench.evaluate` knows."""
    worker = Worker(
        load_model(model_id), data, protocol, torch.device(device), precision=precision,
        one_core=small_on_cpu(torch.device(device), *data[0].image.shape[-2:]),
    )  # fmt: skip
    done: list[FinishedUnit] = []
    units = plan(protocol.name, data.image_ids, strengths, protocol.losses)
    with open_session(worker.models, worker.device) as session:
        run_units(session, worker, units, done.append, progress=True)
    done.sort(key=lambda each: (each.unit.strength, each.unit.loss, each.unit.chunk))
    groups: dict[Key, list[Group]] = {}
    for each in done:
        groups.setdefault((each.unit.strength, each.unit.loss), []).append(each.group)
    return Evidence({key: merge_groups(parts) for key, parts in groups.items()}, {})


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds, of the device too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def effort(function: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of the process, which other programs disturb least; with CUDA seconds as in `timed`."""
    if device.type == "cuda":
        return timed(function, device)
    started = time.process_time()
    function()
    return time.process_time() - started


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {name: round(f(values), digits) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def quartiles(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, minimum and maximum, and the quartiles: half of the values lie between those."""
    lower, upper = np.quantile(values, [0.25, 0.75]).tolist()
    return spread(values, digits) | {"lower_quartile": round(lower, digits), "upper_quartile": round(upper, digits)}


def machine(device: torch.device) -> dict[str, Any]:
    """What it was measured on, and with which command."""
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device_name(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": _bf16(device),
        "versions": versions(("segbench", "torch", "timm", "numpy")),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """As markdown; a column whose name begins with ``>`` is a column of numbers."""
    lines = [
        "| " + " | ".join(name.lstrip(">") for name in columns) + " |",
        "|" + "|".join(" --: " if name.startswith(">") else " :-- " for name in columns) + "|",
    ]
    for row in rows:
        lines.append("| " + " | ".join("–" if cell is None else str(cell) for cell in row) + " |")
    return "\n".join(lines)


def write_docs(page: Path, marks: tuple[str, str], text: str) -> None:
    """Puts a text between two marks of a page of the docs."""
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    whole, count = pattern.subn(lambda _: f"{marks[0]}\n\n{text}\n\n{marks[1]}", page.read_text("utf-8"))
    if count != 1:
        raise SystemExit(f"{page} has {count} places between {marks[0]} and {marks[1]}; it must have one.")
    page.write_text(whole, "utf-8")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """`markdown` between empty lines."""
    print(f"\n{markdown(columns, rows)}\n", flush=True)


def progress(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def write(report: dict[str, Any], out: Path | None) -> None:
    """The report as JSON to ``out``."""
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        progress(f"written {out}")
