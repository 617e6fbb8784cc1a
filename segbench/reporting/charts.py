"""The charts of a report. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from segbench.errors import SegbenchError
from segbench.reporting.analysis import View
from segbench.reporting.figures import INSTALL, Figure, chart

WIDTH, HEIGHT = 340, 250  # of a panel
LINE = 19  # height of a row of names
# Okabe and Ito: most colour-blind people tell them apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b", "#8a6d1b")
CLEAN = "#9aa0a6"
INK, SOFT, GRID = "#1d2126", "#565d66", "#e8e5df"
METRICS = {"aacc": "aAcc", "miou": "mIoU"}


def of_views(views: Sequence[View], class_names: Sequence[str]) -> list[Figure]:
    """What comes from evidence alone: curves, classes, attacks, sizes, images."""
    return [_curves(views), _classes(views, class_names), _won(views), _sizes(views), _images(views)]


def _altair() -> Any:
    try:
        import altair
    except ImportError as error:
        raise SegbenchError(INSTALL) from error
    return altair


def _finished(spec: Any) -> Any:
    """The look of all charts."""
    return (
        spec.configure(background="#ffffff", padding=8)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=SOFT, titleColor=INK, labelFontSize=12, titleFontSize=12, titleFontWeight="normal",
            gridColor=GRID, domainColor=SOFT, tickColor=SOFT, labelLimit=220,
        )
        .configure_legend(
            orient="bottom", title=None, labelColor=INK, labelFontSize=12, labelLimit=300, symbolOpacity=1, columns=4
        )
        .configure_title(color=INK, fontSize=13, fontWeight="bold", anchor="start")
    )  # fmt: skip


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _radii(values: Sequence[float]) -> Any:
    alt = _altair()
    return alt.X(
        "eps:Q",
        title="ε (over 255)",
        axis=alt.Axis(values=sorted({0.0, *values}), grid=False, format="~g", labelOverlap=True),
    )


def _curves(views: Sequence[View]) -> Figure:
    alt = _altair()
    rows = [
        {
            "eps": view.eps_255,
            "metric": name,
            "score": 100 * getattr(view, key),
            "low": 100 * getattr(view, f"{key}_95")[0],
            "high": 100 * getattr(view, f"{key}_95")[1],
        }
        for view in views
        for key, name in METRICS.items()
    ]
    colour = alt.Color("metric:N", sort=None, scale=alt.Scale(domain=list(METRICS.values()), range=list(COLOURS[:2])))
    base = alt.Chart(alt.Data(values=rows)).encode(x=_radii([view.eps_255 for view in views]), color=colour)
    y = alt.Y("score:Q", title="worst case (%)", scale=alt.Scale(domain=[0, 100]))
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title="worst case (%)"), y2="high:Q")
    layers = alt.layer(
        band, base.mark_line(strokeWidth=2.25).encode(y=y), base.mark_point(filled=True, size=55).encode(y=y)
    )
    return chart(
        "curve",
        "Robustness curve",
        "The worst case over all attacks at each radius; the bands are 95% bootstrap intervals over images.",
        _finished(layers.properties(width=2 * WIDTH, height=HEIGHT)),
    )


def _classes(views: Sequence[View], class_names: Sequence[str]) -> Figure:
    alt = _altair()
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
        _finished(alt.layer(lines, dots).properties(width=2 * WIDTH, height=max(60, LINE * len(names)))),
    )


def _shades(views: Sequence[View]) -> Any:
    """Clean in grey, then from a light to a dark red."""
    ramp = ["#fdbb84", "#fc8d59", "#e34a33", "#b30000", "#7f0000", "#4d0000"]
    attacked = len(views) - 1
    places = [round(number * (len(ramp) - 1) / max(attacked - 1, 1)) for number in range(attacked)]
    if attacked == 1:
        places = [3]
    return _altair().Scale(domain=[view.label for view in views], range=[CLEAN, *(ramp[place] for place in places)])


def _won(views: Sequence[View]) -> Figure:
    alt = _altair()
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
    colours = [CLEAN, *COLOURS[: len(names) - 1]]
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
        _finished(alt.hconcat(*panels, spacing=30)),
    )


def _sizes(views: Sequence[View]) -> Figure:
    alt = _altair()
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
        "Segments (a class in an image) by the share of the image that they take; their pixels together. IoU counts "
        "what is wrongly seen as the class in that image.",
        _finished(alt.hconcat(*panels, spacing=30)),
    )


def _images(views: Sequence[View]) -> Figure:
    alt = _altair()
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
        _finished(lines),
    )


def comparison(document: Mapping[str, Any], name: str = "comparison") -> Figure:
    """Attacks side by side, each score with its interval."""
    alt = _altair()
    rows = [
        {
            "attack": row["attack"],
            "eps": f"{row['eps_255']:g}/255",
            "metric": metric,
            "score": 100 * row[key],
            "low": 100 * row[f"{key}_95"][0],
            "high": 100 * row[f"{key}_95"][1],
        }
        for row in document["rows"]
        if row["eps_255"]
        for key, metric in METRICS.items()
    ]
    names = list(dict.fromkeys(row["attack"] for row in rows))
    radii = list(dict.fromkeys(row["eps"] for row in rows))
    colour = alt.Color("eps:N", sort=None, scale=alt.Scale(domain=radii, range=_repeated(len(radii))))
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("attack:N", sort=names, title=None), color=colour)
    near = alt.Scale(zero=False, padding=6)
    layers = alt.layer(
        base.mark_rule(strokeWidth=2, opacity=0.45).encode(x=alt.X("low:Q", title="(%)", scale=near), x2="high:Q"),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=alt.X("score:Q", title="(%)", scale=near)),
    ).properties(width=WIDTH - 40, height=LINE * len(names))
    panels = [layers.transform_filter(f"datum.metric == '{each}'").properties(title=each) for each in METRICS.values()]
    return chart(
        name,
        "Attacks compared",
        f"The lower, the stronger; {document['iterations']} iterations each. Lines are 95% bootstrap intervals over "
        "images. Ensembles choose among their attacks for each image.",
        _finished(alt.hconcat(*panels, spacing=20)),
    )


def sweep(document: Mapping[str, Any], name: str = "sweep") -> Figure:
    """Scores against the number of iterations, with their range over seeds; at one number against the attack."""
    alt = _altair()
    rows = [
        {
            "attack": row["attack"]
            if len(document_radii(document)) == 1
            else f"{row['attack']}, {row['eps_255']:g}/255",
            "iterations": row["iterations"],
            "metric": metric,
            "score": 100 * row[key],
            "low": 100 * row[f"{key}_range"][0],
            "high": 100 * row[f"{key}_range"][1],
        }
        for row in document["summary"]
        if row["eps_255"]
        for key, metric in METRICS.items()
    ]
    names = list(dict.fromkeys(row["attack"] for row in rows))
    colour = alt.Color("attack:N", sort=None, scale=alt.Scale(domain=names, range=_repeated(len(names))))
    several = len(document["iterations"]) > 1
    x = (
        alt.X(
            "iterations:Q",
            axis=alt.Axis(values=document["iterations"], grid=False),
            scale=alt.Scale(zero=False, padding=10),
        )
        if several
        else alt.X("attack:N", sort=names, title=None, axis=alt.Axis(labelAngle=-40))
    )
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=colour)
    scale = alt.Scale(zero=False, padding=8)
    y = alt.Y("score:Q", title="(%)", scale=scale)
    layers = [
        base.mark_rule(strokeWidth=2, opacity=0.5).encode(y=alt.Y("low:Q", title="(%)", scale=scale), y2="high:Q"),
        base.mark_point(filled=True, size=55, opacity=1).encode(y=y),
        *([base.mark_line(strokeWidth=2).encode(y=y)] if several else []),
    ]
    both = alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)
    panels = [both.transform_filter(f"datum.metric == '{each}'").properties(title=each) for each in METRICS.values()]
    seeds = len(document["seeds"])
    return chart(
        name,
        "What more iterations change" if several else "What luck changes",
        f"Mean over {seeds} seed{'s' if seeds > 1 else ''}; bars are from the lowest to the highest of them.",
        _finished(alt.hconcat(*panels, spacing=30)),
    )


def document_radii(document: Mapping[str, Any]) -> list[float]:
    """The attacked radii of a sweep."""
    return sorted({row["eps_255"] for row in document["summary"] if row["eps_255"]})


def targeted(document: Mapping[str, Any], name: str = "targeted") -> Figure:
    """Share of pixels that are seen as the target, against ε."""
    alt = _altair()
    rows = [
        {
            "class": row["class"],
            "eps": row["eps_255"],
            "score": 100 * row["success"],
            "low": 100 * row["success_95"][0],
            "high": 100 * row["success_95"][1],
        }
        for row in document["rows"]
    ]
    names = list(dict.fromkeys(row["class"] for row in rows))
    colour = alt.Color("class:N", sort=None, scale=alt.Scale(domain=names, range=_repeated(len(names))))
    base = alt.Chart(alt.Data(values=rows)).encode(x=_radii([row["eps"] for row in rows]), color=colour)
    y = alt.Y("score:Q", title="pixels seen as the target (%)", scale=alt.Scale(domain=[0, 100]))
    layers = alt.layer(
        base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q", title="pixels seen as the target (%)"), y2="high:Q"),
        base.mark_line(strokeWidth=2.25).encode(y=y),
        base.mark_point(filled=True, size=55, opacity=1).encode(y=y),
    )
    return chart(
        name,
        "Targeted attacks",
        "Every pixel is drawn to one class. At ε = 0 the share that is seen as it without an attack. Bands are 95% "
        "bootstrap intervals over images.",
        _finished(layers.properties(width=2 * WIDTH, height=HEIGHT)),
    )


def minimum(document: Mapping[str, Any], name: str = "minimum") -> Figure:
    """The share of images that have fallen, against ε."""
    alt = _altair()
    found = sorted(eps for eps in document["eps_255"] if eps is not None)
    images, largest = len(document["eps_255"]), document["largest_eps_255"]
    rows = [{"eps": 0.0, "share": 100 * sum(eps == 0 for eps in found) / images}]
    rows += [{"eps": eps, "share": 100 * (place + 1) / images} for place, eps in enumerate(found) if eps]
    rows.append({"eps": largest, "share": 100 * len(found) / images})
    line = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(interpolate="step-after", strokeWidth=2.25, color=COLOURS[0])
        .encode(
            x=alt.X("eps:Q", title="ε (over 255)", scale=alt.Scale(domain=[0, largest], nice=False)),
            y=alt.Y("share:Q", title="images that have fallen (%)", scale=alt.Scale(domain=[0, 100])),
        )
        .properties(width=2 * WIDTH, height=HEIGHT)
    )
    wrong = f"{100 * (1 - document['share_right']):g}%"
    standing = images - len(found)
    left = f" {standing} of {images} images stand at {largest:g}/255." if standing else ""
    return chart(
        name,
        "The smallest ε that breaks an image",
        f"An image has fallen when {wrong} of its pixels are wrong; found by bisection with "
        f"{', '.join(document['attacks'])}.{left}",
        _finished(line),
    )


def _repeated(number: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(number)]


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of which none is twice: a second one gets a number."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
