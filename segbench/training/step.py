"""The gradient of an optimiser step: attack, loss of both heads, and its division among processes and parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from segbench.attacks.memory import is_out_of_memory
from segbench.data.protocols import IGNORE_INDEX
from segbench.errors import RunError
from segbench.training.attack import training_attack
from segbench.training.data import Batch
from segbench.training.distributed import Processes
from segbench.training.recipe import Recipe


class TrainingLoss(nn.Module):
    """Cross-entropy of both heads, summed over valid pixels: one module, so that it can be distributed and compiled."""

    def __init__(self, model: nn.Module, auxiliary_weight: float) -> None:
        super().__init__()
        self.model = model
        self.auxiliary_weight = auxiliary_weight

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images (N,3,H,W) in [0,1] and labels (N,H,W) to a scalar."""
        if not self.auxiliary_weight:
            return _summed(self.model(images), labels)
        model: Any = self.model  # `loop.build_model` has seen to it
        logits, auxiliary = model.forward_with_auxiliary(images)
        return _summed(logits, labels) + self.auxiliary_weight * _summed(auxiliary, labels)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


def seed_step(recipe: Recipe, step: int, rank: int) -> None:
    """Random numbers of a step (stochastic depth, dropout): a function of (seed, step, rank), so none need be saved."""
    torch.manual_seed((recipe.seed * 1_000_003 + step) * 1_009 + rank)


class StepGradient:
    """The gradient of one optimiser step, over all processes and all parts of a batch."""

    def __init__(self, model: nn.Module, recipe: Recipe, processes: Processes) -> None:
        self.model, self.recipe, self.processes = model, recipe, processes
        loss: nn.Module = TrainingLoss(model, recipe.auxiliary_weight)
        if recipe.compile:
            loss.compile()
        if processes.world > 1:
            loss = DistributedDataParallel(loss)
        self.loss = loss
        self.valid_pixels = 0.0  # in all steps so far
        self._called: Callable[[Tensor], Tensor] = torch.compile(model) if recipe.compile else model

    def add(self, batch: Batch, *, stop: bool) -> float | None:
        """Adds the gradient of the mean loss over the valid pixels of the whole batch; gives that loss.

        None, and no gradient, if any process wants to stop.

        Raises:
            RunError: no memory for a part, or no compiler for ``compile``.
        """
        device, parts = self.processes.device, self.recipe.accumulation
        images, labels = batch.images.to(device), batch.labels.to(device).long()
        valid, wish = self.processes.total(float((labels != IGNORE_INDEX).sum()), float(stop))
        if wish:
            return None
        self.valid_pixels += valid
        total = 0.0
        size = len(images) // parts
        for part in range(parts):
            some, their_labels = (whole[part * size : (part + 1) * size] for whole in (images, labels))
            with self._synchronised(last=part == parts - 1), _explained(self.recipe, size, device):
                total += self._part(some.float() / 255, their_labels, self.processes.world / max(valid, 1))
        return self.processes.total(total)[0] / max(valid, 1)

    def _part(self, images: Tensor, labels: Tensor, scale: float) -> float:
        """Attack and backward pass of a part; DistributedDataParallel takes the mean over processes of such sums."""
        if self.recipe.eps_255:
            images = training_attack(self.model, images, labels, self.recipe, self._logits)
        with self._autocast():
            loss = self.loss(images, labels)
        (loss * scale).backward()
        return float(loss.item())

    def _logits(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self._called(images).float()

    def _autocast(self) -> torch.autocast:
        bf16 = self.recipe.precision == "bf16"
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16, enabled=bf16)

    def _synchronised(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients with the last part only."""
        if isinstance(self.loss, DistributedDataParallel) and not last:
            return self.loss.no_sync()
        return contextlib.nullcontext()


@contextlib.contextmanager
def _explained(recipe: Recipe, images: int, device: torch.device) -> Iterator[None]:
    """What a device without enough memory or without a compiler raises, with what mends it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(
                f"Not enough memory on {device} for {images} images at once. Compute each batch in more parts: --set "
                f"accumulation={2 * recipe.accumulation} (what is trained so far goes on). A smaller crop or "
                "batch_size, or precision=bf16, needs another --out folder."
            ) from error
        if recipe.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise RunError(
                f"torch.compile does not work here: {reason} Train without it: --set compile=false"
            ) from error
        raise
