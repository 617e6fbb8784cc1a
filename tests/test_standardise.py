"""Standardised logits: gradients against autograd, and attacks that no scale of the logits changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import segbench
from segbench import protocol
from segbench.attacks import reference
from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.catalogue import ATTACKS, LARGEST_MARGIN
from segbench.attacks.evaluator import Evaluator
from segbench.attacks.losses import LOSSES, Time
from segbench.attacks.problem import frozen
from segbench.attacks.stages import reduced
from segbench.attacks.standardise import Standardised, standardise
from segbench.attacks.start import random_start
from segbench.attacks.terms import Scratch, logit_gradient, pixel_terms, prepare_targets

EPS = 8 / 255


def every(count: int, margin: float = LARGEST_MARGIN) -> Standardised:
    return Standardised(torch.full((count, 1, 1, 1), margin, dtype=torch.float64), tuple(range(count)))


def drawn(classes: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, classes, 4, 5, generator=generator, dtype=torch.float64).mul_(3)
    labels = torch.randint(0, classes, (3, 4, 5), generator=generator)
    return logits.to(dtype), labels.masked_fill(torch.rand(3, 4, 5, generator=generator) < 0.2, 255)


def plain(logits: Tensor, which: Standardised) -> Tensor:
    """The formula, image by image, for autograd."""
    found = list(logits)
    classes = logits.shape[1]
    for row in which.rows:
        centred = logits[row] - logits[row].mean(dim=0)
        variance = centred.square().mean() if classes == 2 else centred.square().mean(dim=0)
        found[row] = float(which.largest_margin[row]) * (classes - 1) ** 0.5 / classes * centred / variance.sqrt()
    return torch.stack(found)


@given(
    classes=st.sampled_from([2, 3, 8, 21]),
    loss=st.sampled_from(sorted(LOSSES)),
    rows=st.sampled_from([(0, 1, 2), (1,), (0, 2)]),
    margin=st.sampled_from([5.0, 40.0]),
    scratched=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_gradient_is_that_of_autograd_through_the_standardisation(classes, loss, rows, margin, scratched, seed):
    logits, labels = drawn(classes, seed)
    which = Standardised(torch.full((3, 1, 1, 1), margin, dtype=torch.float64), rows)
    options = {"class_weights": torch.rand(classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}
    time, scratch = Time(2, 5), Scratch() if scratched else None
    terms = pixel_terms(logits, prepare_targets(labels, standardised=which, **options), scratch)
    ours = logit_gradient(terms, LOSSES[loss].slope(terms, time), scratch).clone()
    leaf = logits.clone().requires_grad_()
    seen = pixel_terms(plain(leaf, which), prepare_targets(labels, **options))
    (expected,) = torch.autograd.grad(LOSSES[loss].value(seen, time).sum(), leaf)
    assert (ours - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))
    assert torch.equal(terms.predictions, logits.max(dim=1).indices)


@given(classes=st.integers(3, 30), seed=st.integers(0, 2**31))
def test_no_margin_is_above_the_largest_one_and_a_class_that_stands_out_has_it(classes, seed):
    logits, _ = drawn(classes, seed)
    seen = standardise(logits, every(3, 12.0)).logits
    largest = seen.topk(2, dim=1).values
    assert float((largest[:, 0] - largest[:, 1]).max()) <= 12 * (1 + 1e-12)
    alone = torch.zeros(1, classes, 1, 1, dtype=torch.float64)
    alone[0, 0] = 0.001
    seen = standardise(alone, every(1, 12.0)).logits.flatten()
    assert float(seen[0] - seen[1]) == pytest.approx(12.0)


@pytest.mark.parametrize("classes", [2, 3, 7, 8, 150])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e-30, 7e30])
def test_equal_logits_have_no_direction(classes, value):
    """Not even the one that the rounding of their mean would give."""
    logits, labels = torch.full((1, classes, 2, 1), value), torch.zeros(1, 2, 1, dtype=torch.int64)
    terms = pixel_terms(logits, prepare_targets(labels, standardised=every(1)))
    gradient = logit_gradient(terms, torch.ones_like(terms.ce))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_scale_is_too_large_or_too_small(classes, dtype):
    """Images of very different scales in one batch, each seen as it would be alone, bit for bit."""
    logits, _ = drawn(classes, 1, dtype)
    exponents = torch.arange(-90, 91, 90).view(3, 1, 1, 1)  # of the images: with two classes an image has one scale
    seen = standardise(logits * 2.0**exponents, every(3)).logits
    assert torch.equal(seen, standardise(logits, every(3)).logits)
    for row in range(3):
        assert torch.equal(seen[row : row + 1], standardise(logits[row : row + 1], every(1)).logits)
    below = standardise(logits * 2.0**-120, every(3))
    assert float(below.factor.abs().max()) == 0.0 == float(below.logits.abs().max())


class Transformed(nn.Module):
    """A network whose logits are changed without changing their order."""

    def __init__(self, network: nn.Module, transform) -> None:
        super().__init__()
        self.network, self.transform = network, transform

    def forward(self, images: Tensor) -> Tensor:
        return self.transform(self.network(images))


def network(classes: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(classes)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, classes, 3, padding=1))
    return layers.eval().to(dtype)


def attacked(model: nn.Module, loss: str, classes: int, dtype: torch.dtype, iterations: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 8, 9, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, classes, (2, 8, 9), generator=generator)
    starts = random_start(images, eps=2 * EPS, seeds=[1, 2])
    batch = AttackBatch(Evaluator(model, class_weights=torch.full((classes,), 1 / classes)))
    with frozen(model):
        keys = batch.add(
            [
                Job(image, label, loss, EPS, reduced(iterations), start, largest_margin=LARGEST_MARGIN)
                for image, label, start in zip(images, labels, starts, strict=True)
            ]
        )
        found = batch.run()
    return torch.stack([found[key].adversarial for key in keys])


SEA_V2 = ("mce_bal", "mce", "js")
SCALES = {
    "factor": lambda u: 0.037 * u,
    "factor and offset": lambda u: 41 * u + 7,
    "offset of each pixel": lambda u: u + u.detach().square().sum(dim=1, keepdim=True),
    "unit length": lambda u: u / u.norm(dim=1, keepdim=True),
    "min-max": lambda u: (u - u.amin(1, True)) / (u.amax(1, True) - u.amin(1, True)),
    "log_softmax": lambda u: (u / 9).log_softmax(dim=1),
    "of the image": lambda u: u * u.abs().mean(dim=(1, 2, 3), keepdim=True).exp(),
}  # fmt: skip


@pytest.mark.parametrize("loss", SEA_V2)
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_of_each_pixel_changes_nothing_in_float64(loss, scale):
    model = network(5, torch.float64)
    plainly = attacked(model, loss, 5, torch.float64, 5)
    scaled = attacked(Transformed(model, SCALES[scale]), loss, 5, torch.float64, 5)
    assert (plainly - scaled).abs().max() <= 1e-9
    assert (plainly - attacked(model, "ce", 5, torch.float64, 5)).abs().max() > 0  # the attack is not a constant


@pytest.mark.parametrize("scale", ["factor", "factor and offset", "of the image"])
def test_with_two_classes_a_scale_of_each_image_changes_nothing(scale):
    model = network(2, torch.float64)
    plainly = attacked(model, "mce", 2, torch.float64, 5)
    assert (plainly - attacked(Transformed(model, SCALES[scale]), "mce", 2, torch.float64, 5)).abs().max() <= 1e-9


@pytest.mark.parametrize("loss", SEA_V2)
@pytest.mark.parametrize("exponent", [-80, -13, -5, 1, 10, 80])
def test_powers_of_two_give_the_same_images_bit_for_bit_in_float32(loss, exponent):
    model = network(8, torch.float32)
    plainly = attacked(model, loss, 8, torch.float32, 6)
    scaled = attacked(Transformed(model, lambda u: u * 2.0**exponent), loss, 8, torch.float32, 6)
    assert torch.equal(plainly, scaled)


@pytest.mark.parametrize("exponent", [-13, 10])
def test_a_shipped_model_times_a_power_of_two_is_attacked_with_the_same_images(exponent):
    model, data = segbench.load_model("pirat_convnext_mini_shapes"), segbench.load_dataset("shapes").first(2)
    images, labels = (torch.stack([getattr(sample, name) for sample in data]) for name in ("image", "label"))
    found = []
    for each in (model, Transformed(model, lambda u: u * 2.0**exponent)):
        batch = AttackBatch(Evaluator(each))
        with frozen(each):
            jobs = [
                Job(*pair, "mce", EPS, reduced(4), None, False, LARGEST_MARGIN)
                for pair in zip(images, labels, strict=True)
            ]
            keys = batch.add(jobs)
            results = batch.run()
        found.append(torch.stack([results[key].adversarial for key in keys]))
    assert torch.equal(*found)


def test_images_of_both_kinds_share_a_batch_and_a_short_pass_is_filled():
    """An image's result depends on its own job alone."""
    model = network(5, torch.float32)
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.rand(5, 3, 8, 9, generator=generator), torch.randint(0, 5, (5, 8, 9), generator=generator)
    margins = [None, LARGEST_MARGIN, 12.0, None, LARGEST_MARGIN]
    losses = ["mce", "mce", "js", "js", "mce"]
    jobs = [
        Job(image, label, loss, EPS, reduced(6), largest_margin=margin)
        for image, label, loss, margin in zip(images, labels, losses, margins, strict=True)
    ]
    with frozen(model):
        together = AttackBatch(Evaluator(model, size=2, fill=True))
        keys = together.add(jobs)
        found = together.run()
        for key, job in zip(keys, jobs, strict=True):
            alone = AttackBatch(Evaluator(model, size=2, fill=True))
            (own,) = alone.add([job])
            assert torch.equal(alone.run()[own].adversarial, found[key].adversarial)


