"""Robust classifiers as backbones: features equal those of the classifier, whatever layout its file has."""

from __future__ import annotations

import math
from functools import partial

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from segbench.errors import ModelError
from segbench.models.architectures import build
from segbench.models.architectures.convnext import ConvStem
from segbench.models.backbones import BACKBONES, backbone_state, load_backbone
from tests import plain

DEPTHS, WIDTHS = (1, 1, 2, 1), (8, 16, 24, 32)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
CONSTANTS = (tuple(MEAN.tolist()), tuple(STD.tolist()))
ARGUMENTS = {
    "upernet_convnext": {"depths": DEPTHS, "widths": WIDTHS, "channels": 8, "auxiliary_channels": 8},
    "segmenter_vit": {"width": 32, "depth": 2, "heads": 2, "patch": 8, "image_size": 64, "decoder_depth": 1},
    "pspnet_resnet": {"depths": DEPTHS, "width": 16, "channels": 8, "auxiliary_channels": 8},
}


def ours(name, **changes):
    torch.manual_seed(1)
    return build(name, num_classes=3, **{**ARGUMENTS[name], **changes}).double().eval()


def randomised(model):
    """Every entry drawn at random: nothing is equal by default."""
    torch.manual_seed(0)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(0.2 * torch.randn_like(value))
                if value.ndim == 1 and key.endswith(("weight", "gamma", "running_var")):
                    value.abs_().add_(0.5)
    return model.double().eval()


class WrappedStem(nn.Module):
    """The authors' stem, whose keys are ``stem.stem.N``."""

    def __init__(self, width):
        super().__init__()
        self.stem = ConvStem(width)

    def forward(self, x):
        return self.stem(x)


def convnext_classifier(depths=DEPTHS, widths=WIDTHS, **options):
    model = ConvNeXt(depths=depths, dims=widths, num_classes=10, **options)
    model.stem = WrappedStem(widths[0])
    return randomised(model)


def vit_classifier(image_size=64, classes=1000, **options):
    # Segmenter's layer norms add 1e-5, those of timm's classifiers 1e-6
    return randomised(
        VisionTransformer(
            img_size=image_size,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            num_classes=classes,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
            **options,
        )
    )


def resnet_classifier(*, deep=False):
    """One bottleneck a stage. The 7x7 stem of timm has 64 channels, its deep stem may have fewer."""
    options = {"stem_type": "deep", "stem_width": 16} if deep else {}
    width = 16 if deep else 64
    channels = [width * 2**index for index in range(4)]
    return randomised(ResNet(Bottleneck, [1, 1, 1, 1], channels=channels, num_classes=10, **options))


def resnet_model(*, deep=False):
    return ours("pspnet_resnet", depths=(1, 1, 1, 1), width=16 if deep else 64, deep_stem=deep)


def dilate(model):
    """Strides to dilations in place: a classifier's last stages as a segmentation model uses them."""
    for stage, dilation in ((model.layer3, 2), (model.layer4, 4)):
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (dilation, dilation)
    return model


def images(size=(64, 80)):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, *size, generator=generator, dtype=torch.float64)


class Normalized(nn.Module):
    """A classifier that normalises images in [0,1] inside."""

    def __init__(self, model, shape=(1, 3, 1, 1)):
        super().__init__()
        self.normalize = nn.Module()
        self.normalize.register_buffer("mean", MEAN.double().view(shape))
        self.normalize.register_buffer("std", STD.double().view(shape))
        self.model = model

    def images(self, x):
        return (x - self.normalize.mean.view(3, 1, 1)) / self.normalize.std.view(3, 1, 1)


def convnext_features(classifier, x):
    x = classifier.stem(x)
    features = []
    for stage in classifier.stages:
        x = stage(x)
        features.append(x)
    return features


def assert_equal(found, expected, tolerance=1e-11):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


# ConvNeXt


def stage_outputs(model, x):
    """Features before the output norms, which a classifier does not have."""
    outputs = []
    hooks = [stage.register_forward_hook(lambda *event: outputs.append(event[2])) for stage in model.backbone.stages]
    model.backbone(x)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "base_model.", "module.base_model."])
