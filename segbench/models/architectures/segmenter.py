"""Segmenter: a vision transformer and a mask transformer that classifies its patches.

Sources: Strudel et al., "Segmenter: Transformer for Semantic Segmentation", ICCV 2021 (section 3); Dosovitskiy et
al., "An Image is Worth 16x16 Words", ICLR 2021 (encoder). Sizes and conventions: SEA.md, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from segbench.models.architectures.blocks import TransformerBlock
from segbench.models.architectures.upernet import resize

IMAGENET_CLASSES = 1000


def blocks(width: int, heads: int, drop_path_rates: Sequence[float]) -> nn.Sequential:
    """Pre-norm transformer blocks, one for each rate of stochastic depth; MLPs are four times as wide."""
    return nn.Sequential(*(TransformerBlock(width, heads, rate) for rate in drop_path_rates))


def resize_position_embedding(embedding: Float[Tensor, "1 n d"], size: Sequence[int]) -> Float[Tensor, "1 m d"]:
    """The embedding of class token and square grid, the grid interpolated bilinearly to ``size`` (rows, columns)."""
    side = int((embedding.shape[1] - 1) ** 0.5)
    if tuple(size) == (side, side):
        return embedding
    token, grid = embedding[:, :1], embedding[:, 1:]
    grid = resize(grid.reshape(1, side, side, -1).permute(0, 3, 1, 2), size)
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, projected linearly: (N,3,H,W) to (N,width,H/patch,W/patch)."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.proj(images)
        return out


class VisionTransformer(nn.Module):
    """Encoder: images to one feature vector a patch.

    ``head`` is the ImageNet classifier that the released checkpoint still carries. No forward pass uses it, so it is
    frozen; it is here so that the released state dict loads whole and parameters are counted as published.

    Args:
        width, depth, heads: of the transformer.
        patch: side of a patch in pixels.
        image_size: side in pixels of the square images that the position embedding is for.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 (training only).
    """

    def __init__(
        self, width: int, depth: int, heads: int, patch: int, image_size: int, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.patch = patch
        self.pooled_width = width
        self.patch_embed = PatchEmbedding(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, width))
        self.blocks = blocks(width, heads, np.linspace(0, drop_path_rate, depth).tolist())
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, IMAGENET_CLASSES).requires_grad_(False)

    dense_only: tuple[nn.Module, ...] = ()

    def pooled(self, images: Tensor) -> Tensor:
        """The class token, (N,pooled_width)."""
        token: Tensor = self(images)[:, 0]
        return token

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,3,H,W), H and W multiples of the patch, to tokens (N,1+HW/patch²,width), the class token first."""
        x = self.patch_embed(images)
        positions = resize_position_embedding(self.pos_embed, x.shape[-2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        out: Tensor = self.norm(self.blocks(x + positions))
        return out


class MaskTransformer(nn.Module):
    """Decoder: class embeddings join the patches; a mask is the cosine of a class with each patch.

    The masks of all classes are layer-normalised at each patch.
    """

    def __init__(self, num_classes: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.proj_dec = nn.Linear(width, width)
        self.cls_emb = nn.Parameter(torch.zeros(1, num_classes, width))
        self.blocks = blocks(width, heads, [0.0] * depth)
        self.decoder_norm = nn.LayerNorm(width)
        # not torch.randn times a number: for a draft without memory, that imports torch's whole compiler
        self.proj_patch = nn.Parameter(nn.init.normal_(torch.empty(width, width), std=width**-0.5))
        self.proj_classes = nn.Parameter(nn.init.normal_(torch.empty(width, width), std=width**-0.5))
        self.mask_norm = nn.LayerNorm(num_classes)

    def forward(self, patches: Tensor) -> Tensor:
        """Patch features (N,P,width) to class scores (N,P,K)."""
        x = torch.cat([self.proj_dec(patches), self.cls_emb.expand(len(patches), -1, -1)], dim=1)
        x = self.decoder_norm(self.blocks(x))
        features = F.normalize(x[:, : -self.num_classes] @ self.proj_patch, dim=-1)
        classes = F.normalize(x[:, -self.num_classes :] @ self.proj_classes, dim=-1)
        out: Tensor = self.mask_norm(features @ classes.transpose(1, 2))
        return out


class Segmenter(nn.Module):
    """Encoder and decoder, of ``decoder_depth`` blocks. It has no auxiliary head."""

    def __init__(
        self, encoder: VisionTransformer, num_classes: int, width: int, heads: int, decoder_depth: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = MaskTransformer(num_classes, width, decoder_depth, heads)
        self.apply(_initialise)
        for parameter in (encoder.cls_token, encoder.pos_embed, self.decoder.cls_emb):
            nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def backbone(self) -> nn.Module:
        """The encoder; see `segbench.models.contract`."""
        return self.encoder

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n k h w"]:
        """Images (N,3,H,W) in [0,1] to logits (N,K,H,W).

        Images are padded with zeros on the right and at the bottom to a multiple of the patch; logits are cropped.
        """
        height, width = images.shape[-2:]
        patch = self.encoder.patch
        padded = F.pad(images, (0, -width % patch, 0, -height % patch))
        rows, columns = padded.shape[-2] // patch, padded.shape[-1] // patch
        scores = self.decoder(self.encoder(padded)[:, 1:])
        masks = scores.transpose(1, 2).unflatten(2, (rows, columns))
        return resize(masks, padded.shape[-2:])[..., :height, :width]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
