"""Architectures against plain ones, and layouts of checkpoints: renamed, unwrapped, passed through or refused."""

from __future__ import annotations

import time
from copy import deepcopy

import numpy as np
import pytest
import torch

from segbench.errors import ModelError
from segbench.models import normalise_keys
from segbench.models.architectures import build
from segbench.models.released import RELEASED
from segbench.models.weights import load_weights
from tests.conftest import GOLDEN, recipe_weights, released_layout
from tests.plain import PLAIN

TINY = {
    "upernet_convnext": {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8], "channels": 8, "auxiliary_channels": 8},
    "upernet_timm": {"backbone": "test_convnext", "channels": 8, "auxiliary_channels": 8, "normalize": "imagenet"},
    "segmenter_vit": {"width": 16, "depth": 2, "heads": 2, "patch": 8, "image_size": 32, "decoder_depth": 1},
    "pspnet_resnet": {"depths": [1, 1, 1, 1], "width": 4, "channels": 8, "auxiliary_channels": 8},
}
NAMES = sorted(TINY)


@pytest.mark.slow
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
        ({3: torch.zeros(1)}, "keys that are not names"),
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


# Architecture of ours, arguments, sizes of images. Widths are small; the golden logits hold the released ones.
SMALL = [
    ("upernet_convnext", {}, [(64, 80), (33, 47), (32, 32)]),
    ("segmenter_vit", {}, [(32, 32), (64, 80), (33, 47), (16, 64)]),
    ("pspnet_resnet", {}, [(64, 80), (33, 47), (73, 73)]),
    ("pspnet_resnet", {"deep_stem": True}, [(64, 80), (33, 47)]),
]
SIZES = [(name, arguments, size) for name, arguments, sizes in SMALL for size in sizes]


def pair(name, arguments):
    """A plain model and ours with the same random weights, in float64 and eval mode."""
    arguments = {**TINY[name], **arguments}
    plain = PLAIN[name](num_classes=3, **arguments).double()
    plain.load_state_dict(recipe_weights({key: value.shape for key, value in plain.state_dict().items()}))
    ours = build(name, num_classes=3, **arguments).double()
    load_weights(ours, normalise_keys(name, plain.state_dict()), source="the plain model")
    return plain.eval(), ours.eval()


def images(size, count=2):
    generator = torch.Generator().manual_seed(7)
    return torch.rand(count, 3, *size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("name", "arguments", "size"), SIZES)
def test_logits_and_image_gradients_equal_those_of_the_plain_model(name, arguments, size):
    values = []
    for model in pair(name, arguments):
        x = images(size).requires_grad_()
        logits = model(x)
        direction = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
        values.append((logits, *torch.autograd.grad((logits * direction).sum(), x)))
    for plain, ours in zip(*values, strict=True):
        assert ours.shape == plain.shape
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-11 * plain.detach().abs().max().item())


@pytest.mark.parametrize(("name", "arguments"), [(name, arguments) for name, arguments, _ in SMALL])
def test_gradients_of_the_weights_equal_those_of_the_plain_model_in_training(name, arguments):
    plain, ours = (model.train() for model in pair(name, arguments))
    for model in (plain, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout2d):
                module.p = 0.0
        outputs = [model(images((33, 47)))] if name == "segmenter_vit" else both(model)(images((33, 47)))
        sum((output**2).sum() for output in outputs).backward()
    gradients = [{key: value.grad for key, value in model.named_parameters()} for model in (plain, ours)]
    assert gradients[1].keys() == normalise_keys(name, dict(plain.named_parameters())).keys()
    expected = {key: value for key, value in gradients[0].items() if value is not None}
    found = {key: value for key, value in gradients[1].items() if value is not None}
    for key, value in normalise_keys(name, expected).items():
        torch.testing.assert_close(found.pop(key), value, rtol=1e-8, atol=1e-10 * (1 + value.abs().max().item()))
    assert not found
    statistics = normalise_keys(name, plain.state_dict())
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, statistics[key], rtol=1e-10, atol=1e-12)


def both(model):
    return model.both if hasattr(model, "both") else model.forward_with_auxiliary


