"""A black-box attack on segmentation: random square search on the accuracy of each image, without gradients.

Source: Andriushchenko et al., "Square Attack", ECCV 2020, section 3 (l_inf: start of stripes, squares of ±ε whose size
shrinks, a change is kept if it helps). Here the score of an image is its number of right pixels, and between equals the
mean probability of the labels, so that progress is seen before a pixel falls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segbench.attacks.modules import check_logits
from segbench.attacks.problem import COUNTERS, AttackResult, check_arguments, image_sum, project
from segbench.attacks.terms import pixel_terms, prepare_targets
from segbench.errors import UsageError

FIRST_SHARE = 0.8  # of the image's area that the first square covers; the paper's p for l_inf without a target
# Shares of the queries after which the area is halved: the paper's 10, 50, 200, 1000, 2000, 4000, 6000, 8000 of 10000.
HALVED_AT = (0.001, 0.005, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8)


@torch.inference_mode()
def square(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    queries: int,
    seeds: Sequence[int],
    ignore_index: int = 255,
) -> AttackResult:
    """Searches with ``queries`` forward passes of each image, under `torch.inference_mode`.

    Each image's draws depend on its own seed alone. An image without a right pixel changes no more.

    Args:
        model: images (N,3,H,W) in [0,1] to logits (N,K,H,W); used in the mode that it is in.
        images: (N,3,H,W) in [0,1].
        labels: (N,H,W) int64 in 0..K-1 or ``ignore_index``.
        eps: l_inf radius on the scale of the images.
        queries: passes of each image, at least 1; the first one is of the stripes.
        seeds: one integer per image, 0 <= seed < 2^63.
        ignore_index: label of pixels that do not count.

    Raises:
        UsageError: an argument is out of range.
    """
    check_arguments(images, labels, eps=eps, loss="ce", iterations=queries, start=None)
    if len(seeds) != len(images):
        raise UsageError(f"square needs one seed per image: {len(images)} images, {len(seeds)} seeds.")
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    best = _stripes(images, eps, generators)
    found = _look(model, best, labels, ignore_index)
    forwards = torch.ones(len(images), dtype=torch.int64, device=images.device)
    for query in range(1, queries):
        active = found.correct > 0
        if not bool(active.any()):
            break
        tried = _with_squares(best, images, eps, query / queries, generators)
        now = _look(model, tried, labels, ignore_index)
        better = active & (now.score < found.score)
        best = torch.where(better.view(-1, 1, 1, 1), tried, best)
        found = _Found(
            *(
                torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(now, found, strict=True)
            )
        )
        forwards += active
    valid = (labels != ignore_index).flatten(1).sum(dim=1).clamp(min=1)
    none = {name: torch.zeros_like(forwards) for name in COUNTERS} | {"forwards": forwards}
    return AttackResult(best, found.correct.double() / valid, found.predictions, found.loss, **none)


class _Found(NamedTuple):
    """Of each image: what is minimised, right pixels, predictions, and cross-entropy as `AttackResult` has it."""

    score: Tensor
    correct: Tensor
    predictions: Tensor
    loss: Tensor


def _look(model: Callable[[Tensor], Tensor], points: Tensor, labels: Tensor, ignore_index: int) -> _Found:
    targets = prepare_targets(labels, ignore_index=ignore_index)
    terms = pixel_terms(check_logits(model(points.clone()), points), targets)
    correct = terms.correct.flatten(1).sum(dim=1)
    pixels = targets.valid.flatten(1).sum(dim=1).clamp(min=1)
    probability = (image_sum(torch.exp(-terms.ce.double()) * targets.valid) / pixels).nan_to_num(nan=1.0)
    loss = image_sum(terms.ce).double() / labels[0].numel()
    return _Found(correct + 0.999 * probability, correct, terms.predictions, loss)


def _stripes(images: Tensor, eps: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Columns of +ε or -ε in each channel."""
    _, channels, _, width = images.shape
    signs = [2.0 * torch.randint(0, 2, (channels, 1, width), generator=each) - 1 for each in generators]
    return project(images + eps * torch.stack(signs).to(images), images, eps)


def _with_squares(
    best: Tensor, images: Tensor, eps: float, share: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """In each image a random square in which each channel is at +ε or -ε."""
    _, channels, height, width = images.shape
    area = FIRST_SHARE / 2 ** sum(share >= at for at in HALVED_AT)
    side = max(1, min(round((area * height * width) ** 0.5), height, width))
    tried = best.clone()
    for image, original, generator in zip(tried, images, generators, strict=True):
        top = int(torch.randint(0, height - side + 1, (), generator=generator))
        left = int(torch.randint(0, width - side + 1, (), generator=generator))
        signs = 2.0 * torch.randint(0, 2, (channels, 1, 1), generator=generator) - 1
        window = (slice(None), slice(top, top + side), slice(left, left + side))
        image[window] = project(original[window] + eps * signs.to(original), original[window], eps)
    return tried
