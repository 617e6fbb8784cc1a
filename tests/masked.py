"""Models that hide their gradient, each around another model, and are as easily attacked as it."""

from __future__ import annotations

import torch
from torch import nn


class Quantised(nn.Module):
    """The gradient of a rounded input is zero."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(torch.round(x * 64) / 64 + 0 * x)
        return logits


class Saturated(Quantised):
    """Logits so large that softmax is 0 or 1 in float32, and its gradient with it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = 1e6 * self.model(x)
        return logits


class Randomised(Quantised):
    """Rounds up or down at random: no gradient, and no two passes alike."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(torch.floor(x * 16 + torch.rand_like(x)) / 16 + 0 * x)
        return logits


MASKED = (Quantised, Saturated, Randomised)