@pytest.mark.parametrize("options", [{}, {"head_norm_first": True}])
def test_convnext_features_equal_the_classifiers(prefix, options):
    classifier, model = convnext_classifier(**options), ours("upernet_convnext")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {prefix + key: value for key, value in classifier.state_dict().items()}
    report = load_backbone(model, {"epoch": 3, "state_dict": state}, source="a file")
    assert (report.unknown, report.missing, report.surplus, report.folded) == ((), (), (), False)
    with torch.no_grad():
        expected = convnext_features(classifier, images())
        for found, feature in zip(stage_outputs(model, images()), expected, strict=True):
            assert_equal(found, feature)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith("backbone.") and ".norms." not in key}
    assert changed == set(report.state)


def test_convnext_in_its_authors_layout():
    model = ours("upernet_convnext")
    reference = randomised(plain.ConvNeXt(DEPTHS, WIDTHS))
    state = {key: value for key, value in reference.state_dict().items() if not key.startswith("norm")}
    state |= {f"{name}.{kind}": torch.zeros(32) for name in ("norm", "head") for kind in ("weight", "bias")}
    report = load_backbone(model, state, source="a file")
    assert (report.unknown, report.missing) == ((), ())
    with torch.no_grad():
        x = reference.stages[0](reference.downsample_layers[0](images()))
        assert_equal(stage_outputs(model, images())[0], x)


# ViT


def test_vit_tokens_equal_the_classifiers():
    classifier, model = vit_classifier(), ours("segmenter_vit")
    report = load_backbone(model, classifier.state_dict(), source="a file")
    assert (report.unknown, report.missing, report.surplus, report.folded) == ((), (), (), False)
    x = images((64, 64))
    with torch.no_grad():
        assert_equal(model.encoder(x), classifier.forward_features(x))
        assert_equal(model.encoder.head(model.encoder(x)[:, 0]), classifier(x))  # the classifier fits: it is taken
    assert not model.encoder.head.weight.requires_grad


def test_a_position_embedding_for_another_grid_is_interpolated():
    classifier, model = vit_classifier(image_size=32, classes=10, dynamic_img_size=True), ours("segmenter_vit")
    head = model.encoder.head.weight.clone()
    report = load_backbone(model, classifier.state_dict(), source="a file")
    assert (report.unknown, report.missing) == ((), ())
    assert torch.equal(model.encoder.head.weight, head)  # of 10 classes: it does not fit and is dropped
    grid = classifier.pos_embed[:, 1:].detach().reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    larger = nn.functional.interpolate(grid, size=(8, 8), mode="bilinear", align_corners=False)
    assert torch.equal(model.encoder.pos_embed[:, :1], classifier.pos_embed[:, :1])
    assert_equal(model.encoder.pos_embed.detach()[:, 1:], larger.permute(0, 2, 3, 1).reshape(1, 64, 32))


# ResNet


@pytest.mark.slow
@pytest.mark.parametrize("deep", [False, True])
def test_resnet_features_equal_the_classifiers(deep):
    classifier, model = resnet_classifier(deep=deep), resnet_model(deep=deep)
    report = load_backbone(model, classifier.state_dict(), source="a file")
    assert (report.unknown, report.missing, report.surplus, report.folded) == ((), (), (), False)
    with torch.no_grad():
        assert_equal(model.backbone(images())[-1], dilate(classifier).forward_features(images()))


def test_a_deep_stem_as_pspnets_authors_name_it():
    classifier, model = resnet_classifier(deep=True), resnet_model(deep=True)
    names = {"conv1.0.": "conv1.", "conv1.1.": "bn1.", "conv1.3.": "conv2.", "conv1.4.": "bn2.", "conv1.6.": "conv3."}
    state = {}
    for key, value in classifier.state_dict().items():
        for old, new in {**names, "bn1.": "bn3."}.items():
            if key.startswith(old):
                key = key.replace(old, new, 1)
                break
        state[key] = value
    expected = backbone_state(model, classifier.state_dict()).state
    found = backbone_state(model, state).state
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# Normalisation inside the classifier


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)])
def test_a_normalisation_is_folded_into_the_patch_embedding_exactly(shape):
    classifier, model = Normalized(vit_classifier(), shape), ours("segmenter_vit")
    report = load_backbone(model, classifier.state_dict(), source="a file")
    assert (report.unknown, report.missing, report.folded) == ((), (), True)
    x = images((64, 64))
    with torch.no_grad():
        assert_equal(model.encoder(x), classifier.model.forward_features(classifier.images(x)))
        assert (model.encoder(x) - classifier.model.forward_features(x)).abs().max() > 1e-3


