"""From a model id, a card's path or a function's name to a module in eval mode."""

from __future__ import annotations

import hashlib
import importlib
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from segbench.cards import ModelCard, get_card, read_card
from segbench.errors import ModelError
from segbench.files import sha256_bytes
from segbench.models.architectures import build_described, load_weights


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        module: images (N,3,H,W) in [0,1] to logits (N,K,H,W).
        id: the card's id, or a name made from the function or class.
        card: None for a user's own model.
        weights_sha256: of the weights file, or of the state dict of a user's own module.
    """

    module: nn.Module
    id: str
    card: ModelCard | None
    weights_sha256: str


def load_model(model: str, *, device: str | torch.device = "cpu") -> nn.Module:
    """A model of the zoo as a plain module in eval mode.

    Args:
        model: an id (`segbench models`), or the path of a card, ``folder/<id>.json`` with the weights beside it.
        device: where the module goes.

    Returns:
        A module that maps images (N,3,H,W), float in [0,1], to logits (N,K,H,W).

    Raises:
        ModelError: unknown id, weights missing, damaged or of another shape.
        ContentError: the card is damaged.
    """
    card = read_card(Path(model)) if model.endswith(".json") else get_card(model)
    return load_card(card).module.to(device)


def load_card(card: ModelCard) -> Subject:
    """Builds the card's architecture and loads its weights, their hash checked first."""
    if not card.sources:
        raise ModelError(f"The weights of {card.id} are not published: its card has no source.")
    if card.path is None:
        raise ModelError(f"The card of {card.id} was not read from a file, so the weights beside it cannot be found.")
    path = card.path.parent / card.sources[0]["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"Cannot read the weights of {card.id}: {error}") from error
    digest = sha256_bytes(data)
    if card.sha256 is not None and digest != card.sha256:
        raise ModelError(
            f"The weights {path} are not those of the card: SHA-256 is {digest}, the card says {card.sha256}. "
            "Restore the file (git checkout, or pip install --force-reinstall segbench)."
        )
    try:
        state_dict = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"The weights {path} are damaged: {error}") from error
    module = build_described(card.architecture, num_classes=card.num_classes, parameters=card.parameters)
    load_weights(module, state_dict, source=str(path))
    return Subject(module.eval(), card.id, card, digest)


def resolve(model: str | nn.Module) -> Subject:
    """A model id, a card's path, ``package.module:function`` (called without arguments) or a module.

    Raises:
        ModelError: it cannot be found, or the function does not return a module.
    """
    if not isinstance(model, str | nn.Module):
        kind = type(model).__name__
        raise ModelError(f"A model is an id, a card path, package.module:function or a torch.nn.Module, not {kind}.")
    if isinstance(model, nn.Module):
        return Subject(model, _identifier(type(model).__name__), None, _state_hash(model))
    if ":" in model:
        return _from_function(model)
    return load_card(read_card(Path(model)) if model.endswith(".json") else get_card(model))


def _from_function(spec: str) -> Subject:
    module_name, _, function_name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # importing a user's file may raise anything
        raise ModelError(
            f"Cannot import {spec!r}: {error}. Write package.module:function; "
            "the module must be importable from here (PYTHONPATH=.)."
        ) from error
    if not callable(function):
        raise ModelError(
            f"{spec} is no function. Write package.module:function; the function returns a torch.nn.Module."
        )
    try:
        module = function()
    except Exception as error:  # a user's code may raise anything
        raise ModelError(
            f"{spec}() failed: {type(error).__name__}: {error}. It is called without arguments."
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{spec}() must return a torch.nn.Module; it gave {type(module).__name__}.")
    return Subject(module, _identifier(function_name), None, _state_hash(module))


def _identifier(name: str) -> str:
    """A valid model id made from a Python name.

    >>> _identifier("MyNet")
    'mynet'
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:80] or "model"


def _state_hash(module: nn.Module) -> str:
    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}".encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"\0{key}\0".encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:  # a module's extra state
            digest.update(repr(value).encode())
    return digest.hexdigest()
