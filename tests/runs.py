"""Short evaluations that several files of tests start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import segbench
from segbench.engine.evaluate import Result

MODEL = "clean_convnext_mini_shapes"
SHORT = {"eps": [4, 8], "limit": 5, "iterations": 4, "progress": False}
# the cores are shared by the workers of the tests
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(out: Path, **changes) -> Result:
    """In this process."""
    return segbench.evaluate(changes.pop("model", MODEL), out=out, **(SHORT | changes))


def units(path: Path) -> dict[str, bytes]:
    """Name and content of every unit of a run directory."""
    return {file.name: file.read_bytes() for file in sorted((path / "units").iterdir())}


def command(out: Path) -> list[str]:
    """The same from a command line."""
    options = ["--eps", "4", "8", "--limit", "5", "--iterations", "4", "--quiet"]
    return [sys.executable, "-m", "segbench", "evaluate", "--model", MODEL, "--out", str(out), *options]
