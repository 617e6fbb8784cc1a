"""What computes: a model on a device, the attack of a unit's images, and the count of what came out."""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from segbench import attacks, counts
from segbench.attacks import AttackResult
from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.catalogue import BY_LOSS, Attack, get_attack, target_labels
from segbench.attacks.evaluator import CONTIGUOUS_ONLY, Evaluator, fastest_format
from segbench.attacks.memory import is_out_of_memory
from segbench.attacks.problem import COUNTERS
from segbench.attacks.square import square
from segbench.attacks.stages import Stage
from segbench.data import Sample, SegmentationDataset
from segbench.engine.compute.batching import cpu_batch, in_fixed_batches
from segbench.engine.compute.checks import check_autocast, first_images, verify_images, works_in
from segbench.engine.compute.precision import get_precision
from segbench.engine.rundir.manifest import FP32
from segbench.engine.rundir.plan import CHECK_ITERATIONS, CHUNK, STANDARDISED_CHECK, Unit
from segbench.errors import ModelError
from segbench.evidence import CHECK_LOSS, CHECK_SEARCH, CLEAN
from segbench.models.devices import cpu_threads, memory_explained
from segbench.protocol import Protocol

T = TypeVar("T")
STATISTICS = (*COUNTERS, "changed_pixels", "nonfinite_logits")  # of each image, kept with its unit


