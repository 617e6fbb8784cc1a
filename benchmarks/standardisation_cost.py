"""What a step of sea-v2 costs over a step of sea-v1, of the same model, loss and images.

    python benchmarks/standardisation_cost.py --out benchmarks/results/standardisation_cost_cpu.json      # ten minutes

Both in one process, in turns, one thread, CPU seconds; a ratio is that of two neighbours.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import attack_overhead
import common
import torch

from segbench.attacks.catalogue import LARGEST_MARGIN
from segbench.attacks.evaluator import Evaluator
from segbench.attacks.problem import frozen
from segbench.models.devices import cpu_threads
from segbench.models.float32 import exact_float32

CASES = {"mini": 16, "lraspp": 4, "convnext_t": 1, "tiny_21": 4, "tiny_151": 4}
TARGET = 1.03  # on real backbones


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Ratios of one model."""
    case, batch, device = attack_overhead.CASES[name], CASES[name], torch.device("cpu")
    steps = case.on_cpu[batch][0]
    model, num_classes = common.random_model(case.model, device, case.size)

    def attack(largest_margin: float | None) -> attack_overhead.Attack:
        return attack_overhead.Attack(
            Evaluator(model, size=batch, fill=True),
            lambda evaluator: common.full_batch(
                evaluator, batch, case.size, num_classes, device, ["mce"], largest_margin
            ),
        )

    ratios, milliseconds = list[float](), list[float]()
    with exact_float32(), frozen(model):
        sides = {1: attack(None), 2: attack(LARGEST_MARGIN)}
        for each in sides.values():
            each.prepare(steps)
        for number in range(rounds):
            common.progress(f"{name}: round {number + 1} of {rounds}")
            spent = {}
            for version in sorted(sides, reverse=bool(number % 2)):
                sides[version].prepare(steps)
                spent[version] = common.effort(lambda version=version: sides[version].step(steps), device) / steps
            ratios.append(spent[2] / spent[1])
            milliseconds.append(1000 * spent[1])
    return {
        "case": name,
        "batch": batch,
        "milliseconds_of_sea_v1": common.quartiles(milliseconds, 2),
        "ratio": common.quartiles(ratios),
        "met": statistics.median(ratios) <= TARGET,
    }


def main() -> None:
    parser: argparse.ArgumentParser = common.arguments(__doc__)
    parser.add_argument("--model", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with cpu_threads(1):
        report = common.machine(torch.device("cpu")) | {"rounds": options.rounds, "target": TARGET, "cases": []}
        for name in options.model:
            report["cases"].append(measure(name, options.rounds))
            common.write(report, options.out)
    common.print_table(
        ["case", ">batch", ">sea-v1 ms", ">sea-v2 / sea-v1", ">met"],
        [
            [
                case["case"], case["batch"], case["milliseconds_of_sea_v1"]["median"],
                "{median:.3f} ({min:.2f} to {max:.2f})".format(**case["ratio"]), "yes" if case["met"] else "no",
            ]
            for case in report["cases"]
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
