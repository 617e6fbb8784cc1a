"""What every model under evaluation must give back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from segbench.errors import ModelError


def check_logits(logits: Any, images: Tensor, num_classes: int | str = "K") -> Tensor:
    """The logits, if they are a tensor (N,K,H,W) at the size of the images (N,3,H,W).

    Raises:
        ModelError: they are not; says what they are and what is needed.
    """
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"The model returns {type(logits).__name__}, not a tensor of logits. "
            "Wrap it so that forward returns the logits (N,K,H,W)."
        )
    n, _, height, width = images.shape
    if logits.ndim != 4 or logits.shape[0] != n or tuple(logits.shape[2:]) != (height, width):
        raise ModelError(
            f"The model returns {tuple(logits.shape)} for images {tuple(images.shape)}; "
            f"needed are logits ({n}, {num_classes}, {height}, {width}) at image size."
        )
    return logits
