"""The page of a model: numbers first, then where they come from and how to get them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from segbench.content import family
from segbench.leaderboard.site import bibtex, drawings, text
from segbench.leaderboard.site.files import model_page
from segbench.leaderboard.site.pages import Pages
from segbench.leaderboard.site.shape import METRICS, Board, Row, Table

LOSSES = {
    "mce_bal": "balanced masked cross-entropy",
    "mce": "masked cross-entropy",
    "js": "Jensen–Shannon divergence",
    "ce": "cross-entropy",
    "mce_bal_std": "balanced masked cross-entropy, standardised",
    "mce_std": "masked cross-entropy, standardised",
    "js_std": "Jensen–Shannon divergence, standardised",
    "segpgd": "SegPGD",
    "cospgd": "CosPGD",
}
TIERS = {
    "reported": "The numbers are copied from a publication; nobody recomputed them here.",
    "checked": "Every number is recomputed from the integer counts that lie beside the entry.",
    "reproduced": "Somebody else attacked a sample of the images again and got the same numbers.",
}
EMBEDDED = {"shapes"}  # data sets that come with the package
PREPARED = {"pascal_voc", "ade20k", "cityscapes", "camvid"}  # data sets that `segbench data prepare` knows
SHADES = 20
Places = Mapping[str, list[tuple[str, str]]]


def places(board: Board) -> Places:
    """For each model id its pages: (path, where)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for table in board.tables:
        where = f"{text.clean(table.dataset, 60)} ({text.clean(table.protocol, 40)})"
        for row in table.rows:
            found.setdefault(row["id"], []).append((model_page(table, row), where))
    return found


def render(
    pages: Pages, table: Table, row: Row, linked: Callable[[str | None], str | None], elsewhere: Places
) -> bytes:
    """The page of one row; ``linked`` and ``elsewhere`` as in `index.render` and `places`."""
    path = model_page(table, row)
    paper = row["paper"]
    return pages.render(
        "model.html.j2",
        path,
        id=text.clean(row["id"], 200),
        title=text.clean(row["title"], 300),
        dataset=text.clean(table.dataset, 80),
        protocol=text.clean(table.protocol, 60),
        home=f"index.html#data={quote(f'{table.protocol}/{table.dataset}')}",
        tier=row["tier"],
        tier_text=TIERS.get(row["tier"], ""),
        official=row["official"],
        unranked=row["unranked"],
        source=text.clean(row["source"], 200) if row["source"] else None,
        load=f"segbench.load_model({json.dumps(row['id'], ensure_ascii=False)})" if row["loadable"] else None,
        scores=_scores(table, row),
        bounds=_bounds(row),
        intervals=any(
            score and score["interval"] for pair in row["scores"].values() if pair for score in pair.values()
        ),
        by=sorted(
            {LOSSES.get(name) or text.clean(name, 60) for part in row["results"] for name in part["best_known"]["by"]}
        ),
        curve=drawings.curve(table, row),
        losses=_losses(row),
        classes=_classes(table, row),
        images=row["detail"]["images"] if row["detail"] else None,
        histograms=drawings.histograms(table, row),
        flags=[_flag(flag) for flag in row["flags"]],
        external=[_external(attack) for attack in row["external"]],
        about=_facts(row),
        run=_run(row),
        weights=[(text.clean(part["label"], 100), text.link(part["url"])) for part in row["weights"]],
        paper=_paper(paper) if paper else None,
        commands=_commands(table, row),
        entry=linked(row["entry_file"]),
        evidence=linked(row["evidence_file"]),
        reproductions=[_reproduction(part) for part in row["reproductions"]],
        history=[(text.clean(part["date"], 20), text.clean(part["text"], 1000)) for part in row["history"]],
        elsewhere=[place for place in elsewhere[row["id"]] if place[0] != path],
    )


def _scores(table: Table, row: Row) -> list[dict[str, Any]]:
    lines = []
    for view in table.views:
        pair = row["scores"].get(view)
        if not pair:
            continue
        cells = {}
        for metric in METRICS:
            score = pair[metric] or {"value": None, "interval": None, "best_known": None, "rank": None}
            cells[metric] = {
                "value": text.percent(score["value"]),
                "interval": text.interval(score["interval"]),
                "best": text.percent(score["best_known"]),
                "lower": text.beaten(score),
                "rank": score["rank"] or text.NOTHING,
            }
        lines.append({"view": text.view_label(view, short=True), **cells})
    return lines


def _bounds(row: Row) -> list[dict[str, str]]:
    """How far the search for the worst case mIoU may be from the best choice among its candidates."""
    return [
        {
            "view": text.view_label(f"{part['strength']:g}"),
            "bound": text.percent(part["miou_lower_bound"]),
            "gap": text.percent(part["miou"] - part["miou_lower_bound"]),
        }
        for part in row["results"]
        if part["miou_lower_bound"] is not None
    ]


def _losses(row: Row) -> list[dict[str, Any]]:
    groups = []
    for part in row["results"]:
        if not part["per_loss"]:
            continue
        rows = [
            {
                "name": LOSSES.get(name) or text.clean(name, 60),
                **{metric: text.percent(values[metric]) for metric in METRICS},
                **{f"won_{metric}": _share(values[f"won_{metric}"]) for metric in METRICS},
            }
            for name, values in part["per_loss"].items()
        ]
        worst = {metric: text.percent(part[metric]) for metric in METRICS}
        groups.append({"eps": text.eps(part["strength"]), "rows": rows, "worst": worst})
    return groups


