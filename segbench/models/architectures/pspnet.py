"""PSPNet: pyramid pooling on a dilated ResNet.

Sources: Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017 (sections 3.2 and 3.3); He et al., "Deep Residual
Learning for Image Recognition", CVPR 2016 (backbone). Sizes and conventions: SEA.md, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from segbench.models.architectures.blocks import Bottleneck
from segbench.models.architectures.upernet import POOL_SIZES, ConvBlock
from segbench.models.contract import PyramidBackbone

# Stride and dilation of the four stages: the last two keep the resolution and dilate instead.
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)
DROPOUT = 0.1  # of whole channels before the classifiers, in training


def resize_to_corners(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation to ``size`` (H,W) that maps the centres of corner pixels to each other."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


class Stem(nn.Sequential):
    """Images to a quarter of their size: one 7x7 convolution, or three of 3x3 (deep), and max pooling."""

    def __init__(self, width: int, *, deep: bool) -> None:
        convolutions = (
            [(3, width, 3, 2), (width, width, 3, 1), (width, 2 * width, 3, 1)] if deep else [(3, width, 7, 2)]
        )
        layers: list[nn.Module] = []
        for channels_in, channels_out, kernel_size, stride in convolutions:
            layers += [
                nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding=kernel_size // 2, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers, nn.MaxPool2d(3, stride=2, padding=1))
        self.width = convolutions[-1][1]


class DilatedResNet(PyramidBackbone):
    """ResNet with bottlenecks whose last two stages stay at stride 8.

    Args:
        depths: bottlenecks per stage.
        width: of the first stage's 3x3 convolutions; stages end with 4, 8, 16 and 32 times as many channels.
        deep_stem: three 3x3 convolutions in place of the 7x7 one.
    """

    def __init__(self, depths: Sequence[int], width: int, *, deep_stem: bool) -> None:
        super().__init__()
        self.stem = Stem(width, deep=deep_stem)
        self.widths = tuple(width * 2**index * Bottleneck.EXPANSION for index in range(len(STRIDES)))
        stages: list[nn.Module] = []
        channels_in = self.stem.width
        for index, (depth, stride, dilation) in enumerate(zip(depths, STRIDES, DILATIONS, strict=True)):
            stages.append(_stage(channels_in, width * 2**index, depth, stride, dilation))
            channels_in = self.widths[index]
        self.stages = nn.ModuleList(stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N,3,H,W) to four feature maps at strides 4, 8, 8, 8; sizes are rounded up."""
        x = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def _stage(channels_in: int, width: int, depth: int, stride: int, dilation: int) -> nn.Sequential:
    channels_out = width * Bottleneck.EXPANSION
    shortcut = nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
    )
    first = Bottleneck(channels_in, width, stride=stride, downsample=shortcut, dilation=dilation)
    return nn.Sequential(first, *(Bottleneck(channels_out, width, dilation=dilation) for _ in range(depth - 1)))


class PyramidPooling(nn.Module):
    """Average pooling to 1, 2, 3 and 6 squares, a 1x1 block each, all concatenated to the input."""

    def __init__(self, channels_in: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvBlock(channels_in, channels_in // len(POOL_SIZES), 1) for _ in POOL_SIZES)
        self.channels_out = channels_in + channels_in // len(POOL_SIZES) * len(POOL_SIZES)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [
            resize_to_corners(branch(F.adaptive_avg_pool2d(x, size)), x.shape[-2:])
            for size, branch in zip(POOL_SIZES, self.branches, strict=True)
        ]
        return torch.cat([x, *pooled], dim=1)


class Classifier(nn.Sequential):
    """3x3 block, dropout of channels and 1x1 classifier."""

    def __init__(self, channels_in: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.block = ConvBlock(channels_in, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(channels, num_classes, 1)


class PSPNet(nn.Module):
    """Dilated backbone, pyramid pooling, classifier and auxiliary head on the third stage.

    The published sizes of images are 8k+1, where feature maps and images share their corners; any other size works.
    The classifier has 512 ``channels`` in the released models, the auxiliary head 256.
    """

    def __init__(
        self, backbone: DilatedResNet, num_classes: int, channels: int = 512, auxiliary_channels: int = 256
    ) -> None:
        super().__init__()
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.pyramid = PyramidPooling(backbone.widths[-1])
        self.head = Classifier(self.pyramid.channels_out, channels, num_classes)
        self.auxiliary_head = Classifier(backbone.widths[2], auxiliary_channels, num_classes)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k h w"]:
        """Images (N,3,H,W) in [0,1] to logits (N,K,H,W)."""
        return self._classified(self._features(images)[-1], images)

    def forward_with_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both heads at image size, for training (auxiliary weight 0.4)."""
        features = self._features(images)
        auxiliary = resize_to_corners(self.auxiliary_head(features[2].contiguous()), images.shape[-2:])
        return self._classified(features[-1], images), auxiliary

    def _features(self, images: Tensor) -> list[Tensor]:
        features: list[Tensor] = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return features

    def _classified(self, features: Tensor, images: Tensor) -> Tensor:
        """Logits at image size. On a CPU the wide convolution of the head is a fifth faster with channels first."""
        return resize_to_corners(self.head(self.pyramid(features.contiguous())), images.shape[-2:])
