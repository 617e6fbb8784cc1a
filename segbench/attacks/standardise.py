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

SMALLEST = 2.0**-100  # below it 1 / std overflows: such logits count as equal
SAFE = 30  # of logits between 2^-30 and 2^30 no sum of squares overflows, and no digit of it is lost in float32


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
        factor: by which the centred logits of the standardised images were multiplied, (n,1,H,W) or (n,1,1,1); 0
            where all are equal but for rounding, and no loss has a direction.
    """

    logits: Tensor
    factor: Tensor


def standardise(
    logits: Tensor,
    which: Standardised,
    largest: Tensor | None = None,
    out: Tensor | None = None,
    spare: Tensor | None = None,
) -> Seen:
    """What the loss sees.

    Args:
        logits: (N,K,H,W).
        which: images are standardised, and with what m.
        largest: logit of each pixel, (N,1,H,W), if it is known.
        out: gets what the loss sees, if given.
        spare: of the shape of ``logits``; it is overwritten.
    """
    largest = logits.amax(dim=1, keepdim=True) if largest is None else largest
    rows = list(which.rows)
    if len(rows) < len(logits):
        seen = logits.clone() if out is None else out.copy_(logits)
        seen[rows], factor = standardise(logits[rows], which.of_all(rows), largest[rows])
        return Seen(seen, factor)
    mean = logits.mean(dim=1, keepdim=True)
    centred = torch.sub(logits, mean, out=out)
    dims = _dims(logits)
    highest = (largest - mean).amax(dim=dims, keepdim=True)  # of the centred logits, to the last bit
    rounding = logits.shape[1] * torch.finfo(logits.dtype).eps * largest.abs().amax(dim=dims, keepdim=True)
    equal = highest <= rounding.clamp_(min=SMALLEST)
    inverse = _inverse_power(torch.where(equal, 1, highest))
    scaled = centred if inverse is None else torch.mul(centred, inverse, out=spare)
    square = torch.mul(scaled, scaled, out=spare)  # torch's norm and std over classes take 50 times as long
    deviation = square.sum(dim=dims, keepdim=True).div_(_count(logits, dims)).sqrt_()
    factor = _scale(logits, which) / deviation
    if inverse is not None:
        factor *= inverse
    factor = torch.where(equal, 0, factor)
    return Seen(torch.mul(centred, factor, out=out), factor)


def gradient_through(gradient: Tensor, seen: Seen, which: Standardised, spare: Tensor | None = None) -> Tensor:
    """The gradient with respect to the logits, from that with respect to what the loss sees; in place.

    Args:
        gradient: with respect to ``seen.logits``, times ``seen.factor`` where standardised; its sum over classes is 0,
            as of every loss of softmax.
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
    return gradient.addcmul_(seen.logits, along, value=-1)


def factored(slope: Tensor, seen: Seen, which: Standardised) -> Tensor:
    """The slope of each pixel (N,H,W), times the factor of its logits where they are standardised."""
    rows = list(which.rows)
    if len(rows) == len(slope):
        return slope * seen.factor.squeeze(1)
    slope = slope.clone()
    slope[rows] *= seen.factor.squeeze(1)
    return slope


def _inverse_power(highest: Tensor) -> Tensor | None:
    """Powers of two that bring these numbers to 1/2..1, so that no square overflows or vanishes.

    None where the squares are safe as they are. As powers of two change no digit, the results are the same. Checked
    on CPUs only: the check would stall a GPU.
    """
    if highest.device.type == "cpu" and not torch.compiler.is_compiling() and highest.numel():
        low, high = map(float, highest.aminmax())
        if low > 2**-SAFE and high < 2**SAFE:
            return None
    exponent = torch.frexp(highest).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(highest), -exponent)


def _dims(logits: Tensor) -> tuple[int, ...]:
    """Over what the deviation is taken."""
    return (1,) if logits.shape[1] > 2 else (1, 2, 3)


def _count(logits: Tensor, dims: tuple[int, ...]) -> int:
    return math.prod(logits.shape[dim] for dim in dims)


def _scale(logits: Tensor, which: Standardised) -> Tensor:
    """The standard deviation of what the loss sees, (N,1,1,1)."""
    classes = logits.shape[1]
    return which.largest_margin.to(logits) * (math.sqrt(max(classes - 1, 0)) / classes)
