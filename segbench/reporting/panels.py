"""Images of a run side by side: what was added, what is seen, and where that is wrong. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from segbench.data import SegmentationDataset
from segbench.data.pictures import (
    FAINT,
    FRAME,
    GAP,
    INK,
    MARGIN,
    PAPER,
    SMALL,
    TEXT,
    TITLE,
    hatch,
    legend_of,
    palette_of,
    resized,
    write_text,
)
from segbench.data.protocols import IGNORE_INDEX

CELL_WIDTH, CELL_HEIGHT = 272, 272  # of a picture at most
COLUMNS = 4
RIGHT, WRONG = (214, 226, 235), (200, 62, 30)
HEAD = TITLE + TEXT + 34
LINE = SMALL + 12

Array = npt.NDArray[np.uint8]


class Row(NamedTuple):
    """One image, as the model sees it and what it sees.

    Attributes:
        words: over the pictures.
        image: (3,H,W) in [0,1].
        predictions: (H,W).
        strength: radius; 0 for the clean image.
        aim: (H,W) what a pixel must be predicted as to be blue in the last picture: the label, or the target.
        verdict: over that picture.
    """

    words: str
    image: npt.NDArray[np.float32]
    predictions: npt.NDArray[np.uint16]
    strength: float
    aim: npt.NDArray[np.int64]
    verdict: str = "right and wrong"


def panel(
    data: SegmentationDataset, title: str, words: str, clean: npt.NDArray[np.float32], label: npt.NDArray[np.int64],
    rows: Sequence[Row],
) -> Image.Image:  # fmt: skip
    """A sheet: a row for the clean image and one for each attack, with a legend of the classes that occur.

    Args:
        data: gives the names and colours of the classes.
        title: of the sheet.
        words: below it.
        clean: (3,H,W) in [0,1].
        label: (H,W).
        rows: from top to bottom; in the one of the clean image the label stands where others have the perturbation.
    """
    colours = palette_of(data)
    size = _size(label.shape[1], label.shape[0])
    width = COLUMNS * size[0] + (COLUMNS - 1) * GAP
    seen = frozenset(np.unique(label).tolist()).union(*(np.unique(row.predictions).tolist() for row in rows))
    legend = legend_of(data, seen, colours, max(width, 560), "Ignored pixels are hatched.")
    height = HEAD + len(rows) * (LINE + size[1] + GAP) + GAP + legend.height + 2 * MARGIN
    sheet = Image.new("RGB", (max(width, 560) + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    write_text(draw, (MARGIN, MARGIN), title, TITLE, INK, max(width, 560))
    write_text(draw, (MARGIN, MARGIN + TITLE + 10), words, TEXT, FAINT, max(width, 560))
    top = MARGIN + HEAD
    for row in rows:
        second = "label" if not row.strength else f"perturbation, amplified {_times(row.strength)} times"
        names = (row.words, second, "prediction", row.verdict)
        pictures = (
            _pixels(row.image),
            _painted(label, colours) if not row.strength else _amplified(row.image - clean, row.strength),
            _painted(np.where(label == IGNORE_INDEX, IGNORE_INDEX, row.predictions), colours),
            _marked(row.predictions == row.aim, label),
        )
        for place, (name, picture) in enumerate(zip(names, pictures, strict=True)):
            left = MARGIN + place * (size[0] + GAP)
            write_text(draw, (left, top), name, SMALL, INK if place == 0 else FAINT, size[0])
            sheet.paste(Image.fromarray(_fitted(picture, size)), (left, top + LINE - 4))
            box = (left - 1, top + LINE - 5, left + size[0], top + LINE - 4 + size[1])
            draw.rectangle(box, outline=FRAME)
        top += LINE + size[1] + GAP
    sheet.paste(legend, (MARGIN, top + GAP))
    return sheet


def _times(strength: float) -> str:
    return f"{127.5 / strength:.3g}"


def _size(width: int, height: int) -> tuple[int, int]:
    """Width and height on the sheet; small pictures are enlarged by a whole number."""
    factor = min(CELL_WIDTH / width, CELL_HEIGHT / height)
    factor = float(int(factor)) if factor >= 1 else factor
    return max(1, round(width * factor)), max(1, round(height * factor))


def _fitted(picture: Array, size: tuple[int, int]) -> Array:
    how = Image.Resampling.LANCZOS if size[0] < picture.shape[1] else Image.Resampling.NEAREST
    return resized(picture, size, how)


def _pixels(image: npt.NDArray[np.floating]) -> Array:
    pixels: Array = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(pixels)


def _amplified(change: npt.NDArray[np.float32], strength: float) -> Array:
    """Grey where nothing was changed, black and white at -ε and +ε."""
    return _pixels(0.5 + change * 255 / (2 * strength))


def _painted(labels: npt.NDArray[np.integer], colours: Array) -> Array:
    ignored = labels == IGNORE_INDEX
    painted: Array = np.where(ignored[..., None], hatch(labels.shape), colours[np.where(ignored, 0, labels)])
    return painted


def _marked(right: npt.NDArray[np.bool_], label: npt.NDArray[np.int64]) -> Array:
    found = np.where(right[..., None], np.array(RIGHT, np.uint8), np.array(WRONG, np.uint8))
    marked: Array = np.where((label == IGNORE_INDEX)[..., None], hatch(label.shape), found)
    return marked
