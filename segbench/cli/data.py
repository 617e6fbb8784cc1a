"""``data``: what data sets there are, and whether a copy on disk is whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from segbench.cli.app import fail, note, print_json, print_table, printable
from segbench.cli.bars import progress, steps
from segbench.data.catalogue import (
    EMBEDDED,
    class_weights,
    load_dataset,
    of_tree,
    open_tree,
    overview,
    split_id,
    weights_source,
)
from segbench.data.dataset import SegmentationDataset
from segbench.data.sets import shapes
from segbench.data.trees import Tree
from segbench.data.weights import COUNTED, ClassWeights, counted
from segbench.errors import DataError, UsageError

if TYPE_CHECKING:
    from segbench.data.checking import Finding

MOST_ROWS = 64  # of a contact sheet
root_option = click.option(
    "--root", "--data-root", "root", type=click.Path(path_type=Path), help="Folder of the data set."
)
split_option = click.option("--split", default="val", help="val, train, or another split of the data set.")
json_option = click.option("--json", is_flag=True, help="Print as JSON.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress bar.")


class InOrder(click.Group):
    """Lists its commands in the order in which they are written."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder)
def data() -> None:
    """Look at data sets, and check copies of them."""


@data.command(name="list")
@json_option
def list_(json: bool) -> None:
    """List the data sets and their variants."""
    rows = overview()
    if json:
        print_json(rows)
        return
    print_table(
        ["id", ">classes", ">val", ">train", "class weights", "preprocessing"],
        [
            [
                row["id"], _text(row["classes"]), *(_text(row["images"].get(split)) for split in ("val", "train")),
                row["class_weights"], row["preprocessing"],
            ]
            for row in rows
        ],
    )  # fmt: skip
    print_table(
        ["data set", "title", "from"],
        [[row["id"], row["title"], row["url"] or "–"] for row in rows if "/" not in row["id"]],
    )


@data.command()
@click.argument("dataset_id", metavar="ID")
@root_option
@split_option
@json_option
@quiet_option
def info(dataset_id: str, root: Path | None, split: str, json: bool, quiet: bool) -> None:
    """Show sizes, classes and fingerprint of a split.

    Also which splits are there, and whether a copy is partial. Every file of the split is read once; the result is
    remembered until a file changes.
    """
    from segbench.data.survey import survey

    tree = _tree(dataset_id, root)
    chosen = _load(dataset_id, tree, split)
    with progress(quiet) as report:
        found = survey(chosen, steps(report, f"reading {split}", len(chosen)))
    labelled = sum(found.pixels)
    everything = labelled + found.ignored
    document = {
        "id": chosen.id, "root": str(tree.base) if tree else None, "split": split, "splits": _splits(tree),
        "preprocessing": chosen.preprocessing, "window": str(chosen.window) if chosen.window else None,
        "sizes": {"smallest": list(found.smallest), "largest": list(found.largest)},
        "classes": [
            {"label": label, "name": name, "pixels": number, "share": number / labelled if labelled else 0.0}
            for label, (name, number) in enumerate(zip(chosen.class_names, found.pixels, strict=True))
        ],
        "ignored": {"pixels": found.ignored, "share": found.ignored / everything},
        "fingerprint": found.fingerprint, "class_weights": weights_source(tree) if tree else COUNTED,
    }  # fmt: skip
    print_json(document) if json else _print_info(document)


def _print_info(facts: dict[str, Any]) -> None:
    sizes = ["x".join(map(str, facts["sizes"][name])) for name in ("smallest", "largest")]
    rows = [
        ["root", facts["root"] or "in the package"],
        *([f"split {name}", _split_text(name, split)] for name, split in facts["splits"].items()),
        ["preprocessing", facts["preprocessing"]],
        ["window", facts["window"] or "none: the whole picture at once"],
        [f"sizes of {facts['split']}", " .. ".join(dict.fromkeys(sizes))],
        ["class weights", facts["class_weights"]],
        ["fingerprint", facts["fingerprint"]],
    ]
    print_table(["", facts["id"]], rows)
    print_table(
        [">label", "class", f">pixels of {facts['split']}", ">share"],
        [
            *([str(row["label"]), row["name"], str(row["pixels"]), _share(row["share"])] for row in facts["classes"]),
            ["255", "ignored", str(facts["ignored"]["pixels"]), f"{_share(facts['ignored']['share'])} of all"],
        ],
    )


