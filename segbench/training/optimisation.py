"""Optimiser, learning rate and averaged weights of a recipe."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segbench.models.contract import backbone_of
from segbench.training.recipe import Recipe


def learning_rate_factor(step: int, warmup: int, steps: int, power: float = 1.0) -> float:
    """Linear warm-up over ``warmup`` steps, then polynomial decay to 0 at ``steps``.

    >>> [learning_rate_factor(step, 2, 6) for step in (0, 1, 2, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return (step + 1) / warmup
    return float((max(steps - step, 0) / max(steps - warmup, 1)) ** power)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD. Backbone and the rest have learning rates of their own; norms and biases do not decay."""
    backbone = {id(parameter) for parameter in backbone_of(model).parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in backbone, parameter.ndim > 1), []).append(parameter)
    settings = [
        {
            "params": parameters,
            "lr": recipe.learning_rate * (1.0 if in_backbone else recipe.head_learning_rate_factor),
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for (in_backbone, decays), parameters in groups.items()
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(settings, momentum=recipe.momentum)
    return torch.optim.AdamW(settings, betas=(recipe.betas[0], recipe.betas[1]))


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_an_epoch: int) -> LambdaLR:
    """The learning rate of each optimiser step."""
    warmup, steps = round(recipe.warmup_epochs * steps_an_epoch), recipe.epochs * steps_an_epoch
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, warmup, steps, recipe.power))


def make_average(model: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """An exponential moving average of weights and statistics; None if the recipe has none."""
    if not recipe.ema:
        return None
    average = get_ema_multi_avg_fn(recipe.ema)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no number is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
