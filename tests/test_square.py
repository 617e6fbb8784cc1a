"""The square search: no gradients, within the ball, and what masks its gradient falls to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import segbench
from segbench.attacks import apgd, random_start
from segbench.attacks.square import square
from segbench.errors import UsageError
from tests.masked import MASKED

pytestmark = pytest.mark.slow

EPS = 8 / 255


@pytest.fixture(scope="module")
def scenes():
    """Eight images and labels of shapes."""
    samples = list(segbench.load_dataset("shapes").first(8))
    return torch.stack([each.image for each in samples]), torch.stack([each.label for each in samples])


@pytest.fixture(scope="module")
def clean():
    return segbench.load_model("clean_convnext_mini_shapes")


class Seen(nn.Module):
    """Notes how it is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.points: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        self.points.append(x.clone())
        logits: torch.Tensor = self.model(x)
        assert not logits.requires_grad
        return logits


def test_it_needs_no_gradient_and_keeps_the_best_it_saw(scenes, clean):
    images, labels = scenes
    model = Seen(clean)
    found = square(model, images, labels, eps=EPS, queries=40, seeds=range(8))
    assert len(model.points) == 40
    assert found.forwards.tolist() == [40] * 8
    assert not any(values.any() for values in found[5:])
    for point in model.points:
        assert float((point - images).abs().max()) <= EPS + 1e-6
        assert 0 <= point.min() <= point.max() <= 1
    with torch.no_grad():
        right = torch.stack([(clean(point).argmax(1) == labels).flatten(1).double().mean(1) for point in model.points])
    assert torch.equal(found.accuracy, right.min(dim=0).values)
    assert float(found.accuracy.mean()) < float(right[0].mean()) - 0.02  # better than its start
    for image in range(8):
        assert any(torch.equal(found.adversarial[image], point[image]) for point in model.points)


def test_more_queries_find_more(scenes, clean):
    images, labels = scenes
    few, many = (square(clean, images, labels, eps=EPS, queries=n, seeds=range(8)).accuracy.mean() for n in (10, 200))
    assert many < few


def test_each_image_depends_on_its_own_seed_alone():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3, padding=1).double().eval()
    images, labels = torch.rand(5, 3, 12, 10, dtype=torch.float64), torch.randint(0, 4, (5, 12, 10))
    whole = square(model, images, labels, eps=EPS, queries=30, seeds=range(5))
    order = [3, 0, 4]
    part = square(model, images[order], labels[order], eps=EPS, queries=30, seeds=order)
    assert torch.equal(part.adversarial, whole.adversarial[order])
    assert torch.equal(part.accuracy, whole.accuracy[order])
    other = square(model, images, labels, eps=EPS, queries=30, seeds=range(5, 10))
    assert not torch.equal(other.adversarial, whole.adversarial)


class Brightness(nn.Module):
    """The first class where a pixel is not brighter than 1/2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        above = x.mean(1, keepdim=True) - 0.5
        return torch.cat([-above, above], dim=1)


def test_every_pixel_that_can_fall_does_and_then_it_stops():
    images, labels = torch.full((2, 3, 3, 3), 0.5), torch.zeros(2, 3, 3, dtype=torch.int64)
    images[1] -= 2 * EPS  # out of reach
    found = square(Brightness(), images, labels, eps=EPS, queries=500, seeds=[0, 1])
    assert found.accuracy.tolist() == [0, 1]
    assert int(found.forwards[0]) < 500
    assert int(found.forwards[1]) == 500


def test_ignored_pixels_do_not_count(scenes, clean):
    images, labels = scenes
    half = labels.clone()
    half[:, :, 32:] = 255
    found = square(clean, images, half, eps=EPS, queries=20, seeds=range(8))
    with torch.no_grad():
        right = (clean(found.adversarial).argmax(1) == labels)[:, :, :32].flatten(1).double().mean(1)
    assert torch.equal(found.accuracy, right)
    nothing = square(clean, images, torch.full_like(labels, 255), eps=EPS, queries=20, seeds=range(8))
    assert nothing.accuracy.tolist() == [0] * 8
    assert nothing.forwards.tolist() == [1] * 8


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seeds": [1]}, "one seed per image: 8 images, 1 seeds"),
        ({"queries": 0}, "at least 1"),
        ({"eps": 0}, "eps must"),
    ],
)
def test_arguments_out_of_range(scenes, clean, changes, text):
    with pytest.raises(UsageError, match=text):
        square(clean, *scenes, **({"eps": EPS, "queries": 2, "seeds": range(8)} | changes))


@pytest.mark.parametrize("masking", MASKED)
def test_a_masked_gradient_falls_to_the_search_and_not_to_apgd(scenes, clean, masking):
    images, labels = scenes
    model = masking(clean).eval()
    start = random_start(images, eps=EPS, seeds=range(8))
    by_gradient = apgd(model, images, labels, eps=EPS, loss="mce", iterations=30, start=start)
    by_search = square(model, images, labels, eps=EPS, queries=200, seeds=range(8))
    assert float(by_search.accuracy.mean()) < float(by_gradient.accuracy.mean()) - 0.03
    open_gradient = apgd(clean, images, labels, eps=EPS, loss="mce", iterations=30, start=start)
    open_search = square(clean, images, labels, eps=EPS, queries=200, seeds=range(8))
    assert float(open_gradient.accuracy.mean()) < float(open_search.accuracy.mean())
