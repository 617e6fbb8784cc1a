"""The picture sheets of a report: the best and the worst images, and targeted attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segbench import counts
from segbench.data import SegmentationDataset
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir.store import Store
from segbench.engine.studies.attacked import AttackedImage, PictureKey, attack_again, reopen_run
from segbench.engine.studies.targeted import class_number
from segbench.evidence import CLEAN
from segbench.protocol import SEA_V1, TOLERANCES
from segbench.reporting.analysis import View, extremes, middle
from segbench.reporting.figures import Figure, picture
from segbench.reporting.panels import Row, panel
from segbench.reporting.runs import Run

ABOUT = (
    "The attacked images are those of the worst case for aAcc. The perturbation is amplified until +ε is full light "
    "and -ε none, in red, green and blue each by itself; in the last column blue is right and red is wrong."
)


@dataclass(frozen=True)
class Pictures:
    """Which images are shown.

    Attributes:
        number: of the best, and of the worst images.
        targets: classes of the targeted attacks, by name or number; none: the most and the least frequent one.
        model: what loads the model, if it is not the id that the run names.
        data_root: folder of the data set, where it needs one.
        options: how they are attacked again.
    """

    number: int
    targets: Sequence[str]
    model: str | None
    data_root: Path | None
    options: RunOptions


def gallery(run: Run, views: Sequence[View], which: Pictures) -> tuple[list[Figure], list[str]]:
    """Attacks the chosen images again and draws them.

    Args:
        run: an evaluation or a comparison.
        views: of the run, the clean images first.
        which: the images and the targets.

    Returns:
        The sheets, and remarks where an image is not as in the run.

    Raises:
        UsageError, ModelError, DataError, RunError: the model or the images are not those of the run.
    """
    best, worst = extremes(middle(list(views)), which.number)
    rows = [*((row, "most") for row in best), *((row, "fewest") for row in worst)]
    with reopen_run(Store(run.path, dict(run.manifest)), which.model, which.data_root, which.options) as prepared:
        data = prepared.worker.dataset
        targets = _targets(views[0], data, which.targets)
        image = (best or worst)[0]
        wanted = [PictureKey(row, *key) for row, _ in rows for key in _keys(views, row)]
        aimed = [
            [
                PictureKey(image, *CLEAN),
                *(PictureKey(image, view.strength, f"js_target_{target}") for view in views[1:]),
            ]
            for target in targets
        ]
        seen = attack_again(prepared, [*wanted, *(each for group in aimed for each in group)])
        sheets = [
            _of_image(data, views, row, f"{'best' if kind == 'most' else 'worst'}_{place + 1}", kind, seen)
            for kind in ("most", "fewest")
            for place, row in enumerate([row for row, its in rows if its == kind])
        ]
        sheets += [_of_target(data, target, group, seen) for target, group in zip(targets, aimed, strict=True)]
        return sheets, _remarks(run, data, wanted, seen)


def _keys(views: Sequence[View], row: int) -> list[tuple[float, str]]:
    """The worst candidate of an image in each view."""
    keys = []
    for view in views:
        name = view.attacks[view.aacc_choice[row]]
        keys.append(CLEAN if name == CLEAN[1] else (view.strength, name))
    return keys


def _targets(clean: View, data: SegmentationDataset, wished: Sequence[str]) -> list[int]:
    """The classes wished for; else the most and the least frequent one, of those that are labelled and predicted."""
    if wished:
        return list(dict.fromkeys(class_number(each, data.class_names) for each in wished))
    pixels = clean.aacc_counts.target.sum(axis=0)
    known = np.flatnonzero((pixels > 0) & (clean.aacc_counts.predicted.sum(axis=0) > 0))
    return (
        list(dict.fromkeys(int(known[place(pixels[known])]) for place in (np.argmax, np.argmin))) if len(known) else []
    )


def _of_image(
    data: SegmentationDataset,
    views: Sequence[View],
    row: int,
    name: str,
    kind: str,
    seen: Mapping[PictureKey, AttackedImage],
) -> Figure:
    sample = data[row]
    label, valid = sample.label.numpy(), sample.label.numpy() != data.ignore_index
    rows, words = [], []
    for view, key in zip(views, _keys(views, row), strict=True):
        its = seen[PictureKey(row, *key)]
        share = 100 * float((its.predictions == label)[valid].mean()) if valid.any() else 0.0
        by = f", {key[1]}" if view.strength and key != CLEAN else ""
        rows.append(Row(f"{view.label}{by}: {share:.1f}% right", its.image, its.predictions, view.strength, label))
        words.append(f"{view.label} {share:.1f}%")
    title = f"Among the images with the {kind} right pixels under attack: {sample.image_id}"
    sheet = panel(data, sample.image_id, f"Right pixels: {', '.join(words)}", sample.image.numpy(), label, rows)
    return picture(name, title, ABOUT, sheet)


def _of_target(
    data: SegmentationDataset, target: int, group: Sequence[PictureKey], seen: Mapping[PictureKey, AttackedImage]
) -> Figure:
    sample, name = data[group[0].row], data.class_names[target]
    label = sample.label.numpy()
    aim = np.where(label == data.ignore_index, label, target)
    rows = []
    for each in group:
        its = seen[each]
        share = 100 * float((its.predictions == target)[label != data.ignore_index].mean())
        words = f"{each.strength:g}/255" if each.strength else "clean"
        rows.append(
            Row(f"{words}: {share:.1f}% {name}", its.image, its.predictions, each.strength, aim, f"seen as {name}")
        )
    sheet = panel(
        data, f"Every pixel drawn to {name}", f"{sample.image_id}, targeted attack", sample.image.numpy(), label, rows
    )
    caption = f"The share of pixels that are seen as {name}; in the last column they are blue, all others red."
    return picture(f"target_{target}", f"Targeted: everything is to be {name}", caption, sheet)


def _remarks(
    run: Run, data: SegmentationDataset, wanted: Sequence[PictureKey], seen: Mapping[PictureKey, AttackedImage]
) -> list[str]:
    """Where an image that was attacked again is not as the evidence has it."""
    found = []
    limit = TOLERANCES[SEA_V1.name]
    for each in dict.fromkeys(wanted):
        label = data[each.row].label.numpy()
        again = counts.count(
            seen[each].predictions[None].astype(np.int64), label[None], data.num_classes, data.ignore_index
        )
        stored = run.groups[each.strength, each.attack].counts.take(np.array([each.row]))
        pixels = max(int(stored.target.sum()), 1)
        gap = abs(int(again.correct[0]) - int(stored.correct[0])) / pixels
        if gap > (limit.clean if not each.strength else limit.image):
            found.append(
                f"{data.image_ids[each.row]} under {each.attack} at {each.strength:g}/255 has "
                f"{100 * gap:.1f} points more or fewer right pixels than in the run, on another device perhaps."
            )
    return found