@pytest.mark.slow
@pytest.mark.parametrize("name", ["upernet_convnext_t", "segmenter_vit_s", "pspnet_resnet50"])
def test_the_plain_models_give_the_golden_logits_too(name):
    architecture, arguments = RELEASED[name]
    plain = PLAIN[architecture](num_classes=_classes(name), **arguments).double()
    plain.load_state_dict(recipe_weights(released_layout(name)))
    with np.load(GOLDEN / "architectures" / f"{name}.npz") as archive, torch.no_grad():
        logits = plain.eval()(torch.from_numpy(archive["image"]).double())[..., ::6, ::6].numpy()
        expected = archive["logits"]
    assert np.abs(logits - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_models_are_pure_in_eval_mode_and_survive_copies(name):
    model = build(name, num_classes=3, **TINY[name])
    x = images((33, 47)).float()
    kept = x.clone()
    model.train()(x)
    assert torch.equal(x, kept)
    model.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first = model(x)
    assert first.shape == (2, 3, 33, 47)
    assert torch.equal(model(x), first)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    copy = deepcopy(model)
    assert torch.equal(copy(x), first)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1)
    assert torch.equal(model(x), first)
    other = build(name, num_classes=3, **TINY[name]).eval()
    load_weights(other, state, source="a copy")
    assert torch.equal(other(x), first)
    torch.testing.assert_close(model(x[:1]), first[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["upernet_convnext", "upernet_timm", "pspnet_resnet"])
def test_both_heads_have_the_size_of_the_image(name):
    model = build(name, num_classes=3, **TINY[name]).eval()
    logits, auxiliary = model.forward_with_auxiliary(torch.rand(2, 3, 40, 56))
    assert logits.shape == auxiliary.shape == (2, 3, 40, 56)
    x = torch.zeros(1, 3, 40, 56)
    assert torch.equal(model(x), model.forward_with_auxiliary(x)[0])


def test_segmenter_keeps_its_unused_classifier_frozen():
    model = build("segmenter_vit", num_classes=3, **TINY["segmenter_vit"])
    frozen = [key for key, value in model.named_parameters() if not value.requires_grad]
    assert frozen == ["encoder.head.weight", "encoder.head.bias"]
    assert not hasattr(model, "forward_with_auxiliary")


def test_dropped_paths_are_for_training_only():
    torch.manual_seed(0)  # two draws of 16 paths at 0.9 agree once in 24 times
    model = build("segmenter_vit", num_classes=3, **TINY["segmenter_vit"], drop_path_rate=0.9)
    x = torch.rand(8, 3, 32, 32)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("name", "depth"), [("upernet_convnext", {"depths": [1, 2, 1, 1]}), ("segmenter_vit", {"depth": 5})]
)
def test_deeper_blocks_drop_more_paths(name, depth):
    """From 0 in the first block to the rate in the last, on a straight line, in the order of the forward pass."""
    model = build(name, num_classes=3, **TINY[name] | depth, drop_path_rate=0.4)
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    np.testing.assert_allclose(
        list(dict.fromkeys(rates)), [0.1, 0.2, 0.3, 0.4]
    )  # a block of rate 0 has none; a transformer's has two


