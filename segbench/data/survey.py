"""What one pass over a split finds: sizes, pixels of each class, and the fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from segbench.data import cache
from segbench.data.dataset import Fingerprint, SegmentationDataset, as_arrays
from segbench.data.parallel import in_order
from segbench.data.weights import PixelCount

Size = tuple[int, int]


@dataclass(frozen=True)
class Survey:
    """Facts of a split, as the model sees it.

    Attributes:
        smallest: width and height of the smallest picture, by area.
        largest: of the largest.
        pixels: of each class.
        ignored: pixels with the label 255.
        fingerprint: `SegmentationDataset.fingerprint`.
    """

    smallest: Size
    largest: Size
    pixels: tuple[int, ...]
    ignored: int
    fingerprint: str


def survey(data: SegmentationDataset, report: Callable[[], None] = lambda: None) -> Survey:
    """One pass over images and masks; remembered by the path, size and time of change of the files.

    Fingerprint and class pixels are remembered with it, so that `evaluate` need not read everything again.

    Args:
        data: a split with at least one image.
        report: called after each image.

    Raises:
        DataError: a damaged pair, or a file that is gone.
    """
    key = data.stamp() if data.files else ""
    if key and (known := cache.recall("survey", key)) and set(known) == {field.name for field in fields(Survey)}:
        return Survey(
            (known["smallest"][0], known["smallest"][1]), (known["largest"][0], known["largest"][1]),
            tuple(known["pixels"]), known["ignored"], known["fingerprint"],
        )  # fmt: skip
    digest, count, sizes = Fingerprint(data), PixelCount(data), list[Size]()
    pairs = in_order(data.checked, data.image_ids, None if data.files else 0)
    for image_id, (pixels, labels) in zip(data.image_ids, pairs, strict=True):
        digest.add(image_id, *as_arrays(pixels, labels))
        count.add(labels)
        sizes = sorted({*sizes, (labels.shape[1], labels.shape[0])}, key=_area)
        sizes = [sizes[0], sizes[-1]]
        report()
    found = Survey(sizes[0], sizes[-1], tuple(count.finish().tolist()), count.ignored, digest.finish())
    if key and key == data.stamp():
        cache.remember("survey", key, asdict(found))
    return found


def _area(size: Size) -> tuple[int, Size]:
    return size[0] * size[1], size
