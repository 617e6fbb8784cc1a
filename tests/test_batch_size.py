"""How many images fit at once: found by trying, remembered, and never a reason to fail."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import segbench
from segbench.data import SegmentationDataset
from segbench.engine.compute import batch_size
from segbench.engine.compute.batch_size import LARGEST, find_batch_size, fits, largest_fitting
from segbench.engine.compute.worker import Worker
from segbench.protocol import SEA_V1

LADDER = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]


class Narrow(nn.Module):
    """Runs out of memory above a number of images."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.most, self.error, self.seen = most, error, list[int]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(images))
        if len(images) > self.most:
            raise self.error
        return self.conv(images)


class Free(Worker):
    """Without the fixed shape of batches that a CPU has, as on a GPU."""

    fixed_shape = False


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.fixture
def data() -> SegmentationDataset:
    return segbench.load_dataset("shapes").first(2)


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGBENCH_CACHE", str(tmp_path / "cache"))


def worker(data: SegmentationDataset, most: int, error: Exception = OUT, **options) -> Free:
    return Free(Narrow(most, error).eval(), data, SEA_V1, torch.device("cpu"), **options)


@given(st.integers(1, 1000))
def test_the_largest_of_the_ladder_that_fits_is_found(most):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= most

    found = largest_fitting(fits)
    assert found == max(size for size in LADDER if size <= most)
    assert len(tried) <= 9
    assert max(tried, default=1) <= LARGEST


@pytest.mark.parametrize("most", [1, 3, 5, 16])
def test_it_is_found_by_attacks_that_run_out_of_memory(data, most):
    own = worker(data, most)
    assert find_batch_size(own) == max(size for size in LADDER if size <= most)
    assert max(own.model.seen) > most
    assert all(parameter.grad is None for parameter in own.model.parameters())


def test_it_is_remembered_for_the_model_the_size_and_the_precision(data):
    assert find_batch_size(worker(data, 3)) == 3
    again = worker(data, 3)
    assert find_batch_size(again) == 3
    assert again.model.seen == []
    half = replace(data, read=lambda image_id: tuple(part[:32] for part in data.read(image_id)))
    for other in (worker(data, 3, precision="bf16"), worker(half, 3)):
        assert find_batch_size(other) == 3
        assert other.model.seen
    wider = worker(data, 3)
    wider.model.conv = nn.Sequential(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 8, 1))
    find_batch_size(wider)
    assert wider.model.seen


def test_it_is_found_again_when_more_or_less_memory_is_free(data, monkeypatch):
    """A GPU that other programs were using when it was found: nobody wants their batch for ever."""
    free = [10_000_000_000]
    monkeypatch.setattr(batch_size, "free_memory", lambda device: free[0])
    assert find_batch_size(worker(data, 3)) == 3
    free[0] = 9_800_000_000
    assert find_batch_size(worker(data, 12)) == 3
    free[0] = 40_000_000_000
    assert find_batch_size(worker(data, 12)) == 12
    free[0] = 10_000_000_000
    assert find_batch_size(worker(data, 3)) == 3


def test_free_is_what_others_have_left_and_what_this_process_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    assert batch_size.free_memory(torch.device("cuda:1")) == 50
    assert batch_size.free_memory(torch.device("cpu")) == 0


@pytest.mark.parametrize("content", [b"", b"{", b'{"images": 0}', b'{"images": "7"}', b'{"images": 100000}', b"[]"])
def test_what_was_remembered_is_not_trusted(data, content):
    find_batch_size(worker(data, 3))
    files = [path for path in Path(os.environ["SEGBENCH_CACHE"]).rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(content)
    assert find_batch_size(worker(data, 3)) == 3


def test_other_errors_are_told(data):
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fits(worker(data, 0, RuntimeError("shapes do not match")), 1)


def test_a_model_of_which_not_one_image_fits_is_tried_with_one(data):
    assert find_batch_size(worker(data, 0)) == 1
