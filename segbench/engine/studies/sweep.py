"""A comparison of attacks at several numbers of iterations and with several seeds: what more passes, and luck, change.

Source: Croce, Singh, Hein, ECCV 2024, Figure 5 (iterations) and Table 8 (seeds). Each comparison has a run directory of
its own, ``iterations<n>_seed<s>``, which resumes and is divided into shards as any other.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from segbench import schemas
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir.store import FIX
from segbench.engine.studies.compare import ATTACKS, METRICS, compare
from segbench.engine.telemetry.progress import announce
from segbench.errors import ShardDoneError, UsageError
from segbench.files import write_results
from segbench.protocol import LINF

FILE = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """Finished comparisons.

    Attributes:
        path: the folder of their run directories and of ``sweep.json``.
        rows: those of each `segbench.engine.studies.compare.Comparison`, with its ``iterations`` and ``seed``.
        summary: for each ε, attack and number of iterations the scores over the seeds: ``aacc`` and ``miou`` (means),
            ``aacc_std`` and ``miou_std`` (of the sample; null with one seed), ``aacc_range`` and ``miou_range``.
    """

    path: Path
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    _about: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        return {**self._about, "rows": self.rows, "summary": self.summary}


def sweep(
    model_or_id: str | nn.Module,
    attacks: str | Sequence[str] = ATTACKS,
    *,
    iterations: Sequence[int],
    seeds: Sequence[int],
    out: str | Path | None = None,
    **options: Any,
) -> Sweep:
    """Compares the attacks once for each number of iterations and each seed.

    ``out`` is the folder of the run directories; None for ``runs/sweep-<model>``, with the data set and the number of
    images where they are given. The other arguments are those of `segbench.engine.studies.compare.compare`.
    """
    if not iterations or not seeds:
        raise UsageError("Give at least one number of iterations and one seed.")
    folder = Path("runs") / _name(model_or_id, options) if out is None else Path(out)
    pairs = [(number, seed) for number in sorted(set(iterations)) for seed in sorted(set(seeds))]
    found, rows, about = [], list[dict[str, Any]](), dict[str, Any]()
    unfinished: ShardDoneError | None = None
    for position, (number, seed) in enumerate(pairs):
        if options.get("options", RunOptions()).progress:
            announce(f"{position + 1} of {len(pairs)}: {number} iterations, seed {seed}.")
        run = folder / f"iterations{number}_seed{seed}"
        try:
            found.append(compare(model_or_id, attacks, iterations=number, seed=seed, out=run, **options))
        except ShardDoneError as error:
            unfinished = error
    if unfinished is not None:
        raise unfinished
    for (number, seed), each in zip(pairs, found, strict=True):
        document = each.document()
        about = {key: document[key] for key in ("model", "dataset", "environment")}
        rows += [{**row, "iterations": number, "seed": seed} for row in each.rows]
    result = Sweep(
        folder, rows, _summary(rows), about | {"iterations": sorted(set(iterations)), "seeds": sorted(set(seeds))}
    )
    write_results({folder / FILE: schemas.dump(result.document()).encode()}, FIX)
    return result


def _name(model: str | nn.Module, options: Mapping[str, Any]) -> str:
    stem = type(model).__name__ if isinstance(model, nn.Module) else model
    parts = ["sweep", Path(stem).stem if stem.endswith(".json") else stem]
    data, limit = options.get("dataset"), options.get("limit")
    parts += [] if data is None else [data if isinstance(data, str) else data.id]
    parts += [] if limit is None else [f"first{limit}"]
    return "".join(char if char.isalnum() or char in "-_" else "-" for char in "-".join(parts))


def _summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[float, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["strength"], row["attack"], row["iterations"]), []).append(row)
    found = []
    for (eps, attack, number), members in groups.items():
        line: dict[str, Any] = {**LINF.names(eps), "attack": attack, "iterations": number, "seeds": len(members)}
        for metric in METRICS:
            values = [row[metric] for row in members]
            line[metric] = statistics.fmean(values)
            line[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else None
            line[f"{metric}_range"] = [min(values), max(values)]
        found.append(line)
    return found
