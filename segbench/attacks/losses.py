"""Per-pixel losses of the attacks; all are maximised.

Every loss maps logits (N,K,H,W) and labels (N,H,W) to a map (N,H,W) that is 0 on ignored pixels. Sources: Croce,
Singh, Hein, ECCV 2024, section 3 (``ce, mce, mce_bal, js``) and Figure 1 (``js_target``); Gu et al., ECCV 2022
(``segpgd``); Agnihotri et al., ICML 2024 (``cospgd``); Matyasko et al. 2026 (``tsallis``). Formulas: SEA.md, section 2.

All of them are functions of the cross-entropy of a pixel, CE = -log p_y with p = softmax(u), and of constants. So
the gradient with respect to the logits is known: dL/du_t = dL/dCE (p_t - δ_ty) (`segbench.attacks.terms`). An attack
pays for one ``log_softmax`` per iteration and takes the gradient, the tracked loss and the accuracy from it, without
a graph through the loss. A new loss is two functions, its value and its slope dL/dCE, and one line in `LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from segbench.attacks.terms import ClassWeights, Labels, Logits, PixelTerms, pixel_terms, prepare_targets
from segbench.errors import UnknownNameError, UsageError, unknown_name

PixelMap = Float[Tensor, "n h w"]


class Time(NamedTuple):
    """Where an attack is, which some losses depend on.

    Attributes:
        step: gradient step t = 1..iterations, for all images or one each, (N,1,1) float64.
        iterations: number of steps T of the stage, likewise.
    """

    step: int | Tensor
    iterations: int | Tensor


class Loss(NamedTuple):
    """A loss by its ``value`` (N,H,W) and by its ``slope`` dL/dCE (N,H,W), which is read on valid pixels only."""

    value: Callable[[PixelTerms, Time], Tensor]
    slope: Callable[[PixelTerms, Time], Tensor]


def _ce(terms: PixelTerms, _: Time) -> Tensor:
    return terms.ce


def _ce_slope(terms: PixelTerms, _: Time) -> Tensor:
    return torch.ones_like(terms.ce)


def _mce(terms: PixelTerms, _: Time) -> Tensor:
    return terms.ce * terms.correct


def _mce_slope(terms: PixelTerms, _: Time) -> Tensor:
    return terms.correct.to(terms.ce.dtype)


def _mce_bal(terms: PixelTerms, _: Time) -> Tensor:
    return _pixel_weights(terms) * terms.ce * terms.correct


def _mce_bal_slope(terms: PixelTerms, _: Time) -> Tensor:
    return _pixel_weights(terms) * terms.correct


def _pixel_weights(terms: PixelTerms) -> Tensor:
    if terms.targets.weights is None:
        raise UsageError(
            "The loss 'mce_bal' needs class_weights, a tensor (K,): pass class_weights=dataset.class_weights()."
        )
    return terms.targets.weights.to(terms.ce)


def _js(terms: PixelTerms, _: Time) -> Tensor:
    # JS(p, e_y) = log 2 + 1/2 [p log p - (1 + p) log(1 + p)] with p = p_y and log p = -ce: finite at any logit gap.
    p = torch.exp(-terms.ce)
    return (math.log(2.0) - 0.5 * (p * terms.ce + (1 + p) * torch.log1p(p))) * terms.targets.valid


def _js_slope(terms: PixelTerms, _: Time) -> Tensor:
    # dJS/dCE = 1/2 p [log(1 + p) - log p]; the sum is log 2 at least, so log(1 + p) needs no log1p, which is slow.
    p = torch.exp(-terms.ce)
    return (p + 1).log_().add_(terms.ce).mul_(p).mul_(0.5)


def _segpgd(terms: PixelTerms, time: Time) -> Tensor:
    return _segpgd_slope(terms, time) * terms.ce


def _segpgd_slope(terms: PixelTerms, time: Time) -> Tensor:
    share = torch.as_tensor((time.step - 1) / (2 * time.iterations), dtype=torch.float64)
    right, wrong = (part.to(terms.ce) for part in (1 - share, share))
    return torch.where(terms.correct, right, wrong)


def _cospgd(terms: PixelTerms, time: Time) -> Tensor:
    return _cospgd_slope(terms, time) * terms.ce


def _cospgd_slope(terms: PixelTerms, _: Time) -> Tensor:
    with torch.no_grad():
        probs = terms.log_probs.exp()
        cosine: Tensor = torch.exp(-terms.ce) / probs.norm(dim=1)
    return cosine


def _tsallis(terms: PixelTerms, time: Time) -> Tensor:
    return _tsallis_at(terms, _tsallis_q(time))


def _tsallis_slope(terms: PixelTerms, time: Time) -> Tensor:
    # d/dCE (1 - p^(1-q)) / (1-q) = p^(1-q), with p = exp(-ce)
    power = 1 - torch.as_tensor(_tsallis_q(time), dtype=torch.float64)
    return torch.exp(-power.to(terms.ce) * terms.ce)


def _tsallis_q(time: Time) -> float | Tensor:
    intervals = torch.as_tensor(time.iterations - 1, dtype=torch.float64).clamp(min=1)
    return -2.0 + 3.0 * (time.step - 1) / intervals


def _tsallis_at(terms: PixelTerms, q: float | Tensor) -> Tensor:
    power = 1 - torch.as_tensor(q, dtype=torch.float64)
    is_ce = (power == 0).to(terms.ce.device)
    power = torch.where(power == 0, 1.0, power).to(terms.ce)
    return torch.where(is_ce, terms.ce, -torch.expm1(-power * terms.ce) / power)


def _js_target(terms: PixelTerms, time: Time) -> Tensor:
    return -_js(terms, time)


def _js_target_slope(terms: PixelTerms, time: Time) -> Tensor:
    return -_js_slope(terms, time)


LOSSES: Mapping[str, Loss] = {
    "ce": Loss(_ce, _ce_slope),
    "mce": Loss(_mce, _mce_slope),
    "mce_bal": Loss(_mce_bal, _mce_bal_slope),
    "js": Loss(_js, _js_slope),
    "segpgd": Loss(_segpgd, _segpgd_slope),
    "cospgd": Loss(_cospgd, _cospgd_slope),
    "tsallis": Loss(_tsallis, _tsallis_slope),
    "js_target": Loss(_js_target, _js_target_slope),
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


_FIRST = Time(step=1, iterations=1)


def _terms(logits: Logits, labels: Labels, ignore_index: int) -> PixelTerms:
    return pixel_terms(logits, prepare_targets(labels, ignore_index=ignore_index))


def ce(logits: Logits, labels: Labels, *, ignore_index: int = 255) -> PixelMap:
    """Cross-entropy -log p_y.

    >>> round(ce(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)).item(), 6)
    0.693147
    """
    return _ce(_terms(logits, labels, ignore_index), _FIRST)


def mce(logits: Logits, labels: Labels, *, ignore_index: int = 255) -> PixelMap:
    """Masked cross-entropy: cross-entropy on the pixels that are still correct."""
    return _mce(_terms(logits, labels, ignore_index), _FIRST)


def mce_bal(logits: Logits, labels: Labels, *, class_weights: ClassWeights, ignore_index: int = 255) -> PixelMap:
    """Masked cross-entropy times the weight of the label's class; ``class_weights`` is (K,), proportional to 1/N_c."""
    targets = prepare_targets(labels, ignore_index=ignore_index, class_weights=class_weights)
    return _mce_bal(pixel_terms(logits, targets), _FIRST)


