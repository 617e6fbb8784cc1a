"""``leaderboard``: the tables of README files, the site, and looking at it."""

from __future__ import annotations

import functools
import tempfile
import webbrowser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from os import cpu_count
from pathlib import Path
from typing import Any

import click

from segbench import content
from segbench import leaderboard as board
from segbench.cli.app import fail, note, print_json
from segbench.errors import UsageError

ROOT = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Checkout whose entries and cards are meant.  [default: this one]",
)


@click.group(invoke_without_command=True)
@click.option("--check", is_flag=True, help="Change nothing; fail if a table is stale.")
@ROOT
@click.option("--json", is_flag=True, help="Print the tables as JSON and write nothing.")
@click.pass_context
def leaderboard(ctx: click.Context, check: bool, root: Path | None, json: bool) -> None:
    """Write the tables of leaderboard/README.md from the entries, and the models in README.md from the cards."""
    if ctx.invoked_subcommand:
        if check or json:
            raise UsageError(f"--check and --json do not go with `leaderboard {ctx.invoked_subcommand}`.")
        ctx.obj = root
        return
    base = root or content.checkout_here()
    found = board.load(base, processes=cpu_count() or 1)
    if json:
        print_json(board.document(found))
        return
    tables = board.render(found)
    if base is None:
        click.echo(tables)
        return
    fresh = board.write_tables(base, found, check=check)
    if check and not all(fresh.values()):
        stale = " and ".join(str(path) for path in fresh if not fresh[path])
        fail(f"{stale} is stale. Mend: segbench leaderboard", 1)
    click.echo(tables)
    for path in fresh:
        note(f"{path} {'was up to date' if fresh[path] else 'was written'}.")


@leaderboard.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("site"), help="Folder to write into."
)
@ROOT
@click.pass_obj
def build(outer: Path | None, out: Path, root: Path | None) -> None:
    """Write the site: index.html (works from a file, offline), a page for each model, JSON, CSV and BibTeX."""
    files = _build(root or outer, out)
    note(f"{out / 'index.html'} and {len(files) - 1} more files were written. Look: segbench leaderboard serve")


@leaderboard.command()
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="0 takes a free one.")
@click.option("--browser/--no-browser", default=True, help="Open it in a browser.")
@ROOT
@click.pass_obj
def serve(outer: Path | None, port: int, browser: bool, root: Path | None) -> None:
    """Build the site into a temporary folder and show it on this machine, until Ctrl-C."""
    with tempfile.TemporaryDirectory(prefix="segbench-site-") as folder:
        _build(root or outer, Path(folder))
        handler = functools.partial(_Quiet, directory=folder)
        try:
            server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except OSError as error:
            raise UsageError(f"Port {port} cannot be used: {error}. Another one: --port 0") from error
        with server:
            address = f"http://127.0.0.1:{server.server_port}/"
            click.echo(address)
            note("Ctrl-C ends it.")
            if browser:
                webbrowser.open(address)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                note("Ended.")


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files, and says nothing about it."""

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""


def _build(root: Path | None, out: Path) -> list[Path]:
    from segbench.leaderboard import site

    base = root or content.checkout_here()
    found = board.load(base, processes=cpu_count() or 1)
    content_root = base or content.folder("entries").parent
    docs = base / "docs" if base else None
    return site.build(found, out, content_root=content_root, docs=docs)
