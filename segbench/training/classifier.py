"""Classifiers on the backbones of our architectures: what robust initialisation starts from, trained here."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from segbench.errors import ModelError
from segbench.models.pspnet import PSPNet
from segbench.models.segmenter import Segmenter
from segbench.models.upernet import UPerNet


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a model that a classifier's weights can start.

    Raises:
        ModelError: an architecture that is not one of `segbench.models.architectures`.
    """
    if isinstance(model, UPerNet | PSPNet | Classifier):
        return model.backbone
    if isinstance(model, Segmenter):
        return model.encoder
    raise ModelError(f"{type(model).__name__} has no backbone that segbench knows.")


class Classifier(nn.Module):
    """A backbone, the mean of its last features (of a transformer: the class token), and a linear layer.

    It gives an image's class as logits that are the same at each pixel, so that a classifier is trained, attacked and
    scored by the code for segmentation.

    Args:
        model: of `segbench.models.architectures`; its backbone is used.
        num_classes: K.
    """

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone_of(model)
        self.is_transformer = isinstance(model, Segmenter)
        backbone: Any = self.backbone
        width = backbone.pos_embed.shape[-1] if self.is_transformer else backbone.widths[-1]
        self.head = nn.Linear(width, num_classes)
        for norm in list(getattr(backbone, "norms", []))[:-1]:  # of feature maps that a classifier does not use
            norm.requires_grad_(False)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k h w"]:
        """Images (N,3,H,W) in [0,1] to logits (N,K,H,W), constant over the image."""
        features = self.backbone(images)
        pooled = features[:, 0] if self.is_transformer else features[-1].mean(dim=(2, 3))
        logits: Tensor = self.head(pooled)
        return logits[..., None, None].expand(-1, -1, *images.shape[-2:])

    def weights(self) -> dict[str, Tensor]:
        """Entries named as a classifier's: those of the backbone without prefix, and ``head``."""
        head = {f"head.{key}": value for key, value in self.head.state_dict().items()}
        return {**self.backbone.state_dict(), **head}  # in place of the head that a released ViT carries
