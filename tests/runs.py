"""Short evaluations that several files of tests start."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import segbench
from segbench.engine.evaluate import Result

MODEL = "clean_convnext_mini_shapes"
SHORT = {"eps": [4, 8], "limit": 5, "iterations": 4, "progress": False}
# the cores are shared by the workers of the tests
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(out: Path, **changes) -> Result:
    """In this process."""
    return segbench.evaluate(changes.pop("model", MODEL), out=out, **(SHORT | changes))


def units(path: Path) -> dict[str, bytes]:
    """Name and content of every unit of a run directory."""
    return {file.name: file.read_bytes() for file in sorted((path / "units").iterdir())}


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is what a killed `segbench.files.write_atomic` left behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def command(out: Path, iterations: int = 4, eps: Sequence[float] = (4, 8)) -> list[str]:
    """The same from a command line."""
    options = ["--eps", *map(str, eps), "--limit", "5", "--iterations", str(iterations), "--quiet"]
    return [sys.executable, "-m", "segbench", "evaluate", "--model", MODEL, "--out", str(out), *options]
