"""What a run saved: an image that is decided, because no correct pixel is left, leaves its attack early. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from segbench.engine.rundir.plan import loss_of_unit
from segbench.evidence import CLEAN


class SavedPasses(NamedTuple):
    """Forward passes that were ``saved``, and ``most``: those of the same units if no image leaves early."""

    saved: int
    most: int

    def __str__(self) -> str:
        if not self.saved:
            return f"No attack was decided early: 0 of {self.most} forward passes saved."
        share = f"{100 * self.saved / self.most:.1f}% of the forward passes ({self.saved} of {self.most})"
        return f"Attacks that were decided early saved {share}."


def saved_passes(costs: Mapping[str, Mapping[str, Any] | None]) -> SavedPasses | None:
    """From the costs of finished units (`Store.costs_of`); None without an attack, or if the log lacks one.

    Older versions did not log it, and a search for the smallest ε has no units but the clean images.
    """
    attacks = [cost for name, cost in costs.items() if loss_of_unit(name) != CLEAN[1]]
    known = [cost for cost in attacks if cost and None not in (cost["forwards"], cost["most_forwards"])]
    if not known or len(known) < len(attacks):
        return None
    most = sum(cost["most_forwards"] for cost in known)
    return SavedPasses(most - sum(cost["forwards"] for cost in known), most)