def _share(value: float | None) -> dict[str, Any]:
    """A fraction as a shaded cell."""
    return {"text": text.percent(value), "shade": None if value is None else round(SHADES * min(1.0, max(0.0, value)))}


def _classes(table: Table, row: Row) -> dict[str, Any] | None:
    detail = row["detail"]
    if not detail:
        return None
    views = [view for view in table.views if view in detail["iou"]]
    names = [text.clean(name, 60) for name in table.class_names]
    return {
        "views": [text.view_label(view, short=True) for view in views],
        "rows": [
            (name, [_share(detail["iou"][view][number]) for view in views])
            for number, name in enumerate(names)
            if all(number < len(detail["iou"][view]) for view in views)
        ],
    }


def _flag(flag: Mapping[str, Any]) -> dict[str, Any]:
    value = flag["value"]
    return {
        "name": text.clean(flag["name"], 60).replace("_", " "),
        "level": flag["level"],
        "value": text.NOTHING if value is None else f"{value:.3g}",
        "message": text.clean(flag["message"], 1000),
        "explanation": text.clean(flag["explanation"], 1000),
    }


def _external(attack: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": text.clean(attack["name"], 80),
        "author": text.clean(attack["author"] or "", 120),
        "url": text.link(attack["url"]),
        "description": text.clean(attack["description"] or "", 600),
        "date": text.clean(attack["date"], 20),
        "results": [
            {"eps": text.eps(part["strength"]), **{metric: text.percent(part[metric]) for metric in METRICS}}
            for part in attack["results"]
        ],
    }


def _facts(row: Row) -> list[tuple[str, str]]:
    training = row["training"]
    budget = None if training["eps_255"] is None else text.eps(training["eps_255"])
    passes = None
    if training["passes"] is not None:
        passes = f"{text.count(training['passes'])} forward-backward passes per training image"
    found = {
        "Method": row["method"],
        "Architecture": row["architecture"],
        "Backbone": row["backbone"],
        "Parameters": text.parameters(row["parameters"]) if row["parameters"] is not None else None,
        "Initialisation": row["initialisation"],
        "Extra data": row["extra_data"],
        "Trained against": f"ε = {budget}" if budget else None,
        "Attack steps": training["attack_steps"],
        "Epochs": training["epochs"],
        "Training cost": passes,
        "Licence": row["licence"],
        "Sent in by": row["submitter"],
        "Date": row["date"],
    }
    return [(name, text.clean(str(value), 200)) for name, value in found.items() if value is not None]


def _run(row: Row) -> list[tuple[str, str]]:
    run = row["run"]
    if not run:
        return []
    found = {
        "Time": text.duration(run["seconds"]) if run["seconds"] is not None else None,
        "Device": run["device"],
        "GPU-hours": f"{run['gpu_hours']:.2f}" if run["gpu_hours"] else None,
        "Forward passes": text.count(run["forward_passes"]),
        "Backward passes": text.count(run["backward_passes"]),
        "Images per second": f"{run['images_per_second']:.1f}" if run["images_per_second"] else None,
        "Peak memory": text.size(run["peak_memory_bytes"]) if run["peak_memory_bytes"] else None,
        "Energy": f"{run['energy_joules'] / 3.6e6:.3g} kWh" if run["energy_joules"] else None,
        "Precision": run["precision"] + (", compiled" if run["compiled"] else ""),
        "Command": run["command"],
        "Versions": ", ".join(f"{name} {version}" for name, version in (run["versions"] or {}).items()),
        "Commit": run["git_commit"],
    }
    return [(name, text.clean(str(value), 400)) for name, value in found.items() if value]


def _paper(paper: Mapping[str, Any]) -> dict[str, Any]:
    where = [text.clean(str(part), 200) for part in (paper["venue"], paper["year"]) if part]
    return {
        "title": text.clean(paper["title"], 400),
        "url": text.link(paper["url"]),
        "authors": ", ".join(text.clean(name, 80) for name in paper["authors"][:20]),
        "where": ", ".join(where),
        "bibtex": bibtex.entry(dict(paper)),
    }


def _commands(table: Table, row: Row) -> list[tuple[str, str]]:
    """(what for, command); only what can work for this row."""
    name, entry = (shlex.quote(text.clean(part, 200)) for part in (row["id"], row["entry_file"]))
    root = "" if table.dataset in EMBEDDED else " --data-root DATA"
    found = []
    if row["evidence_file"]:
        found.append(("Recompute every number from the counts, in seconds", f"segbench verify {entry}"))
        if row["loadable"]:
            found.append(("Attack a sample of the images again", f"segbench reproduce {entry} --sample 20{root}"))
    if row["loadable"]:
        if family(table.dataset) in PREPARED:
            found.append(("Get the data set", f"segbench data prepare {family(table.dataset)} --root DATA"))
        dataset = "" if "/" not in table.dataset else f" --dataset {shlex.quote(text.clean(table.dataset, 80))}"
        found.append(("Run the whole protocol", f"segbench evaluate --model {name}{dataset}{root}"))
    return found


def _reproduction(part: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": text.clean(part["name"], 80),
        "by": text.clean(part["by"] or "", 80),
        "date": text.clean(part["date"], 20),
        "images": text.count(part["images"]),
        "device": text.clean(part["device"] or "", 80),
        "radii": ", ".join(text.eps(radius) for radius in part["radii"]),
        "difference": f"{100 * part['difference']:.2f}",
        "verdict": "agrees" if part["agrees"] else "differs",
    }
