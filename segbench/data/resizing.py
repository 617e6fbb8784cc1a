"""How a picture comes to the size that the model sees: rules for images (bilinear) and labels (nearest neighbour)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from segbench.errors import DataError

MAX_PIXELS = 89_000_000  # of one picture, before and after resizing (267 MB): more is an attack or a mistake

Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Whole:
    """As stored."""

    def image(self, pixels: Array) -> Array:
        """(H,W,3) to itself."""
        return pixels

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

    def image(self, pixels: Array) -> Array:
        """(H,W,3) to (height,width,3), bilinear."""
        return _resize(pixels, (self.width, self.height), Image.Resampling.BILINEAR)

    def labels(self, labels: Array) -> Array:
        """(H,W) to (height,width), nearest neighbour."""
        return _resize(labels, (self.width, self.height), Image.Resampling.NEAREST)

    def __str__(self) -> str:
        return f"resized to {self.height}x{self.width}"


@dataclass(frozen=True)
class ShortSide:
    """Short side to ``size``, the long side becomes ``int(long * size / short)``, by Pillow."""

    size: int

    def image(self, pixels: Array) -> Array:
        """(H,W,3), bilinear."""
        return _resize(pixels, self._target(pixels), Image.Resampling.BILINEAR)

    def labels(self, labels: Array) -> Array:
        """(H,W), nearest neighbour."""
        return _resize(labels, self._target(labels), Image.Resampling.NEAREST)

    def _target(self, array: npt.NDArray[Any]) -> tuple[int, int]:
        height, width = array.shape[:2]
        short = min(height, width)
        wide, high = (self.size if side == short else int(side * self.size / short) for side in (width, height))
        return wide, high

    def __str__(self) -> str:
        return f"short side {self.size}"


@dataclass(frozen=True)
class ShortSideCrop:
    """Short side to ``size``, then the square in the middle, which begins at ``round((side - size) / 2)``.

    The preprocessing behind the published numbers (Croce, Singh, Hein, ECCV 2024; SEA.md, section 6).

    >>> rule = ShortSideCrop(20)
    >>> rule.image(np.zeros((30, 40, 3), np.uint8)).shape, rule.labels(np.zeros((30, 40), np.uint8)).shape
    ((20, 20, 3), (20, 20))
    """

    size: int

    def image(self, pixels: Array) -> Array:
        """(H,W,3) to (size,size,3), bilinear."""
        return self._middle(ShortSide(self.size).image(pixels))

    def labels(self, labels: Array) -> Array:
        """(H,W) to (size,size), nearest neighbour."""
        return self._middle(ShortSide(self.size).labels(labels))

    def _middle(self, array: Array) -> Array:
        top, left = (round((side - self.size) / 2) for side in array.shape[:2])
        return array[top : top + self.size, left : left + self.size]

    def __str__(self) -> str:
        return f"short side {self.size}, centre crop {self.size}x{self.size}"


Resize = Whole | Resized | ShortSide | ShortSideCrop


def _resize(array: Array, target: tuple[int, int], how: Image.Resampling) -> Array:
    if target[0] * target[1] > MAX_PIXELS:
        raise DataError(
            f"resized it would have {target[0]}x{target[1]} pixels, more than {MAX_PIXELS} in all. Crop the picture."
        )
    return np.asarray(Image.fromarray(array).resize(target, how))
