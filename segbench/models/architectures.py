"""Architectures by name, and loading that refuses what does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segbench.errors import ModelError, UnknownNameError, unknown_name
from segbench.models.convnext import ConvNeXtBackbone
from segbench.models.pspnet import DilatedResNet, PSPNet
from segbench.models.segmenter import Segmenter, VisionTransformer
from segbench.models.timm_backbone import TimmBackbone
from segbench.models.upernet import UPerNet

MAX_PARAMETERS = 2_000_000_000  # of a model that is built: cards come from strangers
MAX_DEPTH = 1000  # blocks of a model; each costs time even before its parameters are counted
# State-dict names whose tensors have the size K.
_OF_CLASSES = re.compile(r"(^|\.)(classifier\.(weight|bias)|cls_emb|mask_norm\.(weight|bias))$")
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


# Of these no module keeps anything from one forward pass to the next; of timm's backbones that is not known.
STATELESS = ("upernet_convnext", "segmenter_vit", "pspnet_resnet")

ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = {
    "upernet_convnext": upernet_convnext,
    "upernet_timm": upernet_timm,
    "segmenter_vit": segmenter_vit,
    "pspnet_resnet": pspnet_resnet,
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


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], *, source: str) -> None:
    """Copies a state dict into ``model``; every key and shape must fit.

    Raises:
        ModelError: lists the first ten missing, surplus and misshaped keys, and the likely cause.
    """
    if wrong := [key for key, value in state_dict.items() if not isinstance(value, Tensor)]:
        kind = type(state_dict[wrong[0]]).__name__
        raise ModelError(f"The weights of {source} hold {wrong[0]!r}, which is {kind} and not a tensor. Remove it.")
    own = model.state_dict()
    for key in own.keys() & state_dict.keys():
        check_tensor(key, state_dict[key], own[key], source=source)
    missing, surplus = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    misshaped = {
        key: (tuple(state_dict[key].shape), tuple(own[key].shape))
        for key in own.keys() & state_dict.keys()
        if own[key].shape != state_dict[key].shape
    }
    problems = [f"missing {key}" for key in missing] + [f"surplus {key}" for key in surplus]
    problems += [f"{key} is {theirs}, the model has {ours}" for key, (theirs, ours) in misshaped.items()]
    if problems:
        listed = "\n  ".join(sorted(problems)[:10])
        raise ModelError(
            f"The weights of {source} do not fit the architecture ({len(problems)} keys):\n  {listed}\n"
            f"Likely cause: {_likely_cause(missing, surplus, misshaped, len(own))}"
        )
    model.load_state_dict(state_dict)


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(key: str, found: Tensor, own: Tensor, *, source: str) -> None:
    """Refuses a tensor of a file that would not arrive in the model as it is.

    Raises:
        ModelError: sparse, quantised, of a type that holds no such numbers, or not finite.
    """
    if problem := _problem(found, own):
        raise ModelError(f"The weights of {source} cannot be used: {key} {problem}. Save them as float32 again.")


def _problem(found: Tensor, own: Tensor) -> str | None:
    if found.layout is not torch.strided or found.is_quantized or found.is_meta:
        return "is sparse, quantised or without content"
    if own.is_floating_point():
        if found.dtype not in FLOATS:
            return f"is {str(found.dtype).removeprefix('torch.')}"
        if not bool(torch.isfinite(found).all()):
            return "has NaN or infinite values"
    return None


def _likely_cause(
    missing: Set[str],
    surplus: Set[str],
    misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    size: int,
) -> str:
    """What a person would guess from the keys of a model of ``size`` entries that do not fit."""
    if not missing and not surplus and all(_OF_CLASSES.search(key) for key in misshaped):
        counts = {_differing(theirs, ours) for theirs, ours in misshaped.values()}
        if len(counts) == 1 and (found := counts.pop()) is not None:
            theirs, ours = found
            return f"another number of classes: the weights have K={theirs}, the model {ours}. Correct `num_classes`."
    if len(missing) > size / 2 and len(surplus) > size / 2:
        return (
            "another architecture, or a layout that segbench does not know. Correct `architecture.name`, "
            "or rename the keys to those of the model's state_dict()."
        )
    if missing and not surplus and not misshaped:
        if all(key.startswith("auxiliary_head.") for key in missing):
            return "the auxiliary head was left out of the file. Save the state dict with it; the head counts as part."
        if all(key.endswith(".num_batches_tracked") for key in missing):
            return "the file is from a PyTorch before 0.4.1. Add the missing entries as torch.tensor(0)."
    if missing or surplus:
        return "other arguments (another depth, another stem) or another architecture. Correct `architecture`."
    return "other arguments (another width). Correct `architecture.arguments`."


def _differing(theirs: tuple[int, ...], ours: tuple[int, ...]) -> tuple[int, int] | None:
    """The one size in which two shapes differ; None where it is not one."""
    pairs = [pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]]
    return pairs[0] if len(theirs) == len(ours) and len(pairs) == 1 else None
