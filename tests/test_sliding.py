"""Sliding windows: exact against plain loops and closed forms, every pixel covered, memory bounded."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import segbench
from segbench.errors import ModelError, UsageError
from segbench.models import SlidingWindow
from segbench.models.sliding import in_windows, starts


@given(st.integers(1, 300), st.integers(1, 80), st.data())
def test_windows_cover_every_pixel_and_stay_inside(side, window, data):
    stride = data.draw(st.integers(1, window))
    found = starts(side, window, stride)
    assert found == sorted(set(found))
    assert found[0] == 0
    assert found[-1] == max(0, side - window)
    covered = np.zeros(side, bool)
    for start in found:
        covered[start : start + window] = True
    assert covered.all()
    assert all(second - first <= stride for first, second in itertools.pairwise(found))


def network(seed: int = 0) -> nn.Module:
    """Sees neighbours, so that windows matter."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 5, 3, padding=1)]
    return nn.Sequential(*layers).double().eval()


def plain(model: nn.Module, images: torch.Tensor, window: tuple[int, int], stride: tuple[int, int]) -> torch.Tensor:
    """The same, written pixel by pixel: the mean over all windows that hold a pixel."""
    n, _, height, width = images.shape
    outputs = {}
    for top in starts(height, window[0], stride[0]):
        for left in starts(width, window[1], stride[1]):
            outputs[top, left] = model(images[:, :, top : top + window[0], left : left + window[1]])
    rows = []
    for y in range(height):
        for x in range(width):
            here = [
                logits[:, :, y - top, x - left]
                for (top, left), logits in outputs.items()
                if top <= y < top + window[0] and left <= x < left + window[1]
            ]
            rows.append(torch.stack(here).mean(0))
    return torch.stack(rows, -1).reshape(n, -1, height, width)


@pytest.mark.parametrize(
    ("size", "window", "stride"), [((9, 13), (4, 6), (3, 4)), ((8, 8), (4, 4), (4, 4)), ((5, 20), (8, 7), (5, 7))]
)
def test_logits_and_gradients_equal_a_plain_loop(size, window, stride):
    model = network()
    images = torch.rand(2, 3, *size, dtype=torch.float64, requires_grad=True)
    found, expected = SlidingWindow(model, window, stride)(images), plain(model, images, window, stride)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.rand_like(found)
    wanted = [images, *model.parameters()]
    for a, b in zip(
        torch.autograd.grad(found, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(SlidingWindow(model, window, stride)(images), expected, rtol=0, atol=1e-12)


def test_a_model_without_neighbourhood_does_not_notice_windows():
    model = nn.Conv2d(3, 4, 1).double()
    images = torch.rand(1, 3, 17, 23, dtype=torch.float64)
    torch.testing.assert_close(SlidingWindow(model, (6, 5), (4, 5))(images), model(images), rtol=0, atol=1e-14)


def test_a_picture_that_fits_is_fed_whole():
    model, images = network(), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(SlidingWindow(model, (8, 16), (8, 8))(images), model(images))


class Held(nn.Module):
    """Counts how many of its own activations are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 2, 3, padding=1)
        self.alive, self.most = 0, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.first(images))
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(hidden, self.gone)
        return self.last(hidden)

    def gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("columns", [2, 12])
def test_the_activations_of_one_window_are_held_at_a_time(columns):
    model, images = Held(), torch.rand(1, 3, 16, 16 * columns, requires_grad=True)
    SlidingWindow(model, (16, 16), (16, 16))(images).sum().backward()
    assert model.most == 1
    kept = [model(window) for window in images.detach().requires_grad_().split(16, dim=-1)]
    assert model.most == columns  # what is counted: without the wrapper all are held until the backward pass
    assert len(kept) == columns


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            lambda x: x.mean((2, 3), keepdim=True),
            r"returns \(1, 3, 1, 1\) for images .*needed are logits \(1, K, 4, 4\)",
        ),
        (lambda x: x[:, :, ::2, ::2], r"returns \(1, 3, 2, 2\)"),
        (lambda x: (x,), "returns tuple, not a tensor of logits"),
    ],
)
def test_outputs_that_are_not_at_the_size_of_the_window_are_refused(output, said):
    class Model(nn.Module):
        def forward(self, images):
            return output(images)

    with pytest.raises(ModelError, match=said):
        SlidingWindow(Model(), (4, 4), (4, 4))(torch.rand(1, 3, 8, 8))


def test_logits_are_averaged_in_the_precision_of_the_images():
    model, images = nn.Conv2d(3, 4, 1), torch.rand(1, 3, 24, 24)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = SlidingWindow(model, (8, 8), (1, 1))(images)
        expected = model(images).float()
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-6


def test_impossible_windows_are_refused():
    for window, stride in (((4, 4), (5, 4)), ((4, 4), (4, 0)), ((0, 4), (0, 4))):
        with pytest.raises(UsageError, match="strides must be from 1 up to the side"):
            SlidingWindow(network(), window, stride)


def test_moving_and_modes_reach_the_model():
    model = network()
    wrapped = SlidingWindow(model, (4, 4), (2, 2))
    assert not wrapped.training
    assert next(wrapped.float().parameters()).dtype == torch.float32
    assert "window=(4, 4), stride=(2, 2)" in repr(wrapped)


def described(root, text):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (20, 27, 3), np.uint8)).save(root / "images" / f"{number}.png")
        Image.fromarray(rng.integers(0, 3, (20, 27)).astype(np.uint8)).save(root / "masks" / f"{number}.png")
    (root / "dataset.yaml").write_text(f"classes: [a, b, c]\n{text}")
    return root


def test_a_declared_window_is_used_and_belongs_to_the_identity(tmp_path):
    plain_root = described(tmp_path / "plain", "")
    root = described(tmp_path / "windows", "window: {size: [16, 16], stride: [16, 16]}\n")
    data, whole = segbench.load_dataset("folder", root), segbench.load_dataset("folder", plain_root)
    assert data.preprocessing == "as stored; windows 16x16, stride 16x16"
    assert data.fingerprint() != whole.fingerprint()
    model = nn.Conv2d(3, 3, 5, padding=2)
    fed = in_windows(model, data)
    assert isinstance(fed, SlidingWindow)
    assert in_windows(model, whole) is model
    options = {"eps": 4, "iterations": 2, "progress": False}
    entries = [
        segbench.evaluate(model, each, out=tmp_path / f"run{number}", **options).entry()
        for number, each in enumerate((data, whole))
    ]
    assert entries[0]["dataset"]["preprocessing"].endswith("windows 16x16, stride 16x16")
    expected = segbench.evaluate(fed, whole, out=tmp_path / "by hand", **options).entry()
    assert entries[0]["results"] == expected["results"]
    assert entries[0]["clean"] == expected["clean"] != entries[1]["clean"]
