"""Classifiers on the backbones of our architectures: what robust initialisation starts from, trained here."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from segbench.models.contract import backbone_of


class Classifier(nn.Module):
    """A backbone, its pooled features (`segbench.models.contract.Backbone`), and a linear layer.

    It gives an image's class as logits that are the same at each pixel, so that a classifier is trained, attacked and
    scored by the code for segmentation.

    Args:
        model: of `segbench.models.architectures`; its backbone is used.
        num_classes: K.

    Raises:
        ModelError: the model has no backbone that can be used.
    """

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        backbone = backbone_of(model)
        self.backbone: Any = backbone
        self.head = nn.Linear(backbone.pooled_width, num_classes)
        for part in backbone.dense_only:
            part.requires_grad_(False)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k h w"]:
        """Images (N,3,H,W) in [0,1] to logits (N,K,H,W), constant over the image."""
        logits: Tensor = self.head(self.backbone.pooled(images))
        return logits[..., None, None].expand(-1, -1, *images.shape[-2:])

    def weights(self) -> dict[str, Tensor]:
        """Entries named as a classifier's: those of the backbone without prefix, and ``head``."""
        head = {f"head.{key}": value for key, value in self.head.state_dict().items()}
        return {**self.backbone.state_dict(), **head}  # in place of the head that a released ViT carries
