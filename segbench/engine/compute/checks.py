"""What the engine verifies instead of trusting: the model's output, and the attack's images."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from segbench.attacks.evaluator import NO_VIEW
from segbench.attacks.memory import is_out_of_memory
from segbench.attacks.modules import WRITES, check_logits, naming_writes
from segbench.data import SegmentationDataset
from segbench.engine.compute.output_scale import output_scale
from segbench.entries import flag
from segbench.errors import ModelError, RunError

BUDGET_TOLERANCE = 1e-6
REPEATS = 4  # passes with the same random numbers


class Probe(NamedTuple):
    """What one batch tells about a model: flags, and some logits and gradients that identify it."""

    flags: list[dict[str, Any]]
    sample: list[float]


def probe(model: nn.Module, images: Tensor, num_classes: int, *, was_training: bool) -> Probe:
    """Runs one batch twice, and one input gradient, before the first attack.

    Args:
        model: in eval mode, on the device of ``images``.
        images: (N,3,H,W) in [0,1].
        num_classes: K of the data set.
        was_training: some module had to be put in eval mode.

    Raises:
        ModelError: the output is not finite logits (N,K,H,W), has no gradient with respect to the images, or depends on
            the other images of the batch; or the model writes into the images.
    """
    with _seeded(images.device):
        first, second = _forward(model, images), _forward(model, images)
    check_logits(first, images, num_classes)
    if first.shape[1] != num_classes:
        raise ModelError(
            f"The model has {first.shape[1]} classes, the data set {num_classes}. "
            "Choose the data set that it was trained on."
        )
    if not bool(torch.isfinite(first).all()):
        raise ModelError(
            "The model's logits have NaN or infinite values on clean images. Check weights and normalisation."
        )
    with _seeded(images.device):
        gradient = _gradient(model, images)
    determinism = _determinism(first, second)
    _check_independence(model, images, is_random=determinism["level"] == "warning")
    mode = flag(
        "eval_mode",
        float(was_training),
        "note" if was_training else "ok",
        "1 if a module was in training mode; it was put in eval mode.",
    )
    return Probe([determinism, output_scale(first), mode], _sample(first) + _sample(gradient))


def first_images(data: SegmentationDataset, device: torch.device) -> Tensor:
    """What models are probed on: the first two images, if they are of one size; else the first."""
    first = [data[row].image for row in range(min(2, len(data)))]
    return torch.stack([image for image in first if image.shape == first[0].shape]).to(device)


def works_in(model: nn.Module, images: Tensor, memory_format: torch.memory_format) -> bool:
    """Whether logits and gradient can be computed on images in this memory format, and are those of contiguous ones.

    ``model`` has been probed on these images; attacks give it `segbench.attacks.evaluator.fastest_format`.
    """
    with _seeded(images.device):
        expected, again = _forward(model, images), _forward(model, images)
    with _seeded(images.device), torch.enable_grad():
        x = images.detach().clone(memory_format=memory_format).requires_grad_()
        try:
            logits = model(x)
            torch.autograd.grad(logits.sum(), x)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False
    is_random = _difference(again, expected) > _tolerance(expected)  # random numbers depend on the format, too
    return is_random or _difference(logits.detach(), expected) <= _tolerance(expected)


def check_autocast(model: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    """Refuses a model whose gradient cannot be computed in lower precision; it has been probed in float32."""
    try:
        with _seeded(images.device):
            _gradient(model, images, dtype)
    except ModelError as error:
        raise ModelError(f"The model fails with gradients in {dtype}: {error} Or use --precision fp32.") from error


def _sample(values: Tensor) -> list[float]:
    """64 values, spread evenly; what is not finite counts as 0."""
    places = torch.linspace(0, values.numel() - 1, 64, dtype=torch.float64).long()
    chosen = values.double().flatten()[places.to(values.device)].nan_to_num(0.0, 0.0, 0.0)
    return [float(value) for value in chosen]


def _forward(model: nn.Module, images: Tensor) -> Any:
    given = images.clone()
    try:
        with torch.no_grad():
            logits = model(given)
    except ModelError:
        raise
    except Exception as error:  # a user's code may raise anything
        if is_out_of_memory(error):
            raise
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        mend = "It must map images (N,3,H,W) of any number and size to logits (N,K,H,W)."
        if "Guard failed" in str(error):
            mend = (
                "It was exported for one shape. Export it for all: torch.export.export(model.eval(), (images,), "
                "dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)) with Dim of torch.export."
            )
        elif NO_VIEW in str(error):
            mend = "Replace .view() by .reshape()."
        elif dtypes - {torch.float32}:
            mend = "Its weights are not float32, as images and protocol are: call .float() on it."
        raise ModelError(
            f"The model fails on a batch {tuple(images.shape)} of images in [0,1]: {type(error).__name__}: {error}. "
            f"{mend}"
        ) from error
    if not torch.equal(given, images):
        raise ModelError(WRITES)
    return logits.clone() if isinstance(logits, Tensor) else logits  # it may be a buffer that the model uses again


def _check_independence(model: nn.Module, images: Tensor, *, is_random: bool) -> None:
    """Refuses a model whose logits of one image depend on another one: no score of it would mean anything."""
    difference, allowed = (_random_batch_dependence if is_random else batch_dependence)(model, images)
    if difference > allowed:
        raise ModelError(
            f"The model mixes the images of a batch: the logits of an image change by {_share(difference)} "
            "when another one is beside it. Call eval() (before torch.export), and take out what spans the batch."
        )


def batch_dependence(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Largest change of logits when two images are in one batch, relative to the largest logit; and what is allowed.

    The second image is the first one mirrored, bright and of half the contrast: other pixels, another mean and another
    deviation, whatever the images of a data set are. Rounding depends on the size of the batch, more so in half
    precision.
    """
    pair = torch.cat([images[:1], 1 - images[:1].flip(-1) / 2])

    def logits(batch: Tensor) -> Tensor:
        with _seeded(images.device):  # two passes of a random model may have agreed by chance
            found: Tensor = _forward(model, batch)
        return found

    alone = torch.cat([logits(image) for image in torch.split(pair, 1)])
    largest = max(_difference(logits(pair), alone), _difference(logits(pair.flip(0)), alone.flip(0)))
    return largest, _tolerance(alone)


