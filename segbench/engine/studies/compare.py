"""Attacks of the catalogue on one model, compared: the paper's Table 1 for any model.

Source: Croce, Singh, Hein, ECCV 2024, section 5 and Table 1. The run directory is that of an evaluation, with attacks
in the place of losses: it resumes, is divided into shards, and may be given more attacks and radii later.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from segbench.attacks.catalogue import Attack, get_attack
from segbench.counts import Counts
from segbench.data import SegmentationDataset
from segbench.engine.launch.dataset import open_dataset
from segbench.engine.launch.dispatch import PREEMPTED, finish_run, run_missing_units
from segbench.engine.launch.options import RunOptions
from segbench.engine.launch.prepare import Request, prepare_run, source_name
from segbench.engine.rundir.store import Store
from segbench.engine.studies.common import (
    FROM,
    WITHOUT_SHARD,
    as_list,
    describe_run,
    read_groups,
    study_command,
    write_study,
)
from segbench.ensemble import Replicates, bootstrap, chosen, interval, significantly_above, worst_case
from segbench.errors import PreemptedError, UsageError
from segbench.evidence import CLEAN, Group, Key
from segbench.models.load import LoadedModel, load
from segbench.models.sources.names import parse
from segbench.protocol import LINF, SEA_V1, TOLERANCES, comparison, radii_of
from segbench.signals import raised

if TYPE_CHECKING:
    import pandas as pd

BASELINES = ("pgd", "apgd", "segpgd", "cospgd")
ATTACKS = (*SEA_V1.losses, *BASELINES)
SEA, SEA_PLUS, ALL = "SEA", "SEA+", "all"
FURTHER = ("tsallis", "square")  # what SEA+ adds, with attacks made on other models
SEARCH = "square"
METRICS = ("aacc", "miou")
FEWEST = 6  # images below which no difference is significant: all of 5 agree by chance in 3% of cases


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        path: the run directory; ``comparison.json`` and ``comparison.parquet`` (the evidence) lie in it.
        rows: for each ε and attack ``attack``, ``strength`` (and ``eps_255``), ``aacc``, ``miou``, their 95% intervals
            ``aacc_95`` and ``miou_95`` (fractions in [0,1]), ``weaker`` (by metric: whether the strongest attack at
            this ε is significantly stronger; None with fewer than 6 images), ``gain`` (by metric: how far an ensemble
            is below its strongest attack), and the cost: ``forwards``, ``backwards``, ``seconds`` (null for ensembles,
            or if not known).
        flags: where an attack that needs no gradient of this model is below SEA by more than the tolerance of the
            protocol, a sign of masked gradients: ``attack``, ``strength``, ``eps_255``, ``metric``, ``below``. None if
            there is no such attack, or no SEA, to compare.
    """

    path: Path
    rows: list[dict[str, Any]]
    flags: list[dict[str, Any]] | None
    _about: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        flags = {} if self.flags is None else {"flags": self.flags}
        return {**self._about, "rows": self.rows, **flags}

    def table(self) -> pd.DataFrame:
        """One row for each ε and attack."""
        import pandas as pd

        table: pd.DataFrame = pd.DataFrame(self.rows)
        return table


@raised(SIGTERM, PreemptedError, PREEMPTED)
def compare(
    model_or_id: str | nn.Module,
    attacks: str | Sequence[str] = ATTACKS,
    dataset: str | SegmentationDataset | None = None,
    eps: str | float | Sequence[str | float] | None = None,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    iterations: int = SEA_V1.iterations,
    seed: int = SEA_V1.seed,
    sources: str | nn.Module | Sequence[str | nn.Module] = (),
    pairs: bool = False,
    options: RunOptions | None = None,
) -> Comparison:
    """Attacks the same images with several attacks under one budget.

    If the three losses of SEA are among the attacks, their ensemble is a row as well (``SEA``); with ``tsallis`` and
    ``square`` so is ``SEA+``, the best known; and that of all. An ensemble chooses among its attacks and the clean
    image, for each image.

    Arguments and errors of `segbench.evaluate` mean the same here; ``options`` holds the other arguments. Besides:

    - ``attacks``: names of `segbench.attacks.catalogue.ATTACKS`; ``iterations`` of each, its restarts together.
    - ``seed``: of the random starts.
    - ``sources``: other models of the same classes: the three attacks of SEA on each, whose adversarial images this
      model faces (transfer; Croce, Singh, Hein, ECCV 2024, Table 9).
    - ``pairs``: the ensemble of each two attacks as well (Table 7).
    """
    if not attacks:
        raise UsageError("Which attacks? See: segbench attack list")
    options = options or RunOptions()
    radii = radii_of(eps)
    parts = {name: _listed(name, iterations).parts() for name in dict.fromkeys(as_list(attacks))}
    source, models = parse(model_or_id), list[LoadedModel]()
    if sources:
        dataset = open_dataset(source, dataset, data_root)
        models = _load_sources(as_list(sources), dataset.num_classes, options)
    for model in models:
        parts |= {f"{loss}{FROM}{model.id}": [f"{loss}_from_{source_name(model)}"] for loss in SEA_V1.losses}
    protocol = comparison([part for each in parts.values() for part in each], iterations, seed)
    ids = [each.id for each in models]
    request = Request(source, dataset, data_root, out, limit, study_command("compare --attacks", parts, seed, ids))
    with prepare_run(request, radii, protocol, options, models) as run:
        run_missing_units(run)
    ensembles = _ensembles(list(parts), ids, pairs=pairs)
    return finish_run(run, lambda: summarise(run.store, parts, radii, ensembles), "comparison.json", WITHOUT_SHARD)


