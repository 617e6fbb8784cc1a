"""Our blocks beside timm's: the same names, the same draws, the same numbers bit for bit; and none of timm in runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers.norm import LayerNorm2d
from timm.models.convnext import ConvNeXtStage
from timm.models.resnet import Bottleneck
from timm.models.vision_transformer import Block
from torch import nn

from segbench.models.architectures import blocks

ROOT = Path(__file__).resolve().parents[1]


def stage(width_in: int, width: int, rates: list[float], *, halved: bool) -> nn.Module:
    """A stage of timm."""
    return ConvNeXtStage(
        width_in, width, stride=1 + halved, depth=len(rates), drop_path_rates=rates, norm_layer=LayerNorm2d
    )


def block(width: int, heads: int, rate: float) -> nn.Module:
    """A transformer block of timm."""
    return Block(width, heads, qkv_bias=True, drop_path=rate, norm_layer=nn.LayerNorm)


def shortcut(stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 16, 1, stride=stride, bias=False), nn.BatchNorm2d(16))


PAIRS = {
    "norm": (lambda: blocks.LayerNorm2d(6), lambda: LayerNorm2d(6)),
    "first stage": (
        lambda: blocks.ConvNeXtStage(6, 6, [0.0, 0.5], halved=False),
        lambda: stage(6, 6, [0.0, 0.5], halved=False),
    ),
    "halved stage": (lambda: blocks.ConvNeXtStage(6, 8, [0.5], halved=True), lambda: stage(6, 8, [0.5], halved=True)),
    "wider stage": (lambda: blocks.ConvNeXtStage(6, 8, [0.0], halved=False), lambda: stage(6, 8, [0.0], halved=False)),
    "transformer": (lambda: blocks.TransformerBlock(24, 3, 0.5), lambda: block(24, 3, 0.5)),
    "bottleneck": (lambda: blocks.Bottleneck(16, 4, dilation=2), lambda: Bottleneck(16, 4, dilation=2)),
    "bottleneck with shortcut": (
        lambda: blocks.Bottleneck(6, 4, stride=2, downsample=shortcut(2)),
        lambda: Bottleneck(6, 4, stride=2, downsample=shortcut(2)),
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_block_is_that_of_timm(name, training):
    """With drawn weights, for those that begin as ones or zeros would hide what they multiply or add to."""
    models = []
    for make in PAIRS[name]:
        torch.manual_seed(1)
        models.append(make().train(training))
    ours, theirs = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    shape = (4, 5, 24) if name == "transformer" else (4, 16 if name == "bottleneck" else 6, 11, 14)
    x = torch.randn(shape)
    x = x if len(shape) == 3 else x.to(memory_format=torch.channels_last)
    seen = []
    for model in models:
        torch.manual_seed(2)
        images = x.clone().requires_grad_()
        out = model(images * 1)  # a copy, for what works in place
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        gradients = torch.autograd.grad((out * weights).sum(), [images, *model.parameters()])
        seen.append([out, *gradients, *model.buffers()])
        assert out.stride() == seen[0][0].stride()
    for mine, other in zip(*seen, strict=True):
        assert torch.equal(mine, other)


RUN = """
import json, sys
import segbench
UNNEEDED = {"torchvision", "torch._dynamo", "sympy", "timm", "pandas", "huggingface_hub", "requests"}
segbench.load_model(sys.argv[1])
loaded = sorted(UNNEEDED & set(sys.modules))
from segbench.cli import main
try:
    main(["evaluate", "--model", sys.argv[1], "--limit", "1", "--eps", "8", "--iterations", "1", "--out", sys.argv[2]])
except SystemExit as end:
    assert not end.code, end.code
print()
print(json.dumps([loaded, sorted(UNNEEDED & set(sys.modules))]))
"""


@pytest.mark.parametrize("model", ["pirat_convnext_mini_shapes", "pirat_vit_mini_shapes"])
def test_a_model_of_the_zoo_imports_only_what_it_needs(model, tmp_path):
    """What takes seconds to import, and nothing of which such a model calls."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, model, str(tmp_path / "run")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], []]
