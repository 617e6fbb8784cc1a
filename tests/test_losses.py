"""Losses against golden vectors, their definitions by hand, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segbench.attacks import losses
from segbench.attacks.losses import LOSSES, Time, get_loss
from segbench.attacks.terms import Scratch, logit_gradient, pixel_terms, predict, prepare_targets
from segbench.errors import UsageError


@pytest.mark.parametrize("name", ["ce", "mce", "mce_bal", "js"])
def test_values_and_gradients_equal_the_golden_ones(golden, name):
    data = golden("losses")
    logits = torch.from_numpy(data["logits"]).requires_grad_()
    labels = torch.from_numpy(data["labels"])
    arguments = {"class_weights": torch.from_numpy(data["class_weights"])} if name == "mce_bal" else {}
    values = getattr(losses, name)(logits, labels, **arguments)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    torch.testing.assert_close(values, torch.from_numpy(data[f"value_{name}"]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, torch.from_numpy(data[f"grad_{name}"]), rtol=1e-10, atol=1e-10)


def by_hand(name, u, y, t=1, T=1):
    """One pixel's loss from its definition in SEA.md, section 2, in plain Python."""
    exps = [math.exp(v) for v in u]
    p = [e / sum(exps) for e in exps]
    ce = -math.log(p[y])
    correct = max(range(len(u)), key=lambda k: u[k]) == y
    if name == "ce":
        return ce
    if name == "mce":
        return ce if correct else 0.0
    if name == "js_target":
        return -by_hand("js", u, y)
    if name == "js":
        e = [float(k == y) for k in range(len(u))]
        m = [(a + b) / 2 for a, b in zip(p, e, strict=True)]
        kl = lambda a, b: sum(x * math.log(x / z) for x, z in zip(a, b, strict=True) if x > 0)  # noqa: E731
        return 0.5 * kl(p, m) + 0.5 * kl(e, m)
    if name == "segpgd":
        share = (t - 1) / (2 * T)
        return (1 - share if correct else share) * ce
    if name == "cospgd":
        return p[y] / math.sqrt(sum(v * v for v in p)) * ce
    q = -2 + 3 * (t - 1) / (T - 1)
    return ce if q == 1 else (1 - p[y] ** (1 - q)) / (1 - q)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["ce", "mce", "js", "segpgd", "cospgd", "tsallis", "js_target"]),
    st.lists(st.lists(st.floats(-8, 8), min_size=3, max_size=3), min_size=4, max_size=4),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.integers(1, 5),
)
def test_losses_equal_their_definitions_on_2x2_images(name, pixels, labels, step):
    logits = torch.tensor(pixels, dtype=torch.float64).T.reshape(1, 3, 2, 2)
    terms = pixel_terms(logits, prepare_targets(torch.tensor(labels).reshape(1, 2, 2)))
    values = LOSSES[name].value(terms, Time(step, 5)).flatten().tolist()
    expected = [by_hand(name, u, y, step, 5) for u, y in zip(pixels, labels, strict=True)]
    assert values == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_raising_the_targeted_loss_raises_the_probability_of_the_target():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.full((2, 3, 3), 2)
    targets[0, 0] = 255
    values = losses.js_target(logits, targets)
    assert (values <= 0).all()
    assert values[0, 0].tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    before, after = (x.softmax(1)[:, 2] for x in (logits.detach(), logits.detach() + 0.01 * gradient))
    valid = targets != 255
    assert (after[valid] > before[valid]).all()
    assert (gradient.movedim(1, -1)[~valid] == 0).all()


def test_js_is_finite_and_correct_at_any_logit_gap():
    gaps = torch.tensor([0.0, 50.0, 103.0, 200.0, 1e4, 1e30])
    logits = torch.stack([torch.zeros_like(gaps), gaps])[None, :, None, :].requires_grad_()
    values = losses.js(logits, torch.zeros(1, 1, 6, dtype=torch.long))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()
    assert values[0, 0, 2:].tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)


