"""Sliding-window inference: a model made for small pictures, applied to large ones in bounded memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segbench.attacks.modules import check_logits
from segbench.data import SegmentationDataset
from segbench.errors import UsageError


class SlidingWindow(nn.Module):
    """Applies a model to overlapping windows and averages the logits where they overlap.

    Windows start at 0, stride, 2 stride, ...; the last one of a row or column ends at the border. A picture that is
    smaller than the window along a side is fed whole along that side. Differentiable with respect to images and
    parameters; gradients are exact. Only one window's activations are held at a time: each window is computed again
    in the backward pass, so a gradient costs one more forward pass.

    Args:
        model: images (N,3,h,w) to logits (N,K,h,w).
        window: height and width in pixels.
        stride: vertical and horizontal step in pixels, not above the window.

    Raises:
        UsageError: a side below 1, or a stride that would leave pixels out.
        ModelError: when called, if the model's output is not logits at the size of the window.

    >>> SlidingWindow(nn.Conv2d(3, 5, 1), window=(4, 4), stride=(3, 3))(torch.zeros(2, 3, 9, 6)).shape
    torch.Size([2, 5, 9, 6])
    """

    def __init__(self, model: nn.Module, window: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.training = getattr(model, "training", False)  # frozen TorchScript has none
        for side, step in zip(window, stride, strict=True):
            if not 1 <= step <= side:
                raise UsageError(
                    f"A window of {window[0]}x{window[1]} pixels with stride {stride[0]}x{stride[1]} is not possible: "
                    "strides must be from 1 up to the side of the window."
                )
        self.model = model
        self.window = window
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,3,H,W) to logits (N,K,H,W)."""
        height, width = images.shape[-2:]
        tops, lefts = (starts(*sides) for sides in zip((height, width), self.window, self.stride, strict=True))
        if len(tops) == len(lefts) == 1:
            whole: Tensor = self.model(images)
            return whole
        total, times = images.new_zeros(0), images.new_zeros(1, 1, height, width)
        for top in tops:
            for left in lefts:
                place = (..., slice(top, top + self.window[0]), slice(left, left + self.window[1]))
                logits = self._logits(images[place])
                if not total.numel():
                    total = images.new_zeros(len(images), logits.shape[1], height, width)
                total = _Add.apply(total, logits.to(total.dtype), place)
                times[place] += 1
        return total / times

    def _logits(self, window: Tensor) -> Tensor:
        needs_gradient = window.requires_grad or any(parameter.requires_grad for parameter in self.model.parameters())
        if torch.is_grad_enabled() and needs_gradient:
            return check_logits(checkpoint(self.model, window, use_reentrant=False), window)
        return check_logits(self.model(window), window)

    def extra_repr(self) -> str:
        """Window and stride, in the module's printed form."""
        return f"window={self.window}, stride={self.stride}"


class _Add(torch.autograd.Function):
    """``total[place] += logits``; its gradient touches the place alone, where autograd would copy the whole picture."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, logits: Tensor, place: Any) -> Tensor:
        total[place] += logits
        ctx.mark_dirty(total)
        ctx.place = place
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        return gradient, gradient[ctx.place], None


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side.

    >>> starts(10, 4, 3), starts(11, 4, 3), starts(3, 4, 3)
    ([0, 3, 6], [0, 3, 6, 7], [0])
    """
    if side <= window:
        return [0]
    last = side - window
    return [*range(0, last, stride), last]


def in_windows(module: nn.Module, data: SegmentationDataset) -> nn.Module:
    """The module as the data set's protocol applies it: in windows, where it declares them."""
    return SlidingWindow(module, data.window.size, data.window.stride) if data.window else module
