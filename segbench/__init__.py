"""segbench: robustness of semantic segmentation, measured by a fixed protocol.

The public names are imported on first use, so that torch is loaded only when something needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segbench import attacks, cards, counts, data, engine, ensemble, entries, evidence, models, protocol
    from segbench.cards import get_card, list_models
    from segbench.data import load_dataset
    from segbench.engine.evaluate import evaluate
    from segbench.engine.model_check import check_model
    from segbench.models import load_model

__version__ = "0.1.0"

_NAMES = {
    "check_model": "segbench.engine.model_check",
    "evaluate": "segbench.engine.evaluate",
    "get_card": "segbench.cards",
    "list_models": "segbench.cards",
    "load_dataset": "segbench.data",
    "load_model": "segbench.models",
}
_MODULES = ("attacks", "cards", "counts", "data", "engine", "ensemble", "entries", "evidence", "models", "protocol")

__all__ = [
    "attacks", "cards", "check_model", "counts", "data", "engine", "ensemble", "entries", "evaluate", "evidence",
    "get_card", "list_models", "load_dataset", "load_model", "models", "protocol",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"segbench.{name}")
    raise AttributeError(f"module 'segbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_MODULES])
