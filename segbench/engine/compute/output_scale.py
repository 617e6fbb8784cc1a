"""Whether a model returns logits, or something in the same order that weakens the losses of an attack.

A sigmoid, a softmax, a division by the largest value: none changes a prediction, all change the gradient of a loss of
softmax(u). Such outputs keep to a law that logits do not, in each pixel or in all of them, which two images show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from segbench.entries import flag

CLOSE = 1e-3  # to what a law says, relative to the size of the output
SATURATED = 0.95  # of a bound of 1
SHARE = 0.01  # of values near the bounds, where an output is bounded by a function and not by chance


class Law(NamedTuple):
    """What an output may be in place of logits: a sentence part, how to return logits, and the test (N,K,H,W)."""

    what: str
    mend: str
    holds: Callable[[Tensor], bool]


def _constant(values: Tensor, wanted: float | None = None) -> bool:
    """Whether all values are one number, up to rounding."""
    wanted = float(values.mean()) if wanted is None else wanted
    return wanted != 0 and float((values - wanted).abs().max()) <= CLOSE * abs(wanted)


def _is_probabilities(u: Tensor) -> bool:
    return float(u.min()) >= 0 and _constant(u.sum(dim=1), 1.0)


def _is_log_probabilities(u: Tensor) -> bool:
    return float(u.max()) <= CLOSE and float(u.logsumexp(dim=1).abs().max()) <= CLOSE


def _is_sigmoid(u: Tensor) -> bool:
    return float(u.min()) >= 0 and float(u.max()) <= 1


def _is_log_sigmoid(u: Tensor) -> bool:
    return float(u.max()) < 0 and float((u > SATURATED - 1).double().mean()) >= SHARE


def _is_tanh(u: Tensor) -> bool:
    return float(u.abs().max()) <= 1 and float((u.abs() > SATURATED).double().mean()) >= SHARE


def _has_unit_length(u: Tensor) -> bool:
    return _varies(u) and _constant(u.norm(dim=1))


def _has_one_range(u: Tensor) -> bool:
    return _varies(u) and _constant(u.amax(dim=1) - u.amin(dim=1))


def _varies(u: Tensor) -> bool:
    """Whether pixels differ: those of one and the same output are of one length and range anyhow."""
    return float((u - u.mean(dim=(0, 2, 3), keepdim=True)).norm()) > 0.1 * float(u.norm())


LAWS: Mapping[str, Law] = {
    "probabilities": Law(
        "probabilities: in each pixel they sum to 1", "Return what goes into the softmax.", _is_probabilities
    ),
    "log_probabilities": Law(
        "logarithms of probabilities, whose temperature cannot be known",
        "Return what goes into the log_softmax.",
        _is_log_probabilities,
    ),
    "sigmoid": Law("values in [0, 1], as of a sigmoid", "Return what goes into it, torch.logit(output).", _is_sigmoid),
    "log_sigmoid": Law("logarithms of a sigmoid", "Return what goes into the logsigmoid.", _is_log_sigmoid),
    "tanh": Law("values in [-1, 1] that press against the ends, as of a tanh", "Return what goes into it.", _is_tanh),
    "unit_length": Law("scaled to one length in each pixel", "Return them unscaled.", _has_unit_length),
    "one_range": Law("scaled to one range in each pixel", "Return them unscaled.", _has_one_range),
}  # fmt: skip


def output_law(logits: Tensor) -> Law | None:
    """The law that an output (N,K,H,W) keeps to and logits would not; None for logits.

    Two classes are always of one range and length up to a sign where their sum is fixed, so those laws need three.
    """
    u = logits.double()
    for name, law in LAWS.items():
        if u.shape[1] < 3 and name in ("unit_length", "one_range"):
            continue
        if law.holds(u):
            return law
    return None


def output_scale(logits: Tensor) -> dict[str, Any]:
    """The reliability check of that name, from the output of a batch."""
    law = output_law(logits)
    if law is None:
        text = "1 if the output is not logits but something in the same order, which weakens attacks."
        return flag("output_scale", 0.0, "ok", text)
    return flag("output_scale", 1.0, "warning", f"The output is not logits but {law.what}. {law.mend}")
