"""The fixed evaluation protocol.

The digest covers everything that changes a unit of evidence. Radii are not part of it: a unit belongs to one radius,
so a run may be given more radii later.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segbench.errors import UnknownNameError, UsageError, unknown_name


@dataclass(frozen=True)
class Threat:
    """What an attacker may do: the ``measure`` of the change is at most a strength, and image values stay in [0,1].

    Attributes:
        kind: e.g. ``linf``.
        measure: of the change δ, e.g. ``max``: the largest |δ| in the image.
        unit: of a strength, e.g. ``1/255``: at strength 8 of `LINF`, max|δ| <= 8/255.
    """

    kind: str
    measure: str
    unit: str

    def fields(self) -> dict[str, str]:
        """As JSON data."""
        return dataclasses.asdict(self)

    def names(self, strength: float) -> dict[str, float]:
        """A strength as printed data: ``strength``, and under `LINF` ``eps_255`` too.

        >>> LINF.names(8.0)
        {'strength': 8.0, 'eps_255': 8.0}
        """
        return {"strength": strength} | ({"eps_255": strength} if self == LINF else {})

    def printed(self, data: Any) -> Any:
        """JSON data as ``--json`` prints them: each ``strength`` under its `names`.

        >>> LINF.printed([{"strength": 8.0, "miou": 0.2}])
        [{'strength': 8.0, 'eps_255': 8.0, 'miou': 0.2}]
        """
        if isinstance(data, list):
            return [self.printed(each) for each in data]
        if not isinstance(data, dict):
            return data
        named = {key: self.names(value) if key == "strength" else {key: value} for key, value in data.items()}
        return {key: self.printed(value) for each in named.values() for key, value in each.items()}


LINF = Threat("linf", "max", "1/255")
LINF_OF_SCHEMA_1 = {"norm": "linf", "low": 0.0, "high": 1.0}  # its name in `Protocol.fields` before


@dataclass(frozen=True)
class Protocol:
    """How models are attacked and scored (SEA.md, section 5).

    Attributes:
        name: e.g. ``sea-v1``; part of the digest.
        threat: what the attacker may do.
        losses: attacked losses in order; candidate 0 is always the clean image.
        iterations: of each attack.
        schedule: ``red-eps``, the progressive radius reduction of SEA.md, section 4.
        seed: of the random starts.
        search_seed: of the orders in the mIoU search, and of the bootstrap.
        search_orders: number of orders.
        largest_margin: of the standardised logits that the losses see (`segbench.attacks.standardise`); None for the
            logits themselves.
    """

    name: str
    threat: Threat
    losses: tuple[str, ...]
    iterations: int
    schedule: str
    seed: int
    search_seed: int
    search_orders: int
    largest_margin: float | None = None

    def fields(self) -> dict[str, Any]:
        """As JSON data; what a protocol does not have is left out, so that the digest of an older one stays."""
        fields = {**dataclasses.asdict(self), "losses": list(self.losses)}
        return {name: value for name, value in fields.items() if value is not None}

    def digest(self) -> str:
        """SHA-256 of all fields."""
        return digest_of(self.fields())

    def start_seed(self, image_id: str, loss: str, strength: float) -> int:
        """Seed of one random start: a function of (protocol seed, image id, loss, strength) and nothing else."""
        text = json.dumps([self.seed, image_id, loss, float(strength)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def digest_of(fields: Mapping[str, Any]) -> str:
    """The digest of a protocol from its fields, e.g. as they are stored in evidence.

    The attacks of a `comparison` are no part of it, as radii are not: a unit belongs to one, and more may follow.
    `LINF` is hashed as schema 1 named it, so that its digests, and with them the ids of runs, stay as they were.
    """
    if fields.get("name") == COMPARISON:
        fields = {**fields, "losses": ()}
    if fields.get("threat") == LINF.fields():
        fields = {**fields, "threat_model": LINF_OF_SCHEMA_1}
        del fields["threat"]
    text = json.dumps(dict(fields), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


SEA_V1 = Protocol(
    name="sea-v1",
    threat=LINF,
    losses=("mce_bal", "mce", "js"),
    iterations=300,
    schedule="red-eps",
    seed=225,
    search_seed=0,
    search_orders=8,
)
SEA_V2 = dataclasses.replace(
    SEA_V1,
    name="sea-v2",
    losses=("mce_bal_std", "mce_std", "js_std"),
    largest_margin=20.0,
)
PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in (SEA_V1, SEA_V2)}
COMPARISON, MINIMUM = "comparison", "minimum"


def comparison(attacks: Sequence[str], iterations: int = SEA_V1.iterations, seed: int = SEA_V1.seed) -> Protocol:
    """Other attacks in the place of the losses, by name; what is attacked so is compared, and makes no entry."""
    return dataclasses.replace(
        SEA_V1, name=COMPARISON, losses=tuple(attacks), iterations=iterations, schedule="of each attack", seed=seed
    )


def minimum(attacks: Sequence[str], iterations: int = SEA_V1.iterations, seed: int = SEA_V1.seed) -> Protocol:
    """The attacks that look for the smallest ε of each image, in the order in which they are tried at a radius."""
    return dataclasses.replace(comparison(attacks, iterations, seed), name=MINIMUM)


@dataclass(frozen=True)
class Tolerance:
    """By how much two honest results may differ; fractions of 1. No part of the digest: no unit depends on it.

    Another processor rounds otherwise, and a sign attack makes another image of another last bit. ``image`` and
    ``pooled`` are above what was measured between processors and between seeds (benchmarks/reproduction.py),
    ``worst_case`` is above the published spread over seeds (docs/protocol.md).

    Attributes:
        clean: pixels of one clean image that may be predicted otherwise.
        image: difference of one image's accuracy under one attack.
        pooled: difference of the aAcc of all compared images under one attack.
        worst_case: by how much another attack may be below the worst case before SEA is said to overestimate.
    """

    clean: float
    image: float
    pooled: float
    worst_case: float


_TOLERANCE = Tolerance(clean=0.002, image=0.25, pooled=0.03, worst_case=0.005)
TOLERANCES: Mapping[str, Tolerance] = {SEA_V1.name: _TOLERANCE, SEA_V2.name: _TOLERANCE}

SMALL_EPS_255 = 0.25  # the smallest radius in use; below, ε may be meant on the scale [0,1]
MIN_EPS_255 = 0.001  # below, the ball is lost in the rounding of float32
OFFICIAL_RADII_255: tuple[float, ...] = (4.0, 8.0, 12.0)


def get_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UsageError: unknown name.
    """
    if name not in PROTOCOLS:
        raise UnknownNameError(unknown_name("protocol", name, PROTOCOLS))
    return PROTOCOLS[name]


