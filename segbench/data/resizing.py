"""How a picture comes to the size that the model sees: rules for images (bilinear) and labels (nearest neighbour)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from segbench.errors import DataError

MAX_PIXELS = 89_000_000  # of one picture, before and after resizing (267 MB): more is an attack or a mistake

Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Whole:
    """As stored."""

    def image(self, picture: Image.Image) -> Array:
        """A picture to (H,W,3)."""
        return np.asarray(picture)

    def labels(self, labels: Array) -> Array:
        """(H,W) to itself."""
        return labels

    def __str__(self) -> str:
        return "as stored"


@dataclass(frozen=True)
class Resized:
    """Every picture to ``height`` x ``width`` pixels, by Pillow."""

    height: int
    width: int

    def image(self, picture: Image.Image) -> Array:
        """A picture to (height,width,3), bilinear."""
        return _bilinear(picture, self.width, self.height)

    def labels(self, labels: Array) -> Array:
        """(H,W) to (height,width), nearest neighbour."""
        return _nearest(Image.fromarray(labels), self.width, self.height)

    def __str__(self) -> str:
        return f"resized to {self.height}x{self.width}"


@dataclass(frozen=True)
class ShortSide:
    """Short side to ``size``, the long side becomes ``int(long * size / short)``, by Pillow."""

    size: int

    def image(self, picture: Image.Image) -> Array:
        """A picture to (h,w,3), bilinear."""
        return _bilinear(picture, *self.target(picture))

    def labels(self, labels: Array) -> Array:
        """(H,W), nearest neighbour."""
        stored = Image.fromarray(labels)
        return _nearest(stored, *self.target(stored))

    def target(self, picture: Image.Image) -> tuple[int, int]:
        """Width and height of the resized picture."""
        short = min(picture.size)
        wide, high = (self.size if side == short else int(side * self.size / short) for side in picture.size)
        return wide, high

    def __str__(self) -> str:
        return f"short side {self.size}"


@dataclass(frozen=True)
class ShortSideCrop:
    """Short side to ``size``, then the square in the middle, which begins at ``round((side - size) / 2)``.

    The preprocessing behind the published numbers (Croce, Singh, Hein, ECCV 2024; SEA.md, section 6).

    >>> rule = ShortSideCrop(20)
    >>> rule.image(Image.new("RGB", (40, 30))).shape, rule.labels(np.zeros((30, 40), np.uint8)).shape
    ((20, 20, 3), (20, 20))
    """

    size: int

    def image(self, picture: Image.Image) -> Array:
        """A picture to (size,size,3), bilinear."""
        wide, high = ShortSide(self.size).target(picture)
        left = round((wide - self.size) / 2)
        return self._middle(_bilinear(picture, wide, high, columns=(left, left + self.size)))

    def labels(self, labels: Array) -> Array:
        """(H,W) to (size,size), nearest neighbour."""
        return self._middle(ShortSide(self.size).labels(labels))

    def _middle(self, array: Array) -> Array:
        top, left = (round((side - self.size) / 2) for side in array.shape[:2])
        return array[top : top + self.size, left : left + self.size]

    def __str__(self) -> str:
        return f"short side {self.size}, centre crop {self.size}x{self.size}"


Resize = Whole | Resized | ShortSide | ShortSideCrop


def _bilinear(picture: Image.Image, width: int, height: int, columns: tuple[int, int] | None = None) -> Array:
    """Resized by Pillow in two steps, rounded to 8 bits between: first the width, then the height.

    Pillow does the same inside, up to version 12 in this order; version 13 begins with the height of some tall ones,
    which gives other bytes than those behind the published numbers. Columns outside of ``columns`` are cut off between
    the steps, which changes none of the others and saves their share of the second step.
    """
    _refuse_huge(width, max(height, picture.height))
    left, right = columns or (0, width)
    rows = picture.resize((width, picture.height), Image.Resampling.BILINEAR).crop((left, 0, right, picture.height))
    return np.asarray(rows.resize((right - left, height), Image.Resampling.BILINEAR))


def _nearest(labels: Image.Image, width: int, height: int) -> Array:
    _refuse_huge(width, height)
    return np.asarray(labels.resize((width, height), Image.Resampling.NEAREST))


def _refuse_huge(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"resized it would have {width}x{height} pixels, more than {MAX_PIXELS} in all. Crop the picture."
        )