def test_pspnet_at_the_published_size():
    plain, ours = pair("pspnet_resnet", {})
    with torch.no_grad():
        x = images((473, 473), count=1)
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "levels"),
    [
        ("test_resnet", "five levels, the last four are taken"),
        ("test_convnext", "four levels"),
        ("swin_tiny_patch4_window7_224", "channels last, made for one size"),
        ("mobilenetv3_small_050", "strided five times"),
    ],
)
def test_any_four_levels_of_timm_will_do(backbone, levels):
    model = build("upernet_timm", num_classes=3, backbone=backbone, channels=8, auxiliary_channels=8).eval()
    for size in ((64, 96), (50, 70)):
        with torch.no_grad():
            assert model(torch.rand(1, 3, *size)).shape == (1, 3, *size), levels
    assert len(model.backbone.widths) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"backbone": "hf-hub:timm/resnet18"}, "A backbone is a name of timm.list_models"),
        ({"backbone": "local-dir:/tmp"}, "A backbone is a name of timm.list_models"),
        ({"backbone": "resnet18.a1_in1k"}, "A backbone is a name of timm.list_models"),
        ({"backbone": "resnet1"}, r"Did you mean 'resnet1\d+'"),
        ({"backbone": ["resnet18"]}, "A backbone is a name of timm.list_models"),
        ({"backbone": None}, "A backbone is a name of timm.list_models"),
        ({"backbone": "maxvit_tiny_tf_224"}, "for images of any size"),
        ({"backbone": "convmixer_768_32"}, "has 3 feature levels; UPerNet needs 4|features_only not implemented"),
        ({"backbone": "test_vit"}, "'test_vit' gives no feature pyramid"),
        ({}, "does not take these arguments: .*backbone"),
        ({"backbone": "resnet18", "normalize": "yes"}, "normalize must be 'imagenet' or null"),
        ({"backbone": "resnet18", "normalize": True}, "normalize must be 'imagenet' or null"),
        ({"backbone": "resnet18", "pretrained": True}, "does not take these arguments: .*pretrained"),
        ({"backbone": "resnet18", "channels": 0}, "channels must be positive"),
    ],
)
def test_backbones_that_are_none_are_refused(arguments, said):
    with pytest.raises(ModelError, match=said) as caught:
        build("upernet_timm", num_classes=3, **arguments)
    assert len(str(caught.value)) < 400


def test_images_that_a_backbone_cannot_take_are_named():
    model = build("upernet_timm", num_classes=3, backbone="halonet26t", channels=8, auxiliary_channels=8).eval()
    with pytest.raises(ModelError, match="'halonet26t' takes no images of 70x50 pixels"):
        model(torch.rand(1, 3, 50, 70))


@pytest.mark.slow
def test_images_are_normalised_by_the_numbers_of_the_backbone():
    plain, normal = (
        build("upernet_timm", num_classes=3, **{**TINY["upernet_timm"], "normalize": normalize}).eval()
        for normalize in (None, "imagenet")
    )
    state = plain.state_dict()
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    normal.load_state_dict({**state, "backbone.mean": mean[None], "backbone.std": std[None]})
    torch.testing.assert_close(normal.backbone.mean, mean[None])
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(normal(x), plain((x - mean) / std))
    assert normal.state_dict().keys() - state.keys() == {"backbone.mean", "backbone.std"}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("segmenter_vit", {"heads": 3}, "width must be a multiple of heads, not 16 for 3 heads"),
        ("segmenter_vit", {"heads": 0}, "heads must be positive"),
        ("segmenter_vit", {"patch": True}, "patch must be positive"),
        ("segmenter_vit", {"patch": 7}, "image_size must be a multiple of patch"),
        ("segmenter_vit", {"image_size": [32, 32]}, "does not take these arguments"),
        ("segmenter_vit", {"image_size": 8 * 10**5}, "at most 2000000000"),
        ("segmenter_vit", {"image_size": 8 * 10**15}, "does not take these arguments"),
        ("segmenter_vit", {"depth": 999, "decoder_depth": 2}, "1001 blocks are more than 1000"),
        ("segmenter_vit", {"drop_path_rate": float("nan")}, "drop_path_rate must be in"),
        ("segmenter_vit", {"drop_path_rate": "0.1"}, "does not take these arguments"),
        ("pspnet_resnet", {"depths": [1, 1, 1]}, "depths must be four numbers"),
        ("pspnet_resnet", {"depths": [1, 1, 1, 10**9]}, "more than 1000"),
        ("pspnet_resnet", {"deep_stem": "no"}, "deep_stem must be true or false, not 'no'"),
        ("pspnet_resnet", {"width": 10**5}, "at most 2000000000"),
        ("pspnet_resnet", {"width": 1.5}, "width must be positive"),
        ("upernet_timm", {"auxiliary_channels": 10**9}, "at most 2000000000"),
    ],
)
def test_arguments_from_strangers_build_no_model(name, changes, said):
    started = time.monotonic()
    with pytest.raises(ModelError, match=said) as caught:
        build(name, num_classes=3, **{**TINY[name], **changes})
    assert "`architecture.arguments`" in str(caught.value)
    assert time.monotonic() - started < 5  # nothing of that size was allocated