def interior(feature, reach):
    return feature[..., reach:-reach, reach:-reach]


def test_a_normalisation_is_folded_into_convnexts_stem():
    classifier, model = Normalized(convnext_classifier()), ours("upernet_convnext")
    assert load_backbone(model, classifier.state_dict(), source="a file").folded
    x = images()
    with torch.no_grad():
        found, expected = model.backbone.stem(x), classifier.model.stem(classifier.images(x))
    assert_equal(interior(found, 1), interior(expected, 1))
    assert (found - expected).abs().max() > 1e-3  # the border: the classifier pads with its mean, ours with black


@pytest.mark.parametrize("deep", [False, True])
def test_a_normalisation_is_folded_into_the_batch_norm_of_a_resnet(deep):
    classifier, model = Normalized(resnet_classifier(deep=deep)), resnet_model(deep=deep)
    assert load_backbone(model, classifier.state_dict(), source="a file").folded
    x = images((96, 96))
    inner = classifier.model
    with torch.no_grad():
        found = model.backbone.stem(x)
        expected = inner.maxpool(inner.act1(inner.bn1(inner.conv1(classifier.images(x)))))
    assert_equal(interior(found, 2), interior(expected, 2))


def test_whole_features_are_folded_where_the_image_has_a_border_of_the_mean():
    classifier, model = Normalized(resnet_classifier()), resnet_model()
    load_backbone(model, classifier.state_dict(), source="a file")
    black = -MEAN.double() / STD.double()
    first = model.backbone.stem[0]
    x = images((64, 64))
    with torch.no_grad():  # the same padding for both: black in the units of each
        padded = nn.functional.pad(classifier.images(x) - black.view(3, 1, 1), (3,) * 4) + black.view(3, 1, 1)
        inner = classifier.model
        inner.conv1.padding = (0, 0)
        expected = dilate(inner).forward_features(padded)
        assert first.padding == (3, 3)
        assert_equal(model.backbone(x)[-1], expected)


@pytest.mark.slow
def test_a_normalisation_that_the_file_does_not_hold_is_given():
    classifier = Normalized(resnet_classifier())
    with_entries, given = resnet_model(), resnet_model()
    load_backbone(with_entries, classifier.state_dict(), source="a file")
    report = load_backbone(given, classifier.model.state_dict(), source="a file", normalization=CONSTANTS)
    assert report.folded
    for key, value in given.state_dict().items():
        torch.testing.assert_close(value, with_entries.state_dict()[key], rtol=1e-6, atol=1e-6)


def test_the_robustness_librarys_checkpoints_are_understood():
    classifier, model = resnet_classifier(), resnet_model()
    state = {"module.normalizer.new_mean": MEAN.view(3, 1, 1), "module.normalizer.new_std": STD.view(3, 1, 1)}
    for key, value in classifier.state_dict().items():
        state |= {f"module.model.{key}": value, f"module.attacker.model.{key}": value}
    state["module.attacker.normalize.new_mean"] = MEAN.view(3, 1, 1)
    report = load_backbone(model, {"model": state, "optimizer": {}}, source="a file")
    assert (report.unknown, report.missing, report.folded) == ((), (), True)


def test_a_sequence_of_normalisation_and_model_is_understood():
    state = {f"1.{key}": value for key, value in resnet_classifier().state_dict().items()}
    report = load_backbone(resnet_model(), {"0.mean": MEAN, "0.std": STD, **state}, source="a file")
    assert (report.unknown, report.missing, report.folded) == ((), (), True)


