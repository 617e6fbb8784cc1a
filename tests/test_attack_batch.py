"""A batch that is always full gives each image what a plain loop gives it: bit for bit, whoever shares the batch."""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import segbench
from segbench import attacks
from segbench.attacks import reference
from segbench.attacks.batch import AttackBatch, Job, to_host
from segbench.attacks.evaluator import Evaluator
from segbench.attacks.problem import frozen
from segbench.attacks.stages import Stage, reduced

EPS, ITERATIONS = 6 / 255, 24
LOSSES = ("mce_bal", "mce", "js", "ce", "segpgd", "cospgd", "tsallis")


class PerImage(nn.Module):
    """Sees one image at a time, so that no kernel can round an image by its neighbours."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return torch.cat([self.network(image[None]) for image in images])


@pytest.fixture(scope="module")
def problem():
    """Images, starts, labels of which some are ignored, and three images that fall at once."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 6, 3, padding=1)).eval()
    with torch.no_grad():
        network[2].bias[5] = -20  # never predicted
    images = torch.rand(13, 3, 14, 12)
    model = PerImage(network)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[torch.rand(labels.shape) < 0.3] = 2
    labels[[2, 5, 6]] = 5  # wrong whatever is done
    labels[:, :2] = 255
    starts = attacks.random_start(images, eps=2 * EPS, seeds=range(13))
    weights = torch.arange(1.0, 7.0) / 21
    return model, images, labels, starts, weights


def stream(problem, losses, *, room, lag, seed=0, **evaluator):
    """Attacks all images for each loss in a batch of ``room`` rows into which they come in random order."""
    model, images, labels, starts, weights = problem
    batch = AttackBatch(Evaluator(model, class_weights=weights, **evaluator), lag=lag)
    waiting = [(loss, image) for loss in losses for image in range(len(images))]
    random.Random(seed).shuffle(waiting)
    keys, found, rooms = {}, {}, []
    with frozen(model):
        while waiting or len(batch):
            taken = [waiting.pop() for _ in range(min(room - len(batch), len(waiting)))]
            if taken:
                jobs = [Job(images[i], labels[i], loss, EPS, reduced(ITERATIONS), starts[i]) for loss, i in taken]
                keys |= dict(zip(batch.add(jobs), taken, strict=True))
            rooms.append(len(batch))
            batch.step()
            found |= {keys[key]: result for key, result in batch.finished()}
    return found, rooms


