"""By how much honest results differ: between processors, and between seeds. The protocol's tolerances are above it.

    python benchmarks/reproduction.py --json benchmarks/results/reproduction_cpu.json      # six minutes on two cores

The stored evidence of the shipped entries was computed on another machine; here all their images are attacked again,
with the protocol's seed and with another one. Compared are the accuracy of each image, and the pooled aAcc and mIoU of
random samples of 20 images, as `segbench reproduce` draws them. All values in points (percent of pixels).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path

import common
import numpy as np
import torch

from segbench import evidence, load_dataset
from segbench.content import folder
from segbench.evidence import CHECKS, CLEAN, Evidence
from segbench.protocol import OFFICIAL_RADII_255, SEA_V1

SAMPLES, SIZE = 1000, 20
VALUES = ("largest_image", "pooled_all", "largest_pooled_of_20", "largest_miou_of_20")


def differences(one: Evidence, other: Evidence) -> list[dict]:
    rows = []
    for key, group in one.groups.items():
        if key[1] in CHECKS:
            continue
        before, after = group.counts, other.groups[key].counts
        pixels = before.target.sum(axis=1)
        images = (after.correct - before.correct) / pixels
        draws = np.array([np.random.default_rng(seed).permutation(len(images))[:SIZE] for seed in range(SAMPLES)])
        pooled = (after.correct - before.correct)[draws].sum(axis=1) / pixels[draws].sum(axis=1)
        mious = [abs(after.take(draw).miou() - before.take(draw).miou()) for draw in draws]
        rows.append(
            {
                "eps_255": key[0],
                "attack": key[1],
                "largest_image": round(100 * float(np.abs(images).max()), 3),
                "pooled_all": round(100 * float(after.aacc() - before.aacc()), 3),
                "largest_pooled_of_20": round(100 * float(np.abs(pooled).max()), 3),
                "largest_miou_of_20": round(100 * max(mious), 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    found: dict = {"command": "python benchmarks/reproduction.py"}
    found |= {"machine": f"{platform.machine()}, {torch.get_num_threads()} cores", "torch": torch.__version__}
    for model_id in ("at_convnext_mini_shapes", "clean_convnext_mini_shapes"):
        path = folder("entries") / "sea-v1" / "shapes" / f"{model_id}.parquet"
        stored = evidence.from_bytes(path.read_bytes(), source=path.name)
        here, other = (
            common.attack(model_id, load_dataset("shapes"), OFFICIAL_RADII_255, dataclasses.replace(SEA_V1, seed=seed))
            for seed in (SEA_V1.seed, SEA_V1.seed + 1)
        )
        for name, rows in (("processor", differences(stored, here)), ("seed", differences(here, other))):
            attacks = [row for row in rows if (row["eps_255"], row["attack"]) != CLEAN]
            clean = [row for row in rows if (row["eps_255"], row["attack"]) == CLEAN]
            found[f"{model_id}, {name}"] = {
                "largest_clean_image": clean[0]["largest_image"],
                **{
                    key: max(abs(row[key]) for row in attacks) for key in attacks[0] if key not in ("eps_255", "attack")
                },
                "rows": rows,
            }
    text = json.dumps(found, indent=2)
    for name, each in found.items():
        if isinstance(each, dict) and "rows" in each:
            print(name, {key: value for key, value in each.items() if key != "rows"})
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
