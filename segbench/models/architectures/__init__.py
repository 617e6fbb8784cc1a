"""Architectures by name, built with random weights.

A new one is a file beside this one, a function and a line in `ARCHITECTURES`. `segbench.models.contract` says what
training needs of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segbench.errors import ModelError, UnknownNameError, unknown_name
from segbench.models.architectures.convnext import ConvNeXtBackbone
from segbench.models.architectures.pspnet import DilatedResNet, PSPNet
from segbench.models.architectures.segmenter import Segmenter, VisionTransformer
from segbench.models.architectures.upernet import UPerNet

MAX_PARAMETERS = 2_000_000_000  # of a model that is built: cards come from strangers
MAX_DEPTH = 1000  # blocks of a model; each costs time even before its parameters are counted
RESERVED = ("name", "num_classes")  # not arguments: the card has fields for them


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
    _check_whole(depths=depths, widths=widths, channels=channels, auxiliary_channels=auxiliary_channels)
    if not len(depths) == len(widths) == 4:
        raise ValueError(f"depths and widths must be four numbers each, not {depths!r} and {widths!r}")
    if widths[0] < 2:
        raise ValueError("the stem needs widths[0] of 2 or more")
    _check_depth(sum(depths))
    _check_rate(drop_path_rate)
    model = UPerNet(ConvNeXtBackbone(depths, widths, drop_path_rate), num_classes, channels, auxiliary_channels)
    return model.to(memory_format=torch.channels_last)


def upernet_timm(
    *,
    num_classes: int,
    backbone: str,
    channels: int = 512,
    auxiliary_channels: int = 256,
    normalize: str | None = None,
) -> nn.Module:
    """UPerNet on the last four feature levels of a timm model, with random weights.

    ``backbone`` is a name of ``timm.list_models()``; nothing is ever downloaded. With ``normalize="imagenet"`` the
    model normalises images by the mean and standard deviation of that timm model, and keeps both as buffers.
    """
    _check_whole(channels=channels, auxiliary_channels=auxiliary_channels)
    if normalize not in (None, "imagenet"):
        raise ValueError(f"normalize must be 'imagenet' or null, not {normalize!r}")
    from segbench.models.architectures.timm_backbone import TimmBackbone  # timm takes longer to import than torch

    features = TimmBackbone(backbone, normalize=normalize is not None)
    return UPerNet(features, num_classes, channels, auxiliary_channels).to(memory_format=torch.channels_last)


def segmenter_vit(
    *,
    num_classes: int,
    width: int = 384,
    depth: int = 12,
    heads: int = 6,
    patch: int = 16,
    image_size: int = 512,
    decoder_depth: int = 2,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """Segmenter with a mask transformer; the defaults are ViT-S/16 as released (SEA.md, section 7)."""
    _check_whole(width=width, depth=depth, heads=heads, patch=patch, image_size=image_size, decoder_depth=decoder_depth)
    if width % heads:
        raise ValueError(f"width must be a multiple of heads, not {width} for {heads} heads")
    if image_size % patch:
        raise ValueError(f"image_size must be a multiple of patch, not {image_size} for patches of {patch}")
    _check_depth(depth + decoder_depth)
    _check_rate(drop_path_rate)
    encoder = VisionTransformer(width, depth, heads, patch, image_size, drop_path_rate)
    return Segmenter(encoder, num_classes, width, heads, decoder_depth)


def pspnet_resnet(
    *,
    num_classes: int,
    depths: Sequence[int] = (3, 4, 6, 3),
    width: int = 64,
    deep_stem: bool = False,
    channels: int = 512,
    auxiliary_channels: int = 256,
) -> nn.Module:
    """PSPNet on a dilated ResNet; the defaults are ResNet-50 as released (SEA.md, section 7)."""
    _check_whole(depths=depths, width=width, channels=channels, auxiliary_channels=auxiliary_channels)
    if len(depths) != 4:
        raise ValueError(f"depths must be four numbers, not {depths!r}")
    if type(deep_stem) is not bool:
        raise ValueError(f"deep_stem must be true or false, not {deep_stem!r}")
    _check_depth(sum(depths))
    return PSPNet(DilatedResNet(depths, width, deep_stem=deep_stem), num_classes, channels, auxiliary_channels)


@dataclass(frozen=True)
class Architecture:
    """An architecture and the facts that the rest of segbench needs of it.

    ``build`` makes it with random weights, from ``num_classes`` and the arguments of a card; in a stateless one no
    module keeps anything from one forward pass to the next, so threads may share it.
    """

    build: Callable[..., nn.Module]
    is_stateless: bool = True
    has_batch_norm: bool = True


ARCHITECTURES: Mapping[str, Architecture] = {
    "upernet_convnext": Architecture(upernet_convnext),
    "upernet_timm": Architecture(upernet_timm, is_stateless=False),  # what timm's backbones keep is not known
    "segmenter_vit": Architecture(segmenter_vit, has_batch_norm=False),
    "pspnet_resnet": Architecture(pspnet_resnet),
}


def _check_whole(**arguments: Any) -> None:
    for name, value in arguments.items():
        values = [value] if isinstance(value, int) else value
        if not (isinstance(values, Sequence) and all(type(number) is int and number > 0 for number in values)):
            raise ValueError(f"{name} must be positive whole numbers, not {value!r}")


def _check_depth(blocks: int) -> None:
    if blocks > MAX_DEPTH:
        raise ValueError(f"{blocks} blocks are more than {MAX_DEPTH}")


def _check_rate(rate: float) -> None:
    if isinstance(rate, bool) or not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate must be in [0,1), not {rate!r}")


class WithoutDraws(TorchFunctionMode):
    """Inside, zeros are written instead of random numbers: a file replaces them anyway, and drawing takes longer.

    Zeros, and not whatever is in memory: a truncated normal is drawn again until it fits.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        random = getattr(func, "__module__", "") == "torch.nn.init" and func.__name__.endswith(("uniform_", "normal_"))
        if random or func in (Tensor.uniform_, Tensor.normal_):
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)


def build(name: str, *, num_classes: int, **arguments: Any) -> nn.Module:
    """An architecture with random weights; errors as in `build_described`."""
    return build_described({"name": name, "arguments": arguments}, num_classes=num_classes)


def build_described(architecture: Mapping[str, Any], *, num_classes: int, parameters: int | None = None) -> nn.Module:
    """The ``architecture`` of a card or recipe (``name``, ``arguments``; not trusted) with random weights.

    It is built without memory first, so that a card cannot ask for more than a model may have.

    Raises:
        UnknownNameError: unknown name.
        ModelError: arguments that it does not take, too many parameters, or not as many as the card says.
    """
    name, arguments = architecture["name"], architecture["arguments"]
    if name not in ARCHITECTURES:
        raise UnknownNameError(unknown_name("architecture", name, ARCHITECTURES))
    mend = "Correct `architecture.arguments`."
    if reserved := [key for key in RESERVED if key in arguments]:
        raise ModelError(f"Architecture {name!r}: {reserved[0]!r} is a field of the card, not an argument. {mend}")
    try:
        with torch.device("meta"):
            draft = ARCHITECTURES[name].build(num_classes=num_classes, **arguments)
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
        return ARCHITECTURES[name].build(num_classes=num_classes, **arguments)
    except (MemoryError, RuntimeError) as error:
        raise ModelError(f"There is no memory for the {found} parameters of {name!r}: {error}") from error
