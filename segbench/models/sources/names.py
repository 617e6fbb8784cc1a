"""Whatever names a model, parsed once into a typed source. No weights are touched and no library is imported.

| Name | Source, built by a file of this folder |
| :-- | :-- |
| ``pirat_convnext_t_voc``, ``folder/<id>.json`` | `CardSource`, ``card`` |
| ``torchvision:<name>[@WEIGHTS]`` | `LibrarySource`, ``torchvision`` |
| ``hf:<repo or ./folder>[@revision]`` | `LibrarySource`, ``hf``: transformers |
| ``smp:<repo, ./folder or architecture>`` | `LibrarySource`, ``smp``: segmentation_models_pytorch |
| ``timm:<backbone>`` | `LibrarySource`, ``timm``: UPerNet on a backbone of timm |
| ``package.module:function``, ``./file.py:function``, a plugin | `FunctionSource`, ``function`` |
| a ``torch.nn.Module`` | `ModuleSource`, which needs no building |

Options follow after ``?``: ``timm:convnext_tiny?num_classes=21&weights=best.safetensors``. Values are whole numbers,
floats, true, false, none, or else text (percent-encoding is understood: ``%26`` is ``&``). Functions get them as
keyword arguments. ``weights=<path>`` is loaded strictly and read without executing anything in it; ``key=model_ema``
beside it names the entry of that file that holds the weights, where it has several.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from urllib.parse import quote, unquote

from torch import nn

from segbench.attacks.modules import kind_of
from segbench.cards import ModelCard, get_card, read_card
from segbench.errors import ModelError, UnknownNameError
from segbench.plugins import get_plugin

Value = int | float | bool | str | None
Options = Mapping[str, Value]
NO_OPTIONS: Options = MappingProxyType({})
MAX_ID = 80
LIBRARIES = {
    "torchvision": "torchvision:deeplabv3_resnet50",
    "hf": "hf:nvidia/segformer-b0-finetuned-ade-512-512",
    "smp": "smp:unet?encoder_name=resnet18&classes=21&weights=unet.safetensors",
    "timm": "timm:convnext_tiny?num_classes=21&weights=upernet.safetensors",
}  # with an example of each


@dataclass(frozen=True)
class CardSource:
    """A card of the zoo, or of one's own. In each source ``public_name`` names no folder of this machine."""

    card: ModelCard
    public_name: str

    @property
    def id(self) -> str:
        return self.card.id


@dataclass(frozen=True)
class LibrarySource:
    """A model of a library, a key of `LIBRARIES`.

    ``name`` is a name of the library, ``owner/repository`` of the Hub, or ``./folder``; ``revision`` of the Hub, or the
    name of weights.
    """

    library: str
    name: str
    revision: str | None
    options: Options
    id: str
    public_name: str


@dataclass(frozen=True)
class FunctionSource:
    """A function that returns a module; ``owner`` begins each message, and names the package of a plugin."""

    name: str
    options: Options
    id: str
    public_name: str
    owner: str = ""


@dataclass(frozen=True)
class ModuleSource:
    """A module of the caller."""

    module: nn.Module

    @property
    def id(self) -> str:
        return identifier(self.public_name)

    @property
    def public_name(self) -> str:
        return type(self.module).__name__


ModelSource = CardSource | LibrarySource | FunctionSource | ModuleSource


def parse(model: str | nn.Module) -> ModelSource:
    """The source of whatever names a model; ModelError, UnknownNameError or ContentError says what is wrong.

    >>> parse("timm:convnext_tiny?num_classes=21&channels=512").options["channels"]
    512
    >>> parse("hf:nvidia/segformer-b0@main").revision, parse("at_convnext_mini_shapes").card.dataset
    ('main', 'shapes')
    """
    if isinstance(model, nn.Module):
        return ModuleSource(model)
    if not isinstance(model, str):
        raise ModelError(
            f"A model is an id, a card path, package.module:function or a torch.nn.Module, not {kind_of(model)}"
        )
    if model.endswith(".json"):
        return CardSource(read_card(Path(model)), PurePath(model).name)
    if ":" in model or model.endswith(".py"):
        return _spec(model)
    try:
        return CardSource(get_card(model), model)
    except UnknownNameError:
        if plugin := get_plugin(model):
            owner = f"The model {plugin.name!r} of the package {plugin.package} {plugin.version}: "
            return FunctionSource(plugin.value, NO_OPTIONS, plugin.name, plugin.name, owner)
        raise


