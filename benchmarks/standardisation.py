"""How strong the losses of SEA are on differently scaled logits: the question that the rule of sea-v2 answers.

    python benchmarks/standardisation.py --out benchmarks/results/standardisation.json

Each loss attacks the first 32 training images of shapes with 100 iterations, so that nothing is tuned on images that
are reported. ``x 12/margin`` multiplies by one number for the model, which gives the logits of 16 images a median
margin of 12; ``top, m`` divides the centred logits of a pixel by the largest one, ``std, m`` by their standard
deviation (`segbench.attacks.standardise`). What is in the file of ``--out`` is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import common
import torch
from torch import Tensor, nn

import segbench
from segbench import counts
from segbench.attacks.catalogue import get_attack, perform
from segbench.ensemble import worst_case
from segbench.models.devices import cpu_threads
from segbench.models.float32 import exact_float32
from segbench.protocol import SEA_V1

CASES = {"pirat_convnext_mini_shapes": 8, "clean_convnext_mini_shapes": 8, "pirat_vit_mini_shapes": 8}
IMAGES, FOR_MARGIN, ITERATIONS, BATCH = 32, 16, 100, 16
RULES = ("logits", "x 12/margin", "top, 12", "std, 10", "std, 20", "std, 40")


class Scaled(nn.Module):
    """A model with scaled logits, differentiated through."""

    def __init__(self, model: nn.Module, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scale(self.model(images))


def by_largest(u: Tensor, m: float) -> Tensor:
    """Centred logits, the largest of each pixel m."""
    centred = u - u.mean(dim=1, keepdim=True)
    return m * centred / centred.amax(dim=1, keepdim=True)


def median_margin(model: nn.Module, images: Tensor) -> float:
    """Of the largest logit above the second one, over all pixels."""
    with torch.no_grad():
        largest = model(images).topk(2, dim=1).values
    return float((largest[:, 0] - largest[:, 1]).median())


def attacked(model: nn.Module, rule: str, margin: float) -> tuple[nn.Module, float | None]:
    """The model under attack, and the largest margin of its standardised logits."""
    kind, _, number = rule.partition(", ")
    if kind == "std":
        return model, float(number)
    if kind == "top":
        return Scaled(model, lambda u: by_largest(u, float(number))), None
    return (model if rule == "logits" else Scaled(model, lambda u: u * (12 / margin))), None


def measure(model_id: str, eps_255: float, rule: str) -> dict[str, Any]:
    """Scores of each loss alone and of the three with the clean images."""
    data = segbench.load_dataset("shapes", split="train").first(IMAGES)
    images, labels = (torch.stack([getattr(sample, name) for sample in data]) for name in ("image", "label"))
    model = segbench.load_model(model_id)
    target, largest_margin = attacked(model, rule, median_margin(model, images[:FOR_MARGIN]))
    with torch.no_grad():
        clean = torch.cat([model(part) for part in images.split(BATCH)]).argmax(dim=1)
    candidates = {"clean": counts.count(clean.numpy(), labels.numpy(), data.num_classes)}
    for loss in SEA_V1.losses:
        attack = replace(get_attack(loss, ITERATIONS), largest_margin=largest_margin)
        predictions = []
        for start in range(0, IMAGES, BATCH):
            rows = slice(start, start + BATCH)
            seeds = [[SEA_V1.start_seed(image_id, loss, eps_255)] for image_id in data.image_ids[rows]]
            found = perform(
                attack, target, images[rows], labels[rows], eps_255=eps_255, seeds=seeds,
                class_weights=data.class_weights(),
            )  # fmt: skip
            with torch.no_grad():
                predictions.append(model(found.adversarial).argmax(dim=1))
        candidates[loss] = counts.count(torch.cat(predictions).numpy(), labels.numpy(), data.num_classes)
    worst = worst_case(list(candidates.values()))
    return {
        "model": model_id,
        "eps_255": eps_255,
        "rule": rule,
        "worst_case": [round(100 * worst.aacc, 2), round(100 * worst.miou, 2)],
        **{
            name: [round(100 * each.aacc(), 2), round(100 * each.miou(), 2)]
            for name, each in candidates.items()
        },
    }  # fmt: skip


def table(report: Mapping[str, Any]) -> str:
    """aAcc / mIoU in percent."""
    columns = ["model", ">ε", "logits", ">worst case", *(f">{loss}" for loss in SEA_V1.losses)]
    rows = sorted(report["rows"], key=lambda row: (list(CASES).index(row["model"]), RULES.index(row["rule"])))
    lines = []
    for row in rows:
        scores = ["{:.1f} / {:.1f}".format(*row[name]) for name in ("worst_case", *SEA_V1.losses)]
        lines.append([row["model"], f"{row['eps_255']}/255", row["rule"], *scores])
    return common.markdown(columns, lines)


def main() -> None:
    parser: argparse.ArgumentParser = common.arguments(__doc__)
    options = parser.parse_args()
    report: dict[str, Any] = common.machine(torch.device("cpu")) | {"rows": []}
    if options.out and options.out.exists():
        report["rows"] = json.loads(options.out.read_text("utf-8"))["rows"]
    done = {(row["model"], row["rule"]) for row in report["rows"]}
    with exact_float32(), cpu_threads(1):
        for model_id, eps_255 in CASES.items():
            for rule in RULES:
                if (model_id, rule) not in done:
                    common.progress(f"{model_id}, {rule}")
                    report["rows"].append(measure(model_id, eps_255, rule))
                    common.write(report, options.out)
    print(f"\n{table(report)}\n")


if __name__ == "__main__":
    main()
