"""Time of an attack iteration over the time of a bare forward pass and input gradient.

    python benchmarks/attack_overhead.py [--model mini convnext_t] [--device cpu] [--rounds 5] [--out FILE.json]

Both are measured in one run, in turns, and the median ratio over the rounds is reported. An attack of n iterations
counts as n + 1 forward and n backward passes (SEA.md, section 3), a bare pass of the same length likewise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from segbench import attacks
from segbench.attacks.problem import frozen
from segbench.models.architectures import build

MINI = {"depths": (1, 1, 2, 1), "widths": (16, 24, 32, 48), "channels": 16, "auxiliary_channels": 16}
# name: architecture arguments, classes, image side, batch, iterations, target
CASES = {
    "mini": (MINI, 8, 64, 16, 20, 1.6),
    "convnext_t": ({}, 21, 256, 1, 3, 1.15),
}
LOSSES = ("mce_bal", "mce", "js")


def unfoolable(model: nn.Module, num_classes: int) -> None:
    """A classifier that says the last class whatever it sees, so that no image leaves the batch early."""
    classifier = model.head.classifier  # type: ignore[union-attr]
    with torch.no_grad():
        classifier.weight.mul_(1e-3)  # type: ignore[operator,union-attr]
        classifier.bias.copy_(torch.linspace(0, 1, num_classes))  # type: ignore[operator,union-attr]


def bare(model: nn.Module, images: torch.Tensor, iterations: int) -> None:
    """``iterations + 1`` forward passes and ``iterations`` input gradients of the summed logits."""
    with frozen(model):
        for step in range(iterations + 1):
            x = images.detach().requires_grad_(step < iterations)
            logits = model(x)
            if step < iterations:
                torch.autograd.grad(logits.sum(), x)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(case: str, device: torch.device, rounds: int) -> dict[str, object]:
    """Seconds per iteration and ratios of one case."""
    arguments, num_classes, side, batch, iterations, target = CASES[case]
    torch.manual_seed(0)
    model = build("upernet_convnext", num_classes=num_classes, **arguments).eval().to(device)
    unfoolable(model, num_classes)
    images = torch.rand(batch, 3, side, side, device=device)
    labels = torch.full((batch, side, side), num_classes - 1, device=device)
    weights = torch.full((num_classes,), 1 / num_classes, device=device)

    def attack(loss: str) -> object:
        return attacks.apgd(model, images, labels, eps=4 / 255, loss=loss, iterations=iterations, class_weights=weights)

    bare(model, images, 1)
    times: dict[str, list[float]] = {name: [] for name in ("bare", *LOSSES)}
    for _ in range(rounds):
        times["bare"].append(timed(lambda: bare(model, images, iterations), device) / iterations)
        for loss in LOSSES:
            times[loss].append(timed(lambda loss=loss: attack(loss), device) / iterations)  # type: ignore[misc]
    ratios = {
        loss: statistics.median(a / b for a, b in zip(times[loss], times["bare"], strict=True)) for loss in LOSSES
    }
    return {
        "case": case,
        "image": f"{side}x{side}",
        "batch": batch,
        "target": target,
        "milliseconds": {name: round(1000 * statistics.median(values), 2) for name, values in times.items()},
        "overhead": {loss: round(ratio, 3) for loss, ratio in ratios.items()},
        "js_over_mce": round(statistics.median(a / b for a, b in zip(times["js"], times["mce"], strict=True)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    report = {
        "device": name,
        "torch": torch.__version__,
        "rounds": options.rounds,
        "cases": [measure(case, device, options.rounds) for case in options.model],
    }
    print(json.dumps(report, indent=2))
    print("\n| case | bare ms | " + " | ".join(f"{loss} ratio" for loss in LOSSES) + " | js / mce | target |")
    print("| :-- | --: |" + " --: |" * (len(LOSSES) + 2))
    for case in report["cases"]:  # type: ignore[union-attr]
        ratios = " | ".join(f"{case['overhead'][loss]:.3f}" for loss in LOSSES)
        print(
            f"| {case['case']} | {case['milliseconds']['bare']} | {ratios} "
            f"| {case['js_over_mce']} | <= {case['target']} |"
        )
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
