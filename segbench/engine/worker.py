"""Does one unit of work: attack, check, predict again, count."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segbench import attacks, counts
from segbench.attacks import AttackResult
from segbench.attacks.apgd import STAGES
from segbench.data import Sample, SegmentationDataset
from segbench.engine.batching import Metered, cpu_batch
from segbench.engine.checks import verify_images
from segbench.engine.plan import CHECK_ITERATIONS, CHUNK, Finished, Unit
from segbench.errors import ModelError, RunError
from segbench.evidence import CHECK_LOSS, CLEAN, Group
from segbench.models.devices import is_out_of_memory
from segbench.protocol import Protocol

STATISTICS = ("forwards", "backwards", "zero_gradients", "nonfinite_gradients")


@dataclass
class Worker:
    """Holds the model; does units.

    Attributes:
        model: in eval mode on ``device``.
        dataset: tells the classes and their weights.
        protocol: how to attack.
        device: where to compute.
        batch_size: images attacked at once, or None to choose; halved when memory runs out.
        parallel: units done side by side; each is charged its share of the time.
        stamps: of each image's files, as they were before the first one was read.

    Several threads may share a worker: nothing in it changes but ``batch_size``, which changes no result.
    """

    model: nn.Module
    dataset: SegmentationDataset
    protocol: Protocol
    device: torch.device
    batch_size: int | None = None
    parallel: int = 1

    def __post_init__(self) -> None:
        self.class_weights = self.dataset.class_weights().to(self.device)
        files = self.dataset.files
        self.stamps = {image_id: files.stamps([image_id]) for image_id in self.dataset.image_ids} if files else {}

    def do(self, unit: Unit, samples: Sequence[Sample], on_images: Callable[[int], None]) -> Finished:
        """Attacks and counts the images of a unit.

        Args:
            unit: what to do.
            samples: its images, in its order.
            on_images: called with the number of images before each forward pass; what it raises ends the unit.
        """
        started = time.monotonic()
        model = Metered(self.model, self.device, on_images)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        parts: dict[str, counts.Counts] = {}
        stats = {name: dict.fromkeys(unit.image_ids, 0) for name in (*STATISTICS, "changed_pixels", "nonfinite_logits")}
        for group in _same_size(samples):
            self._do_group(model, unit, group, parts, stats)
        group_counts = counts.merge(parts[image_id] for image_id in unit.image_ids)
        ordered = {name: [values[image_id] for image_id in unit.image_ids] for name, values in stats.items()}
        cost = {
            "unit": unit.name,
            "seconds": (time.monotonic() - started) / self.parallel,
            "peak_memory_bytes": peak_memory(self.device),
            "device": device_name(self.device),
        }
        return Finished(unit, Group(unit.image_ids, group_counts), ordered, cost)

    def _do_group(
        self,
        model: nn.Module,
        unit: Unit,
        samples: Sequence[Sample],
        parts: dict[str, counts.Counts],
        stats: dict[str, dict[str, int]],
    ) -> None:
        """Images of one size, in batches; out of memory halves the batch and repeats it."""
        position = 0
        while position < len(samples):
            size = self.batch_size or self._automatic(samples[0])
            batch = samples[position : position + size]
            found: counts.Counts | None
            try:
                found, numbers = self._do_batch(model, unit, batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise RunError(
                        f"Not enough memory for one image {tuple(batch[0].image.shape)} on {self.device}. "
                        "Use a device with more, or --device cpu."
                    ) from error
                found, numbers = None, {}
            if found is None:  # outside the except clause, which would keep the tensors alive
                self.batch_size = max(1, min(size, len(batch)) // 2)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            for row, sample in enumerate(batch):
                parts[sample.image_id] = found.take(np.array([row]))
                for name, values in numbers.items():
                    stats[name][sample.image_id] = int(values[row])
            position += len(batch)

    def _automatic(self, sample: Sample) -> int:
        return cpu_batch(*sample.image.shape[-2:]) if self.device.type == "cpu" else CHUNK

    def _do_batch(self, model: nn.Module, unit: Unit, batch: Sequence[Sample]) -> tuple[counts.Counts, dict[str, Any]]:
        images = torch.stack([sample.image.to(self.device, non_blocking=True) for sample in batch])
        labels = torch.stack([sample.label.to(self.device, non_blocking=True) for sample in batch])
        numbers: dict[str, Any] = {}
        if (unit.eps_255, unit.loss) == CLEAN:
            adversarial = images
        else:
            result = self._attack(model, unit, images, labels, [sample.image_id for sample in batch])
            adversarial = result.adversarial
            verify_images(adversarial, images, unit.eps_255 / 255)
            numbers = {name: getattr(result, name).cpu().numpy() for name in STATISTICS}
        with torch.no_grad():
            logits = model(adversarial.float())
        predictions, finite = logits.max(dim=1).indices, torch.isfinite(logits).flatten(1).all(dim=1).cpu()
        if not numbers and not bool(finite.all()):
            broken = batch[int(finite.int().argmin())].image_id
            raise ModelError(
                f"The model's logits have NaN or infinite values on the clean image {broken!r}. Check weights and "
                "normalisation."
            )
        if numbers:
            numbers["nonfinite_logits"] = (~finite).numpy()
            numbers["changed_pixels"] = (predictions != result.predictions).flatten(1).sum(dim=1).cpu().numpy()
        num_classes = self.dataset.num_classes
        return counts.count(
            predictions.cpu().numpy(), labels.cpu().numpy(), num_classes, self.dataset.ignore_index
        ), numbers

    def _attack(
        self, model: nn.Module, unit: Unit, images: Tensor, labels: Tensor, image_ids: Sequence[str]
    ) -> AttackResult:
        eps, ignore_index = unit.eps_255 / 255, self.dataset.ignore_index
        if unit.loss == CHECK_LOSS:
            return attacks.apgd(
                model,
                images,
                labels,
                eps=eps,
                loss="mce",
                iterations=CHECK_ITERATIONS,
                ignore_index=ignore_index,
            )
        seeds = [self.protocol.start_seed(image_id, unit.loss, unit.eps_255) for image_id in image_ids]
        start = attacks.random_start(images, eps=STAGES[0][0] * eps, seeds=seeds)
        return attacks.red_eps_apgd(
            model,
            images,
            labels,
            eps=eps,
            loss=unit.loss,
            iterations=self.protocol.iterations,
            start=start,
            class_weights=self.class_weights,
            ignore_index=ignore_index,
        )


def _same_size(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples grouped by the size of their image."""
    groups: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample.image.shape), []).append(sample)
    yield from groups.values()


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
