"""Augmentation of the paper: scale, crop, flip, blur (Croce, Singh, Hein, ECCV 2024, Table 4).

Pixels that padding adds are ignored (255), never called background.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from segbench.data.protocols import IGNORE_INDEX
from segbench.data.resizing import ShortSide
from segbench.training.recipe import Recipe

BLUR_SIGMA = (0.1, 1.1)  # of the Gaussian in pixels, uniformly; at 1.1 it is the common kernel of 5x5

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[Any]


def augment(pixels: Pixels, labels: Labels, recipe: Recipe, rng: np.random.Generator) -> tuple[Pixels, Labels]:
    """One random view of an image and its labels.

    Args:
        pixels: (H,W,3) uint8.
        labels: (H,W), 0..K-1 or 255.
        recipe: its `base`, `scale`, `crop`, `flip` and `blur`.
        rng: what is drawn is a function of its state alone; an image takes the same draws whatever the recipe.

    Returns:
        Pixels and labels of ``crop`` x ``crop``, or of the given size if the recipe has no crop.
    """
    scale, down, right, flip, blur, sigma = rng.uniform(size=6).tolist()  # Pillow wants Python's numbers
    if recipe.base:
        low, high = recipe.scale
        rule = ShortSide(max(1, round(recipe.base * (low + scale * (high - low)))))
        pixels, labels = rule.image(Image.fromarray(pixels)), rule.labels(labels.astype(np.uint8))
    if recipe.crop:
        pixels, labels = cut(pixels, labels, recipe.crop, down, right)
    if flip < recipe.flip:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    if blur < recipe.blur:
        low, high = BLUR_SIGMA
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(low + sigma * (high - low))))
    return pixels, labels


def cut(pixels: Pixels, labels: Labels, side: int, down: float, right: float) -> tuple[Pixels, Labels]:
    """A square window; ``down`` and ``right`` in [0,1) say where. Smaller images are padded in black, and ignored."""
    height, width = labels.shape
    if min(height, width) < side:
        below, beside = max(0, side - height), max(0, side - width)
        pixels = np.pad(pixels, ((0, below), (0, beside), (0, 0)))
        labels = np.pad(labels, ((0, below), (0, beside)), constant_values=IGNORE_INDEX)
        height, width = labels.shape
    top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
    return pixels[top : top + side, left : left + side], labels[top : top + side, left : left + side]
