"""Models that are not in the zoo, named by a spec: of other libraries, of a function, of a plugin.

| Spec | Model |
| :-- | :-- |
| ``torchvision:<name>[@WEIGHTS]`` | `segbench.models.adapters.torchvision` |
| ``hf:<repo or ./folder>[@revision]`` | `segbench.models.adapters.hf` (transformers) |
| ``smp:<repo or ./folder>``, ``smp:<architecture>`` | `segbench.models.adapters.smp` (segmentation_models_pytorch) |
| ``timm:<backbone>`` | `segbench.models.adapters.timm` (UPerNet on a backbone of timm) |
| ``package.module:function``, ``./file.py:function`` | `segbench.models.adapters.python` |

Options follow after ``?``: ``timm:convnext_tiny?num_classes=21&weights=best.safetensors``. Values are whole numbers,
floats, true, false, none, or else text (percent-encoding is understood: ``%26`` is ``&``). Functions get them as
keyword arguments. ``weights=<path>`` is loaded strictly and read without executing anything in it.

All give a module in eval mode that maps images (N,3,H,W), float in [0,1], to logits (N,K,H,W) at image size;
normalisation is inside. The libraries are imported when a spec needs them.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType
from urllib.parse import quote, unquote

from torch import nn

from segbench.downloads import offline_by_environment
from segbench.errors import ModelError
from segbench.models.adapters.hub import without_hub
from segbench.models.adapters.wrap import Options, Value, is_path, with_background
from segbench.plugins import Plugin

__all__ = ["Adapted", "Spec", "adapt", "from_plugin", "identifier", "is_spec", "parse", "with_background"]

LIBRARIES = ("torchvision", "hf", "smp", "timm")
MAX_ID = 80


@dataclass(frozen=True)
class Spec:
    """A spec, taken apart.

    Attributes:
        text: as written.
        library: of `LIBRARIES`, or ``python``.
        name: of the model; for ``python`` the whole ``module:function``.
        revision: after ``@``: a revision of the hub, the name of weights.
        options: after ``?``.
    """

    text: str
    library: str
    name: str
    revision: str | None
    options: Options


@dataclass(frozen=True)
class Adapted:
    """A module in eval mode, images (N,3,H,W) in [0,1] to logits (N,K,H,W), and a model id made from its spec."""

    module: nn.Module
    id: str


def is_spec(text: str) -> bool:
    """Whether ``text`` is a spec, and not a model id or the path of a card.

    >>> [is_spec(text) for text in ("torchvision:fcn_resnet50", "net.py", "at_convnext_mini_shapes", "C:/x/card.json")]
    [True, True, False, False]
    """
    return not text.endswith(".json") and (":" in text or text.endswith(".py"))


def adapt(spec: str, *, num_classes: int | None = None, offline: bool = False) -> Adapted:
    """The model that a spec names.

    Args:
        spec: see the module.
        num_classes: classes of the data set. A model of one class less that was trained with labels reduced by one
            gets a background channel; an architecture whose spec does not say its number of classes gets these.
        offline: never use the network.

    Raises:
        ModelError: the spec is wrong, a library or weights are missing, or the model cannot be built.
    """
    parsed = parse(spec)
    offline = offline or offline_by_environment()
    if parsed.library == "python":
        from segbench.models.adapters import python

        module = python.load(parsed.name, parsed.options)
    else:
        adapter = importlib.import_module(f"{__name__}.{parsed.library}")
        with without_hub() if offline else nullcontext():
            module = adapter.load(
                parsed.name, revision=parsed.revision, options=parsed.options, num_classes=num_classes, offline=offline
            )
    own = getattr(module, "num_classes", None)
    if num_classes is not None and own == num_classes - 1 and getattr(module, "reduced_labels", False):
        module = with_background(module)
    return Adapted(module.eval(), _spec_id(parsed))


def from_plugin(plugin: Plugin) -> nn.Module:
    """Calls the function of a plugin.

    Raises:
        ModelError: it cannot be imported, fails or gives no module; the package is named.
    """
    from segbench.models.adapters import python

    owner = f"The model {plugin.name!r} of the package {plugin.package} {plugin.version}: "
    return python.load(plugin.value, MappingProxyType({}), owner=owner).eval()


def parse(text: str) -> Spec:
    """Takes a spec apart.

    >>> parse("timm:convnext_tiny?num_classes=21&channels=512").options["channels"]
    512
    >>> parse("hf:nvidia/segformer-b0@main").revision
    'main'

    Raises:
        ModelError: it is no spec.
    """
    head, question, query = text.partition("?")
    options = _options(query, text) if question else MappingProxyType({})
    library, _, name = head.partition(":")
    if library not in LIBRARIES:
        return Spec(text, "python", head, None, options)
    revision = None
    if "@" in name and not name.endswith("@") and not is_path(name):  # a folder has no revisions
        name, _, revision = name.rpartition("@")
    if not name:
        raise ModelError(f"The spec {text!r} names no model. Write {library}:<name>, as in {_EXAMPLES[library]}")
    return Spec(text, library, name, revision, options)


_EXAMPLES = {
    "torchvision": "torchvision:deeplabv3_resnet50",
    "hf": "hf:nvidia/segformer-b0-finetuned-ade-512-512",
    "smp": "smp:unet?encoder_name=resnet18&classes=21&weights=unet.safetensors",
    "timm": "timm:convnext_tiny?num_classes=21&weights=upernet.safetensors",
}


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


def _spec_id(spec: Spec) -> str:
    """A model id made from a spec. It names no folder of this machine; a hash stands for one.

    >>> _spec_id(parse("torchvision:fcn_resnet50"))
    'torchvision_fcn_resnet50'
    >>> _spec_id(parse("package.models:net?depth=3"))
    'models_net_depth_3'
    """
    parts = [] if spec.library == "python" else [spec.library]
    hidden = []  # folders
    if spec.library != "python":
        if is_path(spec.name):
            hidden.append(spec.name)
        parts += [PurePath(spec.name).name if is_path(spec.name) else spec.name, spec.revision or ""]
    else:
        target, _, function = spec.name.rpartition(":")
        if target.endswith(".py"):
            hidden.append(str(PurePath(target).parent))
            parts += [PurePath(target).stem, function]
        else:
            parts += [*target.split(".")[1:], function]
    for key, value in spec.options.items():
        if key == "weights" or "/" in str(value) or "\\" in str(value):
            hidden.append(str(PurePath(str(value)).parent))
            value = PurePath(str(value)).stem
        parts.append(f"{key}_{value}")
    hidden = [folder for folder in hidden if folder not in (".", "")]
    return identifier("_".join(filter(None, [*parts, _digest("\0".join(hidden))[:6] if hidden else ""])))


def public(text: str) -> str:
    """A spec as it may be published: of folders of this machine only the last name stays.

    >>> public("/home/me/net.py:build?weights=/home/me/best.pt&width=3")
    './net.py:build?weights=best.pt&width=3'
    >>> public("hf:./runs/mine"), public("hf:a/b@main")
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
