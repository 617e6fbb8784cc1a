"""Which shard of a run this process runs, and on which device: as asked, or as torchrun or SLURM say."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from segbench.errors import UsageError
from segbench.models.devices import choose_compute_device


def parse_shard(shard: str | None) -> tuple[int, int]:
    """``"3/16"`` to (3, 16); None to (1, 1)."""
    if shard is None:
        return 1, 1
    number, _, total = shard.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise UsageError(f"A shard is written 3/16 (the third of sixteen), not {shard!r}.")
    return int(number), int(total)


def launcher_shard(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The shard that the launcher of this process says; (1, 1) without one.

    Under torchrun its rank. Under SLURM the element of an array, counted from the first one in the array's steps, and
    in it the task of srun.
    """
    if torchrun := _position(environment, "RANK", "WORLD_SIZE"):
        position, total = torchrun
    else:
        element, elements = _position(environment, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT") or (0, 1)
        task, tasks = _position(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS") or (0, 1)
        position, total = element * tasks + task, elements * tasks
    return position + 1, total


def _position(environment: Mapping[str, str], name: str, size: str) -> tuple[int, int] | None:
    """Which of how many, from 0; None if it is not said."""
    if name not in environment or size not in environment:
        return None
    try:
        position, total = int(environment[name]), int(environment[size])
        if name == "SLURM_ARRAY_TASK_ID":
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
            position = (position - first) // int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
    except ValueError:
        position, total = -1, 0
    if not 0 <= position < total:
        raise UsageError(
            f"{name}={environment[name]} and {size}={environment[size]} do not tell a shard. Say it yourself: "
            "--shard 1/1 for everything."
        )
    return position, total


def process_device(name: str, environment: Mapping[str, str] = os.environ) -> torch.device:
    """The device of that name; under torchrun ``auto`` and ``cuda`` are the GPU of this process."""
    device = choose_compute_device(name)
    if device.type == "cuda" and device.index is None and environment.get("LOCAL_RANK", "").isdecimal():
        return torch.device("cuda", int(environment["LOCAL_RANK"]) % torch.cuda.device_count())
    return device
