"""PGD inside training (Croce, Singh, Hein, ECCV 2024, Table 4; SEA.md, section 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbench.attacks.problem import frozen, project
from segbench.data.protocols import IGNORE_INDEX
from segbench.training.recipe import Recipe


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, so that statistics are frozen, and parameters without gradients; training mode afterwards."""
    model.eval()
    try:
        with frozen(model):
            yield
    finally:
        model.train()


def training_attack(
    model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, logits: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The last iterate of PGD on cross-entropy from δ = 0, for every image.

    Args:
        model: put into eval mode meanwhile.
        images: (N,3,H,W) in [0,1].
        labels: (N,H,W), 0..K-1 or 255 for pixels that are ignored.
        recipe: its ``eps_255``, ``attack_steps`` and ``step_size_255``.
        logits: how the model is called, if not as it is (compiled, under autocast).
    """
    eps, step_size = recipe.eps_255 / 255, recipe.step_size_255 / 255
    x = images
    with attack_mode(model):
        for _ in range(recipe.attack_steps):
            x = x.detach().requires_grad_()
            # A sum: an image's own gradient, whatever else is in the batch. Its sign is that of the mean.
            loss = F.cross_entropy((logits or model)(x), labels, ignore_index=IGNORE_INDEX, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            x = project(x.detach() + step_size * gradient.sign(), images, eps)
    return x.detach()
