"""The locks of a run directory: one process per shard, and one at a time that changes ``run.json`` or merges.

They are files in ``workers/``. A shard is claimed before anything else is written, so that a process which is refused
has changed nothing. A file system without locks costs a warning and perhaps duplicate work, never a wrong result: the
first writer of a unit wins (`segbench.engine.rundir.store`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from segbench.engine.rundir.workers import (
    Heartbeat,
    lock_file,
    manifest_lock_file,
    merge_lock_file,
    read_worker,
    worker_file,
)
from segbench.errors import IncompleteError, RunError
from segbench.files import make_folder

MANIFEST_SECONDS = 60.0  # to wait for the lock of run.json, which is held for milliseconds
MERGE_SECONDS = 3600.0  # to wait for another merge


@contextmanager
def claim_shard(run: Path, shard: str, device: str) -> Iterator[Heartbeat]:
    """Locks a shard of a run directory for this process, and shows what it does; RunError if another one has it."""
    heartbeat = Heartbeat(run, shard, device)
    lock = _lock_shard(run, shard)
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


@contextmanager
def lock_manifest(run: Path) -> Iterator[None]:
    """Only one process at a time: what it reads in ``run.json`` still holds when it writes the file."""
    with _one_at_a_time(
        manifest_lock_file(run), MANIFEST_SECONDS, "Start no other process with other radii or attacks meanwhile"
    ):
        yield


@contextmanager
def lock_merge(run: Path) -> Iterator[None]:
    """Only one process at a time: the last one that merges has seen all that was there, and both files are of one."""
    with _one_at_a_time(merge_lock_file(run), MERGE_SECONDS, "Start no other merge of this run meanwhile"):
        yield


@contextmanager
def _one_at_a_time(path: Path, seconds: float, otherwise: str) -> Iterator[None]:
    run = path.parent.parent
    try:
        lock = _acquire(path, seconds, otherwise)
    except Timeout as error:
        raise RunError(
            f"{path} has been locked by another process for {seconds:.0f} seconds. Nothing was changed. See who works "
            f"there with `segbench status {run}`, and run the same command again."
        ) from error
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _lock_shard(run: Path, shard: str) -> FileLock | None:
    try:
        return _acquire(
            lock_file(run, shard), 0, "Take care that no other process does this shard: it would do the same again"
        )
    except Timeout as error:
        owner = read_worker(worker_file(run, shard))
        other = f"process {owner.pid} on {owner.host}" if owner else "another process"
        what = "it" if shard == "1/1" else f"shard {shard} of it"
        raise RunError(
            f"{run} is in use: {other} is doing {what}. Nothing was changed. See `segbench status {run}`; wait for its "
            "end, or divide the work with --shard 1/2 and --shard 2/2."
        ) from error


def _acquire(path: Path, seconds: float, otherwise: str) -> FileLock | None:
    """The lock, acquired; None, after a warning, where there are no locks. Timeout if another process has it."""
    lock = FileLock(path)
    try:
        make_folder(path.parent)
        lock.acquire(timeout=seconds)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        logging.getLogger("segbench").warning("%s cannot be locked (%s). %s.", path, error, otherwise)
        return None
    return lock
