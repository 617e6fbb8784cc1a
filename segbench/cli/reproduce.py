"""``reproduce``."""

from __future__ import annotations

from pathlib import Path

import click

from segbench import content
from segbench.cli.app import ManyValues, fail, find_own_modules, note, print_json, print_table
from segbench.cli.content import entry_file
from segbench.protocol import Threat


@click.command(cls=ManyValues)
@click.argument("entry", type=click.Path(path_type=Path))
@click.option("--sample", type=int, default=20, help="Number of random images.")
@click.option(
    "--radius", multiple=True, help="Radii: 8, 8/255. Several after one --radius.  [default: all of the entry]"
)
@click.option("--model", help="What loads the model, if not its id: a card, package.module:function, ...")
@click.option("--data-root", type=click.Path(path_type=Path), help="Folder of the data set.")
@click.option("--seed", type=int, help="Draws the images.  [default: random]")
@click.option("--by", help="Your name or GitHub account; a record without it raises no tier.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the record.  [default: <model id>.reproduced, beside ENTRY]",
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--batch-size", default="auto", help="Images attacked at once, or auto.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("--json", is_flag=True, help="Print the record as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def reproduce(
    entry: Path,
    sample: int,
    radius: tuple[str, ...],
    model: str | None,
    data_root: Path | None,
    seed: int | None,
    by: str | None,
    out: Path | None,
    device: str,
    batch_size: str,
    offline: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Attack random images of ENTRY again (a file, or a model id), and compare with its stored counts, image by image.

    Writes a record that raises the tier of the entry to `reproduced` when it is merged. Exit code 1 if it disagrees.
    Ctrl-C is safe: the same command goes on.
    """
    from segbench.engine.launch.options import RunOptions
    from segbench.engine.studies.reproduce import reproduce as run

    if model:
        find_own_modules(model)
    path = entry_file(entry)
    if out is None and content.checkout() is None and content.entries_above(path.resolve()):
        out = Path(f"{path.stem}.reproduced")  # an installed package is not where records are kept
    done = run(
        path, sample=sample, radii=radius, model=model, data_root=data_root, seed=seed, by=by, out=out,
        options=RunOptions(device, batch_size, progress=not quiet, offline=offline),
    )  # fmt: skip
    record = done.record
    if json:
        print_json(Threat(**record["threat"]).printed(record))
    else:
        print_table(
            [">ε", "attack", ">aAcc stored", ">found", ">mIoU stored", ">found", ">largest difference of an image", ""],
            [
                [
                    f"{row['strength']:g}/255",
                    row["attack"],
                    f"{100 * row['stored_aacc']:.2f}",
                    f"{100 * row['found_aacc']:.2f}",
                    f"{100 * row['stored_miou']:.2f}",
                    f"{100 * row['found_miou']:.2f}",
                    f"{100 * row['largest']:.2f}",
                    "agrees" if row["agrees"] else "DIFFERS",
                ]
                for row in record["comparison"]
            ],
        )
    note(f"{record['images']} images, seed {record['seed']}. Record: {done.path}")
    if not record["agrees"]:
        fail(
            "the entry was not reproduced within the tolerance of its protocol. Open an issue with the record: "
            "a wrong row.",
            1,
        )
    if record["by"] is None:
        note("The record names nobody (--by), so it raises no tier.")
    else:
        note("Add both files of the record in a pull request: the tier of the entry becomes `reproduced`.")
