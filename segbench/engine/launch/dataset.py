"""The data set of a run: opened, and its labels checked once they have been counted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from segbench.data import SegmentationDataset, load_dataset
from segbench.engine.rundir.plan import FinishedUnit
from segbench.errors import DataError, UsageError
from segbench.models.sources.names import CardSource, ModelSource


def open_dataset(
    source: ModelSource, dataset: str | SegmentationDataset | None, data_root: str | Path | None
) -> SegmentationDataset:
    """The data set as `evaluate` takes it: an object, an id, or that of the model's card."""
    if isinstance(dataset, SegmentationDataset):
        return dataset
    if dataset:
        return load_dataset(dataset, data_root)
    if not isinstance(source, CardSource):
        raise UsageError(
            "A model of your own needs a data set: dataset='camvid' in Python, --dataset camvid on the command line."
        )
    return load_dataset(source.card.dataset, data_root)


def check_labels(data: SegmentationDataset, clean: Sequence[FinishedUnit], *, is_whole: bool) -> None:
    """Refuses a data set in which no pixel counts; warns of classes that are missing in a whole one."""
    target = sum(done.group.counts.target.sum(axis=0) for done in clean)
    if not target.sum():
        raise DataError(
            f"No pixel of {data.id} counts: every label is {data.ignore_index} (ignored). Look at the masks: "
            f"segbench data check {data.id}, segbench data show {data.id}"
        )
    if is_whole and not target.all():
        empty = [name for name, pixels in zip(data.class_names, target, strict=True) if not pixels]
        logging.getLogger("segbench").warning(
            "%s: no pixel of %s in %r. Is it so? segbench data info %s", data.id, ", ".join(empty), data.split, data.id
        )
