"""The leaderboard: entries and cards to tables, ranks, markdown and a site."""

from segbench.leaderboard.board import Board, Table, document, load
from segbench.leaderboard.markdown import (
    END,
    MODELS_END,
    MODELS_START,
    START,
    escape,
    models_table,
    render,
    update,
    write_tables,
)

__all__ = [
    "END",
    "MODELS_END",
    "MODELS_START",
    "START",
    "Board",
    "Table",
    "document",
    "escape",
    "load",
    "models_table",
    "render",
    "update",
    "write_tables",
]
