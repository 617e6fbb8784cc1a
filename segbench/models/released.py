"""Checkpoints in their authors' layout: unwrapped, renamed to ours and loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from segbench.errors import ModelError, UnknownNameError, unknown_name
from segbench.models.architectures import build
from segbench.models.weights import load_weights

T = TypeVar("T")

# The released models: our architecture and its arguments.
RELEASED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "upernet_convnext_t": ("upernet_convnext", {}),
    "upernet_convnext_s": ("upernet_convnext", {"depths": (3, 3, 27, 3)}),
    "segmenter_vit_s": ("segmenter_vit", {}),
    "pspnet_resnet50": ("pspnet_resnet", {}),
    "pspnet_resnet50_deepstem": ("pspnet_resnet", {"deep_stem": True}),
}

WRAPPERS = ("state_dict", "model", "model_state_dict")  # entries of a checkpoint that hold the weights
PREFIXES = ("module.", "model.", "_orig_mod.")  # of DataParallel, of wrapping modules, of torch.compile

# Released name -> our name, per architecture; applied in order to each key. None matches a name of ours.
# Segmenter has the released names.
RENAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "upernet_convnext": (
        (r"^backbone\.downsample_layers\.0\.stem\.(\d+)\.", r"backbone.stem.\1."),
        (r"^backbone\.downsample_layers\.(\d)\.", r"backbone.stages.\1.downsample."),
        (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),
        (r"^(backbone\.stages\.\d)\.(\d+)\.", r"\1.blocks.\2."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.pwconv(\d)\.", r".mlp.fc\1."),
        (r"^decode_head\.psp_modules\.(\d)\.1\.", r"head.pyramid.branches.\1."),
        (r"^decode_head\.bottleneck\.", "head.pyramid.bottleneck."),
        (r"^decode_head\.lateral_convs\.", "head.laterals."),
        (r"^decode_head\.fpn_convs\.", "head.smooth."),
        (r"^decode_head\.fpn_bottleneck\.", "head.fuse."),
        (r"^decode_head\.", "head."),
        (r"^auxiliary_head\.convs\.0\.", "auxiliary_head.block."),
        (r"\.batch_norm\.", ".norm."),
    ),
    "pspnet_resnet": (
        (r"^layer0\.", "backbone.stem."),
        (r"^layer1\.", "backbone.stages.0."),
        (r"^layer2\.", "backbone.stages.1."),
        (r"^layer3\.", "backbone.stages.2."),
        (r"^layer4\.", "backbone.stages.3."),
        (r"^ppm\.features\.(\d)\.1\.", r"pyramid.branches.\1.conv."),
        (r"^ppm\.features\.(\d)\.2\.", r"pyramid.branches.\1.norm."),
        (r"^cls\.", "head."),
        (r"^aux\.", "auxiliary_head."),
        (r"^((?:auxiliary_)?head)\.0\.", r"\1.block.conv."),
        (r"^((?:auxiliary_)?head)\.1\.", r"\1.block.norm."),
        (r"^((?:auxiliary_)?head)\.4\.", r"\1.classifier."),
    ),
}


def normalise_keys(architecture_name: str, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights as a file holds them, in the layout of our architecture.

    A checkpoint is unwrapped (``{"state_dict": {...}, "epoch": 3}``, also ``model`` and ``model_state_dict``; one
    level), prefixes that all keys share are stripped (``module.``, ``model.``, ``_orig_mod.``), and released names
    become ours. What has our names already passes through unchanged. Whether keys and shapes fit is for
    `load_weights` to say.
    """
    return rename(strip_prefixes(unwrap(state_dict), PREFIXES), RENAMES.get(architecture_name, ()))


def unwrap(state_dict: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint, or a state dict itself; ModelError if there are none, or an entry is no tensor."""
    for wrapper in WRAPPERS:
        if isinstance(inner := state_dict.get(wrapper), Mapping):
            state_dict = inner
            break
    wrong = [key for key, value in state_dict.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if any(not isinstance(key, str) for key in state_dict):
        raise ModelError("The weights have keys that are not names. Save model.state_dict(), or that with its wrapper.")
    if wrong:
        kind = type(state_dict[wrong[0]]).__name__
        raise ModelError(
            f"{wrong[0]!r} is {kind}, not a tensor ({len(wrong)} such entries). Weights are a mapping of names to "
            f"tensors, or a checkpoint with that mapping under {', '.join(map(repr, WRAPPERS))}."
        )
    if not state_dict:
        raise ModelError("The weights are empty: no tensor in the file.")
    return dict(state_dict)


def strip_prefixes(state_dict: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Removes the prefixes that all keys share, whatever their order.

    >>> list(strip_prefixes({"module._orig_mod.a": 1, "module._orig_mod.b": 2}, PREFIXES))
    ['a', 'b']
    """
    state = dict(state_dict)
    while shared := [prefix for prefix in prefixes if state and all(key.startswith(prefix) for key in state)]:
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
    return state


def rename(entries: Mapping[str, T], renames: tuple[tuple[str, str], ...]) -> dict[str, T]:
    """Applies regular expressions and their replacements in order to each key; ModelError if two become the same."""
    renamed: dict[str, T] = {}
    old_names: dict[str, str] = {}
    for old, value in entries.items():
        new = old
        for pattern, replacement in renames:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ModelError(f"{old_names[new]!r} and {old!r} are both {new!r}: the weights mix two layouts. Keep one.")
        renamed[new], old_names[new] = value, old
    return renamed


def from_released(architecture: str, state_dict: Mapping[str, Any], *, num_classes: int) -> nn.Module:
    """A released checkpoint in its authors' layout, as a module in eval mode.

    Args:
        architecture: a name of `RELEASED`: ``upernet_convnext_t``, ``segmenter_vit_s``, ``pspnet_resnet50``, ...
        state_dict: released names to tensors.
        num_classes: K, 21 for Pascal VOC and 151 for ADE20K.

    Raises:
        ModelError: unknown architecture, or keys that do not fit.
    """
    if architecture not in RELEASED:
        raise UnknownNameError(unknown_name("released architecture", architecture, RELEASED))
    name, arguments = RELEASED[architecture]
    weights = normalise_keys(name, state_dict)
    model = build(name, num_classes=num_classes, **arguments)
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    load_weights(model, weights, source=f"the released {architecture}")
    return model.eval()
