"""Data sets: images in [0,1], labels, stable ids and a fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from segbench.data.dataset import Sample, SegmentationDataset
from segbench.data.folders import load_camvid, load_folder
from segbench.data.published import load_ade20k, load_pascal_voc
from segbench.data.shapes import load_shapes
from segbench.errors import DataError, UnknownNameError, unknown_name

__all__ = ["DATASETS", "Sample", "SegmentationDataset", "load_dataset"]

DATASETS: Mapping[str, Callable[[Path | None, str], SegmentationDataset]] = {
    "shapes": lambda _, split: load_shapes(split),
    "pascal_voc": load_pascal_voc,
    "ade20k": load_ade20k,
    "camvid": load_camvid,
    "folder": load_folder,
}


def load_dataset(dataset_id: str, root: str | Path | None = None, *, split: str = "val") -> SegmentationDataset:
    """A data set by name; items are `Sample(image, label, image_id)`.

    Args:
        dataset_id: ``shapes`` (embedded), ``pascal_voc``, ``ade20k``, ``camvid`` or ``folder``.
        root: the folder that holds the data; not needed by ``shapes``.
        split: ``val`` or ``train``.

    Raises:
        UnknownNameError: no data set of that name.
        DataError: missing or damaged data; the message says what is expected.
    """
    if dataset_id not in DATASETS:
        raise UnknownNameError(unknown_name("data set", dataset_id, DATASETS))
    try:
        folder = None if root is None else Path(root).expanduser()
    except RuntimeError as error:  # ~name of a user who does not exist
        raise DataError(f"The data root {root} cannot be found: {error} Write the folder out.") from error
    return DATASETS[dataset_id](folder, split)
