"""``attack minimum``: the smallest ε that breaks each image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from segbench.cli.app import ManyValues, find_own_modules, note, print_json, print_table, printable
from segbench.cli.computing import (
    DATA_ROOT,
    DATASET,
    JSON,
    LIMIT,
    MODEL,
    OUT,
    SEED,
    computing_options,
    unless_shards_missing,
)

if TYPE_CHECKING:
    from segbench.engine.studies.minimum import Minimum

ROUND = (0, 1, 2, 4, 8, 12, 16, 32, 64, 128, 255)  # radii of the table


@click.command("minimum", cls=ManyValues)
@MODEL
@click.option(
    "--attacks", multiple=True, default=("mce_bal", "mce", "js"), help="Tried in this order; the first that does it."
)
@DATASET
@click.option("--share", type=float, default=0.01, help="Of right pixels that an image which is broken may have.")
@click.option("--largest", type=float, default=32.0, help="Radius, over 255.")
@click.option("--resolution", type=float, default=0.25, help="Of the radii, over 255.")
@DATA_ROOT
@OUT
@LIMIT
@click.option("--iterations", type=click.IntRange(1), default=300, help="Of each attack at each radius.")
@SEED
@computing_options
@JSON
def minimum(model: str, attacks: tuple[str, ...], json: bool, quiet: bool, **options: Any) -> None:
    """Find the smallest ε at which 99% of the pixels of an image are wrong, for each image, by bisection.

    Ctrl-C is safe: the same command continues where it stopped.
    """
    from segbench.engine.launch.options import RunOptions
    from segbench.engine.studies.minimum import minimum as search

    find_own_modules(model)
    names = ("dataset", "share", "largest", "resolution", "data_root", "out", "limit", "iterations", "seed")
    which = {key: options.pop(key) for key in names}
    run_options = RunOptions(progress=not quiet, **options)
    found = unless_shards_missing(run_options.shard, lambda: search(model, attacks, options=run_options, **which))
    if found is None:
        return
    if json:
        print_json(found.document())
    else:
        _show(found)
    note(f"minimum  {found.path / 'minimum.json'}")


def _show(found: Minimum) -> None:
    document, number = found.document(), len(found.image_ids)
    wrong = f"{100 * (1 - document['share_right']):g}% of the pixels wrong"
    click.echo(printable(f"{document['model']['id']} on {document['dataset']['id']} ({number} images), {wrong}"))
    largest = document["largest_eps_255"]
    quantiles = [found.quantile(each) for each in (0.25, 0.5, 0.75)]
    lower, median, upper = (f"above {largest:g}/255" if each is None else f"{each:g}/255" for each in quantiles)
    click.echo(f"Smallest ε: median {median}, quartiles {lower} and {upper}.")
    click.echo(f"{found.unbroken} of {number} images are not broken at {largest:g}/255.")
    radii = [each for each in ROUND if each <= largest]
    print_table(
        [">ε", ">images broken"], [[f"{each:g}/255", f"{100 * found.share_broken(each):.1f} %"] for each in radii]
    )
