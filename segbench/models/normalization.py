"""Mean and standard deviation by which networks normalise images in [0,1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Normalization = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel

IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NONE: Normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
NORMALIZATIONS: Mapping[str, Normalization] = {
    "imagenet": IMAGENET,
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": NONE,
}
