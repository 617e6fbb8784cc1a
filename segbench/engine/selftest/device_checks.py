"""Whether this device does what the engine relies on: exact float32, memory that runs out, copies, precisions."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, backends, nn

from segbench.attacks.batch import AttackBatch
from segbench.attacks.evaluator import Evaluator
from segbench.data import load_dataset
from segbench.engine.compute.batch_size import choose_batch_size, free_memory
from segbench.engine.compute.session import open_session
from segbench.engine.compute.stream import run_unit
from segbench.engine.compute.worker import Worker
from segbench.engine.rundir.plan import CHUNK, FinishedUnit, Unit
from segbench.engine.selftest import attack_checks, golden
from segbench.engine.selftest.outcome import DIFFERS, NOT_AVAILABLE, OK, Outcome, at_most
from segbench.errors import RunError
from segbench.models.float32 import HAS_NEW, exact_float32
from segbench.models.load import load_model
from segbench.protocol import SEA_V1

MODEL = "pirat_convnext_mini_shapes"
PROTOCOL = replace(SEA_V1, iterations=6)
ROUNDING = 0.02  # of aAcc: sign attacks turn a different last bit into a different image
SWITCHES: dict[str, Callable[[], None]] = {
    "torch's defaults": lambda: None,
    "set_float32_matmul_precision('high')": lambda: torch.set_float32_matmul_precision("high"),
    "set_float32_matmul_precision('medium')": lambda: torch.set_float32_matmul_precision("medium"),
    "matmul.allow_tf32": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "cudnn.allow_tf32": lambda: setattr(backends.cudnn, "allow_tf32", True),
}
if HAS_NEW:
    SWITCHES["fp32_precision = 'tf32'"] = lambda: setattr(backends, "fp32_precision", "tf32")
    SWITCHES["matmul.fp32_precision = 'tf32'"] = lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32")
    SWITCHES["cudnn.conv.fp32_precision = 'tf32'"] = lambda: setattr(
        backends.cudnn.conv,  # type: ignore[attr-defined]
        "fp32_precision",
        "tf32",
    )


def float32(device: torch.device) -> Outcome:
    """A product of matrices and a convolution in a session, whichever switch of TF32 the caller has set."""
    worst, where, without = 0.0, "", 0.0
    for name, switch in SWITCHES.items():
        with exact_float32(), warnings.catch_warnings():  # the first restores the switches
            warnings.simplefilter("ignore")
            switch()
            without = max(without, _float32_error(device))
            with open_session([], device), backends.cudnn.flags(enabled=True):  # as users' models do
                error = _float32_error(device)
        if error > worst:
            worst, where = error, name
    return at_most(worst, 2e-5, f"largest relative error {worst:.1g} ({where}); {without:.1g} outside a session")


def _float32_error(device: torch.device) -> float:
    """Against float64 on the CPU, relative to the largest value. TF32 has 10 bits: about 5e-4."""
    generator = torch.Generator().manual_seed(0)
    shapes = (((256, 256), (256, 256)), ((2, 64, 16, 16), (64, 64, 3, 3)))
    functions: tuple[Callable[..., Tensor], ...] = (torch.matmul, nn.functional.conv2d)
    errors = []
    for function, (of_a, of_b) in zip(functions, shapes, strict=True):
        a, b = torch.rand(of_a, generator=generator), torch.rand(of_b, generator=generator)
        exact = function(a.double(), b.double())
        found = function(a.to(device), b.to(device)).cpu().double()
        errors.append(float((found - exact).abs().max() / exact.abs().max()))
    return math.inf if any(map(math.isnan, errors)) else max(errors)


@contextmanager
def _worker(device: torch.device, **options: object) -> Iterator[Worker]:
    """The model of the self-test at work on 4 drawn images."""
    data = load_dataset("shapes").first(4)
    worker = Worker(load_model(MODEL), data, PROTOCOL, device, **options)  # type: ignore[arg-type]
    with open_session(worker.models, device):
        yield worker


def _run(worker: Worker) -> FinishedUnit:
    unit = Unit(8.0, "mce_bal", 0, worker.dataset.image_ids)
    return run_unit(worker, unit, list(worker.dataset))


def batch_sizes(device: torch.device) -> Outcome:
    """A unit in batches of 1, of 3, and of as many as fit; on a GPU against the CPU, too."""
    runs: dict[str, FinishedUnit] = {}
    for name, size in (("1", 1), ("3", 3), ("auto", None)):
        with _worker(device, batch_size=size) as worker:
            choose_batch_size(worker)
            runs[f"auto ({worker.batch_size or 'fixed'})" if name == "auto" else name] = _run(worker)
    if device.type != "cpu":
        with _worker(torch.device("cpu")) as worker:
            runs["the CPU"] = _run(worker)
    scores = {name: done.group.counts.aacc() for name, done in runs.items()}
    largest = max(scores.values()) - min(scores.values())
    limit = 0.0 if device.type == "cpu" else ROUNDING
    text = ", ".join(f"{name}: {100 * score:.2f}" for name, score in scores.items())
    return at_most(largest, limit, f"aAcc by batch size {text}")


class _Hungry(nn.Module):
    """Takes ``size`` bytes for each image of a pass while it runs."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        taken = images.new_empty(len(images) * self.size, dtype=torch.uint8)
        logits: Tensor = self.model(images)
        del taken
        return logits


def memory(device: torch.device) -> Outcome:
    """Memory runs out: on a GPU the batch is halved and nothing is lost, on a CPU the run ends with a sentence."""
    if device.type != "cpu":
        return halved_batch(device, free_memory(device))
    with _worker(device) as worker:
        worker.model = _Hungry(worker.model, 1 << 50)  # more than any machine has
        try:
            _run(worker)
        except RunError as error:
            return Outcome(OK, str(error).partition(" (")[0])
    return Outcome(DIFFERS, "a petabyte was allocated")


