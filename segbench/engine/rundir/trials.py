"""The trials of a search for the smallest ε, one line of JSON each, appended as they finish. Torch-free.

One file per shard, ``tried.jsonl`` or ``tried-3-of-16.jsonl``: a search tries radii that are not known in advance, too
many for a unit of evidence each. The lines hold counts, from which every number can be recomputed.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import NamedTuple

from segbench.engine.rundir.store import FIX
from segbench.errors import RunError
from segbench.evidence import Key


class Trial(NamedTuple):
    """Right and valid pixels of one image under one attack."""

    image_id: str
    eps_255: float
    attack: str
    right: int
    valid: int


class Trials:
    """The trials of a run directory, of all its shards; several threads may add.

    Args:
        path: the run directory.
        name: of the file that this process writes.
    """

    def __init__(self, path: Path, name: str = "tried.jsonl") -> None:
        self._path = path
        self._name = name
        self._lock = threading.Lock()

    def add(self, trial: Trial) -> None:
        """Appends one.

        Raises:
            RunError: it cannot be written.
        """
        line = json.dumps(trial._asdict()).encode()
        try:
            with self._lock, (self._path / self._name).open("ab") as stream:
                stream.write(b"\n" + line + b"\n")  # the first one ends a line that a kill or a full disk cut
        except OSError as error:
            raise RunError(f"Cannot write {self._path / self._name}: {error}. {FIX}") from error

    def read(self) -> dict[str, dict[Key, Trial]]:
        """All trials by image and (ε, attack); a line that a kill cut is skipped, and tried again."""
        found: dict[str, dict[Key, Trial]] = {}
        try:
            texts = [file.read_bytes() for file in sorted(self._path.glob("tried*.jsonl"))]
        except OSError as error:
            raise RunError(f"Cannot read {self._path}: {error}") from error
        for line in b"\n".join(texts).decode("utf-8", "replace").splitlines():
            trial = _parsed(line)
            if trial is not None:
                found.setdefault(trial.image_id, {})[trial.eps_255, trial.attack] = trial
        return found


def _parsed(line: str) -> Trial | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or set(record) != set(Trial._fields):
        return None
    known = (("image_id", str), ("eps_255", int | float), ("attack", str), ("right", int), ("valid", int))
    if not all(isinstance(record[name], kind) for name, kind in known) or not 0 <= record["right"] <= record["valid"]:
        return None
    return Trial(**record | {"eps_255": float(record["eps_255"])})
