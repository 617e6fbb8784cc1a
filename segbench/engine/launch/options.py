"""How a run is computed."""

from __future__ import annotations

from typing import NamedTuple

from segbench.engine.launch.shards import launcher_shard, parse_shard
from segbench.errors import UsageError

ENGINES = ("local", "ray")


class RunOptions(NamedTuple):
    """How a run is computed: options of `segbench.evaluate`. Only ``precision`` is part of the run's identity."""

    device: str = "auto"
    batch_size: int | str = "auto"
    precision: str = "fp32"
    shard: str | None = None
    engine: str = "local"
    progress: bool = True
    offline: bool = False
    compile: bool = False
    workers: int | None = None
    gpus_per_worker: float | None = None

    def shard_number(self) -> tuple[int, int]:
        """Which shard of the units this process runs, from 1, and of how many."""
        return parse_shard(self.shard) if self.shard else launcher_shard()

    def fixed_batch_size(self) -> int | None:
        """The batch size; None for ``auto``."""
        if self.batch_size == "auto":
            return None
        if not str(self.batch_size).isdecimal() or int(self.batch_size) < 1:
            raise UsageError(f"batch_size must be 'auto' or a whole number from 1, not {self.batch_size!r}.")
        return int(self.batch_size)
