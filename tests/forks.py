"""Runs in forked processes that can be killed: what is imported is there at once, so fifty kills take half a minute.

    python -m tests.forks kills OUT KILLS SEED     # SIGKILL at random moments, then to the end
    python -m tests.forks operations OUT           # SIGKILL at the first, second, ... operation on a file
    python -m tests.forks once OUT                 # undisturbed
    python -m tests.forks tiny OUT                 # undisturbed, what the following do
    python -m tests.forks small-files OUT BYTES    # the kernel refuses larger ones, from the second unit on
    python -m tests.forks read-only OUT            # without the rights of root
    python -m tests.forks unlocked OUT             # two at once in one folder, on a file system without locks

The first two print how many processes were killed.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock

import segbench
from segbench import files
from segbench.engine.rundir.plan import FinishedUnit
from segbench.engine.rundir.store import Store
from segbench.errors import SegbenchError

evaluate = segbench.evaluate  # lazy: loaded here, once for all forks

MODEL = "clean_convnext_mini_shapes"
MANY = {"model_or_id": MODEL, "eps": [2, 4, 6, 8], "limit": 40, "iterations": 3}  # 39 units


def tiny() -> dict:
    """Five units that take a moment: a convolution on two pieces of scenes."""
    torch.manual_seed(0)
    shapes = segbench.load_dataset("shapes").first(2)

    def read(image_id: str) -> tuple:
        return tuple(part[:16, :16] for part in shapes.read(image_id))

    model = torch.nn.Conv2d(3, shapes.num_classes, 3, padding=1).eval()
    return {"model_or_id": model, "dataset": replace(shapes, read=read), "eps": 8, "iterations": 1}


def fork(function: Callable[[], object]) -> int:
    """Calls a function in a child, which ends with 0 if it returns."""
    child = os.fork()
    if child:
        return child
    try:
        function()
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - the parent is told by the exit code
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def run(out: Path, arguments: dict) -> None:
    """`segbench.evaluate` on one core."""
    torch.set_num_threads(1)
    evaluate(out=out, progress=False, **arguments)


def kills(out: Path, number: int, seed: int) -> int:
    """Kills at random moments; then the run may go to its end."""
    rng, killed = random.Random(seed), 0
    while True:
        child = fork(lambda: run(out, MANY))
        if killed < number:
            time.sleep(rng.uniform(0.02, 0.35))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
        elif os.WEXITSTATUS(status):
            raise SystemExit("the run failed")
        elif killed >= number:
            return killed


def operations(out: Path) -> int:
    """Kills before the first operation on a file, then from the start before the second, and so on."""
    killed = 0
    while True:
        folder = out / str(killed)
        child = fork(lambda folder=folder, place=killed: _until(folder, place))
        status = os.waitpid(child, 0)[1]
        again = fork(lambda folder=folder: run(folder, tiny()))
        if os.waitpid(again, 0)[1]:
            raise SystemExit(f"the run killed before operation {killed} does not go on")
        if not os.WIFSIGNALED(status):
            shutil.rmtree(folder)
            return killed
        killed += 1


def _until(out: Path, place: int) -> None:
    """A run that kills itself before one of its operations on files."""
    calls = 0

    def fatal(operation: Callable) -> Callable:
        def call(*arguments: object, **named: object) -> object:
            nonlocal calls
            if calls == place:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return operation(*arguments, **named)

        return call

    class System:
        """`os` as `segbench.files` sees it."""

        def __getattr__(self, name: str) -> object:
            found = getattr(os, name)
            return fatal(found) if name in ("open", "fsync", "replace", "link") else found

    files.os = System()
    run(out, tiny())


def _small_files(out: Path, size: int) -> None:
    add, done = Store.add, []

    def limited(store: Store, finished: FinishedUnit) -> None:
        if done:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        done.append(finished)
        add(store, finished)

    Store.add = limited
    run(out, tiny())


def _without_privileges() -> None:
    """Root may write anywhere; without its capabilities it is bound by the modes of files like everybody."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None).capset(header, nothing):
        raise OSError("capset")


def _unlocked(out: Path) -> None:
    def refuse(lock: FileLock, timeout: float) -> None:
        raise OSError(37, "No locks available")

    FileLock.acquire = refuse
    children = [fork(lambda: run(out, tiny())) for _ in range(2)]
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit("one of them failed")


def main(what: str, out: Path, *numbers: int) -> None:
    if what == "kills":
        print(kills(out, *numbers))
    elif what == "operations":
        print(operations(out))
    elif what == "once":
        run(out, MANY)
    elif what == "small-files":
        _small_files(out, *numbers)
    elif what == "unlocked":
        _unlocked(out)
    else:
        if what == "read-only":
            _without_privileges()
        run(out, tiny())


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
    except SegbenchError as error:
        sys.exit(f"Error: {error}")