def halved_batch(device: torch.device, free: int) -> Outcome:
    """Two images that take 30% of the ``free`` memory each fit, four do not."""
    with _worker(device, batch_size=4) as worker:
        expected = _run(worker)
        worker.model = _Hungry(worker.model, int(0.3 * free))
        found = _run(worker)
        size = worker.batch_size
    if size != 2:
        return Outcome(DIFFERS, f"batch size {size}, but 2 images fit")
    difference = abs(found.group.counts.aacc() - expected.group.counts.aacc())
    return at_most(difference, ROUNDING, f"4 images did not fit, 2 did; aAcc differs by {difference:.1g}")


def _precision(device: torch.device, name: str) -> Outcome:
    scores = []
    for precision in ("fp32", name):
        with _worker(device, precision=precision) as worker:
            scores.append(100 * _run(worker).group.counts.aacc())
    text = f"aAcc {scores[0]:.2f} with gradients in fp32, {scores[1]:.2f} in {name}"
    return at_most(abs(scores[1] - scores[0]), 5, text)


def bf16(device: torch.device) -> Outcome:
    """An attack with gradients in bfloat16, scored in float32, against one in float32."""
    return _precision(device, "bf16")


def tf32(device: torch.device) -> Outcome:
    """An attack with gradients in TF32, scored in float32, against one in float32."""
    if device.type != "cuda":
        return Outcome(NOT_AVAILABLE, "needs an NVIDIA GPU")
    return _precision(device, "tf32")


def compilation(device: torch.device) -> Outcome:
    """The pass of an attack, forward and backward, compiled against eager."""
    model, images, labels, weights = golden.problem(device, torch.float32)
    eager, compiled = (
        Evaluator(model, class_weights=weights, size=len(images), compiled=compile_it) for compile_it in (False, True)
    )
    with open_session([model], device):
        expected, found = (
            evaluator(images, evaluator.parts(labels, [("mce_bal", None)]), 1, 1, backward=True).gradient
            for evaluator in (eager, compiled)
        )
    if compiled.compiled is None:
        return Outcome(NOT_AVAILABLE, "torch.compile does not work here (see the warning); runs continue without it")
    assert expected is not None  # they were asked for
    assert found is not None
    difference = float((found - expected).abs().max() / expected.abs().max())
    return at_most(difference, 1e-4, f"largest relative difference of input gradients {difference:.1g}")


def two_devices(device: torch.device) -> Outcome:
    """Attacks on another GPU than the current one, and of one that is not the first."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return Outcome(NOT_AVAILABLE, "needs two GPUs")
    with torch.cuda.device(device):
        here = torch.cuda.current_device()
        other = torch.device("cuda", next(index for index in range(torch.cuda.device_count()) if index != here))
        for check in (pinned_copies, attack_checks.early_stop, attack_checks.golden_attacks):
            found = check(other)
            if found.status != OK:
                return found._replace(detail=f"on {other} while cuda:{here} is the current device: {found.detail}")
    return found._replace(detail=f"{other} while cuda:{here} is the current device: {found.detail}")


def pinned_copies(device: torch.device) -> Outcome:
    """Images read ahead into pinned memory and copied without waiting arrive whole."""
    if device.type != "cuda":
        return Outcome(NOT_AVAILABLE, "needs CUDA")
    data = load_dataset("shapes").first(2 * CHUNK)
    units = [Unit(0.0, "clean", chunk, data.image_ids[CHUNK * chunk :][:CHUNK]) for chunk in range(2)]
    worker = Worker(nn.Identity(), data, PROTOCOL, device)
    wrong = pinned = 0
    with open_session([], device) as session, session.one_stream(worker, units) as images:
        for unit in units:
            samples = images.take(unit)
            copies = [sample.image.to(device, non_blocking=True) for sample in samples]
            for sample, copy in zip(samples, copies, strict=True):
                pinned += sample.image.is_pinned()
                wrong += not torch.equal(copy.cpu(), data[data.image_ids.index(sample.image_id)].image)
    total = len(data)
    return Outcome(OK if not wrong and pinned == total else DIFFERS, f"{total} images, {pinned} pinned, {wrong} wrong")


def speed(device: torch.device) -> Outcome:
    """Images per second of an attack, and of the bare forward pass and input gradient of the same model."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rates: dict[str, list[float]] = {"bare": [], "attack": []}
    with _worker(device) as worker:
        choose_batch_size(worker)
        sample = worker.dataset[0]
        shape = sample.image.shape[-2:]
        size = worker.images_at_once(*shape)
        images = torch.stack([sample.image] * size).to(device)
        batch = AttackBatch(worker.evaluator(*shape))
        batch.add([worker.job(Unit(8.0, "mce_bal", 0, (sample.image_id,)), sample)] * size)

        def bare() -> None:
            x = images.detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.grad(worker.model(x).sum(), x)

        for _ in range(PROTOCOL.iterations):  # the first one warms up
            for name, step in (("bare", bare), ("attack", batch.step)):
                wait()
                started = time.perf_counter()
                step()
                wait()
                rates[name].append(size / (time.perf_counter() - started))
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    ratio = statistics.median(bare / attack for bare, attack in list(zip(*rates.values(), strict=True))[1:])
    text = f"{medians['attack']:.0f} images/s at batch size {size}; bare forward and gradient {medians['bare']:.0f}"
    return Outcome(OK, f"{text}; ratio {ratio:.2f}", ratio)
