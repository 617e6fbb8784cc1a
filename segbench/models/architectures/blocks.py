"""The blocks that architectures repeat: of ConvNeXt, of vision transformers and of ResNets.

Sources: Liu et al., "A ConvNet for the 2020s", CVPR 2022 (figure 4); Touvron et al., "Going deeper with Image
Transformers", ICCV 2021 (layer scale); Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (equations 1 to
4); He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (figure 5); Huang et al., "Deep Networks with
Stochastic Depth", ECCV 2016.

Parameters are named and drawn as timm's are, in which the released models were trained, and the arithmetic is the same
bit for bit (tests/test_blocks.py). timm itself takes longer to import than torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MLP_RATIO = 4  # how much wider the hidden layer of an MLP is


class DropPath(nn.Module):
    """Stochastic depth: in training, zeros in place of an image's residual with probability ``drop_prob``.

    Those that stay are scaled up, so that the mean stays.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, residual: Tensor) -> Tensor:
        if not self.training:
            return residual
        keep = 1 - self.drop_prob
        kept = residual.new_empty(len(residual), *[1] * (residual.ndim - 1)).bernoulli_(keep)
        return residual * kept.div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel of (N,C,H,W)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Two linear layers over the last dimension, GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, norm and MLP of each pixel, scaled by channel and added to the input."""

    def __init__(self, width: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.gamma = nn.Parameter(torch.ones(width))
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.conv_dw(x).permute(0, 2, 3, 1)
        residual = self.mlp(self.norm(pixels)).permute(0, 3, 1, 2) * self.gamma.view(1, -1, 1, 1)
        out: Tensor = self.drop_path(residual) + x
        return out


class ConvNeXtStage(nn.Module):
    """Blocks, one for each rate of stochastic depth; ``halved`` or to another width by a norm and a convolution."""

    def __init__(self, width_in: int, width: int, drop_path_rates: Sequence[float], *, halved: bool) -> None:
        super().__init__()
        stride = 2 if halved else 1
        self.downsample = (
            nn.Sequential(LayerNorm2d(width_in), nn.Conv2d(width_in, width, stride, stride=stride))
            if halved or width_in != width
            else nn.Identity()
        )
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width, rate) for rate in drop_path_rates))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.downsample(x))
        return out


class Attention(nn.Module):
    """Self-attention of ``heads`` heads over (N,tokens,width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class TransformerBlock(nn.Module):
    """Attention, then an MLP, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.drop_path1 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.drop_path2 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions to ``EXPANSION`` times ``width`` channels, added to the input or its shortcut.

    The stride is that of the 3x3 convolution.
    """

    EXPANSION = 4

    def __init__(
        self, channels_in: int, width: int, *, stride: int = 1, dilation: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.EXPANSION, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.EXPANSION)
        self.act = nn.ReLU(inplace=True)
        self.downsample = downsample if downsample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.act(self.bn1(self.conv1(x)))
        residual = self.act(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        residual += self.downsample(x)
        out: Tensor = self.act(residual)
        return out
