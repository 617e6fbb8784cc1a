"""Seconds from cards, entries and evidence of many models to the finished site, in a process of its own.

    python benchmarks/leaderboard_build.py [--entries 2000] [--out FILE.json]

Each made-up entry takes the counts of every image from one of the two shipped models, at random, so that scores spread
between the two and many ranks are shared. Most of the time goes into the worst cases and the bootstrap, which are
computed again from the counts; `benchmarks/leaderboard_site.py` measures the pages alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import segbench
from segbench import entries, evidence, schemas
from segbench.content import folder
from segbench.counts import Counts
from segbench.evidence import Evidence, Group
from segbench.files import sha256_bytes

MODELS = ("at_convnext_mini_shapes", "clean_convnext_mini_shapes")
TARGET_SECONDS = 20.0


def prepare(root: Path, count: int) -> None:
    """A checkout with ``count`` models, each with card, entry and evidence that belong together."""
    cards, results = root / "model_zoo" / "shapes", root / "entries" / "sea-v1" / "shapes"
    for path in (cards, results):
        path.mkdir(parents=True)
    source = folder("entries") / "sea-v1" / "shapes"
    robust, clean = (evidence.from_bytes((source / f"{name}.parquet").read_bytes(), source=name) for name in MODELS)
    card, entry = segbench.get_card(MODELS[0]).document(), entries.read_entry(source / f"{MODELS[0]}.json")
    for number in range(count):
        rng = np.random.default_rng(number)
        takes = rng.random(entry["dataset"]["images"]) < rng.random()
        groups = {}
        for key, group in robust.groups.items():
            pairs = zip(group.counts, clean.groups[key].counts, strict=True)
            rows = takes[: len(group.image_ids), None]
            groups[key] = Group(group.image_ids, Counts(*(np.where(rows, one, other) for one, other in pairs)))
        found = Evidence(groups, robust.metadata)
        data, model_id = evidence.to_bytes(found), f"synthetic_{number:05d}_shapes"
        scores = entries.recompute(found, seed=0, orders=8)
        made = {
            **entry,
            **scores,
            "model": {**entry["model"], "id": model_id, "title": f"Synthetic {number}"},
            "flags": entries.reliability(found, scores),
            "evidence": {"file": f"{model_id}.parquet", "sha256": sha256_bytes(data)},
        }
        named = {**card, "id": model_id, "title": f"Synthetic {number}", "sources": []}
        (cards / f"{model_id}.json").write_text(schemas.dump(named), "utf-8")
        (results / f"{model_id}.json").write_text(schemas.dump(made), "utf-8")
        (results / f"{model_id}.parquet").write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root, site = Path(name) / "checkout", Path(name) / "site"
        prepare(root, options.entries)
        command = ["leaderboard", "build", "--root", str(root), "--out", str(site)]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "segbench", *command], check=True)
        seconds = time.perf_counter() - started
        files = sum(path.is_file() for path in site.rglob("*"))
    report = {
        "command": f"python benchmarks/leaderboard_build.py --entries {options.entries}",
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "entries": options.entries,
        "images": 32,
        "seconds": round(seconds, 1),
        "target_seconds": TARGET_SECONDS,
        "files": files,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
