"""The random start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from segbench.errors import UsageError


def random_start(images: Float[Tensor, "n c h w"], *, eps: float, seeds: Sequence[int]) -> Float[Tensor, "n c h w"]:
    """Uniform in the l_inf ball around each image, clipped to [0,1].

    Each image's draw depends on its own seed alone: not on the batch, the device or the dtype (drawn in float32 on
    the CPU).

    Args:
        images: (N,3,H,W) in [0,1].
        eps: radius on the scale of the images; for red-ε the radius of the first stage, 2ε.
        seeds: one integer per image, 0 <= seed < 2^63.

    Raises:
        UsageError: the number of seeds is not N.
    """
    if len(seeds) != len(images):
        raise UsageError(f"random_start needs one seed per image: {len(images)} images, {len(seeds)} seeds.")
    start = images.clone()
    for image, seed in zip(start, seeds, strict=True):
        generator = torch.Generator().manual_seed(int(seed))
        noise = torch.rand(tuple(image.shape), generator=generator).mul_(2).sub_(1)
        image.add_(noise.to(image) * eps).clamp_(0, 1)
    return start
