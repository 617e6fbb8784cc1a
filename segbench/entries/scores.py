"""Scores and reliability flags, computed from evidence alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from segbench import counts, ensemble
from segbench.errors import ContentError, SegbenchError
from segbench.evidence import CHECK_LOSS, CHECK_SEARCH, CHECKS, CLEAN, Evidence, Group
from segbench.protocol import OFFICIAL_RADII_255, PROTOCOLS, TOLERANCES

NOT_RUN = "The checks for masked gradients were not run: they need 16 images and all iterations, and a trial has fewer."


def recompute(found: Evidence, *, seed: int, orders: int) -> dict[str, Any]:
    """``clean`` and ``results`` of an entry from its evidence.

    Args:
        found: evidence with the clean group and the groups of every radius.
        seed: of the mIoU search and the bootstrap.
        orders: number of orders in the mIoU search.

    Raises:
        ContentError: a group is missing or of no use, or groups hold different images.
    """
    for eps, loss in found.groups:
        if (eps == CLEAN[0]) != (loss == CLEAN[1]):
            raise ContentError(f"The evidence has a group of ε = {eps:g}/255, {loss}; only clean images have ε = 0.")
    clean = found.groups.get(CLEAN)
    if clean is None:
        raise ContentError("The evidence has no clean images.")
    results = []
    for eps in sorted({eps for eps, loss in found.groups if eps > 0 and loss not in CHECKS}):
        losses = {loss: group for (radius, loss), group in found.groups.items() if radius == eps and loss not in CHECKS}
        candidates = {"clean": clean, **losses}
        for loss, group in losses.items():
            if group.image_ids != clean.image_ids:
                raise ContentError(
                    f"The evidence of ε = {eps:g}/255, {loss} holds other images than the clean evidence."
                )
        try:
            worst = ensemble.worst_case([group.counts for group in candidates.values()], seed=seed, orders=orders)
        except SegbenchError as error:
            raise ContentError(f"The evidence of ε = {eps:g}/255 does not fit together: {error}") from error
        interval = ensemble.bootstrap_intervals(worst.aacc_counts, worst.miou_counts, seed=seed)
        results.append(
            {
                "strength": eps,
                "aacc": worst.aacc,
                "miou": worst.miou,
                "miou_lower_bound": worst.miou_lower_bound,
                "interval": {"aacc": list(interval.aacc), "miou": list(interval.miou)},
                "per_loss": {
                    loss: {
                        "aacc": group.counts.aacc(),
                        "miou": group.counts.miou(),
                        "won_aacc": float((worst.aacc_choice == position).mean()),
                        "won_miou": float((worst.miou_choice == position).mean()),
                    }
                    for position, (loss, group) in enumerate(candidates.items())
                    if loss != "clean"
                },
            }
        )
    scores = clean.counts
    return {"clean": {"aacc": scores.aacc(), "macc": scores.macc(), "miou": scores.miou()}, "results": results}


def flag(name: str, value: float | None, level: str, message: str) -> dict[str, Any]:
    """One reliability check: ``level`` is ``ok``, ``note`` or ``warning``."""
    return {"name": name, "level": level, "value": value, "message": message}


def reliability(found: Evidence, scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The reliability checks of an entry: those of the probe (in the metadata), and those on gradients and scores."""
    flags = list(found.metadata["checks"])
    gradients = found.metadata["gradients"]
    faults = {
        "zero_gradients": "some input gradient was zero everywhere",
        "nonfinite_gradients": "some input gradient was not finite",
        "nonfinite_logits": "the logits of the adversarial image were not finite",
    }
    for name, text in faults.items():
        share = gradients[name] / max(gradients["attacks"], 1)
        level = "ok" if share == 0 else "note" if share < 0.05 else "warning"
        flags.append(flag(name, share, level, f"Share of attacks on an image in which {text}."))
    # A score that stands still above 0 did not fall either: an attack that changes nothing looks like this.
    steps = [(b[m] - a[m], a[m]) for a, b in _neighbours(scores) for m in ("aacc", "miou")]
    rise = max((step for step, before in steps if before > 0), default=0.0)
    level = "ok" if rise < 0 or not any(before > 0 for _, before in steps) else "warning"
    text = "Largest change of a score from one ε to the next larger one; a robust score must fall until it is 0."
    flags.append(flag("falls_with_eps", rise, level, text))
    huge = [(eps, group) for (eps, loss), group in found.groups.items() if loss == CHECK_LOSS]
    for eps, group in huge:
        left = group.counts.aacc()
        level = "ok" if left <= 0.02 else "warning"
        flags.append(
            flag(
                "falls_to_zero",
                left,
                level,
                f"aAcc left by APGD on {group.counts.num_images} images at ε = {eps:g}/255; "
                "above 0.02 hints at masked gradients.",
            )
        )
    flags += [_search_flag(found, eps, group) for (eps, loss), group in found.groups.items() if loss == CHECK_SEARCH]
    if not huge:
        flags.append(flag("falls_to_zero", None, "note", NOT_RUN))
    return flags


