"""`check_model`: what goes wrong most often with a model, found in a minute instead of after a night of attacks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from segbench import counts
from segbench.attacks.evaluator import CONTIGUOUS_ONLY, fastest_format
from segbench.data import Sample, SegmentationDataset, load_dataset
from segbench.data.catalogue import crop_and_images
from segbench.engine.compute.checks import batch_dependence, probe, works_in
from segbench.engine.compute.session import open_session
from segbench.engine.precisions import compare_precisions
from segbench.engine.telemetry.progress import format_duration, track_items
from segbench.errors import DataError, UnknownNameError, UsageError
from segbench.models.devices import choose_compute_device
from segbench.models.load import load
from segbench.models.normalization import IMAGENET
from segbench.models.sliding import in_windows
from segbench.models.sources.names import parse
from segbench.protocol import OFFICIAL_RADII_255, SEA_V1

LEVELS = ("ok", "note", "warning", "fail")
TRIED = 5  # images on which other ways to feed the model are tried
MARGIN = 0.05  # difference of aAcc that is told

_MEAN, _STD = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)

# What people feed a model by mistake, and what it means when the model is better that way.
VARIANTS: Mapping[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "normalised by ImageNet's mean and standard deviation": (
        lambda x: (x - _MEAN.to(x)) / _STD.to(x),
        "the normalisation is missing: put it inside the model",
    ),
    "with ImageNet's normalisation undone": (
        lambda x: x * _STD.to(x) + _MEAN.to(x),
        "the model normalises twice: take one of the two out",
    ),
    "in [0,255]": (lambda x: 255 * x, "the model was trained on [0,255]: multiply inside the model"),
    "in [-1,1]": (lambda x: 2 * x - 1, "the model was trained on [-1,1]: scale inside the model"),
    "with a scaling to [-1,1] undone": (
        lambda x: (x + 1) / 2,
        "the model scales to [-1,1], but was trained on [0,1]: take the scaling out",
    ),
    "as BGR": (lambda x: x.flip(-3), "the model was trained on BGR: flip the channels inside the model"),
}


class Finding(NamedTuple):
    """One thing looked at: ``level`` is ``ok``, ``note``, ``warning`` (read it) or ``fail`` (do not evaluate)."""

    name: str
    level: str
    value: float | None
    message: str


def check_model(
    model: str | nn.Module,
    dataset: str | SegmentationDataset | None = None,
    data_root: str | Path | None = None,
    *,
    images: int = 20,
    size: int | None = None,
    device: str = "auto",
    offline: bool = False,
    progress: bool = True,
    precisions: bool = False,
) -> list[Finding]:
    """Feeds a model a few images and looks at what an evaluation relies on.

    Output shape and finiteness, determinism, independence of the other images of a batch, black and white images, the
    gradient (there, finite, and right: it predicts how the loss changes), speed, and the clean score: against the
    card, and against the same images fed in other ways, which shows a normalisation that is missing or done twice.

    Args:
        model: as in `segbench.evaluate`.
        dataset: id or object; None for the one of the card.
        data_root: folder of the data set.
        images: how many, spread evenly over the data set.
        size: side of the noise images in pixels when there is no data set.
        device: as in `segbench.evaluate`.
        offline: never use the network.
        progress: show a bar on standard error.
        precisions: on a CPU, attack a few images in fp32, bf16 and compiled: which is fastest, and how strong each is.

    Returns:
        The findings, in the order in which they were made.

    Raises:
        ModelError: the model cannot be loaded, or its output is not logits with a gradient.
        DataError, UsageError: the data set that was asked for cannot be read.
    """
    if images < 1:
        raise UsageError(f"images must be at least 1, not {images}.")
    if size is not None and size < 16:
        raise UsageError(f"size must be at least 16, not {size}.")
    torch_device = choose_compute_device(device)
    data = load_dataset(dataset, data_root) if isinstance(dataset, str) else dataset
    num_classes = None if data is None else data.num_classes
    loaded = load(parse(model), num_classes=num_classes, offline=offline, progress=progress)
    card = loaded.card
    if data is None and card is None and data_root is not None:
        raise UsageError("A data root needs a data set: --dataset camvid, or dataset='camvid' in Python.")
    findings: list[Finding] = []
    if data is None and card is not None:
        data, missing = _of_card(card.dataset, data_root)
        findings += missing
    samples = [] if data is None else [data[row] for row in _spread(len(data), images)]
    first = [sample.image for sample in samples if sample.image.shape == samples[0].image.shape][:2]
    side, total = crop_and_images(card.dataset if card else "") or (size or 256, 0)
    batch = torch.stack(first) if first else _noise(size or side)
    module = loaded.module if data is None else in_windows(loaded.module, data)
    with open_session([module], torch_device) as session:
        batch = batch.to(torch_device)
        described = data if data is not None else card
        classes = described.num_classes if described is not None else _classes(module, batch)
        probed = probe(module, batch, classes, was_training=session.was_training[0])
        findings += [Finding(**flag) for flag in probed.flags]
        findings += _behaviour(module, batch)
        findings += _memory_format(module, batch)
        findings.append(_gradient(module, batch[:1]))
        findings.append(_speed(module, batch[:1], total if data is None else len(data)))
        if samples:
            scores = _scores(module, samples, classes, torch_device, progress)
            expected = card.expected if card else None
            findings.append(_against_card(scores["as they are"], expected))
            findings.append(_against_variants(scores, (expected or {}).get("aacc")))
        else:
            reason = "Not looked at: no data set (--dataset, --data-root)."
            findings.append(Finding("clean_score", "note", None, reason))
        if precisions:
            findings += _precisions(module, samples, classes, torch_device, progress)
    return findings


def _classes(model: nn.Module, batch: Tensor) -> int:
    """How many classes a model without card and data set has; 0 if it fails, which `probe` then tells."""
    try:
        with torch.no_grad():
            return int(model(batch[:1].clone()).shape[1])
    except Exception:  # noqa: BLE001 - a user's code may raise anything; `probe` calls it again and says what
        return 0


def _of_card(dataset: str, root: str | Path | None) -> tuple[SegmentationDataset | None, list[Finding]]:
    """The data set of a card. Without a folder it may be missing: then noise has to do."""
    try:
        return load_dataset(dataset, root), []
    except (DataError, UnknownNameError) as error:
        if root is not None:
            raise
        reason = f"{dataset} is not here, so noise images are used. {error}".splitlines()[0]
        return None, [Finding("data", "note", None, reason)]


def _spread(available: int, wanted: int) -> list[int]:
    """Rows spread evenly over a data set.

    >>> _spread(100, 4), _spread(3, 20)
    ([12, 37, 62, 87], [0, 1, 2])
    """
    if wanted >= available:
        return list(range(available))
    return [int((place + 0.5) * available / wanted) for place in range(wanted)]


def _noise(side: int) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def _behaviour(model: nn.Module, batch: Tensor) -> list[Finding]:
    """Logits of one image with and without company; black and white images; the size of the logits."""
    with torch.no_grad():
        logits = model(batch)
        flat = model(torch.stack([torch.zeros_like(batch[0]), torch.ones_like(batch[0])]))
    difference, allowed = batch_dependence(model, batch)
    finite = bool(torch.isfinite(flat).all())
    spread = float((logits.double().max(dim=1).values - logits.double().min(dim=1).values).median())
    loud = spread > 1000
    return [
        Finding(
            "batch_independence", "ok" if difference <= allowed else "note", difference,
            "Largest relative difference between the logits of an image alone and beside another; large only if the "
            "model is not deterministic.",
        ),
        Finding(
            "black_and_white", "ok" if finite else "fail", float(finite),
            "1 if black and white images give finite logits.",
        ),
        Finding(
            "logit_range", "warning" if loud else "note" if spread < 1e-3 else "ok", spread,
            "Median gap between the largest and the smallest logit of a pixel"
            + ("; beyond 1000 the losses saturate in float32." if loud else "."),
        ),
    ]  # fmt: skip


def _memory_format(model: nn.Module, batch: Tensor) -> list[Finding]:
    """Whether the model can be attacked in the memory format that is fastest on its device, where that is another."""
    fastest = fastest_format(batch.device)
    if fastest is torch.preserve_format or works_in(model, batch, fastest):
        return []
    return [Finding("memory_format", "note", 0.0, CONTIGUOUS_ONLY)]


def _gradient(model: nn.Module, image: Tensor) -> Finding:
    """Whether a small step along the sign of the gradient changes the loss as the gradient says it does."""
    with torch.no_grad():
        labels = model(image).argmax(dim=1)

    def loss(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x).double(), labels, reduction="sum")

    x = image.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(x), x)
    if not bool(torch.isfinite(gradient).all()):
        return Finding("gradient", "fail", None, "The input gradient has NaN or infinite values.")
    if not bool((gradient != 0).any()):
        return Finding("gradient", "fail", 0.0, "The input gradient is zero everywhere: the attack would see nothing.")
    step = gradient.sign() * 2e-4
    with torch.no_grad():
        found = float(loss(image + step) - loss(image - step)) / 2
    predicted = float((gradient.double() * step.double()).sum())
    ratio = found / predicted
    level = "ok" if 0.5 <= ratio <= 2 else "warning"
    return Finding(
        "gradient", level, ratio,
        "Change of the loss over a small step, divided by what the gradient predicts (1 if it is right)"
        + ("." if level == "ok" else "; the gradient may be hidden: quantisation, noise, a straight-through trick."),
    )  # fmt: skip


def _speed(model: nn.Module, image: Tensor, images: int) -> Finding:
    """Seconds for one forward and backward pass of one image, and what a whole evaluation would take."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        x = image.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(model(x).sum(), x)
        gradient.sum().item()  # waits for the device
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    text = (
        f"Seconds for one image of {image.shape[-1]}x{image.shape[-2]}, forward and backward, on {image.device.type}."
    )
    if images:
        passes = images * len(OFFICIAL_RADII_255) * len(SEA_V1.losses) * SEA_V1.iterations
        text += f" All of {SEA_V1.name} on {images} images, one by one: about {format_duration(passes * seconds)}."
    return Finding("speed", "ok", seconds, text)


