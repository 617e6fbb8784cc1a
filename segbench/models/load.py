"""From a model id, a card's path, a plugin's name or a spec to a module in eval mode."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from segbench import downloads
from segbench.cards import ModelCard, fetch_weights, get_card, read_card
from segbench.errors import ModelError, UnknownNameError, UsageError
from segbench.models import adapters
from segbench.models.architectures import WithoutDraws, build_described, load_weights
from segbench.models.released import normalise_keys
from segbench.models.weights import read_weights
from segbench.plugins import Plugin, get_plugin


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        module: images (N,3,H,W) in [0,1] to logits (N,K,H,W).
        id: the card's id, or a name made from the function or class.
        card: None for a user's own model.
        weights_sha256: of the weights file; of a user's own module, over its state dict, its printed structure and, if
            there is one, its spec.
    """

    module: nn.Module
    id: str
    card: ModelCard | None
    weights_sha256: str


def load_model(
    model: str,
    *,
    device: str | torch.device = "cpu",
    num_classes: int | None = None,
    offline: bool = False,
    progress: bool = True,
) -> nn.Module:
    """A model as a plain module in eval mode; weights that are not on this machine are downloaded and checked first.

    Args:
        model: an id (`segbench models`); the path of a card, ``folder/<id>.json``; a plugin's name; or a spec:
            ``torchvision:<name>``, ``hf:<repo>[@revision]``, ``smp:<repo or architecture>``, ``timm:<backbone>``,
            ``package.module:function``, ``./file.py:function`` (`segbench.models.adapters`).
        device: where the module goes; ``auto`` is CUDA if there is one.
        num_classes: classes of the data set that a spec's model is meant for; adds the background channel to a model
            that was trained without one.
        offline: never use the network.
        progress: show a bar while downloading.

    Returns:
        A module that maps images (N,3,H,W), float in [0,1], to logits (N,K,H,W).

    Raises:
        ModelError: unknown id, weights missing, damaged or of another shape.
        DownloadError: no source gave the weights; each failure is told.
        ContentError: the card is damaged.
    """
    chosen = choose_device(device)
    return resolve(model, num_classes=num_classes, offline=offline, progress=progress).module.to(chosen)


def load_card(card: ModelCard, *, offline: bool = False, progress: bool = True) -> Subject:
    """Fetches the weights of a card, builds its architecture and loads them, their hash checked first."""
    if not card.sources:
        raise ModelError(
            f"The weights of {card.id} are not published: its card has no source. "
            "Models with weights: segbench models --available"
        )
    fetched = fetch_weights(card, offline=offline, progress=progress)
    try:
        state = normalise_keys(card.architecture["name"], read_weights(fetched.path))
    except ModelError as error:
        if card.sha256 is not None or fetched.source["type"] == "package":
            raise
        pin = downloads.pin_file(card.id, fetched.source)
        raise ModelError(
            f"{error}\nIf the download went wrong: delete {fetched.path} and {pin}, and try again."
        ) from error
    with WithoutDraws():  # the weights come from the file
        module = build_described(card.architecture, num_classes=card.num_classes, parameters=card.parameters)
    load_weights(module, state, source=str(fetched.path))
    return Subject(module.eval(), card.id, card, fetched.sha256)


def choose_device(name: str | torch.device) -> torch.device:
    """``auto`` is CUDA if there is one, else the CPU.

    Raises:
        UsageError: torch cannot use that device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UsageError(
            f"The device {name!r} cannot be used: {str(error).splitlines()[0]}. See: segbench env"
        ) from error
    return device


def resolve(
    model: str | nn.Module, *, num_classes: int | None = None, offline: bool = False, progress: bool = True
) -> Subject:
    """Whatever names a model (see `load_model`), or a module, as the subject of an evaluation.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    if isinstance(model, nn.Module):
        return Subject(model, adapters.identifier(type(model).__name__), None, _state_hash(model))
    if not isinstance(model, str):
        kind = type(model).__name__
        raise ModelError(f"A model is an id, a card path, package.module:function or a torch.nn.Module, not {kind}.")
    if adapters.is_spec(model):
        adapted = adapters.adapt(model, num_classes=num_classes, offline=offline)
        return Subject(adapted.module, adapted.id, None, _state_hash(adapted.module, adapters.public(model)))
    found = find(model)
    if isinstance(found, ModelCard):
        return load_card(found, offline=offline, progress=progress)
    module = adapters.from_plugin(found)
    return Subject(module, found.name, None, _state_hash(module))


def find(model: str) -> ModelCard | Plugin:
    """The card of an id or of a path, or the plugin of that name; no weights are touched.

    Raises:
        UnknownNameError: there is none; the nearest ids are named.
        ContentError: the card is damaged.
    """
    if model.endswith(".json"):
        return read_card(Path(model))
    try:
        return get_card(model)
    except UnknownNameError:
        if plugin := get_plugin(model):
            return plugin
        raise


def _state_hash(module: nn.Module, spec: str = "") -> str:
    """What is known of a module's function without its code: class, structure with its settings, weights, spec."""
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(module))  # an address is another one each time
    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}\0{structure}\0{spec}".encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"\0{key}\0".encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:  # a module's extra state
            digest.update(repr(value).encode())
    return digest.hexdigest()
