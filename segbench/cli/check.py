"""``check-model``."""

from __future__ import annotations

import math
from pathlib import Path

import click

from segbench.cli.app import fail, find_own_modules, note, print_json, print_table


@click.command("check-model")
@click.argument("model")
@click.option("--dataset", help="Data set id; by default that of the model's card.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Folder of the data set.")
@click.option("--images", type=int, default=20, help="Images, spread evenly over the data set.")
@click.option(
    "--size",
    type=click.IntRange(min=16),
    help="Side of the noise images in pixels when there is no data set.  [default: 256]",
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option(
    "--precisions",
    is_flag=True,
    help="On a CPU, attack up to 4 images in fp32, bf16 and compiled: speed and strength of each.",
)
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--json", is_flag=True, help="Print the findings as a JSON list.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def check_model(
    model: str,
    dataset: str | None,
    data_root: Path | None,
    images: int,
    size: int | None,
    device: str,
    precisions: bool,
    offline: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Look at MODEL before a night is spent on it: output, gradient, speed, and the clean score on a few images.

    MODEL is whatever `segbench evaluate --model` takes. Ends with 1 if something is wrong.
    """
    from segbench.engine.model_check import check_model as check

    find_own_modules(model)
    findings = check(
        model, dataset, data_root, images=images, size=size, device=device, offline=offline, progress=not quiet,
        precisions=precisions,
    )  # fmt: skip
    if json:
        print_json([finding._asdict() for finding in findings])
    else:
        rows = [[each.level, each.name, _value(each.value), each.message] for each in findings]
        print_table(["", "what", ">value", "meaning"], rows)
    failed = [finding.name for finding in findings if finding.level == "fail"]
    if failed:
        fail(f"{model} is not ready to be evaluated: {', '.join(failed)}.", 1)
    note(f"{model} can be evaluated.")


def _value(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.4g}"
