"""``status`` and ``merge``."""

from __future__ import annotations

from pathlib import Path

import click

from segbench.cli.app import note, print_json, print_table
from segbench.cli.zoo import print_scores
from segbench.engine.merge import merge as merge_store
from segbench.engine.store import Store
from segbench.errors import IncompleteError


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", is_flag=True, help="Print as JSON.")
def status(run: Path, json: bool) -> None:
    """Show what of the run directory RUN is done. Exit code 3 while units are missing."""
    store = Store.open(run)
    rows: dict[tuple[float, str], list[int]] = {}
    for unit in store.units():
        row = rows.setdefault((unit.eps_255, unit.loss), [0, 0])
        row[0] += store.read(unit) is not None
        row[1] += 1
    done, total = (sum(column) for column in zip(*rows.values(), strict=True))
    seconds = sum(cost["seconds"] for cost in store.costs().values())
    if json:
        groups = [{"eps_255": eps, "loss": loss, "done": row[0], "units": row[1]} for (eps, loss), row in rows.items()]
        model, dataset = store.manifest["model"]["id"], store.manifest["dataset"]["id"]
        print_json(
            {"model": model, "dataset": dataset, "done": done, "units": total, "seconds": seconds, "groups": groups}
        )
    else:
        click.echo(
            f"{store.manifest['model']['id']} on {store.manifest['dataset']['id']}: "
            f"{done} of {total} units done in {seconds:.0f} s"
        )
        print_table(
            [">ε", "loss", ">done", ">units"],
            [[f"{eps:g}/255", loss, str(row[0]), str(row[1])] for (eps, loss), row in rows.items()],
        )
    if done < total:
        raise IncompleteError(f"{total - done} units are missing. Continue: run the same `segbench evaluate` again.")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", is_flag=True, help="Print the entry as JSON.")
def merge(run: Path, json: bool) -> None:
    """Merge the finished units of the run directory RUN into an entry and its evidence."""
    merged = merge_store(Store.open(run))
    if json:
        print_json(merged.entry)
    else:
        print_scores(merged.entry)
    note(f"entry     {merged.entry_path}\nevidence  {merged.evidence_path}")