def test_cospgd_has_no_gradient_through_its_weight():
    logits = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (2, 3, 4))
    (gradient,) = torch.autograd.grad(losses.cospgd(logits, labels).sum(), logits)
    weight = (losses.cospgd(logits, labels) / losses.ce(logits, labels)).detach()
    (expected,) = torch.autograd.grad((weight * losses.ce(logits, labels)).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_tsallis_at_one_is_cross_entropy_and_segpgd_begins_as_it_masked():
    logits, labels = torch.randn(1, 4, 5, 5, dtype=torch.float64), torch.randint(4, (1, 5, 5))
    torch.testing.assert_close(losses.tsallis(logits, labels, q=1.0), losses.ce(logits, labels))
    torch.testing.assert_close(
        losses.tsallis(logits, labels, q=1 - 1e-9), losses.ce(logits, labels), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(losses.segpgd(logits, labels, step=1, iterations=9), losses.mce(logits, labels))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ignore_index", [255, -1])
def test_ignored_pixels_have_no_value_and_no_gradient(name, ignore_index):
    logits = torch.randn(2, 4, 6, 6, requires_grad=True)
    labels = torch.randint(4, (2, 6, 6))
    ignored = torch.rand(2, 6, 6) < 0.5
    labels[ignored] = ignore_index
    targets = prepare_targets(labels, ignore_index=ignore_index, class_weights=torch.full((4,), 0.25))
    terms = pixel_terms(logits, targets)
    values = get_loss(name).value(terms, Time(2, 5))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert (values[ignored] == 0).all()
    assert (gradient.permute(0, 2, 3, 1)[ignored] == 0).all()
    assert not terms.correct[ignored].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype(dtype):
    logits, labels = torch.randn(1, 4, 5, 5).to(dtype), torch.randint(4, (1, 5, 5))
    torch.testing.assert_close(
        losses.js(logits, labels).double(), losses.js(logits.double(), labels), rtol=1e-4, atol=1e-5
    )


def test_missing_weights_and_unknown_loss_are_said():
    with pytest.raises(UsageError, match="needs class_weights"):
        get_loss("mce_bal").slope(
            pixel_terms(torch.zeros(1, 2, 1, 1), prepare_targets(torch.zeros(1, 1, 1, dtype=torch.long))), Time(1, 1)
        )
    with pytest.raises(UsageError, match="Did you mean 'mce'"):
        get_loss("mcee")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(LOSSES)),
    st.integers(1, 3),
    st.integers(2, 7),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.floats(0, 1),
    st.integers(1, 5),
    st.sampled_from([1e-4, 1.0, 30.0]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_gradient_in_closed_form_is_that_of_autograd(name, n, k, dtype, ignored, step, scale, in_scratch, seed):
    """In float64 to 1e-10; with and without memory that was used before; in channels_last too."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(n, k, 4, 5, dtype=torch.float64, generator=generator)).to(dtype)
    if seed % 2:
        logits = logits.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(k, (n, 4, 5), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    weights = torch.rand(k, dtype=torch.float64, generator=generator)
    targets, time, scratch = prepare_targets(labels, class_weights=weights), Time(step, 5), None
    if in_scratch:  # used for other logits with the same labels
        scratch = Scratch()
        terms = pixel_terms(torch.randn(logits.shape, generator=generator).to(dtype), targets, scratch)
        logit_gradient(terms, torch.ones_like(terms.ce), scratch)
    terms = pixel_terms(logits, targets, scratch)
    ours = logit_gradient(terms, get_loss(name).slope(terms, time), scratch)

    leaf = logits.double().requires_grad_()
    (expected,) = torch.autograd.grad(get_loss(name).value(pixel_terms(leaf, targets), time).sum(), leaf)
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)
    assert (ours.movedim(1, -1)[labels == 255] == 0).all()


@pytest.mark.parametrize("name", ["ce", "mce", "mce_bal", "segpgd", "cospgd"])
def test_the_gradient_in_closed_form_has_the_bits_of_autograd_where_the_slope_is_exact(name):
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 6, 9, 7)).requires_grad_()
    labels = torch.randint(6, (2, 9, 7))
    labels[0, :3] = 255
    targets, time = prepare_targets(labels, class_weights=torch.rand(6)), Time(2, 5)
    (expected,) = torch.autograd.grad(get_loss(name).value(pixel_terms(logits, targets), time).sum(), logits)
    terms = pixel_terms(logits.detach(), targets)
    assert torch.equal(logit_gradient(terms, get_loss(name).slope(terms, time)), expected)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_predictions_are_the_first_of_the_largest(classes, seed, dtype):
    """Many ties, infinities and NaN; as `torch.max` finds them one pixel after the other."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 3, (2, classes, 3, 4), generator=generator).to(dtype)
    for value in (math.inf, -math.inf, math.nan):
        logits[torch.rand(logits.shape, generator=generator) < 0.02] = value
    expected = logits.max(dim=1).indices
    assert torch.equal(predict(logits)[1], expected)
    scratch = Scratch()
    for _ in range(2):
        assert torch.equal(predict(logits, scratch)[1], expected)
