"""Per-pixel losses of the attacks; all are maximised.

Every loss maps logits (N,K,H,W) and labels (N,H,W) to a map (N,H,W) that is 0 on ignored pixels. Sources: Croce,
Singh, Hein, ECCV 2024, section 3 (``ce, mce, mce_bal, js``) and Figure 1 (``js_target``); Gu et al., ECCV 2022
(``segpgd``); Agnihotri et al., ICML 2024 (``cospgd``); Matyasko et al. 2026 (``tsallis``). Formulas: SEA.md, section 2.

All of them are functions of one `PixelTerms`, so an attack pays for one ``log_softmax`` per iteration and takes the
attacked loss, the tracked loss and the accuracy from it. A new loss is one function and one line in `LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from segbench.errors import UnknownNameError, UsageError, unknown_name

Logits = Float[Tensor, "n k h w"]
Labels = Int[Tensor, "n h w"]
PixelMap = Float[Tensor, "n h w"]
ClassWeights = Float[Tensor, " k"]


class PixelTerms(NamedTuple):
    """What the losses of one iteration share.

    Attributes:
        log_probs: log_softmax of the logits, (N,K,H,W).
        ce: cross-entropy, (N,H,W); 0 on ignored pixels.
        correct: valid pixels whose largest logit is the label's, (N,H,W) bool; a constant for the gradient.
        valid: pixels whose label is not ``ignore_index``, (N,H,W) bool.
        predictions: argmax of the logits, the first of equals, (N,H,W) int64.
        labels: the labels as given, (N,H,W) int64.
    """

    log_probs: Tensor
    ce: Tensor
    correct: Tensor
    valid: Tensor
    predictions: Tensor
    labels: Tensor


class Context(NamedTuple):
    """What a loss may depend on besides the pixel terms.

    Attributes:
        step: gradient step t = 1..iterations, for all images or one each, (N,1,1) float64.
        iterations: number of steps T of the stage, likewise.
        class_weights: (K,) or None.
    """

    step: int | Tensor
    iterations: int | Tensor
    class_weights: Tensor | None


Loss = Callable[[PixelTerms, Context], Tensor]


def pixel_terms(logits: Logits, labels: Labels, ignore_index: int = 255) -> PixelTerms:
    """The shared terms; half-precision logits are raised to float32 first."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    log_probs = F.log_softmax(logits, dim=1)
    ce = F.nll_loss(log_probs, labels, reduction="none", ignore_index=ignore_index)
    predictions = logits.detach().max(dim=1).indices
    valid = labels != ignore_index
    return PixelTerms(log_probs, ce, (predictions == labels) & valid, valid, predictions, labels)


def _ce(terms: PixelTerms, _: Context) -> Tensor:
    return terms.ce


def _mce(terms: PixelTerms, _: Context) -> Tensor:
    return terms.ce * terms.correct


def _mce_bal(terms: PixelTerms, context: Context) -> Tensor:
    if context.class_weights is None:
        raise UsageError(
            "The loss 'mce_bal' needs class_weights, a tensor (K,): pass class_weights=dataset.class_weights()."
        )
    weights = context.class_weights.to(terms.ce)
    return weights[terms.labels.where(terms.valid, 0)] * _mce(terms, context)


def _js(terms: PixelTerms, _: Context) -> Tensor:
    # JS(p, e_y) = log 2 + 1/2 [p log p - (1 + p) log(1 + p)] with p = p_y and log p = -ce: finite at any logit gap.
    p = torch.exp(-terms.ce)
    return (math.log(2.0) - 0.5 * (p * terms.ce + (1 + p) * torch.log1p(p))) * terms.valid


def _segpgd(terms: PixelTerms, context: Context) -> Tensor:
    share = torch.as_tensor((context.step - 1) / (2 * context.iterations), dtype=torch.float64)
    right, wrong = (part.to(terms.ce) for part in (1 - share, share))
    return torch.where(terms.correct, right * terms.ce, wrong * terms.ce)


