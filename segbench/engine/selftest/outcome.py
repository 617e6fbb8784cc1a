"""What a check of the self-test says."""

from __future__ import annotations

from typing import NamedTuple

OK, DIFFERS, NOT_AVAILABLE = "ok", "differs", "not available"


class Outcome(NamedTuple):
    """``status`` is `OK`, `DIFFERS` or `NOT_AVAILABLE`; ``value`` the number that decided, if there is one."""

    status: str
    detail: str
    value: float | None = None


def at_most(value: float, limit: float, detail: str) -> Outcome:
    """OK up to a limit; a value that is no number differs.

    >>> at_most(0.5, 1, "x").status, at_most(2, 1, "x").status, at_most(float("nan"), 1, "x").status
    ('ok', 'differs', 'differs')
    """
    return Outcome(OK if value <= limit else DIFFERS, f"{detail} (limit {limit:g})", value)
