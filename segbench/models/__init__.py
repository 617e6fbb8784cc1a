"""Architectures and the way from a model id to a module."""

from segbench.models.load import load_model
from segbench.models.released import from_released, normalise_keys
from segbench.models.sliding import SlidingWindow

__all__ = ["SlidingWindow", "from_released", "load_model", "normalise_keys"]
