"""What all attacks share: the result, the ball, and checks of their arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segbench.attacks.losses import get_loss
from segbench.attacks.modules import check_module
from segbench.errors import UsageError


class AttackResult(NamedTuple):
    """The outcome of an attack, per image.

    Attributes:
        adversarial: the visited point with the lowest pixel accuracy, the latest of equals, (N,3,H,W); of an attack by
            loss the one with the highest cross-entropy.
        accuracy: its share of correct valid pixels, (N,) float64; 0 for an image without valid pixels. Of a targeted
            attack the share of valid pixels that are not predicted as their target.
        predictions: the model's argmax there, (N,H,W) int64.
        tracked_loss: best plain cross-entropy seen in the last stage, summed over valid pixels / (H*W), (N,); of a
            targeted attack the negative one to the target.
        forwards: forward passes spent, (N,) int64.
        backwards: backward passes spent, (N,) int64.
        zero_gradients: gradients that were zero everywhere although pixels were still correct, (N,) int64.
        nonfinite_gradients: gradients with a NaN or infinity, (N,) int64; such components do not move.
    """

    adversarial: Tensor
    accuracy: Tensor
    predictions: Tensor
    tracked_loss: Tensor
    forwards: Tensor
    backwards: Tensor
    zero_gradients: Tensor
    nonfinite_gradients: Tensor


COUNTERS = AttackResult._fields[AttackResult._fields.index("forwards") :]  # what is summed over restarts, and stored


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Takes the parameters' gradients away for the time of an attack; ModelError if it is no model (`check_module`)."""
    check_module(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def outside_inference_mode(tensor: Any) -> Any:
    """A tensor (or None) through which gradients can be recorded, also if it was made in `torch.inference_mode`."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def image_sum(values: Tensor) -> Tensor:
    """(N,H,W) to (N,): rows first, so that rounding does not depend on how many images are in the batch."""
    return values.sum(dim=-1).sum(dim=-1)


def ball(images: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest points within ``eps``, one for all or (N,1,1,1), of ``images`` and within [0,1]."""
    return (images - eps).clamp_(0, 1), (images + eps).clamp_(0, 1)


def project(x: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
    """Projection on the l_inf ball of radius ``eps``, one for all or (N,1,1,1), around ``images`` and then on [0,1]."""
    return torch.clamp(x, *ball(images, eps))


def check_arguments(
    images: Tensor, labels: Tensor, *, eps: float, loss: str, iterations: int, start: Tensor | None
) -> None:
    """Refuses arguments that are out of range (see `segbench.attacks.apgd`)."""
    if images.ndim != 4 or not images.is_floating_point():
        raise UsageError(f"images must be a float tensor (N,C,H,W), not {images.dtype} {tuple(images.shape)}.")
    if labels.shape != (images.shape[0], *images.shape[2:]):
        raise UsageError(f"labels must be (N,H,W) = {(images.shape[0], *images.shape[2:])}, not {tuple(labels.shape)}.")
    if not 0 < eps <= 1:
        raise UsageError(f"eps must be in (0, 1], on the scale of the images (8/255 = 0.0314), not {eps}.")
    if iterations < 1:
        raise UsageError(f"iterations must be at least 1, not {iterations}.")
    if start is not None and start.shape != images.shape:
        raise UsageError(f"start must have the shape of images, {tuple(images.shape)}, not {tuple(start.shape)}.")
    get_loss(loss)
