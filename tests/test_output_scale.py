"""Outputs that keep the order of the logits but are not logits are reported; honest models are not."""

from __future__ import annotations

import pytest
import torch

import segbench
from segbench.engine.compute.checks import first_images
from segbench.engine.compute.output_scale import LAWS, output_law, output_scale

MINI = [card.id for card in segbench.list_models("*mini*")]
TRANSFORMS = {
    "softmax": (lambda u: u.softmax(dim=1), "probabilities"),
    "cold_softmax": (lambda u: (u / 10).softmax(dim=1), "probabilities"),
    "hot_softmax": (lambda u: (10 * u).softmax(dim=1), "probabilities"),
    "log": (lambda u: u.log_softmax(dim=1), "log_probabilities"),
    "log_of_cold": (lambda u: (u / 100).log_softmax(dim=1), "log_probabilities"),
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "log_sigmoid": (torch.nn.functional.logsigmoid, "log_sigmoid"),
    "min_max": (lambda u: (u - u.amin(1, True)) / (u.amax(1, True) - u.amin(1, True)), "sigmoid"),
    "min_max_of_image": (lambda u: (u - u.amin((1, 2, 3), True)) / (u - u.amin((1, 2, 3), True)).amax((1, 2, 3), True),
                         "sigmoid"),
    "wide_min_max": (lambda u: 9 * u / (u.amax(1, True) - u.amin(1, True)), "one_range"),
    "unit_length": (lambda u: u / u.norm(dim=1, keepdim=True), "unit_length"),
    "length_5": (lambda u: 5 * u / u.norm(dim=1, keepdim=True), "unit_length"),
    "tanh": (torch.tanh, "tanh"),
}  # fmt: skip


@pytest.fixture(scope="module")
def logits() -> dict[str, torch.Tensor]:
    images = first_images(segbench.load_dataset("shapes"), torch.device("cpu"))
    with torch.no_grad():
        return {name: segbench.load_model(name)(images) for name in MINI}


@pytest.mark.parametrize("name", MINI)
def test_logits_of_any_scale_and_offset_are_no_false_alarm(logits, name):
    offset = torch.randn(logits[name][:, :1].shape, generator=torch.Generator().manual_seed(0))
    for factor in (1e-4, 0.01, 1, 30, 1e4):
        assert output_law(logits[name] * factor) is None
        assert output_law(logits[name] * factor + 3 * offset) is None
    assert output_scale(logits[name])["level"] == "ok"


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MINI)
def test_an_output_that_is_not_logits_is_named(logits, name, transform):
    function, law = TRANSFORMS[transform]
    found = output_law(function(logits[name]))
    assert found is LAWS[law]
    flag = output_scale(function(logits[name]))
    assert (flag["level"], flag["value"]) == ("warning", 1.0)
    assert LAWS[law].mend in flag["message"]


@pytest.mark.parametrize("classes", [2, 3, 21, 151])
def test_random_logits_are_no_false_alarm(classes):
    for seed in range(20):
        u = torch.randn(2, classes, 16, 16, generator=torch.Generator().manual_seed(seed))
        for scaled in (u, u / 10, 30 * u, u.relu(), u + 5, u - 5):
            assert output_law(scaled) is None


def test_nearly_the_same_output_everywhere_is_no_law():
    u = torch.tensor([3.0, -1.0, 0.5]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    noise = torch.randn(u.shape, generator=torch.Generator().manual_seed(0))
    assert output_law(u + 1e-5 * noise) is None


def test_logits_that_are_0_or_less_are_no_logarithms():
    u = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(max=0)
    assert output_law(u) is None


def test_two_classes_of_opposite_logits_are_honest():
    u = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert output_law(torch.cat([u, -u], dim=1)) is None
