"""The numbers to download: JSON with everything, CSV with a line per entry and radius."""

from __future__ import annotations

import csv
import json
from typing import Any

from segbench.leaderboard.board import document
from segbench.leaderboard.site.shape import METRICS, Board, Row, Table
from segbench.leaderboard.site.text import clean
from segbench.protocol import Threat

# what makes a spreadsheet read a cell as a formula, and the full-width forms that some of them fold
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def to_json(board: Board) -> str:
    """Everything on the board but the per-class and per-image details of the model pages."""
    return json.dumps(document(board), separators=(",", ":"), allow_nan=False) + "\n"


def to_csv(board: Board) -> str:
    """A line per entry and radius; ``strength`` 0 is the clean score. Fractions, not percent."""
    import pandas as pd

    lines = [line for table in board.tables for row in table.rows for line in _lines(table, row)]
    columns = list(lines[0]) if lines else ["protocol", "dataset", "threat", "id", "strength", "eps_255"]
    frame = pd.DataFrame(lines, columns=columns, dtype=object)  # or whole numbers become floats
    for name in frame.columns:
        frame[name] = frame[name].map(lambda value: cell(value) if isinstance(value, str) else value)
    return str(frame.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n"))


def cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula.

    >>> cell("=1+1"), cell("PIR-AT"), cell(" @x")
    ("'=1+1", 'PIR-AT', "'@x")
    """
    text = clean(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _lines(table: Table, row: Row) -> list[dict[str, Any]]:
    training, paper, run = row["training"], row["paper"] or {}, row["run"] or {}
    about = {
        "protocol": table.protocol,
        "dataset": table.dataset,
        "threat": table.threat["kind"],
        "id": row["id"],
        "title": row["title"],
        "method": row["method"],
        "architecture": row["architecture"],
        "backbone": row["backbone"],
        "parameters": _whole(row["parameters"]),
        "tier": row["tier"],
        "source": row["source"],
        "extra_data": row["extra_data"],
        "initialisation": row["initialisation"],
        "licence": row["licence"],
        "training_eps_255": training["eps_255"],
        "attack_steps": _whole(training["attack_steps"]),
        "epochs": _whole(training["epochs"]),
        "training_passes": _whole(training["passes"]),
    }
    tail = {
        "warnings": " ".join(flag["name"] for flag in row["flags"] if flag["level"] == "warning"),
        "run_seconds": run.get("seconds"),
        "run_device": run.get("device"),
        "paper": paper.get("url"),
        "entry": row["entry_file"],
        "date": row["date"],
    }
    bounds = {f"{part['strength']:g}": part["miou_lower_bound"] for part in row["results"]}
    lines, threat = [], Threat(**table.threat)
    for view in ("clean", *(f"{eps:g}" for eps in table.radii)):
        scores = row["scores"].get(view)
        if scores is None:
            continue
        values: dict[str, Any] = threat.names(0.0 if view == "clean" else float(view))
        for metric in METRICS:
            score = scores[metric] or {"value": None, "interval": None, "best_known": None, "rank": None}
            low, high = score["interval"] or (None, None)
            values |= {metric: score["value"], f"{metric}_low": low, f"{metric}_high": high}
            values |= {f"{metric}_best_known": score["best_known"], f"{metric}_rank": _whole(score["rank"])}
        lines.append(about | values | {"miou_lower_bound": bounds.get(view)} | tail)
    return lines


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)
