"""Contact sheets: samples of a split as rows of image, label and overlay, with a legend, drawn by Pillow."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from segbench.data.dataset import SegmentationDataset
from segbench.data.parallel import in_order
from segbench.data.protocols import IGNORE_INDEX, voc_colours

PANEL_WIDTH, PANEL_HEIGHT = 320, 420  # at most; small pictures are enlarged by a whole number to fit
NARROWEST = 560  # of the part between the margins, for title and legend
MARGIN, GAP = 32, 14
FEW_CLASSES = 21  # up to here the legend names all classes, not only those that occur
PAPER, INK, FAINT, FRAME = (255, 255, 255), (28, 30, 34), (112, 117, 125), (208, 212, 218)
HATCH = ((244, 244, 244), (176, 176, 176))  # ignored pixels in the label panel
HATCH_PERIOD = 8
OPACITY = 0.5  # of the class colour in the overlay
BORDER_OPACITY = 0.65  # of the white line where classes meet
ABOUT_IGNORED = "Ignored pixels are hatched in the label and bare in the overlay."
TITLE, TEXT, SMALL = 24, 15, 13  # sizes of letters
MOST_CHARACTERS = 400  # of a text that is measured at all
NO_CHARACTER = "\U0010fffd"  # every font draws the sign of a missing one

Array = npt.NDArray[np.uint8]


class Row(NamedTuple):
    """A sample on the sheet: three panels (H,W,3) of one size, and the labels that occur."""

    image_id: str
    size: tuple[int, int]  # width and height as the model sees it
    panels: tuple[Array, Array, Array]
    labels: frozenset[int]


def contact_sheet(data: SegmentationDataset, number: int) -> bytes:
    """A PNG of samples spread evenly over a split.

    Args:
        data: the split.
        number: of samples; all if there are fewer.

    Raises:
        DataError: a damaged pair.
    """
    colours = palette_of(data)

    def row(image_id: str) -> Row:
        pixels, labels = data.checked(image_id)
        occurring = frozenset(np.unique(labels).tolist())
        return Row(image_id, (labels.shape[1], labels.shape[0]), panels(pixels, labels, colours), occurring)

    ids = [data.image_ids[place] for place in spread(len(data), number)]
    sheet = _compose(data, list(in_order(row, ids, None if data.files else 0)), colours)
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def spread(length: int, number: int) -> list[int]:
    """``number`` places out of ``length``, evenly, the first and the last among them.

    >>> spread(101, 3), spread(2, 8), spread(9, 1)
    ([0, 50, 100], [0, 1], [0])
    """
    number = min(length, number)
    return [place * (length - 1) // max(1, number - 1) for place in range(number)]


def palette_of(data: SegmentationDataset) -> Array:
    """(K,3) class colours; those of Pascal VOC for a data set that has none."""
    return np.array(data.palette or voc_colours(data.num_classes), np.uint8)


def panels(pixels: Array, labels: npt.NDArray[np.integer], colours: Array) -> tuple[Array, Array, Array]:
    """Image, label and overlay (h,w,3), scaled to the panel.

    Args:
        pixels: (H,W,3) image.
        labels: (H,W) labels; 255 is ignored: hatched in the label panel, the bare image in the overlay.
        colours: (K,3).
    """
    target = _scaled(labels.shape[1], labels.shape[0])
    shrinks = target[0] < labels.shape[1]
    image = resized(pixels, target, Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST)
    shown = resized(labels.astype(np.uint8), target, Image.Resampling.NEAREST)
    ignored = shown == IGNORE_INDEX
    painted = colours[np.where(ignored, 0, shown)]
    overlay = np.where(ignored[..., None], image, _blend(image, painted, OPACITY))
    overlay = np.where(_borders(shown)[..., None], _blend(overlay, np.full_like(image, 255), BORDER_OPACITY), overlay)
    return image, np.where(ignored[..., None], hatch(shown.shape), painted), overlay


def _blend(below: Array, above: Array, opacity: float) -> Array:
    return np.rint(below * (1 - opacity) + above * opacity).astype(np.uint8)


def _scaled(width: int, height: int) -> tuple[int, int]:
    """Width and height on the sheet."""
    factor = min(PANEL_WIDTH / width, PANEL_HEIGHT / height)
    factor = float(int(factor)) if factor >= 1 else factor
    return max(1, round(width * factor)), max(1, round(height * factor))


def resized(array: Array, target: tuple[int, int], how: Image.Resampling) -> Array:
    """An array of pixels at another (width, height)."""
    return np.asarray(Image.fromarray(array).resize(target, how))


def _borders(labels: Array) -> npt.NDArray[np.bool_]:
    """(h,w) the pixels whose right or lower neighbour has another label."""
    found = np.zeros(labels.shape, np.bool_)
    found[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    found[:-1] |= labels[:-1] != labels[1:]
    return found


def hatch(shape: tuple[int, ...]) -> Array:
    """(h,w,3) diagonal stripes, the look of ignored pixels."""
    rows, columns = np.indices(shape[:2])
    striped: Array = np.array(HATCH, np.uint8)[((rows + columns) % HATCH_PERIOD < HATCH_PERIOD // 3).astype(int)]
    return striped


def _compose(data: SegmentationDataset, rows: Sequence[Row], colours: Array) -> Image.Image:
    column = max(row.panels[0].shape[1] for row in rows)
    column = max(column, (NARROWEST - 2 * GAP) // 3)
    inner = 3 * column + 2 * GAP
    legend = legend_of(data, frozenset[int]().union(*(row.labels for row in rows)), colours, inner, ABOUT_IGNORED)
    head, line = MARGIN + TITLE + 12 + TEXT + 30, SMALL + 10
    heights = [line + row.panels[0].shape[0] + 20 for row in rows]
    sheet = Image.new("RGB", (inner + 2 * MARGIN, head + sum(heights) + 14 + legend.height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    write_text(draw, (MARGIN, MARGIN), f"{data.id}, {data.split}", TITLE, INK, inner)
    about = f"{len(rows)} of {len(data)} images, {data.preprocessing}"
    write_text(draw, (MARGIN, MARGIN + TITLE + 12), about, TEXT, FAINT, inner)
    top = head
    for row, height in zip(rows, heights, strict=True):
        _draw_row(sheet, draw, row, top, column)
        top += height
    sheet.paste(legend, (MARGIN, top + 14))
    return sheet


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: Row, top: int, column: int) -> None:
    size = f"{row.size[0]}x{row.size[1]}"
    width = draw.textlength(size, font_of(SMALL))
    write_text(draw, (MARGIN, top), row.image_id, SMALL, INK, 2 * column)
    write_text(draw, (MARGIN + 3 * column + 2 * GAP - int(width), top), size, SMALL, FAINT, int(width) + 1)
    for place, panel in enumerate(row.panels):
        left = MARGIN + place * (column + GAP) + (column - panel.shape[1]) // 2
        box = (left, top + SMALL + 10)
        sheet.paste(Image.fromarray(panel), box)
        draw.rectangle((box[0] - 1, box[1] - 1, box[0] + panel.shape[1], box[1] + panel.shape[0]), outline=FRAME)


def legend_of(data: SegmentationDataset, seen: frozenset[int], colours: Array, width: int, ignored: str) -> Image.Image:
    """Swatches with class names in columns, read from top to bottom.

    Args:
        data: gives the names.
        seen: labels that occur.
        colours: (K,3).
        width: in pixels.
        ignored: what is said of ignored pixels, where some occur.
    """
    labels = [label for label in range(data.num_classes) if data.num_classes <= FEW_CLASSES or label in seen]
    entries = [(data.class_names[label], np.broadcast_to(colours[label], (SMALL + 3, 26, 3))) for label in labels]
    if IGNORE_INDEX in seen:
        entries.append(("ignored", hatch((SMALL + 3, 26))))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    longest = min(width / 3, max(measure.textlength(_plain(name), font_of(SMALL)) for name, _ in entries))
    columns = max(1, min(len(entries), int(width // (longest + 26 + 8 + 24))))
    high, cell = -(-len(entries) // columns), width // columns
    legend = Image.new("RGB", (width, high * (SMALL + 12) + (SMALL + 16) * (IGNORE_INDEX in seen)), PAPER)
    draw = ImageDraw.Draw(legend)
    for place, (name, swatch) in enumerate(entries):
        left, top = place // high * cell, place % high * (SMALL + 12)
        legend.paste(Image.fromarray(np.ascontiguousarray(swatch)), (left, top))
        draw.rectangle((left, top, left + 25, top + SMALL + 2), outline=FRAME)
        write_text(draw, (left + 34, top), name, SMALL, INK, cell - 40)
    if IGNORE_INDEX in seen:
        write_text(draw, (0, high * (SMALL + 12) + 8), ignored, SMALL, FAINT, width)
    return legend


def write_text(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], width: int
) -> None:
    """One line of plain text, without its middle if it is wider than ``width``."""
    draw.text(place, _shortened(draw, _plain(text), size, width), colour, font_of(size))


def _shortened(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    """The text, without its middle if it is wider than ``width``."""
    kept, short = len(text), text
    while draw.textlength(short, font_of(size)) > width and kept > 2:
        kept -= 1
        short = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    return short


def _plain(text: str) -> str:
    """Text of strangers as one line of printable characters."""
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS // 2]}…{text[-MOST_CHARACTERS // 2 :]}"
    return "".join(map(_drawable, text))


@lru_cache(maxsize=4096)
def _drawable(char: str) -> str:
    """A character that the font has: itself, else its letter without accents, else a question mark."""
    font = font_of(TEXT)
    missing = bytes(font.getmask(NO_CHARACTER))
    for candidate in (char, unicodedata.normalize("NFKD", char)[0]):
        if candidate.isprintable() and bytes(font.getmask(candidate)) != missing:
            return candidate
    return "?"


@lru_cache(maxsize=8)
def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The letters of all pictures."""
    return ImageFont.load_default(size)
