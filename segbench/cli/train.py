"""``train``."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from segbench.cli.app import ManyValues, note, print_json, print_table
from segbench.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from segbench.training.data import TrainingData
    from segbench.training.distributed import Processes
    from segbench.training.finishing import Trained
    from segbench.training.loop import Progress
    from segbench.training.recipe import Recipe


@click.command(cls=ManyValues)
@click.argument("recipe", required=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for weights, card, metrics, curves and checkpoint.  [default: runs/train-<recipe>]",
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
@click.option("--checkpoint-minutes", type=click.FloatRange(min=0), default=10.0, help="Between two checkpoints.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--json", is_flag=True, help="Print the card as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def train(
    recipe: str | None,
    out: Path | None,
    data_root: Path | None,
    device: str,
    overrides: tuple[str, ...],
    checkpoint_minutes: float,
    offline: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Train a model by RECIPE: a name or a file.yaml. Without one, list the recipes.

    Stopped by Ctrl-C or killed, the same command continues. On several GPUs: torchrun --nproc-per-node 8 -m segbench
    train RECIPE. If the recipe starts from a classifier that is trained here and is not there yet, it is trained first.
    """
    from segbench.training.recipe import load_recipe

    if recipe is None:
        _list(json)
        return
    from segbench.models.devices import choose_compute_device
    from segbench.training.distributed import joined
    from segbench.training.initialisation import RUNS, classifier_file, classifier_recipe

    if not math.isfinite(checkpoint_minutes):
        raise UsageError(f"--checkpoint-minutes must be a number, not {checkpoint_minutes}.")
    pairs = [text.partition("=") for text in overrides]
    if wrong := [key for key, sign, _ in pairs if not sign]:
        raise UsageError(f"--set takes field=value, not {wrong[0]!r}.")
    chosen = load_recipe(recipe, {key: value for key, _, value in pairs})
    with joined(choose_compute_device(device)) as processes:
        quiet = quiet or not processes.leads
        run = _Run(processes, checkpoint_minutes, offline, quiet)
        data = run.read(chosen, data_root)
        first = classifier_recipe(chosen)
        if first and not classifier_file(first).is_file():
            if not quiet:
                note(f"{chosen.id} starts from {first}, which is trained first, into {classifier_file(first).parent}.")
            classifier = load_recipe(first)
            run(classifier, run.read(classifier, None), classifier_file(first).parent)
        trained = run(chosen, data, out or RUNS / f"train-{chosen.id}")
        if trained:
            _tell(trained, data_root, json)


def _list(json: bool) -> None:
    """The recipes of the package."""
    from segbench.training.recipe import list_recipes, load_recipe

    recipes = [load_recipe(name) for name in list_recipes()]
    if json:
        print_json([dataclasses.asdict(recipe) for recipe in recipes])
        return
    rows = [
        [recipe.id, recipe.dataset, recipe.title, str(recipe.attack_steps or "–"), str(recipe.epochs)]
        for recipe in sorted(recipes, key=lambda recipe: (recipe.dataset, recipe.id))
    ]
    print_table(["recipe", "data set", "what it trains", ">steps", ">epochs"], rows)


class _Run:
    """Training with what all recipes of a command share."""

    def __init__(self, processes: Processes, checkpoint_minutes: float, offline: bool, quiet: bool) -> None:
        self.processes, self.minutes, self.offline, self.quiet = processes, checkpoint_minutes, offline, quiet

    def read(self, recipe: Recipe, root: Path | None) -> TrainingData:
        """The data of a recipe, refused here if they make no batch, which is before anything is trained."""
        from segbench.training.data import open_data, steps_an_epoch

        if not self.quiet:
            note(f"Reading {recipe.dataset} ...")
        data = open_data(recipe, root)
        steps_an_epoch(recipe, data.train, self.processes)
        return data

    def __call__(self, recipe: Recipe, data: TrainingData, folder: Path) -> Trained | None:
        from segbench.training import checkpoint
        from segbench.training.loop import train

        if (folder / checkpoint.NAME).exists() and not self.quiet:
            note(f"Going on with what {folder} holds.")
        with _progress(recipe, self.quiet) as show:
            return train(
                recipe, data, folder, processes=self.processes, checkpoint_minutes=self.minutes,
                offline=self.offline, progress=show,
            )  # fmt: skip


