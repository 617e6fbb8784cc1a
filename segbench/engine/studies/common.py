"""What the studies share: the command that repeats one, its units read back, its result written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from segbench import evidence, schemas
from segbench.engine.rundir.merge import merge_units
from segbench.engine.rundir.store import FIX, Store
from segbench.evidence import CLEAN, Evidence, Group, Key
from segbench.files import write_results
from segbench.protocol import SEA_V1

WITHOUT_SHARD = "the same command without --shard"
FROM = " from "  # in the name of an attack that is made on another model


def as_list(value: Any) -> list[Any]:
    """A list of one, where a single value is given instead of several: a name is no list of letters.

    >>> as_list("mce"), as_list(("mce", "js"))
    (['mce'], ['mce', 'js'])
    """
    return [value] if isinstance(value, str | int | nn.Module) else list(value)


def study_command(kind: str, what: Iterable[str], seed: int, sources: Sequence[str] = ()) -> str:
    """The command with the options that only it has; ``what`` are its attacks, or the targets.

    >>> study_command("compare --attacks", ["mce", "mce from at_mini"], 7, ["at_mini"])
    'attack compare --attacks mce --from at_mini --seed 7'
    """
    parts = [f"attack {kind}", *(each for each in what if FROM not in each)]
    parts += ["--from", *sources] if sources else []
    parts += ["--seed", str(seed)] if seed != SEA_V1.seed else []
    return " ".join(parts)


def read_groups(
    store: Store, losses: Sequence[str], strengths: Sequence[float]
) -> tuple[dict[Key, Group], dict[Key, list[dict[str, Any]]]]:
    """The counts of each (ε, attack), and the cost of its units; IncompleteError if units are missing."""
    wanted = {CLEAN, *((eps, loss) for eps in strengths for loss in losses)}
    finished = store.read_all([unit for unit in store.units(strengths) if (unit.strength, unit.loss) in wanted])
    costs: dict[Key, list[dict[str, Any]]] = {}
    logged = store.costs()
    for unit, _, stats in finished:
        passes = {name: sum(stats[name]) for name in ("forwards", "backwards")}
        seconds = logged.get(unit.name, {}).get("seconds")
        costs.setdefault((unit.strength, unit.loss), []).append(passes | {"seconds": seconds})
    return merge_units(finished), costs


def describe_run(store: Store) -> dict[str, Any]:
    """What a study's document says of its run."""
    manifest = store.manifest
    return {
        "model": manifest["model"],
        "dataset": manifest["dataset"],
        "iterations": manifest["protocol"]["iterations"],
        "seed": manifest["protocol"]["seed"],
        "environment": manifest["environment"],
        "run_id": manifest["run_id"],
    }


def write_study(
    store: Store, name: str, document: Mapping[str, Any], groups: Mapping[Key, Group] | None = None
) -> None:
    """Writes ``<name>.json`` into a run directory, and its counts as ``<name>.parquet``."""
    files = {store.path / f"{name}.json": schemas.dump(dict(document)).encode()}
    if groups is not None:
        metadata = {key: store.manifest[key] for key in ("run_id", "identity", "protocol")}
        metadata["num_classes"] = groups[CLEAN].counts.num_classes
        files = {store.path / f"{name}.parquet": evidence.to_bytes(Evidence(groups, metadata))} | files
    write_results(files, FIX)
