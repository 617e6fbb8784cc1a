"""State dicts of ImageNet classifiers in the layout of our backbones."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segbench.errors import ModelError
from segbench.models.architectures.convnext import ConvNeXtBackbone
from segbench.models.architectures.pspnet import PSPNet
from segbench.models.architectures.segmenter import Segmenter, resize_position_embedding
from segbench.models.architectures.upernet import UPerNet
from segbench.models.checkpoints import parts_by_prefix, rename, strip_prefixes, unwrap
from segbench.models.normalization import Normalization
from segbench.models.released import RENAMES

Family = Literal["convnext", "vit", "resnet"]


@dataclass(frozen=True)
class BackboneReport:
    """What became of a classifier's state dict.

    Attributes:
        state: entries in our names, as the model's ``state_dict()`` has them.
        unknown: keys that are neither of a backbone nor of a classifier's head.
        missing: our backbone's entries that the classifier lacks; without those that no classifier has.
        surplus: keys of blocks that our backbone lacks, because the classifier is deeper.
        folded: whether a normalisation of the images was folded into the first convolution.
    """

    state: Mapping[str, Tensor]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    folded: bool


@dataclass(frozen=True)
class _Layout:
    """How the classifiers of a family name their entries.

    Attributes:
        prefix: of all names of our backbone; goes before each name of the classifier.
        renames: name of the classifier, with that prefix, to ours.
        head: the classifier's head, which is dropped.
        own: entries of our backbone that classifiers lack.
        convolution: the first one, which sees the image.
    """

    prefix: str
    renames: tuple[tuple[str, str], ...]
    head: str
    own: str
    convolution: str


_PREFIXES = ("module.", "_orig_mod.", "model.", "base_model.", "1.")  # 1. of Sequential(normalization, model)
_NORMALIZATION = re.compile(r"(?:^|\.)(?:new_)?(mean|std)$")  # of images; not running_mean
_DUPLICATES = re.compile(r"^(?:module\.)?attacker\.")  # the robustness library saves its model twice
_SHAPES = ((3,), (3, 1, 1), (1, 3, 1, 1))
_NEVER = r"^$"

_LAYOUTS: Mapping[Family, _Layout] = {
    "convnext": _Layout(
        prefix="backbone.",
        renames=((r"^backbone\.stem\.stem\.", "backbone.stem."), *RENAMES["upernet_convnext"]),
        head=r"^(head|norm|norm_pre)\.",
        own=r"^backbone\.norms\.",
        convolution="backbone.stem.0",
    ),
    "vit": _Layout(
        prefix="encoder.",
        renames=(),
        head=_NEVER,
        own=r"^encoder\.head\.",
        convolution="encoder.patch_embed.proj",
    ),
    "resnet": _Layout(
        prefix="backbone.",
        renames=(
            (r"^backbone\.conv1\.weight$", "backbone.stem.0.weight"),
            (r"^backbone\.conv1\.(\d)\.", r"backbone.stem.\1."),  # timm's deep stem
            (r"^backbone\.layer1\.", "backbone.stages.0."),
            (r"^backbone\.layer2\.", "backbone.stages.1."),
            (r"^backbone\.layer3\.", "backbone.stages.2."),
            (r"^backbone\.layer4\.", "backbone.stages.3."),
        ),
        head=r"^(fc|head)\.",
        own=r"\.num_batches_tracked$",
        convolution="backbone.stem.0",
    ),
}


def backbone_state(
    model: nn.Module, state_dict: Mapping[str, Any], *, normalization: Normalization | None = None
) -> BackboneReport:
    """A classifier's state dict in the names of ``model``'s backbone. Shapes are not compared.

    Checkpoints are unwrapped and prefixes stripped; names of timm, torchvision and of ConvNeXt's and PSPNet's authors
    are known. The classifier's head is dropped, but for Segmenter's ``encoder.head`` if it fits. The output norms of
    our ConvNeXt do not exist in a classifier: they keep their initialisation. A position embedding for another grid is
    interpolated bilinearly.

    A classifier that normalises images inside, (x - mean) / std, is folded: the first convolution then takes images
    in [0,1]. This is exact but where that convolution reaches into its zero padding: there the classifier saw the
    mean colour, and ours sees black. A patch embedding has no padding, so for a ViT it is exact everywhere.

    Raises:
        ModelError: a model without such a backbone, an entry that is no tensor, or half a normalisation.
    """
    weights = {key: value for key, value in unwrap(state_dict).items() if not _DUPLICATES.match(key)}
    whole = _report(model, weights, normalization)
    if not whole.missing:
        return whole
    reports = [whole]  # else those under a prefix may do better: ``model.*`` beside ``loss.weight``
    for prefix, entries in parts_by_prefix(weights, at_least=len(whole.missing)).items():
        left_out = tuple(key for key in weights if not key.startswith(prefix))
        with suppress(ModelError):
            report = _report(model, entries, normalization)
            reports.append(replace(report, unknown=report.unknown + left_out))
    return min(reports, key=lambda report: len(report.missing))


def _report(model: nn.Module, weights: Mapping[str, Tensor], normalization: Normalization | None) -> BackboneReport:
    layout = _LAYOUTS[_family(model)]
    own = {key: value for key, value in model.state_dict().items() if key.startswith(layout.prefix)}
    weights = strip_prefixes(weights, _PREFIXES)
    constants = _constants(weights) or normalization
    weights = strip_prefixes({key: value for key, value in weights.items() if not _is_constant(key, value)}, _PREFIXES)
    kept = {layout.prefix + key: key for key in weights if not re.match(layout.head, key)}
    old_names = rename(kept, (*layout.renames, *(_stem_renames(weights) if isinstance(model, PSPNet) else ())))
    found = {new: weights[old] for new, old in old_names.items()}
    if isinstance(model, Segmenter):
        _fit_encoder(found, own)
    state = {key: value for key, value in found.items() if key in own}
    if constants is not None:
        _fold(state, layout.convolution, constants)
    blocks = {_numberless(key) for key in own}
    strangers = [key for key in found if key not in own]
    return BackboneReport(
        state=state,
        unknown=tuple(old_names[key] for key in strangers if _numberless(key) not in blocks),
        missing=tuple(key for key in own if key not in state and not re.search(layout.own, key)),
        surplus=tuple(old_names[key] for key in strangers if _numberless(key) in blocks),
        folded=constants is not None,
    )


def _family(model: nn.Module) -> Family:
    if isinstance(model, Segmenter):
        return "vit"
    if isinstance(model, PSPNet):
        return "resnet"
    if isinstance(model, UPerNet) and isinstance(model.backbone, ConvNeXtBackbone):
        return "convnext"
    raise ModelError(
        f"{type(model).__name__} takes no classifier's weights: segbench maps them into upernet_convnext, "
        "segmenter_vit and pspnet_resnet."
    )


def _is_constant(key: str, value: Tensor) -> bool:
    """Whether an entry is a mean or standard deviation of images."""
    return _NORMALIZATION.search(key) is not None and value.shape in _SHAPES


def _constants(weights: Mapping[str, Tensor]) -> Normalization | None:
    """Mean and standard deviation of a normalisation among the entries; None if there is none."""
    found = {key: value for key, value in weights.items() if _is_constant(key, value)}
    if not found:
        return None
    kinds = {match[1]: value for key, value in found.items() if (match := _NORMALIZATION.search(key))}
    if len(found) != 2 or len(kinds) != 2 or not (kinds["std"] > 0).all():
        raise ModelError(
            f"A normalisation is one mean and one positive std of three numbers; the weights have {sorted(found)}. "
            "Remove or correct these entries."
        )
    mean, std = (tuple(kinds[kind].double().flatten().tolist()) for kind in ("mean", "std"))
    return mean, std


def _stem_renames(weights: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
    """Where the batch norms of a ResNet's stem go: the 7x7 stem has one, a deep stem three, named in two ways."""
    if "conv2.weight" in weights:  # as PSPNet's authors name them: conv1, bn1, conv2, bn2, conv3, bn3
        places = {"bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}
    else:  # timm: conv1 holds all of a deep stem but the last norm
        places = {"bn1": 7 if any(key.startswith("conv1.6.") for key in weights) else 1}
    return tuple((rf"^backbone\.{name}\.", f"backbone.stem.{place}.") for name, place in places.items())


def _fit_encoder(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Interpolates the position embedding to our grid; drops a classifier of other sizes."""
    head = ("encoder.head.weight", "encoder.head.bias")
    if any(key not in state or state[key].shape != own[key].shape for key in head):
        for key in head:
            state.pop(key, None)
    key = "encoder.pos_embed"
    theirs, side = state.get(key), math.isqrt(own[key].shape[1] - 1)
    if theirs is not None and theirs.ndim == 3 and math.isqrt(theirs.shape[1] - 1) ** 2 == theirs.shape[1] - 1:
        state[key] = resize_position_embedding(theirs, (side, side))


def _fold(state: dict[str, Tensor], convolution: str, normalization: Normalization) -> None:
    """Makes the first convolution of ``state`` one of images in [0,1].

    Σ w (x - mean) / std + b = Σ (w / std) x + (b - Σ (w / std) mean). Where the convolution has no bias, the constant
    moves into the running mean of the batch norm that follows, which subtracts it.
    """
    name = f"{convolution}.weight"
    weight = state.get(name)
    if weight is None or weight.ndim != 4 or weight.shape[1] != len(normalization[0]):
        return  # missing or misshaped: said when the state is loaded
    mean, std = (torch.tensor(numbers, dtype=torch.float64, device=weight.device) for numbers in normalization)
    folded = weight.double() / std.view(1, -1, 1, 1)
    constant = (folded * mean.view(1, -1, 1, 1)).sum(dim=(1, 2, 3))
    state[name] = folded.to(weight.dtype)
    bias, running_mean = f"{convolution}.bias", f"{convolution[:-1]}1.running_mean"
    if bias in state:
        state[bias] = (state[bias].double() - constant).to(weight.dtype)
    elif running_mean in state:
        state[running_mean] = (state[running_mean].double() + constant).to(weight.dtype)


def _numberless(key: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", key)
