"""``evaluate``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from segbench.cli.app import ManyValues, find_own_modules, note, print_json, printable
from segbench.cli.zoo import print_scores


@click.command(cls=ManyValues)
@click.option(
    "--model",
    required=True,
    help="Id of the zoo, path of a card, or a spec: package.module:function, ./file.py:function, torchvision:NAME, "
    "hf:REPO[@revision], smp:REPO, timm:BACKBONE?num_classes=K&weights=FILE.",
)
@click.option("--dataset", help="Data set id; by default that of the model's card.")
@click.option(
    "--eps", multiple=True, help="Radii: 4, 8/255, 0.25 (all over 255). Several after one --eps.  [default: 4 8 12]"
)
@click.option("--protocol", default="sea-v1", help="Name of the protocol.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Folder of the data set.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/<model>-<data set>-<identity>]"
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--batch-size", default="auto", help="Images attacked at once, or auto. Changes no result on a CPU.")
@click.option("--limit", type=int, help="Only the first images; the entry becomes unofficial.")
@click.option("--iterations", type=int, help="Instead of the protocol's; the entry becomes unofficial.")
@click.option("--shard", help="3/16: every sixteenth unit from the third on.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--json", is_flag=True, help="Print the entry as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(
    model: str,
    dataset: str | None,
    eps: tuple[str, ...],
    protocol: str,
    data_root: Path | None,
    out: Path | None,
    device: str,
    batch_size: str,
    limit: int | None,
    iterations: int | None,
    shard: str | None,
    offline: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Attack a model with the whole protocol; write entry and evidence.

    Ctrl-C is safe: the same command continues where it stopped.
    """
    from segbench.engine.evaluate import evaluate as run

    find_own_modules(model)
    result = run(
        model, dataset, list(eps) or None, protocol, data_root, out, device, batch_size,
        limit=limit, iterations=iterations, shard=shard, progress=not quiet, offline=offline,
    )  # fmt: skip
    entry = result.entry()
    if json:
        print_json(entry)
    else:
        protocol_text = entry["protocol"]["name"] + (
            "" if entry["protocol"]["official"] else f", unofficial: {'; '.join(entry['protocol']['deviations'])}"
        )
        click.echo(
            printable(
                f"{entry['model']['id']} on {entry['dataset']['id']} ({entry['dataset']['images']} images), "
                f"{protocol_text}. Percent; per loss aAcc / mIoU."
            )
        )
        print_scores(entry)
    cost = entry["run"]
    note(
        f"{cost['seconds']:.0f} s, {cost['forward_passes']} forward and {cost['backward_passes']} backward passes "
        f"on {cost['device']}"
    )
    note(f"entry     {result.entry_path}\nevidence  {result.evidence_path}")
    if entry["protocol"]["official"]:
        note(f"Put it on the leaderboard: segbench submit {shlex.quote(str(result.path))}")
