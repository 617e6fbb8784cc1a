"""The plots of the index: Vega-Lite made with Altair, without data. ``page.js`` fills in what is ticked and chosen.

Words in braces such as ``{robust}`` are replaced by the page with the score that is shown.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

HEIGHT = 340
SERIES = 8  # as many colours as can be told apart; the page ticks no more
SHAPES = {"reported": "diamond", "checked": "circle", "reproduced": "square"}


def specs() -> dict[str, dict[str, Any]]:
    """Vega-Lite by name: ``curve_miou``, ``curve_aacc`` (against ε), ``pareto`` (clean, robust), ``size``."""
    return {
        "curve_miou": _curve("mIoU"),
        "curve_aacc": _curve("aAcc"),
        "pareto": _pareto(),
        "size": _size(),
    }


@cache
def bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script, of the version that Altair writes for."""
    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version))


def _curve(name: str) -> dict[str, Any]:
    """A score against ε for the ticked rows, with 95% intervals where there are any; data ``curve``."""
    import altair as alt

    metric = name.lower()
    base = alt.Chart(alt.NamedData("curve")).encode(
        x=alt.X("eps:Q", title="ε (over 255)", axis=alt.Axis(tickMinStep=1, grid=False)),
        color=alt.Color(
            "model:N",
            title=None,
            sort=None,
            legend=alt.Legend(orient="bottom", columns=1, labelLimit=320, symbolType="stroke", symbolStrokeWidth=3),
        ),
    )
    title = f"{name} (%)"
    y = alt.Y(f"{metric}:Q", title=title, scale=alt.Scale(domain=[0, 100]))
    tooltip = ["model:N", "eps:Q", f"{metric}:Q", f"{metric}_low:Q", f"{metric}_high:Q"]
    chart = alt.layer(
        base.transform_filter(f"isValid(datum.{metric}_low)")
        .mark_rule(strokeWidth=1.5, opacity=0.7)
        .encode(y=alt.Y(f"{metric}_low:Q", title=title), y2=f"{metric}_high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_point(filled=True, size=50, opacity=1).encode(y=y, tooltip=tooltip),
    )
    return _finished(chart, f"{name} against ε for the ticked models.")


def _pareto() -> dict[str, Any]:
    """Robust against clean score of all rows that are shown, and their Pareto front; data ``points``, ``front``."""
    import altair as alt

    x = alt.X("clean:Q", title="{clean} (%)", scale=alt.Scale(zero=False, padding=12), axis=alt.Axis(tickCount=6))
    front = (
        alt.Chart(alt.NamedData("front"))
        .mark_line(interpolate="step-before", strokeDash=[5, 4], strokeWidth=1.5)
        .encode(x=x, y=alt.Y("robust:Q", title="{robust} (%)"), color=alt.value("#808893"))
    )
    return _finished(alt.layer(front, *_points(x)), "Robust against clean score; the dashed line is the Pareto front.")


def _size() -> dict[str, Any]:
    """Robust score against the number of parameters; data ``points``."""
    import altair as alt

    axis = alt.Axis(grid=False, tickCount=4, format="~r", labelOverlap=True)
    x = alt.X("parameters:Q", title="parameters (millions)", scale=alt.Scale(type="log", padding=12), axis=axis)
    return _finished(alt.layer(*_points(x)), "Robust score against the number of parameters.")


def _points(x: Any) -> list[Any]:
    """A mark for each row, its shape by tier, and the names of the ticked ones."""
    import altair as alt

    tiers = list(SHAPES)
    base = alt.Chart(alt.NamedData("points")).encode(x=x, y=alt.Y("robust:Q", title="{robust} (%)"))
    marks = base.mark_point(filled=True, size=70, opacity=0.85).encode(
        shape=alt.Shape(
            "tier:N",
            title=None,
            scale=alt.Scale(domain=tiers, range=[SHAPES[tier] for tier in tiers]),
            legend=alt.Legend(orient="bottom", columns=3, labelLimit=320),
        ),
        color=alt.Color(
            "ticked:N",
            scale=alt.Scale(domain=[False, True], range=["{point}", "{ticked}"]),
            legend=None,
        ),
        tooltip=["model:N", "tier:N", "clean:Q", "robust:Q", "parameters:Q"],
    )
    names = base.transform_filter("datum.ticked").mark_text(dy=-11, fontSize=11, limit=160).encode(text="model:N")
    return [marks, names]


def _finished(chart: Any, description: str) -> dict[str, Any]:
    whole = (
        chart.properties(width="container", height=HEIGHT, description=description)
        .configure(background="transparent", autosize={"type": "fit", "contains": "padding"})
        .configure_view(stroke=None)
    )
    return cast("dict[str, Any]", whole.to_dict())
