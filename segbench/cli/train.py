"""``train``."""

from __future__ import annotations

from pathlib import Path

import click

from segbench.cli.app import ManyValues, note, print_json
from segbench.errors import UsageError


@click.command(cls=ManyValues)
@click.argument("recipe")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for weights, card, log and checkpoint.  [default: runs/train-<recipe>]",
)
@click.option("--data-root", type=click.Path(path_type=Path), help="Folder of the data set.")
@click.option("--device", default="auto", help="auto, cpu, cuda, ...")
@click.option(
    "--set",
    "overrides",
    envvar="SEGBENCH_TRAIN_SET",
    multiple=True,
    help="field=value of the recipe; several after one --set.",
)
@click.option("--json", is_flag=True, help="Print the card as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def train(
    recipe: str,
    out: Path | None,
    data_root: Path | None,
    device: str,
    overrides: tuple[str, ...],
    json: bool,
    quiet: bool,
) -> None:
    """Train a model by RECIPE: a name (a wrong one lists them) or a file.yaml.

    A checkpoint is written after each epoch; the same command continues a stopped run.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from segbench.data import load_dataset
    from segbench.models.load import choose_device
    from segbench.training.loop import Progress
    from segbench.training.loop import train as run
    from segbench.training.recipe import load_recipe

    pairs = [text.partition("=") for text in overrides]
    if wrong := [key for key, sign, _ in pairs if not sign]:
        raise UsageError(f"--set takes field=value, not {wrong[0]!r}.")
    chosen = load_recipe(recipe, {key: value for key, _, value in pairs})
    folder = out or Path("runs") / f"train-{chosen.id}"
    note(f"Reading {chosen.dataset} ...")
    data, validation = (load_dataset(chosen.dataset, data_root, split=split) for split in ("train", "val"))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), disable=quiet, refresh_per_second=4) as bar:
        task = bar.add_task("start", total=None)

        def show(at: Progress) -> None:
            bar.update(task, completed=at.step, total=at.steps, description=f"epoch {at.epoch + 1} loss {at.loss:.3f}")

        trained = run(chosen, data, validation, folder, device=str(choose_device(device)), progress=show)
    card = trained.card
    if json:
        print_json(card.document())
    elif card.expected:
        click.echo(
            f"{card.id}: clean aAcc {100 * card.expected['aacc']:.1f}, mIoU {100 * card.expected['miou']:.1f} percent"
        )
    root = f" --data-root {data_root}" if data_root else ""
    note(
        f"card      {trained.card_path}\nweights   {trained.weights_path}\n"
        f"next      segbench evaluate --model {trained.card_path}{root}"
    )
