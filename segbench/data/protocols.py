"""What a data set's id names: its classes, what the numbers in its masks mean, and how its pictures are fed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from segbench.data.problems import numbers_error
from segbench.data.resizing import Resize, Whole

IGNORE_INDEX = 255
MOST_VALUES = 8  # that a message names

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Window:
    """Sliding-window inference: logits are averaged where windows overlap (`segbench.models.SlidingWindow`).

    Attributes:
        size: height and width in pixels.
        stride: vertical and horizontal step in pixels.
    """

    size: tuple[int, int]
    stride: tuple[int, int]

    def __str__(self) -> str:
        return f"windows {self.size[0]}x{self.size[1]}, stride {self.stride[0]}x{self.stride[1]}"


@dataclass(frozen=True)
class LabelMap:
    """What a mask holds, as labels 0..K-1 or 255 (ignored). Everything else in a mask is an error.

    Attributes:
        values: number in a one-channel mask to label; empty if masks are colours.
        colours: colour to label, for masks in RGB; empty if there are none.
        mend: what to do about a number without meaning; it changes no label.
        description: the file in which numbers to ignore can be named; empty if the data set is a published one.
    """

    values: Mapping[int, int] = field(default_factory=dict)
    colours: Mapping[Colour, int] = field(default_factory=dict)
    mend: str = field(default="Correct the mask or the class list.", repr=False, compare=False)
    description: str = field(default="", repr=False, compare=False)

    def apply(self, mask: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint8]:
        """(H,W) whole numbers, or (H,W,3) colours, to labels (H,W).

        Raises:
            DataError: names ``where`` and the number or colour that has no meaning.
        """
        return self._of_colours(mask, where) if mask.ndim == 3 else self._of_values(mask, where)

    def _of_values(self, mask: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint8]:
        table, known = self._table
        if mask.dtype == np.uint8:  # bytes are translated many times faster than an array is indexed
            translated = mask.tobytes().translate(*self._byte_table)
            if len(translated) == mask.size:
                return np.frombuffer(translated, np.uint8).reshape(mask.shape)
        else:
            outside = (mask < 0) | (mask >= len(known))
            if outside.any():
                outside |= ~known[np.where(outside, 0, mask)]
                raise numbers_error(where, "label", np.unique(mask[outside]).tolist(), self._about_values)
            mask = mask.astype(np.uint16)
        if not known[mask].all():
            raise numbers_error(where, "label", np.unique(mask[~known[mask]]).tolist(), self._about_values)
        labels: npt.NDArray[np.uint8] = table[mask]
        return labels

    def _of_colours(self, mask: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint8]:
        keys, labels = self._colour_table
        packed = mask[..., 0].astype(np.int32) << 16 | mask[..., 1].astype(np.int32) << 8 | mask[..., 2]
        places = np.minimum(np.searchsorted(keys, packed), len(keys) - 1)
        wrong = packed[keys[places] != packed]
        if wrong.size:
            raise numbers_error(where, "colour", np.unique(wrong).tolist(), self._about_colours)
        found: npt.NDArray[np.uint8] = labels[places]
        return found

    @cached_property
    def _table(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        table, known = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.bool_)
        table[list(self.values)] = list(self.values.values())
        known[list(self.values)] = True
        return table, known

    @cached_property
    def _byte_table(self) -> tuple[bytes, bytes]:
        """Labels by number, and the numbers without meaning, which are left out in translation."""
        table, known = self._table
        return table[:256].tobytes(), bytes(np.flatnonzero(~known[:256]).tolist())

    @cached_property
    def _colour_table(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        pairs = sorted((red << 16 | green << 8 | blue, label) for (red, green, blue), label in self.colours.items())
        return np.array([key for key, _ in pairs], np.int32), np.array([label for _, label in pairs], np.uint8)

    def _about_values(self, wrong: Sequence[int]) -> str:
        """What is wrong with numbers that have no meaning, and the edit that fixes it."""
        kept = [value for value, label in self.values.items() if label != IGNORE_INDEX]
        ignored = [value for value, label in self.values.items() if label == IGNORE_INDEX]
        texts = [spans(kept)] + ([f"{spans(ignored)} (ignored)"] if ignored else [])
        text = f"the mask has the {_listed('label', wrong, str)}; allowed are {' and '.join(texts)}. {self.mend}"
        if not self.description or len(wrong) > MOST_VALUES:
            return text
        if nameable := [value for value in wrong if 0 <= value < 1 << 16]:
            everything = sorted({*ignored, *nameable})
            text += f" Or, if these pixels do not count, ignore them in {self.description}: ignore: {everything}"
        if min(wrong) < 0:
            text += f" Masks that count hold no number below 0: write {IGNORE_INDEX} for pixels that do not count."
        return text

    def _about_colours(self, wrong: Sequence[int]) -> str:
        """The same of colours, each packed in one number."""
        text = f"the mask has the {_listed('colour', wrong, _hexadecimal)}, which belongs to no class."
        if len(wrong) > 1:
            text = text.replace("which belongs", "which belong")
        text += " Correct the mask or the list of colours."
        if not self.description or len(wrong) > MOST_VALUES:
            return text
        lines = ", ".join(f'"{_hexadecimal(colour)}": ignore' for colour in wrong)
        return f"{text} Or, if these pixels do not count, add to colours in {self.description}: {lines}"


def _hexadecimal(colour: int) -> str:
    return f"#{colour:06x}"


def _listed(noun: str, values: Sequence[int], text: Callable[[int], str]) -> str:
    """The noun with its values; there may be thousands, as in masks of instances.

    >>> _listed("label", [11], str), _listed("label", [11, 13], str)
    ('label 11', 'labels 11, 13')
    """
    more = f" and {len(values) - MOST_VALUES} more" if len(values) > MOST_VALUES else ""
    return f"{noun}{'s' if len(values) > 1 else ''} {', '.join(map(text, values[:MOST_VALUES]))}{more}"


def as_stored(num_classes: int) -> LabelMap:
    """Masks that hold 0..K-1, and 255 for ignored pixels."""
    return LabelMap({value: value for value in (*range(num_classes), IGNORE_INDEX)})


def spans(values: list[int]) -> str:
    """Whole numbers for people.

    >>> spans([0, 1, 2, 5, 255])
    '0..2, 5, 255'
    """
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}..{part[-1]}" for part in parts)


@dataclass(frozen=True)
class DataProtocol:
    """One named way to use a data set. Entries of different ids are never ranked together.

    Attributes:
        id: ``pascal_voc``, or with a variant ``pascal_voc/void-ignored``.
        class_names: index = label.
        labels: from what a mask holds to labels.
        about_labels: what is special about the labels, in words; may be empty.
        resize: how pictures come to the size that the model sees.
        window: how models are applied to large pictures; None for the whole picture at once.
        images: split to the number of images it has when it is complete, where that is known.
        class_weights: published weights of `mce_bal`; None to count them on the training split.
        palette: class colours for pictures; index = label.
        stored: height and width of every stored picture in pixels, where all have one; another size is a reduced copy.
        turned: pictures are turned as their EXIF orientation says (as viewers and labelling tools do).
        bits: of the numbers in pictures of 16 bits; None for 16, and pictures that would be almost black are refused.
    """

    id: str
    class_names: tuple[str, ...]
    labels: LabelMap
    about_labels: str = ""
    resize: Resize = field(default_factory=Whole)
    window: Window | None = None
    images: Mapping[str, int] = field(default_factory=dict)
    class_weights: tuple[float, ...] | None = None
    palette: tuple[Colour, ...] = ()
    stored: tuple[int, int] | None = None
    turned: bool = False
    bits: int | None = None

    @property
    def preprocessing(self) -> str:
        """In words, for people and entries."""
        bits = f"{self.bits} bits in 16" if self.bits else ""
        return "; ".join(str(part) for part in (self.resize, bits, self.about_labels, self.window) if part)


def voc_colours(number: int) -> tuple[Colour, ...]:
    """The colours of the Pascal VOC development kit: the bits of the label, spread over the three channels.

    >>> voc_colours(3)
    ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    """
    found = []
    for label in range(number):
        channels = [0, 0, 0]
        for place in range(8):
            for channel in range(3):
                channels[channel] |= (label >> (3 * place + channel) & 1) << (7 - place)
        found.append((channels[0], channels[1], channels[2]))
    return tuple(found)


@lru_cache(maxsize=1)
def _published() -> Any:
    return json.loads((files("segbench.data") / "files" / "published.json").read_text("utf-8"))


def published(dataset_id: str) -> Mapping[str, Any]:
    """Class names, class weights and colours of a data set, as published (``files/published.json``)."""
    found: Mapping[str, Any] = _published()[dataset_id]
    return found
