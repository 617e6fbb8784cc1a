"""Does PIR-AT beat AT? The claim of the paper (Table 3) in small: same model, steps and epochs, another initialisation.

    python benchmarks/pirat.py --json benchmarks/results/pirat.json                     # shapes, an hour on two cores
    python benchmarks/pirat.py --camvid CamVid --json benchmarks/results/pirat.json     # and the photographs of CamVid

Clean training, AT from a clean backbone and PIR-AT from a robust one, the latter two with 2 and 5 steps of PGD. The
backbones are classifiers of 8176 single objects, trained by the recipes of the package. On shapes with few labelled
scenes (512 in 16 epochs, three seeds), as labels are few in segmentation beside those that a backbone has seen; and
with all 4080 in 5 epochs (one seed). Every model is evaluated with sea-v1 on the validation split, on CamVid with 30
iterations in place of 300, and at 4 and 8/255.

Models whose figures are in the file of ``--json`` are not trained again, and what is done is kept in ``--out``: the
same command continues. Prints a table of means and standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import segbench
from segbench.files import write_atomic
from segbench.protocol import SEA_V1
from segbench.training.data import open_data
from segbench.training.initialisation import classifier_file
from segbench.training.loop import train
from segbench.training.recipe import Recipe, load_recipe

VARIANTS = (("clean", 0), ("at", 2), ("at", 5), ("pirat", 2), ("pirat", 5))
CLASSIFIERS = ("clean_classifier_mini_shapes", "robust_classifier_mini_shapes")
NAMES = {"clean": "clean", "at": "AT", "pirat": "PIR-AT"}
ON_CAMVID_ONLY = {"eps": [4, 8], "iterations": 30}


class Schedule(NamedTuple):
    """How much is trained; None for all images, or what the recipe says."""

    images: int | None
    changes: dict[str, str]
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.images or "all")


ON_SHAPES = (
    Schedule(512, {"epochs": "16", "warmup_epochs": "2"}, (0, 1, 2)),
    Schedule(None, {}, (0,)),
)
ON_CAMVID = Schedule(None, {}, (0, 1, 2))


class Job(NamedTuple):
    """One model: trained, then evaluated."""

    dataset: str
    method: str
    steps: int
    seed: int
    schedule: Schedule
    root: Path | None
    out: Path

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.schedule.name}-{self.method}{self.steps or ''}-seed{self.seed}"

    @property
    def recipe(self) -> Recipe:
        """What is trained."""
        changes = {"seed": str(self.seed), **self.schedule.changes}
        if self.steps:
            changes["attack_steps"] = str(self.steps)
        return load_recipe(f"{self.method}_convnext_mini_{self.dataset}", changes)

    @property
    def settings(self) -> dict:
        """Of the evaluation, where it is not the whole protocol."""
        return ON_CAMVID_ONLY if self.dataset == "camvid" else {}


def one_core() -> None:
    torch.set_num_threads(1)


def do_classifier(name: str, runs: Path) -> dict:
    path = classifier_file(name, runs).with_suffix(".json")
    if not path.exists():
        recipe = load_recipe(name)
        train(recipe, open_data(recipe), path.parent, checkpoint_minutes=1, runs=runs)
    report = json.loads(path.read_text())
    keys = ("accuracy", "robust_accuracy", "robust_eps_255", "images")
    return {"id": name, **{key: report[key] for key in keys}, "seconds": report["log"]["seconds"]}


def do(job: Job) -> dict:
    folder = job.out / job.name
    recipe = job.recipe
    card_path = folder / f"{recipe.id}.json"
    if not card_path.exists():
        data = open_data(recipe, job.root)
        few = replace(data.train, image_ids=data.train.image_ids[: job.schedule.images])
        train(recipe, replace(data, train=few), folder, checkpoint_minutes=1, runs=job.out)
    card = json.loads(card_path.read_text())
    result = segbench.evaluate(
        str(card_path), data_root=job.root, out=folder / "evaluation", device="cpu", progress=False, **job.settings
    )
    entry = result.entry()
    scores = {"0": entry["clean"]} | {f"{row['strength']:g}": row for row in entry["results"]}
    return {
        "dataset": job.dataset,
        "schedule": job.schedule.name,
        "training": NAMES[job.method],
        "init": recipe.init,
        "steps": job.steps,
        "images_trained": card["training"]["log"]["images"],
        "epochs": recipe.epochs,
        "seed": job.seed,
        "protocol": entry["protocol"]["name"],
        "iterations": entry["protocol"]["iterations"],
        "images": entry["dataset"]["images"],
        "scores": {eps: {key: round(100 * row[key], 2) for key in ("aacc", "miou")} for eps, row in scores.items()},
        # Forward and backward passes of one image a training image; the seconds are of one core.
        "passes": job.steps + 1,
        "seconds": card["training"]["log"]["seconds"],
    }


def table(rows: list[dict]) -> str:
    """Mean and standard deviation over the seeds, as markdown; and of the differences seed by seed."""
    lines = []
    for dataset, images in dict.fromkeys((row["dataset"], row["images_trained"]) for row in rows):
        own = [row for row in rows if (row["dataset"], row["images_trained"]) == (dataset, images)]
        radii = list(own[0]["scores"])
        heads = ["clean" if eps == "0" else f"{eps}/255" for eps in radii]
        lines.append(f"| {dataset}, {images} images | init | steps | epochs | {' | '.join(heads)} | passes |")
        lines.append("| :-- | :-- | --: | --: |" + " --: |" * (len(radii) + 1))

        def add(shown: list, samples: list[dict], passes: str, sign: str = "") -> None:
            cells = [
                " / ".join(spread([scores[eps][score] for scores in samples], sign) for score in ("aacc", "miou"))
                for eps in radii  # noqa: B023 - used in this turn of the loop only
            ]
            lines.append(f"| {' | '.join([*shown, *cells, passes])} |")

        for key in dict.fromkeys(map(treatment, own)):
            same = [row for row in own if treatment(row) == key]
            training, init, steps, epochs = key
            add([training, init, str(steps or "–"), str(epochs)], [r["scores"] for r in same], str(same[0]["passes"]))
        for steps in sorted({row["steps"] for row in own} - {0}):
            scores = {(row["training"], row["seed"]): row["scores"] for row in own if row["steps"] == steps}
            seeds = [seed for name, seed in scores if name == "AT" and ("PIR-AT", seed) in scores]
            pairs = [(scores["PIR-AT", seed], scores["AT", seed]) for seed in seeds]
            if pairs:
                gains = [{e: {k: ours[e][k] - theirs[e][k] for k in ours[e]} for e in radii} for ours, theirs in pairs]
                add(["PIR-AT − AT", "", str(steps), ""], gains, "", sign="+")
        lines.append("")
    return "\n".join(lines)


def treatment(row: dict) -> tuple:
    """What the models of a line have in common."""
    return tuple(row[key] for key in ("training", "init", "steps", "epochs"))


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation; one seed has no spread."""
    mean = f"{np.mean(values):{sign}.1f}".replace("-", "−")
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


