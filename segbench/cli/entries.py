"""``entries``: upgrade the files of results."""

from __future__ import annotations

from pathlib import Path

import click

from segbench import content
from segbench.cli.app import note, print_json, printable
from segbench.entries import migration
from segbench.errors import UsageError


@click.group()
def entries() -> None:
    """Upgrade result files from an older version."""


@entries.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--json", is_flag=True, help="Print the names of the upgraded files as JSON.")
def migrate(folder: Path | None, json: bool) -> None:
    """Upgrade the entries and run directories below FOLDER to the file format of this version.

    Without FOLDER, upgrades the entries of this checkout. Counts and scores stay the same; only the layout of the
    files changes, and with it the hashes of the evidence. An upgraded run can be continued. Have the files in git, or
    make a copy first.
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
        f"{len(rewritten)} files upgraded. Check them: segbench validate {folder}"
        if rewritten
        else f"Nothing to upgrade in {folder}."
    )
