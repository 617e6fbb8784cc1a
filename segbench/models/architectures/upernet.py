"""UPerNet: pyramid pooling and a feature pyramid over any four-level backbone.

Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018. Bilinear interpolation has
align_corners=False throughout (SEA.md, section 7).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

POOL_SIZES = (1, 2, 3, 6)


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU; keeps the resolution."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.act = nn.ReLU(inplace=True)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation to ``size`` (H,W)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """Average pooling to 1, 2, 3 and 6 squares, a 1x1 block each, and a 3x3 block over everything concatenated."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvBlock(channels_in, channels, 1) for _ in POOL_SIZES)
        self.bottleneck = ConvBlock(channels_in + len(POOL_SIZES) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [
            resize(branch(F.adaptive_avg_pool2d(x, size)), x.shape[-2:])
            for size, branch in zip(POOL_SIZES, self.branches, strict=True)
        ]
        out: Tensor = self.bottleneck(torch.cat([x, *pooled], dim=1))
        return out


class UPerHead(nn.Module):
    """Four feature maps to logits at the resolution of the first."""

    def __init__(self, widths: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__()
        self.pyramid = PyramidPooling(widths[-1], channels)
        self.laterals = nn.ModuleList(ConvBlock(width, channels, 1) for width in widths[:-1])
        self.smooth = nn.ModuleList(ConvBlock(channels, channels, 3) for _ in widths[:-1])
        self.fuse = ConvBlock(len(widths) * channels, channels, 3)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        levels = [lateral(feature) for lateral, feature in zip(self.laterals, features[:-1], strict=True)]
        levels.append(self.pyramid(features[-1]))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[-2:])
        outputs = [smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)] + [levels[-1]]
        size = outputs[0].shape[-2:]
        fused = self.fuse(torch.cat([outputs[0], *(resize(output, size) for output in outputs[1:])], dim=1))
        logits: Tensor = self.classifier(fused)
        return logits


class AuxiliaryHead(nn.Sequential):
    """3x3 block and classifier on the third feature map; supervises training, unused at inference."""

    def __init__(self, channels_in: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.block = ConvBlock(channels_in, channels, 3)
        self.classifier = nn.Conv2d(channels, num_classes, 1)


class UPerNet(nn.Module):
    """Backbone (with ``widths``, of four feature maps), UPerNet head and auxiliary head.

    In the released models the head has 512 ``channels``, the auxiliary head 256.
    """

    def __init__(
        self, backbone: nn.Module, num_classes: int, channels: int = 512, auxiliary_channels: int = 256
    ) -> None:
        super().__init__()
        widths: Sequence[int] = backbone.widths  # type: ignore[assignment]
        self.backbone = backbone
        self.head = UPerHead(widths, channels, num_classes)
        self.auxiliary_head = AuxiliaryHead(widths[2], auxiliary_channels, num_classes)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k h w"]:
        """Images (N,3,H,W) in [0,1] to logits (N,K,H,W)."""
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return resize(self.head(features), images.shape[-2:])

    def forward_with_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both heads at image size, for training (auxiliary weight 0.4)."""
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        size = images.shape[-2:]
        return resize(self.head(features), size), resize(self.auxiliary_head(features[2]), size)
