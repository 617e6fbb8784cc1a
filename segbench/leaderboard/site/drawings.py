"""Geometry of the small drawings on model pages; the templates write them as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from segbench.leaderboard.site import text
from segbench.leaderboard.site.shape import METRIC_NAMES, METRICS, Row, Table

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 38, 52, 12, 34
BARS = 20
BAR_WIDTH, BAR_HEIGHT = 10, 80


def curve(table: Table, row: Row) -> dict[str, Any]:
    """Both scores against ε, with intervals; the points of the clean image are at ε = 0."""
    views = [view for view in table.views if view != "mean" and row["scores"].get(view)]
    radii = {view: 0.0 if view == "clean" else float(view) for view in views}
    largest = max(radii.values(), default=0.0) or 1.0

    def x(view: str) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * radii[view] / largest, 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - value), 1)

    lines = []
    for metric in reversed(METRICS):
        scores = [(view, row["scores"][view][metric]) for view in views if row["scores"][view][metric]]
        points = [{"x": x(view), "y": y(score["value"])} for view, score in scores]
        bars = [
            {"x": x(view), "low": y(score["interval"][0]), "high": y(score["interval"][1])}
            for view, score in scores
            if score["interval"]
        ]
        path = " ".join(f"{point['x']},{point['y']}" for point in points)
        lines.append({"name": METRIC_NAMES[metric], "metric": metric, "points": points, "bars": bars, "path": path})
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "lines": lines,
        "labels": _apart(lines),
        "x_ticks": [{"x": x(view), "label": f"{radii[view]:g}"} for view in _spread(views, radii, largest)],
        "y_ticks": [{"y": y(k / 4), "label": str(25 * k)} for k in range(5)],
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "description": "; ".join(_sentence(views, row, metric) for metric in reversed(METRICS)),
    }


def _apart(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The names of the lines at their ends, moved so that they do not cover each other."""
    ends = [{"name": line["name"], "metric": line["metric"], **line["points"][-1]} for line in lines if line["points"]]
    ends.sort(key=lambda end: end["y"])
    for above, below in pairwise(ends):
        gap = 14 - (below["y"] - above["y"])
        if gap > 0:
            above["y"] = round(above["y"] - gap / 2, 1)
            below["y"] = round(below["y"] + gap / 2, 1)
    return ends


def _spread(views: Sequence[str], radii: dict[str, float], largest: float) -> list[str]:
    """Views whose tick labels do not touch, the largest radius first."""
    kept: list[str] = []
    for view in sorted(views, key=lambda view: -radii[view]):
        if all(abs(radii[view] - radii[other]) > largest / 16 for other in kept):
            kept.append(view)
    return sorted(kept, key=lambda view: radii[view])


def _sentence(views: Sequence[str], row: Row, metric: str) -> str:
    values = [
        f"{text.percent(row['scores'][view][metric]['value'])} at {'0' if view == 'clean' else text.eps(view)}"
        for view in views
        if row["scores"][view][metric]
    ]
    return f"{METRIC_NAMES[metric]} in percent: {', '.join(values)}"


def histograms(table: Table, row: Row) -> list[dict[str, Any]]:
    """How many images have which accuracy, for each view; one scale for all."""
    detail = row["detail"]
    if not detail:
        return []
    counts = {view: detail["histogram"][view] for view in table.views if view in detail["histogram"]}
    highest = max((max(values) for values in counts.values()), default=0) or 1
    return [_histogram(view, values, highest) for view, values in counts.items()]


def _histogram(view: str, values: Sequence[int], highest: int) -> dict[str, Any]:
    total = sum(values) or 1
    bars = []
    for number, value in enumerate(values):
        height = round(BAR_HEIGHT * value / highest, 1)
        bars.append({"x": number * BAR_WIDTH, "y": round(BAR_HEIGHT - height, 1), "height": height, "value": value})
    low = sum(values[: BARS // 2])
    return {
        "view": text.view_label(view),
        "bars": [bar for bar in bars if bar["value"]],
        "values": list(values),
        "description": (
            f"{low} of {total} images have less than half of their pixels right; "
            f"{values[-1]} have at least 95 percent right."
        ),
    }
