"""What a run saved: an image without a correct pixel is decided, and leaves its attack early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from segbench.attacks.catalogue import get_attack
from segbench.engine.compute.worker import image_passes
from segbench.engine.rundir.plan import Unit, plan
from segbench.protocol import Protocol, get_protocol


class SavedPasses(NamedTuple):
    """Forward passes that were ``saved``, and ``most``: those of the same run if no image leaves early."""

    saved: int
    most: int

    def __str__(self) -> str:
        if not self.saved:
            return f"No image left early: 0 of {self.most} forward passes saved."
        share = f"{100 * self.saved / self.most:.1f}% of the passes saved ({self.saved} of {self.most})"
        return f"Images without a correct pixel left early: {share}."


def saved_passes(entry: Mapping[str, Any]) -> SavedPasses:
    """Counted from an entry of a run: it says what was attacked, and how many passes that took."""
    about = entry["protocol"]
    protocol = replace(get_protocol(about["name"]), iterations=about["iterations"])
    image_ids = [str(number) for number in range(entry["dataset"]["images"])]
    radii = [row["eps_255"] for row in entry["results"]]
    most = sum(_most(unit, protocol) for unit in plan(protocol.name, image_ids, radii, protocol.losses))
    return SavedPasses(most - entry["run"]["forward_passes"], most)


def _most(unit: Unit, protocol: Protocol) -> int:
    """`image_passes` without the starts of stages that have no iterations, which very short attacks leave out."""
    attacked = unit.loss in protocol.losses
    stages = get_attack(unit.loss, protocol.iterations).stages(unit.eps_255) if attacked else ()
    return image_passes(unit, protocol) - len(unit.image_ids) * sum(not stage.iterations for stage in stages)