def js(logits: Logits, labels: Labels, *, ignore_index: int = 255) -> PixelMap:
    """Jensen-Shannon divergence between softmax(logits) and the one-hot label, in nats, in [0, log 2]."""
    return _js(_terms(logits, labels, ignore_index), _FIRST)


def segpgd(logits: Logits, labels: Labels, *, step: int, iterations: int, ignore_index: int = 255) -> PixelMap:
    """(1-λ) CE on correct pixels, λ CE on wrong ones, λ = (step-1)/(2 iterations), step = 1..iterations."""
    return _segpgd(_terms(logits, labels, ignore_index), Time(step, iterations))


def cospgd(logits: Logits, labels: Labels, *, ignore_index: int = 255) -> PixelMap:
    """CE weighted by the cosine between softmax(logits) and the one-hot label; no gradient through the weight."""
    return _cospgd(_terms(logits, labels, ignore_index), _FIRST)


def tsallis(logits: Logits, labels: Labels, *, q: float, ignore_index: int = 255) -> PixelMap:
    """Tsallis cross-entropy (1 - p_y^(1-q)) / (1-q); q = 1 is CE."""
    return _tsallis_at(_terms(logits, labels, ignore_index), q)


def js_target(logits: Logits, targets: Labels, *, ignore_index: int = 255) -> PixelMap:
    """Negative Jensen-Shannon divergence to the target class: maximised, it draws each pixel there."""
    return _js_target(_terms(logits, targets, ignore_index), _FIRST)
