"""The index: a table per data set for readers without JavaScript, and the same numbers as data for ``page.js``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from segbench.leaderboard.site import charts, text
from segbench.leaderboard.site.columns import Column, columns
from segbench.leaderboard.site.files import model_page
from segbench.leaderboard.site.pages import Pages, Script, data_block
from segbench.leaderboard.site.shape import DEFAULT_METRIC, DEFAULT_VIEW, METRICS, Board, Row, Table

Linked = Callable[[str | None], str | None]


def render(pages: Pages, board: Board, linked: Linked, documents: Mapping[str, str]) -> bytes:
    """The index.

    Args:
        pages: templates.
        board: what to show.
        linked: the path of an entry or evidence in the site, or None where it is not copied.
        documents: paths of the documents by name (``read``, ``protocol``, ``submit``), those that exist.
    """
    parts = [_table(table, linked) for table in board.tables]
    data = {
        "tables": [_data(table, part["columns"]) for table, part in zip(board.tables, parts, strict=True)],
        "defaults": {"eps": DEFAULT_VIEW, "metric": DEFAULT_METRIC},
        "specs": charts.specs(),
        "series": charts.SERIES,
    }
    vega = Script(charts.bundle())
    return pages.render(
        "index.html.j2",
        "index.html",
        [pages.page, vega],
        _hiding(max((len(part["columns"]) for part in parts), default=0)),
        tables=parts,
        data=data_block(data),
        script=pages.page.source,
        vega=vega.source,
        documents=documents,
    )


def _hiding(most: int) -> str:
    """A rule for each column that a reader may hide; without JavaScript all are shown."""
    rules = (f".js .h{n} tr>:nth-child({n}),.js .h{n} col:nth-child({n})" for n in range(3, most + 1))
    return ",".join(rules) + "{display:none}" if most > 2 else ""


def _table(table: Table, linked: Linked) -> dict[str, Any]:
    shown = columns(table)
    places = Counter(score["rank"] for row in table.rows if (score := _default(row)))
    return {
        "key": f"{table.protocol}/{table.dataset}",
        "protocol": text.clean(table.protocol, 60),
        "dataset": text.clean(table.dataset, 80),
        "columns": shown,
        "hidden": [number for number, column in enumerate(shown, 1) if not column.shown],
        "rows": [_row(table, row, shown, linked, places) for row in table.rows],
    }


def _row(
    table: Table, row: Row, shown: list[Column], linked: Linked, places: Mapping[int | None, int]
) -> dict[str, Any]:
    values = [column.content(row) for column in shown]
    for number, column in enumerate(shown):
        if column.key == "evidence":
            values[number] = [item | {"url": linked(item["url"])} for item in values[number]]
    score = _default(row)
    rank = score["rank"] if score else None
    return {
        "id": text.clean(row["id"], 120),
        "title": text.clean(row["title"], 160),
        "page": model_page(table, row),
        "tier": row["tier"],
        "loadable": row["loadable"],
        "rank": text.NOTHING if rank is None else f"{'=' if places[rank] > 1 else ''}{rank}",
        "unranked": row["unranked"],
        "score": text.percent(score["value"] if score else None),
        "interval": text.interval(score["interval"]) if score else None,
        "best": text.percent(score["best_known"] if score else None),
        "lower": text.beaten(score),
        "values": values,
    }


def _default(row: Row) -> Mapping[str, Any] | None:
    """The score that the table is sorted by before the reader chooses."""
    score: Mapping[str, Any] | None = (row["scores"].get(DEFAULT_VIEW) or {}).get(DEFAULT_METRIC)
    return score


def _data(table: Table, shown: list[Column]) -> dict[str, Any]:
    return {
        "key": f"{table.protocol}/{table.dataset}",
        "protocol": table.protocol,
        "dataset": table.dataset,
        "views": [{"key": view, "label": text.view_label(view)} for view in table.views],
        "radii": [f"{eps:g}" for eps in table.radii],
        "columns": [
            {"key": column.key, "label": column.label, "kind": column.kind, "shown": column.shown} for column in shown
        ],
        "rows": [_plain(table, row) for row in table.rows],
    }


def _plain(table: Table, row: Row) -> dict[str, Any]:
    """What the page sorts, filters, draws and downloads; a score is [value, low, high, best known, rank]."""
    scores = {}
    for view in table.views:
        pair = row["scores"].get(view)
        scores[view] = [_numbers(pair[metric]) for metric in METRICS] if pair else None
    paper = row["paper"] or {"title": "", "authors": []}
    found = (row["id"], row["title"], row["method"], row["backbone"], row["architecture"], paper["title"])
    words = [*found, *paper["authors"]]
    return {
        "id": text.clean(row["id"], 120),
        "method": text.clean(row["method"] or "", 120),
        "architecture": text.clean(row["architecture"] or "", 120),
        "backbone": text.clean(row["backbone"] or "", 120),
        "parameters": row["parameters"],
        "tier": row["tier"],
        "extra_data": text.clean(row["extra_data"] or "", 120),
        "initialisation": row["initialisation"] or "",
        "training": row["training"]["passes"],
        "run": row["run"]["seconds"] if row["run"] else None,
        "warnings": sum(flag["level"] == "warning" for flag in row["flags"]),
        "notes": sum(flag["level"] == "note" for flag in row["flags"]),
        "paper": text.clean(paper["title"], 200),
        "licence": text.clean(row["licence"] or "", 80),
        "date": text.clean(row["date"], 20),
        "words": text.clean(" ".join(word for word in words if word), 600).casefold(),
        "loadable": row["loadable"],
        "scores": scores,
    }


def _numbers(score: Mapping[str, Any] | None) -> list[float | None] | None:
    if score is None:
        return None
    low, high = score["interval"] or (None, None)
    numbers = (score["value"], low, high, score["best_known"])
    return [*(None if number is None else round(number, 5) for number in numbers), score["rank"]]
