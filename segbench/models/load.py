"""From whatever names a model to a module: parse, fetch and build, identify."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from segbench.attacks.modules import check_module
from segbench.cards import ModelCard
from segbench.downloads import offline_by_environment
from segbench.errors import ModelError
from segbench.models.architectures import ARCHITECTURES
from segbench.models.contract import move, printed, put_in_eval_mode, structure
from segbench.models.devices import choose_device
from segbench.models.float32 import plain_torch
from segbench.models.sources import card as card_source
from segbench.models.sources import function, hub
from segbench.models.sources.image_model import class_name, with_background
from segbench.models.sources.names import CardSource, FunctionSource, LibrarySource, ModelSource, ModuleSource, parse


@dataclass(frozen=True)
class LoadedModel:
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

    @property
    def is_stateless(self) -> bool:
        """Whether threads may share the module. Of a user's module nobody knows what it keeps from pass to pass."""
        return self.card is not None and ARCHITECTURES[self.card.architecture["name"]].is_stateless

    def describe(self) -> dict[str, Any]:
        """The ``model`` of manifests and entries."""
        return {
            "id": self.id,
            "title": self.card.title if self.card else self.id,
            "architecture": self.card.architecture["name"] if self.card else class_name(self.module),
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "weights_sha256": self.weights_sha256,
            "paper": self.card.paper if self.card else None,
        }


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
            ``package.module:function``, ``./file.py:function`` (`segbench.models.sources.names`).
        device: where the module goes; ``auto`` is CUDA if there is one.
        num_classes: classes of the data set that a spec's model is meant for. A model of one class less that was
            trained with labels reduced by one gets a background channel; an architecture whose spec does not say its
            number of classes gets these.
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
    module = load(parse(model), num_classes=num_classes, offline=offline, progress=progress).module
    move(module, chosen)
    return module


@plain_torch()
def load(
    source: ModelSource, *, num_classes: int | None = None, offline: bool = False, progress: bool = True
) -> LoadedModel:
    """Fetches, builds and identifies a model; arguments and errors as in `load_model`.

    A module of the caller stays as it is; others come in eval mode.
    """
    match source:
        case ModuleSource(module):
            check_module(module)
            return LoadedModel(module, source.id, None, _state_hash(module))
        case CardSource(card):
            module, weights_sha256 = card_source.build(card, offline=offline, progress=progress)
            return LoadedModel(module.eval(), card.id, card, weights_sha256)
        case FunctionSource():
            module = function.build(source)
        case LibrarySource():
            offline = offline or offline_by_environment()
            library = importlib.import_module(f"segbench.models.sources.{source.library}")
            with hub.without_hub() if offline else nullcontext():
                module = library.build(source, num_classes=num_classes, offline=offline)
    check_module(module)
    spec = source.public_name
    if isinstance(source, FunctionSource) and source.owner:  # a plugin is what its package made it
        spec = ""
    elif num_classes is not None and getattr(module, "num_classes", None) == num_classes - 1:
        module = with_background(module) if getattr(module, "reduced_labels", False) else module
    put_in_eval_mode(module)
    return LoadedModel(module, source.id, None, _state_hash(module, spec))


# A hash survives a move of our own classes: it is that of the module which first held them.
_MOVED = re.compile(r"^segbench\.models\.(?:architectures|sources)\.(\w+)$")


def _state_hash(module: nn.Module, spec: str = "") -> str:
    """What is known of a module's function without its code: class, structure with its settings, weights, spec."""
    origin = _MOVED.sub(r"segbench.models.\1", type(module).__module__)
    origin = {"segbench.models.image_model": "segbench.models.adapters.wrap"}.get(origin, origin)
    digest = hashlib.sha256(f"{origin}.{type(module).__qualname__}\0{structure(module)}\0{spec}".encode())
    for key, value in sorted(_state(module).items(), key=lambda entry: str(entry[0])):
        digest.update(f"\0{key}\0".encode())
        if not isinstance(value, torch.Tensor):  # a module's extra state
            digest.update(printed(value).encode())
            continue
        digest.update(f"{value.dtype}\0{tuple(value.shape)}\0".encode())
        try:
            for part in _dense_parts(value.detach()):
                digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise ModelError(
                f"{key} of the model, a tensor {value.layout} of {value.dtype}, cannot be read to identify the model: "
                f"{error}. Make it a dense tensor."
            ) from error
    return digest.hexdigest()


def _state(module: nn.Module) -> Mapping[str, Any]:
    """The state dict, and the parameters that one of the user's own leaves out; all tensors where it gives none."""
    state: Any = None
    with suppress(Exception):  # a user's code may raise anything
        state = module.state_dict()
    if not isinstance(state, Mapping):
        return {**dict(module.named_parameters()), **dict(module.named_buffers())}
    known = {_address(value) for value in state.values() if isinstance(value, torch.Tensor)}
    own = {name: value for name, value in module.named_parameters() if name not in state}
    return {**state, **{name: value for name, value in own.items() if _address(value) not in known}}


def _address(tensor: torch.Tensor) -> int:
    """Where the numbers of a tensor are; entries of a state dict under other names have the same address."""
    return tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)


def _dense_parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """A tensor as dense ones: itself, or the indices and values of a sparse one."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return tensor.indices(), tensor.values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)
