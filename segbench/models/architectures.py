"""Architectures by name, and the map from the released checkpoints' layout to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segbench.errors import ModelError, UnknownNameError, unknown_name
from segbench.models.convnext import ConvNeXtBackbone
from segbench.models.upernet import UPerNet


def upernet_convnext(
    *,
    num_classes: int,
    depths: Sequence[int] = (3, 3, 9, 3),
    widths: Sequence[int] = (96, 192, 384, 768),
    channels: int = 512,
    auxiliary_channels: int = 256,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """UPerNet on ConvNeXt with a ConvStem; the defaults are ConvNeXt-T as released (SEA.md, section 7)."""
    whole = {"depths": depths, "widths": widths, "channels": [channels], "auxiliary_channels": [auxiliary_channels]}
    for key, values in whole.items():
        if not all(type(value) is int and value > 0 for value in values):
            raise ValueError(f"{key} must be positive whole numbers, not {values!r}")
    if not len(depths) == len(widths) == 4:
        raise ValueError(f"depths and widths must be four numbers each, not {depths!r} and {widths!r}")
    if widths[0] < 2:
        raise ValueError("the stem needs widths[0] of 2 or more")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be in [0,1), not {drop_path_rate!r}")
    if sum(depths) > MAX_DEPTH:
        raise ValueError(f"{sum(depths)} blocks are more than {MAX_DEPTH}")
    model = UPerNet(ConvNeXtBackbone(depths, widths, drop_path_rate), num_classes, channels, auxiliary_channels)
    return model.to(memory_format=torch.channels_last)


MAX_PARAMETERS = 2_000_000_000  # of a model that is built: cards come from strangers
MAX_DEPTH = 1000  # blocks of a model; each costs time even before its parameters are counted
RESERVED = ("name", "num_classes")  # not arguments: the card has fields for them

ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = {"upernet_convnext": upernet_convnext}

# The released models: our architecture and its arguments.
RELEASED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "upernet_convnext_t": ("upernet_convnext", {}),
    "upernet_convnext_s": ("upernet_convnext", {"depths": (3, 3, 27, 3)}),
}

# Released name -> our name; applied in order to each key.
_UPERNET_RENAMES = (
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
)


def build(name: str, *, num_classes: int, **arguments: Any) -> nn.Module:
    """An architecture with random weights.

    Raises:
        UnknownNameError: unknown name.
        ModelError: arguments that the architecture does not take, or too many parameters.
    """
    return build_described({"name": name, "arguments": arguments}, num_classes=num_classes)


def build_described(architecture: Mapping[str, Any], *, num_classes: int, parameters: int | None = None) -> nn.Module:
    """The ``architecture`` of a card (``name``, ``arguments``) with random weights.

    It is built without memory first, so that a card cannot ask for more than a model may have.

    Args:
        architecture: from a card or a recipe; not trusted.
        num_classes: K.
        parameters: how many the card says there are; None where it does not say.

    Raises:
        UnknownNameError: unknown name.
        ModelError: arguments that the architecture does not take, too many parameters, or not as many as the card says.
    """
    name, arguments = architecture["name"], architecture["arguments"]
    if name not in ARCHITECTURES:
        raise UnknownNameError(unknown_name("architecture", name, ARCHITECTURES))
    mend = "Correct `architecture.arguments`."
    if reserved := [key for key in RESERVED if key in arguments]:
        raise ModelError(f"Architecture {name!r}: {reserved[0]!r} is a field of the card, not an argument. {mend}")
    try:
        with torch.device("meta"):
            draft = ARCHITECTURES[name](num_classes=num_classes, **arguments)
    except Exception as error:  # what the arguments break is not known here
        raise ModelError(f"Architecture {name!r} does not take these arguments: {error}. {mend}") from error
    found = sum(parameter.numel() for parameter in draft.parameters())
    if found > MAX_PARAMETERS:
        raise ModelError(
            f"Architecture {name!r} would have {found} parameters; at most {MAX_PARAMETERS} are built. {mend}"
        )
    if parameters not in (None, found):
        raise ModelError(
            f"Architecture {name!r} would have {found} parameters, the card says {parameters}. "
            "Correct `architecture.arguments` or `parameters`."
        )
    try:
        return ARCHITECTURES[name](num_classes=num_classes, **arguments)
    except (MemoryError, RuntimeError) as error:
        raise ModelError(f"There is no memory for the {found} parameters of {name!r}: {error}") from error


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], *, source: str) -> None:
    """Copies a state dict into ``model``; every key and shape must fit.

    Raises:
        ModelError: lists the first ten missing, surplus and misshaped keys.
    """
    own = model.state_dict()
    problems = [f"missing {key}" for key in own.keys() - state_dict.keys()]
    problems += [f"surplus {key}" for key in state_dict.keys() - own.keys()]
    problems += [
        f"{key} is {tuple(state_dict[key].shape)}, the model has {tuple(own[key].shape)}"
        for key in own.keys() & state_dict.keys()
        if own[key].shape != state_dict[key].shape
    ]
    if problems:
        listed = "\n  ".join(sorted(problems)[:10])
        raise ModelError(
            f"The weights of {source} do not fit the architecture ({len(problems)} keys):\n  {listed}\n"
            "Likely cause: another architecture, other arguments or another number of classes in the card."
        )
    model.load_state_dict(state_dict)


def from_released(architecture: str, state_dict: Mapping[str, Tensor], *, num_classes: int) -> nn.Module:
    """A released checkpoint in its authors' layout, as a module in eval mode.

    Args:
        architecture: ``upernet_convnext_t`` or ``upernet_convnext_s``.
        state_dict: released names to tensors.
        num_classes: K, 21 for Pascal VOC and 151 for ADE20K.

    Raises:
        ModelError: unknown architecture, or keys that do not fit.
    """
    if architecture not in RELEASED:
        raise UnknownNameError(unknown_name("released architecture", architecture, RELEASED))
    name, arguments = RELEASED[architecture]
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in _UPERNET_RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    model = build(name, num_classes=num_classes, **arguments)
    dtypes = {value.dtype for value in state_dict.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    load_weights(model, renamed, source=f"the released {architecture}")
    return model.eval()