def _splits(tree: Tree | None) -> dict[str, dict[str, Any]]:
    """How much there is of each split; ``problem`` is the first one of a split that cannot be loaded."""
    if tree is None:
        images = {"val": shapes.VALIDATION_IMAGES, "train": shapes.TRAINING_IMAGES}
        return {
            split: {"images": number, "complete": number, "left_out": 0, "problem": None}
            for split, number in images.items()
        }
    found = {}
    for split in tree.splits:
        try:
            listing = tree.find(split)
            number, left_out, problem = len(listing.pairs), len(listing.leaks), next(iter(listing.problems), None)
            complete = listing.images
        except DataError as error:
            number, complete, left_out, problem = 0, None, 0, str(error)
        found[split] = {"images": number, "complete": complete, "left_out": left_out, "problem": problem}
    return found


def _split_text(name: str, split: dict[str, Any]) -> str:
    number, complete = split["images"], split["complete"]
    text = f"{number} images"
    if complete is not None and number < complete:
        text = f"partial: {number} of {complete}"
        text += "; an entry measured on it is unofficial" if name == "val" else ""
    elif complete is not None and number > complete:
        text += f", but the complete split has {complete}"
    elif complete is not None:
        text += ", complete"
    if split["left_out"]:
        text += f"; {split['left_out']} also in val, left out"
    return text + (f"; not usable: {split['problem']}" if split["problem"] else "")


@data.command()
@click.argument("dataset_id", metavar="ID")
@root_option
@json_option
@quiet_option
def check(dataset_id: str, root: Path | None, json: bool, quiet: bool) -> None:
    """Read every file, and tell all problems at once.

    Exits with 1 if there are problems. Notes are worth knowing, but nothing that must be mended.
    """
    from segbench.data import checking

    tree = _tree(dataset_id, root)
    with progress(quiet) as report, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on what is told as a problem anyway
        found = checking.check(tree, report) if tree else checking.check_embedded()
    if json:
        print_json(
            {
                "problems": [_finding(each) for each in found.problems],
                "notes": [_finding(each) for each in found.notes],
                "splits": {name: split._asdict() for name, split in found.splits.items()},
            }
        )
    else:
        for kind, findings in (("note", found.notes), ("problem", found.problems)):
            for each in findings:
                click.echo(printable(f"{kind}, {each.split}: {each.text}", keep="\n"))
    counted = ", ".join(f"{split.images} of {name}" for name, split in found.splits.items())
    if found.problems:
        fail(f"{_number(len(found.problems), 'problem')} in {dataset_id} (images with masks: {counted or 'none'}).", 1)
    note(f"No problems, {_number(len(found.notes), 'note')}. Images with masks: {counted}.")


@data.command()
@click.argument("dataset_id", metavar="ID")
@root_option
@split_option
@click.option(
    "-n", "--number", default=8, type=click.IntRange(1, MOST_ROWS), help="Images, spread evenly over the split."
)
@click.option(
    "-o", "--out", default=Path("sheet.png"), type=click.Path(path_type=Path), help="The picture; it is overwritten."
)
def show(dataset_id: str, root: Path | None, split: str, number: int, out: Path) -> None:
    """Draw image, label and overlay of some samples.

    A contact sheet of what the model sees, as a PNG; samples are spread evenly over the split.
    """
    from segbench.data.pictures import contact_sheet
    from segbench.files import write_atomic

    if out.suffix.lower() != ".png" or out.is_dir():
        raise UsageError(f"The sheet {out} must be a file whose name ends in .png: -o sheet.png")
    if not out.parent.is_dir():
        raise UsageError(f"The folder {out.parent} does not exist. Create it, or choose another one with -o.")
    sheet = contact_sheet(_load(dataset_id, _tree(dataset_id, root), split), number)
    write_atomic(out, sheet)
    click.echo(printable(str(out)))


