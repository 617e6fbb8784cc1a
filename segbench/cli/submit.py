"""``submit``: from a run directory to a pull request."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from os import cpu_count
from pathlib import Path
from typing import Any

import click

from segbench import cards, content, schemas
from segbench import leaderboard as board
from segbench.cli.app import fail, note, print_json, print_table, printable
from segbench.entries import submission
from segbench.errors import UsageError
from segbench.leaderboard import preview

INITIALISATIONS = ("random", "clean", "robust")
PAPER = ("paper_title", "paper_authors", "paper_url", "paper_venue", "paper_year", "paper_bibtex")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--checkout", type=click.Path(path_type=Path, file_okay=False), help="Where to.  [default: this one]")
@click.option("--card", type=click.Path(path_type=Path), help="A card of the model, e.g. the one that training wrote.")
@click.option("--id", "model_id", help="<method>_<backbone>_<data set>.  [default: that of the run]")
@click.option("--title", help="One line for people.")
@click.option("--submitter", help="Your GitHub account.")
@click.option("--licence", help="Of the weights: MIT, cc-by-4.0, ...")
@click.option("--backbone", help="ConvNeXt-T, ViT-S/16, ...")
@click.option("--weights", help="hub:user/name@COMMIT:FILE, an https link, or none.")
@click.option("--preprocessing", help="How images were made.  [default: that of the data set]")
@click.option("--method", help="Training method: clean, AT, PIR-AT, ...")
@click.option("--train-eps", type=float, help="ε of the training attack, over 255.")
@click.option("--attack-steps", type=int, help="Steps of the training attack.")
@click.option("--epochs", type=float)
@click.option("--initialisation", type=click.Choice(INITIALISATIONS))
@click.option("--extra-data", help="Data besides the training split, e.g. ImageNet-1k (backbone).")
@click.option("--paper-title")
@click.option("--paper-authors", help="Separated by ';'.")
@click.option("--paper-url", help="https://...")
@click.option("--paper-venue")
@click.option("--paper-year", type=int)
@click.option("--paper-bibtex", type=click.Path(path_type=Path), help="A file with the BibTeX entry.")
@click.option("--reason", help="Why the scores of a listed entry change.")
@click.option("--pr/--no-pr", default=None, help="Run the git commands and gh.  [default: ask, if gh is there]")
@click.option("--yes", is_flag=True, help="Ask nothing; what is not given is unknown.")
@click.option("--json", is_flag=True, help="Print what was written as JSON.")
def submit(
    run: Path,
    checkout: Path | None,
    card: Path | None,
    model_id: str | None,
    submitter: str | None,
    reason: str | None,
    pr: bool | None,
    yes: bool,
    json: bool,
    **given: Any,
) -> None:
    """Put the finished run RUN on the leaderboard: write card, entry and evidence, check them, show the new row.

    Works in a checkout of the repository; asks for what is not given as an option. Nothing leaves this machine before
    the git commands at the end, which it runs only if you say so.
    """
    root = (checkout or content.checkout_here() or Path()).resolve()
    if not ((root / "model_zoo").is_dir() and (root / "entries").is_dir()):
        raise UsageError(f"{root} is no checkout of segbench. git clone the repository, and give it: --checkout FOLDER")
    if pr and not submission.has_github_cli():
        raise UsageError("--pr needs GitHub's command line, gh, and it is not on this machine. Install it, or --no-pr.")
    path = submission.find_entry(run)
    entry = submission.checked_entry(path)
    asking = not yes and sys.stdin.isatty()
    ask = _Asker(asking)
    name = model_id or entry["model"]["id"]
    found = cards.read_card(card) if card else submission.find_card(root, name, entry["dataset"]["id"])
    chosen = found or submission.new_card(entry, _details(name, entry, given, ask))
    if found is not None:
        _no_contradiction(found, model_id, given)
    before = board.load(root, processes=cpu_count() or 1)
    board.write_tables(root, before, check=True)  # their files must be there
    who = ask("Your GitHub account", submitter)
    done = submission.write(
        root, path, chosen, submitter=who, date=datetime.now(timezone.utc).date().isoformat(), reason=reason
    )
    after = board.load(root, processes=cpu_count() or 1)
    generated = [file.relative_to(root) for file in board.write_tables(root, after)]
    commands = submission.git_commands(done, generated)
    moves = preview.moves(before, after, {done.model})
    if json:
        print_json(
            {
                "model": done.model,
                "files": [str(file) for file in (*done.files, *generated)],
                "ranks": [move._asdict() for move in moves],
                "commands": [shlex.join(command) for command in commands],
            }
        )
    else:
        _show(done, generated, moves, after)
    _open(root, commands, submission.pull_request_command(done), pr, asking, quiet=json)


def _no_contradiction(card: cards.ModelCard, model_id: str | None, given: dict[str, Any]) -> None:
    """What a card says is not said again; no option is passed over in silence."""
    if model_id is not None and model_id != card.id:
        raise UsageError(f"The card is that of {card.id}, not of {model_id}: change its `id`, or leave --id out.")
    if said := [name for name, value in given.items() if value is not None]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in said)
        note(f"{card.id} has a card, {card.path}: {options} not used. To change what it says, edit it.")


class _Asker:
    """Asks on a terminal; elsewhere what is not given is None."""

    def __init__(self, asking: bool) -> None:
        self.asking = asking

    def __call__(
        self,
        question: str,
        given: Any,
        default: Any = None,
        *,
        check: Callable[[Any], Any] = lambda answer: answer,
        needed: bool = False,
    ) -> Any:
        """The answer, as ``check`` gives it; on a terminal, what it refuses is asked again."""
        if given is not None or not self.asking:
            value = default if given is None else given
            return None if value is None else check(value)
        hint = "" if default is None else f" [{default}]"
        while True:
            answer = click.prompt(f"{question}{hint}", default="", show_default=False, err=True).strip() or default
            if answer is None and needed:
                note("This one is needed; Ctrl-C ends without a trace.")
                continue
            try:
                return None if answer is None else check(answer)
            except UsageError as error:
                note(str(error))


def _details(name: str, entry: dict[str, Any], given: dict[str, Any], ask: _Asker) -> dict[str, Any]:
    """What a new card needs besides the entry; Enter leaves a thing unknown."""
    if ask.asking:
        note(f"{name} has no card yet. Some questions; Enter leaves the default in brackets, or unknown.")
    title = ask("Title, one line", given["title"], entry["model"]["title"])
    method = ask("Training method (clean, AT, PIR-AT, ...)", given["method"], needed=True)
    if method is None:
        raise UsageError("The card needs the training method: --method clean, --method AT, --method PIR-AT, ...")
    return {
        "id": name,
        "title": title,
        "backbone": ask("Backbone", given["backbone"]),
        "sources": ask("Weights (hub:user/name@COMMIT:FILE, https link)", given["weights"], check=_source) or [],
        "licence": ask("Licence of the weights", given["licence"]),
        "paper": _paper(given, ask),
        "training": {
            "method": method,
            "eps_255": ask("ε of the training attack, over 255", given["train_eps"], check=_float),
            "attack_steps": ask("Steps of the training attack", given["attack_steps"], check=_whole),
            "epochs": ask("Epochs", given["epochs"], check=_float),
            "initialisation": ask(
                "Initialisation (random, clean, robust)", given["initialisation"], check=_initialisation
            ),
            "extra_data": ask("Extra data", given["extra_data"]),
            "recipe": None,
            "log": None,
        },
        "preprocessing": ask("Preprocessing", given["preprocessing"], entry["dataset"]["preprocessing"] or "unknown"),
    }


def _float(answer: Any) -> float | int:
    try:
        number = float(answer)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{str(answer)[:40]!r} is not a number.") from error
    if not math.isfinite(number):
        raise UsageError(f"{answer} is not a number that a card can hold.")
    return int(number) if number.is_integer() else number


def _whole(answer: Any) -> int:
    number = _float(answer)
    if not isinstance(number, int):
        raise UsageError(f"{answer} is not a whole number.")
    return number


def _initialisation(answer: str) -> str:
    if answer not in INITIALISATIONS:
        raise UsageError(f"{answer[:40]!r} is none of {', '.join(INITIALISATIONS)}.")
    return answer


def _source(weights: str | None) -> list[dict[str, str]]:
    """A source of a card, from its short form."""
    if weights in (None, "", "none"):
        return []
    hub = re.fullmatch(r"hub:([^@:]+)@([0-9a-f]{40}):(.+)", weights or "")
    source = (
        {"type": "hub", "repo": hub[1], "revision": hub[2], "file": hub[3]}
        if hub
        else {"type": "url", "url": str(weights)}
    )
    if wrong := schemas.source_problems(source):
        raise UsageError(f"--weights {weights}: {wrong[0]}. Write hub:user/name@COMMIT:FILE, an https link, or none.")
    return [source]


def _paper(given: dict[str, Any], ask: _Asker) -> dict[str, Any] | None:
    title = ask("Title of the paper", given["paper_title"])
    if title is None:
        if stray := [name for name in PAPER if given[name] is not None]:
            raise UsageError(f"--{stray[0].replace('_', '-')} needs --paper-title.")
        return None
    authors = ask("Authors, separated by ';'", given["paper_authors"], needed=True) or ""
    url = ask("Link of the paper, https://...", given["paper_url"], needed=True)
    year = ask("Year", given["paper_year"], check=_whole, needed=True)
    if not authors or url is None or year is None:
        raise UsageError("A paper needs --paper-authors, --paper-url and --paper-year.")
    file = given["paper_bibtex"]
    try:
        bibtex = file.read_text("utf-8") if file else None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read {file}: {error}") from error
    return {
        "title": title,
        "authors": [author.strip() for author in authors.split(";") if author.strip()],
        "url": url,
        "venue": ask("Venue", given["paper_venue"]),
        "year": year,
        "bibtex": bibtex,
    }


def _show(done: submission.Submission, generated: list[Path], moves: list[preview.Move], after: board.Board) -> None:
    for file in (*done.files, *generated):
        note(f"wrote {file}")
    for move in moves:
        before = "not listed" if move.before is None else f"rank {move.before}"
        now = "no rank" if move.after is None else f"rank {move.after}"
        click.echo(
            printable(f"{move.dataset} ({move.protocol}): {move.model} {before} -> {now} of {move.rows} entries")
        )
        for table in after.tables:
            if (table.dataset, table.protocol) == (move.dataset, move.protocol):
                columns, rows = preview.around(table, move.model)
                print_table(columns, rows)


def _open(
    root: Path, commands: list[list[str]], request: list[str], pr: bool | None, asking: bool, *, quiet: bool
) -> None:
    """Prints the commands that make the pull request, or runs them if that is wanted and possible."""
    there = submission.has_github_cli()
    wanted = pr or (pr is None and there and asking and click.confirm("Open the pull request now?", err=True))
    if not wanted:
        if not quiet:
            note(f"\nIn {root}:" if root != Path().resolve() else "\nNow:")
            for command in [*commands, request] if there else commands:
                click.echo(shlex.join(command))
            if not there:
                note("and open the pull request on GitHub.")
        return
    for command in [*commands, request]:
        note(f"$ {shlex.join(command)}")
        done = subprocess.run(command, cwd=root, check=False, stdout=sys.stderr)
        if done.returncode:
            fail(f"`{command[0]} {command[1]}` failed. The files are written; go on by hand from there.", 1)
