"""The building blocks of the released models: LayerNorm of feature maps, stochastic depth, and three residual blocks.

Sources: Liu et al., "A ConvNet for the 2020s", CVPR 2022 (ConvNeXt); Dosovitskiy et al., "An Image is Worth 16x16
Words", ICLR 2021 (transformer); He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (bottleneck);
Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016. Tensors have the names that timm gives them, in which
released checkpoints are written, and results have the same bits as timm's blocks. timm itself is not imported: that
takes as long as torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6  # of ConvNeXt's norms


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N,C,H,W)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) to the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """In training, drops the residual branch of an image with probability ``drop_prob``; scales up what is kept."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(N,...) to the same."""
        if not self.training or self.drop_prob == 0:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * kept.div_(1 - self.drop_prob)


class Mlp(nn.Module):
    """Two linear layers with GELU between them; the hidden one is four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(...,width) to the same."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise convolution, LayerNorm and MLP on each position, a learned scale of each channel, residual."""

    def __init__(self, width: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)
        self.gamma = nn.Parameter(torch.ones(width))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N,width,H,W) to the same."""
        branch = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        out: Tensor = self.drop_path(branch * self.gamma.view(1, -1, 1, 1)) + x
        return out


class ConvNeXtStage(nn.Module):
    """ConvNeXt blocks, one for each rate of stochastic depth; before them, what changes the shape.

    Args:
        width_in, width: channels.
        stride: 1, or 2 for half the size.
        drop_path_rates: of the blocks.
    """

    def __init__(self, width_in: int, width: int, *, stride: int, drop_path_rates: Sequence[float]) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if width_in != width or stride > 1:
            self.downsample = nn.Sequential(
                LayerNorm2d(width_in), nn.Conv2d(width_in, width, 2 if stride > 1 else 1, stride=stride)
            )
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width, rate) for rate in drop_path_rates))

    def forward(self, x: Tensor) -> Tensor:
        """(N,width_in,H,W) to (N,width,H/stride,W/stride), rounded down."""
        out: Tensor = self.blocks(self.downsample(x))
        return out


class Attention(nn.Module):
    """Multi-head softmax self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N,T,width) to the same."""
        n, tokens, width = x.shape
        query, key, value = (
            self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, tokens, width))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: attention and MLP, each residual."""

    def __init__(self, width: int, heads: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.drop_path1 = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.drop_path2 = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N,T,width) to the same."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with batch norm, residual; the last one is four times as wide.

    Args:
        width_in: channels of the input.
        width: channels of the 3x3 convolution.
        stride, dilation: of the 3x3 convolution.
        downsample: brings the input to the shape of the output; None where it has it.
    """

    expansion = 4

    def __init__(
        self, width_in: int, width: int, *, stride: int = 1, dilation: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, self.expansion * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * width)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(N,width_in,H,W) to (N,4 width,H/stride,W/stride), rounded up."""
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.act2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        branch += x if self.downsample is None else self.downsample(x)
        out: Tensor = self.act3(branch)
        return out
