"""``validate`` and ``leaderboard``."""

from __future__ import annotations

from pathlib import Path

import click

from segbench import cards, content, entries, schemas
from segbench import leaderboard as board
from segbench.cli.app import fail, note, print_json, printable
from segbench.errors import ContentError
from segbench.files import sha256_file


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", is_flag=True, help="Print as JSON.")
def validate(paths: tuple[Path, ...], json: bool) -> None:
    """Check cards and entries: schema, meaning, and every number recomputed from the evidence.

    PATHS are cards, entries, or run directories; without any, all cards and entries of this installation.
    """
    files = [file for path in paths for file in _documents(path)] or [*cards.card_paths(), *entries.entry_paths()]
    problems = {str(file): _problems(file) for file in files}
    bad = sum(map(bool, problems.values()))
    if json:
        print_json({"checked": len(files), "problems": {file: found for file, found in problems.items() if found}})
    for found in problems.values():
        for text in found:
            note(printable(text, keep="\n"))
    if bad:
        fail(f"{bad} of {len(files)} files have problems.", 1)
    note(f"{len(files)} files are valid.")


def _documents(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [file for file in sorted(path.rglob("*.json")) if file.name != "run.json"]
    if not found:
        raise ContentError(f"{path} holds no card or entry (*.json).")
    return found


def _problems(file: Path) -> list[str]:
    parents = [parent.name for parent in file.resolve().parents]
    published = content.entries_above(file.resolve()) is not None
    if published or _is_entry(file):
        return entries.validate_entry(file.resolve(), published=published)
    try:
        card = cards.read_card(file)
    except ContentError as error:
        return [str(error)]
    if (
        len(parents) > 1
        and parents[1] == "model_zoo"
        and (file.stem, file.resolve().parent.name) != (card.id, content.dataset_folder(card.dataset))
    ):
        return [
            f"{file}: the card belongs at model_zoo/{content.dataset_folder(card.dataset)}/{card.id}.json: "
            "move it, or correct `id` or `dataset`."
        ]
    return _weights(file, card)


def _weights(file: Path, card: cards.ModelCard) -> list[str]:
    """What is wrong with the weights beside a card, and with sources that nobody else could use."""
    found = []
    for source in card.sources:
        if source["type"] == "url" and source["url"].startswith("http:"):
            found.append(f"{file}: {source['url']} leads to this machine only: give an https:// link.")
        if source["type"] != "package":
            continue
        weights = file.parent / source["file"]
        if not weights.is_file():
            found.append(f"{file}: its weights {weights.name} are missing: put them beside it.")
        elif card.sha256 is None:
            found.append(f"{file}: `sha256` is null; that of {weights.name} is {sha256_file(weights)}.")
        elif sha256_file(weights) != card.sha256:
            found.append(
                f"{file}: {weights.name} does not have the SHA-256 of the card: restore the file, or correct `sha256`."
            )
        if weights.suffix != ".safetensors":
            found.append(f"{file}: {weights.name} is not safetensors. Convert it: segbench publish --dry-run.")
    return found


def _is_entry(file: Path) -> bool:
    try:
        document = schemas.parse(file.read_text("utf-8"), source=str(file))
    except (OSError, UnicodeDecodeError, ContentError):
        return False  # what is wrong with it is said by whoever reads it next
    return isinstance(document, dict) and "claim" in document


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; fail if a table is stale.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Checkout whose entries and README are meant.  [default: this one]",
)
@click.option("--json", is_flag=True, help="Print the ranked entries as JSON and write nothing.")
def leaderboard(check: bool, root: Path | None, json: bool) -> None:
    """Write the tables of leaderboard/README.md from the entries, and the models in README.md from the cards."""
    base = root or content.checkout()
    rows = board.load_entries(base / "entries" if base else None)
    if json:
        print_json(board.rank(rows))
        return
    tables = board.render(rows)
    if base is None:
        click.echo(tables)
        return
    zoo = sorted(map(cards.read_card, cards.card_paths(base / "model_zoo")), key=lambda card: card.id)
    files = [(base / "leaderboard" / "README.md", tables, (board.START, board.END))]
    if (base / "README.md").is_file():
        files.append((base / "README.md", board.models_table(zoo), (board.MODELS_START, board.MODELS_END)))
    fresh = {path: board.update(path, text, check=check, markers=markers) for path, text, markers in files}
    if check and not all(fresh.values()):
        stale = " and ".join(str(path) for path in fresh if not fresh[path])
        fail(f"{stale} is stale. Mend: segbench leaderboard", 1)
    click.echo(tables)
    for path in fresh:
        note(f"{path} {'was up to date' if fresh[path] else 'was written'}.")
