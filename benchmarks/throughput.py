"""Image passes per second (forward, loss, input gradient) by model, size, batch, precision and compilation.

    python benchmarks/throughput.py --out benchmarks/results/throughput_cpu.json      # eight minutes on two cores

What the entry calls images per second. Each row is a full batch of the engine in its steady state. On a CPU the engine
computes batches of one size, chosen from the image's size (`segbench.engine.compute.batching`): other sizes are
measured here with the same code to show what that choice costs. Rows that cannot be measured say why.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import common
import torch

from segbench.attacks.evaluator import Evaluator
from segbench.attacks.memory import is_out_of_memory
from segbench.attacks.problem import frozen
from segbench.engine.compute.batching import cpu_batch
from segbench.engine.compute.precision import check_precision, get_precision
from segbench.errors import UsageError
from segbench.models.float32 import exact_float32

LOSSES = ("mce_bal", "mce", "js")
SECONDS = 4.0  # of a measurement, at least one step
BF16_TARGET = 2.5  # times fp32, on an H200
# model and image sides
ON_CPU = [("convnext_mini", [64, 128]), ("convnext_t", [256]), ("vit_s", [256])]
ON_GPU = [("convnext_mini", [64]), ("convnext_t", [256, 473]), ("vit_s", [256, 512])]


def measure(
    name: str, side: int, batch: int, precision: str, device: torch.device, *, compiled: bool
) -> dict[str, Any]:
    """Images per second of one setting."""
    row: dict[str, Any] = {
        "model": name, "image": f"{side}x{side}", "batch": batch, "precision": precision, "compile": compiled,
        "images_per_second": None, "peak_gpu_bytes": None, "note": None,
    }  # fmt: skip
    try:
        check_precision(precision, device)
        row |= _measure(name, side, batch, precision, device, compiled=compiled)
    except UsageError as error:
        row["note"] = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        row["note"] = "out of memory"
    return row


def _measure(
    name: str, side: int, batch: int, precision: str, device: torch.device, *, compiled: bool
) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model, num_classes = common.random_model(name, device, (side, side))
    chosen = get_precision(precision)
    evaluator = Evaluator(
        model,
        class_weights=torch.full((num_classes,), 1 / num_classes, device=device),
        size=batch,
        fill=device.type == "cpu" or compiled,
        autocast=chosen.autocast,
        setting=chosen.setting,
        compiled=compiled,
    )
    with exact_float32(), frozen(model):
        attacked = common.full_batch(evaluator, batch, (side, side), num_classes, device, LOSSES)

        def steps(count: int) -> None:
            for _ in range(count):
                attacked.step()
                attacked.finished()

        warm = common.timed(lambda: steps(2), device)
        one = common.timed(lambda: steps(1), device)
        count = max(1, min(200, int(SECONDS / one)))
        seconds = common.timed(lambda: steps(count), device)
    return {
        "images_per_second": round(count * batch / seconds, 3),
        "warm_up_seconds": round(warm, 2),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "note": "torch.compile failed, measured without" if compiled and evaluator.compiled is None else None,
    }


def settings(options: argparse.Namespace) -> list[tuple[str, int, int, str, bool]]:
    """What to measure: batches in fp32; at the largest of them, or the engine's, precisions and compilation."""
    on_cuda = options.device.type == "cuda"
    found = []
    for name, sides in ON_GPU if on_cuda else ON_CPU:
        if name not in options.models:
            continue
        for side in options.sizes or sides:
            own = max(options.batches) if on_cuda else cpu_batch(side, side)
            batches = sorted({*options.batches, own})
            found += [(name, side, batch, "fp32", False) for batch in batches]
            found += [(name, side, own, precision, False) for precision in options.precisions if precision != "fp32"]
            if options.compile:
                found += [(name, side, own, precision, True) for precision in options.precisions if precision != "tf32"]
    return found


def main() -> None:
    parser = common.arguments(__doc__)
    names = [name for name, _ in ON_CPU]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--sizes", nargs="+", type=int, help="image sides instead of those of each model")
    parser.add_argument("--batches", nargs="+", type=int, help="1 4 16; on a GPU 1 4 16 32")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "tf32", "bf16"])
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args()
    options.batches = options.batches or ([1, 4, 16, 32] if options.device.type == "cuda" else [1, 4, 16])
    logging.getLogger("segbench").setLevel(logging.ERROR)
    rows = []
    todo = settings(options)
    for number, (name, side, batch, precision, compiled) in enumerate(todo):
        common.progress(f"{number + 1} of {len(todo)}: {name} {side} batch {batch} {precision} compile {compiled}")
        rows.append(measure(name, side, batch, precision, options.device, compiled=compiled))
    report = common.machine(options.device) | {"rows": rows, "bf16_over_fp32": ratios(rows), "target": BF16_TARGET}
    report["target_for"] = "an H200, ConvNeXt-T and ViT-S; told on any device"
    common.print_table(
        ["model", "image", ">batch", "precision", "compile", ">images/s", "note"],
        [
            [row[key] for key in ("model", "image", "batch", "precision")]
            + ["yes" if row["compile"] else "no", row["images_per_second"], row["note"]]
            for row in rows
        ],
    )
    common.print_table(
        ["model", "image", "compile", ">bf16 / fp32", ">target on an H200"],
        [
            [each["model"], each["image"], "yes" if each["compile"] else "no", each["ratio"], BF16_TARGET]
            for each in report["bf16_over_fp32"]
        ],
    )
    common.write(report, options.out)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images per second in bf16 over those in fp32, of the same model, size, batch and compilation."""
    speed = {
        tuple(row[key] for key in ("model", "image", "batch", "compile", "precision")): row["images_per_second"]
        for row in rows
    }
    return [
        {"model": key[0], "image": key[1], "batch": key[2], "compile": key[3], "ratio": round(value / base, 3)}
        for key, value in speed.items()
        if key[-1] == "bf16" and value and (base := speed.get((*key[:-1], "fp32")))
    ]


if __name__ == "__main__":
    main()
