"""What a forward pass and input gradient of one image cost on a CPU in batches of 1, 2 and 4 images.

    OMP_WAIT_POLICY=passive python benchmarks/cpu_batch.py --out benchmarks/results/cpu_batch_cpu.json  # five minutes

`segbench.engine.compute.batching.cpu_batch` is chosen by this. Batches of each number are computed in turns, forwards
in one round and backwards in the next, with as many threads as a run gives a model at that size: one where images are
small enough for a core each, otherwise two. Seconds are those of the process, on all threads: other programs disturb
them least, and with that policy a thread that waits for another spends none. The gain is that of a batch over single
images of the same round.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import common
import torch

from segbench.attacks.problem import frozen
from segbench.engine.compute.batching import cpu_batch, small_on_cpu
from segbench.models.devices import cpu_threads
from segbench.models.float32 import exact_float32

CPU = torch.device("cpu")
SMALL, MIDDLE, LARGE = ((128, 128), (180, 240)), ((256, 256),), ((473, 473), (512, 512))
# models, sizes, batches, rounds
PLAN: tuple[tuple[str, tuple[common.Size, ...], tuple[int, ...], int], ...] = (
    ("lraspp", SMALL + MIDDLE, (1, 2, 4), 20),
    ("convnext_mini", SMALL + MIDDLE, (1, 2, 4), 20),
    ("lraspp", LARGE, (1, 2, 4), 3),
    ("convnext_mini", LARGE, (1, 2, 4), 3),
    ("convnext_t", SMALL, (1, 2, 4), 3),
    ("convnext_t", LARGE, (1, 2), 3),
)


def measure(name: str, size: common.Size, batches: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """CPU milliseconds per image in batches of each number, and what they gain over single images."""
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    with cpu_threads(1 if small_on_cpu(CPU, *size) else 2), exact_float32():
        model, _ = common.random_model(name, CPU, size)
        images = torch.rand(max(batches), 3, *size)
        with frozen(model):
            for batch in batches:
                common.bare(model, images[:batch])
            for number in range(rounds):
                common.progress(f"{name} {size[0]}x{size[1]}: round {number + 1} of {rounds}")
                for batch in batches if number % 2 == 0 else batches[::-1]:
                    spent = common.effort(lambda batch=batch: common.bare(model, images[:batch]), CPU)
                    seconds[batch].append(spent / batch)
        threads = torch.get_num_threads()
    return {
        "model": name,
        "image": f"{size[0]}x{size[1]}",
        "threads": threads,
        "rounds": rounds,
        "chosen": cpu_batch(*size),
        "batches": [
            {
                "batch": batch,
                "milliseconds_per_image": common.quartiles([1000 * value for value in seconds[batch]], 2),
                "gain": common.quartiles([a / b for a, b in zip(seconds[1], seconds[batch], strict=True)]),
            }
            for batch in batches
        ],
    }


def main() -> None:
    parser: argparse.ArgumentParser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, help="at most so many rounds")
    parser.add_argument("--out", type=common.Path, help="write the report there, as JSON")
    options = parser.parse_args()
    report = common.machine(CPU) | {"omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"), "cases": []}
    for name, sizes, batches, rounds in PLAN:
        for size in sizes:
            report["cases"].append(measure(name, size, batches, min(rounds, options.rounds or rounds)))
            common.write(report, options.out)
    common.print_table(
        ["model", "image", ">threads", ">rounds", ">batch", ">CPU ms per image", ">gain over single images"],
        [
            [
                case["model"], case["image"], case["threads"], case["rounds"], each["batch"],
                *("{median} ({min} to {max})".format(**each[key]) for key in ("milliseconds_per_image", "gain")),
            ]
            for case in report["cases"] for each in case["batches"]
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
