"""In which precision attacks are fastest on this CPU, and how much weaker they are: a short attack in each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segbench import counts
from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.evaluator import Evaluator
from segbench.attacks.stages import reduced
from segbench.attacks.start import random_start
from segbench.data import Sample
from segbench.engine.compute.batching import cpu_batch, in_fixed_batches, small_on_cpu
from segbench.engine.compute.checks import check_autocast
from segbench.engine.compute.precision import get_precision, has_bf16
from segbench.engine.rundir.manifest import FP32
from segbench.engine.telemetry.progress import track_items
from segbench.errors import ModelError
from segbench.models.devices import cpu_threads

IMAGES, ITERATIONS, LOSS, EPS_255 = 4, 20, "mce", 4
FASTER = 1.05  # less than that is noise
BF16, COMPILED = "bf16", "compiled"
OPTIONS = {
    BF16: "--precision bf16. The entry is then unofficial: official results have gradients in fp32",
    COMPILED: "--compile. Results stay official, but round otherwise; only a long run is worth the time to compile",
}


class _Measured(NamedTuple):
    """Seconds of an attack step for one image, those that steps took beyond that, and aAcc, scored in float32."""

    seconds: float
    beyond: float
    aacc: float


def compare_precisions(
    model: nn.Module, samples: Sequence[Sample], num_classes: int, *, progress: bool
) -> list[dict[str, Any]]:
    """Attacks the first images of one size in fp32, in bf16, and compiled in fp32; in a session on the CPU.

    Returns:
        Flags with ``name``, ``level``, ``value`` and ``message``: ``step_<way>`` has the seconds of a step for an
        image, ``strength_<way>`` the points of aAcc above those of fp32, ``fastest_precision`` how many times faster
        than fp32 the fastest way is. A way that is not measured has a reason instead.
    """
    size = samples[0].image.shape
    chosen = [sample for sample in samples if sample.image.shape == size][:IMAGES]
    images, labels = torch.stack([each.image for each in chosen]), torch.stack([each.label for each in chosen])
    measured, reasons = dict[str, _Measured](), dict[str, str]()
    with cpu_threads(1) if small_on_cpu(images.device, *size[-2:]) else nullcontext():  # as in a run
        for way in track_items((FP32, BF16, COMPILED), "precisions", progress):
            found = _unmeasurable(way, model, images) or _measure(way, model, images, labels, num_classes)
            if isinstance(found, str):
                reasons[way] = found
            else:
                measured[way] = found
    flags = [
        *_flags(measured, len(images)),
        *(_flag(f"step_{way}", None, f"Not measured: {reason}.") for way, reason in reasons.items()),
    ]
    return [*flags, _fastest({way: each.seconds for way, each in measured.items()})]


def _flags(measured: Mapping[str, _Measured], images: int) -> list[dict[str, Any]]:
    """Speed and strength of each way."""
    flags = []
    for way, found in measured.items():
        text = (
            f"Seconds of an attack step for one image ({LOSS} at {EPS_255}/255, {ITERATIONS} iterations, {images} "
            f"images); aAcc under it is {100 * found.aacc:.2f}."
        )
        if way == COMPILED:
            text += f" Compiling took {found.beyond:.0f} s more."
        flags.append(_flag(f"step_{way}", found.seconds, text))
        if way != FP32:
            points = 100 * (found.aacc - measured[FP32].aacc)
            text = f"Points of aAcc under attack above that of {FP32}, both scored in {FP32}; above 0 it is weaker."
            flags.append(_flag(f"strength_{way}", points, text))
    return flags


def _fastest(seconds: Mapping[str, float]) -> dict[str, Any]:
    way = min(seconds, key=lambda name: seconds[name])
    factor = seconds[FP32] / seconds[way]
    if factor < FASTER:
        return _flag("fastest_precision", 1.0, f"{FP32}, the default, is fastest on this machine.")
    text = f"{way} is fastest on this machine, {factor:.2f} times as fast as {FP32}: {OPTIONS[way]}."
    return _flag("fastest_precision", factor, text)


def _flag(name: str, value: float | None, message: str) -> dict[str, Any]:
    return {"name": name, "level": "note" if value is None else "ok", "value": value, "message": message}


def _unmeasurable(way: str, model: nn.Module, images: Tensor) -> str:
    """Why a way cannot be measured; empty if it can."""
    if way == BF16:
        if not has_bf16(images.device):
            return "this CPU has no bfloat16 instructions that oneDNN could use"
        try:
            check_autocast(model, images, torch.bfloat16)
        except ModelError:
            return "the model fails in bfloat16"
    if way == COMPILED:
        try:
            torch.compile(lambda x: x * x)(torch.ones(8))
        except Exception as error:  # noqa: BLE001 - a compiler may raise anything
            reason = (str(error) or "no message").splitlines()[0][:200]
            return f"torch.compile does not work here; it needs a C++ compiler ({type(error).__name__}: {reason})"
    return ""


def _measure(way: str, model: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> _Measured | str:
    """Speed and strength, or why there is none."""
    size, eps, stages = cpu_batch(*images.shape[-2:]), EPS_255 / 255, reduced(ITERATIONS)
    precision = get_precision(FP32 if way == COMPILED else way)
    evaluator = Evaluator(
        model, size=size, fill=True, autocast=precision.autocast, setting=precision.setting, compiled=way == COMPILED
    )
    batch = AttackBatch(evaluator)
    starts = random_start(images, eps=stages[0].radius * eps, seeds=range(len(images)))
    keys = batch.add(
        [
            Job(image, label, LOSS, eps, stages, start)
            for image, label, start in zip(images, labels, starts, strict=True)
        ]
    )
    clock, computed = list[float](), list[int]()

    def before(number: int) -> None:
        clock.append(time.perf_counter())
        computed.append(-(-number // size) * size)  # with the black images that fill up the last batch

    results = batch.run(before)
    clock.append(time.perf_counter())
    if way == COMPILED and evaluator.compiled is None:
        return "torch.compile fails with this model, as the warning says"
    if way != FP32 and any(int(result.nonfinite_gradients) for result in results.values()):
        return "some gradients are not finite, so an attack would be weaker"
    steps = [end - begin for begin, end in pairwise(clock)]
    seconds = statistics.median(step / number for step, number in zip(steps, computed, strict=True))
    with torch.no_grad():
        logits = in_fixed_batches(model, torch.stack([results[key].adversarial for key in keys]))
    scored = counts.count(logits.argmax(dim=1).numpy(), labels.numpy(), num_classes)
    return _Measured(seconds, max(sum(steps) - seconds * sum(computed), 0.0), scored.aacc())