@dataclass
class Worker:
    """Holds the model; attacks and counts.

    Attributes:
        batch_size: images attacked at once, or None to choose; halved when a GPU's memory runs out.
        precision: of the gradients; the results are scored in float32.
        compiled: compile model and loss.
        one_core: images are small and the models keep no state, so that streams of one core each are fastest.
        streams: that share this worker now; each is charged its share of the time.
        sources: models attacked in place of this one, by the first digits of their weights' hash.
        formats: the memory format of the images that a model gets in attacks, where it is not the fastest; "" is the
            evaluated model, others have their names among ``sources``.
        stamps: of each image's files, as they were before the first one was read.

    Several threads may share a worker: only ``batch_size`` changes, which changes no result.
    """

    model: nn.Module
    dataset: SegmentationDataset
    protocol: Protocol
    device: torch.device
    batch_size: int | None = None
    precision: str = FP32
    compiled: bool = False
    one_core: bool = False
    streams: int = 1
    sources: Mapping[str, nn.Module] = field(default_factory=dict)
    formats: dict[str, torch.memory_format] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.class_weights = self.dataset.class_weights().to(self.device)
        files = self.dataset.files
        self.stamps = {image_id: files.stamps([image_id]) for image_id in self.dataset.image_ids} if files else {}

    @property
    def models(self) -> list[nn.Module]:
        """The evaluated model and those that attacks are made on."""
        return [self.model, *self.sources.values()]

    def probe_as_attacked(self) -> None:
        """Tries the models in the precision and the memory format of attacks, in a session.

        One that fails in the precision is refused; one that fails in the format is attacked with contiguous images.
        """
        images, autocast = first_images(self.dataset, self.device), get_precision(self.precision).autocast
        if autocast is not None:
            for model in self.models:
                check_autocast(model, images, autocast)
        fastest = fastest_format(self.device)
        if fastest is torch.preserve_format:
            return
        for name, model in {"": self.model, **self.sources}.items():
            if not works_in(model, images, fastest):
                logging.getLogger("segbench").warning(CONTIGUOUS_ONLY)
                self.formats[name] = torch.contiguous_format

    def stream_threads(self) -> AbstractContextManager[None]:
        """As many CPU threads as one stream has: rounding may depend on their number."""
        return cpu_threads(1 if self.one_core else torch.get_num_threads())

    @property
    def fixed_shape(self) -> bool:
        """Whether the model sees batches of one shape: on a CPU the rounding depends on it."""
        return self.device.type == "cpu"

    def images_at_once(self, height: int, width: int) -> int:
        """Images of one size to attack together."""
        return self.batch_size or (cpu_batch(height, width) if self.fixed_shape else CHUNK)

    def evaluator(self, height: int, width: int, *, source: str = "") -> Evaluator:
        """Computes losses and gradients of images of one size; on a CPU, and compiled, in batches of one shape."""
        precision = get_precision(self.precision)
        return Evaluator(
            self.sources[source] if source else self.model,
            class_weights=self.class_weights,
            ignore_index=self.dataset.ignore_index,
            size=cpu_batch(height, width) if self.fixed_shape else self.images_at_once(height, width),
            fill=self.fixed_shape or self.compiled,
            autocast=precision.autocast,
            setting=precision.setting,
            compiled=self.compiled,
            memory_format=self.formats.get(source),
        )

    def job(self, unit: Unit, sample: Sample) -> Job:
        """The attack of one image."""
        image, label = (part.to(self.device, non_blocking=True) for part in (sample.image, sample.label))
        eps = unit.strength / 255
        if unit.loss == CHECK_LOSS:
            iterations, largest_margin = check_settings(self.protocol)
            return Job(image, label, "mce", eps, (Stage(1.0, iterations),), largest_margin=largest_margin)
        attack = attack_of(unit, self.protocol)
        stages = attack.stages(unit.strength)
        label = target_labels(attack, label, self.dataset.ignore_index)
        seeds = [self.protocol.start_seed(sample.image_id, attack.seed_name, unit.strength)]
        (start,) = attacks.random_start(image[None], eps=stages[0].radius * eps, seeds=seeds)
        return Job(image, label, attack.loss, eps, stages, start, attack.best == BY_LOSS, attack.largest_margin)

    def attack(
        self, units: Sequence[Unit], samples: Sequence[Sample], on_images: Callable[[int], None]
    ) -> list[AttackResult]:
        """Attacks images of one size together, each as its unit says; ``on_images`` gets their number before each pass.

        The units are all the same if the attack `Attack.runs_outside_batch`.
        """
        shape = samples[0].image.shape[-2:]
        attack = None if units[0].loss == CHECK_LOSS else attack_of(units[0], self.protocol)
        if attack is not None and attack.optimiser == "square":
            found = self._search(attack, units[0].strength, samples, on_images)
            return [AttackResult(*(values[row].clone() for values in found)) for row in range(len(samples))]
        batch = AttackBatch(self.evaluator(*shape, source=attack.source if attack else ""))
        keys = batch.add([self.job(unit, sample) for unit, sample in zip(units, samples, strict=True)])
        by_key = batch.run(on_images)
        results = [by_key[key] for key in keys]
        if attack is not None and attack.source:  # the predictions are those of the source
            predictions, _ = self.predict(torch.stack([result.adversarial for result in results]).float())
            results = [result._replace(predictions=own) for result, own in zip(results, predictions, strict=True)]
        return results

    def _search(
        self, attack: Attack, eps_255: float, samples: Sequence[Sample], on_images: Callable[[int], None]
    ) -> AttackResult:
        """The black-box attack, of all images together."""
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
            eps=eps_255 / 255,
            queries=attack.passes,
            seeds=[self.protocol.start_seed(sample.image_id, attack.seed_name, eps_255) for sample in samples],
            ignore_index=self.dataset.ignore_index,
        )

    def within_memory(self, compute: Callable[[int], T], size: int, shape: Sequence[int]) -> T:
        """``compute(size)``; each time memory runs out again, with half as many images. `batch_size` remembers.

        Every call of the model during an attack goes through here. On a CPU, where the number is fixed, and for one
        image of this ``shape`` it is a RunError.
        """
        while True:
            last = self.fixed_shape or size == 1
            count = self.images_at_once(*shape[-2:]) if self.fixed_shape else 1
            what = "one image" if count == 1 else f"{count} images"
            text = f"for {what} {tuple(shape)} on {self.device}"
            try:
                with memory_explained(text, "Finished units are kept. ") if last else nullcontext():
                    return compute(size)
            except (MemoryError, RuntimeError) as error:
                if last or not is_out_of_memory(error):
                    raise
            size = self.batch_size = size // 2
            if self.device.type == "cuda":  # outside the except clause, which would keep the tensors alive
                torch.cuda.empty_cache()

    def score(
        self, eps_255: Sequence[float], samples: Sequence[Sample], results: Sequence[AttackResult | None]
    ) -> tuple[counts.Counts, list[dict[str, int]]]:
        """Predicts images of one size again in float32, and counts; a result of None is the clean image itself.

        Returns the counts, and the statistics of each attack. Verifies that the attacks kept to the threat model.
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
        size = cpu_batch(*points.shape[-2:]) if self.fixed_shape else self.images_at_once(*points.shape[-2:])
        predictions, finite = [], []
        with torch.no_grad():
            for part in torch.split(points, size):
                part = part.clone()  # the model may write into it
                logits = in_fixed_batches(self.model, part) if self.fixed_shape else self.model(part)
                predictions.append(logits.max(dim=1).indices)
                finite.append(torch.isfinite(logits).flatten(1).all(dim=1))
        return torch.cat(predictions), torch.cat(finite).cpu()

    @staticmethod
    def _statistics(result: AttackResult, predictions: Tensor, finite: bool) -> dict[str, Any]:
        changed = int((predictions != result.predictions).sum())
        numbers = {name: int(getattr(result, name)) for name in COUNTERS}
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


def check_settings(protocol: Protocol) -> tuple[int, float | None]:
    """Iterations of the check at a huge ε, and the largest margin of the logits that it sees."""
    return (CHECK_ITERATIONS, None) if protocol.largest_margin is None else STANDARDISED_CHECK


def attack_of(unit: Unit, protocol: Protocol) -> Attack:
    """The attack of the catalogue that a unit is made by; not of clean images and of the check at a huge ε."""
    if unit.loss == CHECK_SEARCH:
        return get_attack("square", CHECK_ITERATIONS)
    return get_attack(unit.loss, protocol.iterations)


def image_passes(unit: Unit, protocol: Protocol) -> int:
    """Forward passes of a unit in which no image is finished early: those of the attack, and one to count."""
    if unit.loss in (CLEAN[1], CHECK_LOSS):
        attack = {CLEAN[1]: 0, CHECK_LOSS: check_settings(protocol)[0] + 1}[unit.loss]
    else:
        attack = attack_of(unit, protocol).passes
    return len(unit.image_ids) * (attack + 1)
