"""The processes of ``torchrun``, each with its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from segbench.errors import UsageError

PATIENCE = timedelta(hours=2)  # of processes that wait while the first one scores held-out images


@dataclass(frozen=True)
class Processes:
    """One process among those that train together.

    Attributes:
        device: of the process.
        rank: of the process; 0 writes files.
        world: number of processes.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sums over all processes. Every process must call it."""
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        found: list[float] = numbers.tolist()
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that ``torchrun`` started; only this one if it was not used.

    Args:
        device: ``cuda`` without a number becomes the device of this process's local rank.

    Raises:
        UsageError: more processes on this machine than it has devices.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(device)
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"Process {local} of this machine has no GPU: there are {torch.cuda.device_count()}. "
                "torchrun --nproc-per-node takes that number at most."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(device, rank, world)
    finally:
        dist.destroy_process_group()
