"""The evaluation of a batch of points: forward pass, loss and input gradient."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segbench.attacks.losses import TARGETED, Time, get_loss
from segbench.attacks.memory import is_out_of_memory
from segbench.attacks.modules import check_logits, naming_writes
from segbench.attacks.problem import image_sum
from segbench.attacks.standardise import Standardised
from segbench.attacks.terms import PixelTerms, Scratch, Targets, logit_gradient, pixel_terms, prepare_targets

NO_VIEW = "view size is not compatible"  # torch, of .view() of a tensor that is not contiguous
CONTIGUOUS_ONLY = (
    "The model works on contiguous images only. It is attacked with those; in channels_last it would be faster: "
    "replace .view() by .reshape()."
)
MaskedLoss = tuple[str, Tensor | None]  # a loss, and the images that it is for, (N,1,1) bool; None for all


class Evaluation(NamedTuple):
    """One evaluation of a batch of points: tracked loss (N,), correct pixels (N,), predictions, gradient or None."""

    tracked: Tensor
    correct: Tensor
    predictions: Tensor
    gradient: Tensor | None


class Part(NamedTuple):
    """Images of one pass, and what stays the same while they are under attack.

    Attributes:
        rows: of the batch.
        missing: black images that fill up the pass.
        targets: of its labels.
        losses: with masks of its images.
        scratch: what each pass overwrites, the same for all parts; None where torch reuses memory by itself.
    """

    rows: slice
    missing: int
    targets: Targets
    losses: Sequence[MaskedLoss]
    scratch: Scratch | None

    def fill(self, values: Any, filling: float) -> Any:
        """The part's rows of the values, filled up; a number stays a number."""
        return _filled(values[self.rows], self.missing, filling) if isinstance(values, Tensor) else values


def fastest_format(device: torch.device) -> torch.memory_format:
    """The memory format in which models are fastest: channels_last on CUDA, else that which the images have."""
    return torch.channels_last if device.type == "cuda" else torch.preserve_format


