"""Any backbone of timm with four feature levels, by name and without weights."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from segbench.errors import ModelError, unknown_name

LEVELS = 4
# Models that are made for images of one size take others with one of these; the first that a model knows is used.
ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})


class TimmBackbone(nn.Module):
    """The last four feature maps of a timm model.

    Args:
        name: of ``timm.list_models()``. Cards come from strangers, so names that reach the network or the disk
            (``hf-hub:...``, ``local-dir:...``, a tag of pretrained weights) are refused.
        normalize: subtract the mean and divide by the standard deviation of the model's ``pretrained_cfg``.

    Raises:
        ValueError: unknown name, fewer than four levels, or a model for images of one size only.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, *, normalize: bool) -> None:
        super().__init__()
        known = timm.list_models()
        if name not in known:
            near = unknown_name("timm model", str(name), known).split(" Known: ")[0]
            raise ValueError(f"{near} A backbone is a name of timm.list_models(), without a tag or source")
        self.name = name
        self.body = _features(name)
        info = self.body.feature_info
        if len(info.channels()) < LEVELS:
            raise ValueError(f"backbone {name!r} has {len(info.channels())} feature levels; UPerNet needs {LEVELS}")
        self.widths = tuple(info.channels()[-LEVELS:])
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        self.normalize = normalize
        if normalize:
            config = self.body.pretrained_cfg
            self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N,3,H,W) in [0,1] to four feature maps (N,widths[i],h,w), the largest first."""
        x = (images - self.mean) / self.std if self.normalize else images
        features = list(self.body(x))[-LEVELS:]
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        if [feature.shape[1:-2] for feature in features] != [(width,) for width in self.widths]:
            shapes = [tuple(feature.shape) for feature in features]
            raise ModelError(f"Backbone {self.name!r} gives features {shapes}, not {self.widths} channels by H by W.")
        return features


def _features(name: str) -> Any:
    """The feature extractor of a timm model, one that takes images of any size."""
    entry = timm.get_pretrained_cfg(name)
    options: tuple[dict[str, Any], ...] = ANY_SIZE if entry is not None and entry.fixed_input_size else ({},)
    for option in options:
        try:
            return timm.create_model(name, features_only=True, pretrained=False, **option)
        except TypeError as error:  # how timm models say that they do not know an option
            if not option or not any(key in str(error) for key in option):
                raise
    raise ValueError(f"backbone {name!r} takes images of one size only; segbench needs one for any size")
