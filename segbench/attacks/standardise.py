"""Logits standardised in each pixel, so that a loss does not depend on a scale that changes no prediction.

The losses of SEA are functions of softmax(u), which depends on the scale of the logits u; argmax u does not. A model
whose logits are divided by 100 is as robust as before, and looks more robust. Here a loss sees

    v = m sqrt(K - 1) / K * (u - mean u) / std u

instead, mean and standard deviation over the K classes of a pixel. Nothing changes if the logits of a pixel are
multiplied by a positive number and shifted, even if both depend on the image, because the division is differentiated
as well. The largest entry of v exceeds the second largest by at most m, and by exactly m where one class stands out
from K - 1 equal ones.

With two classes the standardised logits of a pixel are always +m/2 and -m/2, without a gradient: there the standard
deviation is that of all pixels of an image, and one factor of an image changes nothing.

A ratio of logit differences is also what the DLR loss is (Croce & Hein, ICML 2020, section 4).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Standardised(NamedTuple):
    """Which images of a batch are attacked through standardised logits; a constant of an attack.

    Attributes:
        largest_margin: m of each image of the batch, (N,1,1,1) float64.
        rows: the places of those images in the batch; the logits of the others stay as they are.
    """

    largest_margin: Tensor
    rows: tuple[int, ...]

    def take(self, rows: slice, missing: int = 0) -> Standardised:
        """Those among some images, and among so many more that fill up a pass."""
        places = range(len(self.largest_margin))[rows]
        chosen = [place for place, row in enumerate(places) if row in self.rows]
        if len(chosen) == len(places):
            chosen += range(len(places), len(places) + missing)
        margins = torch.cat([self.largest_margin[rows], self.largest_margin.new_ones(missing, 1, 1, 1)])
        return Standardised(margins, tuple(chosen))

    def of_all(self, rows: list[int]) -> Standardised:
        """That of a batch of these images alone."""
        return Standardised(self.largest_margin[rows], tuple(range(len(rows))))


class Seen(NamedTuple):
    """What a loss sees of a batch's logits.

    Attributes:
        logits: standardised where they are to be, (N,K,H,W).
        factor: by which the centred logits of the standardised images were multiplied; 0 where all are equal, and no
            loss has a direction.
    """

    logits: Tensor
    factor: Tensor


def standardise(logits: Tensor, which: Standardised, out: Tensor | None = None, spare: Tensor | None = None) -> Seen:
    """What the loss sees, its logits written to ``out`` if given; ``spare``, of the same shape, is overwritten.

    No square overflows, whatever the scale of the logits is: centred logits are first divided by their largest one.
    """
    rows = list(which.rows)
    if len(rows) < len(logits):
        seen = logits.clone() if out is None else out.copy_(logits)
        seen[rows], factor = standardise(logits[rows], which.of_all(rows))
        return Seen(seen, factor)
    centred = torch.sub(logits, logits.mean(dim=1, keepdim=True), out=out)
    dims = _dims(logits)
    largest = centred.amax(dim=dims, keepdim=True)
    inverse = torch.where(largest > torch.finfo(logits.dtype).tiny, 1 / largest, 0)
    square = torch.mul(centred, inverse, out=spare).square_()  # torch's norm and std over classes take 50 times as long
    deviation = square.sum(dim=dims, keepdim=True).div_(_count(logits, dims)).sqrt_()
    factor = torch.where(deviation > 0, _scale(logits, which) / deviation * inverse, 0)
    return Seen(torch.mul(centred, factor, out=out), factor)


def gradient_through(gradient: Tensor, seen: Seen, which: Standardised, spare: Tensor | None = None) -> Tensor:
    """The gradient with respect to the logits, from that with respect to what the loss sees; in place.

    Args:
        gradient: with respect to ``seen.logits``; its sum over classes is 0, as of every loss of softmax.
        seen: as `standardise` gives it.
        which: as there.
        spare: of the shape of ``gradient``; it is overwritten.
    """
    rows = list(which.rows)
    if len(rows) < len(gradient):
        own = Seen(seen.logits[rows], seen.factor)
        gradient[rows] = gradient_through(gradient[rows], own, which.of_all(rows))
        return gradient
    # With v = f d and f = s / σ(d), of centred logits d: dL/du = f (g - v <g, v> / <v, v>), as a step along v changes
    # nothing, and <v, v> = s^2 times the numbers that σ is taken of.
    dims = _dims(gradient)
    along = torch.mul(gradient, seen.logits, out=spare).sum(dim=dims, keepdim=True)
    along.div_(_scale(gradient, which) ** 2 * _count(gradient, dims))
    return gradient.addcmul_(seen.logits, along, value=-1).mul_(seen.factor)


def _dims(logits: Tensor) -> tuple[int, ...]:
    """Over what the deviation is taken."""
    return (1,) if logits.shape[1] > 2 else (1, 2, 3)


def _count(logits: Tensor, dims: tuple[int, ...]) -> int:
    return math.prod(logits.shape[dim] for dim in dims)


def _scale(logits: Tensor, which: Standardised) -> Tensor:
    """The standard deviation of what the loss sees, (N,1,1,1)."""
    classes = logits.shape[1]
    return which.largest_margin.to(logits) * (math.sqrt(max(classes - 1, 0)) / classes)