class Evaluator:
    """Forward, loss and input gradient of a batch of points; no image's result depends on its neighbours.

    Args:
        model: images (N,3,H,W) to logits (N,K,H,W); used in the mode that it is in, with parameters `frozen`.
        class_weights: (K,), needed by ``mce_bal``.
        ignore_index: label of pixels that do not count.
        size: images per pass at most; None for all at once. May be lowered between calls.
        fill: fill up a short pass with black images to exactly ``size``.
        autocast: lower precision of the model's forward pass; the loss stays in float32.
        setting: gives the context of a pass, forward and backward, e.g. with TF32 on.
        compiled: compile model and loss with `torch.compile`; where that fails, a warning, and on without.
        memory_format: of the images that the model gets; None for `fastest_format`. Where the model fails in
            channels_last, a warning, and on with contiguous ones.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        class_weights: Tensor | None = None,
        ignore_index: int = 255,
        size: int | None = None,
        fill: bool = False,
        autocast: torch.dtype | None = None,
        setting: Callable[[], AbstractContextManager[Any]] = nullcontext,
        compiled: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        self.model = model
        self.class_weights = class_weights
        self.ignore_index = ignore_index
        self.size = size
        self.fill = fill
        self.autocast = autocast
        self.setting = setting
        self.memory_format = memory_format
        self.compiled = torch.compile(self._objective, dynamic=False) if compiled else None

    def parts(
        self, labels: Tensor, losses: Sequence[MaskedLoss], standardised: Standardised | None = None
    ) -> list[Part]:
        """The passes in which images with these labels (N,H,W) are evaluated; to be made again if those change."""
        size = self.size or max(1, len(labels))
        scratch = Scratch() if labels.device.type == "cpu" else None
        found = []
        for start in range(0, len(labels), size):
            rows = slice(start, min(start + size, len(labels)))
            missing = size - (rows.stop - start) if self.fill and self.size else 0
            targets = prepare_targets(
                _filled(labels[rows], missing, self.ignore_index),
                ignore_index=self.ignore_index,
                class_weights=self.class_weights,
                standardised=None if standardised is None else standardised.take(rows, missing),
            )
            masks = [(name, mask if mask is None else _filled(mask[rows], missing, False)) for name, mask in losses]
            found.append(Part(rows, missing, targets, masks, scratch))
        return found

    def __call__(
        self, x: Tensor, parts: Sequence[Part], step: int | Tensor, iterations: int | Tensor, *, backward: bool
    ) -> Evaluation:
        """Evaluates the points ``x`` (N,3,H,W) in `parts`; ``step`` and ``iterations`` as in `losses.Time`."""
        found = [self._part(x, part, Time(part.fill(step, 1), part.fill(iterations, 1)), backward) for part in parts]
        if len(found) == 1:
            return found[0]
        gradients = [each.gradient for each in found if each.gradient is not None]
        return Evaluation(
            torch.cat([each.tracked for each in found]),
            torch.cat([each.correct for each in found]),
            torch.cat([each.predictions for each in found]),
            torch.cat(gradients) if gradients else None,
        )

    def _part(self, x: Tensor, part: Part, time: Time, backward: bool) -> Evaluation:
        points = part.fill(x, 0)
        try:
            found = self._pass(points, part, time, backward=backward)
        except RuntimeError as error:
            if not self._needs_contiguous(error, x.device):
                raise
            found = self._pass(points, part, time, backward=backward)
        n = len(points) - part.missing
        return Evaluation(*(None if values is None else values[:n] for values in found))  # type: ignore[arg-type]

    def _pass(self, x: Tensor, part: Part, time: Time, *, backward: bool) -> Evaluation:
        with torch.set_grad_enabled(backward), self.setting(), naming_writes():
            return self._called(x, part, time)

    def _needs_contiguous(self, error: RuntimeError, device: torch.device) -> bool:
        """Whether a model failed because of channels_last; from then on it gets contiguous images."""
        in_use = self.memory_format or fastest_format(device)
        if in_use is not torch.channels_last or NO_VIEW not in str(error):
            return False
        logging.getLogger("segbench").warning(CONTIGUOUS_ONLY)
        self.memory_format = torch.contiguous_format
        return True

    def _called(self, x: Tensor, part: Part, time: Time) -> Evaluation:
        """A pass, compiled if that works: what was compiled may fail in the forward or in the backward pass."""
        if self.compiled is None:
            return self._one_pass(self._objective, x, part, time)
        try:
            return self._one_pass(self.compiled, x, part._replace(scratch=None), time)
        except Exception as error:  # a compiler may raise anything; eager computes the same
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}"
        found = self._one_pass(self._objective, x, part, time)  # raises what is not the compiler's fault
        logging.getLogger("segbench").warning("torch.compile fails with this model (%s). Going on without.", reason)
        self.compiled = None
        return found

    def _one_pass(self, objective: Callable[..., tuple[Any, ...]], x: Tensor, part: Part, time: Time) -> Evaluation:
        """Values and, where gradients are enabled, the input gradient."""
        backward = torch.is_grad_enabled()
        memory_format = self.memory_format or fastest_format(x.device)
        # A copy: a model that writes into its images changes none of ours.
        x = x.detach().clone(memory_format=memory_format).requires_grad_(backward)
        logits, gradient, tracked, correct, predictions = objective(x, part.targets, part.losses, part.scratch, time)
        input_gradient = torch.autograd.grad(_WithGradient.apply(logits, gradient), x)[0] if backward else None
        if input_gradient is not None and _share_memory(input_gradient, gradient):  # of a model that is the identity
            input_gradient = input_gradient.clone()  # the next pass overwrites it
        return Evaluation(tracked, correct, predictions, input_gradient)

    def _objective(
        self, x: Tensor, targets: Targets, losses: Sequence[MaskedLoss], scratch: Scratch | None, time: Time
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """Logits and the gradient of the attacked losses there; tracked loss, correct pixels, predictions."""
        backward = torch.is_grad_enabled()
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            logits = check_logits(self.model(x), x)
        with torch.no_grad():
            terms = pixel_terms(logits, targets, scratch)
            loss, surviving = surviving_pixels(terms, losses)
            tracked, correct = image_sum(loss) / loss[0].numel(), surviving.flatten(1).sum(dim=1)
            gradient = None
            if backward:
                gradient = logit_gradient(terms, mixed_slope(terms, losses, time), scratch).to(logits.dtype)
        return logits, gradient, tracked, correct, terms.predictions


class _WithGradient(torch.autograd.Function):
    """A number whose gradient with respect to the logits is the one given.

    With ``grad_outputs``, `torch.autograd.grad` imports sympy first, and checks shapes symbolically each time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


def mixed_slope(terms: PixelTerms, losses: Sequence[MaskedLoss], time: Time) -> Tensor:
    """The slope of each image's own loss, (N,H,W)."""
    slope = torch.zeros_like(terms.ce)
    for name, mask in losses:
        own = get_loss(name).slope(terms, time)
        slope = own if mask is None else torch.where(mask, own, slope)
    return slope


def surviving_pixels(terms: PixelTerms, losses: Sequence[MaskedLoss]) -> tuple[Tensor, Tensor]:
    """Cross-entropy, which the attack raises, and the pixels that still survive it, (N,H,W) each.

    In a targeted attack a pixel survives until it is predicted as its target, and the negative is raised.
    """
    loss, surviving = terms.ce, terms.correct
    for mask in (mask for name, mask in losses if name in TARGETED):
        missed = terms.targets.valid & ~terms.correct
        loss = -loss if mask is None else torch.where(mask, -loss, loss)
        surviving = missed if mask is None else torch.where(mask, missed, surviving)
    return loss, surviving


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _filled(values: Tensor, missing: int, value: float) -> Tensor:
    """The values, or a longer copy of them."""
    if not missing:
        return values
    return torch.cat([values, values.new_full((missing, *values.shape[1:]), value)])
