"""How the same run becomes faster with a second worker: shards in one folder, and actors of Ray.

    python benchmarks/scaling.py --out benchmarks/results/scaling_cpu.json      # six minutes on two cores

Each worker has one core. Counted is the wall time of the run from the command on, with the start of the processes and
the loading of the model; for Ray with the cluster already there. The evidence of all runs must have the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch

import segbench

MODEL = "pirat_convnext_mini_shapes"


def shards(count: int, folder: Path, options: Any) -> float:
    """Seconds of a run divided among processes."""
    command = [
        sys.executable, "-m", "segbench", "evaluate", "--model", MODEL, "--eps", "8", "--iterations",
        str(options.iterations), "--device", str(options.device), "--out", str(folder), "--quiet",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [*command, "--shard", f"{number + 1}/{count}"], env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in range(count)
    ]  # fmt: skip
    codes = [process.wait() for process in processes]
    if not set(codes) <= {0, 3} or 0 not in codes:
        raise SystemExit(f"The shards ended with {codes}.")
    return time.monotonic() - started


def actors(count: int, folder: Path, options: Any) -> float:
    """Seconds of a run on actors of a cluster that is there already."""
    started = time.monotonic()
    segbench.evaluate(
        MODEL, eps=8, iterations=options.iterations, device=str(options.device), out=folder, engine="ray",
        workers=count, progress=False,
    )  # fmt: skip
    return time.monotonic() - started


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    import ray

    ray.init(num_cpus=max(options.workers), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    torch.set_num_threads(1)
    found: dict[tuple[str, int], list[float]] = {}
    hashes = set()
    for number in range(options.rounds):
        for engine, run in (("shards", shards), ("ray", actors)):
            for workers in options.workers:
                common.progress(f"round {number + 1} of {options.rounds}: {engine}, {workers} workers")
                with tempfile.TemporaryDirectory() as folder:
                    found.setdefault((engine, workers), []).append(run(workers, Path(folder), options))
                    (evidence,) = Path(folder).glob("*.parquet")
                    hashes.add(hashlib.sha256(evidence.read_bytes()).hexdigest())
    ray.shutdown()
    rows = []
    for (engine, workers), seconds in found.items():
        base = found[engine, options.workers[0]]
        speed_up = [one / many for one, many in zip(base, seconds, strict=True)]
        rows.append(
            {
                "engine": engine,
                "workers": workers,
                "seconds": common.spread(seconds, 1),
                "speed_up": common.spread(speed_up),
                "efficiency": round(common.spread(speed_up)["median"] * options.workers[0] / workers, 3),
            }
        )
    report = common.machine(options.device) | {
        "model": MODEL,
        "iterations": options.iterations,
        "same_evidence_bytes": len(hashes) == 1,
        "rows": rows,
    }
    common.print_table(
        ["engine", ">workers", ">seconds", ">speed-up", ">efficiency"],
        [
            [row["engine"], row["workers"], row["seconds"]["median"], row["speed_up"]["median"], row["efficiency"]]
            for row in rows
        ],
    )
    print(f"Evidence of all {sum(map(len, found.values()))} runs has the same bytes: {report['same_evidence_bytes']}")
    common.write(report, options.out)


if __name__ == "__main__":
    main()