@pytest.fixture(scope="module")
def simple(problem):
    model, images, labels, starts, weights = problem
    return {
        (loss, i): reference.red_eps_apgd(
            model, images[i], labels[i], eps=EPS, loss=loss, iterations=ITERATIONS, start=starts[i],
            class_weights=weights,
        )
        for loss in LOSSES
        for i in range(len(images))
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("room", "lag"), [(1, 0), (4, 0), (5, 2), (13, 1), (40, 0), (64, 3)])
def test_each_image_gets_what_the_plain_loop_gives_it(problem, simple, room, lag):
    found, rooms = stream(problem, LOSSES, room=room, lag=lag)
    assert len(found) == 13 * len(LOSSES)
    for key, result in found.items():
        for ours, theirs in zip(result, simple[key], strict=True):
            assert torch.equal(ours, theirs), key
    if room < 13:
        assert set(rooms[: len(rooms) // 2]) == {room}  # always full while images wait


def test_images_leave_early_and_make_room(problem, simple):
    fallen = [image for image in range(13) if int(simple["mce", image].forwards) == 6]
    assert {2, 5, 6} <= set(fallen)
    _, rooms = stream(problem, ["mce"], room=4, lag=0)
    passes = sum(int(simple["mce", image].forwards) for image in range(13))
    assert sum(rooms) == passes  # not one pass is spent on a finished image
    assert len(rooms) < 1.25 * passes / 4 + ITERATIONS


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_and_neighbours_change_nothing(problem, order):
    one, _ = stream(problem, ["mce_bal", "tsallis"], room=6, lag=1, seed=0)
    other, _ = stream(problem, ["mce_bal", "tsallis"], room=3, lag=0, seed=order)
    for key, result in one.items():
        for a, b in zip(result, other[key], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_passes_in_parts_of_one_shape(problem, simple, size):
    seen = []

    class Watched(PerImage):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    model, *rest = problem
    found, _ = stream((Watched(model.network), *rest), ["js"], room=7, lag=0, size=size, fill=True)
    assert set(seen) == {size}
    for (loss, image), result in found.items():
        assert torch.equal(result.adversarial, simple[loss, image].adversarial)


def test_a_step_that_fails_can_be_repeated(problem, simple):
    """Memory that ends in the middle of a step costs the step, and no image anything."""

    class Short(PerImage):
        calls = 0

        def forward(self, images):
            self.calls += 1
            if self.calls % 5 == 0:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return super().forward(images)

    model, images, labels, starts, weights = problem
    batch = AttackBatch(Evaluator(Short(model.network), class_weights=weights, size=4))
    found, failures = {}, 0
    with frozen(model):
        batch.add(
            [Job(x, y, "mce", EPS, reduced(ITERATIONS), s) for x, y, s in zip(images, labels, starts, strict=True)]
        )
        while len(batch):
            try:
                batch.step()
            except torch.cuda.OutOfMemoryError:
                failures += 1
                batch.evaluator.size = 1 + failures % 4
            found |= dict(batch.finished())
    assert failures > 20
    for image, result in found.items():
        assert torch.equal(result.adversarial, simple["mce", image].adversarial)
        assert int(result.forwards) == int(simple["mce", image].forwards)


def test_a_precision_is_applied_to_passes_alone(problem):
    """bf16 inside the model, float32 outside; the setting is entered around each pass, and left."""
    model, images, labels, _, weights = problem
    depth, seen, dtypes = 0, [], []

    @contextmanager
    def setting():
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model.network

        def forward(self, images):
            seen.append(depth)
            logits = self.network(images)
            dtypes.append(logits.dtype)
            return logits

    evaluate = Evaluator(Watched(), class_weights=weights, autocast=torch.bfloat16, setting=setting)
    now = evaluate(images, evaluate.parts(labels, [("ce", None)]), 1, 1, backward=True)
    assert (seen, depth, dtypes) == ([1], 0, [torch.bfloat16])
    assert now.gradient.dtype == now.tracked.dtype == torch.float32
    plain = Evaluator(model, class_weights=weights)
    exact = plain(images, plain.parts(labels, [("ce", None)]), 1, 1, backward=True)
    assert not torch.equal(now.gradient, exact.gradient)
    cosine = nn.functional.cosine_similarity(now.gradient.flatten(1), exact.gradient.flatten(1))
    assert float(cosine.min()) > 0.9


def test_losses_do_not_mix_in_a_batch(problem):
    """The gradient of each image is that of its own loss, though one pass computes all."""
    model, images, labels, _, weights = problem
    names = ["ce", "js", "mce_bal"]
    evaluate = Evaluator(model, class_weights=weights)
    masks = [(name, (torch.arange(13) % 3 == place).view(-1, 1, 1)) for place, name in enumerate(names)]
    mixed = evaluate(images, evaluate.parts(labels, masks), 1, 1, backward=True).gradient
    for place, name in enumerate(names):
        parts = evaluate.parts(labels[place::3], [(name, None)])
        alone = evaluate(images[place::3], parts, 1, 1, backward=True).gradient
        assert torch.equal(mixed[place::3], alone)


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("backend says no\nand why")


@pytest.mark.parametrize("failing", ["forward", "backward"])
def test_a_model_that_cannot_be_compiled_goes_on_without(problem, caplog, monkeypatch, failing):
    """The backward pass is compiled when it is first needed, after the forward pass has worked."""

    def broken(function, **_):
        def call(*arguments):
            if failing == "forward":
                raise RuntimeError("backend says no\nand why")
            loss, *rest = function(*arguments)
            return _FailsBackward.apply(loss), *rest

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model, images, labels, _, weights = problem
    compiled = Evaluator(model, class_weights=weights, compiled=True)
    plain = Evaluator(model, class_weights=weights)
    for _ in range(2):
        ours, theirs = (f(images, f.parts(labels, [("js", None)]), 1, 1, backward=True) for f in (compiled, plain))
        assert torch.equal(ours.gradient, theirs.gradient)
    assert caplog.text.count("torch.compile fails with this model (RuntimeError: backend says no). Going on") == 1


def test_an_error_of_the_model_itself_does_not_end_compilation(problem, caplog, monkeypatch):
    """Memory that runs out runs out without compilation, too: the ladder tries fewer images, compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    class Short(PerImage):
        def forward(self, images):
            if len(images) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(images)

    model, images, labels, _, weights = problem
    compiled = Evaluator(Short(model.network), class_weights=weights, compiled=True)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(images, compiled.parts(labels, [("js", None)]), 1, 1, backward=True)
    assert compiled.compiled is not None
    compiled.size = 4
    assert compiled(images, compiled.parts(labels, [("js", None)]), 1, 1, backward=True).gradient.shape == images.shape
    assert not caplog.text


def test_stages_of_plain_pgd_have_a_fixed_step():
    images, labels = torch.full((1, 3, 1, 1), 0.5), torch.zeros(1, 1, 1, dtype=torch.int64)
    path = []

    class Linear(nn.Module):
        def forward(self, x):
            path.append(float(x[0, 0, 0, 0].detach()))
            return torch.cat([1e-3 * x.sum(1, keepdim=True) + 1, 0 * x[:, :1]], dim=1)

    attacks.pgd(Linear(), images, labels, eps=0.04, loss="ce", iterations=6, step_size=0.01)
    assert path == pytest.approx([0.5, 0.49, 0.48, 0.47, 0.46, 0.46, 0.46], abs=1e-6)


def test_no_image_at_all():
    images, labels = torch.zeros(0, 3, 4, 4), torch.zeros(0, 4, 4, dtype=torch.int64)
    result = segbench.attacks.apgd(nn.Conv2d(3, 2, 1), images, labels, eps=0.1, loss="ce", iterations=3)
    assert [len(values) for values in result] == [0] * 8


def test_stages_without_iterations_are_passed_over():
    torch.manual_seed(0)
    model, images = nn.Conv2d(3, 2, 1).eval(), torch.rand(2, 3, 4, 4)
    labels = model(images).argmax(1)
    batch = AttackBatch(Evaluator(model))
    with frozen(model):
        keys = batch.add(
            [Job(x, y, "ce", 0.01, (Stage(2.0, 0), Stage(1.0, 2))) for x, y in zip(images, labels, strict=True)]
        )
        steps = 0
        while len(batch):
            batch.step()
            steps += 1
            done = batch.finished()
    assert steps == 3
    assert sorted(key for key, _ in done) == keys


@pytest.mark.parametrize("failing", range(1, 14))
def test_images_that_were_not_taken_in_can_be_taken_in_again(problem, monkeypatch, failing):
    """Memory runs out at any place of `add`: nothing has changed, and the same images find the same."""
    model, images, labels, starts, weights = problem

    def found(calls):
        batch, results = AttackBatch(Evaluator(model, class_weights=weights)), {}
        jobs = [Job(x, y, "mce", EPS, (Stage(1.0, 3),), s) for x, y, s in zip(images, labels, starts, strict=True)]
        more = [job._replace(stages=reduced(10), loss="js") for job in jobs]
        with frozen(model):
            keys = batch.add(jobs[:4])
            while len(batch) == 4:  # until there are rows to be used again
                batch.step()
                results |= dict(batch.finished())
            with monkeypatch.context() as patch:
                for name in ("cat", "stack"):
                    patch.setattr(torch, name, counted(getattr(torch, name), calls))
                try:
                    added = batch.add(more[:9])
                except torch.OutOfMemoryError:
                    patch.undo()
                    added = batch.add(more[:9])
            results |= batch.run()
        return [results[key] for key in [*keys, *added]]

    def counted(function, calls):
        def call(*arguments, **options):
            calls.append(name := function)
            if len(calls) == failing and calls[0] is not None:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return name(*arguments, **options)

        return call

    for ours, theirs in zip(found([]), found([None] * 100), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_memory_that_runs_out_in_a_compiled_pass_is_not_the_compilers_fault(problem, caplog, monkeypatch):
    def hungry(function, **_):
        return lambda *arguments: (_ for _ in ()).throw(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))

    monkeypatch.setattr(torch, "compile", hungry)
    model, images, labels, _, weights = problem
    compiled = Evaluator(model, class_weights=weights, compiled=True)
    with pytest.raises(RuntimeError, match="CUBLAS"):
        compiled(images, compiled.parts(labels, [("js", None)]), 1, 1, backward=True)
    assert compiled.compiled is not None
    assert not caplog.text


class TwoGpus:
    """The order of work on two GPUs: each stream does what it was sent when somebody waits for it, and not before.

    Stands in for ``torch.cuda`` and for the tensors of flags; ``cuda:0`` is the current device.
    """

    def __init__(self):
        self.sent = {index: [] for index in range(2)}

    def current_stream(self, device=None):
        return 0 if device is None else torch.device(device).index

    def event(self):
        return TwoGpus.Event(self)

    class Event:
        def __init__(self, gpus):
            self.gpus, self.stream, self.length = gpus, None, 0

        def record(self, stream=None):
            self.stream = self.gpus.current_stream() if stream is None else stream
            self.length = len(self.gpus.sent[self.stream])

        def synchronize(self):
            for work in self.gpus.sent[self.stream][: self.length]:
                work()

    class Flags:
        is_cuda = True

        def __init__(self, values, index):
            self.values, self.device, self.shape = torch.tensor(values), torch.device("cuda", index), (len(values),)

    class Host(torch.Tensor):
        gpus = None

        def copy_(self, flags, non_blocking=False):
            assert non_blocking
            TwoGpus.Host.gpus.sent[flags.device.index].append(lambda: torch.Tensor.copy_(self, flags.values))
            return self


@pytest.mark.parametrize("index", [0, 1])
def test_flags_are_read_when_they_have_arrived_from_any_device(monkeypatch, index):
    """On the second GPU the event must be recorded on the stream that copies, not on that of the first GPU."""
    gpus, empty = TwoGpus(), torch.empty
    monkeypatch.setattr(TwoGpus.Host, "gpus", gpus)
    monkeypatch.setattr(torch.cuda, "Event", gpus.event)
    monkeypatch.setattr(torch.cuda, "current_stream", gpus.current_stream)

    def pinned(shape, dtype, pin_memory):
        assert pin_memory
        return empty(shape, dtype=dtype).fill_(False).as_subclass(TwoGpus.Host)

    monkeypatch.setattr(torch, "empty", pinned)
    host, event = to_host(TwoGpus.Flags([True, False, True], index))
    assert host.tolist() == [False, False, False]  # not there yet
    event.synchronize()
    assert host.tolist() == [True, False, True]
