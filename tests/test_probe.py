"""What the probe of a model refuses before the first attack, and what no model can do to the images that are scored."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import segbench
from segbench import attacks
from segbench.attacks import reference
from segbench.attacks.memory import is_out_of_memory
from segbench.attacks.square import square
from segbench.engine.compute.checks import batch_dependence, probe, works_in
from segbench.engine.compute.session import open_session
from segbench.engine.compute.worker import Worker
from segbench.errors import ModelError
from segbench.protocol import SEA_V1

K = 8  # classes of shapes


class Fed(nn.Module):
    """A convolution of changed images."""

    def __init__(self, change) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.change = nn.Conv2d(3, K, 3, padding=1), change

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.change(x))


def channel(x: Tensor) -> Tensor:
    x[:, 0] -= 0.4
    return x


def only_with_gradient(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.data.mul_(0.5)
    return x


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.clamp_(0.3, 0.6)
    return x


IN_PLACE = {  # what autograd refuses
    "sub_": lambda x: x.sub_(0.4),
    "div_": lambda x: x.div_(0.2),
    "a channel": channel,
    "relu": nn.ReLU(inplace=True),
}
HIDDEN = {  # what it does not see
    "data": lambda x: x.data.clamp_(0.3, 0.6) * 0 + x,
    "detach": lambda x: x.detach().mul_(0.9) * 0 + x,
    "no_grad": under_no_grad,
    "with gradient": only_with_gradient,
}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels(images) -> Tensor:
    return Fed(lambda x: x)(images).argmax(dim=1)


@pytest.mark.parametrize("name", IN_PLACE | HIDDEN)
def test_a_model_that_writes_into_its_images_is_refused_by_that_name(name, images):
    before = images.clone()
    with pytest.raises(ModelError, match=r"writes into the images.*x = x - mean"):
        probe(Fed((IN_PLACE | HIDDEN)[name]), images, K, was_training=False)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", IN_PLACE)
def test_the_attacks_name_it_too(name, images, labels):
    model = Fed(IN_PLACE[name])
    for call in (
        lambda: attacks.apgd(model, images, labels, eps=0.1, loss="ce", iterations=2),
        lambda: reference.apgd(model, images[0], labels[0], eps=0.1, loss="ce", iterations=2),
    ):
        with pytest.raises(ModelError, match="writes into the images"):
            call()


@pytest.mark.parametrize("name", HIDDEN)
def test_the_attacks_stay_in_the_ball_whatever_the_model_writes(name, images, labels):
    model, before = Fed(HIDDEN[name]), images.clone()
    found = attacks.red_eps_apgd(model, images, labels, eps=0.1, loss="ce", iterations=4)
    alone = reference.apgd(model, images[0], labels[0], eps=0.1, loss="ce", iterations=4)
    searched = square(model, images, labels, eps=0.1, queries=4, seeds=[0, 1])
    for point, image in ((found.adversarial, images), (alone.adversarial, images[0]), (searched.adversarial, images)):
        assert 0 < float((point - image).abs().max()) <= 0.1 + 1e-6
    assert torch.equal(images, before)


def test_scoring_hands_out_copies():
    """A model may begin to write long after the probe. Batches of large images are not filled up, which would copy."""
    data = segbench.load_dataset("shapes").first(2)
    worker = Worker(Fed(lambda x: x.mul_(0)), data, SEA_V1, torch.device("cpu"))
    points = torch.rand(2, 3, 256, 256)
    before = points.clone()
    worker.predict(points)
    assert torch.equal(points, before)


MIXING = {
    "mean": lambda x: x - 0.3 * x.mean(dim=0, keepdim=True),
    "batch norm": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "mean and deviation of all": lambda x: (x - x.mean()) / x.std(),
    "the first of the batch": lambda x: x - 0.3 * x[:1].mean(),
    "the last of the batch": lambda x: x - 0.3 * x[-1:].mean(),
    "NaN beside another": lambda x: x if len(x) == 1 else x / (x.mean() - x.mean()),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("value", [None, 0.0, 0.5, 1.0])
def test_a_model_that_mixes_images_is_refused_with_one_image_of_that_size(name, value, images):
    one = images[:1] if value is None else torch.full_like(images[:1], value)
    if name == "mean and deviation of all":
        one = one + 0.01 * images[:1]  # of one colour the deviation is 0
    difference, allowed = batch_dependence(Fed(MIXING[name]), one)
    assert difference > 2 * allowed
    if value is None and not name.startswith("NaN"):
        with pytest.raises(ModelError, match="mixes the images of a batch"):
            probe(Fed(MIXING[name]), one, K, was_training=False)


def test_it_is_refused_where_the_first_two_images_differ_in_size(tmp_path):
    data = segbench.load_dataset("shapes").first(3)

    def read(image_id):
        pixels, labels = data.read(image_id)
        return (pixels[:48], labels[:48]) if image_id == data.image_ids[0] else (pixels, labels)

    uneven, model = replace(data, read=read), Fed(MIXING["mean"])
    with pytest.raises(ModelError, match="mixes the images of a batch"):
        segbench.evaluate(model, uneven, eps=4, out=tmp_path / "run", progress=False, device="cpu")
    with pytest.raises(ModelError, match="mixes the images of a batch"):
        segbench.check_model(model, uneven, progress=False, device="cpu")


def test_what_keeps_images_apart_passes(images):
    for change in (lambda x: x, lambda x: x - x.mean(dim=(1, 2, 3), keepdim=True), lambda x: x.clone().sub_(0.4)):
        assert {flag["level"] for flag in probe(Fed(change), images, K, was_training=False).flags} == {"ok"}


def test_the_sample_that_identifies_a_run_is_of_the_images_that_are_given(images):
    """Run directories hold it: it must not depend on what else the probe looks at."""
    model = Fed(lambda x: x)
    x = images.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    expected = [
        float(values.detach().double().flatten()[place])
        for values in (logits, gradient)
        for place in torch.linspace(0, values.numel() - 1, 64, dtype=torch.float64).long()
    ]
    assert probe(model, images, K, was_training=False).sample == expected


def test_other_operations_in_place_are_told_apart(images):
    def twice(x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        y.add_(1)  # the gradient of the sigmoid needs what is overwritten here
        return y

    with pytest.raises(ModelError, match="Replace the operation that changes a tensor in place"):
        probe(Fed(twice), images, K, was_training=False)


class Idle(Fed):
    """Its eval() does nothing, so that batch norm and dropout would stay as in training."""

    def __init__(self) -> None:
        super().__init__(lambda x: x)
        self.norm, self.drop = nn.BatchNorm2d(K), nn.Dropout(0.5)

    def eval(self):
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.conv(x)))


def test_a_model_whose_eval_does_nothing_is_put_in_eval_mode(images):
    model = Idle().train()
    before = model.norm.running_mean.clone()
    with open_session([model], torch.device("cpu")) as session:
        assert not any(part.training for part in model.modules())
        found = probe(model, images, K, was_training=session.was_training[0])
    assert {flag["name"]: flag["level"] for flag in found.flags} == {
        "deterministic": "ok",
        "output_scale": "ok",
        "eval_mode": "note",
    }
    assert torch.equal(model.norm.running_mean, before)
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize(
    "draws", [lambda: torch.randn(()), lambda: torch.rand(1, 1, 1, 1)], ids=["one number", "one for all"]
)
def test_a_model_that_draws_and_mixes_is_refused_too(images, draws):
    with pytest.raises(ModelError, match="mixes the images of a batch"):
        probe(Fed(lambda x: x - x.mean(0) + 1e-2 * draws()), images, K, was_training=False)
    probe(Fed(lambda x: x + 1e-2 * draws()), images, K, was_training=False)
    probe(Fed(nn.Dropout(0.5)), images, K, was_training=False)


def test_draws_that_no_seed_governs_are_not_taken_for_mixing(images):
    generator = torch.Generator()
    probe(Fed(lambda x: x + torch.rand(x.shape, generator=generator)), images, K, was_training=False)


def test_memory_that_runs_out_is_not_the_models_fault(images):
    def short(x: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    class Once(Fed):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) if self.calls < 3 else short(x)

    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        probe(Fed(short), images, K, was_training=False)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        works_in(Once(lambda x: x), images, torch.channels_last)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("view size is not compatible"))


def test_the_order_of_images_is_tried_both_ways(images):
    """A model that sorts its batch by brightness mixes nothing where the images come in that order."""

    class Sorting(Fed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[x.mean((1, 2, 3)).argsort()]

    for dark in (images, 1 - images):
        with pytest.raises(ModelError, match="mixes the images"):
            probe(Sorting(lambda x: x), dark, K, was_training=False)


def test_a_buffer_that_is_used_again_is_no_mixing(images):
    class Buffered(Fed):
        def __init__(self) -> None:
            super().__init__(lambda x: x)
            self.out = torch.zeros(2, K, 16, 16)

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return super().forward(x)
            return self.out[: len(x)].copy_(super().forward(x))

    probe(Buffered(), images, K, was_training=False)


@pytest.mark.slow
def test_a_model_exported_for_one_shape_is_told_how_to_export_it():
    program = torch.export.export(nn.Conv2d(3, K, 1).eval(), (torch.rand(1, 3, 16, 16),))
    with pytest.raises(ModelError, match=r"exported for one shape.*dynamic_shapes=\(\{0: Dim.AUTO"):
        probe(program.module(), torch.rand(2, 3, 16, 16), K, was_training=False)
    shapes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(nn.Conv2d(3, K, 1).eval(), (torch.rand(2, 3, 16, 16),), dynamic_shapes=(shapes,))
    probe(program.module(), torch.rand(2, 3, 16, 16), K, was_training=False)


def test_draws_of_other_libraries_are_not_taken_for_mixing(images):
    """A harmless defence that flips a coin, of Python or of NumPy."""

    def flipping(coin):
        return Fed(lambda x: x.flip(-1) if coin() else x)

    models = [flipping(coin) for coin in (lambda: random.random() < 0.5, lambda: np.random.rand() < 0.5)]
    state = random.getstate(), torch.get_rng_state()
    for _ in range(20):
        for model in models:
            probe(model, images, K, was_training=False)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_parts_that_a_users_train_keeps_in_training_mode_stay(caplog):
    """Dropout that is on at test time, too: it is the user's model."""

    class Always(nn.Sequential):
        def train(self, mode: bool = True):
            super().train(mode)
            self[1].training = True
            return self

    model = Always(nn.Conv2d(3, K, 1), nn.Dropout(0.5)).train()
    with open_session([model], torch.device("cpu")):
        assert [part.training for part in model.modules()] == [False, False, True]
    assert "1 parts of the model stay in training mode after eval(), the first is Dropout" in caplog.text
