"""`check-model --precisions`: speed and strength of attacks in each precision on a CPU."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import Tensor, nn

import segbench
from segbench.engine import precisions
from segbench.engine.model_check import Finding, check_model

MODEL = "at_convnext_mini_shapes"


class Within(nn.Module):
    """A model that is slow, or wrong at every pixel, only with autocast on (True) or only with it off (False)."""

    def __init__(self, *, slow: bool, wrong: bool | None = None) -> None:
        super().__init__()
        self.model = segbench.load_model(MODEL)
        self.slow, self.wrong = slow, wrong

    def forward(self, images: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled("cpu")
        time.sleep(0.5 * (autocast is self.slow))
        logits = self.model(images)
        return logits - 1e3 * logits.detach().abs() * (logits == logits.amax(1, keepdim=True)) * (
            autocast is self.wrong
        )


@pytest.fixture(autouse=True)
def _bf16(monkeypatch):
    """Autocast works on any CPU; compiling takes a minute, so that here the "compiled" model is the model."""
    monkeypatch.setattr(precisions, "has_bf16", lambda _: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(precisions, "ITERATIONS", 4)


def findings(model, **options) -> dict[str, Finding]:
    options = {"dataset": "shapes", "images": 4, "progress": False, "device": "cpu", "precisions": True} | options
    return {finding.name: finding for finding in check_model(model, **options)}


def test_the_faster_precision_is_named_with_its_option_and_what_is_official():
    found = findings(Within(slow=False))
    assert found["step_fp32"].value > found["step_bf16"].value > 0
    factor = found["step_fp32"].value / found["step_bf16"].value
    assert found["fastest_precision"].value == pytest.approx(factor)
    assert "bf16 is fastest on this machine" in found["fastest_precision"].message
    assert "--precision bf16. The entry is then unofficial" in found["fastest_precision"].message
    assert abs(found["strength_bf16"].value) < 2


def test_strength_is_scored_in_float32_whatever_the_attack_believed():
    """Under autocast every pixel is wrong at once, so that the attack stops; in float32 the images are not fooled."""
    found = findings(Within(slow=True, wrong=True))
    assert found["strength_bf16"].value > 1
    assert "aAcc is 0.00" not in found["step_bf16"].message
    assert found["strength_compiled"].value == 0  # the same computation here
    assert "Compiling took" in found["step_compiled"].message
    assert "fastest_precision" in found
    assert "bf16 is fastest" not in found["fastest_precision"].message


def test_what_cannot_be_measured_has_a_reason(monkeypatch):
    def broken(function, **_):
        raise RuntimeError("no working compiler\nand more")

    monkeypatch.setattr(precisions, "has_bf16", lambda _: False)
    monkeypatch.setattr(torch, "compile", broken)
    found = findings(MODEL)
    assert "no bfloat16 instructions" in found["step_bf16"].message
    assert found["step_compiled"].message == (
        "Not measured: torch.compile does not work here; it needs a C++ compiler (RuntimeError: no working compiler)."
    )
    assert {found[name].level for name in ("step_bf16", "step_compiled")} == {"note"}
    assert not {"strength_bf16", "strength_compiled"} & set(found)
    assert found["fastest_precision"].message.startswith("fp32, the default, is fastest")


def test_a_model_that_cannot_be_compiled_is_no_faster_compiled(monkeypatch):
    def broken_later(function, **_):
        def compiled(*arguments):
            if function.__name__ == "_objective":
                raise RuntimeError("unsupported")
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", broken_later)
    assert "torch.compile fails with this model" in findings(MODEL)["step_compiled"].message


def test_without_data_nothing_is_attacked():
    found = findings(nn.Conv2d(3, 5, 1), dataset=None, size=32)
    assert found["fastest_precision"].message == "Not measured: no data set (--dataset, --data-root)."
    assert not [name for name in found if name.startswith("step_")]


def test_the_command_prints_them_as_json_if_asked(cli):
    options = ["--images", "2", "--device", "cpu", "--quiet", "--json"]
    code, out, _ = cli("check-model", MODEL, *options, "--precisions")
    names = {finding["name"] for finding in json.loads(out)}
    assert code == 0
    assert {"step_fp32", "step_bf16", "strength_bf16", "step_compiled", "fastest_precision"} <= names
    _, out, _ = cli("check-model", MODEL, *options)
    assert "step_fp32" not in out
