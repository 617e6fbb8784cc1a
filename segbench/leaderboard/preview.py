"""What a change does to the tables: ranks before and after."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from segbench.leaderboard.board import Board
from segbench.leaderboard.markdown import escape, render


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


def _text(rank: int | None) -> str:
    return "–" if rank is None else str(rank)