def _spec(text: str) -> LibrarySource | FunctionSource:
    head, question, query = text.partition("?")
    options = _options(query, text) if question else NO_OPTIONS
    library, _, name = head.partition(":")
    if library not in LIBRARIES:
        return FunctionSource(head, options, _function_id(head, options), _public(text))
    revision = None
    if "@" in name and not name.endswith("@") and not is_path(name):  # a folder has no revisions
        name, _, revision = name.rpartition("@")
    if not name:
        raise ModelError(f"The spec {text!r} names no model. Write {library}:<name>, as in {LIBRARIES[library]}")
    hidden = [name] if is_path(name) else []
    parts = [library, PurePath(name).name if hidden else name, revision or ""]
    return LibrarySource(library, name, revision, options, _id(parts, hidden, options), _public(text))


def is_path(name: str) -> bool:
    """Whether a model's name looks like a path of this machine: ``./folder``, ``/folder`` or ``~/folder``."""
    return name.startswith((".", "/", "~", "\\")) or bool(re.match(r"[A-Za-z]:[\\/]", name))


def _options(query: str, text: str) -> Options:
    options: dict[str, Value] = {}
    for part in query.split("&"):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise ModelError(f"{part!r} in the spec {text!r} is no option. Write ?key=value&key=value after the name.")
        if key in options:
            raise ModelError(f"The spec {text!r} says {key} twice. Leave out one of them.")
        options[key] = unquote(value) if key == "weights" else _value(unquote(value))
    return MappingProxyType(options)


def _value(text: str) -> Value:
    """An option's value.

    >>> [_value(text) for text in ("3", "0.5", "1e-3", "true", "None", "resnet18")]
    [3, 0.5, 0.001, True, None, 'resnet18']
    """
    words: dict[str, Value] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.\d*|\.?\d+)(e[+-]?\d+)?", text, re.IGNORECASE):
        return float(text)
    return text


def identifier(name: str) -> str:
    """A valid model id made from any text; what is too long ends in a hash.

    >>> identifier("MyNet")
    'mynet'
    """
    whole = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "model"
    return whole if len(whole) <= MAX_ID else f"{whole[: MAX_ID - 9]}_{_digest(name)[:8]}"


def _function_id(name: str, options: Options) -> str:
    """A model id made from a function's name.

    >>> parse("package.models:net?depth=3").id, parse("torchvision:fcn_resnet50").id
    ('models_net_depth_3', 'torchvision_fcn_resnet50')
    """
    target, _, function = name.rpartition(":")
    if target.endswith(".py"):
        return _id([PurePath(target).stem, function], [str(PurePath(target).parent)], options)
    return _id([*target.split(".")[1:], function], [], options)


def _id(parts: list[str], hidden: list[str], options: Options) -> str:
    """A model id made from parts of a name and options; a hash stands for the folders, ``hidden`` and of options."""
    for key, value in options.items():
        if key == "weights" or "/" in str(value) or "\\" in str(value):
            hidden.append(str(PurePath(str(value)).parent))
            value = PurePath(str(value)).stem
        parts.append(f"{key}_{value}")
    hidden = [folder for folder in hidden if folder not in (".", "")]
    return identifier("_".join(filter(None, [*parts, _digest("\0".join(hidden))[:6] if hidden else ""])))


def _public(text: str) -> str:
    """A spec as it may be published: of folders of this machine only the last name is kept.

    >>> _public("/home/me/net.py:build?weights=/home/me/best.pt&width=3")
    './net.py:build?weights=best.pt&width=3'
    >>> _public("hf:./runs/mine"), _public("hf:a/b@main")
    ('hf:./mine', 'hf:a/b@main')
    """
    head, question, query = text.partition("?")
    library, colon, name = head.partition(":")
    target, _, function = head.rpartition(":")
    if target.endswith(".py"):
        head = f"./{PurePath(target).name}:{function}"
    elif library in LIBRARIES and is_path(name):
        head = f"{library}{colon}./{PurePath(name).name}"
    return head + question + "&".join(map(_public_option, query.split("&")))


def _public_option(part: str) -> str:
    key, equals, value = part.partition("=")
    path = unquote(value).replace("\\", "/")
    return key + equals + (quote(PurePath(path).name) if "/" in path else value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
