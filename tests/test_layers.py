"""The building blocks against timm's: the same names, the same bits; and what loading a zoo model imports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from timm.layers.norm import LayerNorm2d
from timm.models.convnext import ConvNeXtStage
from timm.models.resnet import Bottleneck
from timm.models.vision_transformer import Block
from torch import nn

from segbench.models.architectures import layers

PAIRS = {
    "LayerNorm2d": (lambda: layers.LayerNorm2d(12), lambda: LayerNorm2d(12, eps=1e-6), (2, 12, 9, 7)),
    "stage": (
        lambda: layers.ConvNeXtStage(12, 16, stride=2, drop_path_rates=[0.0, 0.2, 0.4]),
        lambda: ConvNeXtStage(
            12, 16, stride=2, depth=3, drop_path_rates=[0.0, 0.2, 0.4], ls_init_value=1.0, norm_layer=LayerNorm2d
        ),
        (6, 12, 9, 7),
    ),
    "first stage": (
        lambda: layers.ConvNeXtStage(12, 12, stride=1, drop_path_rates=[0.0]),
        lambda: ConvNeXtStage(12, 12, stride=1, depth=1, ls_init_value=1.0, norm_layer=LayerNorm2d),
        (2, 12, 9, 7),
    ),
    "transformer block": (
        lambda: layers.TransformerBlock(24, 3, 0.3),
        lambda: Block(24, 3, qkv_bias=True, drop_path=0.3, norm_layer=nn.LayerNorm),
        (6, 17, 24),
    ),
    "bottleneck": (
        lambda: layers.Bottleneck(32, 8, stride=2, downsample=nn.Conv2d(32, 32, 1, stride=2)),
        lambda: Bottleneck(32, 8, stride=2, downsample=nn.Conv2d(32, 32, 1, stride=2)),
        (2, 32, 9, 7),
    ),
    "dilated bottleneck": (
        lambda: layers.Bottleneck(32, 8, dilation=2),
        lambda: Bottleneck(32, 8, dilation=2),
        (2, 32, 9, 7),
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_blocks_are_those_of_timm(name, training):
    """The same tensors from the same seed; outputs and gradients of the same bits, stochastic depth included."""
    outcomes = []
    make_ours, make_theirs, shape = PAIRS[name]
    for make in (make_ours, make_theirs):
        torch.manual_seed(0)
        block = make().train(training)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in block.parameters():  # no norm or scale that does nothing
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        x = torch.randn(shape, generator=generator).requires_grad_()
        torch.manual_seed(2)
        out = block(1.0 * x)
        out.square().sum().backward()
        outcomes.append((block.state_dict(), {"out": out, "x": x.grad, **dict(block.named_parameters())}, block))
    (ours, our_values, block), (theirs, their_values, other) = outcomes
    assert list(ours) == list(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key
    for key in our_values:
        assert torch.equal(our_values[key], their_values[key]), key
    for (key, parameter), (_, theirs_of_it) in zip(block.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter.grad, theirs_of_it.grad), key


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pirat_convnext_mini_shapes", "pirat_vit_mini_shapes"])
def test_a_zoo_model_is_evaluated_without_what_it_does_not_need(model, tmp_path):
    """torchvision and torch's compiler take longer to import than a small evaluation takes."""
    code = (
        "import sys, segbench\n"
        f"segbench.evaluate({model!r}, eps=[8], limit=1, iterations=1, out={str(tmp_path / 'run')!r}, progress=False)\n"
        "print(*sorted({'timm', 'torchvision', 'torch._dynamo', 'sympy', 'ray', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert found.stdout.splitlines()[-1] == ""
