"""Who works in a run directory: one file for each shard, so that `segbench status` can tell, and none is done twice.

``workers/3-of-16.json`` says which process does the shard, what it does, and how it ended; it is written anew every
few seconds while the process lives. ``workers/3-of-16.lock`` is locked by it. Nothing here is part of a result: a file
system without locks, or a clock that is wrong, costs a warning or a wrong word in `status`, no evidence.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from segbench.errors import IncompleteError, RunError
from segbench.files import write_atomic

BEAT_SECONDS = 15.0
LOST_SECONDS = 90.0  # without a beat, after which a process is taken for dead
STATES = ("running", "done", "stopped", "failed")


class Present(NamedTuple):
    """What ``workers/<shard>.json`` says.

    Attributes:
        shard: ``3/16``.
        host, pid: of the process.
        device: where it computes.
        state: ``running``, ``done``, ``stopped`` (a signal), ``failed``, or ``lost``: it says running, but is silent.
        units: that it is doing.
        error: why it failed.
        seconds: since its last word.
    """

    shard: str
    host: str
    pid: int
    device: str
    state: str
    units: tuple[str, ...]
    error: str | None
    seconds: float


def file_name(shard: str) -> str:
    """``3/16`` as a part of a file's name.

    >>> file_name("3/16")
    '3-of-16'
    """
    return shard.replace("/", "-of-")


class Presence:
    """Tells what this process does in a run directory; several threads may."""

    def __init__(self, run: Path, shard: str, device: str) -> None:
        self.path = run / "workers" / f"{file_name(shard)}.json"
        self._about = {"shard": shard, "host": socket.gethostname(), "pid": os.getpid(), "device": device}
        self._units: set[str] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def begin(self, unit: str) -> None:
        with self._lock:
            self._units.add(unit)

    def end(self, unit: str) -> None:
        with self._lock:
            self._units.discard(unit)

    def tell(self, state: str, error: str | None = None) -> None:
        """Writes the file; that it cannot be written is no reason to end a run."""
        with self._lock:
            document = {**self._about, "state": state, "units": sorted(self._units), "error": error}
        try:
            write_atomic(self.path, (json.dumps(document, indent=1) + "\n").encode())
        except OSError as failure:
            logging.getLogger("segbench").debug("cannot write %s: %s", self.path, failure)

    def beat(self) -> None:
        """Tells that it runs, until it has ended."""
        while not self._ended.wait(BEAT_SECONDS):
            self.tell("running")

    def close(self) -> None:
        self._ended.set()


@contextmanager
def present(run: Path, shard: str, device: str) -> Iterator[Presence]:
    """Does a shard of a run directory: nobody else does it meanwhile, and everybody can see it.

    Raises:
        RunError: another process does it.
    """
    me = Presence(run, shard, device)
    lock = _lock(me.path.with_suffix(".lock"), run, shard)
    thread = threading.Thread(target=me.beat, name="segbench-presence", daemon=True)
    me.tell("running")
    thread.start()
    state, error = "stopped", None
    try:
        yield me
        state = "done"
    except IncompleteError:
        raise
    except Exception as failure:
        state, error = "failed", f"{type(failure).__name__}: {failure}"[:2000]
        raise
    finally:
        me.close()
        thread.join()
        me.tell(state, error)
        if lock is not None:
            lock.release()


def _lock(path: Path, run: Path, shard: str) -> FileLock | None:
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        who = read(path.with_suffix(".json"))
        other = f"process {who.pid} on {who.host}" if who else "another process"
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


def read(path: Path, now: float | None = None) -> Present | None:
    """What a file of ``workers/`` says; None if it is missing or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
        silent = max(0.0, (time.time() if now is None else now) - path.stat().st_mtime)
        state = _state(found, silent)
        return Present(
            str(found["shard"]), str(found["host"]), int(found["pid"]), str(found["device"]), state,
            tuple(map(str, found["units"])), None if found["error"] is None else str(found["error"]), silent,
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _state(found: Mapping[str, Any], silent: float) -> str:
    state = str(found["state"])
    if state not in STATES:
        raise ValueError(state)
    return "lost" if state == "running" and silent > LOST_SECONDS else state


def everybody(run: Path) -> list[Present]:
    """All who have said that they work, or worked, in a run directory, by shard.

    The time is taken from the newest file, if it is ahead of this machine's clock.
    """
    files = sorted((run / "workers").glob("*-of-*.json"))
    try:
        now = max([time.time(), *(file.stat().st_mtime for file in files)])
    except OSError:
        now = time.time()
    found = [someone for file in files if (someone := read(file, now)) is not None]
    return sorted(found, key=lambda someone: [int(part) for part in someone.shard.split("/") if part.isdecimal()])