@data.command()
@click.argument("dataset_id", metavar="ID")
@root_option
@click.option("--count", is_flag=True, help="Count on the training split, also if there are published values.")
@json_option
@quiet_option
def weights(dataset_id: str, root: Path | None, count: bool, json: bool, quiet: bool) -> None:
    """Show the class weights of the loss mce_bal.

    Published ones, or 1/N_c counted on the training split.
    """
    tree = _tree(dataset_id, root)
    found = _weights(tree, count, quiet)
    names = tree.protocol.class_names if tree else shapes.CLASS_NAMES
    pixels = None if found.pixels is None else found.pixels.tolist()
    if json:
        document = {"source": found.source, "weights": found.values.tolist(), "pixels": pixels, "classes": list(names)}
        print_json(document)
        return
    numbers = [str(number) for number in pixels or ()] or ["–"] * len(names)
    values = [f"{value:.6g}" for value in found.values]
    labels = map(str, range(len(names)))
    print_table([">label", "class", ">pixels", ">weight"], list(zip(labels, names, numbers, values, strict=True)))
    click.echo(f"source: {found.source}")


def _weights(tree: Tree | None, count: bool, quiet: bool) -> ClassWeights:
    with progress(quiet) as report:
        if tree is None:
            if not count:
                return ClassWeights(np.array(shapes.CLASS_WEIGHTS), COUNTED)
            training = shapes.load_shapes("train")
            return counted(training, COUNTED, steps(report, "counting", len(training)))
        if count and "train" not in tree.splits:
            raise DataError(f"{tree.base} has no training split to count on. Restore it, or leave --count out.")
        return class_weights(tree, count=count, report=lambda total: steps(report, "counting", total))


@data.command()
@click.argument("dataset_id", metavar="ID")
@click.option("--root", "--data-root", "root", type=click.Path(path_type=Path), required=True, help="Folder to fill.")
@click.option("--sbd", is_flag=True, help="Pascal VOC: also the training masks of SBD.")
@click.option("--keep-archive", is_flag=True, help="Keep the downloaded archives.")
@click.option("--offline", is_flag=True, help="Never use the network: unpack archives that are there.")
@quiet_option
def prepare(dataset_id: str, root: Path, sbd: bool, keep_archive: bool, offline: bool, quiet: bool) -> None:
    """Fetch and unpack a data set, or say how to get it."""
    from segbench.data.preparation.preparing import prepare as run

    for line in run(dataset_id, root, sbd=sbd, keep_archive=keep_archive, offline=offline, progress=not quiet):
        click.echo(printable(line, keep="\n"))


def _tree(dataset_id: str, root: Path | None) -> Tree | None:
    """The folder of a data set; None for the one in the package."""
    return None if split_id(dataset_id)[0] == EMBEDDED else open_tree(dataset_id, root)


def _load(dataset_id: str, tree: Tree | None, split: str) -> SegmentationDataset:
    return of_tree(tree, split) if tree else load_dataset(dataset_id, split=split)


def _finding(found: Finding) -> dict[str, Any]:
    """As JSON; ``file`` is the first of ``files``, and both are left out where a folder is meant."""
    files = [str(path) for path in found.files]
    return {**({"file": files[0], "files": files} if files else {}), "split": found.split, "text": found.text}


def _text(value: int | None) -> str:
    return "–" if value is None else str(value)


def _share(value: float) -> str:
    return f"{100 * value:.2f}%"


def _number(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"
