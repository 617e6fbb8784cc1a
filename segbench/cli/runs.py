"""``status`` and ``merge``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from segbench.cli.app import note, print_json, print_table, printable
from segbench.cli.zoo import print_scores, printed
from segbench.engine.rundir.merge import merge as merge_store
from segbench.engine.rundir.status import run_status
from segbench.engine.rundir.store import Store
from segbench.engine.rundir.trials import Trials
from segbench.engine.telemetry.progress import format_duration
from segbench.errors import IncompleteError
from segbench.protocol import MINIMUM


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", is_flag=True, help="Print as JSON.")
def status(run: Path, json: bool) -> None:
    """Show what of the run directory RUN is done, who works on it, and how long it will take.

    Exit code 3 while units are missing, or a search is not finished.
    """
    if inner := sorted(path.parent for path in run.glob("iterations*_seed*/run.json")):
        _status_of_sweep(inner, json=json)
        return
    store = Store.open(run)
    found = run_status(store)
    total, left = found.total, found.total.units - found.total.done
    searches = store.manifest["protocol"]["name"] == MINIMUM
    if json:
        print_json(found.document())
    else:
        time_left = (
            "" if found.seconds_left is None or not left else f"; about {format_duration(found.seconds_left)} left"
        )
        click.echo(
            f"{found.model} on {found.dataset}: {total.done} of {total.units} units done in {found.seconds:.0f} s, "
            f"{total.running} running, {total.failed} failed, {total.missing} missing{time_left}"
        )
        if found.saved:
            click.echo(str(found.saved))
        if searches:
            tried = Trials(run).read()
            there = "there" if (run / "minimum.json").exists() else "not there yet"
            number = sum(map(len, tried.values()))
            click.echo(f"{number} trials on {len(tried)} images so far; minimum.json is {there}.")
        print_table(
            [">ε", "loss", ">done", ">running", ">failed", ">missing", ">units"],
            [
                [f"{eps:g}/255", loss, *map(str, (row.done, row.running, row.failed, row.missing, row.units))]
                for (eps, loss), row in found.groups.items()
            ],
        )
        if found.workers:
            print_table(
                ["shard", "state", "host", ">process", "device", ">last word", "units"],
                [
                    [
                        who.shard, who.state, who.host, str(who.pid), who.device, f"{format_duration(who.seconds)} ago",
                        ", ".join(who.units),
                    ]
                    for who in found.workers
                ],
            )  # fmt: skip
        for who in found.workers:
            if who.state == "failed" and who.error:
                click.echo(printable(f"Shard {who.shard} failed on {who.host}: {who.error}", keep="\n"))
    if searches and not (run / "minimum.json").exists():
        raise IncompleteError(f"The search is not finished. Continue: run the same `{store.verb}` again.")
    if left:
        raise IncompleteError(f"{left} units are missing. Continue: run the same `{store.verb}` again.")


def _status_of_sweep(runs: Sequence[Path], *, json: bool) -> None:
    """One line for each comparison of a sweep that has begun."""
    found = {path.name: run_status(Store.open(path)) for path in runs}
    if json:
        print_json({name: each.document() for name, each in found.items()})
    else:
        print_table(
            ["comparison", ">done", ">running", ">failed", ">missing", ">units"],
            [
                [name, *map(str, (row.done, row.running, row.failed, row.missing, row.units))]
                for name, row in ((name, each.total) for name, each in found.items())
            ],
        )
    if not (runs[0].parent / "sweep.json").exists():
        raise IncompleteError("The sweep is not finished. Continue: run the same `segbench attack compare` again.")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", is_flag=True, help="Print the entry as JSON.")
def merge(run: Path, json: bool) -> None:
    """Merge the finished units of the run directory RUN into an entry and its evidence."""
    merged = merge_store(Store.open(run))
    if json:
        print_json(printed(merged.entry))
    else:
        print_scores(merged.entry)
    note(f"entry     {merged.entry_path}\nevidence  {merged.evidence_path}")
