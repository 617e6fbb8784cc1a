"""Architectures and the way from a model id to a module."""

from segbench.models.architectures import from_released
from segbench.models.load import load_model

__all__ = ["from_released", "load_model"]
