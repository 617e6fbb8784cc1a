"""Curves of a run: loss, learning rate and scores against the epoch, as SVG and PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segbench.files import write_atomic

SVG, PNG = "curves.svg", "curves.png"
NOTE = f"{SVG} and {PNG} need altair and vl-convert-python. Install them: pip install 'segbench[train]'"

WIDTH, HEIGHT = 400, 260  # of a panel
DOTS = 40  # values of a line up to which each has a dot
LINE = 54  # characters of the title over a panel
INK, SOFT, GRID, GROUND = "#1d2126", "#565d66", "#e8e5df", "#ffffff"
RATE = "#8a6d1b"
CLEAN, ROBUST = "#0072b2", "#d55e00"  # Okabe and Ito: most colour-blind people tell them apart, and the shapes differ
CIRCLE, TRIANGLE = "circle", "triangle-up"
SOLID, DASHED = [1, 0], [5, 3]
SERIES = {  # name, colour, fill, shape
    "clean_miou": ("clean mIoU", CLEAN, CLEAN, CIRCLE),
    "clean_aacc": ("clean aAcc", CLEAN, GROUND, CIRCLE),
    "robust_miou": ("robust mIoU", ROBUST, ROBUST, TRIANGLE),
    "robust_aacc": ("robust aAcc", ROBUST, GROUND, TRIANGLE),
}


def draw(folder: Path, rows: Sequence[Mapping[str, Any]], title: str) -> tuple[Path, Path] | None:
    """Writes ``curves.svg`` and ``curves.png``.

    Args:
        folder: of the run.
        rows: of all epochs, as in `segbench.training.metrics.write`.
        title: one line for people. It is only ever shown as text.

    Returns:
        Their paths; None if a library is missing: `NOTE` says how to get it.
    """
    try:
        import altair as alt
        import vl_convert
    except ImportError:
        return None
    spec = _spec(rows, title)
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    svg = vl_convert.vegalite_to_svg(spec, vl_version=version)
    png = vl_convert.vegalite_to_png(spec, vl_version=version, scale=2)
    write_atomic(folder / SVG, svg.encode())
    write_atomic(folder / PNG, png)
    return folder / SVG, folder / PNG


def _spec(rows: Sequence[Mapping[str, Any]], title: str) -> dict[str, Any]:
    """Both panels as Vega-Lite; the one of the scores is left out where none were measured."""
    import altair as alt

    epochs = [{key: row[key] for key in ("epoch", "loss", "learning_rate")} for row in rows]
    scores = [
        {"epoch": row["epoch"], "score": 100 * row[column], "series": name, "metric": name.split()[1]}
        for row in rows
        for column, (name, *_) in SERIES.items()
        if row[column] is not None
    ]
    last = max((row["epoch"] for row in rows), default=1)
    panels = [_training(epochs, last), *([_scores(scores, last)] if scores else [])]
    text = alt.TitleParams(text=_lines(title, LINE * len(panels)), anchor="start", fontSize=15, color=INK, offset=14)
    independent: dict[str, Any] = dict.fromkeys(("color", "stroke", "fill", "shape", "strokeDash"), "independent")
    chart = (
        alt.hconcat(*panels, spacing=36, title=text, background=GROUND, padding=16)
        .resolve_scale(**independent)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=SOFT, titleColor=INK, labelFontSize=11, titleFontSize=12, titleFontWeight="normal",
            titlePadding=8, gridColor=GRID, domainColor=SOFT, tickColor=SOFT, labelFlush=False,
        )
        .configure_legend(orient="bottom", title=None, labelColor=INK, labelFontSize=12)
    )  # fmt: skip
    return {**chart.to_dict(), "datasets": {"epochs": epochs, "scores": scores}}  # Altair would look at each number


def _training(epochs: Sequence[Mapping[str, Any]], last: int) -> Any:
    """The loss, and thin the learning rate, which has an axis of its own; data ``epochs``."""
    import altair as alt

    names = ["loss", "learning rate"]
    colour = alt.Scale(domain=names, range=[INK, RATE])
    legend = alt.Legend(columns=2, symbolType="stroke", symbolStrokeWidth=2)
    loss_axis = alt.Axis(title="training loss", tickCount=6)
    rate_axis = alt.Axis(
        title="learning rate", orient="right", grid=False, tickCount=5, titleColor=RATE, labelColor=RATE,
        labelExpr="format(datum.value, datum.value && datum.value < 0.01 ? '~e' : '~g')",
    )  # fmt: skip

    def line(column: str, name: str, axis: Any, **style: Any) -> Any:
        highest = max((row[column] for row in epochs), default=0) or 1  # a learning rate of 0 needs an axis, too
        scale = alt.Scale(domain=[0, highest], nice=True)
        return (
            alt.Chart(alt.NamedData("epochs"))
            .transform_calculate(line=f"'{name}'")
            .mark_line(**style)
            .encode(
                x=_epochs(last),
                y=alt.Y(f"{column}:Q", axis=axis, scale=scale),
                color=alt.Color("line:N", scale=colour, legend=legend),
            )
        )

    few = len(epochs) <= DOTS
    loss = line("loss", names[0], loss_axis, strokeWidth=2.25 if few else 1.25, point={"size": 22} if few else False)
    rate = line("learning_rate", names[1], rate_axis, strokeWidth=1, point={"size": 14} if last == 1 else False)
    return alt.layer(loss, rate).resolve_scale(y="independent").properties(width=WIDTH, height=HEIGHT)


def _scores(scores: Sequence[Mapping[str, Any]], last: int) -> Any:
    """Scores, clean and robust, in the epochs where they were measured; data ``scores``."""
    import altair as alt

    names, colours, fills, shapes = (list(each) for each in zip(*SERIES.values(), strict=True))
    few = len(scores) <= DOTS * len(SERIES)
    legend = alt.Legend(columns=len(SERIES), symbolType=alt.Undefined if few else "stroke")

    def scale(these: list[Any]) -> Any:
        return alt.Scale(domain=names, range=these)

    base = alt.Chart(alt.NamedData("scores")).encode(
        x=_epochs(last),
        y=alt.Y("score:Q", title="score on held-out images (%)", scale=alt.Scale(domain=[0, 100])),
        stroke=alt.Stroke("series:N", scale=scale(colours), legend=legend),
    )
    if few:  # the legend shows dots, which must not be dashed
        metric = alt.Scale(domain=["mIoU", "aAcc"], range=[SOLID, DASHED])
        dash = alt.StrokeDash("metric:N", scale=metric, legend=None)
    else:
        dash = alt.StrokeDash("series:N", scale=scale([SOLID, DASHED, SOLID, DASHED]), legend=legend)
    lines = base.mark_line(strokeWidth=1.75).encode(strokeDash=dash)
    dots = base.mark_point(size=42, opacity=1, strokeWidth=1.75).encode(
        fill=alt.Fill("series:N", scale=scale(fills), legend=legend),
        shape=alt.Shape("series:N", scale=scale(shapes), legend=legend),
    )
    return alt.layer(lines, *([dots] if few else [])).properties(width=WIDTH, height=HEIGHT)


def _epochs(last: int) -> Any:
    """The axis of both panels."""
    import altair as alt

    ticks: dict[str, Any] = {"values": list(range(last + 1))} if last <= 8 else {"tickCount": 8}
    return alt.X(
        "epoch:Q",
        scale=alt.Scale(domain=[0, last], nice=False),
        axis=alt.Axis(title="epoch", format="d", grid=False, **ticks),
    )


def _lines(title: str, width: int) -> list[str]:
    r"""The title, broken where it is long, without what is not for the eye: an SVG must not hold control characters.

    >>> _lines("one\x00 two\n", 54)
    ['one two']
    """
    plain = "".join(letter if letter.isprintable() else " " for letter in title)
    return textwrap.wrap(" ".join(plain.split()), width) or [""]
