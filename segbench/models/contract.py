"""What a model must keep to, under evaluation and to be trained here; and how modules are handled that keep to less."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from segbench.attacks.memory import is_out_of_memory
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


def put_in_eval_mode(module: nn.Module) -> list[nn.Module]:
    """Puts a module in eval mode, and returns its parts that were in training mode.

    Its ``train`` and ``eval`` may be the user's, and return nothing. What `torch.export` made stays in the mode that it
    was exported in.
    """
    training = [part for part in module.modules() if getattr(part, "training", False)]
    try:
        exported = _switch(module)
    except ModelError:
        for part in training:
            part.training = True
        raise
    switchable = [part for part in training if part not in exported]
    left = [part for part in switchable if part.training]
    if left == switchable:  # the user's eval() does nothing
        for part in left:
            part.training = False
    elif left:
        logging.getLogger("segbench").warning(
            "%d parts of the model stay in training mode after eval(), the first is %s.",
            len(left),
            type(left[0]).__name__,
        )
    return switchable


def _switch(module: nn.Module) -> set[nn.Module]:
    """Puts a module in eval mode; returns the parts that cannot be."""
    try:
        module.eval()
    except NotImplementedError:
        if isinstance(module, GraphModule):
            return set(module.modules())
        module.training = False
        return set().union(*map(_switch, module.children()))
    except Exception as error:  # a user's code may raise anything
        raise ModelError(
            f"The model cannot be put in eval mode: {type(error).__name__}: {error}. Correct its train() and eval()."
        ) from error
    return set()


def move(module: nn.Module, device: torch.device) -> None:
    """Moves a module to a device; its ``to`` may be the user's, or a library's that refuses."""
    try:
        module.to(device)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"The model cannot be moved to {device}: {type(error).__name__}: {error}. "
            "Load it whole and in float32, without device_map and quantisation."
        ) from error


def structure(module: nn.Module) -> str:
    """The printed form of a module; where it cannot be printed, the names and classes of its parts."""
    parts = (f"{name}: {type(part).__qualname__}" for name, part in module.named_modules())
    return printed(module) or "\n".join(parts)


def printed(value: Any) -> str:
    """The printed form of anything without addresses, which differ each time; empty where it cannot be printed."""
    with suppress(Exception):  # a user's code may raise anything
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return ""
