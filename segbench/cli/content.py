"""``validate`` and ``verify``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from os import cpu_count
from pathlib import Path

import click

from segbench import cards, content, entries, schemas
from segbench import leaderboard as board
from segbench.cli.app import fail, note, print_json, print_table, printable
from segbench.entries import additions, changes, checkouts, migration
from segbench.errors import ContentError, UsageError
from segbench.leaderboard import preview

Problems = dict[str, list[str]]


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--changed", metavar="REVISION", help="Check what a checkout changes since then, e.g. origin/main.")
@click.option(
    "--root", type=click.Path(path_type=Path, file_okay=False), help="Checkout that is meant.  [default: this one]"
)
@click.option("--author", help="With --changed: account of who makes the change; what others submitted stays theirs.")
@click.option(
    "--summary", type=click.Path(path_type=Path), help="With --changed: append the result as markdown to this file."
)
@click.option("--json", is_flag=True, help="Print as JSON.")
def validate(
    paths: tuple[Path, ...],
    changed: str | None,
    root: Path | None,
    author: str | None,
    summary: Path | None,
    json: bool,
) -> None:
    """Check cards and entries: schema, meaning, and every number recomputed from the evidence.

    PATHS are cards, entries, or run directories; without any, all cards and entries of this installation.
    With --changed the rules of a submission hold too: no foreign file, no score that vanishes, fresh tables.
    """
    if changed is not None:
        if paths:
            raise UsageError("--changed finds the files itself: leave the paths out.")
        base = root or content.checkout_here()
        if base is None:
            raise UsageError("This is an installed package. Give the checkout: --root FOLDER --changed origin/main")
        _changed(base.resolve(), changed, author, summary, json)
        return
    if summary or author:
        raise UsageError("--summary and --author go with --changed.")
    files = [file for path in paths for file in _documents(path)] or _all(root)
    _report({str(file): _problems(file) for file in files}, json)


def _all(root: Path | None) -> list[Path]:
    below = root / "entries" if root else None
    return [
        *cards.card_paths(root / "model_zoo" if root else None),
        *entries.entry_paths(below),
        *entries.addition_paths(below),
    ]


def _report(problems: Problems, json: bool) -> None:
    bad = sum(map(bool, problems.values()))
    if json:
        print_json({"checked": len(problems), "problems": {file: found for file, found in problems.items() if found}})
    for file, found in problems.items():
        for text in found:
            note(printable(text.replace(file, printable(file)), keep="\n"))
    if bad:
        fail(f"{bad} of {len(problems)} files have problems.", 1)
    note(f"{len(problems)} files are valid.")


def _changed(root: Path, revision: str, author: str | None, summary: Path | None, json: bool) -> None:
    base, found = checkouts.changes(root, revision)
    if not found:
        note(f"Nothing has changed since {revision}.")
        if json:
            print_json({"checked": 0, "problems": {}})
        return
    rules = [printable(text) for text in changes.problems(root, base, found, author=author)]
    problems = {"the change": rules}
    if all(change.mode == checkouts.PLAIN for change in found if change.status != "D"):  # a link leads anywhere
        problems |= {str(file.relative_to(root)): _problems(file) for file in _touched(root, found)}
        rules += _second_names(root, found)
    text = ""
    if not any(problems.values()):
        before, after = _board_before(root, base), board.load(root, processes=cpu_count() or 1)
        problems["tables"] = _stale(root, after)
        text = preview.summary(before, after, {change.model for change in found if change.model})
        if cards_changed := changes.card_changes(root, base, found):
            text += "\nChanged fields of listed cards:\n\n" + "".join(f"- {line}\n" for line in cards_changed)
    if summary is not None:
        with summary.open("a", encoding="utf-8") as stream:
            stream.write(_summary(problems, text))
    _report(problems, json)
    if not json and text:
        click.echo(text)


def _second_names(root: Path, found: Sequence[checkouts.Change]) -> list[str]:
    """Entries of the change that show the weights of another entry on the same data."""
    added = {root / change.path for change in found if change.kind == "entry" and change.path.endswith(".json")}
    texts = []
    for path in sorted(added):
        for other in sorted(path.parent.glob("*.json")):
            try:
                hashes = [entries.read_entry(each)["model"]["weights_sha256"] for each in (path, other)]
            except ContentError:
                continue  # said where it is validated
            if other != path and hashes[0] is not None and hashes[0] == hashes[1]:
                texts.append(f"{path.relative_to(root)}: {other.stem} has the same weights: a model has one name.")
    return texts


def _touched(root: Path, found: Sequence[checkouts.Change]) -> list[Path]:
    """The documents of the models that a change touches, and of their neighbours, who must agree on the data."""
    models = {change.model for change in found if change.model}
    folders = {(root / change.path).parent for change in found if change.kind == "entry"}
    return [file for file in _all(root) if _model_of(file) in models or file.parent in folders]


def _model_of(file: Path) -> str:
    return file.parent.name.partition(".")[0] if additions.kind_of(file) else file.stem


def _summary(problems: Problems, tables: str) -> str:
    found = [text for each in problems.values() for text in each]
    if not found:
        return f"## This submission is valid\n\n{tables}\n"
    lines = "\n".join(f"- {board.escape(' '.join(text.split()))}" for text in found)
    mend = "The same check runs locally: `segbench validate --changed origin/main`"
    return f"## This submission has problems\n\n{lines}\n\n{mend}\n"


def _stale(root: Path, after: board.Board) -> list[str]:
    """Which generated tables are not what the content of the checkout gives."""
    return [
        f"{path.relative_to(root)} is stale. Mend: segbench leaderboard, and commit it"
        for path, fresh in board.write_tables(root, after, check=True).items()
        if not fresh
    ]


def _board_before(root: Path, base: str) -> board.Board:
    """The board of a commit of the checkout."""
    files = [
        (path, oid)
        for path, (mode, oid) in checkouts.tree(root, base).items()
        if mode == checkouts.PLAIN and checkouts.Change("", mode, path).model and path.endswith((".json", ".parquet"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("model_zoo", "entries"):
            (Path(folder) / name).mkdir()
        contents = checkouts.blobs(root, [oid for _, oid in files])
        for (path, _), data in zip(files, contents, strict=True):
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_bytes(data)
        migration.migrate(Path(folder) / "entries")
        return board.load(Path(folder), processes=cpu_count() or 1)


def _documents(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [file for file in sorted(path.rglob("*.json")) if file.name != "run.json"]
    if not found:
        raise ContentError(f"{path} holds no card or entry (*.json).")
    return found


def _problems(file: Path) -> list[str]:
    parents = [parent.name for parent in file.resolve().parents]
    if additions.kind_of(file):
        return entries.validate_addition(file)
    published = content.entries_above(file.resolve()) is not None
    if published or _is_entry(file):
        return entries.validate_entry(file.parent.resolve() / file.name, published=published)
    try:
        card = cards.read_card(file)
    except ContentError as error:
        return [str(error)]
    found = entries.card_problems(file, card)
    if len(parents) > 1 and parents[1] == "model_zoo":
        found += entries.card_placement(file, card)
    return found


def _is_entry(file: Path) -> bool:
    try:
        document = schemas.parse(file.read_text("utf-8"), source=str(file))
    except (OSError, UnicodeDecodeError, ContentError):
        return False  # what is wrong with it is said by whoever reads it next
    return isinstance(document, dict) and "claim" in document


@click.command()
@click.argument("entry", type=click.Path(path_type=Path))
@click.option("--json", is_flag=True, help="Print as JSON.")
def verify(entry: Path, json: bool) -> None:
    """Recompute every number of ENTRY (a file, or a model id) from its evidence, and show both. Needs no torch."""
    path = entry_file(entry)
    document = entries.read_entry(path)
    evidence = entries.evidence_of(path, document)
    name = document["evidence"]["file"]
    problems = entries.identity_problems(document, evidence, name)
    compared = list(entries.against_evidence(document, evidence, name))
    wrong = [each for each in compared if not each.agrees]
    if json:
        rows = [each._asdict() for each in compared]
        print_json({"entry": str(path), "agrees": not (wrong or problems), "problems": problems, "values": rows})
    else:
        shown = [each for each in compared if each in wrong or each.field.rpartition(".")[2] in SHOWN]
        print_table(
            ["value", ">stated", ">from the evidence", ""],
            [
                [
                    _field(each.field, document),
                    _value(each.stated),
                    _value(each.computed),
                    "" if each.agrees else "differs",
                ]
                for each in shown
            ],
        )
    for text in problems:
        note(printable(text))
    if wrong or problems:
        fail(f"{len(wrong)} of {len(compared)} values differ from the evidence; {len(problems)} other problems.", 1)
    images = document["dataset"]["images"]
    note(f"{len(compared)} values recomputed from the counts of {images} images: all agree. {path}")


SHOWN = ("aacc", "macc", "miou", "miou_lower_bound")


def _field(field: str, entry: dict[str, object]) -> str:
    """``results.1.miou`` with its ε in place of its number."""
    parts = field.split(".")
    results = entry["results"]
    if parts[0] == "results" and len(parts) > 1 and parts[1].isdigit() and isinstance(results, list):
        parts[:2] = [f"ε = {results[int(parts[1])]['strength']:g}/255"]
    return " ".join(part for part in parts if part != "per_loss")


def _value(value: object) -> str:
    return f"{100 * value:.6f}" if isinstance(value, float) else str(value)


def entry_file(given: Path) -> Path:
    """An entry by its path, or by a model's id if it has one entry with evidence.

    Raises:
        ContentError: there is none, or several.
    """
    if given.suffix == ".json" or given.exists():
        return given
    found = [path for path in entries.entry_paths() if path.stem == str(given)]
    if len(found) != 1:
        known = ", ".join(map(str, found)) or "none"
        raise ContentError(f"{given} names no file, and as a model it has these entries: {known}. Give one of them.")
    return found[0]
