"""``models`` and ``show``."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from segbench import cards, downloads, entries, plugins
from segbench.cards import ModelCard
from segbench.cli.app import ManyValues, note, print_json, print_table, printable
from segbench.errors import UnknownNameError, UsageError, unknown_name
from segbench.protocol import Threat


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _millions(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.2f}M"


def _eps(value: float | None) -> str:
    return "–" if value is None else f"{value:g}/255"


def _text(value: object) -> str:
    return "–" if value is None else str(value)


def _cached(card: ModelCard) -> str:
    if not card.sources:
        return "–"
    return "yes" if cards.cached_weights(card) else "no"


# Column -> (heading, ">" for right-aligned; cell).
COLUMNS: Mapping[str, tuple[str, Callable[[ModelCard], str]]] = {
    "id": ("id", lambda card: card.id),
    "title": ("title", lambda card: card.title),
    "dataset": ("data set", lambda card: card.dataset),
    "classes": (">classes", lambda card: str(card.num_classes)),
    "method": ("method", lambda card: card.training["method"]),
    "architecture": ("architecture", lambda card: card.architecture["name"]),
    "parameters": (">parameters", lambda card: _millions(card.parameters)),
    "eps": (">training ε", lambda card: _eps(card.training["eps_255"])),
    "steps": (">steps", lambda card: _text(card.training["attack_steps"])),
    "epochs": (">epochs", lambda card: _text(card.training["epochs"])),
    "initialisation": ("initialisation", lambda card: _text(card.training["initialisation"])),
    "aacc": (">clean aAcc", lambda card: _percent((card.expected or {}).get("aacc"))),
    "miou": (">clean mIoU", lambda card: _percent((card.expected or {}).get("miou"))),
    "weights": ("weights", lambda card: ", ".join(source["type"] for source in card.sources) or "not published"),
    "cached": ("on this machine", _cached),
    "licence": ("licence", lambda card: card.licence or "unknown"),
    "year": (">year", lambda card: _text((card.paper or {}).get("year"))),
    "paper": ("paper", lambda card: (card.paper or {}).get("url", "–")),
}
WIDE = 120  # characters that the usual columns need
FEW_COLUMNS = ("id", "miou", "weights")
USUAL_COLUMNS = ("id", "dataset", "title", "parameters", "aacc", "miou", "weights")


@click.command(cls=ManyValues)
@click.argument("pattern", default="*", envvar=None)
@click.option("--dataset", help="Data set, or a pattern of it.")
@click.option("--architecture", help='Architecture or backbone, or a pattern: "upernet*", "ViT-S*".')
@click.option("--method", help='Training method, or a pattern: AT, "pir*".')
@click.option("--available", is_flag=True, help="Only models whose weights can be had.")
@click.option("--columns", multiple=True, help=f"Any of: {', '.join(COLUMNS)}.  [default: {' '.join(USUAL_COLUMNS)}]")
@click.option("--json", is_flag=True, help="Print the cards as a JSON list.")
def models(
    pattern: str,
    dataset: str | None,
    architecture: str | None,
    method: str | None,
    available: bool,
    columns: tuple[str, ...],
    json: bool,
) -> None:
    """List the models of the zoo whose id matches PATTERN, e.g. "*shapes"."""
    usual = USUAL_COLUMNS if shutil.get_terminal_size().columns >= WIDE or not sys.stdout.isatty() else FEW_COLUMNS
    chosen = [name for text in columns for name in text.split(",") if name] or list(usual)
    for name in chosen:
        if name not in COLUMNS:
            raise UsageError(unknown_name("column", name, COLUMNS))
    found = cards.list_models(pattern, dataset=dataset, architecture=architecture, method=method, available=available)
    if json:
        print_json([card.document() for card in found])
        return
    if not found:
        near = [card.id for card in cards.list_models(f"*{pattern}*")] if pattern.isidentifier() else []
        note(f"No model fits. {len(near)} ids hold it: segbench models '*{pattern}*'" if near else "No model fits.")
        note("All of them: segbench models")
        return
    print_table([COLUMNS[name][0] for name in chosen], [[COLUMNS[name][1](card) for name in chosen] for card in found])
    if any((dataset, architecture, method, available)):
        return  # nothing of that is known of a plugin's model
    for plugin in plugins.list_plugins():
        if not fnmatchcase(plugin.name, pattern.lower()):
            continue
        if any(card.id == plugin.name for card in cards.list_models(plugin.name)):
            note(f"The plugin {plugin.name} of {plugin.package} is hidden by the model of the zoo with that name.")
            continue
        click.echo(printable(f"plugin {plugin.name}: {plugin.value} of {plugin.package} {plugin.version}"))


@click.command()
@click.argument("model_id")
@click.option("--json", is_flag=True, help="Print card and entries as JSON.")
@click.option("--download", is_flag=True, help="Fetch the weights now, check their hash, and say where they are.")
@click.option("--offline", is_flag=True, help="With --download: only look on this machine.")
def show(model_id: str, json: bool, download: bool, offline: bool) -> None:
    """Show a card, where its weights come from, whether they are here, and its entries.

    MODEL_ID is an id of the zoo, the path of a card, or the name of a plugin's model.
    """
    try:
        card = cards.read_card(Path(model_id)) if model_id.endswith(".json") else cards.get_card(model_id)
    except UnknownNameError:
        if not (plugin := plugins.get_plugin(model_id)):
            raise
        if json:
            print_json({"plugin": dataclasses.asdict(plugin)})
            return
        print_table(["", plugin.name], [["plugin of", f"{plugin.package} {plugin.version}"], ["calls", plugin.value]])
        return
    if download:
        fetched = cards.fetch_weights(card, offline=offline)
        note(f"{fetched.path}\nSHA-256 {fetched.sha256}, from {downloads.describe(fetched.source)}")
    here = cards.cached_weights(card)
    found = entries.entries_of(card)
    if json:
        print_json(
            {"card": card.document(), "cached": str(here) if here else None, "entries": list(map(printed, found))}
        )
        return
    print_table(["", card.id], [*_card_rows(card), ["on this machine", str(here) if here else _how_to_get(card)]])
    for entry in found:
        source = f" ({entry['claim']['source']})" if entry["claim"]["source"] else ""
        title = f"{entry['protocol']['name']} on {entry['dataset']['id']}, {entry['claim']['tier']}{source}:"
        print_scores(entry, title)


def _how_to_get(card: ModelCard) -> str:
    return f"no; fetch them: segbench show {card.id} --download" if card.sources else "no: not published"


def _card_rows(card: ModelCard) -> list[list[str]]:
    training, paper = card.training, card.paper
    expected = card.expected or {"aacc": None, "miou": None}
    facts = [
        training["method"],
        f"ε {_eps(training['eps_255'])}" if training["eps_255"] else "",
        f"{training['attack_steps']} steps" if training["attack_steps"] else "",
        f"{training['epochs']:g} epochs" if training["epochs"] else "",
        f"{training['initialisation']} initialisation" if training["initialisation"] else "",
        training["extra_data"] or "",
    ]
    rows = [
        ["title", card.title],
        ["data set", f"{card.dataset}, {card.num_classes} classes"],
        ["architecture", f"{card.architecture['name']} {card.architecture['arguments'] or ''}"],
        ["parameters", _millions(card.parameters)],
        ["training", ", ".join(filter(None, facts))],
        ["preprocessing", card.preprocessing],
        ["expected clean", f"aAcc {_percent(expected['aacc'])}, mIoU {_percent(expected['miou'])}"],
        *(["" if place else "sources", downloads.describe(source)] for place, source in enumerate(card.sources)),
        ["sha256", card.sha256 or ("not pinned: remembered at the first download" if card.sources else "–")],
        ["licence", card.licence or "unknown"],
    ]
    if paper:
        rows += [["paper", paper["title"]], ["", _who(paper)], ["", paper["url"]]]
    if card.sources:
        rows.append(["use it", f'segbench.load_model("{card.id}")'])
    return rows


def _who(paper: Mapping[str, Any]) -> str:
    venue = f", {paper['venue']}" if paper["venue"] else ""
    return f"{', '.join(paper['authors'])}{venue} {paper['year']}"


def unofficial(entry: Mapping[str, Any]) -> str:
    """What a reader must know before the numbers of an entry that is not official; empty for others."""
    if not (reasons := "; ".join(entry["protocol"]["deviations"])):
        return ""
    is_trial = any(flag["name"] == "falls_to_zero" and flag["value"] is None for flag in entry["flags"])
    return f"Trial, not a result: {reasons}." if is_trial else f"Unofficial: {reasons}."


def printed(entry: dict[str, Any]) -> Any:
    """An entry as ``--json`` prints it: each strength under its names."""
    return Threat(**entry["protocol"]["threat"]).printed(entry)


def print_scores(entry: dict[str, Any], title: str = "") -> None:
    """The table of an entry, in percent; a trial says so before anything else."""
    for text in filter(None, (unofficial(entry), title)):
        click.echo(printable(text))
    losses = list(dict.fromkeys(loss for row in entry["results"] for loss in row["per_loss"] or ()))
    columns = [">ε", ">aAcc", ">95%", ">mIoU", ">95%", *(f">{loss}" for loss in losses)]
    clean = entry["clean"]
    rows = [["0", _percent(clean["aacc"]), "", _percent(clean["miou"]), "", *("" for _ in losses)]]
    for row in entry["results"]:
        interval = {metric: "–".join(map(_percent, ends)) for metric, ends in (row["interval"] or {}).items()}
        scores = [(row["per_loss"] or {}).get(loss) for loss in losses]
        rows.append(
            [
                f"{row['strength']:g}/255",
                _percent(row["aacc"]),
                interval.get("aacc", "–"),
                _percent(row["miou"]),
                interval.get("miou", "–"),
                *(f"{_percent(each['aacc'])} / {_percent(each['miou'])}" if each else "–" for each in scores),
            ]
        )
    print_table(columns, rows)
    for flag in entry["flags"]:
        if flag["level"] != "ok":
            value = "" if flag["value"] is None else f" = {flag['value']}"
            click.echo(printable(f"{flag['level']}: {flag['name']}{value}: {flag['message']}"))
