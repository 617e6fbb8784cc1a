"""What the losses of one iteration share: one ``log_softmax``, and the gradient with respect to the logits from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from segbench.attacks.standardise import Seen, Standardised, factored, gradient_through, standardise

Logits = Float[Tensor, "n k h w"]
Labels = Int[Tensor, "n h w"]
ClassWeights = Float[Tensor, " k"]


class Targets(NamedTuple):
    """What the losses need of the labels; the same in each iteration.

    Attributes:
        labels: as given, (N,H,W) int64.
        valid: pixels whose label is not ``ignore_index``, (N,H,W) bool.
        classes: the labels, 0 where they are ignored, (N,1,H,W) int64.
        weights: weight of each pixel's class, (N,H,W); None without class weights.
        standardised: images whose logits are standardised before any loss; None for none.
    """

    labels: Tensor
    valid: Tensor
    classes: Tensor
    weights: Tensor | None
    standardised: Standardised | None = None


class PixelTerms(NamedTuple):
    """What the losses of one iteration share.

    Attributes:
        seen: standardised logits, where the targets say so; else None.
        log_probs: log_softmax of what the losses see: of those, or of the logits, (N,K,H,W).
        ce: cross-entropy, (N,H,W); 0 on ignored pixels.
        correct: valid pixels whose largest logit is the label's, (N,H,W) bool; a constant for the gradient.
        predictions: argmax of the logits, the first of equals, (N,H,W) int64.
        targets: of the labels.
    """

    seen: Seen | None
    log_probs: Tensor
    ce: Tensor
    correct: Tensor
    predictions: Tensor
    targets: Targets


class Scratch:
    """Tensors that each pass of an attack overwrites; what lies in them is valid until the next one.

    On a CPU, newly allocated memory can cost more than the arithmetic: ``log_softmax`` of 40 MB takes twice as long.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def get(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of the shape of another one, and of its dtype unless given; zeros when new."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != like.shape or kept.dtype != (dtype or like.dtype):
            kept = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
            self._kept[name] = kept
        return kept


def prepare_targets(
    labels: Labels,
    *,
    ignore_index: int = 255,
    class_weights: ClassWeights | None = None,
    standardised: Standardised | None = None,
) -> Targets:
    """What the losses need of the labels."""
    valid = labels != ignore_index
    classes = labels.where(valid, 0)
    weights = None if class_weights is None else class_weights[classes]
    return Targets(labels, valid, classes.unsqueeze(1), weights, standardised)


def pixel_terms(logits: Logits, targets: Targets, scratch: Scratch | None = None) -> PixelTerms:
    """The shared terms; half-precision logits are raised to float32 first."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if not logits.is_contiguous():  # as from a model in channels_last: slow in each of the operations below
        logits = logits.contiguous() if scratch is None else scratch.get("logits", logits).copy_(logits)
    largest, predictions = predict(logits.detach(), scratch)
    seen = None
    if targets.standardised is not None:
        buffers = [None if scratch is None else scratch.get(name, logits) for name in ("seen", "log_probs")]
        seen = standardise(logits, targets.standardised, largest, *buffers)
    visible = logits if seen is None else seen.logits
    if scratch is None:
        log_probs = torch.log_softmax(visible, dim=1)
    else:
        out = scratch.get("log_probs", logits)
        log_probs = torch.log_softmax(visible, dim=1, out=out)
    ce = torch.where(targets.valid, -log_probs.gather(1, targets.classes).squeeze(1), 0)
    correct = (predictions == targets.labels) & targets.valid
    return PixelTerms(seen, log_probs, ce, correct, predictions, targets)


def predict(logits: Logits, scratch: Scratch | None = None) -> tuple[Tensor, Tensor]:
    """The largest logit of each pixel (N,1,H,W), and its class, the first of equals, (N,H,W) int64.

    On a CPU `torch.max` finds indices one pixel after the other. This finds the value first, then the highest rank
    K - k among the classes that have it, both many pixels at once.
    """
    classes = logits.shape[1]
    if logits.device.type != "cpu" or classes > torch.iinfo(torch.uint8).max or torch.compiler.is_compiling():
        found = logits.max(dim=1)
        return found.values.unsqueeze(1), found.indices
    out = None if scratch is None else scratch.get("largest", logits, torch.bool)
    largest = logits.amax(dim=1, keepdim=True)
    is_largest = torch.ge(logits, largest, out=out).view(torch.uint8)
    rank = is_largest.mul_(torch.arange(classes, 0, -1, dtype=torch.uint8).view(1, -1, 1, 1)).amax(dim=1)
    predictions = classes - rank.long()
    if rank.numel() and not bool(rank.amin()):  # a NaN, which nothing is at least as large as
        predictions = torch.where(rank == 0, logits.max(dim=1).indices, predictions)
    return largest, predictions


def logit_gradient(terms: PixelTerms, slope: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Gradient of the summed loss with respect to the logits, slope (p_t - δ_ty), (N,K,H,W); 0 on ignored pixels.

    Standardised logits are differentiated through. With ``scratch``, that of `pixel_terms`, it is written over
    ``terms.log_probs``.
    """
    log_probs, targets = terms.log_probs, terms.targets
    which, seen = targets.standardised, terms.seen
    if which is not None and seen is not None:
        slope = factored(slope, seen, which)
    one_hot = torch.zeros_like(log_probs) if scratch is None else scratch.get("one_hot", log_probs)
    one_hot.scatter_(1, targets.classes, torch.where(targets.valid, -slope, 0).unsqueeze(1))
    # What autograd calls, and bit for bit what it finds: one_hot - exp(log_probs) * sum(one_hot).
    backward = torch.ops.aten._log_softmax_backward_data
    if scratch is None:
        gradient: Tensor = backward(one_hot, log_probs, 1, log_probs.dtype)
    else:
        gradient = backward.out(one_hot, log_probs, 1, log_probs.dtype, out=log_probs)
        one_hot.scatter_(1, targets.classes, 0)  # for other labels
    if which is None or seen is None:
        return gradient
    spare = None if scratch is None else scratch.get("logits", gradient)  # those of the model are not read again
    return gradient_through(gradient, seen, which, spare)
