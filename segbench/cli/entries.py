"""``entries``: the files of results as such."""

from __future__ import annotations

from pathlib import Path

import click

from segbench import content
from segbench.cli.app import note, print_json, printable
from segbench.entries import migration
from segbench.errors import UsageError


@click.group()
def entries() -> None:
    """Rewrite the files of results."""


@entries.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--json", is_flag=True, help="Print the names of the rewritten files as JSON.")
def migrate(folder: Path | None, json: bool) -> None:
    """Rewrite the results of an older version below FOLDER, entries or run directories, for this one.

    Without FOLDER the entries of this checkout. Counts and scores stay as they are; only their layout changes, and
    with it the hashes of the evidence files. A run directory goes on after it as if nothing had been. Keep a copy, or
    have the files in git.
    """
    if folder is None:
        checkout = content.checkout_here()
        if checkout is None:
            raise UsageError("This is an installed package. Give the folder: segbench entries migrate FOLDER")
        folder = checkout / "entries"
    rewritten = migration.migrate(folder)
    if json:
        print_json([str(path) for path in rewritten])
    else:
        for path in rewritten:
            click.echo(printable(str(path)))
    note(
        f"{len(rewritten)} files rewritten. Check them: segbench validate {folder}"
        if rewritten
        else f"Nothing in {folder} is of an older version."
    )
