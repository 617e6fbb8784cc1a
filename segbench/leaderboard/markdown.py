"""The leaderboard: entries to a table per data set, cards to a table of models, as markdown between markers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segbench import entries
from segbench.cards import ModelCard
from segbench.errors import ContentError
from segbench.files import write_atomic

START, END = "<!-- tables: written by `segbench leaderboard`, do not edit -->", "<!-- end of tables -->"
MODELS_START, MODELS_END = "<!-- models: written by `segbench leaderboard`, do not edit -->", "<!-- end of models -->"


def load_entries(root: Path | None = None) -> list[dict[str, Any]]:
    """All entries of a checkout, or of the installation, sorted by path.

    Raises:
        ContentError: an entry is damaged.
    """
    return [entries.read_entry(path) for path in entries.entry_paths(root)]


def rank(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Entries of one data set, best first: by the mean worst-case mIoU, then clean mIoU, then id.

    The mean is over the radii that all of them have, so that an entry gains nothing by more small ones.
    """
    radii = [{result["eps_255"] for result in entry["results"]} for entry in rows]
    shared = set.intersection(*radii) if radii else set()

    def key(entry: Mapping[str, Any]) -> tuple[float, float, str]:
        mious = [result["miou"] for result in entry["results"] if result["eps_255"] in shared or not shared]
        return (-sum(mious) / len(mious), -entry["clean"]["miou"], entry["model"]["id"])

    return sorted(rows, key=key)


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a section and a table for each (protocol, data set)."""
    sections = []
    groups = sorted({(entry["protocol"]["name"], entry["dataset"]["id"]) for entry in rows})
    for protocol, dataset in groups:
        members = [
            entry for entry in rows if (entry["protocol"]["name"], entry["dataset"]["id"]) == (protocol, dataset)
        ]
        sections.append(f"## {escape(dataset)} ({escape(protocol)})\n\n{_table(members)}")
    return "\n\n".join(sections) if sections else "No entries yet."


def _table(members: Sequence[Mapping[str, Any]]) -> str:
    radii = sorted({row["eps_255"] for entry in members for row in entry["results"]})
    header = [
        "#",
        "model",
        "architecture",
        "parameters",
        "clean",
        *(f"ε = {eps:g}/255" for eps in radii),
        "warnings",
        "tier",
    ]
    lines = [header, ["--:", ":--", ":--", "--:", "--:", *("--:" for _ in radii), ":--", ":--"]]
    for place, entry in enumerate(rank(members), 1):
        scores = {row["eps_255"]: row for row in entry["results"]}
        parameters = entry["model"]["parameters"]
        lines.append(
            [
                str(place),
                f"`{entry['model']['id']}`",
                escape(entry["model"]["architecture"] or "–"),
                "–" if parameters is None else f"{parameters / 1e6:.2f}M",
                _score(entry["clean"]),
                *(_score(scores[eps]) if eps in scores else "–" for eps in radii),
                escape(", ".join(flag["name"] for flag in entry["flags"] if flag["level"] == "warning") or "none"),
                entry["claim"]["tier"],
            ]
        )
    return (
        "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        + "\n\nEach score: aAcc / mIoU in percent, the worst case over the attacks of the protocol."
    )


def _score(row: Mapping[str, float]) -> str:
    return f"{100 * row['aacc']:.1f} / {100 * row['miou']:.1f}"


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
