"""``attack``: the attacks by name, and how strong each is on a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from segbench.cli.app import ManyValues, find_own_modules, note, print_json, print_table, printable
from segbench.cli.computing import (
    DATA_ROOT,
    DATASET,
    EPS,
    JSON,
    LIMIT,
    MODEL,
    OUT,
    SEED,
    computing_options,
    unless_shards_missing,
)
from segbench.cli.minimum import minimum
from segbench.cli.report import show

METRICS = {"aacc": "aAcc", "miou": "mIoU"}


@click.group()
def attack() -> None:
    """Attacks beside the protocol: what there is, and which is the strongest on a model."""


attack.add_command(minimum)
attack.add_command(show)


@attack.command("list")
@JSON
def list_attacks(json: bool) -> None:
    """List the attacks by name.

    Two more by pattern: js_target_3 draws every pixel to class 3 (segbench attack targeted), and attacks made on
    another model (segbench attack compare --from).
    """
    import dataclasses

    from segbench.attacks.catalogue import ATTACKS

    if json:
        print_json([dataclasses.asdict(each) for each in ATTACKS.values()])
        return
    print_table(
        ["attack", "loss", "optimiser", "radius", ">iterations", ">restarts", "result by"],
        [
            [
                each.name, each.loss or "–", each.optimiser, {"red": "2ε, 1.5ε, ε", "const": "ε"}[each.schedule],
                str(each.iterations), str(each.restarts), each.best,
            ]
            for each in ATTACKS.values()
        ],
    )  # fmt: skip


@attack.command("compare", cls=ManyValues)
@MODEL
@click.option(
    "--attacks", multiple=True,
    help="Names of `segbench attack list`; several after one --attacks.  "
    "[default: mce_bal mce js pgd apgd segpgd cospgd]",
)  # fmt: skip
@DATASET
@EPS
@DATA_ROOT
@OUT
@LIMIT
@click.option(
    "--iterations", type=click.IntRange(1), multiple=True, default=[300],
    help="Of each attack, its restarts together; several: one comparison each.",
)  # fmt: skip
@SEED
@click.option("--seeds", type=click.IntRange(1), default=1, help="So many comparisons, with seeds from --seed on.")
@click.option("--from", "sources", multiple=True, help="Models whose adversarial images this one faces (transfer).")
@click.option("--pairs", is_flag=True, help="The ensemble of each two attacks as well.")
@click.option(
    "--schedule", is_flag=True, help="Each attack by APGD at ε, from three starts, and with radius reduction."
)
@computing_options
@JSON
def compare_attacks(
    model: str,
    attacks: tuple[str, ...],
    eps: tuple[str, ...],
    iterations: tuple[int, ...],
    seed: int,
    seeds: int,
    schedule: bool,
    json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compare attacks on MODEL under one budget: the paper's Table 1, with intervals and cost.

    With mce_bal, mce, js, tsallis and square the table has SEA+, the best known beside the fixed protocol. An attack
    that needs no gradient of MODEL (square, --from) and is stronger than SEA by more than the tolerance is flagged.

    Ctrl-C is safe: the same command continues where it stopped, also with more attacks or radii.
    """
    from segbench.attacks.catalogue import schedules
    from segbench.engine.launch.options import RunOptions
    from segbench.engine.studies.compare import ATTACKS, compare
    from segbench.engine.studies.sweep import sweep

    find_own_modules(model)
    which = {key: options.pop(key) for key in ("dataset", "data_root", "out", "limit", "sources", "pairs")}
    run_options = RunOptions(progress=not quiet, **options)
    which |= {"eps": list(eps) or None, "options": run_options}
    names = list(attacks or ATTACKS)
    if schedule:
        names = [each for name in names for each in schedules(name)]
    if len(iterations) > 1 or seeds > 1:
        all_seeds = range(seed, seed + seeds)
        swept = unless_shards_missing(
            run_options.shard, lambda: sweep(model, names, iterations=iterations, seeds=all_seeds, **which)
        )
        if swept is not None:
            _print_sweep(swept.document(), json=json)
            note(f"sweep  {swept.path / 'sweep.json'}")
        return
    found = unless_shards_missing(
        run_options.shard, lambda: compare(model, names, iterations=iterations[0], seed=seed, **which)
    )
    if found is None:
        return
    _print_comparison(found.document(), json=json)
    note(f"comparison  {found.path / 'comparison.json'}\nevidence    {found.path / 'comparison.parquet'}")


@attack.command("targeted", cls=ManyValues)
@MODEL
@click.option("--target", "targets", multiple=True, required=True, help="Classes, by name or number.")
@DATASET
@EPS
@DATA_ROOT
@OUT
@LIMIT
@click.option("--iterations", type=click.IntRange(1), default=300, help="Of each attack.")
@SEED
@computing_options
@JSON
def attack_targeted(
    model: str, targets: tuple[str, ...], eps: tuple[str, ...], json: bool, quiet: bool, **options: Any
) -> None:
    """Draw every pixel to a class: the share of pixels that MODEL then sees as it.

    Ctrl-C is safe: the same command continues where it stopped, also with more classes or radii.
    """
    from segbench.engine.launch.options import RunOptions
    from segbench.engine.studies.targeted import targeted

    find_own_modules(model)
    which = {key: options.pop(key) for key in ("dataset", "data_root", "out", "limit", "iterations", "seed")}
    run_options = RunOptions(progress=not quiet, **options)
    which |= {"eps": list(eps) or None, "options": run_options}
    found = unless_shards_missing(run_options.shard, lambda: targeted(model, targets, **which))
    if found is None:
        return
    if json:
        print_json(found.document())
    else:
        _say_what(found.document(), "Percent of the pixels that are seen as the target.")
        columns = ["target", ">ε", ">success", ">95%", ">images with 99%"]
        print_table(columns, [_targeted_line(row) for row in found.rows])
    note(f"targeted  {found.path / 'targeted.json'}\nevidence  {found.path / 'targeted.parquet'}")


