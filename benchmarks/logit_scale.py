"""What a model gains by another output in the same order: logits times a constant, sigmoid, unit length, ...

    python benchmarks/logit_scale.py --out benchmarks/results/logit_scale.json      # an hour and a half on two cores
    python benchmarks/logit_scale.py --docs      # writes the committed results into docs/attacks.md

No row changes a prediction of its model: a difference from the first row is a fault of the attack. Each is a whole
evaluation at 8/255 on 16 images of shapes, 300 iterations, with its reliability checks. What is in the file of
``--out`` is not measured again: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

import segbench

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "logit_scale.json"
PAGE = ROOT / "docs" / "attacks.md"
MARKS = ("<!-- by benchmarks/logit_scale.py --docs -->", "<!-- end of logit_scale -->")
MODELS = (
    "pirat_convnext_mini_shapes", "clean_convnext_mini_shapes", "at_convnext_mini_shapes", "pirat_vit_mini_shapes",
)  # fmt: skip
PROTOCOLS = ("sea-v1", "sea-v2")
EPS_255, IMAGES = 8, 16


def _min_max(u: Tensor) -> Tensor:
    low, high = u.amin(dim=1, keepdim=True), u.amax(dim=1, keepdim=True)
    return (u - low) / (high - low)


OUTPUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda u: u,
    "x 0.01": lambda u: 0.01 * u,
    "x 30": lambda u: 30 * u,
    "x 0.0001": lambda u: 0.0001 * u,
    "x 1000": lambda u: 1000 * u,
    "unit length": lambda u: u / u.norm(dim=1, keepdim=True),
    "min-max": _min_max,
    "sigmoid": torch.sigmoid,
    "softmax": lambda u: u.softmax(dim=1),
    "tanh": torch.tanh,
}


class Output(nn.Module):
    """A model of the zoo with another output."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, images: Tensor) -> Tensor:
        return OUTPUTS[self.output](self.model(images))


def measure(model_id: str, output: str, protocol: str, iterations: int | None) -> dict[str, Any]:
    """Scores in percent and the names of the checks that fail."""
    with tempfile.TemporaryDirectory() as folder:
        entry = segbench.evaluate(
            Output(segbench.load_model(model_id), output), "shapes", EPS_255, protocol, out=Path(folder) / "run",
            limit=IMAGES, iterations=iterations, device="cpu", progress=False,
        ).entry()  # fmt: skip
    (row,) = entry["results"]

    def percent(scores: Mapping[str, Any]) -> dict[str, float]:
        return {metric: round(100 * scores[metric], 2) for metric in ("aacc", "miou")}

    return {
        "model": model_id,
        "output": output,
        "protocol": protocol,
        "iterations": entry["protocol"]["iterations"],
        "clean": percent(entry["clean"]),
        "worst_case": percent(row),
        "per_loss": {loss: percent(scores) for loss, scores in row["per_loss"].items()},
        "failed": [flag["name"] for flag in entry["flags"] if flag["level"] == "warning"],
        "seconds": entry["run"]["seconds"],
    }


def table(report: Mapping[str, Any]) -> str:
    """Worst case aAcc / mIoU of each model and output under both protocols."""
    found = {(row["model"], row["output"], row["protocol"]): row for row in report["rows"]}
    lines = []
    for model in MODELS:
        for output in OUTPUTS:
            rows = [found.get((model, output, protocol)) for protocol in PROTOCOLS]
            if not any(rows):
                continue
            failed = sorted({name for row in rows if row for name in row["failed"]})
            scores = ["{aacc:.1f} / {miou:.1f}".format(**row["worst_case"]) if row else "–" for row in rows]
            lines.append([model, output, *scores, ", ".join(failed) or "none"])
    return common.markdown(["model", "output", *(f">{name}" for name in PROTOCOLS), "failed checks"], lines)


def main() -> None:
    parser: argparse.ArgumentParser = common.arguments(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--iterations", type=int, help="in place of those of the protocol")
    parser.add_argument("--docs", action="store_true", help="only write the committed results into docs/attacks.md")
    options = parser.parse_args()
    if options.docs:
        common.write_docs(PAGE, MARKS, table(json.loads(RESULTS.read_text("utf-8"))))
        return
    report: dict[str, Any] = common.machine(torch.device("cpu")) | {"eps_255": EPS_255, "images": IMAGES, "rows": []}
    if options.out and options.out.exists():
        report["rows"] = json.loads(options.out.read_text("utf-8"))["rows"]
    done = {(row["model"], row["output"], row["protocol"]) for row in report["rows"]}
    for model in options.model:
        for output in OUTPUTS:
            for protocol in PROTOCOLS:
                if (model, output, protocol) not in done:
                    common.progress(f"{model}, {output}, {protocol}")
                    report["rows"].append(measure(model, output, protocol, options.iterations))
                    common.write(report, options.out)
    print(f"\n{table(report)}\n\nWorst case aAcc / mIoU in percent at {EPS_255}/255, {IMAGES} images.")


if __name__ == "__main__":
    main()
