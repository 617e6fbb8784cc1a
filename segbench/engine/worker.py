"""What computes: a model on a device, the attack of a unit's images, and the count of what came out."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from segbench import attacks, counts
from segbench.attacks import AttackResult
from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.catalogue import BY_LOSS, Attack, aimed, get_attack
from segbench.attacks.problem import Evaluator
from segbench.attacks.square import square
from segbench.attacks.stages import Stage
from segbench.data import Sample, SegmentationDataset
from segbench.engine.batching import cpu_batch, in_fixed_batches
from segbench.engine.checks import verify_images
from segbench.engine.plan import CHECK_ITERATIONS, CHUNK, Unit
from segbench.engine.precision import FP32, get_precision
from segbench.errors import ModelError
from segbench.evidence import CHECK_LOSS
from segbench.protocol import Protocol

STATISTICS = ("forwards", "backwards", "zero_gradients", "nonfinite_gradients")


@dataclass
class Worker:
    """Holds the model; attacks and counts.

    Attributes:
        model: in eval mode on ``device``.
        dataset: tells the classes and their weights.
        protocol: how to attack.
        device: where to compute.
        batch_size: images attacked at once, or None to choose; halved when a GPU's memory runs out.
        precision: of the gradients (`segbench.engine.precision`); what they lead to is scored in float32.
        compiled: compile model and loss.
        parallel: streams of units side by side; each is charged its share of the time.
        sources: by the beginning of their weights' hash, models that are attacked in the place of this one, likewise
            in eval mode on ``device``.
        stamps: of each image's files, as they were before the first one was read.

    Several threads may share a worker: nothing in it changes but ``batch_size``, which changes no result.
    """

    model: nn.Module
    dataset: SegmentationDataset
    protocol: Protocol
    device: torch.device
    batch_size: int | None = None
    precision: str = FP32
    compiled: bool = False
    parallel: int = 1
    sources: Mapping[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.class_weights = self.dataset.class_weights().to(self.device)
        files = self.dataset.files
        self.stamps = {image_id: files.stamps([image_id]) for image_id in self.dataset.image_ids} if files else {}

    @property
    def models(self) -> nn.ModuleList:
        """All that it holds, to be `frozen` together."""
        return nn.ModuleList([self.model, *self.sources.values()])

    @property
    def fixed_shape(self) -> bool:
        """Whether the model sees batches of one shape: on a CPU the rounding depends on it."""
        return self.device.type == "cpu"

    def size(self, height: int, width: int) -> int:
        """Images to attack at once."""
        return self.batch_size or (cpu_batch(height, width) if self.fixed_shape else CHUNK)

    def evaluator(self, height: int, width: int, *, source: str = "") -> Evaluator:
        """Computes losses and gradients of images of one size; on a CPU, and compiled, in batches of one shape."""
        precision = get_precision(self.precision)
        return Evaluator(
            self.sources[source] if source else self.model,
            class_weights=self.class_weights,
            ignore_index=self.dataset.ignore_index,
            size=cpu_batch(height, width) if self.fixed_shape else self.size(height, width),
            fill=self.fixed_shape or self.compiled,
            autocast=precision.autocast,
            setting=precision.setting,
            compiled=self.compiled,
        )

    def job(self, unit: Unit, sample: Sample) -> Job:
        """The attack of one image."""
        image, label = (part.to(self.device, non_blocking=True) for part in (sample.image, sample.label))
        eps = unit.eps_255 / 255
        if unit.loss == CHECK_LOSS:
            return Job(image, label, "mce", eps, (Stage(1.0, CHECK_ITERATIONS),))
        attack = get_attack(unit.loss, self.protocol.iterations)
        stages = attack.stages(unit.eps_255)
        label = aimed(attack, label, self.dataset.ignore_index)
        seeds = [self.protocol.start_seed(sample.image_id, attack.draw, unit.eps_255)]
        (start,) = attacks.random_start(image[None], eps=stages[0].radius * eps, seeds=seeds)
        return Job(image, label, attack.loss, eps, stages, start, attack.best == BY_LOSS)

    def alone(self, unit: Unit, samples: Sequence[Sample], on_images: Callable[[int], None]) -> list[AttackResult]:
        """An `Attack.alone` on images of one size; ``on_images`` is called before each pass."""
        attack = get_attack(unit.loss, self.protocol.iterations)
        found = (self._transferred if attack.source else self._searched)(attack, unit, samples, on_images)
        return [AttackResult(*(values[row].clone() for values in found)) for row in range(len(samples))]

    def _transferred(
        self, attack: Attack, unit: Unit, samples: Sequence[Sample], on_images: Callable[[int], None]
    ) -> AttackResult:
        """The attack on another model, with what this one predicts there; all else in it is of the other one."""
        batch = AttackBatch(self.evaluator(*samples[0].image.shape[-2:], source=attack.source))
        keys = batch.add([self.job(unit, sample) for sample in samples])
        found = batch.run(on_images)
        result = AttackResult(*map(torch.stack, zip(*(found[key] for key in keys), strict=True)))
        return result._replace(predictions=self.predict(result.adversarial.float())[0])

    def _searched(
        self, attack: Attack, unit: Unit, samples: Sequence[Sample], on_images: Callable[[int], None]
    ) -> AttackResult:
        """The black-box attack."""
        images, labels = (
            torch.stack([part.to(self.device, non_blocking=True) for part in parts])
            for parts in ([sample.image for sample in samples], [sample.label for sample in samples])
        )

        def model(points: Tensor) -> Tensor:
            on_images(len(points))
            return in_fixed_batches(self.model, points) if self.fixed_shape else self.model(points)

        return square(
            model,
            images,
            labels,
            eps=unit.eps_255 / 255,
            queries=attack.passes,
            seeds=[self.protocol.start_seed(sample.image_id, attack.draw, unit.eps_255) for sample in samples],
            ignore_index=self.dataset.ignore_index,
        )

    def score(
        self, eps_255: Sequence[float], samples: Sequence[Sample], results: Sequence[AttackResult | None]
    ) -> tuple[counts.Counts, list[dict[str, int]]]:
        """Predicts images of one size again in float32, and counts; None is the clean image itself.

        Returns:
            The counts, and the statistics of each attack.

        Raises:
            RunError: an attack broke the threat model.
            ModelError: the logits of a clean image are not finite.
        """
        images = torch.stack([sample.image.to(self.device, non_blocking=True) for sample in samples])
        labels = torch.stack([sample.label for sample in samples])
        points = torch.stack(
            [image if result is None else result.adversarial for image, result in zip(images, results, strict=True)]
        )
        verify_images(points, images, torch.tensor(eps_255, dtype=torch.float64, device=self.device) / 255)
        predictions, finite = self.predict(points.float())
        numbers = []
        for row, (sample, result) in enumerate(zip(samples, results, strict=True)):
            if result is None and not finite[row]:
                raise ModelError(
                    f"The model's logits have NaN or infinite values on the clean image {sample.image_id!r}. Check "
                    "weights and normalisation."
                )
            numbers.append({} if result is None else self._statistics(result, predictions[row], bool(finite[row])))
        found = counts.count(
            predictions.cpu().numpy(), labels.cpu().numpy(), self.dataset.num_classes, self.dataset.ignore_index
        )
        return found, numbers

    def predict(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions (N,H,W), and whether all logits of an image are finite (N,), on the CPU."""
        size = cpu_batch(*points.shape[-2:]) if self.fixed_shape else self.size(*points.shape[-2:])
        predictions, finite = [], []
        with torch.no_grad():
            for part in torch.split(points, size):
                logits = in_fixed_batches(self.model, part) if self.fixed_shape else self.model(part)
                predictions.append(logits.max(dim=1).indices)
                finite.append(torch.isfinite(logits).flatten(1).all(dim=1))
        return torch.cat(predictions), torch.cat(finite).cpu()

    @staticmethod
    def _statistics(result: AttackResult, predictions: Tensor, finite: bool) -> dict[str, Any]:
        changed = int((predictions != result.predictions).sum())
        numbers = {name: int(getattr(result, name)) for name in STATISTICS}
        return numbers | {"nonfinite_logits": int(not finite), "changed_pixels": changed}


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or ``cpu`` with its threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {os.cpu_count()} cores" if device.type == "cpu" else device.type


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, of the process otherwise."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
