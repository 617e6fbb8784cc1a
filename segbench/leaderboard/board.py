"""Entries, cards and what lies beside them, as the rows of the leaderboard's tables: plain JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np

from segbench import cards, content, ensemble, entries
from segbench.cards import ModelCard
from segbench.data.catalogue import class_names
from segbench.entries import additions
from segbench.errors import ContentError
from segbench.leaderboard.assessment import Assessment, assess_all, view_of
from segbench.leaderboard.explanations import OVERESTIMATES, explanation
from segbench.leaderboard.ranking import Contender, ranks
from segbench.leaderboard.verdict import why_unranked
from segbench.protocol import OFFICIAL_RADII_255, PROTOCOLS, Threat

METRICS = ("aacc", "miou")
CLEAN, MEAN = "clean", "mean"  # views besides the radii; the mean is over the radii of the protocol


@dataclass(frozen=True)
class Table:
    """The entries of one data set under one protocol.

    Attributes:
        protocol: its name.
        dataset: id of the data set.
        threat: of the protocol, the fields of a `segbench.protocol.Threat`.
        views: names of the scores: ``clean``, ``mean`` (over the protocol's radii) and each ε over 255 as text.
        radii: every ε over 255 that some entry has.
        class_names: index = label.
        rows: best first, by the mean mIoU over the protocol's radii, those without a rank last; see `_row`.
    """

    protocol: str
    dataset: str
    threat: dict[str, str]
    views: list[str]
    radii: list[float]
    class_names: list[str]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Board:
    """All tables, sorted by data set; of one data set the newest protocol first."""

    tables: list[Table]


def load(root: Path | None = None, *, processes: int = 1) -> Board:
    """Reads cards, entries and evidence of a checkout, or of the installation.

    Args:
        root: holds ``model_zoo/`` and ``entries/``.
        processes: that read evidence side by side, if there is much; a script that asks for several needs the usual
            ``if __name__ == "__main__":``.

    Raises:
        ContentError: something is damaged; `segbench validate` says more.
    """
    paths = entries.entry_paths(root / "entries" if root else None)
    zoo = {}
    for path in cards.card_paths(root / "model_zoo" if root else None):
        card = cards.read_card(path)
        zoo[card.id, card.dataset] = card
    groups: dict[tuple[str, str], list[_Source]] = {}
    for path, (entry, assessment) in zip(paths, assess_all(paths, processes), strict=True):
        dataset = entry["dataset"]["id"]
        model = entry["model"]["id"]
        found = zoo.get((model, dataset)) or zoo.get((model, content.family(dataset)))
        if found is None:
            raise ContentError(f"{path}: there is no card of {model} in model_zoo/. See: segbench validate")
        key = content.dataset_folder(dataset), entry["protocol"]["name"]
        groups.setdefault(key, []).append(_Source(path, entry, found, assessment))
    newest_first = {name: -place for place, name in enumerate(PROTOCOLS)}
    order = sorted(groups, key=lambda key: (key[0], newest_first.get(key[1], 1), key[1]))
    return Board([_table(groups[key]) for key in order])


@dataclass(frozen=True)
class _Source:
    path: Path
    entry: dict[str, Any]
    card: ModelCard
    assessment: Assessment | None


def _table(sources: Sequence[_Source]) -> Table:
    first = sources[0].entry
    radii = sorted({result["strength"] for source in sources for result in source.entry["results"]})
    views = [CLEAN, MEAN, *map(view_of, radii)]
    rows = [_row(source) for source in sources]
    for row in rows:
        row["scores"] = {view: row["scores"].get(view) for view in views}
    kinds = [(view, metric) for view in views for metric in METRICS]
    contenders = [
        [_contender(source, row, view, metric) for source, row in zip(sources, rows, strict=True)]
        for view, metric in kinds
    ]
    with ThreadPoolExecutor(cpu_count()) as pool:  # numpy compares without the lock of Python
        for (view, metric), found in zip(kinds, pool.map(ranks, contenders), strict=True):
            for row, rank in zip(rows, found, strict=True):
                if row["scores"][view] and row["scores"][view][metric]:
                    row["scores"][view][metric]["rank"] = rank
    names = class_names(first["dataset"]["id"])
    if names is None or len(names) != first["dataset"]["num_classes"]:
        names = tuple(f"class {number}" for number in range(first["dataset"]["num_classes"]))
    rows.sort(key=_order)
    return Table(
        first["protocol"]["name"],
        first["dataset"]["id"],
        dict(first["protocol"]["threat"]),
        views,
        radii,
        list(names),
        rows,
    )


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Ranked rows first, then by mean mIoU over the protocol's radii, measured before reported, clean mIoU, id."""
    mean = (row["scores"][MEAN] or {}).get("miou")
    value = mean["value"] if mean else -1.0
    return (row["unranked"] is not None, -value, row["tier"] == "reported", -row["clean"]["miou"], row["id"])


def _contender(source: _Source, row: Mapping[str, Any], view: str, metric: str) -> Contender:
    score = (row["scores"][view] or {}).get(metric)
    samples = None
    if source.assessment:
        samples = _replicates(source.assessment, view, metric)
    return Contender(
        score["value"] if score and row["unranked"] is None else None,
        samples,
        source.assessment.images if source.assessment else None,
        row["tier"] != "reported",
    )


def _replicates(assessment: Assessment, view: str, metric: str) -> Any:
    found = assessment.replicates
    if view != MEAN:
        return found[view][metric] if view in found else None
    official = [view_of(eps) for eps in OFFICIAL_RADII_255]
    return np.mean([found[each][metric] for each in official], axis=0) if set(official) <= set(found) else None


def _row(source: _Source) -> dict[str, Any]:
    """One row; the contract with markdown, site and exports."""
    entry, card, training = source.entry, source.card, source.card.training
    reproductions = additions.additions(source.path, additions.REPRODUCED)
    known = source.assessment.best_known if source.assessment else [_lowest(row) for row in entry["results"]]
    results = [{**row, "best_known": best} for row, best in zip(entry["results"], known, strict=True)]
    flags = _flags(entry, results)
    entry_file = "/".join(["entries", *source.path.parts[-3:]])
    steps, epochs = training["attack_steps"], training["epochs"]
    row = {
        "id": card.id,
        "title": card.title,
        "protocol": entry["protocol"]["name"],
        "dataset": entry["dataset"]["id"],
        "num_classes": entry["dataset"]["num_classes"],
        "method": training["method"],
        "architecture": card.architecture["name"],
        "backbone": card.backbone,
        "parameters": card.parameters,
        "tier": additions.tier(entry, reproductions),
        "source": entry["claim"]["source"],
        "extra_data": training["extra_data"],
        "initialisation": training["initialisation"],
        "licence": card.licence,
        "training": {
            "eps_255": training["eps_255"],
            "attack_steps": steps,
            "epochs": epochs,
            "passes": None if steps is None or epochs is None else epochs * (steps + 1),
        },
        "paper": card.paper,
        "weights": [_weights(each) for each in card.sources],
        "loadable": bool(card.sources),
        "entry_file": entry_file,
        "evidence_file": entry_file.removesuffix(".json") + ".parquet" if entry["evidence"] else None,
        "scores": _scores(entry, results, source.assessment),
        "results": results,
        "clean": entry["clean"],
        "flags": flags,
        "unranked": why_unranked(flags, entry["protocol"]["name"]),
        "run": entry["run"],
        "official": entry["protocol"]["official"],
        "submitter": entry["claim"]["submitter"],
        "date": entry["claim"]["date"],
        "history": entry["history"],
        "external": additions.additions(source.path, additions.EXTERNAL),
        "reproductions": [_reproduction(record) for record in reproductions],
        "detail": source.assessment.detail if source.assessment else None,
    }
    tidied: dict[str, Any] = tidy(row)
    return tidied


def _lowest(result: Mapping[str, Any]) -> dict[str, Any]:
    """Best known of a reported result: the lowest of all attacks that were published with it."""
    attacks = result["per_loss"] or {}
    known: dict[str, Any] = {m: min([result[m], *(scores[m] for scores in attacks.values())]) for m in METRICS}
    by = {name for name, scores in attacks.items() for m in METRICS if known[m] < result[m] and scores[m] == known[m]}
    return {**known, "by": sorted(by)}


def _scores(
    entry: Mapping[str, Any], results: Sequence[Mapping[str, Any]], assessment: Assessment | None
) -> dict[str, Any]:
    found: dict[str, Any] = {CLEAN: {metric: _score(entry["clean"][metric]) for metric in METRICS}, MEAN: None}
    if assessment:
        for metric in METRICS:
            samples = _replicates(assessment, CLEAN, metric)
            found[CLEAN][metric]["interval"] = list(ensemble.interval(samples.astype(float)))
    for row in results:
        interval = row["interval"] or {}
        found[view_of(row["strength"])] = {
            metric: _score(row[metric], interval.get(metric), row["best_known"][metric]) for metric in METRICS
        }
    official = [view_of(eps) for eps in OFFICIAL_RADII_255]
    if set(official) <= set(found):
        found[MEAN] = {
            metric: _mean([found[view][metric] for view in official], assessment, metric) for metric in METRICS
        }
    return found


def _score(value: float | None, interval: Any = None, best_known: float | None = None) -> dict[str, Any] | None:
    if value is None:
        return None
    known = value if best_known is None else best_known
    return {"value": value, "interval": interval, "best_known": known, "rank": None}


def _mean(scores: Sequence[Mapping[str, Any]], assessment: Assessment | None, metric: str) -> dict[str, Any] | None:
    samples = _replicates(assessment, MEAN, metric) if assessment else None
    interval = list(ensemble.interval(samples.astype(float))) if samples is not None else None
    values = [sum(score[key] for score in scores) / len(scores) for key in ("value", "best_known")]
    return _score(values[0], interval, values[1])


def _flags(entry: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [{**flag, "explanation": explanation(flag["name"])} for flag in entry["flags"]]
    if entry["evidence"] is None:
        return found
    for row in results:
        if additions.overestimates(row, row["best_known"], entry["protocol"]["name"]):
            gap = max(row[metric] - row["best_known"][metric] for metric in METRICS)
            text = f"{', '.join(row['best_known']['by'])} found lower scores at ε = {row['strength']:g}/255."
            found.append(
                {
                    **entries.flag(OVERESTIMATES, gap, "warning", text[:300]),
                    "explanation": explanation(OVERESTIMATES),
                }
            )
    return found


def _weights(source: Mapping[str, Any]) -> dict[str, Any]:
    if source["type"] == "hub":
        url = f"https://huggingface.co/{source['repo']}/blob/{source['revision']}/{source['file']}"
        return {"label": f"Hugging Face, {source['repo']}", "url": url}
    if source["type"] == "package":
        return {"label": f"in the repository, {source['file']}", "url": None}
    return {"label": "its authors' link", "url": source["url"] if source["url"].startswith("https://") else None}


def _reproduction(record: Mapping[str, Any]) -> dict[str, Any]:
    differences = [abs(row["stored_aacc"] - row["found_aacc"]) for row in record["comparison"]]
    return {
        "name": record["evidence"]["file"].removesuffix(".parquet"),
        "by": record["by"],
        "date": record["date"],
        "images": record["images"],
        "radii": record["strengths"],
        "device": record["run"]["device"],
        "difference": max(differences),
        "agrees": record["agrees"],
    }


def tidy(value: Any) -> Any:
    r"""Texts of strangers without control and format characters, line breaks kept; everything else as it is.

    >>> tidy({"a": ["x\u202ey", 1]})
    {'a': ['xy', 1]}
    """
    if isinstance(value, str):
        return value if value.isprintable() else "".join(char for char in value if char.isprintable() or char == "\n")
    if isinstance(value, dict):
        return {tidy(key): tidy(each) for key, each in value.items()}
    if isinstance(value, list):
        return [tidy(each) for each in value]
    return value


def document(board: Board) -> dict[str, Any]:
    """The tables as JSON data, without what only the pages of the models show."""
    tables = [
        Threat(**table.threat).printed(
            {
                **{
                    field.name: getattr(table, field.name)
                    for field in dataclasses.fields(table)
                    if field.name != "rows"
                },
                "rows": [{key: value for key, value in row.items() if key != "detail"} for row in table.rows],
            }
        )
        for table in board.tables
    ]
    return {"schema_version": 2, "tables": tables}