def parse_eps(values: Sequence[str | float]) -> tuple[float, ...]:
    """Radii as numerators over 255, sorted, each once: ``8`` and ``"8/255"`` are the same.

    Raises:
        UsageError: not a number, or not in (0, 255].

    >>> parse_eps(["8/255", 4, "0.25"])
    (0.25, 4.0, 8.0)
    """
    radii = set[float]()
    for value in values:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(/\s*255)?\s*", str(value))
        eps = float(match.group(1)) if match else float("nan")
        if not MIN_EPS_255 <= eps <= 255:
            raise UsageError(f"ε must be above 0 and at most 255, written 8 or 8/255 (both mean 8/255); got {value!r}.")
        radii.add(eps)
    if not radii:
        raise UsageError("Give at least one ε, e.g. --eps 4 8 12.")
    if (smallest := min(radii)) < SMALL_EPS_255:
        logging.getLogger("segbench").warning(
            "ε = %g is read as %g/255, which hardly changes an image. 8/255 is written 8; %g on the scale [0,1] is "
            "written %g.", smallest, smallest, smallest, round(255 * smallest, 4),
        )  # fmt: skip
    return tuple(sorted(radii))


def radii_of(eps: str | float | Sequence[str | float] | None) -> tuple[float, ...]:
    """One radius, several, or None for the official ones, as `parse_eps` gives them.

    >>> radii_of("8/255"), radii_of([4, 8]), radii_of(None)
    ((8.0,), (4.0, 8.0), (4.0, 8.0, 12.0))
    """
    if eps is None:
        return OFFICIAL_RADII_255
    return parse_eps([eps] if isinstance(eps, str | float | int) else eps)
