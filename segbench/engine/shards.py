"""Which part of a run this process does: as asked, or as torchrun or SLURM say."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from segbench.errors import UsageError
from segbench.models.load import choose_device

# Variables that say which process this is, and of how many; the first pair that is set counts.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),  # torchrun
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),  # sbatch --array
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # srun
)


def parse_shard(shard: str | None) -> tuple[int, int]:
    """``"3/16"`` to (3, 16); None to (1, 1).

    Raises:
        UsageError: not of that form, or out of range.
    """
    if shard is None:
        return 1, 1
    number, _, total = shard.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise UsageError(f"A shard is written 3/16 (the third of sixteen), not {shard!r}.")
    return int(number), int(total)


def own_shard(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The shard that the launcher of this process says; (1, 1) without one.

    The elements of a SLURM array are counted from its first one, whatever number that has, in its steps.

    Raises:
        UsageError: the variables contradict each other.
    """
    for rank, world in LAUNCHERS:
        if rank not in environment or world not in environment:
            continue
        try:
            position, total = int(environment[rank]), int(environment[world])
            if rank == "SLURM_ARRAY_TASK_ID":
                step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
                position = (position - int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))) // step
        except ValueError:
            position, total = -1, 0
        if not 0 <= position < total:
            raise UsageError(
                f"{rank}={environment[rank]} and {world}={environment[world]} do not tell a shard. Say it yourself: "
                "--shard 1/1 for everything."
            )
        return position + 1, total
    return 1, 1


def own_device(name: str, environment: Mapping[str, str] = os.environ) -> torch.device:
    """The device of that name; under torchrun ``auto`` and ``cuda`` are the GPU of this process."""
    device = choose_device(name)
    if device.type == "cuda" and device.index is None and environment.get("LOCAL_RANK", "").isdecimal():
        return torch.device("cuda", int(environment["LOCAL_RANK"]) % torch.cuda.device_count())
    return device