def place(row: dict) -> tuple:
    """Where a row stands in the table."""
    variants = [(NAMES[method], steps) for method, steps in VARIANTS]
    variant = variants.index((row["training"], row["steps"]))
    return row["dataset"] == "camvid", row["images_trained"], variant, row["seed"]


def same_model(row: dict, job: Job) -> bool:
    """Whether a row is the result of a job, as it is today."""
    keys = ("dataset", "schedule", "training", "steps", "seed", "epochs", "iterations")
    iterations = job.settings.get("iterations", SEA_V1.iterations)
    wanted = (job.dataset, job.schedule.name, NAMES[job.method], job.steps, job.seed, job.recipe.epochs, iterations)
    return tuple(row[key] for key in keys) == wanted


def write(path: Path, classifiers: list[dict], rows: list[dict], jobs: int) -> None:
    found = {
        "command": "python benchmarks/pirat.py --camvid CamVid --json benchmarks/results/pirat.json",
        "machine": f"{platform.machine()}, {jobs} models at once, one core each; seconds of a machine with other work",
        "torch": torch.__version__,
        "classifiers": classifiers,
        "rows": rows,
    }
    write_atomic(path, (json.dumps(found, indent=2) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--camvid", type=Path, help="folder of CamVid: train on it, too")
    parser.add_argument("--skip-shapes", action="store_true", help="only --camvid")
    parser.add_argument("--out", type=Path, default=Path("runs/pirat"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models at once, each on one core")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    jobs = []
    if not arguments.skip_shapes:
        jobs += [
            Job("shapes", method, steps, seed, schedule, None, arguments.out)
            for schedule in ON_SHAPES
            for seed in schedule.seeds
            for method, steps in reversed(VARIANTS)  # the long ones first
        ]
    if arguments.camvid:
        jobs += [
            Job("camvid", method, steps, seed, ON_CAMVID, arguments.camvid, arguments.out)
            for seed in ON_CAMVID.seeds
            for method, steps in reversed(VARIANTS)
        ]
    rows = json.loads(arguments.json.read_text())["rows"] if arguments.json and arguments.json.exists() else []
    jobs = [job for job in jobs if not any(same_model(row, job) for row in rows)]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn"), initializer=one_core) as pool:
        needed = [name for name in CLASSIFIERS if not classifier_file(name, arguments.out).exists()]
        print(f"{len(needed)} classifiers to train, then {len(jobs)} models", flush=True)
        classifiers = list(pool.map(do_classifier, CLASSIFIERS, [arguments.out] * len(CLASSIFIERS)))
        for each in classifiers:
            print(each, flush=True)
        started = time.monotonic()
        futures = [pool.submit(do, job) for job in jobs]
        for done, future in enumerate(as_completed(futures), 1):
            rows.append(row := future.result())
            rows.sort(key=place)
            if arguments.json:
                write(arguments.json, classifiers, rows, arguments.jobs)
            minutes = (time.monotonic() - started) / 60
            left = minutes / done * (len(jobs) - done)
            print(f"{done}/{len(jobs)} after {minutes:.0f} min, about {left:.0f} left: {row}", flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
