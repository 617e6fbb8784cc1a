"""Runs the missing units of a prepared run: chooses the engine, stops cleanly on SIGTERM."""

from __future__ import annotations

import logging
from signal import SIGTERM

from segbench.engine.compute.batch_size import choose_batch_size
from segbench.engine.launch.local import run_units
from segbench.engine.launch.options import RunOptions
from segbench.engine.launch.prepare import PreparedRun
from segbench.engine.rundir.plan import FinishedUnit, Unit
from segbench.engine.telemetry.estimate import expected_time
from segbench.engine.telemetry.progress import announce
from segbench.errors import IncompleteError, PreemptedError, ShardDoneError
from segbench.signals import stop_signals

PREEMPTED = "Stopped by SIGTERM between units. Run the same command again to continue."
DRAINING = "SIGTERM: the units that have begun are finished, then this stops. The same command goes on."


def run_missing_units(run: PreparedRun) -> None:
    """Runs the units of this process that are not in the run directory yet; PreemptedError after SIGTERM."""
    worker, store, options = run.worker, run.store, run.options
    missing = [unit for unit in run.units if store.read(unit) is None]
    if run.units and not missing:
        logging.getLogger("segbench").warning(
            "%s: everything was there already, nothing is computed again. For a new run: another --out.", store.path
        )
    with stop_signals((SIGTERM,), DRAINING) as drain:

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


def shard_done_error(options: RunOptions, error: IncompleteError, merge_command: str) -> ShardDoneError:
    """The error when this process has finished its shard and units of others are missing."""
    shard, shards = options.shard_number()
    return ShardDoneError(
        f"Shard {shard}/{shards} is done. {error} The last shard to finish merges; or: {merge_command}"
    )
