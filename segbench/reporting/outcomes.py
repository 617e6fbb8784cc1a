"""Charts of what attacks beside the protocol found, from the documents of their runs. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from segbench.reporting.figures import Figure, chart
from segbench.reporting.style import COLOURS, HEIGHT, LINE, METRICS, WIDTH, altair, finished, radii_axis, repeated


def comparison(document: Mapping[str, Any], name: str = "comparison") -> Figure:
    """Attacks side by side, each score with its interval."""
    alt = altair()
    rows = [
        {
            "attack": row["attack"],
            "eps": f"{row['strength']:g}/255",
            "metric": metric,
            "score": 100 * row[key],
            "low": 100 * row[f"{key}_95"][0],
            "high": 100 * row[f"{key}_95"][1],
        }
        for row in document["rows"]
        if row["strength"]
        for key, metric in METRICS.items()
    ]
    names = list(dict.fromkeys(row["attack"] for row in rows))
    radii = list(dict.fromkeys(row["eps"] for row in rows))
    colour = alt.Color("eps:N", sort=None, scale=alt.Scale(domain=radii, range=repeated(len(radii))))
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
        finished(alt.hconcat(*panels, spacing=20)),
    )


def sweep(document: Mapping[str, Any], name: str = "sweep") -> Figure:
    """Scores against the number of iterations, with their range over seeds; at one number against the attack."""
    alt = altair()
    rows = [
        {
            "attack": row["attack"]
            if len(document_radii(document)) == 1
            else f"{row['attack']}, {row['strength']:g}/255",
            "iterations": row["iterations"],
            "metric": metric,
            "score": 100 * row[key],
            "low": 100 * row[f"{key}_range"][0],
            "high": 100 * row[f"{key}_range"][1],
        }
        for row in document["summary"]
        if row["strength"]
        for key, metric in METRICS.items()
    ]
    names = list(dict.fromkeys(row["attack"] for row in rows))
    colour = alt.Color("attack:N", sort=None, scale=alt.Scale(domain=names, range=repeated(len(names))))
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
        finished(alt.hconcat(*panels, spacing=30)),
    )


def document_radii(document: Mapping[str, Any]) -> list[float]:
    """The attacked radii of a sweep."""
    return sorted({row["strength"] for row in document["summary"] if row["strength"]})


def targeted(document: Mapping[str, Any], name: str = "targeted") -> Figure:
    """Share of pixels that are seen as the target, against ε."""
    alt = altair()
    rows = [
        {
            "class": row["class"],
            "eps": row["strength"],
            "score": 100 * row["success"],
            "low": 100 * row["success_95"][0],
            "high": 100 * row["success_95"][1],
        }
        for row in document["rows"]
    ]
    names = list(dict.fromkeys(row["class"] for row in rows))
    colour = alt.Color("class:N", sort=None, scale=alt.Scale(domain=names, range=repeated(len(names))))
    base = alt.Chart(alt.Data(values=rows)).encode(x=radii_axis([row["eps"] for row in rows]), color=colour)
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
        finished(layers.properties(width=2 * WIDTH, height=HEIGHT)),
    )


def minimum(document: Mapping[str, Any], name: str = "minimum") -> Figure:
    """The share of images that are broken, against ε."""
    alt = altair()
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
            y=alt.Y("share:Q", title="images broken (%)", scale=alt.Scale(domain=[0, 100])),
        )
        .properties(width=2 * WIDTH, height=HEIGHT)
    )
    wrong = f"{100 * (1 - document['share_right']):g}%"
    standing = images - len(found)
    left = f" {standing} of {images} images stand at {largest:g}/255." if standing else ""
    return chart(
        name,
        "The smallest ε that breaks an image",
        f"An image is broken when {wrong} of its pixels are wrong; found by bisection with "
        f"{', '.join(document['attacks'])}.{left}",
        finished(line),
    )
