"""Whether a row may have a rank: its model must not be one that only looks robust to the attacks of its protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from segbench.leaderboard.explanations import OVERESTIMATES
from segbench.protocol import SEA_V1

# A failed check (level ``warning``) and what it says of the scores, under every protocol.
ALWAYS = {
    "output_scale": "the output is not logits but something in the same order, which weakens the attacks",
    "logits": "the output is probabilities, which weakens the attacks",
    "deterministic": "the model is random, and the attacks chase a moving target",
}
# Under `sea-v1` these are warnings only: ranks that were given stay.
SINCE_V2 = {
    "falls_to_zero": "at a huge ε, where any image can be painted, much is still right: the gradients are masked",
    "search_is_weaker": "a search without gradients found a lower score: the gradients are masked",
    "zero_gradients": "many gradients are zero everywhere: they are masked",
    "nonfinite_gradients": "many gradients are not finite: they are masked",
    OVERESTIMATES: "another attack found a lower score, by more than the tolerance",
}


def why_unranked(flags: Sequence[Mapping[str, Any]], protocol: str) -> str | None:
    """Why a row has no rank, in a sentence; None if it may have one."""
    reasons = ALWAYS if protocol == SEA_V1.name else {**ALWAYS, **SINCE_V2}
    failed = [reasons[flag["name"]] for flag in flags if flag["level"] == "warning" and flag["name"] in reasons]
    return f"No rank: {'; '.join(failed)}." if failed else None