def _search_flag(found: Evidence, eps: float, search: Group) -> dict[str, Any]:
    """Whether a search without gradients found less than the attacks of the protocol on the same images."""
    rows = {image_id: row for row, image_id in enumerate(found.groups[CLEAN].image_ids)}
    places = np.array([rows[image_id] for image_id in search.image_ids], np.intp)
    attacks = [group for (radius, loss), group in found.groups.items() if radius == eps and loss not in CHECKS]
    correct = np.min([group.counts.take(places).correct for group in [found.groups[CLEAN], *attacks]], axis=0)
    pixels = max(int(search.counts.target.sum()), 1)
    below = (int(correct.sum()) - int(search.counts.correct.sum())) / pixels
    tolerance = TOLERANCES[found.metadata["protocol"]["name"]].worst_case
    text = (
        f"aAcc of the worst case minus that of a search without gradients, {search.counts.num_images} images, "
        f"ε = {eps:g}/255; above {tolerance:g} hints at masked gradients."
    )
    return flag("search_is_weaker", below, "warning" if below > tolerance else "ok", text)


def _neighbours(scores: Mapping[str, Any]) -> list[tuple[Mapping[str, float], Mapping[str, float]]]:
    rows = [scores["clean"], *scores["results"]]
    return list(itertools.pairwise(rows))


def deviations(
    protocol: Mapping[str, Any], results: list[Mapping[str, Any]], dataset: Mapping[str, Any], precision: str
) -> list[str]:
    """In what a run differs from its official protocol; empty makes the entry official."""
    official = PROTOCOLS[protocol["name"]]
    found = []
    if protocol["iterations"] != official.iterations:
        found.append(f"{protocol['iterations']} iterations instead of {official.iterations}")
    if dataset["images"] != dataset["available"]:
        found.append(f"{dataset['images']} of {dataset['available']} images")
    if other_size := dataset.get("other_size"):
        found.append(f"pictures of {other_size} pixels")
    if dataset["split"] != "val":
        found.append(f"the {dataset['split']} split")
    if dataset["class_weights_from"] not in ("training split", "published values"):
        found.append(f"class weights from the {dataset['class_weights_from']}")
    missing = [f"{eps:g}" for eps in OFFICIAL_RADII_255 if eps not in {row["strength"] for row in results}]
    if missing:
        found.append(f"without ε = {', '.join(missing)} (/255)")
    if precision != "fp32":
        found.append(f"precision {precision}")
    return found


def merge_groups(parts: list[Group]) -> Group:
    """Chunks of one (ε, loss), in order."""
    return Group(
        tuple(image_id for part in parts for image_id in part.image_ids), counts.merge(part.counts for part in parts)
    )
