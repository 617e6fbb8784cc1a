"""``models`` and ``show``."""

from __future__ import annotations

from typing import Any

import click

from segbench import cards, entries
from segbench.cards import ModelCard
from segbench.cli.app import print_json, print_table, printable


@click.command()
@click.argument("pattern", default="*", envvar=None)
@click.option("--json", is_flag=True, help="Print the cards as a JSON list.")
def models(pattern: str, json: bool) -> None:
    """List the models of the zoo whose id matches PATTERN, e.g. "*shapes"."""
    found = cards.list_models(pattern)
    if json:
        print_json([card.document() for card in found])
        return
    rows = [
        [
            card.id,
            card.dataset,
            card.training["method"],
            card.architecture["name"],
            _millions(card.parameters),
            card.title,
        ]
        for card in found
    ]
    print_table(["id", "data set", "method", "architecture", ">parameters", "title"], rows)


@click.command()
@click.argument("model_id")
@click.option("--json", is_flag=True, help="Print card and entries as JSON.")
def show(model_id: str, json: bool) -> None:
    """Show the card of MODEL_ID and its entries."""
    card = cards.get_card(model_id)
    found = [
        entries.read_entry(path)
        for path in entries.entry_paths()
        if path.stem == model_id and path.parent.name == card.dataset
    ]
    if json:
        print_json({"card": card.document(), "entries": found})
        return
    print_table(["", card.id], _card_rows(card))
    for entry in found:
        click.echo(f"{entry['protocol']['name']} on {entry['dataset']['id']}, {entry['claim']['tier']}:")
        print_scores(entry)


def _card_rows(card: ModelCard) -> list[list[str]]:
    training = card.training
    expected = card.expected or {"aacc": None, "miou": None}
    return [
        ["title", card.title],
        ["data set", f"{card.dataset}, {card.num_classes} classes"],
        ["architecture", f"{card.architecture['name']} {card.architecture['arguments']}"],
        ["parameters", _millions(card.parameters)],
        [
            "training",
            f"{training['method']}, ε {_eps(training['eps_255'])}, {training['attack_steps']} steps, "
            f"{training['epochs']} epochs, {training['initialisation']} initialisation",
        ],
        ["expected clean", f"aAcc {_percent(expected['aacc'])}, mIoU {_percent(expected['miou'])}"],
        ["sources", ", ".join(f"{source['type']}: {source['file']}" for source in card.sources) or "none"],
        ["sha256", card.sha256 or "not pinned"],
        ["licence", card.licence or "unknown"],
        ["paper", card.paper["title"] if card.paper else "–"],
        ["use it", f'segbench.load_model("{card.id}")'],
    ]


def print_scores(entry: dict[str, Any]) -> None:
    """The table of an entry, in percent."""
    losses = list(dict.fromkeys(loss for row in entry["results"] for loss in row["per_loss"] or ()))
    columns = [">ε", ">aAcc", ">95%", ">mIoU", ">95%", ">bound", *(f">{loss}" for loss in losses)]
    clean = entry["clean"]
    rows = [["0", _percent(clean["aacc"]), "", _percent(clean["miou"]), "", "", *("" for _ in losses)]]
    for row in entry["results"]:
        interval = {metric: "–".join(map(_percent, ends)) for metric, ends in (row["interval"] or {}).items()}
        scores = [(row["per_loss"] or {}).get(loss) for loss in losses]
        rows.append(
            [
                f"{row['eps_255']:g}/255",
                _percent(row["aacc"]),
                interval.get("aacc", "–"),
                _percent(row["miou"]),
                interval.get("miou", "–"),
                _percent(row["miou_lower_bound"]),
                *(f"{_percent(each['aacc'])} / {_percent(each['miou'])}" if each else "–" for each in scores),
            ]
        )
    print_table(columns, rows)
    for flag in entry["flags"]:
        if flag["level"] != "ok":
            click.echo(printable(f"{flag['level']}: {flag['name']} = {flag['value']}: {flag['message']}"))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _millions(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.2f}M"


def _eps(value: float | None) -> str:
    return "–" if value is None else f"{value:g}/255"
