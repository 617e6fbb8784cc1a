"""The preprocessing behind the published numbers (Croce, Singh, Hein, ECCV 2024; SEA.md, section 6)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from segbench.data.dataset import Labels, Pixels


def short_side_crop(pixels: Pixels, labels: Labels, size: int) -> tuple[Pixels, Labels]:
    """Short side to ``size``, then the square in the middle.

    The image is resized bilinearly, the labels by nearest neighbour, both by Pillow; the long side becomes
    ``int(long * size / short)``; the square begins at ``round((side - size) / 2)``.

    Args:
        pixels: (H,W,3) uint8.
        labels: (H,W) uint8.
        size: side of the square in pixels.

    Returns:
        (size,size,3) and (size,size).

    >>> image, label = short_side_crop(np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), np.uint8), 20)
    >>> image.shape, label.shape
    ((20, 20, 3), (20, 20))
    """
    height, width = labels.shape
    short = min(height, width)
    wide, high = (size if side == short else int(side * size / short) for side in (width, height))
    image = np.asarray(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BILINEAR))
    label = np.asarray(Image.fromarray(labels).resize((wide, high), Image.Resampling.NEAREST))
    left, top = (round((side - size) / 2) for side in (wide, high))
    window = (slice(top, top + size), slice(left, left + size))
    return image[window], label[window]
