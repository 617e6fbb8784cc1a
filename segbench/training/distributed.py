"""The processes of ``torchrun``, each with its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from segbench.errors import UsageError

PATIENCE = timedelta(hours=2)  # of processes that wait while the first one scores held-out images
# The variables of torchrun, and what holds where one is not set.
VARIABLES = {"WORLD_SIZE": "1", "RANK": "", "LOCAL_RANK": "0", "MASTER_PORT": "", "MASTER_ADDR": ""}


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
        UsageError: more processes on this machine than it has devices; or only some of the variables of torchrun.
    """
    world, rank, local = _given()
    if world == 1:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield Processes(device)
        return
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


def _given() -> tuple[int, int, int]:
    """The number of processes, the rank of this one, and the rank on its machine, from the environment."""
    given = {name: os.environ.get(name, default) for name, default in VARIABLES.items()}
    *numbers, address = given.values()
    world, rank, local, port = (int(text) if text.isdecimal() else -1 for text in numbers)
    if world != 1 and not (0 <= rank < world and local >= 0 and port >= 0 and address):
        found = ", ".join(f"{name}={text or '(not set)'}" for name, text in given.items())
        raise UsageError(
            f"The variables that torchrun sets are incomplete or wrong: {found}. "
            "Start several processes with: torchrun --nproc-per-node 2 -m segbench train RECIPE\n"
            "For a single process: unset WORLD_SIZE"
        )
    return world, rank, local
