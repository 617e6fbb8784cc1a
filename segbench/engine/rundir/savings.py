"""What a run saved: an image without a correct pixel is decided, and leaves its attack early. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class SavedPasses(NamedTuple):
    """Forward passes that were ``saved``, and ``most``: those of the same units if no image leaves early."""

    saved: int
    most: int

    def __str__(self) -> str:
        if not self.saved:
            return f"No image left early: 0 of {self.most} forward passes saved."
        share = f"{100 * self.saved / self.most:.1f}% of the passes saved ({self.saved} of {self.most})"
        return f"Images without a correct pixel left early: {share}."


def saved_passes(costs: Iterable[Mapping[str, Any]]) -> SavedPasses | None:
    """From the costs of finished units (`Store.costs`); None if none of them tells: older versions did not log it."""
    known = [cost for cost in costs if cost["most_forwards"] is not None and cost["forwards"] is not None]
    most = sum(cost["most_forwards"] for cost in known)
    return SavedPasses(most - sum(cost["forwards"] for cost in known), most) if known else None
