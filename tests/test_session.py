"""Models at work on a device, and left as they were."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext, suppress

import pytest
import torch
from torch import nn

import segbench
from segbench.engine.compute import session as sessions
from segbench.engine.compute.session import Stopped, open_session
from segbench.engine.compute.worker import Worker
from segbench.engine.rundir.plan import Unit
from segbench.protocol import SEA_V1

CPU = torch.device("cpu")


@pytest.fixture
def worker():
    model = nn.Conv2d(3, 8, 1).eval()
    return Worker(model, segbench.load_dataset("shapes").first(2), SEA_V1, CPU, one_core=True)


def test_models_are_put_to_work_and_left_as_they_were():
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 8, 1)).train()
    model[1].weight.requires_grad_(False)
    threads = torch.get_num_threads()
    with suppress(KeyError), open_session([model, nn.ReLU().eval()], CPU, threads=2) as session:
        assert session.was_training == [True, False]
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.get_num_threads() == 2
        raise KeyError
    assert [part.training for part in model.modules()] == [True] * 3
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True]
    assert torch.get_num_threads() == threads


def test_an_error_of_one_stream_stops_the_others_and_not_those_that_come_after(worker):
    stopped, both = [], threading.Barrier(2)

    def work(number, images):
        both.wait()
        if number == 0:
            raise ValueError("the first")
        try:
            while True:
                session.check_running()
        except Stopped:
            stopped.append(number)

    with open_session(worker.models, CPU, threads=2) as session:
        with pytest.raises(ValueError, match="the first"):
            session.run_streams(worker, [], work, jobs=2)
        assert (worker.streams, stopped) == (2, [1])
        session.run_streams(worker, [], lambda number, images: session.check_running(), jobs=2)


def test_each_stream_has_the_current_cuda_device_also_without_a_number(worker, monkeypatch):
    """``cuda`` is the caller's current device; a thread of its own would begin with the first one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(sessions, "_eval_mode", lambda model, device: nullcontext(False))
    with open_session([], torch.device("cuda"), threads=2) as session:
        session.run_streams(worker, [], lambda number, images: chosen.append("work"), jobs=1)
        assert chosen == [1, "work"]
        chosen.clear()
        unit = Unit(0.0, "clean", 0, worker.dataset.image_ids)
        with session.one_stream(worker, [unit]) as images, suppress(RuntimeError):  # pinned memory needs a driver
            images.take(unit)
        assert chosen  # by the threads that decode: pinned memory belongs to the current device, too
        assert set(chosen) == {1}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "another device": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp("plain"), segbench.load_dataset("shapes").first(2))


def evaluated(out, data):
    model = segbench.load_model("clean_convnext_mini_shapes")
    return segbench.evaluate(model, data, eps=8, iterations=2, out=out / "run", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_what_the_caller_has_set_in_torch_changes_no_result(plain, tmp_path, name):
    data = segbench.load_dataset("shapes").first(2)
    with STATES[name]():
        result = evaluated(tmp_path, data)
        state = torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
        assert state == (
            {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(name, torch.float32),
            name == "autocast",
            name == "inference mode",
        )
    assert result.evidence_path.read_bytes() == plain.evidence_path.read_bytes()
