"""Every number of an entry against its evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from segbench.entries.reading import read_evidence
from segbench.entries.scores import deviations, recompute, reliability
from segbench.errors import ContentError
from segbench.evidence import CHECK_EPS_255, CHECK_LOSS, CHECK_SEARCH, CHECKS, CLEAN, SEARCH_EPS_255, Evidence, Group
from segbench.protocol import SEA_V1, digest_of

TOLERANCE = 1e-9
# What `segbench.engine.compute.checks.probe` stores; `output_scale` took the place of `logits`.
PROBE_CHECKS = ({"deterministic", "output_scale", "eval_mode"}, {"deterministic", "logits", "eval_mode"})


class Compared(NamedTuple):
    """One value: its field, what the entry states, what the evidence gives, and whether they agree up to rounding."""

    field: str
    stated: Any
    computed: Any
    agrees: bool


def evidence_of(path: Path, entry: Mapping[str, Any], *, most: int | None = None) -> Evidence:
    """The evidence of an entry, its hash checked; ``most`` is the largest size in bytes.

    Raises:
        ContentError: as `read_evidence`, or the entry has none.
    """
    if entry["evidence"] is None:
        raise ContentError(f"{path} has no evidence: its numbers are {entry['claim']['tier']}.")
    return read_evidence(path.parent / entry["evidence"]["file"], entry["evidence"]["sha256"], most=most)


def identity_problems(entry: Mapping[str, Any], found: Evidence, name: str) -> list[str]:
    """Where the evidence was made with another model, data set or protocol than the entry states."""
    stated = {
        "model": entry["model"]["weights_sha256"],
        "dataset": entry["dataset"]["fingerprint"],
        "protocol": entry["protocol"]["digest"],
    }
    carried = {"model": "weights", "dataset": "fingerprint", "protocol": "protocol"}
    identity, about, protocol = (found.metadata.get(key) for key in ("identity", "dataset", "protocol"))
    if not (isinstance(identity, dict) and isinstance(about, dict) and isinstance(protocol, dict)):
        raise ContentError(f"{name} lacks the metadata of a run: identity, dataset or protocol.")
    problems = [
        f"the evidence was made with another {name} than the entry states: evaluate again."
        for name, value in stated.items()
        if identity.get(carried[name]) != value
    ]
    if digest_of(protocol) != identity.get("protocol"):
        problems.append("the evidence's protocol does not fit its digest: evaluate again.")
    if protocol.get("threat") != entry["protocol"]["threat"]:
        problems.append("protocol.threat is not that of the evidence: correct the entry.")
    problems += [
        f"dataset.{key} is {entry['dataset'][key]!r}, the evidence says {about.get(key)!r}: correct the entry."
        for key in ("id", "split", "class_weights_from")
        if entry["dataset"][key] != about.get(key)
    ]
    if found.metadata["num_classes"] != entry["dataset"]["num_classes"]:
        problems.append(
            f"dataset.num_classes is {entry['dataset']['num_classes']}, the evidence has "
            f"{found.metadata['num_classes']}: correct the entry."
        )
    precision = found.metadata["identity"].get("precision", "fp32")
    if entry["run"] is not None and entry["run"]["precision"] != precision:
        problems.append(
            f"run.precision is {entry['run']['precision']!r}, the evidence says {precision!r}: correct the entry."
        )
    if entry["protocol"]["official"]:
        problems += _not_official(entry, found, about, protocol)
    if found.groups.get(CLEAN) is None or len(found.groups[CLEAN].image_ids) != entry["dataset"]["images"]:
        problems.append(
            f"dataset.images is {entry['dataset']['images']}, the clean evidence holds another number of images."
        )
    return problems


def _not_official(
    entry: Mapping[str, Any], found: Evidence, about: Mapping[str, Any], protocol: Mapping[str, Any]
) -> list[str]:
    """Why an entry cannot call itself official, by what its evidence says of the run."""
    clean = found.groups.get(CLEAN)
    if clean is None:
        return []
    try:
        dataset = {**about, "images": len(clean.image_ids)}
        precision = found.metadata["identity"].get("precision", "fp32")
        differences = deviations(protocol, entry["results"], dataset, precision)
        attacks = len(clean.image_ids) * sum(key != CLEAN and key[1] not in CHECKS for key in found.groups)
        counted = found.metadata["gradients"]["attacks"]
    except (KeyError, TypeError) as error:
        raise ContentError(f"the evidence lacks the metadata of a run: {error}") from error
    problems = [f"it is not official: {text}. Evaluate with the whole protocol." for text in differences]
    if counted != attacks:
        problems.append(f"the evidence counts {counted} attacks on an image, it holds {attacks}: evaluate again.")
    checks = [(key[0], group) for key, group in found.groups.items() if key[1] == CHECK_LOSS]
    if len(checks) != 1 or checks[0][0] != CHECK_EPS_255:
        return [*problems, "the evidence holds no attack at a huge ε, a reliability check: evaluate again."]
    if not _of_first_images(checks[0][1], clean):
        problems.append("the attack at a huge ε was made on other images than the first ones: evaluate again.")
    searches = [(key[0], group) for key, group in found.groups.items() if key[1] == CHECK_SEARCH]
    if protocol["name"] != SEA_V1.name and [eps for eps, _ in searches] != [SEARCH_EPS_255]:
        problems.append("the evidence holds no search without gradients, a reliability check: evaluate again.")
    if any(not _of_first_images(group, clean) for _, group in searches):
        problems.append("the search without gradients was made on other images than the first ones: evaluate again.")
    return problems


def _of_first_images(group: Group, clean: Group) -> bool:
    """Whether a check was made on the first clean images, with their labels."""
    rows = len(group.image_ids)
    return group.image_ids == clean.image_ids[:rows] and bool((group.counts.target == clean.counts.target[:rows]).all())


def against_evidence(entry: Mapping[str, Any], found: Evidence, name: str) -> Iterator[Compared]:
    """Every value that the evidence determines, beside the one that the entry states.

    Args:
        entry: fits the schema.
        found: its evidence.
        name: of the evidence file, for messages.

    Raises:
        ContentError: the evidence is of no use.
    """
    try:
        scores = recompute(found, seed=entry["protocol"]["search_seed"], orders=entry["protocol"]["search_orders"])
        flags = reliability(found, scores)
        passes = found.metadata["passes"]
        checks = {check["name"] for check in found.metadata["checks"]}
    except (KeyError, TypeError, ArithmeticError) as error:
        raise ContentError(f"{name} lacks the metadata of a run: {error}") from error
    for field, value in scores.items():
        yield from _compared(field, value, entry[field])
    if entry["run"] is not None:
        stated_passes = {key: entry["run"][f"{key[:-1]}_passes"] for key in ("forwards", "backwards")}
        yield from _compared("run", passes, stated_passes)
    yield from _compared("flags", _judgements(flags), _judgements(entry["flags"]))
    if checks not in PROBE_CHECKS:
        raise ContentError(f"the evidence must hold the checks {', '.join(sorted(PROBE_CHECKS[0]))}: evaluate again.")


def _judgements(flags: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Flags without their messages, which may be reworded."""
    return [{key: flag[key] for key in ("name", "level", "value")} for flag in flags]


def _compared(where: str, computed: Any, stated: Any) -> Iterator[Compared]:
    """The leaves of two trees of values."""
    if isinstance(computed, dict) and isinstance(stated, dict):
        for key in sorted(computed.keys() | stated.keys()):
            yield from _compared(f"{where}.{key}", computed.get(key), stated.get(key))
    elif isinstance(computed, list) and isinstance(stated, list) and len(computed) == len(stated):
        for place, pair in enumerate(zip(computed, stated, strict=True)):
            yield from _compared(f"{where}.{place}", *pair)
    else:
        numbers = isinstance(computed, float | int) and isinstance(stated, float | int)
        close = numbers and math.isclose(computed, stated, rel_tol=0, abs_tol=TOLERANCE)
        yield Compared(where, stated, computed, close or computed == stated)
