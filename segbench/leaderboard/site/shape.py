"""What this package shows: rows of a board, and the scores that stand first."""

from __future__ import annotations

from typing import Any

from segbench.leaderboard.board import METRICS, Board, Table

Row = dict[str, Any]

METRIC_NAMES = {"aacc": "aAcc", "miou": "mIoU"}
DEFAULT_VIEW, DEFAULT_METRIC = "mean", "miou"

__all__ = ["DEFAULT_METRIC", "DEFAULT_VIEW", "METRICS", "METRIC_NAMES", "Board", "Row", "Table"]
