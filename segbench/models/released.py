"""Checkpoints in their authors' layout: unwrapped, renamed to ours and loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from segbench.errors import UnknownNameError, unknown_name
from segbench.models.architectures import build
from segbench.models.checkpoints import PREFIXES, fit_keys, unwrap
from segbench.models.weights import load_weights

# The released models: our architecture and its arguments.
RELEASED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "upernet_convnext_t": ("upernet_convnext", {}),
    "upernet_convnext_s": ("upernet_convnext", {"depths": (3, 3, 27, 3)}),
    "segmenter_vit_s": ("segmenter_vit", {}),
    "pspnet_resnet50": ("pspnet_resnet", {}),
    "pspnet_resnet50_deepstem": ("pspnet_resnet", {"deep_stem": True}),
}

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


def normalise_keys(
    architecture_name: str, state_dict: Mapping[str, Any], own: Collection[str] = ()
) -> dict[str, Tensor]:
    """Weights as a file holds them, in the layout of our architecture.

    A checkpoint is unwrapped (``{"state_dict": {...}, "epoch": 3}`` and the like), prefixes that all keys share are
    stripped (``module.``, ``model.``, ``_orig_mod.``), and released names become ours. What has our names already
    passes through unchanged. With ``own``, the names of the model, other entries beside a prefix are left out. Whether
    keys and shapes fit is for `load_weights` to say.
    """
    return fit_keys(unwrap(state_dict), own, PREFIXES, RENAMES.get(architecture_name, ()))


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
    model = build(name, num_classes=num_classes, **arguments)
    weights = normalise_keys(name, state_dict, model.state_dict().keys())
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    load_weights(model, weights, source=f"the released {architecture}")
    return model.eval()
