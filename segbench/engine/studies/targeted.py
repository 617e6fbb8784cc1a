"""Targeted attacks on one model: how much of each image is drawn to a class.

Source: Croce, Singh, Hein, ECCV 2024, Figure 1: APGD with radius reduction on the negative Jensen-Shannon divergence to
the target class. The run directory is that of a comparison: it resumes, is divided into shards, and may be given more
classes and radii later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

import numpy as np
from torch import nn

from segbench.counts import Counts
from segbench.data import SegmentationDataset
from segbench.engine.launch.dataset import open_dataset
from segbench.engine.launch.dispatch import PREEMPTED, finish_run, run_missing_units
from segbench.engine.launch.options import RunOptions
from segbench.engine.launch.prepare import Request, prepare_run
from segbench.engine.rundir.store import Store
from segbench.engine.studies.common import (
    WITHOUT_SHARD,
    as_list,
    describe_run,
    read_groups,
    study_command,
    write_study,
)
from segbench.ensemble import bootstrap, interval
from segbench.errors import PreemptedError, UnknownNameError, UsageError, unknown_name
from segbench.evidence import CLEAN
from segbench.models.sources.names import parse
from segbench.protocol import LINF, SEA_V1, comparison, radii_of
from segbench.signals import raised


@dataclass(frozen=True)
class Targeted:
    """What targeted attacks reached.

    Attributes:
        path: the run directory; ``targeted.json`` and ``targeted.parquet`` (the evidence) lie in it.
        rows: for each target and ε (0: the clean images) ``target`` (number), ``class`` (name), ``strength``,
            ``eps_255``, ``success``: the share of valid pixels that are predicted as the target, over all images, its
            95% interval ``success_95``, and ``whole``: the share of images of which at least 99% are.
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
    options: RunOptions | None = None,
) -> Targeted:
    """Draws all pixels of each image to one class, for each of the classes.

    Arguments and errors of `segbench.evaluate` mean the same here; ``options`` holds the other arguments. Besides:

    - ``targets``: classes, by number or name.
    - ``iterations``: of each attack; ``seed`` of the random starts.
    """
    options, source = options or RunOptions(), parse(model_or_id)
    data = open_dataset(source, dataset, data_root)
    classes = list(dict.fromkeys(class_number(each, data.class_names) for each in as_list(targets)))
    if not classes:
        raise UsageError(f"Which class? Give a name or number with --target. There are: {', '.join(data.class_names)}.")
    radii = radii_of(eps)
    names = [f"js_target_{each}" for each in classes]
    command = study_command("targeted --target", map(str, classes), seed)
    request = Request(source, data, data_root, out, limit, command)
    with prepare_run(request, radii, comparison(names, iterations, seed), options) as run:
        run_missing_units(run)
    chosen = {name: (number, data.class_names[number]) for name, number in zip(names, classes, strict=True)}
    return finish_run(run, lambda: _summarise(run.store, chosen, radii), "targeted.json", WITHOUT_SHARD)


def _summarise(store: Store, targets: Mapping[str, tuple[int, str]], strengths: Sequence[float]) -> Targeted:
    """Reads the units of these targets (attack to number and name) and radii, and writes ``targeted.json``."""
    groups, _ = read_groups(store, list(targets), strengths)
    rows = [
        {"target": number, "class": class_name, **LINF.names(radius), **_success(groups[key].counts, number)}
        for name, (number, class_name) in targets.items()
        for radius, key in [(0.0, CLEAN), *((radius, (radius, name)) for radius in strengths)]
    ]
    result = Targeted(store.path, rows, describe_run(store))
    write_study(store, "targeted", result.document(), groups)
    return result


def class_number(name: str | int, class_names: Sequence[str]) -> int:
    """The class of that number or name; UsageError if there is none.

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
