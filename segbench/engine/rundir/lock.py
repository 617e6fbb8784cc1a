"""The lock of a run directory: one process per shard, held on ``workers/<shard>.lock``.

A file system without locks costs a warning and perhaps duplicate work, never a wrong result: the first writer of a
unit wins (`segbench.engine.rundir.store`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from segbench.engine.rundir.workers import Heartbeat, lock_file, read_worker, worker_file
from segbench.errors import IncompleteError, RunError


@contextmanager
def claim_shard(run: Path, shard: str, device: str) -> Iterator[Heartbeat]:
    """Locks a shard of a run directory for this process, and shows what it does; RunError if another one has it."""
    heartbeat = Heartbeat(run, shard, device)
    lock = _lock(run, shard)
    heartbeat.start()
    state, error = "stopped", None
    try:
        yield heartbeat
        state = "done"
    except IncompleteError:
        raise
    except Exception as failure:
        state, error = "failed", f"{type(failure).__name__}: {failure}"[:2000]
        raise
    finally:
        heartbeat.stop(state, error)
        if lock is not None:
            lock.release()


def _lock(run: Path, shard: str) -> FileLock | None:
    path = lock_file(run, shard)
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        owner = read_worker(worker_file(run, shard))
        other = f"process {owner.pid} on {owner.host}" if owner else "another process"
        what = "it" if shard == "1/1" else f"shard {shard} of it"
        raise RunError(
            f"{run} is in use: {other} is doing {what}. Nothing was changed. See `segbench status {run}`; wait for its "
            "end, or divide the work with --shard 1/2 and --shard 2/2."
        ) from error
    except (OSError, NotImplementedError) as error:
        logging.getLogger("segbench").warning(
            "%s cannot be locked (%s). Take care that no other process does this shard: it would do the same again.",
            path,
            error,
        )
        return None
    return lock