@pytest.mark.parametrize(
    "extra",
    [
        {"normalize.mean": MEAN},
        {"normalize.mean": MEAN, "normalize.std": 0 * STD},
        {"normalize.mean": MEAN, "normalize.std": STD, "other.std": STD},
    ],
)
def test_half_a_normalisation_is_refused(extra):
    with pytest.raises(ModelError, match="one mean and one positive std of three numbers"):
        backbone_state(resnet_model(), {**resnet_classifier().state_dict(), **extra})


# What does not fit


def test_unknown_keys_are_reported_and_the_rest_is_loaded():
    state = {**convnext_classifier().state_dict(), "ema.decay": torch.ones(1), "mean": torch.ones(7)}
    report = load_backbone(ours("upernet_convnext"), state, source="a file")
    assert set(report.unknown) == {"ema.decay", "mean"}


@pytest.mark.parametrize(
    ("name", "state", "changes", "said"),
    [
        ("upernet_convnext", resnet_classifier, {}, r"another family.*Unknown keys: conv1\.weight"),
        ("upernet_convnext", convnext_classifier, {"depths": (1, 1, 1, 1)}, r"surplus stages\.2\.blocks\.1.*depth or"),
        ("upernet_convnext", convnext_classifier, {"depths": (1, 1, 3, 1)}, r"missing backbone\.stages\.2.*depth or"),
        (
            "upernet_convnext",
            convnext_classifier,
            {"widths": (8, 16, 24, 48)},
            r"fc2.bias is \(32,\), the model has \(48,\).*other widths",
        ),
        ("segmenter_vit", vit_classifier, {"depth": 3}, r"missing encoder\.blocks\.2.*another depth"),
        ("segmenter_vit", vit_classifier, {"patch": 16}, r"encoder\.patch_embed\.proj\.weight is .*other widths"),
        ("pspnet_resnet", resnet_classifier, {"deep_stem": True}, "another depth or stem"),
        ("pspnet_resnet", vit_classifier, {}, "another family"),
    ],
)
def test_classifiers_that_do_not_fit_are_refused_whole(name, state, changes, said):
    model = ours(name, **changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"(?s)weights of a file do not fit the backbone.*" + said) as caught:
        load_backbone(model, state().state_dict(), source="a file")
    assert len(str(caught.value).splitlines()) <= 12
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_models_without_such_a_backbone_are_refused():
    for model in (nn.Conv2d(3, 3, 1), build("upernet_timm", num_classes=2, backbone="test_convnext", channels=8)):
        with pytest.raises(ModelError, match="takes no classifier's weights"):
            backbone_state(model, {"a": torch.zeros(1)})


# The released sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "classifier"),
    [
        ("upernet_convnext", {}, "convnext_tiny"),
        ("upernet_convnext", {"depths": (3, 3, 27, 3)}, "convnext_small"),
        ("segmenter_vit", {}, "vit_small_patch16_224"),
        ("pspnet_resnet", {}, "resnet50"),
    ],
)
def test_classifiers_of_the_released_sizes_fit(name, arguments, classifier):
    """Names and shapes alone; the equality of features is shown above on small ones."""
    with torch.device("meta"):
        model = build(name, num_classes=21, **arguments)
        source = timm.create_model(classifier)
        if name == "upernet_convnext":
            source.stem = WrappedStem(96)
        if name == "segmenter_vit":
            assert source.pos_embed.shape[1] == 1 + 14**2
    report = backbone_state(model, source.state_dict())
    assert (report.unknown, report.missing, report.surplus) == ((), (), ())
    own = model.state_dict()
    assert all(value.shape == own[key].shape for key, value in report.state.items())


def test_published_backbones_are_described():
    assert set(BACKBONES) == {"robust_convnext_t", "robust_convnext_s", "robust_vit_s", "robust_resnet50"}
    for name, backbone in BACKBONES.items():
        assert backbone.name == name
        assert 0 < backbone.robust < backbone.clean < 100
        assert backbone.source
        assert backbone.url is None or backbone.url.startswith("https://")
    assert math.isclose(BACKBONES["robust_convnext_t"].robust, 49.5)
