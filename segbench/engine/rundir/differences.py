"""In what two runs differ, field by field, with both values. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from segbench.errors import difference
from segbench.protocol import COMPARISON

DIGITS = 12  # of a hash
DATASET = {
    "id": "data set", "split": "split", "images": "images", "num_classes": "classes", "preprocessing": "preprocessing",
    "other_size": "size",
}  # fmt: skip


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What in two manifests makes two runs of them, e.g. ``iterations: 5 there, 9 here``; nothing for one run."""
    old, new = there["identity"], here["identity"]
    found = list[str]()
    if old["protocol"] != new["protocol"]:
        found += _of_protocol(there["protocol"], here["protocol"]) or _of_hash("protocol", old, new, "protocol")
    if old["weights"] != new["weights"]:
        models = [manifest["model"]["id"] for manifest in (there, here)]
        found += [difference("model", *models)] if models[0] != models[1] else []
        found += _of_hash("model weights or code", old, new, "weights")
    if old["fingerprint"] != new["fingerprint"]:
        found += list(_of_data(there, here)) or _of_hash("pixels or labels of the images", old, new, "fingerprint")
    if old.get("class_weights") != new.get("class_weights"):
        sources = [manifest["dataset"].get("class_weights_from") for manifest in (there, here)]
        found += [difference("class weights of mce_bal from", *sources)] if sources[0] != sources[1] else []
        found += _of_hash("class weights of mce_bal", old, new, "class_weights")
    if old.get("precision") != new.get("precision"):
        found.append(difference("precision", *(each["environment"]["precision"] for each in (there, here))))
    return found


def _of_hash(name: str, old: Mapping[str, str], new: Mapping[str, str], key: str) -> list[str]:
    short = [f"{identity[key][:DIGITS]}..." if key in identity else None for identity in (old, new)]
    return [difference(name, *short)]


def _of_protocol(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if old["name"] != new["name"]:
        return [difference("protocol", old["name"], new["name"])]  # what follows from it would only hide it
    left_open = {"losses"} if old["name"] == COMPARISON else set()
    fields = [dict(_flat(each)) for each in (old, new)]
    return [
        difference(name, *(each.get(name) for each in fields))
        for name in dict.fromkeys([*fields[0], *fields[1]])
        if name not in left_open and fields[0].get(name) != fields[1].get(name)
    ]


def _flat(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        yield from _flat(value) if isinstance(value, Mapping) else [(name, value)]


def _of_data(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    old, new = there["dataset"], here["dataset"]
    for key, name in DATASET.items():
        if old.get(key) != new.get(key):
            yield difference(name, old.get(key), new.get(key))
    ids = there["image_ids"], here["image_ids"]
    if len(ids[0]) == len(ids[1]) and ids[0] != ids[1]:
        row = next(row for row, (old_id, new_id) in enumerate(zip(*ids, strict=True)) if old_id != new_id)
        yield difference(f"image {row + 1}", ids[0][row], ids[1][row])
