"""Models by name, with what the engine knows of them."""

from __future__ import annotations

from typing import Any

from segbench.models.load import LoadedModel, load
from segbench.models.sources.names import parse


def load_named(model: Any, **options: Any) -> LoadedModel:
    """The model with its id and hash; ``options`` as in `segbench.models.load.load`."""
    return load(parse(model), **options)
