"""What this package asks of a board."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Row = dict[str, Any]

METRICS = ("aacc", "miou")
METRIC_NAMES = {"aacc": "aAcc", "miou": "mIoU"}
DEFAULT_VIEW, DEFAULT_METRIC = "mean", "miou"


class Table(Protocol):
    """Entries of one protocol on one data set, best first.

    Attributes:
        protocol: its name.
        dataset: its id; may hold a slash.
        views: what can be ranked by: ``clean``, ``mean`` and radii (numerators over 255).
        radii: all radii of the rows, as numerators over 255.
        class_names: of the data set.
        rows: one dict per entry.
    """

    @property
    def protocol(self) -> str: ...
    @property
    def dataset(self) -> str: ...
    @property
    def views(self) -> Sequence[str]: ...
    @property
    def radii(self) -> Sequence[float]: ...
    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def rows(self) -> Sequence[Row]: ...


class Board(Protocol):
    """All tables."""

    @property
    def tables(self) -> Sequence[Table]: ...
