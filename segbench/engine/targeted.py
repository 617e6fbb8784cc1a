"""Targeted attacks on one model: how much of each image is drawn to a class.

Source: Croce, Singh, Hein, ECCV 2024, Figure 1: APGD with radius reduction on the negative Jensen-Shannon divergence to
the target class. The run directory is that of a comparison: it resumes, is divided into shards, and may be given more
classes and radii later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

import numpy as np
from torch import nn

from segbench import evidence, schemas
from segbench.counts import Counts
from segbench.data import SegmentationDataset
from segbench.engine.compare import command_of, gather, several
from segbench.engine.preparation import PREEMPTED, How, do, open_dataset, prepared, shard_done
from segbench.engine.store import MEND
from segbench.ensemble import bootstrap, interval
from segbench.errors import IncompleteError, PreemptedError, RunError, UnknownNameError, UsageError, unknown_name
from segbench.evidence import CLEAN, Evidence
from segbench.files import write_atomic
from segbench.protocol import SEA_V1, comparison, radii_of
from segbench.signals import raised


@dataclass(frozen=True)
class Targeted:
    """What targeted attacks reached.

    Attributes:
        path: the run directory; ``targeted.json`` and ``targeted.parquet`` (the evidence) lie in it.
        rows: for each target and ε (0: the clean images) ``target`` (number), ``class`` (name), ``eps_255``,
            ``success``: the share of valid pixels that are predicted as the target, over all images, its 95% interval
            ``success_95``, and ``whole``: the share of images of which at least 99% are.
    """

    path: Path
    rows: list[dict[str, Any]]
    _about: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        return {**self._about, "rows": self.rows}


@raised(SIGTERM, PreemptedError, PREEMPTED)
def targeted(
    model_or_id: str | nn.Module,
    targets: str | int | Sequence[str | int],
    dataset: str | SegmentationDataset | None = None,
    eps: str | float | Sequence[str | float] | None = None,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    iterations: int = SEA_V1.iterations,
    seed: int = SEA_V1.seed,
    how: How | None = None,
) -> Targeted:
    """Draws all pixels of each image to one class, for each of the classes.

    Args:
        model_or_id: whatever `segbench.evaluate` takes.
        targets: classes, by number or name.
        dataset: data set id or object; None for the one of the model's card.
        eps: radii as numerators over 255; None for 4, 8, 12.
        data_root: folder of the data set, where it needs one.
        out: run directory; None for ``runs/<model>-<data set>-<identity>``.
        limit: only the first images.
        iterations: of each attack.
        seed: of the random starts.
        how: how it is computed.

    Raises:
        UsageError, ModelError, DataError, RunError: what is wrong, and how to mend it.
        ShardDoneError: this shard is done, units of others are missing.
        PreemptedError: SIGTERM stopped it, units are missing.
    """
    how, data = how or How(), open_dataset(model_or_id, dataset, data_root)
    classes = list(dict.fromkeys(class_number(each, data.class_names) for each in several(targets)))
    if not classes:
        raise UsageError(f"Which class? Give a name or number with --target. There are: {', '.join(data.class_names)}.")
    radii = radii_of(eps)
    names = [f"js_target_{each}" for each in classes]
    verb = command_of("targeted --target", map(str, classes), seed)
    fixed = comparison(names, iterations, seed)
    with prepared(model_or_id, data, radii, fixed, how, data_root, out, limit, verb) as ready:
        do(ready, how)
    store = ready.store
    try:
        groups, _ = gather(store, names, radii)
    except IncompleteError as error:
        raise shard_done(how, store, error, "the same command without --shard") from error
    rows = [
        {"target": each, "class": data.class_names[each], "eps_255": radius, **_success(groups[key].counts, each)}
        for each, name in zip(classes, names, strict=True)
        for radius, key in [(0.0, CLEAN), *((radius, (radius, name)) for radius in radii)]
    ]
    manifest = store.manifest
    about = {key: manifest[key] for key in ("model", "dataset", "environment", "run_id")}
    result = Targeted(store.path, rows, about | {"iterations": iterations, "seed": seed})
    metadata = {key: manifest[key] for key in ("run_id", "identity", "protocol")}
    try:
        write_atomic(
            store.path / "targeted.parquet",
            evidence.to_bytes(Evidence(groups, {"num_classes": data.num_classes, **metadata})),
        )
        write_atomic(store.path / "targeted.json", schemas.dump(result.document()).encode())
    except OSError as error:
        raise RunError(f"Cannot write into {store.path}: {error}. {MEND}") from error
    return result


def class_number(name: str | int, class_names: Sequence[str]) -> int:
    """The class of that number or name.

    Raises:
        UsageError: there is none.

    >>> class_number("tree", ["sky", "tree"]), class_number("0", ["sky", "tree"])
    (1, 0)
    """
    if str(name).isascii() and str(name).isdecimal() and int(name) < len(class_names):
        return int(name)
    if name in class_names:
        return class_names.index(str(name))
    raise UnknownNameError(unknown_name("class", str(name), class_names))


def _success(counts: Counts, target: int) -> dict[str, Any]:
    hits, valid = counts.predicted[:, target], counts.target.sum(axis=1)
    reached = Counts(hits[:, None], valid[:, None], valid[:, None])  # as if every label were the target
    whole = hits[valid > 0] >= 0.99 * valid[valid > 0]
    return {
        "success": reached.aacc(),
        "success_95": list(interval(bootstrap(reached, reached).aacc)),
        "whole": float(np.mean(whole)) if len(whole) else 0.0,
    }