def test_the_batch_is_the_plain_loop_with_standardised_logits():
    model = network(5, torch.float64)
    image = torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    label = torch.randint(0, 5, (8, 9), generator=torch.Generator().manual_seed(5))
    expected = reference.red_eps_apgd(
        Transformed(model, lambda u: plain(u, every(len(u)))), image, label, eps=EPS, loss="mce", iterations=12
    )
    batch = AttackBatch(Evaluator(model))
    with frozen(model):
        (key,) = batch.add([Job(image, label, "mce", EPS, reduced(12), largest_margin=LARGEST_MARGIN)])
        found = batch.run()[key]
    assert (found.adversarial - expected.adversarial).abs().max() <= 1e-9
    assert found.accuracy == expected.accuracy


def test_the_protocol_is_made_of_attacks_of_the_catalogue():
    attacks = [ATTACKS[name] for name in protocol.SEA_V2.losses]
    assert [attack.loss for attack in attacks] == list(protocol.SEA_V1.losses)
    assert {attack.largest_margin for attack in attacks} == {protocol.SEA_V2.largest_margin}
    assert {attack.passes for attack in attacks} == {ATTACKS[name].passes for name in protocol.SEA_V1.losses}
    assert protocol.SEA_V1.digest() == "8896f131e88bb70fb245d5967a55cea5a561ec4186fd0ee58763496bdf8852a6"


def test_two_entries_may_differ_by_more_than_the_largest_margin():
    """Which is that of the largest entry above the second one, and no bound of the others."""
    logits = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0], dtype=torch.float64).view(1, 5, 1, 1)
    seen = standardise(logits, every(1, 12.0)).logits.flatten()
    assert float(seen[0] - seen[1]) == pytest.approx(12 * (2 * 4 / 5) ** 0.5)
