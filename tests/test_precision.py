"""In what gradients are computed, what is recorded of it, and that scores are float32 whatever it was."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

import segbench
from segbench import entries, evidence
from segbench.attacks.evaluator import Evaluator
from segbench.engine.compute.precision import check_precision
from segbench.engine.compute.worker import Worker
from segbench.errors import ModelError, RunError, UsageError
from tests.runs import run, units

SMALL = {"eps": 8, "limit": 2, "iterations": 2}


@pytest.fixture(scope="module")
def lower(tmp_path_factory):
    """A run whose gradients are bfloat16."""
    return run(tmp_path_factory.mktemp("bf16") / "run", precision="bf16", **SMALL)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The same in float32."""
    return run(tmp_path_factory.mktemp("fp32") / "run", **SMALL)


@pytest.mark.slow
def test_the_entry_says_it_and_is_unofficial(lower, exact):
    entry = lower.entry()
    assert entry["run"]["precision"] == "bf16"
    assert "precision bf16" in entry["protocol"]["deviations"]
    assert not entry["protocol"]["official"]
    assert entry["run"]["command"].endswith("--precision bf16 --eps 8")
    assert entries.validate_entry(lower.entry_path, published=False) == []
    assert exact.entry()["run"]["precision"] == "fp32"
    assert not any("precision" in text for text in exact.entry()["protocol"]["deviations"])


def test_the_attack_is_another_one_and_the_clean_score_is_the_same(lower, exact):
    assert lower.entry()["clean"] == exact.entry()["clean"]
    ours, theirs = (units(result.path)["eps8_mce_0000.parquet"] for result in (lower, exact))
    assert ours != theirs
    difference = lower.entry()["results"][0]["aacc"] - exact.entry()["results"][0]["aacc"]
    assert abs(difference) < 0.1


def test_it_is_part_of_the_identity(lower, exact):
    ids = [json.loads((result.path / "run.json").read_text())["run_id"] for result in (lower, exact)]
    assert ids[0] != ids[1]
    with pytest.raises(RunError, match="with other settings: precision: bf16 there, fp32 here"):
        run(lower.path, **SMALL)
    found = evidence.from_bytes(lower.evidence_path.read_bytes(), source="")
    assert found.metadata["identity"]["precision"] == "bf16"


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_an_entry_that_hides_it_is_refused(lower, tmp_path, precision):
    for path in (lower.entry_path, lower.evidence_path):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    entry = lower.entry() | {"run": lower.entry()["run"] | {"precision": precision}}
    path = tmp_path / lower.entry_path.name
    path.write_text(json.dumps(entry))
    (problem,) = entries.validate_entry(path, published=False)
    assert f"run.precision is {precision!r}, the evidence says 'bf16'" in problem


