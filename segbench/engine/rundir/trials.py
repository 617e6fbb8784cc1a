"""The trials of a search for the smallest ε, one line of JSON each, appended as they finish. Torch-free.

One file per shard, ``tried.jsonl`` or ``tried-3-of-16.jsonl``: a search tries radii that are not known in advance, too
many for a unit of evidence each. The lines hold counts, from which every number can be recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from segbench.engine.rundir.store import append_line, read_lines
from segbench.evidence import Key


class Trial(NamedTuple):
    """Right and valid pixels of one image under one attack."""

    image_id: str
    strength: float
    attack: str
    right: int
    valid: int


@dataclass
class Trials:
    """The trials of a run directory, of all its shards; this process writes the file ``name``, from several threads."""

    path: Path
    name: str = "tried.jsonl"

    def add(self, trial: Trial) -> None:
        """Appends one."""
        append_line(self.path / self.name, trial._asdict())

    def read(self) -> dict[str, dict[Key, Trial]]:
        """All trials by image and (ε, attack); a line that a kill cut is skipped, and tried again."""
        found: dict[str, dict[Key, Trial]] = {}
        for record in read_lines(self.path, "tried*.jsonl"):
            if trial := _parsed(record):
                found.setdefault(trial.image_id, {})[trial.strength, trial.attack] = trial
        return found


def _parsed(record: dict[str, Any]) -> Trial | None:
    known = (("image_id", str), ("strength", int | float), ("attack", str), ("right", int), ("valid", int))
    if set(record) != set(Trial._fields) or not all(isinstance(record[name], kind) for name, kind in known):
        return None
    return (
        Trial(**record | {"strength": float(record["strength"])}) if 0 <= record["right"] <= record["valid"] else None
    )
