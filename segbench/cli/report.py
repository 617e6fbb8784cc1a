"""``report`` and ``attack show``: runs as a page, and as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from segbench.cli.app import ManyValues, find_own_modules, note

F = TypeVar("F", bound=Callable[..., object])
OPTIONS = (
    click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path)),
    click.option("--model", help="What loads the model, if it is not the id that the run names."),
    click.option("--data-root", type=click.Path(path_type=Path), help="Folder of the data set."),
    click.option("--images", type=click.IntRange(1, 50), default=2, help="So many of the best, and of the worst."),
    click.option(
        "--target", "targets", multiple=True,
        help="Classes of the targeted pictures, by name or number.  [default: the most and the least frequent one]",
    ),
    click.option("--no-pictures", is_flag=True, help="Only what needs neither model nor data."),
    click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ..."),
    click.option("--offline", is_flag=True, help="Never use the network."),
    click.option("--quiet", is_flag=True, help="No progress bar."),
)  # fmt: skip


def reporting_options(command: F) -> F:
    """Adds what both commands have."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command(cls=ManyValues)
@reporting_options
@click.option("--out", type=click.Path(path_type=Path), help="File.  [default: RUN/report.html]")
def report(runs: tuple[Path, ...], out: Path | None, **options: Any) -> None:
    """Write a page with the numbers, charts and pictures of RUNS: one HTML file, to be sent and kept.

    RUNS are run directories of one model on one data set: of `segbench evaluate`, `attack compare`, `attack targeted`
    and `attack minimum`. For the pictures a few images are attacked again, which Ctrl-C may stop and the same
    command continues.
    """
    from segbench.files import write_results
    from segbench.reporting.report import page

    made = _made(runs, options)
    path = out or runs[0] / "report.html"
    write_results({path: page(made)}, "Give another file with --out.")
    note(f"report  {path}")


@click.command("show", cls=ManyValues)
@reporting_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: RUN/figures]")
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(["png", "svg"]), default=["png", "svg"],
    help="Of the files; several after one --format.",
)  # fmt: skip
def show(runs: tuple[Path, ...], out: Path | None, formats: tuple[str, ...], **options: Any) -> None:
    """Write each figure of the report of RUNS as a file, for a paper or a talk."""
    from segbench.files import write_results

    made = _made(runs, options)
    folder = out or runs[0] / "figures"
    for figure in made.all_figures():
        for kind in dict.fromkeys(formats):
            path = folder / f"{figure.name}.{kind}"
            write_results({path: figure.png if kind == "png" else figure.svg}, "Give another folder with --out.")
            click.echo(str(path))


def _made(runs: tuple[Path, ...], options: dict[str, Any]) -> Any:
    from segbench.reporting.report import make
    from segbench.reporting.runs import read_runs

    material = read_runs(runs)
    if options["no_pictures"] or material.main is None:
        return make(material, None)
    from segbench.engine.launch.options import RunOptions
    from segbench.reporting.gallery import Pictures

    if options["model"]:
        find_own_modules(options["model"])
    run_options = RunOptions(
        device=options["device"], shard="1/1", progress=not options["quiet"], offline=options["offline"]
    )
    which = Pictures(options["images"], options["targets"], options["model"], options["data_root"], run_options)
    return make(material, which)
