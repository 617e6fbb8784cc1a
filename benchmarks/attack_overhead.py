"""Time of an attack iteration over the time of a bare forward pass and input gradient.

    python benchmarks/attack_overhead.py --profile --out benchmarks/results/attack_overhead_cpu.json  # six minutes

Both sides see the same model and the same images in the same batch, in turns, in one run; the ratio is that of
neighbours. An iteration is a step of the engine's batch: forward, loss, input gradient, counting of right pixels, step
control and projections. With ``--profile`` the report tells in which operators the difference lies.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from segbench.attacks.evaluator import Evaluator
from segbench.attacks.problem import frozen
from segbench.models.float32 import exact_float32

# model, side, batch on a CPU, batch on a GPU, steps of a round, targets on CPU and GPU
CASES = {
    "mini": ("convnext_mini", 64, 16, 256, 20, 1.6, 1.6),
    "convnext_t": ("convnext_t", 473, 1, 16, 1, 1.10, 1.05),
}
LOSSES = ("mce_bal", "mce", "js")


def bare(model: nn.Module, images: torch.Tensor, steps: int) -> None:
    """Forward passes and input gradients of the summed logits."""
    for _ in range(steps):
        x = images.detach().requires_grad_()
        torch.autograd.grad(model(x).sum(), x)


def measure(case: str, device: torch.device, rounds: int, *, profiled: bool) -> dict[str, Any]:
    """Seconds of a step and ratios of one case."""
    name, side, on_cpu, on_gpu, steps, cpu_target, gpu_target = CASES[case]
    batch, target = (on_gpu, gpu_target) if device.type == "cuda" else (on_cpu, cpu_target)
    model, num_classes = common.random_model(name, device, side)
    images = torch.rand(batch, 3, side, side, device=device)
    if device.type == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)
    weights = torch.full((num_classes,), 1 / num_classes, device=device)

    def attack(loss: str) -> Any:
        evaluator = Evaluator(model, class_weights=weights, size=batch, fill=device.type == "cpu")
        attacked = common.full_batch(evaluator, batch, side, num_classes, device, [loss])

        def step(count: int) -> None:
            for _ in range(count):
                attacked.step()
                attacked.finished()

        step(1)
        return step

    with exact_float32(), frozen(model):
        bare(model, images, 1)
        attacks = {loss: attack(loss) for loss in LOSSES}
        times: dict[str, list[float]] = {name: [] for name in ("bare", *LOSSES)}
        ratios: dict[str, list[float]] = {loss: [] for loss in LOSSES}
        for number in range(rounds):
            common.progress(f"{case}: round {number + 1} of {rounds}")
            for loss in LOSSES:  # each beside a bare pass of its own: a machine is not equally fast all the time
                base = common.timed(lambda: bare(model, images, steps), device) / steps
                spent = common.timed(lambda step=attacks[loss]: step(steps), device) / steps  # type: ignore[misc]
                times["bare"].append(base)
                times[loss].append(spent)
                ratios[loss].append(spent / base)
        found = {
            "case": case,
            "model": name,
            "image": f"{side}x{side}",
            "batch": batch,
            "milliseconds": {key: common.spread([1000 * value for value in each], 2) for key, each in times.items()},
            "overhead": {loss: common.spread(values) for loss, values in ratios.items()},
            "target": target,
        }
        found["met"] = all(each["median"] <= target for each in found["overhead"].values())
        if profiled:
            before = operators(lambda: bare(model, images, steps), device)
            after = operators(lambda: attacks["mce_bal"](steps), device)
            total = sum(before.values())
            more = {key: (after.get(key, 0) - before.get(key, 0)) / total for key in {*after, *before}}
            found["where"] = [
                {"operator": key, "share_of_bare": round(share, 4)}
                for key, share in sorted(more.items(), key=lambda item: -abs(item[1]))[:10]
            ]
    return found


def operators(function: Any, device: torch.device) -> dict[str, float]:
    """Microseconds of each operator by itself."""
    with profile(activities=[getattr(ProfilerActivity, device.type.upper())]) as profiler:
        common.timed(function, device)
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return {event.key: float(getattr(event, kind)) for event in profiler.key_averages()}


def main() -> None:
    parser: argparse.ArgumentParser = common.arguments(__doc__)
    parser.add_argument("--model", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="tell in which operators the difference lies")
    options = parser.parse_args()
    report = common.machine(options.device) | {
        "rounds": options.rounds,
        "cases": [measure(case, options.device, options.rounds, profiled=options.profile) for case in options.model],
    }
    common.print_table(
        ["case", ">batch", ">bare ms", *(f">{loss} / bare" for loss in LOSSES), ">target", "met"],
        [
            [
                f"{case['model']} {case['image']}", case["batch"], case["milliseconds"]["bare"]["median"],
                *(case["overhead"][loss]["median"] for loss in LOSSES), case["target"], "yes" if case["met"] else "no",
            ]
            for case in report["cases"]
        ],
    )  # fmt: skip
    for case in report["cases"]:
        if "where" in case:
            print(f"{case['case']}: operators of an mce_bal step that a bare pass has less of, as shares of it:")
            common.print_table(["operator", ">share"], [list(row.values()) for row in case["where"]])
    common.write(report, options.out)


if __name__ == "__main__":
    main()
