"""What a change does to the tables: ranks before and after."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from segbench.leaderboard.board import Board, Table
from segbench.leaderboard.markdown import escape, render, score


class Move(NamedTuple):
    """One model in one table; a rank is None where it has none, ``rows`` the number of entries afterwards."""

    dataset: str
    protocol: str
    model: str
    before: int | None
    after: int | None
    rows: int


def moves(before: Board, after: Board, models: Collection[str]) -> list[Move]:
    """Where ``models`` stand, in every table that holds them."""
    old = _ranks(before)
    counted = {(table.dataset, table.protocol): len(table.rows) for table in after.tables}
    return [Move(*key, old.get(key), rank, counted[key[:2]]) for key, rank in _ranks(after).items() if key[2] in models]


def _ranks(board: Board) -> dict[tuple[str, str, str], int | None]:
    return {
        (table.dataset, table.protocol, row["id"]): row["scores"]["mean"] and row["scores"]["mean"]["miou"]["rank"]
        for table in board.tables
        for row in table.rows
    }


def summary(before: Board, after: Board, models: Collection[str]) -> str:
    """Markdown: ranks before and after, and the tables as they will be; for the summary of a CI job."""
    found = moves(before, after, models)
    if not found:
        return "No table changes.\n"
    lines = ["| model | data set | rank before | rank now | entries |", "| :-- | :-- | --: | --: | --: |"]
    lines += [
        f"| `{move.model}` | {escape(move.dataset)} ({escape(move.protocol)}) | {_text(move.before)} | "
        f"{_text(move.after)} | {move.rows} |"
        for move in found
    ]
    touched = {(move.dataset, move.protocol) for move in found}
    tables = [table for table in after.tables if (table.dataset, table.protocol) in touched]
    return "\n".join(lines) + "\n\n" + render(Board(tables)) + "\n"


def around(table: Table, model: str) -> tuple[list[str], list[list[str]]]:
    """The row of a model and its neighbours: headings (``>`` for right-aligned) and cells, scores as aAcc / mIoU."""
    place = next(place for place, row in enumerate(table.rows) if row["id"] == model)
    views = [view for view in table.views if table.rows[place]["scores"][view]]
    headings = [view if view in ("clean", "mean") else f"ε {view}/255" for view in views]
    rows = []
    for row in table.rows[max(place - 2, 0) : place + 3]:
        mean, mark = row["scores"]["mean"], "->" if row["id"] == model else ""
        cells = [score(row["scores"][view]) for view in views]
        rows.append([mark, _text(mean and mean["miou"]["rank"]), row["id"], *cells, row["tier"]])
    return ["", ">#", "model", *(f">{heading}" for heading in headings), "tier"], rows


def _text(rank: int | None) -> str:
    return "–" if rank is None else str(rank)
