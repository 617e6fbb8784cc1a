"""Tables of entries and of models, as markdown between markers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segbench.cards import ModelCard, card_paths, read_card
from segbench.errors import ContentError
from segbench.files import write_atomic
from segbench.leaderboard.assessment import view_of
from segbench.leaderboard.board import Board, Table
from segbench.protocol import OFFICIAL_RADII_255

START, END = "<!-- tables: written by `segbench leaderboard`, do not edit -->", "<!-- end of tables -->"
MODELS_START, MODELS_END = "<!-- models: written by `segbench leaderboard`, do not edit -->", "<!-- end of models -->"
LEGEND = (
    "Each score: aAcc / mIoU in percent, the worst case over the attacks of the protocol. Rank: by the mean mIoU over "
    "the protocol's radii; shared where a paired bootstrap over images cannot tell two entries apart (95%)."
)
REPORTED = "`reported`: its authors' numbers, without evidence; not measured here."


def render(board: Board) -> str:
    """Markdown: a section and a table for each (data set, protocol)."""
    sections = [f"## {escape(table.dataset)} ({escape(table.protocol)})\n\n{_table(table)}" for table in board.tables]
    return "\n\n".join(sections) if sections else "No entries yet."


def _table(table: Table) -> str:
    shown = [eps for eps in table.radii if eps in OFFICIAL_RADII_255] or table.radii
    header = ["#", "model", "backbone", "parameters", "clean"]
    header += [*(f"ε = {eps:g}/255" for eps in shown), "mean", "warnings", "tier"]
    lines = [header, ["--:", ":--", ":--", "--:", "--:", *("--:" for _ in shown), "--:", ":--", ":--"]]
    lines += [_line(row, shown) for row in table.rows]
    others = [f"{eps:g}/255" for eps in table.radii if eps not in shown]
    notes = [LEGEND]
    if any(row["tier"] == "reported" for row in table.rows):
        notes.append(REPORTED)
    notes += [f"`{row['id']}`: {escape(row['unranked'])}" for row in table.rows if row["unranked"]]
    if others:
        notes.append(f"Some entries also have results at ε = {', '.join(others)}.")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n" + " ".join(notes)


def _line(row: Mapping[str, Any], shown: Sequence[float]) -> list[str]:
    scores = row["scores"]
    mean = scores["mean"]
    warnings = [flag["name"] for flag in row["flags"] if flag["level"] == "warning"]
    return [
        "–" if mean is None or mean["miou"]["rank"] is None else str(mean["miou"]["rank"]),
        f"`{row['id']}`",
        escape(row["backbone"] or row["architecture"] or "–"),
        "–" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f}M",
        score(scores["clean"]),
        *(score(scores[view_of(eps)]) for eps in shown),
        score(mean),
        escape(", ".join(warnings) or ("none" if row["flags"] else "–")),
        row["tier"],
    ]


def score(view: Mapping[str, Any] | None) -> str:
    """AAcc / mIoU of a view in percent."""
    if view is None:
        return "–"
    return " / ".join("–" if view[name] is None else f"{100 * view[name]['value']:.1f}" for name in ("aacc", "miou"))


def escape(text: str) -> str:
    """Text of strangers, harmless in a markdown cell: no markup, no link, no line break, no control character.

    >>> escape("a|b <i>")
    'a&#124;b &lt;i&gt;'
    """
    text = "".join(char for char in text if char.isprintable())
    text = re.sub(r"([\\`*_\[\]()#!~])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    # GitHub also links bare addresses
    return text.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def models_table(zoo: Sequence[ModelCard]) -> str:
    """Markdown: the models whose weights can be had, by data set and clean mIoU, and how many more have a card."""
    rows = [card for card in zoo if card.sources]

    def key(card: ModelCard) -> tuple[str, float, str]:
        return (card.dataset, -((card.expected or {}).get("miou") or 0), card.id)

    lines = [["model", "data set", "what it is", "parameters", "clean aAcc / mIoU", "weights"]]
    lines.append([":--", ":--", ":--", "--:", "--:", ":--"])
    for card in sorted(rows, key=key):
        expected = card.expected or {"aacc": None, "miou": None}
        clean = " / ".join(
            "–" if expected[name] is None else f"{100 * expected[name]:.1f}" for name in ("aacc", "miou")
        )
        lines.append(
            [
                f"`{card.id}`",
                escape(card.dataset),
                escape(card.title),
                "–" if card.parameters is None else f"{card.parameters / 1e6:.2f}M",
                clean,
                WEIGHTS_FROM[card.sources[0]["type"]],
            ]
        )
    more = len(zoo) - len(rows)
    rest = f"\n\n{more} more models have a card, but no published weights: `segbench models`." if more else ""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + rest


WEIGHTS_FROM = {"package": "in this repository", "hub": "Hugging Face Hub", "url": "its authors' link"}


def update(readme: Path, tables: str, *, check: bool, markers: tuple[str, str] = (START, END)) -> bool:
    """Puts ``tables`` between the markers of ``readme``; with ``check`` only compares. True if it was up to date.

    Raises:
        ContentError: the file or its markers are missing.
    """
    try:
        text = readme.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ContentError(f"Cannot read {readme}: {error}") from error
    start, end = markers
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ContentError(f"{readme} must hold these two lines once each, in this order:\n{start}\n{end}")
    before, after = text.split(start)[0], text.split(end)[1]
    new = f"{before}{start}\n\n{tables}\n\n{end}{after}"
    if new != text and not check:
        write_atomic(readme, new.encode())
    return new == text


def write_tables(root: Path, board: Board, *, check: bool = False) -> dict[Path, bool]:
    """Writes the tables of a checkout, or with ``check`` only compares; which files were up to date.

    Raises:
        ContentError: a file or its markers are missing.
    """
    zoo = sorted(map(read_card, card_paths(root / "model_zoo")), key=lambda card: card.id)
    files = [(root / "leaderboard" / "README.md", render(board), (START, END))]
    if (root / "README.md").is_file():
        files.append((root / "README.md", models_table(zoo), (MODELS_START, MODELS_END)))
    return {path: update(path, text, check=check, markers=markers) for path, text, markers in files}