def _cospgd(terms: PixelTerms, _: Context) -> Tensor:
    with torch.no_grad():
        probs = terms.log_probs.exp()
        cosine: Tensor = torch.exp(-terms.ce) / probs.norm(dim=1)
    return cosine * terms.ce


def _tsallis(terms: PixelTerms, context: Context) -> Tensor:
    intervals = torch.as_tensor(context.iterations - 1, dtype=torch.float64).clamp(min=1)
    return _tsallis_at(terms, -2.0 + 3.0 * (context.step - 1) / intervals)


def _tsallis_at(terms: PixelTerms, q: float | Tensor) -> Tensor:
    power = 1 - torch.as_tensor(q, dtype=torch.float64)
    is_ce = (power == 0).to(terms.ce.device)
    power = torch.where(power == 0, 1.0, power).to(terms.ce)
    return torch.where(is_ce, terms.ce, -torch.expm1(-power * terms.ce) / power)


def _js_target(terms: PixelTerms, context: Context) -> Tensor:
    return -_js(terms, context)


LOSSES: Mapping[str, Loss] = {
    "ce": _ce,
    "mce": _mce,
    "mce_bal": _mce_bal,
    "js": _js,
    "segpgd": _segpgd,
    "cospgd": _cospgd,
    "tsallis": _tsallis,
    "js_target": _js_target,
}
TARGETED = frozenset(
    {"js_target"}
)  # the labels are what the attack wants to see, so that a pixel falls when it is right


def get_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        UsageError: unknown name.
    """
    if name not in LOSSES:
        raise UnknownNameError(unknown_name("loss", name, LOSSES))
    return LOSSES[name]


_FIRST = Context(step=1, iterations=1, class_weights=None)


def ce(logits: Logits, labels: Labels, *, ignore_index: int = 255) -> PixelMap:
    """Cross-entropy -log p_y.

    >>> round(ce(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)).item(), 6)
    0.693147
    """
    return _ce(pixel_terms(logits, labels, ignore_index), _FIRST)


def mce(logits: Logits, labels: Labels, *, ignore_index: int = 255) -> PixelMap:
    """Masked cross-entropy: cross-entropy on the pixels that are still correct."""
    return _mce(pixel_terms(logits, labels, ignore_index), _FIRST)


def mce_bal(logits: Logits, labels: Labels, *, class_weights: ClassWeights, ignore_index: int = 255) -> PixelMap:
    """Masked cross-entropy times the weight of the label's class; ``class_weights`` is (K,), proportional to 1/N_c."""
    return _mce_bal(pixel_terms(logits, labels, ignore_index), Context(1, 1, class_weights))


def js(logits: Logits, labels: Labels, *, ignore_index: int = 255) -> PixelMap:
    """Jensen-Shannon divergence between softmax(logits) and the one-hot label, in nats, in [0, log 2]."""
    return _js(pixel_terms(logits, labels, ignore_index), _FIRST)


def segpgd(logits: Logits, labels: Labels, *, step: int, iterations: int, ignore_index: int = 255) -> PixelMap:
    """(1-λ) CE on correct pixels, λ CE on wrong ones, λ = (step-1)/(2 iterations), step = 1..iterations."""
    return _segpgd(pixel_terms(logits, labels, ignore_index), Context(step, iterations, None))


def cospgd(logits: Logits, labels: Labels, *, ignore_index: int = 255) -> PixelMap:
    """CE weighted by the cosine between softmax(logits) and the one-hot label; no gradient through the weight."""
    return _cospgd(pixel_terms(logits, labels, ignore_index), _FIRST)


def tsallis(logits: Logits, labels: Labels, *, q: float, ignore_index: int = 255) -> PixelMap:
    """Tsallis cross-entropy (1 - p_y^(1-q)) / (1-q); q = 1 is CE."""
    return _tsallis_at(pixel_terms(logits, labels, ignore_index), q)


def js_target(logits: Logits, targets: Labels, *, ignore_index: int = 255) -> PixelMap:
    """Negative Jensen-Shannon divergence to the target class: maximised, it draws each pixel there."""
    return _js_target(pixel_terms(logits, targets, ignore_index), _FIRST)
