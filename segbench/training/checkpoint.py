"""Checkpoints: everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from segbench.attacks.memory import is_out_of_memory
from segbench.errors import RunError, difference
from segbench.files import make_folder, write_atomic
from segbench.training.distributed import Processes
from segbench.training.recipe import Recipe

NAME = "checkpoint.pt"
# What may differ when a run goes on: what is shown meanwhile, and how a device computes the same thing.
MAY_CHANGE = frozenset({"monitor_every", "monitor_eps_255", "monitor_iterations", "accumulation", "compile"})


@dataclass
class Position:
    """Where a run stands, and what it has measured.

    Attributes:
        epoch: epochs done.
        step: optimiser steps done in the epoch that is under way.
        loss_sum: of these steps.
        smoothed, lowest: of `segbench.training.monitor.LossWatch`.
        rows: what was measured in each epoch done.
        seconds: of training so far, without measuring.
        backbone: source and SHA-256 of the classifier that the run started from; None if from none.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    smoothed: float = float("nan")
    lowest: float = float("inf")
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    backbone: dict[str, str] | None = None


@contextmanager
def own_folder(out: Path, processes: Processes) -> Iterator[None]:
    """The folder of a run, made if it is missing, into which no other run trains meanwhile.

    Raises:
        RunError: it cannot be written, or another run trains into it.
    """
    lock = FileLock(out / ".lock")
    try:
        make_folder(out)
        if processes.leads:
            lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"Another process trains into {out}. Wait for its end, or give another --out folder.") from error
    except OSError as error:
        raise RunError(f"Cannot write to {out}: {error}. Give another --out folder.") from error
    try:
        yield
    finally:
        lock.release()


def save(path: Path, recipe: Recipe, images: str, position: Position, parts: dict[str, Any]) -> None:
    """Writes a checkpoint atomically.

    No random state is in it: random numbers are a function of the seed and of the step (`loop.seed_step`).

    Args:
        path: the file.
        recipe: of the run.
        images: what the training images are known by (`segbench.training.data.data_key`).
        position: where it stands.
        parts: name to what has a ``state_dict()``.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    buffer = io.BytesIO()
    torch.save({"recipe": recipe.to_json(), "images": images, "position": vars(position), **states}, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path, recipe: Recipe, images: str, parts: dict[str, Any]) -> Position | None:
    """Puts the states of a checkpoint where they belong; None if there is no checkpoint.

    Raises:
        RunError: it is damaged or cannot be read, or is of another recipe or other images.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if changed := _differences(state["recipe"], recipe):
            raise RunError(
                f"{path} belongs to another recipe: {'; '.join(changed)}. Give another --out folder, or delete the "
                "checkpoint."
            )
        if state["images"] != images:
            raise RunError(
                f"{path} belongs to a run on other images or classes. Give the same --data-root, or another --out "
                "folder."
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return Position(**state["position"])
    except RunError:
        raise
    except Exception as error:  # what a damaged file gives is not known
        if isinstance(error, OSError):
            raise RunError(f"Cannot read the checkpoint {path}: {error}. It stays as it is.") from error
        if is_out_of_memory(error):
            raise RunError(f"Not enough memory to continue {path}: {error}. It stays as it is.") from error
        raise RunError(
            f"The checkpoint {path} is damaged ({type(error).__name__}). Delete it to start again, "
            "or give another --out folder."
        ) from error


def _differences(known: str, recipe: Recipe) -> list[str]:
    """Fields in which a checkpoint's recipe is another one, with both values.

    A field that it does not know had its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    old = json.loads(json.dumps({key: value for key, value in defaults.items() if value is not dataclasses.MISSING}))
    old |= json.loads(known)
    new = json.loads(recipe.to_json())
    changed = sorted(key for key in old.keys() | new.keys() if key not in MAY_CHANGE and old.get(key) != new.get(key))
    return [difference(key, old.get(key), new.get(key)) for key in changed]
