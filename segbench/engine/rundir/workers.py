"""Which processes work in a run directory: one small file per shard, so that `segbench status` can tell.

``workers/3-of-16.json`` names the process that runs the shard, its units, and how it ended. The process rewrites it
every few seconds while it lives. No result depends on these files: a wrong clock costs a wrong word in ``status``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from segbench.files import write_atomic

FOLDER = "workers"
HEARTBEAT_SECONDS = 15.0
LOST_SECONDS = 90.0  # without a heartbeat, after which a process is taken for dead
STATES = ("running", "done", "stopped", "failed")


class WorkerStatus(NamedTuple):
    """What ``workers/<shard>.json`` says, and the seconds since the last heartbeat.

    ``state`` is ``running``, ``done``, ``stopped`` (by a signal), ``failed``, or ``lost``: running, but silent.
    """

    shard: str
    host: str
    pid: int
    device: str
    state: str
    units: tuple[str, ...]
    error: str | None
    seconds: float


def shard_file_name(shard: str) -> str:
    """``3/16`` as a part of a file's name.

    >>> shard_file_name("3/16")
    '3-of-16'
    """
    return shard.replace("/", "-of-")


def worker_file(run: Path, shard: str) -> Path:
    """Where the process of a shard says what it does; `lock_file` lies beside it."""
    return run / FOLDER / f"{shard_file_name(shard)}.json"


def lock_file(run: Path, shard: str) -> Path:
    """What the process of a shard locks."""
    return run / FOLDER / f"{shard_file_name(shard)}.lock"


def manifest_lock_file(run: Path) -> Path:
    """What a process locks while it changes ``run.json``."""
    return run / FOLDER / "run.lock"


def holds_only_workers(run: Path) -> bool:
    """Whether the folder of workers in ``run`` has no files but theirs."""
    names = [file.name for file in (run / FOLDER).iterdir() if not file.name.startswith(".")]
    return all(name.endswith(".lock") or re.fullmatch(r"\d+-of-\d+\.json", name) for name in names)


def merge_lock_file(run: Path) -> Path:
    """What a process locks while it merges."""
    return run / FOLDER / "merge.lock"


class Heartbeat:
    """Keeps ``workers/<shard>.json`` of this process up to date; thread-safe."""

    def __init__(self, run: Path, shard: str, device: str) -> None:
        self.path = worker_file(run, shard)
        self._about = {"shard": shard, "host": socket.gethostname(), "pid": os.getpid(), "device": device}
        self._units: set[str] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="segbench-heartbeat", daemon=True)

    def start(self) -> None:
        self.write("running")
        self._thread.start()

    def stop(self, state: str, error: str | None) -> None:
        self._stopped.set()
        self._thread.join()
        self.write(state, error)

    def begin(self, unit: str) -> None:
        with self._lock:
            self._units.add(unit)

    def end(self, unit: str) -> None:
        with self._lock:
            self._units.discard(unit)

    def write(self, state: str, error: str | None = None) -> None:
        """Writes the file; a failure to do so is no reason to end the run."""
        with self._lock:
            document = {**self._about, "state": state, "units": sorted(self._units), "error": error}
        try:
            write_atomic(self.path, (json.dumps(document, indent=1) + "\n").encode())
        except OSError as failure:
            logging.getLogger("segbench").debug("cannot write %s: %s", self.path, failure)

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            self.write("running")


def read_worker(path: Path, now: float | None = None) -> WorkerStatus | None:
    """What a file of ``workers/`` says; None if it is missing or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
        silent = max(0.0, (time.time() if now is None else now) - path.stat().st_mtime)
        return WorkerStatus(
            str(found["shard"]), str(found["host"]), int(found["pid"]), str(found["device"]), _state(found, silent),
            tuple(map(str, found["units"])), None if found["error"] is None else str(found["error"]), silent,
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _state(found: dict[str, Any], silent: float) -> str:
    state = str(found["state"])
    if state not in STATES:
        raise ValueError(state)
    return "lost" if state == "running" and silent > LOST_SECONDS else state


def list_workers(run: Path) -> list[WorkerStatus]:
    """All processes that work, or worked, in a run directory, by shard.

    "Now" is the time of the newest file if that is ahead of this machine's clock.
    """
    files = sorted((run / FOLDER).glob("*-of-*.json"))
    try:
        now = max([time.time(), *(file.stat().st_mtime for file in files)])
    except OSError:
        now = time.time()
    found = [worker for file in files if (worker := read_worker(file, now)) is not None]
    return sorted(found, key=lambda worker: [int(part) for part in worker.shard.split("/") if part.isdecimal()])
