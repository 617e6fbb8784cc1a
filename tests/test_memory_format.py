"""Images in channels_last, as attacks on CUDA give them: models that fail so are attacked with contiguous ones.

No GPU is needed: the fastest format is asked for by name.
"""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
from torch import Tensor, nn

import segbench
from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.evaluator import Evaluator, fastest_format
from segbench.attacks.problem import frozen
from segbench.attacks.stages import Stage
from segbench.engine import model_check
from segbench.engine.compute import worker
from segbench.engine.compute.checks import works_in
from segbench.engine.compute.worker import Worker
from segbench.protocol import SEA_V1

K = 8  # classes of shapes
CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, K, 3, padding=1)
        self.strides: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.strides.append(x.stride())
        return self.conv(x)


class Viewing(Net):
    """Flattens the pixels by ``view``, which channels_last does not allow."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return (2 * y.view(len(y), -1)).view(y.shape)


class ViewingWithGradient(Net):
    """Fails where there is a gradient to be computed only."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return (2 * y.view(len(y), -1)).view(y.shape) if x.requires_grad else 2 * y


class ReadingMemory(Net):
    """Computes something else, and says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.as_strided(x.shape, torch.empty(x.shape).stride()))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_models_are_tried_as_they_are_attacked(images):
    for model in (Viewing(), ViewingWithGradient(), ReadingMemory()):
        assert not works_in(model, images, torch.channels_last)
        assert works_in(model, images, torch.contiguous_format)
    assert works_in(Net(), images, torch.channels_last)
    assert works_in(nn.Sequential(Net(), nn.Dropout(0.5)), images, torch.channels_last)


def attacked(model: nn.Module, images: Tensor, memory_format: torch.memory_format | None) -> list[Tensor]:
    labels = torch.zeros(len(images), 16, 16, dtype=torch.int64)
    batch = AttackBatch(Evaluator(model, memory_format=memory_format))
    with frozen(model):
        keys = batch.add([Job(x, y, "ce", 0.1, (Stage(1.0, 4),)) for x, y in zip(images, labels, strict=True)])
        found = batch.run()
    return [found[key].adversarial for key in keys]


def test_an_attack_goes_on_with_contiguous_images(images, caplog):
    model = Viewing()
    usual = attacked(model, images, None)
    found = attacked(model, images, torch.channels_last)
    assert all(torch.equal(one, other) for one, other in zip(found, usual, strict=True))
    assert caplog.text.count("works on contiguous images only") == 1


def test_other_errors_are_not_taken_for_that(images):
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("another one")

    with pytest.raises(RuntimeError, match="another one"):
        attacked(Broken(), images, torch.channels_last)


def test_the_attack_hands_out_the_format_that_is_asked_for(images):
    model = Net()
    attacked(model, images, torch.channels_last)
    assert {stride[1] for stride in model.strides} == {1}
    model.strides.clear()
    attacked(model, images, None)
    assert set(model.strides) == {images.stride()}


def test_on_a_cpu_images_stay_as_they_are():
    assert fastest_format(CPU) is torch.preserve_format
    assert fastest_format(torch.device("cuda", 1)) is torch.channels_last


def test_workers_hand_on_the_format_also_to_other_processes():
    worker = Worker(Net(), segbench.load_dataset("shapes").first(1), SEA_V1, CPU, formats={"": torch.contiguous_format})
    assert worker.evaluator(64, 64).memory_format is torch.contiguous_format
    assert pickle.loads(pickle.dumps(worker.formats)) == worker.formats


@pytest.mark.slow
def test_a_run_whose_model_needs_contiguous_images(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "segbench")
    data = segbench.load_dataset("shapes").first(2)

    def run(name: str):
        options = {"eps": 4, "iterations": 3, "progress": False, "device": "cpu"}
        return segbench.evaluate(Viewing(), data, out=tmp_path / name, **options).table()

    usual = run("usual")
    assert not caplog.records
    for module in (worker, model_check):
        monkeypatch.setattr(module, "fastest_format", lambda device: torch.channels_last)
    assert run("on a GPU").equals(usual)
    assert caplog.text.count("works on contiguous images only") == 1
    found = segbench.check_model(Viewing(), data, progress=False, device="cpu")
    assert {finding.name: finding.level for finding in found}["memory_format"] == "note"
