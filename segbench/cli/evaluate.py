"""``evaluate``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click

from segbench import content
from segbench.cards import list_models
from segbench.cli.app import ManyValues, fail, find_own_modules, note, print_json, print_table, printable
from segbench.cli.computing import computing_options
from segbench.cli.zoo import print_scores, printed, unofficial
from segbench.errors import PreemptedError, SegbenchError, ShardDoneError, UsageError


@click.command(cls=ManyValues)
@click.option(
    "--model",
    multiple=True,
    help="Id of the zoo, path of a card, or a spec: package.module:function, ./file.py:function, torchvision:NAME, "
    "hf:REPO[@revision], smp:REPO, timm:BACKBONE?num_classes=K&weights=FILE. Several after one --model.",
)
@click.option("--all", "every", is_flag=True, help="All models of the zoo for the data set of --dataset.")
@click.option("--dataset", help="Data set id; by default that of the model's card.")
@click.option(
    "--eps", multiple=True, help="Radii: 4, 8/255, 0.25 (all over 255). Several after one --eps.  [default: 4 8 12]"
)
@click.option("--protocol", default="sea-v1", help="sea-v1, as published, or sea-v2, the stronger attack.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Folder of the data set.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Run directory; of several models, the folder of theirs.  [default: runs/<model>-<data set>-<identity>]",
)
@click.option("--limit", type=int, help="Only the first images; the entry becomes unofficial.")
@click.option("--iterations", type=int, help="Instead of the protocol's; the entry becomes unofficial.")
@click.option("--quick", is_flag=True, help="A first look in seconds: 16 images, 30 iterations, no check for masking.")
@computing_options
@click.option("--json", is_flag=True, help="Print the entry as JSON; a list of several models' entries.")
def evaluate(
    model: tuple[str, ...], every: bool, dataset: str | None, out: Path | None, json: bool, **options: Any
) -> None:
    """Attack models with the whole protocol; write entry and evidence of each.

    Ctrl-C is safe: the same command continues where it stopped. SIGTERM finishes the units that have begun, and exits
    with 3; if none is left, the entry is written.
    """
    models = _models(model, every, dataset)
    if len(models) == 1:
        try:
            entry = _evaluate(models[0], dataset, out, **options)
        except ShardDoneError as error:
            if options["shard"] is not None:
                raise
            note(str(error))  # the launcher of the processes takes any other exit code than 0 for a failure
            return
        print_json(printed(entry)) if json else _show(entry)
        return
    entries = list[dict[str, Any]]()
    failures, unfinished = dict[str, SegbenchError](), dict[str, SegbenchError]()
    for position, name in enumerate(models):
        note(f"Model {position + 1} of {len(models)}: {printable(name)}")
        folder = None if out is None else out / re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-")
        try:
            entries.append(_evaluate(name, dataset, folder, **options))
        except (UsageError, PreemptedError):
            raise
        except ShardDoneError as error:
            unfinished[name] = error
            note(f"{name}: {error}")
            continue
        except SegbenchError as error:
            failures[name] = error
            note(printable(f"{name}: {error}", keep="\n"))
            continue
        if not json:
            _show_rows(entries[-1:])
    if json:
        print_json([printed(entry) for entry in entries])
    elif len(entries) > 1:
        _show_rows(entries)
    if failures:
        name, failure = next(iter(failures.items()))
        fail(f"{len(failures)} of {len(models)} models have no entry. The first is {name}: {failure}", 1)
    if unfinished and options["shard"] is not None:
        fail(f"{len(unfinished)} of {len(models)} models wait for other shards.", 3)


def _models(names: tuple[str, ...], every: bool, dataset: str | None) -> list[str]:
    if not every:
        if not names:
            raise UsageError(
                "Which model? --model pirat_convnext_mini_shapes, or --all --dataset shapes. See: segbench models"
            )
        return list(dict.fromkeys(names))
    if names or dataset is None:
        raise UsageError("--all takes the models of one data set: --all --dataset shapes, without --model.")
    found = [card.id for card in list_models() if card.dataset == content.family(dataset)]
    if not found:
        raise UsageError(f"The zoo has no model for {dataset!r}. See: segbench models")
    return found


def _evaluate(
    model: str,
    dataset: str | None,
    out: Path | None,
    *,
    eps: tuple[str, ...],
    protocol: str,
    data_root: Path | None,
    quiet: bool,
    **options: Any,
) -> dict[str, Any]:
    """One model: its entry; what it cost and where it lies is told."""
    from segbench.engine.evaluate import evaluate as run

    find_own_modules(model)
    result = run(model, dataset, list(eps) or None, protocol, data_root, out, progress=not quiet, **options)
    entry = result.entry()
    note(cost_text(entry["run"]))
    if saved := result.saved_passes():
        note(str(saved))
    note(f"entry     {result.entry_path}\nevidence  {result.evidence_path}")
    if entry["protocol"]["official"]:
        note(f"Put it on the leaderboard: segbench submit {shlex.quote(str(result.path))}")
    return entry


def cost_text(cost: dict[str, Any]) -> str:
    """What a run cost, in a line; what is not known is left out."""
    parts = [
        (cost["seconds"], "{:.0f} s"),
        (cost["gpu_hours"], "{:.2f} GPU-hours"),
        (cost["forward_passes"], "{} forward"),
        (cost["backward_passes"], "{} backward passes"),
        (cost["images_per_second"], "{:.1f} images per second"),
        (cost["peak_memory_bytes"] and cost["peak_memory_bytes"] / 1e9, "peak memory {:.2f} GB"),
        (cost["energy_joules"] and cost["energy_joules"] / 3.6e6, "{:.3g} kWh"),
    ]
    return f"{', '.join(text.format(value) for value, text in parts if value is not None)}; on {cost['device']}"


def _show(entry: dict[str, Any]) -> None:
    print_scores(
        entry,
        f"{entry['model']['id']} on {entry['dataset']['id']} ({entry['dataset']['images']} images), "
        f"{entry['protocol']['name']}. Percent; per loss aAcc / mIoU.",
    )


def _show_rows(entries: list[dict[str, Any]]) -> None:
    """A row for each model: aAcc / mIoU in percent, clean and at each radius."""
    radii = sorted({row["strength"] for entry in entries for row in entry["results"]})
    rows = []
    for text in dict.fromkeys(filter(None, map(unofficial, entries))):
        click.echo(printable(text))
    for entry in entries:
        scores = {0.0: entry["clean"]} | {row["strength"]: row for row in entry["results"]}
        cells = [scores.get(eps) for eps in (0.0, *radii)]
        rows.append(
            [
                entry["model"]["id"],
                *(f"{100 * cell['aacc']:.2f} / {100 * cell['miou']:.2f}" if cell else "–" for cell in cells),
            ]
        )
    print_table(["model", ">clean aAcc / mIoU", *(f">ε = {eps:g}/255" for eps in radii)], rows)
