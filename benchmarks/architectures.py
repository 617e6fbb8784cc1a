"""Time of forward and image gradient of each released architecture over that of the same network written out plainly.

    python benchmarks/architectures.py [--model upernet_convnext_t ...] [--device cpu] [--rounds 7] [--out FILE.json]

Both have the same weights (tests/plain.py loads the released layout). They are measured in one run, in turns, and the
median of the ratios of neighbouring measurements is reported: the load of the machine changes it little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from segbench.models import from_released
from segbench.models.released import RELEASED
from tests.plain import PLAIN

# name: classes, image side
CASES = {
    "upernet_convnext_t": (21, 256),
    "upernet_convnext_s": (151, 256),
    "segmenter_vit_s": (151, 256),
    "pspnet_resnet50": (21, 257),
    "pspnet_resnet50_deepstem": (21, 257),
}
TARGET = 1.0
AGREE = 1e-3  # of the largest logit, in float32


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_once(model: nn.Module, images: torch.Tensor) -> float:
    """Milliseconds of one forward pass and the gradient with respect to the images."""
    x = images.detach().requires_grad_()
    synchronize(images.device)
    started = time.perf_counter()
    torch.autograd.grad(model(x).sum(), x)
    synchronize(images.device)
    return 1000 * (time.perf_counter() - started)


def measure(name: str, device: torch.device, rounds: int, side: int | None) -> dict[str, object]:
    """Milliseconds and ratio of one architecture."""
    num_classes, usual_side = CASES[name]
    side = side or usual_side
    torch.manual_seed(0)
    architecture, arguments = RELEASED[name]
    plain = PLAIN[architecture](num_classes=num_classes, **arguments).eval()
    for parameter in plain.parameters():  # zeros are no features: embeddings and projections get some
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    ours = from_released(name, plain.state_dict(), num_classes=num_classes)
    models = {"plain": plain.to(device), "ours": ours.to(device)}
    images = torch.rand(1, 3, side, side, device=device)
    with torch.no_grad():
        expected, found = plain(images), ours(images)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if difference > AGREE:
        raise SystemExit(f"{name}: logits differ by {difference:.1e} of the largest one; timings would mean nothing.")
    for model in models.values():
        model.requires_grad_(False)
        measure_once(model, images)
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for turn in range(rounds):
        for kind in sorted(models, reverse=turn % 2 == 0):
            times[kind].append(measure_once(models[kind], images))
    ratios = [a / b for a, b in zip(times["ours"], times["plain"], strict=True)]
    return {
        "case": name,
        "image": f"1x3x{side}x{side}",
        "target": TARGET,
        "milliseconds": {kind: round(statistics.median(values), 1) for kind, values in times.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "difference": float(f"{difference:.1e}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, help="of the images in pixels, instead of 256 (PSPNet 257)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()}"
    )
    report = {
        "command": f"python benchmarks/architectures.py --rounds {options.rounds} --device {options.device}",
        "device": name,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "rounds": options.rounds,
        "cases": [measure(case, device, options.rounds, options.side) for case in options.model],
    }
    print(json.dumps(report, indent=2))
    print("\n| case | plain ms | ours ms | ratio | target |")
    print("| :-- | --: | --: | --: | --: |")
    for case in report["cases"]:  # type: ignore[union-attr]
        times = case["milliseconds"]
        print(f"| {case['case']} | {times['plain']} | {times['ours']} | {case['ratio']:.3f} | <= {case['target']} |")
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
