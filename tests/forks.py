"""Runs in forked processes that can be killed: what is imported is there at once, so fifty kills take half a minute.

    python -m tests.forks kills OUT KILLS SEED     # SIGKILL at random moments, then to the end
    python -m tests.forks operations OUT           # SIGKILL at the first, second, ... operation on a file
    python -m tests.forks once OUT                 # undisturbed

Prints how many processes were killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import segbench
from segbench import files

evaluate = segbench.evaluate  # lazy: loaded here, once for all forks

MODEL = "clean_convnext_mini_shapes"
MANY = {"eps": [2, 4, 6, 8], "limit": 40, "iterations": 3}  # 39 units
FEW = {"eps": [8], "limit": 2, "iterations": 1}


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
    torch.set_num_threads(1)
    evaluate(MODEL, out=out, progress=False, **arguments)


def kills(out: Path, number: int, seed: int) -> int:
    """Kills at random moments; then the run may go to its end."""
    rng, killed = random.Random(seed), 0
    while True:
        child = fork(lambda: run(out, MANY))
        if killed < number:
            time.sleep(rng.uniform(0.02, 0.9))
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
        again = fork(lambda folder=folder: run(folder, FEW))
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
    run(out, FEW)


if __name__ == "__main__":
    what, target, *rest = sys.argv[1:]
    if what == "kills":
        print(kills(Path(target), int(rest[0]), int(rest[1])))
    elif what == "operations":
        print(operations(Path(target)))
    else:
        run(Path(target), MANY)
        print(0)