def _precisions(
    model: nn.Module, samples: list[Sample], classes: int, device: torch.device, progress: bool
) -> list[Finding]:
    """Which precision is fastest, and how strong attacks are in each, where that can be measured."""
    reason = ""
    if device.type != "cpu":
        reason = f"Measured on a CPU only (--device cpu), not on {device.type}; see also `segbench selftest`."
    elif not samples:
        reason = "Not measured: no data set (--dataset, --data-root)."
    if reason:
        return [Finding("fastest_precision", "note", None, reason)]
    return [Finding(**flag) for flag in compare_precisions(model, samples, classes, progress=progress)]


def _scores(
    model: nn.Module, samples: list[Any], classes: int, device: torch.device, progress: bool
) -> dict[str, list[counts.Counts]]:
    """Counts per image: of all images as they are, of the first few fed in other ways."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {"as they are": lambda x: x}
    ways |= {name: change for name, (change, _) in VARIANTS.items()}
    jobs = [(name, sample) for name in ways for sample in (samples if name == "as they are" else samples[:TRIED])]
    scores: dict[str, list[counts.Counts]] = {name: [] for name in ways}
    for name, sample in track_items(jobs, "clean score", progress):
        with torch.no_grad():
            prediction = model(ways[name](sample.image[None].to(device, copy=True))).argmax(dim=1)
        scores[name].append(counts.count(prediction.cpu().numpy(), sample.label[None].numpy(), classes))
    return scores


def _against_card(found: list[counts.Counts], expected: Mapping[str, float | None] | None) -> Finding:
    """The clean score, against what the card says; three standard errors of so few images are allowed."""
    merged = counts.merge(found)
    text = f"Clean aAcc {100 * merged.aacc():.1f}, mIoU {100 * merged.miou():.1f} on {len(found)} images"
    known = [name for name in ("aacc", "miou") if expected and expected[name] is not None]
    if not expected or not known:
        return Finding("clean_score", "note", merged.aacc(), f"{text}; no card says what to expect.")
    level = "ok"
    for name in known:
        score, wanted = getattr(merged, name)(), expected[name] or 0.0
        allowed = max(MARGIN, 3 * _standard_error(merged, name))
        label = {"aacc": "aAcc", "miou": "mIoU"}[name]
        text += f"; the card says {label} {100 * wanted:.1f} on all, give or take {100 * allowed:.1f} on so few"
        if score < wanted - allowed:
            level = "fail"
        elif score > wanted + allowed and level == "ok":
            level = "note"
    text += ". Far below: other weights, preprocessing or labels than the card's." if level == "fail" else "."
    return Finding("clean_score", level, merged.aacc(), text)


def _standard_error(found: counts.Counts, metric: str) -> float:
    """Of a pooled score, by leaving out one image after the other (jackknife); large if there is one image only."""
    n = len(found.target)
    if n < 2:
        return 1.0
    rows = np.arange(n)
    scores = [getattr(found.take(rows[rows != left]), metric)() for left in range(n)]
    return float(statistics.pstdev(scores) * (n - 1) ** 0.5)


def _against_variants(scores: Mapping[str, list[counts.Counts]], expected: float | None) -> Finding:
    """Whether the model is good on images that are fed in another way, and worse on those in [0,1]."""
    base = counts.merge(scores["as they are"][:TRIED])
    others = {name: counts.merge(scores[name]) for name in VARIANTS}
    best = max(others, key=lambda name: others[name].aacc())
    trivial = int(base.target.sum(axis=0).max()) / max(int(base.target.sum()), 1)  # one class everywhere
    if others[best].aacc() > base.aacc() + MARGIN:
        pairs = zip(scores[best], scores["as they are"], strict=False)
        always = all(changed.aacc() > plain.aacc() for changed, plain in pairs)
        good = others[best].aacc() > max(trivial + MARGIN, 0.9 * (expected or 0))
        if always and good:
            found = others[best].aacc()
            text = f"aAcc is {100 * base.aacc():.1f} on images in [0,1], but {100 * found:.1f} on images {best}"
            return Finding("input_scaling", "fail", found, f"{text}: {VARIANTS[best][1]}.")
    if base.aacc() <= trivial:
        return Finding(
            "input_scaling", "warning", base.aacc(),
            f"aAcc {100 * base.aacc():.1f} is no better than one class everywhere ({100 * trivial:.1f}), and no usual "
            "way to feed the model explains it: look at weights, labels and the order of the classes.",
        )  # fmt: skip
    return Finding(
        "input_scaling", "ok", base.aacc(), "Images in [0,1] suit the model as well as other ways to feed it."
    )
