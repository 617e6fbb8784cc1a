"""The options of every command that attacks images: what, and how (`segbench.engine.launch.options.RunOptions`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from segbench.cli.app import note
from segbench.errors import ShardDoneError

F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")

# What is attacked: options that the attacks beside the protocol share.
EPS = click.option("--eps", multiple=True, help="Radii: 4, 8/255, 0.25 (all over 255).  [default: 4 8 12]")
DATA_ROOT = click.option("--data-root", type=click.Path(path_type=Path), help="Folder of the data set.")
DATASET = click.option("--dataset", help="Data set id; by default that of the model's card.")
OUT = click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/<model>-<data set>-<identity>]"
)
LIMIT = click.option("--limit", type=int, help="Only the first images.")
MODEL = click.option("--model", required=True, help="As in `segbench evaluate`.")
SEED = click.option("--seed", type=int, default=225, help="Of the random starts.")
JSON = click.option("--json", is_flag=True, help="Print as JSON.")

OPTIONS = (
    click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ..."),
    click.option(
        "--batch-size", default="auto", help="Images attacked at once, or auto: what memory holds. No matter on a CPU."
    ),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "tf32", "bf16"]),
        default="fp32",
        help="Of the gradients; results are always scored in float32. Other than fp32 makes an entry unofficial.",
    ),
    click.option("--compile", is_flag=True, help="Compile model and loss (torch.compile)."),
    click.option(
        "--shard",
        help="3/16: every sixteenth unit from the third on.  [default: what torchrun or SLURM say, or everything]",
    ),
    click.option(
        "--engine", type=click.Choice(["local", "ray"]), default="local", help="ray: a local cluster, or RAY_ADDRESS."
    ),
    click.option("--workers", type=int, help="Actors of --engine ray.  [default: as many as the cluster holds]"),
    click.option("--gpus-per-worker", type=float, help="That each of them asks for.  [default: 1 on CUDA]"),
    click.option("--offline", is_flag=True, help="Never use the network."),
    click.option("--quiet", is_flag=True, help="No progress bar."),
)


def unless_shards_missing(shard: str | None, work: Callable[[], T]) -> T | None:
    """The result of ``work``; None, after a note, where other shards of torchrun or SLURM are missing.

    Raises:
        ShardDoneError: the same, where the user gave the shard.
    """
    try:
        return work()
    except ShardDoneError as error:
        if shard is not None:
            raise
        note(str(error))
        return None


def computing_options(command: F) -> F:
    """Adds them to a command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command
