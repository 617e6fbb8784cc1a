"""``attack``: the attacks by name, and how strong each is on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from segbench.cli.app import ManyValues, find_own_modules, note, print_json, print_table, printable
from segbench.cli.computing import computing_options
from segbench.errors import ShardDoneError


@click.group()
def attack() -> None:
    """Attacks beside the protocol: what there is, and which is the strongest on a model."""


@attack.command("list")
@click.option("--json", is_flag=True, help="Print as JSON.")
def list_attacks(json: bool) -> None:
    """List the attacks by name."""
    import dataclasses

    from segbench.attacks.catalogue import ATTACKS

    if json:
        print_json([dataclasses.asdict(each) for each in ATTACKS.values()])
        return
    print_table(
        ["attack", "loss", "optimiser", "radius", ">iterations", ">restarts", "result by"],
        [
            [
                each.name, each.loss or "–", each.optimiser, {"red": "2ε, 1.5ε, ε", "const": "ε"}[each.schedule],
                str(each.iterations), str(each.restarts), each.best,
            ]
            for each in ATTACKS.values()
        ],
    )  # fmt: skip


@attack.command("compare", cls=ManyValues)
@click.option("--model", required=True, help="As in `segbench evaluate`.")
@click.option(
    "--attacks", multiple=True,
    help="Names of `segbench attack list`; several after one --attacks.  "
    "[default: mce_bal mce js pgd apgd segpgd cospgd]",
)  # fmt: skip
@click.option("--dataset", help="Data set id; by default that of the model's card.")
@click.option("--eps", multiple=True, help="Radii: 4, 8/255, 0.25 (all over 255).  [default: 4 8 12]")
@click.option("--data-root", type=click.Path(path_type=Path), help="Folder of the data set.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/<model>-<data set>-<identity>]"
)
@click.option("--limit", type=int, help="Only the first images.")
@click.option("--iterations", type=click.IntRange(1), default=300, help="Of each attack, its restarts together.")
@click.option("--seed", type=int, default=225, help="Of the random starts.")
@computing_options
@click.option("--json", is_flag=True, help="Print as JSON.")
def compare_attacks(
    model: str, attacks: tuple[str, ...], eps: tuple[str, ...], json: bool, quiet: bool, **options: Any
) -> None:
    """Compare attacks on MODEL under one budget: the paper's Table 1, with intervals and cost.

    Ctrl-C is safe: the same command continues where it stopped, also with more attacks or radii.
    """
    from segbench.engine.compare import ATTACKS, compare
    from segbench.engine.evaluate import How

    find_own_modules(model)
    which = {key: options.pop(key) for key in ("dataset", "data_root", "out", "limit", "iterations", "seed")}
    how = How(progress=not quiet, **options)
    try:
        found = compare(model, attacks or ATTACKS, eps=list(eps) or None, how=how, **which)
    except ShardDoneError as error:
        if how.shard is not None:
            raise
        note(str(error))
        return
    if json:
        print_json(found.document())
    else:
        about = found.document()
        click.echo(
            printable(
                f"{about['model']['id']} on {about['dataset']['id']} ({about['dataset']['images']} images), "
                f"{about['iterations']} iterations. Percent; * beyond doubt weaker than the strongest (paired "
                "bootstrap over images)."
            )
        )
        print_table(*_table(found.rows))
    note(f"comparison  {found.path / 'comparison.json'}\nevidence    {found.path / 'comparison.parquet'}")


def _table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = [">ε", "attack", ">aAcc", ">95%", ">mIoU", ">95%", ">forward", ">backward", ">seconds"]
    cells = []
    for row in rows:
        line = [f"{row['eps_255']:g}/255", row["attack"]]
        for metric in ("aacc", "miou"):
            low, high = row[f"{metric}_95"]
            mark = "*" if row["weaker"][metric] else " "
            line += [f"{100 * row[metric]:.1f}{mark}", f"{100 * low:.1f}–{100 * high:.1f}"]
        passes = [row[name] for name in ("forwards", "backwards")]
        seconds = row["seconds"]
        line += ["" if each is None else str(each) for each in passes] + ["" if seconds is None else f"{seconds:.0f}"]
        cells.append(line)
    return columns, cells
