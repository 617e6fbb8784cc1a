"""Strength of the attack by precision of its gradients: the same images, against fp32.

    python benchmarks/precision.py --out benchmarks/results/precision_cpu.json      # twelve minutes on two cores

Gradients are computed in the precision; what an attack returns is scored in float32 with TF32 off. Differences are
those of the worst case over the three losses, in points (positive: the precision is a weaker attack), with a paired
percentile bootstrap over images: the same images are drawn for both, and the choice of candidates is held fixed. The
last row of a model is fp32 with another seed of the random starts: what chance alone does.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

import segbench
from segbench.data import SegmentationDataset
from segbench.engine.compute.precision import check_precision
from segbench.ensemble import WorstCase, worst_case
from segbench.errors import UsageError
from segbench.evidence import CHECKS
from segbench.protocol import SEA_V1

SAMPLES, TARGET = 2000, 0.2
OTHER_SEED = "fp32, another seed"


def attacked(model: str, data: SegmentationDataset, precision: str, options: Any) -> tuple[WorstCase, float]:
    """The worst case of a run over the clean image and the losses, and its seconds."""
    protocol = dataclasses.replace(SEA_V1, iterations=options.iterations)
    if precision == OTHER_SEED:
        protocol, precision = dataclasses.replace(protocol, seed=SEA_V1.seed + 1), "fp32"
    started = time.monotonic()
    found = common.attack(model, data, [options.eps], protocol, options.device, precision)
    seconds = time.monotonic() - started
    return worst_case([group.counts for (_, loss), group in found.groups.items() if loss not in CHECKS]), seconds


def difference(base: WorstCase, other: WorstCase) -> dict[str, Any]:
    """``other`` - ``base`` in points with 95% intervals."""
    number = base.aacc_counts.num_images
    rng = np.random.default_rng(0)
    draws = rng.integers(number, size=(SAMPLES, number))
    found: dict[str, Any] = {}
    for name, one, two in (
        ("aacc", base.aacc_counts, other.aacc_counts),
        ("miou", base.miou_counts, other.miou_counts),
    ):
        score = (lambda counts: counts.aacc()) if name == "aacc" else (lambda counts: counts.miou())
        values = [score(two.take(draw)) - score(one.take(draw)) for draw in draws]
        found[name] = round(100 * (score(two) - score(one)), 3)
        found[f"{name}_95"] = [round(100 * float(value), 3) for value in np.percentile(values, [2.5, 97.5])]
    return found


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--models", nargs="+",
        default=["clean_convnext_mini_shapes", "pirat_convnext_mini_shapes", "pirat_vit_mini_shapes"],
    )  # fmt: skip
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--eps", type=float, default=8)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--iterations", type=int, default=SEA_V1.iterations)
    options = parser.parse_args()
    data = segbench.load_dataset(options.dataset, options.data_root).first(options.limit)
    rows = []
    for model in options.models:
        base, base_seconds = None, 0.0
        for precision in ("fp32", "tf32", "bf16", OTHER_SEED):
            row: dict[str, Any] = {"model": model, "precision": precision}
            rows.append(row)
            try:
                if precision != OTHER_SEED:
                    check_precision(precision, options.device)
            except UsageError as error:
                row["note"] = str(error)
                continue
            common.progress(f"{model} in {precision}")
            scores, seconds = attacked(model, data, precision, options)
            row |= {"aacc_percent": round(100 * scores.aacc, 2), "miou_percent": round(100 * scores.miou, 2)}
            row["seconds"] = round(seconds, 1)
            if base is None:
                base, base_seconds = scores, seconds
                continue
            row |= {"difference": difference(base, scores), "speed": round(base_seconds / seconds, 3)}
            row["met"] = all(abs(row["difference"][name]) <= TARGET for name in ("aacc", "miou"))
    report = common.machine(options.device) | {
        "dataset": data.id,
        "images": len(data),
        "eps_255": options.eps,
        "iterations": options.iterations,
        "bootstrap_samples": SAMPLES,
        "target_points": TARGET,
        "rows": rows,
    }
    common.print_table(
        ["model", "precision", ">aAcc", ">mIoU", ">Δ aAcc", ">95%", ">Δ mIoU", ">95%", ">speed", "within 0.2", "note"],
        [_cells(row) for row in rows],
    )
    common.write(report, options.out)


def _cells(row: dict[str, Any]) -> list[Any]:
    cells = [row["model"], row["precision"], row.get("aacc_percent"), row.get("miou_percent")]
    if found := row.get("difference"):
        for name in ("aacc", "miou"):
            low, high = found[f"{name}_95"]
            cells += [f"{found[name]:+.2f}", f"{low:+.2f} to {high:+.2f}"]
        return [*cells, row["speed"], "yes" if row["met"] else "no", None]
    return [*cells, *[None] * 6, row.get("note")]


if __name__ == "__main__":
    main()