@attack.command("external")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--entry", type=click.Path(path_type=Path), required=True, help="Of the same model, with its evidence.")
@click.option("--author", required=True, help="Who compared.")
@click.option("--url", required=True, help="https link to where the attacks are described.")
@click.option("--name", default="sea_plus", help="Of the files in <model id>.external beside the entry.")
def external(run: Path, entry: Path, author: str, url: str, name: str) -> None:
    """Put what the comparison RUN found beyond SEA beside an entry.

    The entry stays as it is; its row on the board shows the best known score, and a warning where that is below SEA's
    by more than the tolerance.
    """
    from segbench.engine.studies.external import add_external

    path = add_external(run, entry, author=author, url=url, name=name)
    note(f"external  {path}\ncheck     segbench validate {entry}")


def _print_comparison(document: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(document)
        return
    about = "Percent; * significantly weaker than the strongest (paired bootstrap over images)."
    _say_what(document, f"{document['iterations']} iterations. {about}")
    print_table(*_comparison_table(document["rows"]))
    for row in document["rows"]:
        if row["attack"] == "SEA":
            aacc, miou = (100 * row["gain"][metric] for metric in METRICS)
            click.echo(
                f"At {row['strength']:g}/255 SEA is {aacc:.1f} points of aAcc and {miou:.1f} of mIoU below the "
                "strongest of its own attacks."
            )
            for line in _stronger_than(row, document["rows"]):
                click.echo(printable(line))
    for flag in document.get("flags", []):
        click.echo(
            printable(
                f"Flag: at {flag['strength']:g}/255 {flag['attack']} is {100 * flag['below']:.1f} points of "
                f"{METRICS[flag['metric']]} below SEA. It needs no gradient of this model: a sign of masked gradients."
            )
        )


def _stronger_than(sea: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    """By metric, the strongest single attack where it alone is below SEA by what the table shows."""
    single = [row for row in rows if row["strength"] == sea["strength"] and row["gain"]["aacc"] is None]
    for metric, name in METRICS.items():
        strongest = min(single, key=lambda row: row[metric])
        below = 100 * (sea[metric] - strongest[metric])
        if below >= 0.05:
            yield f"At {sea['strength']:g}/255 {strongest['attack']} alone is {below:.1f} points of {name} below SEA."


def _print_sweep(document: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(document)
        return
    _say_what(document, "Percent: mean over the seeds, their standard deviation, lowest and highest.")
    columns = [">ε", "attack", ">iterations", ">seeds", ">aAcc", ">std", ">range", ">mIoU", ">std", ">range"]
    print_table(columns, [_sweep_line(row) for row in document["summary"]])


def _say_what(document: dict[str, Any], text: str) -> None:
    model, data = document["model"], document["dataset"]
    click.echo(printable(f"{model['id']} on {data['id']} ({data['images']} images), {text}"))


def _sweep_line(row: dict[str, Any]) -> list[str]:
    line = [f"{row['strength']:g}/255", row["attack"], str(row["iterations"]), str(row["seeds"])]
    for metric in ("aacc", "miou"):
        low, high = row[f"{metric}_range"]
        std = row[f"{metric}_std"]
        line += [f"{100 * row[metric]:.2f}", "–" if std is None else f"{100 * std:.2f}"]
        line += [f"{100 * low:.2f}–{100 * high:.2f}"]
    return line


def _targeted_line(row: dict[str, Any]) -> list[str]:
    low, high = row["success_95"]
    radius = f"{row['strength']:g}/255" if row["strength"] else "clean"
    success, whole = (f"{100 * row[name]:.1f}" for name in ("success", "whole"))
    return [row["class"], radius, success, f"{100 * low:.1f}–{100 * high:.1f}", whole]


def _comparison_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = [">ε", "attack", ">aAcc", ">95%", ">mIoU", ">95%", ">forward", ">backward", ">seconds"]
    cells = []
    for row in rows:
        line = [f"{row['strength']:g}/255", row["attack"]]
        for metric in ("aacc", "miou"):
            low, high = row[f"{metric}_95"]
            mark = "*" if row["weaker"][metric] else " "
            line += [f"{100 * row[metric]:.1f}{mark}", f"{100 * low:.1f}–{100 * high:.1f}"]
        passes = [row[name] for name in ("forwards", "backwards")]
        seconds = row["seconds"]
        line += ["" if each is None else str(each) for each in passes] + ["" if seconds is None else f"{seconds:.0f}"]
        cells.append(line)
    return columns, cells