def _tell(trained: Trained, data_root: Path | None, json: bool) -> None:
    """The result on standard output, and the commands from here to the leaderboard."""
    from segbench.training.curves import NOTE

    card, document = trained.card, shlex.quote(str(trained.document_path))
    if json:
        import json as text

        print_json(card.document() if card else text.loads(trained.document_path.read_text("utf-8")))
    else:
        scores = ", ".join(f"{_NAMES[key]} {100 * value:.1f}" for key, value in trained.scores.items())
        click.echo(f"{trained.recipe.id}: {scores} percent")
    note(f"{'card' if card else 'report'}      {trained.document_path}\nweights   {trained.weights_path}")
    note(f"curves    {trained.curves}" if trained.curves else NOTE)
    if not card:
        kind = "robust" if trained.recipe.eps_255 else "clean"
        note(f"Start a model from it: --set init={kind} backbone={shlex.quote(str(trained.weights_path))}")
        return
    root = f" --data-root {shlex.quote(str(data_root))}" if data_root else ""
    run = shlex.quote(str(trained.document_path.parent / "evaluation"))
    submit = f"segbench submit {run} --card {document}"
    if card.dataset == "folder":
        submit = "# a leaderboard needs a data set with a name: docs/data.md tells how to describe your folder"
    note(
        "From here to the leaderboard:\n"
        f"  segbench evaluate --model {document}{root} --out {run}\n"
        f"  segbench publish {document} --repo YOUR_NAME/{card.id}      # weights above 10 MB: put them on the Hub\n"
        f"  {submit}"
    )


_NAMES = {"aacc": "clean aAcc", "miou": "mIoU", "accuracy": "clean accuracy", "robust_accuracy": "robust accuracy"}


def _progress(recipe: Recipe, quiet: bool) -> AbstractContextManager[Callable[[Progress], None]]:
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip

    @contextmanager
    def shown() -> Iterator[Callable[[Progress], None]]:
        if quiet:
            yield lambda _: None
            return
        with Bar(*columns, console=console, disable=not console.is_terminal, refresh_per_second=4) as bar:
            task = bar.add_task("start", total=None)

            def show(at: Progress) -> None:
                text = f"epoch {at.epoch + 1}/{recipe.epochs} loss {at.loss:.3f}"
                bar.update(task, completed=at.step, total=at.steps, description=text)
                if at.row is not None:
                    note_line(_line(at.row, recipe))

            def note_line(text: str) -> None:
                bar.console.print(text, markup=False, highlight=False) if console.is_terminal else note(text)

            yield show

    return shown()


def _line(row: dict[str, Any], recipe: Recipe) -> str:
    """An epoch for people."""
    from segbench.training.recipe import CLASSIFICATION

    left = (recipe.epochs - row["epoch"]) * row["seconds"] / row["epoch"]
    text = f"epoch {row['epoch']}/{recipe.epochs}  loss {row['loss']:.3f}  {row['images_per_second']:.0f} images/s"
    if row["clean_miou"] is not None:
        score, name = ("aacc", "accuracy") if recipe.task == CLASSIFICATION else ("miou", "mIoU")
        text += (
            f"  held out: clean {name} {100 * row[f'clean_{score}']:.1f}, "
            f"robust {100 * row[f'robust_{score}']:.1f} at {recipe.monitor_eps_255:g}/255"
        )
    return text + (f"  about {_duration(left)} left" if left else "")


def _duration(seconds: float) -> str:
    """Hours, minutes or seconds.

    >>> _duration(5400), _duration(90), _duration(7)
    ('1 h 30 min', '2 min', '7 s')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
