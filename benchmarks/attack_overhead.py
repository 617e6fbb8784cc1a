"""What an attack iteration costs over a bare forward pass and input gradient of the same model.

    python benchmarks/attack_overhead.py --out benchmarks/results/attack_overhead_cpu.json      # twenty minutes
    python benchmarks/attack_overhead.py --docs      # writes the committed results into docs/attacks.md

Both sides see the same model and images of the same size in the same batch, in one process, in turns. Each loss has a
bare measurement of its own beside it, before it in one round and after it in the next; a ratio is that of these
neighbours. On a CPU seconds are those of the process, on one thread: other programs disturb them least. An iteration is
a step of the engine's batch: forward, loss, input gradient, counting of right pixels, step control and projections.
With ``--profile`` the report tells in which operators the difference lies.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from torch.profiler import ProfilerActivity, profile

from segbench.attacks.evaluator import Evaluator
from segbench.attacks.problem import frozen
from segbench.models.devices import cpu_threads
from segbench.models.float32 import exact_float32

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "attack_overhead_cpu.json"
PAGE = ROOT / "docs" / "attacks.md"
MARKS = ("<!-- by benchmarks/attack_overhead.py --docs -->", "<!-- end -->")
LOSSES = ("mce_bal", "mce", "js")
JS_TARGET = 1.05  # of js over mce, in every case


class Case(NamedTuple):
    """A model, its images, and for each batch the steps of one measurement and the target on a CPU."""

    model: str
    size: common.Size
    on_cpu: dict[int, tuple[int, float | None]]
    on_gpu: dict[int, int]


CASES = {
    "mini": Case("convnext_mini", (64, 64), {16: (10, 1.12), 1: (40, None)}, {256: 20, 16: 20}),
    "lraspp": Case("lraspp", (180, 240), {4: (2, 1.05), 1: (5, 1.05)}, {64: 10, 4: 10}),
    "convnext_t": Case("convnext_t", (256, 256), {1: (1, 1.01), 2: (1, 1.01)}, {16: 5, 2: 10}),
    "tiny_21": Case("tiny_21", (128, 128), {4: (20, 1.5), 1: (50, 1.5)}, {64: 20, 4: 20}),
    "tiny_151": Case("tiny_151", (128, 128), {4: (4, 1.5), 1: (16, 1.5)}, {64: 20, 4: 20}),
}


class Attack:
    """A full batch under attack by one loss; begun anew before its images are finished."""

    def __init__(self, evaluator: Evaluator, begin: Callable[[Evaluator], common.AttackBatch]) -> None:
        self.evaluator, self.begin = evaluator, begin
        self.done = common.ITERATIONS

    def prepare(self, steps: int) -> None:
        """Sees that so many steps and one more are left; the first step of a batch is done here."""
        if self.done + steps >= common.ITERATIONS:
            self.batch, self.done = self.begin(self.evaluator), 0
            self.step(1)

    def step(self, steps: int) -> None:
        """So many steps of the whole batch."""
        for _ in range(steps):
            self.batch.step()
            if self.batch.finished():
                raise RuntimeError("An image was finished early: the steps that follow would be of fewer images.")
        self.done += steps


def measure(name: str, batch: int, device: torch.device, rounds: int, *, profiled: bool) -> dict[str, Any]:
    """Milliseconds of a step and ratios of one model and batch."""
    case = CASES[name]
    steps, target = (case.on_gpu[batch], None) if device.type == "cuda" else case.on_cpu[batch]
    model, num_classes = common.random_model(case.model, device, case.size)
    images = torch.rand(batch, 3, *case.size, device=device)
    if device.type == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)
    weights = torch.full((num_classes,), 1 / num_classes, device=device)
    times: dict[str, list[float]] = {key: [] for key in ("bare", *LOSSES)}
    ratios: dict[str, list[float]] = {loss: [] for loss in LOSSES}

    def attack(loss: str) -> Attack:
        return Attack(
            Evaluator(model, class_weights=weights, size=batch, fill=device.type == "cpu"),
            lambda evaluator: common.full_batch(evaluator, batch, case.size, num_classes, device, [loss]),
        )

    with exact_float32(), frozen(model):
        attacks = {loss: attack(loss) for loss in LOSSES}
        for each in attacks.values():
            each.prepare(steps)
        common.bare(model, images)
        for number in range(rounds):
            common.progress(f"{name}, batch of {batch}: round {number + 1} of {rounds}")
            forwards = number % 2 == 0
            for loss in LOSSES if forwards else LOSSES[::-1]:
                attacks[loss].prepare(steps)
                sides = {
                    "bare": lambda: common.bare(model, images, steps),
                    loss: lambda loss=loss: attacks[loss].step(steps),
                }
                spent = {
                    key: common.effort(sides[key], device) / steps for key in (sides if forwards else reversed(sides))
                }
                times["bare"].append(spent["bare"])
                times[loss].append(spent[loss])
                ratios[loss].append(spent[loss] / spent["bare"])
        js_over_mce = [js / mce for js, mce in zip(times["js"], times["mce"], strict=True)]
        found: dict[str, Any] = {
            "case": name,
            "model": case.model,
            "image": f"{case.size[0]}x{case.size[1]}",
            "classes": num_classes,
            "batch": batch,
            "steps_of_a_measurement": steps,
            "milliseconds": {key: common.quartiles([1000 * v for v in each], 2) for key, each in times.items()},
            "overhead": {loss: common.quartiles(values) for loss, values in ratios.items()},
            "js_over_mce": common.quartiles(js_over_mce),
            "target": target,
            "met": statistics.median(js_over_mce) <= JS_TARGET
            and (target is None or all(statistics.median(values) <= target for values in ratios.values())),
        }
        if profiled:
            attacks["mce_bal"].prepare(steps)
            found["where"] = difference(
                operators(lambda: common.bare(model, images, steps), device),
                operators(lambda: attacks["mce_bal"].step(steps), device),
            )
    return found


def difference(before: dict[str, float], after: dict[str, float]) -> list[dict[str, Any]]:
    """The ten operators whose time differs most, as shares of all time before."""
    total = sum(before.values())
    more = {key: (after.get(key, 0) - before.get(key, 0)) / total for key in {*after, *before}}
    most = sorted(more.items(), key=lambda item: -abs(item[1]))[:10]
    return [{"operator": key, "share_of_bare": round(share, 4)} for key, share in most]


def operators(function: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Microseconds of each operator by itself."""
    with profile(activities=[getattr(ProfilerActivity, device.type.upper())]) as profiler:
        common.timed(function, device)
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return {event.key: float(getattr(event, kind)) for event in profiler.key_averages()}