def _listed(name: str, iterations: int) -> Attack:
    attack = get_attack(name, iterations)
    if attack.source:
        raise UsageError(f"{name} is made on another model: name the model, with --from (sources in Python).")
    if attack.target is not None:
        raise UsageError(f"{name} is a targeted attack: segbench attack targeted --target {attack.target}")
    return attack


def _load_sources(models: Sequence[str | nn.Module], num_classes: int, options: RunOptions) -> list[LoadedModel]:
    found = [
        load(parse(each), num_classes=num_classes, offline=options.offline, progress=options.progress)
        for each in models
    ]
    names = [each.id for each in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"Two models to transfer from have the name {twice[0]}: one at a time, the run adds up.")
    return found


class _Attacked(NamedTuple):
    """What an attack left of each image, for either metric, and what it cost."""

    aacc: Counts
    miou: Counts
    cost: dict[str, Any]


def summarise(
    store: Store,
    parts: Mapping[str, Sequence[str]],
    strengths: Sequence[float],
    ensembles: Mapping[str, Sequence[str]],
) -> Comparison:
    """Reads the units of these attacks and radii, and writes ``comparison.json`` and its evidence.

    ``parts`` are the restarts of each attack, as its units are named; ``ensembles`` the members of each.
    """
    losses = [part for each in parts.values() for part in each]
    groups, costs = read_groups(store, losses, strengths)
    clean = groups[CLEAN].counts
    rows = [_row("clean", 0.0, _Attacked(clean, clean, _NO_COST), bootstrap(clean, clean))]
    for eps in strengths:
        found = {name: _of_attack(groups, costs, eps, each) for name, each in parts.items()}
        for name, members in ensembles.items():
            worst = worst_case([clean, *(groups[eps, part].counts for each in members for part in parts[each])])
            found[name] = _Attacked(worst.aacc_counts, worst.miou_counts, _NO_COST)
        rows += _rows(eps, found, ensembles)
    result = Comparison(store.path, rows, _flags(rows), describe_run(store))
    write_study(store, "comparison", result.document(), groups)
    return result


_NO_COST: dict[str, Any] = {"forwards": None, "backwards": None, "seconds": None}


def _ensembles(names: Sequence[str], sources: Sequence[str], *, pairs: bool) -> dict[str, list[str]]:
    """Name and members."""
    sea = list(SEA_V1.losses)
    transferred = {f"{SEA}{FROM}{source}": [f"{loss}{FROM}{source}" for loss in sea] for source in sources}
    found = {SEA: sea} if set(sea) <= set(names) else {}
    found |= transferred
    if {*sea, *FURTHER} <= set(names):
        found[SEA_PLUS] = [*sea, *FURTHER, *itertools.chain(*transferred.values())]
    if pairs:
        own = [name for name in names if FROM not in name]
        found |= {f"{one} + {two}": [one, two] for one, two in itertools.combinations(own, 2)}
    if len(names) > 1 and all(set(names) != set(members) for members in found.values()):
        found[ALL] = list(names)
    return found


def _flags(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Where the black-box search, or an attack on another model, is stronger than SEA."""
    sea = {row["strength"]: row for row in rows if row["attack"] == SEA}
    suspects = [row for row in rows if row["strength"] in sea and (row["attack"] == SEARCH or FROM in row["attack"])]
    if not suspects:
        return None
    return [
        {"attack": row["attack"], **LINF.names(row["strength"]), "metric": metric, "below": below}
        for row in suspects
        for metric in METRICS
        if (below := sea[row["strength"]][metric] - row[metric]) > TOLERANCES[SEA_V1.name].worst_case
    ]


def _of_attack(
    groups: Mapping[Key, Group], costs: Mapping[Key, list[dict[str, Any]]], eps: float, parts: Sequence[str]
) -> _Attacked:
    """Of several restarts the one with the fewest right pixels counts, image by image."""
    candidates = [groups[eps, part].counts for part in parts]
    counts = chosen(candidates, np.argmin([each.correct for each in candidates], axis=0))
    units = [cost for part in parts for cost in costs[eps, part]]
    known = [cost["seconds"] for cost in units if cost["seconds"] is not None]
    passes = {name: sum(cost[name] for cost in units) for name in ("forwards", "backwards")}
    return _Attacked(counts, counts, passes | {"seconds": round(sum(known), 3) if len(known) == len(units) else None})


def _rows(eps: float, found: Mapping[str, _Attacked], ensembles: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """One for each attack and ensemble: each attack beside the strongest one, each ensemble beside its strongest."""
    single = [name for name in found if name not in ensembles]
    samples = {name: bootstrap(each.aacc, each.miou) for name, each in found.items()}
    rows = {name: _row(name, eps, each, samples[name]) for name, each in found.items()}
    for metric in METRICS:
        strongest = min(single, key=lambda name: rows[name][metric])
        enough = found[strongest].aacc.num_images >= FEWEST
        for name in single if enough else ():
            above = significantly_above(getattr(samples[strongest], metric), getattr(samples[name], metric)[None])
            rows[name]["weaker"][metric] = bool(above[0])
        for name, members in ensembles.items():
            rows[name]["gain"][metric] = min(rows[each][metric] for each in members) - rows[name][metric]
    return list(rows.values())


def _row(name: str, eps: float, found: _Attacked, samples: Replicates) -> dict[str, Any]:
    return {
        "attack": name,
        **LINF.names(eps),
        "aacc": found.aacc.aacc(),
        "aacc_95": list(interval(samples.aacc)),
        "miou": found.miou.miou(),
        "miou_95": list(interval(samples.miou)),
        "weaker": dict.fromkeys(METRICS),
        "gain": dict.fromkeys(METRICS),
        **found.cost,
    }