def _share(difference: float) -> str:
    return f"{difference:.2g} of the largest" if difference < 100 else "far more than the largest"


def _random_batch_dependence(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """`batch_dependence` of a model that draws random numbers: the same ones, beside one image and beside another.

    0 if no seed governs them. Few outcomes could agree by chance, so each is drawn several times.
    """
    first, logits = images[:1], list[Tensor]()
    for other in [first.flip(-1)] * REPEATS + [1 - first / 2] * REPEATS:
        with _seeded(images.device):
            logits.append(_forward(model, torch.cat([first, other]))[:1])
    allowed, one, another = _tolerance(logits[0]), logits[0], logits[REPEATS]
    repeats = zip(logits, [one] * REPEATS + [another] * REPEATS, strict=True)
    governed = all(_difference(found, expected) <= allowed for found, expected in repeats)
    return _difference(another, one) if governed else 0.0, allowed


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest of what is expected; infinite if other values are finite."""
    finite = torch.isfinite(expected)
    if found.shape != expected.shape or not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    scale = float(expected[finite].double().abs().max())
    return float((found[finite].double() - expected[finite].double()).abs().max()) / max(scale, 1e-30)


def _tolerance(logits: Tensor) -> float:
    return max(1e-3, 8 * torch.finfo(logits.dtype).eps)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, so that a model that draws some can be known again."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _gradient(model: nn.Module, images: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    """The input gradient; as in attacks, only the forward pass is in lower precision."""
    with torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        try:
            with naming_writes():
                with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
                    logits = model(x)
                (gradient,) = torch.autograd.grad(logits.sum(), x)
        except ModelError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            mend = "Take out .detach(), .data, numpy, torch.no_grad() and quantisation."
            if "modified by an inplace operation" in str(error):
                mend = "Replace the operation that changes a tensor in place: inplace=True, add_(), x[...] = y."
            raise ModelError(
                f"The model's logits have no gradient with respect to the images: {error}. "
                f"SEA is a gradient attack and would say nothing about this model. {mend}"
            ) from error
    if not torch.equal(x.detach(), images):
        raise ModelError(WRITES)
    return gradient


def _determinism(first: Tensor, second: Tensor) -> dict[str, Any]:
    difference = float((first.double() - second.double()).abs().max())
    scale = float(first.double().abs().max())
    level = "ok" if difference == 0 else "note" if difference <= 1e-5 * scale else "warning"
    return flag(
        "deterministic", difference, level, "Largest difference between the logits of two passes over the same images."
    )


def verify_images(adversarial: Tensor, images: Tensor, eps: float | Tensor) -> None:
    """Refuses images that leave the budget (one, or (N,)) or [0,1], or are not finite: a fault of the attack."""
    if not bool(torch.isfinite(adversarial).all()):
        raise RunError(
            "The attack returned images with NaN or infinite values. Nothing was counted; please report this."
        )
    largest = (adversarial.double() - images.double()).abs().flatten(1).amax(dim=1)
    excess = float((largest - eps).max())
    if excess > BUDGET_TOLERANCE or float(adversarial.min()) < 0 or float(adversarial.max()) > 1:
        raise RunError(
            f"The attack left the threat model (ε exceeded by {max(excess, 0):.2g}, "
            f"values {float(adversarial.min())}..{float(adversarial.max())}). Nothing was counted; please report this."
        )
