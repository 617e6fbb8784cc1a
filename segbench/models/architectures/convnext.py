"""ConvNeXt backbone with a convolutional stem.

Sources: Liu et al., "A ConvNet for the 2020s", CVPR 2022 (backbone); Singh, Croce, Hein, "Revisiting
Adversarial Training for ImageNet", NeurIPS 2023 (ConvStem).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from segbench.models.architectures.blocks import ConvNeXtStage, LayerNorm2d
from segbench.models.contract import PyramidBackbone


class ConvStem(nn.Sequential):
    """Two 3x3 stride-2 convolutions, each with channel LayerNorm and GELU, in place of the 4x4 patchify layer."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1),
            LayerNorm2d(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            LayerNorm2d(width),
            nn.GELU(),
        )


class ConvNeXtBackbone(PyramidBackbone):
    """ConvNeXt stages at strides 4, 8, 16, 32 with a LayerNorm on each output.

    Args:
        depths: blocks per stage.
        widths: channels per stage; the stem ends with ``widths[0]`` channels.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 (training only).
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int], drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.stem = ConvStem(widths[0])
        rates = np.linspace(0, drop_path_rate, sum(depths)).tolist()
        stages: list[nn.Module] = []
        for index, width in enumerate(widths):
            stages.append(
                ConvNeXtStage(
                    widths[max(index - 1, 0)],
                    width,
                    rates[sum(depths[:index]) : sum(depths[: index + 1])],
                    halved=index > 0,
                )
            )
        self.stages = nn.ModuleList(stages)
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in widths)

    @property
    def dense_only(self) -> Sequence[nn.Module]:  # type: ignore[override]
        """The norms of all feature maps but the last."""
        return list(self.norms)[:-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N,3,H,W) to four feature maps (N,widths[i],H/2^(i+2),W/2^(i+2)), sizes rounded by the stages."""
        x = self.stem(images)
        features = []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = stage(x)
            features.append(norm(x))
        return features
