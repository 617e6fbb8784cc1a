"""The columns of the index: what each holds, and whether it is shown before the reader chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from segbench.leaderboard.site import text
from segbench.leaderboard.site.shape import METRIC_NAMES, METRICS, Row, Table

Content = Callable[[Row], Any]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: name in the URL and in ``page.js``.
        label: of the chooser and for screen readers.
        above, head: the two lines of the header.
        kind: how the template draws a cell, and how ``page.js`` sorts: see ``index.html.j2``.
        shown: before the reader chooses.
        help: one sentence.
        content: of a cell.
    """

    key: str
    label: str
    above: str
    head: str
    kind: str
    shown: bool
    help: str
    content: Content


def columns(table: Table) -> list[Column]:
    """The columns of one table, in order. Rank and model are always shown."""
    chosen = "the score chosen above, mean mIoU at first"
    front = [
        Column("rank", "Rank", "", "rank", "rank", True, f"By {chosen}; = means shared.", lambda row: row),
        Column("model", "Model", "", "model", "model", True, "Its page, and how much of it was checked.",
               lambda row: row),
        Column("score", "Chosen score", "ranked by", "mIoU, mean", "score", True, f"With 95% interval: {chosen}.",
               lambda row: row),
        Column(
            "best", "Best known", "best", "known", "best", True,
            "The chosen score under the strongest attack that anybody has sent in.", lambda row: row,
        ),
    ]  # fmt: skip
    return [*front, *_scores(table), *_about(), *_sources()]


def _scores(table: Table) -> list[Column]:
    made = []
    for view in table.views:
        for metric in METRICS:
            name = METRIC_NAMES[metric]
            usual = view in ("clean", "4", "8", "12")
            label = f"{name}, {text.view_label(view)}"
            above = {"clean": "clean", "mean": "mean"}.get(view) or text.eps(view)
            cell = _score(view, metric)
            made.append(Column(f"{view}.{metric}", label, above, name, "number", usual, "", cell))
    return made


def _score(view: str, metric: str) -> Content:
    def content(row: Row) -> str:
        score = (row["scores"].get(view) or {}).get(metric)
        return text.percent(score["value"] if score else None)

    return content


def _about() -> list[Column]:
    def words(key: str) -> Content:
        return lambda row: text.clean(row[key], 120) if row[key] else text.NOTHING

    def passes(row: Row) -> str:
        return text.count(row["training"]["passes"])

    def run(row: Row) -> str:
        if not row["run"]:
            return text.NOTHING
        device = text.clean(row["run"]["device"] or "", 60)
        return f"{text.duration(row['run']['seconds'])}{', ' if device else ''}{device}"

    return [
        Column("flags", "Flags", "", "flags", "flags", True, "What the checks of the protocol found.", _flags),
        Column("method", "Method", "", "method", "text", True, "How it was trained.", words("method")),
        Column("backbone", "Backbone", "", "backbone", "text", True, "", words("backbone")),
        Column("architecture", "Architecture", "", "architecture", "text", False, "", words("architecture")),
        Column("parameters", "Parameters", "", "params", "number", True, "",
               lambda row: text.parameters(row["parameters"])),
        Column("tier", "Tier", "", "tier", "tier", False, "How far the numbers were checked.", lambda row: row["tier"]),
        Column("extra_data", "Extra data", "extra", "data", "text", False, "", words("extra_data")),
        Column("initialisation", "Initialisation", "", "init", "text", False, "", words("initialisation")),
        Column("training", "Training cost", "training", "passes", "number", False,
               "Forward-backward passes per training image: epochs × (attack steps + 1).", passes),
        Column("run", "Cost of the run", "cost of", "the run", "text", False, "", run),
    ]  # fmt: skip


def _sources() -> list[Column]:
    return [
        Column("paper", "Paper", "", "paper", "links", True, "", _paper),
        Column("weights", "Weights", "", "weights", "links", True, "", _weights),
        Column("evidence", "Evidence", "", "evidence", "links", True, "Entry and integer counts per image.", _evidence),
        Column(
            "licence", "Licence", "", "licence", "text", False, "", lambda row: text.clean(row["licence"] or "–", 80)
        ),
        Column("date", "Date", "", "date", "text", False, "", lambda row: text.clean(row["date"], 20)),
    ]


def _flags(row: Row) -> dict[str, Any]:
    """What is not in order, and a summary of it."""
    loud = [flag for level in ("warning", "note") for flag in row["flags"] if flag["level"] == level]
    if not loud:
        return {"level": "ok", "summary": "none" if row["flags"] else text.NOTHING, "items": []}
    warnings = sum(flag["level"] == "warning" for flag in loud)
    parts = [(warnings, "warning"), (len(loud) - warnings, "note")]
    summary = ", ".join(f"{number} {word}{'s' if number > 1 else ''}" for number, word in parts if number)
    items = [
        {
            "name": text.clean(flag["name"], 60).replace("_", " "),
            "level": flag["level"],
            "text": text.clean(flag["explanation"] or flag["message"], 400),
        }
        for flag in loud
    ]
    return {"level": loud[0]["level"], "summary": summary, "items": items}


def _paper(row: Row) -> list[dict[str, str | None]]:
    paper = row["paper"]
    if not paper:
        return []
    authors = [text.clean(name, 60) for name in paper["authors"] if text.clean(name, 60)]
    first = authors[0].split()[-1] if authors else text.clean(paper["title"], 24)
    label = f"{first}{' et al.' if len(authors) > 1 else ''} {paper['year'] or ''}".strip()
    return [{"label": label, "title": text.clean(paper["title"], 200), "url": text.link(paper["url"])}]


def _weights(row: Row) -> list[dict[str, str | None]]:
    if not row["loadable"]:
        return []
    return [
        {
            "label": text.clean(part["label"], 24),
            "title": f"Weights of {text.clean(row['id'], 80)}: {text.clean(part['label'], 100)}",
            "url": text.link(part["url"]),
        }
        for part in row["weights"]
    ]


def _evidence(row: Row) -> list[dict[str, str | None]]:
    """Filled in by the index, which knows what was copied."""
    files = [("entry", row["entry_file"]), ("counts", row["evidence_file"])]
    name = text.clean(row["id"], 80)
    return [{"label": label, "url": path, "title": f"{label} of {name}"} for label, path in files if path]
