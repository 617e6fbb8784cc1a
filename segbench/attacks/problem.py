"""What all attacks share: the result, and the evaluation of a batch of points."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segbench.attacks.losses import TARGETED, Context, PixelTerms, get_loss, pixel_terms
from segbench.attacks.memory import is_out_of_memory
from segbench.attacks.modules import check_logits, check_module, naming_writes
from segbench.errors import UsageError

NO_VIEW = "view size is not compatible"  # torch, of .view() of a tensor that is not contiguous
CONTIGUOUS_ONLY = (
    "The model works on contiguous images only. It is attacked with those; in channels_last it would be faster: "
    "replace .view() by .reshape()."
)
MaskedLoss = tuple[str, Tensor | None]  # a loss, and the images that it is for, (N,1,1) bool; None for all


class AttackResult(NamedTuple):
    """The outcome of an attack, per image.

    Attributes:
        adversarial: the visited point with the lowest pixel accuracy, the latest of equals, (N,3,H,W); of an attack by
            loss the one with the highest cross-entropy.
        accuracy: its share of correct valid pixels, (N,) float64; 0 for an image without valid pixels. Of a targeted
            attack the share of valid pixels that are not predicted as their target.
        predictions: the model's argmax there, (N,H,W) int64.
        tracked_loss: best plain cross-entropy seen in the last stage, summed over valid pixels / (H*W), (N,); of a
            targeted attack the negative one to the target.
        forwards: forward passes spent, (N,) int64.
        backwards: backward passes spent, (N,) int64.
        zero_gradients: gradients that were zero everywhere although pixels were still correct, (N,) int64.
        nonfinite_gradients: gradients with a NaN or infinity, (N,) int64; such components do not move.
    """

    adversarial: Tensor
    accuracy: Tensor
    predictions: Tensor
    tracked_loss: Tensor
    forwards: Tensor
    backwards: Tensor
    zero_gradients: Tensor
    nonfinite_gradients: Tensor


COUNTERS = AttackResult._fields[AttackResult._fields.index("forwards") :]  # what is summed over restarts, and stored


class Evaluation(NamedTuple):
    """One evaluation of a batch of points: tracked loss (N,), correct pixels (N,), predictions, gradient or None."""

    tracked: Tensor
    correct: Tensor
    predictions: Tensor
    gradient: Tensor | None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Takes the parameters' gradients away for the time of an attack; ModelError if it is no model (`check_module`)."""
    check_module(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def outside_inference_mode(tensor: Any) -> Any:
    """A tensor (or None) through which gradients can be recorded, also if it was made in `torch.inference_mode`."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def image_sum(values: Tensor) -> Tensor:
    """(N,H,W) to (N,): rows first, so that rounding does not depend on how many images are in the batch."""
    return values.sum(dim=-1).sum(dim=-1)


def project(x: Tensor, images: Tensor, eps: float | Tensor) -> Tensor:
    """Projection on the l_inf ball of radius ``eps``, one for all or (N,1,1,1), around ``images`` and then on [0,1]."""
    return torch.minimum(torch.maximum(x, images - eps), images + eps).clamp_(0, 1)


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

    def __call__(
        self,
        x: Tensor,
        labels: Tensor,
        losses: Sequence[MaskedLoss],
        step: int | Tensor,
        iterations: int | Tensor,
        *,
        backward: bool,
    ) -> Evaluation:
        """Evaluates the points ``x`` (N,3,H,W): ``step`` and ``iterations`` as in `segbench.attacks.losses.Context`."""
        size = self.size or len(x)
        parts = []
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            masks = [(name, mask if mask is None else mask[rows]) for name, mask in losses]
            times = [value[rows] if isinstance(value, Tensor) else value for value in (step, iterations)]
            parts.append(self._part(x[rows], labels[rows], masks, *times, backward=backward))
        if len(parts) == 1:
            return parts[0]
        gradients = [part.gradient for part in parts if part.gradient is not None]
        return Evaluation(
            torch.cat([part.tracked for part in parts]),
            torch.cat([part.correct for part in parts]),
            torch.cat([part.predictions for part in parts]),
            torch.cat(gradients) if gradients else None,
        )

    def _part(
        self,
        x: Tensor,
        labels: Tensor,
        losses: Sequence[MaskedLoss],
        step: int | Tensor,
        iterations: int | Tensor,
        *,
        backward: bool,
    ) -> Evaluation:
        n = len(x)
        missing = self.size - n if self.fill and self.size else 0
        if missing > 0:
            x, labels = _filled(x, missing, 0), _filled(labels, missing, self.ignore_index)
            losses = [(name, mask if mask is None else _filled(mask, missing, False)) for name, mask in losses]
            step, iterations = (
                _filled(value, missing, 1) if isinstance(value, Tensor) else value for value in (step, iterations)
            )
        try:
            found = self._pass(x, labels, losses, step, iterations, backward=backward)
        except RuntimeError as error:
            if not self._needs_contiguous(error, x.device):
                raise
            found = self._pass(x, labels, losses, step, iterations, backward=backward)
        return Evaluation(*(None if values is None else values[:n] for values in found))  # type: ignore[arg-type]

    def _pass(self, *arguments: Any, backward: bool) -> Evaluation:
        with torch.set_grad_enabled(backward), self.setting(), naming_writes():
            return self._called(*arguments)

    def _needs_contiguous(self, error: RuntimeError, device: torch.device) -> bool:
        """Whether a model failed because of channels_last; from then on it gets contiguous images."""
        in_use = self.memory_format or fastest_format(device)
        if in_use is not torch.channels_last or NO_VIEW not in str(error):
            return False
        logging.getLogger("segbench").warning(CONTIGUOUS_ONLY)
        self.memory_format = torch.contiguous_format
        return True

    def _called(self, *arguments: Any) -> Evaluation:
        """A pass, compiled if that works: what was compiled may fail in the forward or in the backward pass."""
        if self.compiled is None:
            return self._one_pass(self._objective, *arguments)
        try:
            return self._one_pass(self.compiled, *arguments)
        except Exception as error:  # a compiler may raise anything; eager computes the same
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}"
        found = self._one_pass(self._objective, *arguments)  # raises what is not the compiler's fault
        logging.getLogger("segbench").warning("torch.compile fails with this model (%s). Going on without.", reason)
        self.compiled = None
        return found

    def _one_pass(
        self, objective: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]], x: Tensor, *rest: Any
    ) -> Evaluation:
        """Values and, where gradients are enabled, the input gradient."""
        backward = torch.is_grad_enabled()
        memory_format = self.memory_format or fastest_format(x.device)
        # A copy: a model that writes into its images changes none of ours.
        x = x.detach().clone(memory_format=memory_format).requires_grad_(backward)
        loss, tracked, correct, predictions = objective(x, *rest)
        return Evaluation(tracked, correct, predictions, torch.autograd.grad(loss, x)[0] if backward else None)

    def _objective(
        self, x: Tensor, labels: Tensor, losses: Sequence[MaskedLoss], step: int | Tensor, iterations: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The attacked loss of all images together; tracked loss, correct pixels and predictions of each."""
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            logits = check_logits(self.model(x), x)
        terms = pixel_terms(logits, labels, self.ignore_index)
        context = Context(step, iterations, self.class_weights)
        objective = terms.ce.new_zeros(())
        for name, mask in losses:
            values = get_loss(name)(terms, context)
            objective = objective + (values if mask is None else torch.where(mask, values, 0)).sum()
        loss, surviving = surviving_pixels(terms, losses)
        tracked = image_sum(loss) / labels[0].numel()
        return objective, tracked, surviving.flatten(1).sum(dim=1), terms.predictions


def surviving_pixels(terms: PixelTerms, losses: Sequence[MaskedLoss]) -> tuple[Tensor, Tensor]:
    """Cross-entropy, which the attack raises, and the pixels that still survive it, (N,H,W) each.

    In a targeted attack a pixel survives until it is predicted as its target, and the negative is raised.
    """
    loss, surviving = terms.ce.detach(), terms.correct
    for mask in (mask for name, mask in losses if name in TARGETED):
        missed = terms.valid & ~terms.correct
        loss = -loss if mask is None else torch.where(mask, -loss, loss)
        surviving = missed if mask is None else torch.where(mask, missed, surviving)
    return loss, surviving


def _filled(values: Tensor, missing: int, value: float) -> Tensor:
    return torch.cat([values, values.new_full((missing, *values.shape[1:]), value)])


def zero_nonfinite(gradient: Tensor) -> Tensor:
    """The gradient with non-finite components set to 0: they do not move."""
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def check_arguments(
    images: Tensor, labels: Tensor, *, eps: float, loss: str, iterations: int, start: Tensor | None
) -> None:
    """Refuses arguments that are out of range (see `segbench.attacks.apgd`)."""
    if images.ndim != 4 or not images.is_floating_point():
        raise UsageError(f"images must be a float tensor (N,C,H,W), not {images.dtype} {tuple(images.shape)}.")
    if labels.shape != (images.shape[0], *images.shape[2:]):
        raise UsageError(f"labels must be (N,H,W) = {(images.shape[0], *images.shape[2:])}, not {tuple(labels.shape)}.")
    if not 0 < eps <= 1:
        raise UsageError(f"eps must be in (0, 1], on the scale of the images (8/255 = 0.0314), not {eps}.")
    if iterations < 1:
        raise UsageError(f"iterations must be at least 1, not {iterations}.")
    if start is not None and start.shape != images.shape:
        raise UsageError(f"start must have the shape of images, {tuple(images.shape)}, not {tuple(start.shape)}.")
    get_loss(loss)
