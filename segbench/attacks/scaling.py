"""Logits scaled before a loss sees them, so that an attack does not depend on a scale that changes no prediction.

The losses of SEA are functions of softmax(u), which depends on the scale of the logits u; argmax u does not. A model
whose logits are divided by 100 is as robust as before, and looks more robust. Two remedies:

- one factor for a whole model, from the median `margin` of its logits: ``Scaling.factor``;
- the logits of each pixel centred and divided by their standard deviation over the classes, as in a layer
  normalisation: ``Scaling.standardised``. Nothing changes if the logits of a pixel are multiplied by any positive
  number and shifted, even if both depend on the image, because the division is differentiated as well. With two
  classes the standardised logits are always +1 and -1, without a gradient: there the standard deviation is that of
  all pixels of an image.

A ratio of logit differences is also what the DLR loss is (Croce & Hein, ICML 2020, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDED_TO = 3  # decimal digits of a margin's mantissa


class Scaling(NamedTuple):
    """How the logits of a batch are scaled; a constant of an attack.

    Attributes:
        factor: by which logits are multiplied, of standardised ones their standard deviation, (N,1,1,1).
        standardised: the images whose logits are standardised, by their place in the batch.
    """

    factor: Tensor
    standardised: tuple[int, ...] = ()

    def take(self, rows: slice, missing: int = 0) -> Scaling:
        """That of some images, and of so many more that fill up a pass."""
        places = range(len(self.factor))[rows]
        chosen = [place for place, row in enumerate(places) if row in set(self.standardised)]
        if len(chosen) == len(places):
            chosen += range(len(places), len(places) + missing)
        factor = torch.cat([self.factor[rows], self.factor.new_ones(missing, 1, 1, 1)])
        return Scaling(factor, tuple(chosen))


def scale(logits: Tensor, scaling: Scaling, out: Tensor | None = None) -> Tensor:
    """The scaled logits, (N,K,H,W), written to ``out`` if given."""
    factor, rows = scaling.factor.to(logits.dtype), list(scaling.standardised)
    if len(rows) == len(logits):
        centred = torch.sub(logits, logits.mean(dim=1, keepdim=True), out=out)
        return torch.mul(centred, factor * _reciprocal(_deviation(centred)), out=out)
    scaled = torch.mul(logits, factor, out=out)
    if rows:
        scaled[rows] = scale(logits[rows], Scaling(scaling.factor[rows], tuple(range(len(rows)))))
    return scaled


def scaled_gradient(gradient: Tensor, logits: Tensor, scaled: Tensor, scaling: Scaling) -> Tensor:
    """The gradient with respect to the logits, from that with respect to the scaled ones; in place.

    The factor of a model is left out: an attack takes the sign of the gradient of an image.
    """
    rows = list(scaling.standardised)
    if not rows:
        return gradient
    if len(rows) < len(logits):
        every = Scaling(scaling.factor[rows], tuple(range(len(rows))))
        gradient[rows] = scaled_gradient(gradient[rows], logits[rows], scaled[rows], every)
        return gradient
    dims, factor = _dims(logits), scaling.factor.to(logits.dtype)
    count = math.prod(logits.shape[dim] for dim in dims)
    # v = c d / σ(d), of centred logits d: dL/du = c/σ (g - v mean(g v) / c^2); g already sums to 0 over the classes.
    along = (gradient * scaled).sum(dim=dims, keepdim=True).div_(factor.square() * count)
    deviation = _deviation(logits - logits.mean(dim=1, keepdim=True))
    return gradient.addcmul_(scaled, along, value=-1).mul_(factor * _reciprocal(deviation))


def _dims(logits: Tensor) -> tuple[int, ...]:
    """Over what the deviation is taken: with two classes those of one pixel would always be +1 and -1."""
    return (1,) if logits.shape[1] > 2 else (1, 2, 3)


def _deviation(centred: Tensor) -> Tensor:
    dims = _dims(centred)
    count = math.prod(centred.shape[dim] for dim in dims)
    length: Tensor = torch.linalg.vector_norm(centred, dim=dims, keepdim=True)
    return length.div_(math.sqrt(count))


def _reciprocal(deviation: Tensor) -> Tensor:
    """1 / σ; 0 where all logits are equal, and no loss has a direction."""
    return torch.where(deviation > 0, 1 / deviation, 0)


def margin(logits: Tensor) -> Tensor:
    """The largest minus the second largest logit of each pixel, (N,H,W); needs two classes.

    >>> margin(torch.tensor([1.0, 4.0, 2.5]).view(1, 3, 1, 1)).item()
    1.5
    """
    largest = logits.topk(2, dim=1).values
    return largest[:, 0] - largest[:, 1]


def median_margin(margins: Iterable[Tensor]) -> float | None:
    """The median of margins, its mantissa rounded so that another machine finds the same number.

    A power of two is a factor of the result, exactly. None where it says nothing: no or one class, all equal,
    infinite.

    >>> median_margin([torch.tensor([0.5, 1.23456, 7.0])]), median_margin([torch.tensor([0.0])])
    (1.234, None)
    >>> median_margin([1024 * torch.tensor([0.5, 1.23456, 7.0])]) / 1024
    1.234
    """
    found = [values.flatten().double().cpu() for values in margins]
    values = torch.cat(found) if found else torch.zeros(0)
    median = values.median().item() if values.numel() else 0.0
    if not (math.isfinite(median) and median > 0):
        return None
    mantissa, exponent = math.frexp(median)
    return math.ldexp(round(mantissa, ROUNDED_TO), exponent)
