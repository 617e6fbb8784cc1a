"""Runs the missing units of a prepared run: chooses the engine, stops cleanly on SIGTERM."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from segbench.engine.compute.batch_size import choose_batch_size
from segbench.engine.launch.local import run_units
from segbench.engine.launch.prepare import PreparedRun
from segbench.engine.rundir.plan import FinishedUnit, Unit
from segbench.engine.telemetry.estimate import expected_time
from segbench.engine.telemetry.progress import announce
from segbench.errors import IncompleteError, PreemptedError, ShardDoneError

PREEMPTED = "Stopped by SIGTERM between units. Run the same command again to continue."


T = TypeVar("T")


def run_missing_units(run: PreparedRun) -> None:
    """Runs the units of this process that are not in the run directory yet; PreemptedError if SIGTERM leaves some."""
    worker, store, options, drain = run.worker, run.store, run.options, run.drain
    missing = [unit for unit in run.units if store.read(unit) is None]
    if run.units and not missing:
        logging.getLogger("segbench").warning(
            "%s: everything was there already, nothing is computed again. For a new run: another --out.", store.path
        )

    def begin(unit: Unit) -> bool:
        if store.file(unit).exists():  # another process has finished it meanwhile
            return False
        run.heartbeat.begin(unit.name)
        return True

    def finish(done: FinishedUnit) -> None:
        store.add(done)
        run.heartbeat.end(done.unit.name)

    if options.engine == "ray":
        from segbench.engine.launch.ray import run_on_ray

        run_on_ray(worker, missing, finish, begin=begin, drain=drain, options=options)
    elif missing:
        choose_batch_size(worker)
        if options.progress:
            announce(expected_time(worker, missing, store.costs()))
        run_units(run.session, worker, missing, finish, begin=begin, drain=drain, progress=options.progress)
    if drain.is_set() and (left := [unit for unit in run.units if not store.file(unit).exists()]):
        raise PreemptedError(
            f"Stopped by SIGTERM; the units that had begun are finished and kept, {len(left)} of {len(run.units)} "
            "are left. Run the same command again to continue."
        )


def finish_run(run: PreparedRun, merge: Callable[[], T], file: str, merge_command: str) -> T:
    """What ``merge`` makes of a run whose shard is done, and writes into ``file`` of its directory.

    Raises:
        ShardDoneError: units of other shards are missing; ``merge_command`` is for when they are there.
        PreemptedError: SIGTERM came meanwhile: the result is written, but who called must not go on as if nothing had
            been asked.
    """
    stopped = run.drain.is_set()
    try:
        result = merge()
    except PreemptedError:
        raise
    except IncompleteError as error:
        text = f"Shard {run.shard_label} is done. {error} The last shard to finish merges; or: {merge_command}"
        raise PreemptedError(f"Stopped by SIGTERM. {text}") if stopped else ShardDoneError(text) from error
    if stopped:
        raise PreemptedError(
            f"Stopped by SIGTERM, during the last units: this run is complete, its result is {run.store.path / file}. "
            "If more was to follow, run the same command again.",
            result,
        )
    return result
