"""What a model must keep to: under evaluation, and to be trained here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from segbench.errors import ModelError


@runtime_checkable
class Backbone(Protocol):
    """What `segbench.training` needs of ``model.backbone``, so that a new architecture edits nothing there.

    A model with an auxiliary head has it as ``auxiliary_head``, and ``forward_with_auxiliary(images)`` gives the
    logits of both heads at the size of the images.

    Attributes:
        pooled_width: features of `pooled`.
        dense_only: parts that only dense prediction uses; a classifier on the backbone freezes them.
    """

    pooled_width: int
    dense_only: Sequence[nn.Module]

    def pooled(self, images: Tensor) -> Tensor:
        """Images (N,3,H,W) in [0,1] to one feature vector each, (N,pooled_width)."""


class PyramidBackbone(nn.Module):
    """Abstract: a backbone whose forward gives feature maps (N,widths[i],h,w), the largest first."""

    widths: tuple[int, ...]
    dense_only: Sequence[nn.Module] = ()

    @property
    def pooled_width(self) -> int:
        return self.widths[-1]

    def pooled(self, images: Tensor) -> Tensor:
        """The mean of the last feature map, (N,pooled_width)."""
        pooled: Tensor = self(images)[-1].mean(dim=(2, 3))
        return pooled


def backbone_of(model: nn.Module) -> Any:
    """The part of a model that a classifier's weights can start: a module that is a `Backbone`, else ModelError."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone):
        raise ModelError(f"{type(model).__name__} has no backbone that segbench knows.")
    return backbone


def check_logits(logits: Any, images: Tensor, num_classes: int | str = "K") -> Tensor:
    """The logits, if they are a tensor (N,K,H,W) at the size of the images (N,3,H,W), else ModelError."""
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