def table(report: dict[str, Any]) -> str:
    """The ratios of every case as markdown, median (smallest to largest)."""
    return common.markdown(
        ["model", "image", ">classes", ">batch", ">bare ms", *(f">{loss}" for loss in LOSSES), ">js / mce",
         ">target", "met"],
        [
            [
                case["model"], case["image"], case["classes"], case["batch"], case["milliseconds"]["bare"]["median"],
                *("{median:.3f} ({min:.2f} to {max:.2f})".format(**case["overhead"][loss]) for loss in LOSSES),
                "{median:.3f} ({min:.2f} to {max:.2f})".format(**case["js_over_mce"]),
                case["target"], "yes" if case["met"] else "no",
            ]
            for case in report["cases"]
        ],
    )  # fmt: skip


def section(report: dict[str, Any]) -> str:
    """What docs/attacks.md shows: the table, and on what it was measured."""
    return (
        f"{table(report)}\n\nMedians of {report['rounds']} rounds (smallest to largest). {report['processor']}, "
        f"{report['threads']} thread{'s' * (report['threads'] > 1)}, torch {report['versions']['torch']}, "
        f"{report['date']}."
    )


def main() -> None:
    parser: argparse.ArgumentParser = common.arguments(__doc__)
    parser.add_argument("--model", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--profile", action="store_true", help="tell in which operators the difference lies")
    parser.add_argument("--docs", action="store_true", help="only write the committed results into docs/attacks.md")
    options = parser.parse_args()
    if options.docs:
        common.write_docs(PAGE, MARKS, section(json.loads(RESULTS.read_text("utf-8"))))
        return
    with cpu_threads(options.threads):
        report = common.machine(options.device) | {"rounds": options.rounds, "js_target": JS_TARGET, "cases": []}
        for name in options.model:
            for batch in CASES[name].on_gpu if options.device.type == "cuda" else CASES[name].on_cpu:
                report["cases"].append(measure(name, batch, options.device, options.rounds, profiled=options.profile))
                common.write(report, options.out)  # after each: ConvNeXt-T takes minutes
    print(f"\n{table(report)}\n\nMet: every loss at most the target, and js at most {JS_TARGET} of mce.\n")
    for case in report["cases"]:
        if "where" in case:
            print(f"{case['case']}, batch of {case['batch']}: operators whose time differs most, as shares of a pass:")
            common.print_table(["operator", ">share"], [list(row.values()) for row in case["where"]])


if __name__ == "__main__":
    main()
