"""`evaluate`: from a model and a data set to an entry and its evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from segbench.data import SegmentationDataset
from segbench.engine.launch.dispatch import PREEMPTED, finish_run, run_missing_units
from segbench.engine.launch.options import RunOptions
from segbench.engine.launch.prepare import Request, prepare_run
from segbench.engine.rundir.merge import merge
from segbench.engine.rundir.savings import SavedPasses, saved_passes
from segbench.engine.rundir.store import Store
from segbench.errors import PreemptedError, UsageError
from segbench.models.sources.names import parse
from segbench.protocol import Protocol, Threat, get_protocol, radii_of
from segbench.signals import raised

if TYPE_CHECKING:
    import pandas as pd


class Quick(NamedTuple):
    """How much a first look attacks."""

    limit: int
    iterations: int


QUICK = Quick(limit=16, iterations=30)


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished evaluation: its run directory, the entry ``<id>.json`` and its evidence ``<id>.parquet``."""

    path: Path
    entry_path: Path
    evidence_path: Path
    _entry: dict[str, Any]

    def entry(self) -> dict[str, Any]:
        """The entry as a dict that validates."""
        return self._entry

    def saved_passes(self) -> SavedPasses | None:
        """What was saved because decided images leave early, as forward passes; None if the run's log does not tell."""
        store = Store.open(self.path)
        return saved_passes(store.costs_of(store.units([row["strength"] for row in self._entry["results"]])))

    def table(self) -> pd.DataFrame:
        """One row per strength, fractions in [0,1]; strength 0 is the clean score."""
        import pandas as pd

        threat, clean = Threat(**self._entry["protocol"]["threat"]), self._entry["clean"]
        rows = [{**threat.names(0.0), "aacc": clean["aacc"], "miou": clean["miou"]}]
        for result in self._entry["results"]:
            row = {key: result[key] for key in ("aacc", "miou", "miou_lower_bound")}
            row = threat.names(result["strength"]) | row
            for loss, scores in result["per_loss"].items():
                row |= {f"aacc_{loss}": scores["aacc"], f"miou_{loss}": scores["miou"]}
            rows.append(row)
        table: pd.DataFrame = pd.DataFrame(rows)
        return table


@raised(SIGTERM, PreemptedError, PREEMPTED)
def evaluate(
    model_or_id: str | nn.Module,
    dataset: str | SegmentationDataset | None = None,
    eps: str | float | Sequence[str | float] | None = None,
    protocol: str = "sea-v1",
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    batch_size: int | str = "auto",
    precision: str = "fp32",
    limit: int | None = None,
    iterations: int | None = None,
    shard: str | None = None,
    engine: str = "local",
    progress: bool = True,
    offline: bool = False,
    compile: bool = False,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    quick: bool = False,
) -> Result:
    """Attacks a model with the whole protocol and writes entry and evidence.

    A run continues where it stopped: the same call again skips the finished units. SIGTERM finishes the units that
    have begun.

    Args:
        model_or_id: whatever `segbench.load_model` takes, or a module that maps images (N,3,H,W) in [0,1] to logits
            (N,K,H,W).
        dataset: data set id or object; None for the one of the model's card.
        eps: radii as numerators over 255 (``8`` or ``"8/255"``), one or several; None for 4, 8, 12.
        protocol: ``sea-v1``, as published, or ``sea-v2``, stronger and independent of the scale of the logits.
        data_root: folder of the data set, where it needs one.
        out: run directory; None for ``runs/<model>-<data set>-<identity>``.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        batch_size: images attacked at once, or ``auto``: on a GPU as many as its memory holds. On a CPU it changes no
            result (small images are always computed in batches of one fixed size, so a small number there saves
            nothing).
        precision: of the gradients: ``fp32``, ``tf32`` or ``bf16``. What an attack returns is always scored in float32
            with TF32 off. Other than ``fp32`` makes the entry unofficial.
        limit: only the first images; makes the entry unofficial.
        iterations: instead of the protocol's; makes the entry unofficial.
        shard: ``"3/16"`` does every sixteenth unit from the third on; the last shard to finish merges. None for what
            torchrun or SLURM say (`segbench.engine.launch.shards`), else everything.
        engine: ``local``, or ``ray`` for the actors of a Ray cluster (extra ``ray``).
        progress: show a bar on standard error.
        offline: never use the network: weights must be on this machine.
        compile: compile model and loss with `torch.compile`; faster on a GPU, rounds otherwise.
        workers: actors of the Ray engine; None for as many as the cluster holds.
        gpus_per_worker: that each of them asks for, e.g. 0.5; None for 1 on CUDA.
        quick: a first look in place of a result, in seconds for a small model: `QUICK` images and iterations, unless
            ``limit`` or ``iterations`` say otherwise. As in every trial, the check for masked gradients is left out.

    Returns:
        The result, with ``table()`` and ``entry()``.

    Raises:
        UsageError, ModelError, DataError, RunError: what is wrong, and how to fix it.
        ShardDoneError: this shard is done, units of others are missing.
        PreemptedError: SIGTERM stopped it. If that came during the last units, the entry is written, and ``result`` of
            the error is this result; else units are missing.
    """
    radii = radii_of(eps)
    if quick:
        limit = QUICK.limit if limit is None else limit
        iterations = QUICK.iterations if iterations is None else iterations
    options = RunOptions(
        device, batch_size, precision, shard, engine, progress, offline, compile, workers, gpus_per_worker
    )
    request = Request(parse(model_or_id), dataset, data_root, out, limit, "evaluate")
    with prepare_run(request, radii, _protocol(protocol, iterations), options) as run:
        run_missing_units(run)

    def merged() -> Result:
        found = merge(run.store, radii)
        return Result(run.store.path, found.entry_path, found.evidence_path, found.entry)

    path = run.store.path
    return finish_run(run, merged, f"{run.store.manifest['model']['id']}.json", f"segbench merge {path}")


def _protocol(name: str, iterations: int | None) -> Protocol:
    protocol = get_protocol(name)
    if iterations is None:
        return protocol
    if iterations < 1:
        raise UsageError(f"iterations must be at least 1, not {iterations}.")
    return dataclasses.replace(protocol, iterations=iterations)