class Watched(nn.Module):
    """Notes in what it computes, and with which gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.seen: list[tuple[torch.dtype, torch.dtype, bool]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.conv(images)
        self.seen.append((images.dtype, logits.dtype, torch.is_grad_enabled()))
        return logits


def test_attacks_are_scored_in_float32(tmp_path):
    torch.manual_seed(0)
    model = Watched().eval()
    segbench.evaluate(
        model, "shapes", eps=8, limit=1, iterations=1, precision="bf16", out=tmp_path / "run", progress=False
    )
    attacked, scored = ({row[:2] for row in model.seen if row[2] == gradient} for gradient in (True, False))
    assert (torch.float32, torch.bfloat16) in attacked
    assert (torch.float32, torch.float32) in scored
    worker = Worker(model, segbench.load_dataset("shapes").first(1), segbench.protocol.SEA_V1, torch.device("cpu"))
    worker.precision = "bf16"
    model.seen.clear()
    sample = worker.dataset[0]
    worker.score([0.0], [sample], [None])
    assert model.seen == [(torch.float32, torch.float32, False)]


def test_the_loss_is_float32_in_any_precision():
    model, images = Watched().eval(), torch.rand(1, 3, 4, 4)
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    evaluate = Evaluator(model, autocast=torch.bfloat16)
    now = evaluate(images, evaluate.parts(labels, [("ce", None)]), 1, 1, backward=True)
    assert model.seen == [(torch.float32, torch.bfloat16, True)]
    assert (now.tracked.dtype, now.gradient.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("precision", "text"),
    [
        ("tf32", r"tf32 exists on NVIDIA GPUs only, not on cpu; use --precision fp32 or bf16"),
        ("fp16", r"precision must be one of fp32, tf32, bf16, not 'fp16'"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_is_computed(tmp_path, precision, text):
    with pytest.raises(UsageError, match=text):
        run(tmp_path / "run", precision=precision)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_an_override_that_no_switch_of_torch_undoes_is_refused_on_cuda(monkeypatch, precision):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(UsageError, match="unset NVIDIA_TF32_OVERRIDE"):
        check_precision(precision, torch.device("cuda"))
    check_precision("fp32", torch.device("cpu"))


@pytest.mark.parametrize(("supported", "warned"), [(True, False), (False, True)])
def test_a_processor_without_bfloat16_is_told_to_be_slow(monkeypatch, caplog, supported, warned):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    with caplog.at_level(logging.WARNING, "segbench"):
        check_precision("bf16", torch.device("cpu"))
    assert ("no bfloat16 instructions: bf16 works, but slower than fp32" in caplog.text) == warned


@pytest.mark.slow
def test_a_compiled_run_is_recorded_and_valid(exact, tmp_path, caplog):
    """Where there is a compiler, rounding may differ; where there is none, a warning, and the same bytes."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3, padding=1).eval()
    options = {"eps": 8, "limit": 1, "iterations": 1, "progress": False}
    plain = segbench.evaluate(model, "shapes", out=tmp_path / "plain", **options)
    compiled = segbench.evaluate(model, "shapes", out=tmp_path / "compiled", compile=True, **options)
    assert entries.validate_entry(compiled.entry_path, published=False) == []
    assert [result.entry()["run"]["compiled"] for result in (plain, compiled)] == [False, True]
    assert "--compile" in compiled.entry()["run"]["command"]
    assert compiled.entry()["clean"] == plain.entry()["clean"]
    if "torch.compile fails with this model" in caplog.text:
        assert units(compiled.path) == units(plain.path)
    else:
        ours, theirs = (result.entry()["results"][0]["aacc"] for result in (compiled, plain))
        assert ours == pytest.approx(theirs, abs=0.05)


def test_a_model_that_fails_in_lower_precision_is_refused_before_the_first_attack(tmp_path):
    class OnlyFloat32(nn.Conv2d):
        def forward(self, images):
            logits = super().forward(images)
            if logits.dtype != torch.float32:
                raise RuntimeError("this kernel is for float32")
            return logits

    model = OnlyFloat32(3, 8, 1).eval()
    with pytest.raises(ModelError, match=r"fails with gradients in torch\.bfloat16.*--precision fp32"):
        segbench.evaluate(model, "shapes", out=tmp_path / "run", limit=1, precision="bf16", progress=False)
    assert not (tmp_path / "run").exists()


def test_lower_precision_is_probed_as_it_is_attacked(tmp_path):
    """The backward pass runs outside of autocast, so a gradient that needs float32 logits fails there."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return x * weight.to(x.dtype)

        @staticmethod
        def backward(ctx, gradient):
            (weight,) = ctx.saved_tensors
            return (gradient.flatten(1) @ weight.new_ones(gradient[0].numel(), 1)).view(-1, 1, 1, 1) * gradient, None

    class Net(nn.Conv2d):
        def forward(self, images):
            return Scaled.apply(super().forward(images), torch.ones(()))

    model = Net(3, 8, 1).eval()
    with pytest.raises(ModelError, match="fails with gradients in torch"):
        segbench.evaluate(model, "shapes", out=tmp_path / "run", limit=1, precision="bf16", progress=False)
