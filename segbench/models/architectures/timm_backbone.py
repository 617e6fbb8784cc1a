"""Any backbone of timm with four feature levels, by name and without weights."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from segbench.errors import ModelError, unknown_name
from segbench.models.contract import PyramidBackbone

LEVELS = 4
ANY_SIZE = "strict_img_size"  # what timm calls the argument that lets a model for images of one size take others


class TimmBackbone(PyramidBackbone):
    """The last four feature maps of a timm model.

    A windowed transformer (Swin) gets its images padded with zeros on the right and at the bottom to whole patches.

    Args:
        name: of ``timm.list_models()``. Cards come from strangers, so names that reach the network or the disk
            (``hf-hub:...``, ``local-dir:...``, a tag of pretrained weights) are refused.
        normalize: subtract the mean and divide by the standard deviation of the model's ``pretrained_cfg``.

    Raises:
        ValueError: unknown name, fewer than four levels, or a model that is tied to images of one size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, *, normalize: bool) -> None:
        super().__init__()
        known = timm.list_models()
        if name not in known:
            near = unknown_name("timm model", str(name)[:80], known).split(" Known: ")[0]
            raise ValueError(f"{near} A backbone is a name of timm.list_models(), without a tag or source")
        self.name = name
        config = timm.get_pretrained_cfg(name)
        one_size = config is not None and config.fixed_input_size
        self.body = _features(name, {ANY_SIZE: False} if one_size else {})
        info = self.body.feature_info
        if len(info.channels()) < LEVELS:
            raise ValueError(f"backbone {name!r} has {len(info.channels())} feature levels; UPerNet needs {LEVELS}")
        self.widths = tuple(info.channels()[-LEVELS:])
        self.patch = int(info.reduction()[-LEVELS]) if one_size else 1
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        self.normalize = normalize
        if normalize:
            if config is None:
                raise ValueError(f"backbone {name!r} has no mean and standard deviation to normalise with")
            self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N,3,H,W) in [0,1] to four feature maps (N,widths[i],h,w), the largest first.

        Raises:
            ModelError: the backbone refuses images of this size, or its features are not what timm says they are.
        """
        height, width = images.shape[-2:]
        x = (images - self.mean) / self.std if self.normalize else images
        if self.patch > 1:
            x = F.pad(x, (0, -width % self.patch, 0, -height % self.patch))
        try:
            features = list(self.body(x))[-LEVELS:]
        except AssertionError as error:  # how timm models refuse a size
            raise ModelError(f"Backbone {self.name!r} takes no images of {width}x{height} pixels. {error}") from error
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        if [feature.shape[1:-2] for feature in features] != [(channels,) for channels in self.widths]:
            shapes = [tuple(feature.shape) for feature in features]
            raise ModelError(f"Backbone {self.name!r} gives features {shapes}, not {self.widths} channels by H by W.")
        return features


def _features(name: str, options: dict[str, Any]) -> Any:
    """The feature extractor of a timm model with random weights."""
    try:
        return timm.create_model(name, features_only=True, pretrained=False, **options)
    except TypeError as error:  # how timm models say that they do not know an argument
        if ANY_SIZE not in str(error):
            raise
        raise ValueError(f"backbone {name!r} gives no feature pyramid for images of any size") from error
