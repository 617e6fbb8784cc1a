"""Charts of what evidence says: curves, classes, attacks, sizes, images. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from segbench.reporting.analysis import View
from segbench.reporting.figures import Figure, chart
from segbench.reporting.style import (
    CLEAN_COLOUR,
    COLOURS,
    GRID,
    HEIGHT,
    LINE,
    METRICS,
    RAMP,
    WIDTH,
    altair,
    finished,
    radii_axis,
)


def of_views(views: Sequence[View], class_names: Sequence[str]) -> list[Figure]:
    """What comes from evidence alone: curves, classes, attacks, sizes, images."""
    return [_curves(views), _classes(views, class_names), _won(views), _sizes(views), _images(views)]


def _curves(views: Sequence[View]) -> Figure:
    alt = altair()
    rows = [
        {
            "eps": view.strength,
            "metric": name,
            "score": 100 * getattr(view, key),
            "low": 100 * getattr(view, f"{key}_95")[0],
            "high": 100 * getattr(view, f"{key}_95")[1],
        }
        for view in views
        for key, name in METRICS.items()
    ]
    colour = alt.Color("metric:N", sort=None, scale=alt.Scale(domain=list(METRICS.values()), range=list(COLOURS[:2])))
    base = alt.Chart(alt.Data(values=rows)).encode(x=radii_axis([view.strength for view in views]), color=colour)
    y = alt.Y("score:Q", title="worst case (%)", scale=alt.Scale(domain=[0, 100]))
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title="worst case (%)"), y2="high:Q")
    layers = alt.layer(
        band, base.mark_line(strokeWidth=2.25).encode(y=y), base.mark_point(filled=True, size=55).encode(y=y)
    )
    return chart(
        "curve",
        "Robustness curve",
        "The worst case over all attacks at each radius; the bands are 95% bootstrap intervals over images.",
        finished(layers.properties(width=2 * WIDTH, height=HEIGHT)),
    )


def _classes(views: Sequence[View], class_names: Sequence[str]) -> Figure:
    alt = altair()
    ious = [view.miou_counts.iou() for view in views]
    present = [place for place in range(len(class_names)) if views[0].miou_counts.target[:, place].any()]
    order = sorted(present, key=lambda place: -ious[0][place])
    names = _distinct([class_names[place] for place in order])
    rows = [
        {"class": name, "view": view.label, "iou": 0.0 if np.isnan(iou[place]) else 100 * float(iou[place])}
        for place, name in zip(order, names, strict=True)
        for view, iou in zip(views, ious, strict=True)
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("class:N", sort=names, title=None))
    x = alt.X("iou:Q", title="IoU (%)", scale=alt.Scale(domain=[0, 100]))
    lines = base.mark_line(color=GRID, strokeWidth=3).encode(x=x, detail="class:N")
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=x, color=alt.Color("view:N", sort=None, scale=_shades(views))
    )
    return chart(
        "classes",
        "What each class loses",
        "IoU of each class that is labelled, sorted by that on clean images; attacked, in the worst case for mIoU.",
        finished(alt.layer(lines, dots).properties(width=2 * WIDTH, height=max(60, LINE * len(names)))),
    )


def _shades(views: Sequence[View]) -> Any:
    """Clean in grey, then from a light to a dark red."""
    attacked = len(views) - 1
    places = [round(number * (len(RAMP) - 1) / max(attacked - 1, 1)) for number in range(attacked)]
    if attacked == 1:
        places = [3]
    colours = [CLEAN_COLOUR, *(RAMP[place] for place in places)]
    return altair().Scale(domain=[view.label for view in views], range=colours)


def _won(views: Sequence[View]) -> Figure:
    alt = altair()
    shares = [
        (view.label, metric, name, share)
        for view in views[1:]
        for key, metric in METRICS.items()
        for name, share in view.won(getattr(view, f"{key}_choice")).items()
    ]
    total: dict[str, float] = {}
    for _, _, name, share in shares:
        total[name] = total.get(name, 0.0) + share
    most = sorted((name for name in total if name != "clean"), key=lambda name: -total[name])[: len(COLOURS) - 1]
    names = [name for name in total if name == "clean" or (name in most and total[name])]
    if any(total[name] for name in total if name not in names):
        names.append("others")
    rows = [
        {"eps": eps, "metric": metric, "attack": name if name in names else "others", "share": 100 * share}
        for eps, metric, name, share in shares
    ]
    rows = [{**row, "order": names.index(str(row["attack"]))} for row in rows if row["share"] or row["attack"] in names]
    colours = [CLEAN_COLOUR, *COLOURS[: len(names) - 1]]
    bars = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(stroke="#ffffff", strokeWidth=0.5)
        .encode(
            y=alt.Y("eps:N", title="ε", sort=[view.label for view in views[1:]]),
            x=alt.X("share:Q", title="images (%)", stack="zero", scale=alt.Scale(domain=[0, 100])),
            color=alt.Color("attack:N", sort=None, scale=alt.Scale(domain=names, range=colours)),
            order="order:Q",
        )
        .properties(width=WIDTH, height=max(40, 34 * (len(views) - 1)))
    )
    panels = [bars.transform_filter(f"datum.metric == '{name}'").properties(title=name) for name in METRICS.values()]
    return chart(
        "attacks",
        "Which attack is the worst, and where",
        "Of how many images the worst case takes which candidate. Of equals the first; clean is the image itself.",
        finished(alt.hconcat(*panels, spacing=30)),
    )


def _sizes(views: Sequence[View]) -> Figure:
    alt = altair()
    rows = [
        {"size": each.name, "view": view.label, "metric": metric, "score": _percent(getattr(each, key))}
        for view in views
        for each in view.strata
        for key, metric in (("aacc", "aAcc"), ("iou", "IoU"))
        if each.segments
    ]
    names = [each.name for each in views[0].strata]
    base = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("size:N", sort=names, title="share of the image", axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("view:N", sort=[view.label for view in views]),
            y=alt.Y("score:Q", title="(%)", scale=alt.Scale(domain=[0, 100])),
            color=alt.Color("view:N", sort=None, scale=_shades(views)),
        )
        .properties(width=WIDTH, height=HEIGHT)
    )
    panels = [base.transform_filter(f"datum.metric == '{name}'").properties(title=name) for name in ("aAcc", "IoU")]
    return chart(
        "sizes",
        "Size of what is labelled",
        "Segments (a class in an image) by the share of the image that they take; their pixels together, "
        "in the worst case for aAcc. IoU counts "
        "what is wrongly seen as the class in that image.",
        finished(alt.hconcat(*panels, spacing=30)),
    )


def _images(views: Sequence[View]) -> Figure:
    alt = altair()
    rows = []
    for view in views:
        accuracy = np.sort(view.accuracy[~np.isnan(view.accuracy)])
        keep = np.unique(np.linspace(0, len(accuracy) - 1, min(len(accuracy), 200)).astype(int))
        rows.append({"view": view.label, "aacc": 100 * float(accuracy[0]), "share": 0.0})
        rows += [
            {"view": view.label, "aacc": 100 * float(accuracy[row]), "share": 100 * (int(row) + 1) / len(accuracy)}
            for row in keep
        ]
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(interpolate="step-after", strokeWidth=2.25)
        .encode(
            x=alt.X("aacc:Q", title="right pixels of an image (%)", scale=alt.Scale(domain=[0, 100])),
            y=alt.Y("share:Q", title="images with at most so many (%)", scale=alt.Scale(domain=[0, 100])),
            color=alt.Color("view:N", sort=None, scale=_shades(views)),
        )
        .properties(width=2 * WIDTH, height=HEIGHT)
    )
    return chart(
        "images",
        "Accuracy of single images",
        "The further up and left a line runs, the more images have fallen.",
        finished(lines),
    )


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of which none is twice: a second one gets a number."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
