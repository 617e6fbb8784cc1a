"""Layouts of checkpoints: what is renamed, unwrapped, passed through and refused."""

from __future__ import annotations

import pytest
import torch

from segbench.errors import ModelError
from segbench.models import normalise_keys
from segbench.models.architectures import build, load_weights
from segbench.models.released import RELEASED
from tests.conftest import released_layout

TINY = {
    "upernet_convnext": {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8], "channels": 8, "auxiliary_channels": 8},
    "upernet_timm": {"backbone": "test_convnext", "channels": 8, "auxiliary_channels": 8, "normalize": "imagenet"},
    "segmenter_vit": {"width": 16, "depth": 2, "heads": 2, "patch": 8, "image_size": 32, "decoder_depth": 1},
    "pspnet_resnet": {"depths": [1, 1, 1, 1], "width": 4, "channels": 8, "auxiliary_channels": 8},
}
NAMES = sorted(TINY)


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_a_released_layout_has_exactly_the_entries_of_our_module(name):
    layout = {key: torch.empty(shape, device="meta") for key, shape in released_layout(name).items()}
    architecture, arguments = RELEASED[name]
    with torch.device("meta"):
        own = build(architecture, num_classes=_classes(name), **arguments).state_dict()
    renamed = normalise_keys(architecture, layout)
    assert {key: value.shape for key, value in renamed.items()} == {key: value.shape for key, value in own.items()}


def _classes(name):
    return 151 if name in ("upernet_convnext_s", "segmenter_vit_s") else 21


@pytest.mark.parametrize("name", NAMES)
def test_our_own_layout_passes_through_unchanged(name):
    own = build(name, num_classes=3, **TINY[name]).state_dict()
    found = normalise_keys(name, own)
    assert list(found) == list(own)
    assert all(found[key] is own[key] for key in own)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_checkpoints_are_unwrapped_and_their_prefixes_stripped(wrapper, prefix):
    own = build("pspnet_resnet", num_classes=3, **TINY["pspnet_resnet"]).state_dict()
    weights = {prefix + key: value for key, value in own.items()}
    checkpoint = weights if wrapper is None else {"epoch": 3, "optimizer": {"lr": [0.1]}, wrapper: weights}
    assert list(normalise_keys("pspnet_resnet", checkpoint)) == list(own)


def test_a_prefix_that_some_keys_lack_stays():
    state = {"module.head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}
    assert list(normalise_keys("segmenter_vit", state)) == list(state)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"head.weight": torch.zeros(1), "epoch": 3}, r"'epoch' is int, not a tensor \(1 such"),
        ({"state_dict": {"a": [1.0], "b": {}}}, r"'a' is list, not a tensor \(2 such"),
        ({3: torch.zeros(1)}, "3 is Tensor"),
        ({}, "empty"),
        ({"model": {}}, "empty"),
        ({"layer0.0.weight": torch.zeros(1), "backbone.stem.0.weight": torch.zeros(1)}, "mix two layouts"),
    ],
)
def test_what_holds_no_weights_is_refused(state, said):
    with pytest.raises(ModelError, match=said):
        normalise_keys("pspnet_resnet", state)


def altered(name, change, **arguments):
    """Weights of a tiny model, changed, and loading them into another one."""
    state = build(name, num_classes=3, **{**TINY[name], **arguments}).state_dict()
    for key in list(state):
        value = state.pop(key)
        for new_key, new_value in change(key, value):
            state[new_key] = new_value
    return state


def same(key, value):
    return [(key, value)]


@pytest.mark.parametrize(
    ("name", "change", "arguments", "said"),
    [
        ("upernet_convnext", lambda k, v: [("x." + k, v)], {}, "another architecture, or a layout that segbench"),
        ("upernet_convnext", same, {"widths": [8, 8, 8, 16]}, r"another width\)\. Correct `architecture.arguments`"),
        ("pspnet_resnet", same, {"depths": [1, 1, 2, 1]}, "another depth"),
        ("pspnet_resnet", same, {"deep_stem": True}, "another stem"),
        ("pspnet_resnet", lambda k, v: [] if "auxiliary" in k else [(k, v)], {}, "auxiliary head was left out"),
        ("pspnet_resnet", lambda k, v: [] if "tracked" in k else [(k, v)], {}, r"PyTorch before 0\.4\.1"),
        ("segmenter_vit", same, {"image_size": 64}, "another width"),
    ],
)
def test_weights_that_do_not_fit_are_answered_with_the_likely_cause(name, change, arguments, said):
    model = build(name, num_classes=3, **TINY[name])
    with pytest.raises(ModelError, match=said) as caught:
        load_weights(model, altered(name, change, **arguments), source="a file")
    assert len(str(caught.value).splitlines()) <= 12


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_classes_is_recognised(name):
    state = build(name, num_classes=5, **TINY[name]).state_dict()
    model = build(name, num_classes=3, **TINY[name])
    with pytest.raises(ModelError, match=r"another number of classes: the weights have K=5, the model 3"):
        load_weights(model, state, source="a file")
    with pytest.raises(ModelError, match=r"'note', which is str and not a tensor"):
        load_weights(model, {**state, "note": "x"}, source="a file")
