"""The look of all charts. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from segbench.errors import SegbenchError
from segbench.reporting.figures import INSTALL

WIDTH, HEIGHT = 340, 250  # of a panel
LINE = 19  # height of a row of names
# Okabe and Ito: most colour-blind people tell them apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b", "#8a6d1b")
CLEAN_COLOUR = "#9aa0a6"
RAMP = ("#fdbb84", "#fc8d59", "#e34a33", "#b30000", "#7f0000", "#4d0000")  # from small to large ε
INK, SOFT, GRID = "#1d2126", "#565d66", "#e8e5df"
METRICS = {"aacc": "aAcc", "miou": "mIoU"}


def altair() -> Any:
    try:
        import altair as library
    except ImportError as error:
        raise SegbenchError(INSTALL) from error
    return library


def finished(spec: Any) -> Any:
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


def radii_axis(values: Sequence[float]) -> Any:
    alt = altair()
    return alt.X(
        "eps:Q",
        title="ε (over 255)",
        axis=alt.Axis(values=sorted({0.0, *values}), grid=False, format="~g", labelOverlap=True),
    )


def repeated(number: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(number)]
