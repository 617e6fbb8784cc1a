"""Models of other libraries give what those libraries give, and what does not fit is refused with the mend."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

import segbench
from segbench.errors import ContentError, ModelError
from segbench.models.normalization import IMAGENET
from segbench.models.sources.hf import MaskQueries
from segbench.models.sources.image_model import with_background
from segbench.models.sources.names import CardSource, FunctionSource, LibrarySource, identifier, parse
from tests.loading import load_named

MEAN, STD = [0.1, 0.35, 0.6], [0.2, 0.3, 0.45]
SIZES = [(33, 47), (64, 80)]
EVIL = "__import__('pathlib').Path({marker!r}).touch()"


class Evil:
    """A pickle of it would run code when read."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return eval, (EVIL.format(marker=self.marker),)


def scattered(module: nn.Module, scale: float = 0.2) -> nn.Module:
    """Random weights that make the logits differ from pixel to pixel, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.named_parameters():
        if tensor.ndim > 1:
            tensor.data.normal_(0, scale, generator=generator)
        else:  # some libraries draw these too
            tensor.data.fill_(0 if name.endswith("bias") else 1)
    return module.eval()


def normalised(images: torch.Tensor, statistics=(MEAN, STD)) -> torch.Tensor:
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in statistics)
    return (images - mean) / std


def photo(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def as_images(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 255


def evaluate(module: nn.Module, out: Path) -> None:
    result = segbench.evaluate(module, "shapes", eps=[8], limit=2, iterations=3, out=out, progress=False)
    entry = result.entry()
    assert entry["results"][0]["aacc"] <= entry["clean"]["aacc"]
    flags = {flag["name"]: flag["level"] for flag in entry["flags"]}
    assert flags["deterministic"] != "warning"
    assert flags["output_scale"] == "ok"


def check_contract(module: nn.Module, num_classes: int) -> None:
    """Logits at image size, float32, the gradient reaches the image."""
    assert not any(part.training for part in module.modules())
    assert all(tensor.dtype == torch.float32 for tensor in module.parameters())
    for size in SIZES:
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        logits = module(images)
        assert logits.shape == (2, num_classes, *size)
        assert logits.dtype == torch.float32
        assert bool(torch.isfinite(logits).all())
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.zeros(2, *size).long()), images)
        assert bool((gradient[..., 3:-3, 3:-3] != 0).any())


# --------------------------------------------------------------------------------------------------------- transformers


def convnext(t):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return t.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=stages)


def swin(t):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return t.SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)


def hf_segformer(t):
    config = t.SegformerConfig(
        num_labels=8, depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    )  # fmt: skip
    return t.SegformerForSemanticSegmentation(config), t.SegformerImageProcessor


def hf_upernet(t):
    config = t.UperNetConfig(
        backbone_config=convnext(t), hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=16, num_labels=8
    )
    return t.UperNetForSemanticSegmentation(config), t.SegformerImageProcessor


def hf_dpt(t):
    config = t.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, num_labels=8,
        is_hybrid=False,
    )  # fmt: skip
    return t.DPTForSemanticSegmentation(config), t.DPTImageProcessor


def hf_beit(t):
    config = t.BeitConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        out_indices=[1, 2, 3, 4], use_relative_position_bias=True, auxiliary_channels=8, num_labels=7,
    )  # fmt: skip
    return t.BeitForSemanticSegmentation(config), t.BeitImageProcessor


def hf_mobilevit(t):
    config = t.MobileViTConfig(
        hidden_sizes=[8, 8, 8], neck_hidden_sizes=[8] * 7, num_attention_heads=2, aspp_out_channels=8, num_labels=8
    )
    return t.MobileViTForSemanticSegmentation(config), t.MobileViTImageProcessor


def hf_mask2former(t):
    config = t.Mask2FormerConfig(
        backbone_config=swin(t), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12, num_labels=8,
    )  # fmt: skip
    return t.Mask2FormerForUniversalSegmentation(config), t.Mask2FormerImageProcessor


def hf_maskformer(t):
    decoder = t.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=12,
    )  # fmt: skip
    config = t.MaskFormerConfig(
        backbone_config=swin(t), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=8
    )
    return t.MaskFormerForInstanceSegmentation(config), t.MaskFormerImageProcessor


HF = {
    "segformer": hf_segformer, "upernet": hf_upernet, "dpt": hf_dpt, "beit": hf_beit, "mobilevit": hf_mobilevit,
    "mask2former": hf_mask2former, "maskformer": hf_maskformer,
}  # fmt: skip
MASKS = ("mask2former", "maskformer")
SCALES = {"mobilevit": 0.8, "maskformer": 0.5}  # of random weights, so that more than one class is predicted


@pytest.fixture(scope="module")
def transformers():
    return importlib.import_module("transformers")


@pytest.fixture(scope="module")
def saved(transformers, tmp_path_factory):
    """Saves a tiny model of a kind once; gives its folder, and the library's own model and processor from it."""
    done = {}

    def save(kind: str):
        if kind not in done:
            folder = tmp_path_factory.mktemp("hf") / kind
            model, processor_class = HF[kind](transformers)
            scattered(model, SCALES.get(kind, 0.2)).save_pretrained(folder)
            own = {} if kind == "mobilevit" else {"image_mean": MEAN, "image_std": STD}
            own |= {"do_reduce_labels": True} if kind == "beit" else {}
            processor_class(**own).save_pretrained(folder)
            done[kind] = folder
        auto = "AutoModelForUniversalSegmentation" if kind in MASKS else "AutoModelForSemanticSegmentation"
        model = getattr(transformers, auto).from_pretrained(done[kind]).eval()
        return done[kind], model, transformers.AutoImageProcessor.from_pretrained(done[kind])

    return save


def library_pipeline(model, processor, array: np.ndarray):
    """The library's way from a photograph to its output, without resizing."""
    off = {"do_resize": False} | ({"do_center_crop": False} if hasattr(processor, "do_center_crop") else {})
    with torch.no_grad():
        inputs = processor(images=array, return_tensors="pt", **off)
        return model(pixel_values=inputs["pixel_values"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size"),
    [("segformer", (64, 80)), ("segformer", (33, 47)), ("upernet", (64, 80)), ("upernet", (33, 47)), ("dpt", (64, 64)),
     ("beit", (64, 80)), ("mobilevit", (64, 96))],
)  # fmt: skip
def test_hf_logits_are_those_of_the_librarys_pipeline(saved, kind, size):
    folder, model, processor = saved(kind)
    array = photo(size)
    output = library_pipeline(model, processor, array)
    expected = F.interpolate(output.logits, size=size, mode="bilinear", align_corners=False)
    (labels,) = processor.post_process_semantic_segmentation(output, target_sizes=[size])
    with torch.no_grad():
        logits = load_named(f"hf:{folder}").module(as_images(array))
    assert float((logits - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert len(labels.unique()) > 1
    assert float((logits[0].argmax(dim=0) == labels).float().mean()) >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("kind", MASKS)
def test_hf_mask_queries_are_the_librarys_scores(saved, kind):
    folder, model, processor = saved(kind)
    array = photo((384, 384))  # where the library resizes Mask2Former's masks to image size, too
    images = as_images(array)
    pixels = processor(images=array, return_tensors="pt", do_resize=False)["pixel_values"]
    assert torch.allclose(normalised(images), pixels, atol=1e-5)
    with torch.no_grad():  # a random network makes much of a difference in the last bit
        output = model(pixel_values=normalised(images))
    if kind == "maskformer":  # the library resizes scores; the paper's code resizes masks
        output.masks_queries_logits = F.interpolate(
            output.masks_queries_logits, size=(384, 384), mode="bilinear", align_corners=False
        )
    (labels,) = processor.post_process_semantic_segmentation(output, target_sizes=[(384, 384)])
    with torch.no_grad():
        logits = load_named(f"hf:{folder}").module(images)
    assert len(labels.unique()) > 1
    assert float((logits[0].argmax(dim=0) == labels).float().mean()) >= 0.999

    masks = F.interpolate(output.masks_queries_logits, size=(384, 384), mode="bilinear", align_corners=False)
    masks, classes = masks.double().sigmoid(), output.class_queries_logits.double().softmax(dim=-1)
    scores = sum(classes[0, query, :8, None, None] * masks[0, query] for query in range(classes.shape[1]))
    assert torch.allclose(logits[0].double().softmax(dim=0), scores / scores.sum(dim=0), atol=1e-5)
    large = scores > 1e-30
    assert float((logits[0].double() - scores.log())[large].abs().max()) <= 1e-3


class FarMasks(nn.Module):
    """Four queries whose masks are so far below 0 that their sigmoid is 0 in float32."""

    def __init__(self, null: float) -> None:
        super().__init__()
        self.masks = nn.Conv2d(3, 4, 1)
        nn.init.constant_(self.masks.bias, -300)
        self.classes = nn.Parameter(torch.cat([torch.randn(1, 4, 8), torch.full((1, 4, 1), null)], dim=2))

    def forward(self, pixel_values):
        return SimpleNamespace(class_queries_logits=self.classes, masks_queries_logits=self.masks(pixel_values))


@pytest.mark.parametrize("null", [0.0, 400.0])
def test_hf_mask_scores_of_nothing_have_finite_logits_and_a_gradient(null):
    torch.manual_seed(0)
    module = MaskQueries(FarMasks(null))
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    logits = module(images)
    loss = F.cross_entropy(logits, torch.zeros(1, 8, 8).long())
    (gradient,) = torch.autograd.grad(loss, images)
    assert bool(torch.isfinite(logits).all())
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient != 0).all()) == (null == 0)  # nothing has a gradient if no query has a class
    if null == 0:
        output = module.network.double()(images.double())
        scores = torch.einsum(
            "nqk,nqhw->nkhw", output.class_queries_logits.softmax(-1)[..., :-1], output.masks_queries_logits.sigmoid()
        )
        assert torch.allclose(logits.double(), scores.log(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HF)
def test_hf_models_keep_the_contract_and_can_be_attacked(saved, tmp_path, kind):
    folder, model, _ = saved(kind)
    adapted = load_named(f"hf:{folder}", num_classes=8)
    assert adapted.module.num_classes == model.config.num_labels if kind != "beit" else True
    check_contract(adapted.module, 8)
    evaluate(adapted.module, tmp_path / "run")


def test_hf_images_are_padded_with_the_mean_colour_and_the_logits_cropped(saved):
    folder, model, _ = saved("beit")
    images = torch.rand(1, 3, 33, 47)
    padded = F.pad(normalised(images), (0, 1, 0, 15))
    with torch.no_grad():
        expected = F.interpolate(model(pixel_values=padded).logits, size=(48, 48), mode="bilinear")[..., :33, :47]
        assert torch.allclose(load_named(f"hf:{folder}").module(images), expected, atol=1e-4)
        assert load_named(f"hf:{folder}?multiple=32").module(images).shape == (1, 7, 33, 47)


def test_hf_labels_reduced_by_one_get_a_background_that_is_never_predicted(saved):
    folder, _, _ = saved("beit")
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    plain, offset = load_named(f"hf:{folder}", num_classes=7).module, load_named(f"hf:{folder}", num_classes=8).module
    logits = offset(images)
    assert torch.equal(logits[:, 1:], plain(images))
    assert torch.equal(logits[:, 0], plain(images).amin(dim=1) - 1)
    assert not bool((logits.argmax(dim=1) == 0).any())
    loss = F.cross_entropy(logits, torch.zeros(1, 32, 32).long())
    assert bool(torch.isfinite(loss))
    assert (
        load_named(f"hf:{folder}", num_classes=21).module(images).shape[1] == 7
    )  # the probe says that it does not fit
    assert with_background(plain)(images).shape[1] == 8


def test_hf_processors_that_do_not_rescale_see_0_to_255(saved, transformers, tmp_path):
    _, model, _ = saved("segformer")
    model.save_pretrained(tmp_path)
    mean = [127.0, 100.0, 90.0]
    transformers.SegformerImageProcessor(do_rescale=False, image_mean=mean, image_std=[60.0] * 3).save_pretrained(
        tmp_path
    )
    array = photo((64, 80))
    output = library_pipeline(model, transformers.AutoImageProcessor.from_pretrained(tmp_path), array)
    expected = F.interpolate(output.logits, size=(64, 80), mode="bilinear", align_corners=False)
    with torch.no_grad():
        logits = load_named(f"hf:{tmp_path}").module(as_images(array))
    assert float((logits - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_a_folder_is_not_taken_for_a_repository(saved, tmp_path, monkeypatch):
    folder, _, _ = saved("segformer")
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "seg").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for library in ("hf", "smp"):
        with pytest.raises(ModelError, match="user/seg is not on this machine"):
            load_named(f"{library}:user/seg", offline=True)
    assert load_named("hf:./user/seg").module.num_classes == 8


def test_hf_without_a_processor_says_so_and_does_not_normalise(saved, transformers, tmp_path, caplog):
    _, model, _ = saved("segformer")
    model.save_pretrained(tmp_path / "bare")
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for query, statistics in {"": ([0] * 3, [1] * 3), "?normalize=imagenet": IMAGENET}.items():
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="segbench"):
                module = load_named(f"hf:{tmp_path / 'bare'}{query}").module
            assert ("are not normalised" in caplog.text) == (query == "")
            expected = model(pixel_values=normalised(images, statistics)).logits
            assert torch.allclose(module.network(normalised(images, statistics)), expected, atol=1e-5)
            assert torch.allclose(module(images), F.interpolate(expected, size=(32, 32), mode="bilinear"), atol=1e-4)


def test_hf_half_precision_checkpoints_are_computed_in_float32(saved, tmp_path):
    _, model, processor = saved("segformer")
    model.half().save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    check_contract(load_named(f"hf:{tmp_path / 'half'}").module, 8)


def test_hf_tensors_in_a_bin_file_are_read(saved, tmp_path):
    folder, _, _ = saved("segformer")
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    images = torch.rand(1, 3, 40, 40)
    found, expected = load_named(f"hf:{tmp_path}").module, load_named(f"hf:{folder}").module
    theirs = expected.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in found.state_dict().items())
    torch.testing.assert_close(found(images), expected(images))  # rounding may depend on where the tensors lie


def test_hf_code_is_never_run(saved, tmp_path):
    folder, _, _ = saved("segformer")
    marker = tmp_path / "executed"
    for name in ("evil", "remote"):
        (tmp_path / name).mkdir()
        for file in folder.glob("*.json"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    torch.save({"weight": Evil(marker)}, tmp_path / "evil" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin are refused.*Ask for a safetensors file"):
        load_named(f"hf:{tmp_path / 'evil'}")

    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModelForSemanticSegmentation": "code.Model"}
    (tmp_path / "remote" / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": names}))
    (tmp_path / "remote" / "code.py").write_text(EVIL.format(marker=str(marker)))
    (tmp_path / "remote" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="needs code from its repository, which segbench never runs"):
        load_named(f"hf:{tmp_path / 'remote'}")
    assert not marker.exists()


def test_hf_checkpoints_that_are_no_segmentation_model_are_refused(saved, transformers, tmp_path):
    config = transformers.SegformerConfig(depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4)
    transformers.SegformerForImageClassification(config).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ModelError, match=r"lacks \d+ weights, which would be random:\n  decode_head"):
        load_named(f"hf:{tmp_path / 'encoder'}")
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.ViTForImageClassification(transformers.ViTConfig(**tiny)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match="is a model of type 'vit', not one for semantic segmentation"):
        load_named(f"hf:{tmp_path / 'vit'}")
    folder, _, _ = saved("segformer")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_named(f"hf:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        load_named(f"hf:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match="cannot load"):
        load_named(f"hf:{tmp_path / 'empty'}")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "of_next_year"}')
    with pytest.raises(ModelError, match="pip install -U transformers"):
        load_named(f"hf:{tmp_path / 'empty'}")
    with pytest.raises(ModelError, match="There is no folder"):
        load_named(f"hf:{tmp_path / 'absent'}")


# ---------------------------------------------------------------------------------------------------------- torchvision


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """torch.hub's folder of checkpoints, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def published(name: str, **arguments):
    """A model of torchvision with random weights, and the file that its published weights are cached as."""
    models = importlib.import_module("torchvision.models")
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=21, **arguments)
    scattered(model, 0.05)
    return model, models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"), [("lraspp_mobilenet_v3_large", {}), ("deeplabv3_mobilenet_v3_large", {"aux_loss": True})]
)
def test_torchvision_logits_are_those_of_the_library(hub_folder, name, arguments):
    model, file = published(name, **arguments)
    torch.save(model.state_dict(), hub_folder / file)
    for spec in (f"torchvision:{name}", f"torchvision:{name}@COCO_WITH_VOC_LABELS_V1"):
        adapted = load_named(spec, offline=True)
        images = torch.rand(1, 3, 33, 47)
        with torch.no_grad():
            assert torch.allclose(adapted.module(images), model(normalised(images, IMAGENET))["out"], atol=1e-5)
    assert adapted.id == f"torchvision_{name}_coco_with_voc_labels_v1"
    check_contract(adapted.module, 21)


@pytest.mark.slow
def test_torchvision_takes_own_weights_and_random_ones(tmp_path, caplog):
    model, _ = published("deeplabv3_mobilenet_v3_large", aux_loss=True)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "own.pt")
    spec = "torchvision:deeplabv3_mobilenet_v3_large"
    module = load_named(f"{spec}?num_classes=21&weights={tmp_path / 'own.pt'}").module
    images = torch.rand(1, 3, 40, 40)
    assert torch.allclose(module(images), model(normalised(images, IMAGENET))["out"], atol=1e-5)
    with pytest.raises(ModelError, match=r"do not fit the architecture"):
        load_named(f"{spec}?num_classes=5&weights={tmp_path / 'own.pt'}")
    caplog.clear()
    random = load_named("torchvision:lraspp_mobilenet_v3_large@none", num_classes=8).module
    assert "random weights" in caplog.text
    check_contract(random, 8)
    evaluate(random, tmp_path / "run")


def test_torchvision_weights_that_are_missing_or_not_weights_are_refused(hub_folder, tmp_path):
    _, file = published("lraspp_mobilenet_v3_large")
    spec = "torchvision:lraspp_mobilenet_v3_large"
    with pytest.raises(ModelError, match=rf"{file} of {spec} are not on this machine. While online: python -c"):
        load_named(spec, offline=True)
    torch.save({"weight": Evil(tmp_path / "executed")}, hub_folder / file)
    with pytest.raises(ModelError, match="are refused"):
        load_named(spec, offline=True)
    assert not (tmp_path / "executed").exists()
    torch.save({"a": torch.zeros(1)}, hub_folder / file)
    with pytest.raises(ModelError, match=r"does not fit.*Delete it"):
        load_named(spec, offline=True)


# ------------------------------------------------------------------------------------------------------------------ SMP


@pytest.fixture(scope="module")
def smp():
    return importlib.import_module("segmentation_models_pytorch")


@pytest.fixture(scope="module")
def unet(smp, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smp") / "unet"
    model = scattered(smp.Unet("resnet18", encoder_weights=None, classes=8, decoder_channels=(32, 16, 16, 8, 8)), 0.1)
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.slow
def test_smp_saved_models_give_the_librarys_logits(smp, unet, caplog, capsys):
    folder, model = unet
    adapted = load_named(f"smp:{folder}")
    assert "does not say how its images were normalised" in caplog.text
    assert capsys.readouterr().out == ""  # standard output is for data
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = smp.from_pretrained(str(folder)).eval()(normalised(images, IMAGENET))
        assert torch.allclose(adapted.module(images), expected, atol=1e-5)
        odd = model(F.pad(normalised(images[..., :33, :47], IMAGENET), (0, 17, 0, 31)))[..., :33, :47]
        assert torch.allclose(adapted.module(images[..., :33, :47]), odd, atol=1e-5)
        plain = load_named(f"smp:{folder}?normalize=none").module(images)
        assert torch.allclose(plain, model(images), atol=1e-5)
    check_contract(adapted.module, 8)


@pytest.mark.slow
def test_smp_configurations_say_the_normalisation_and_lose_their_activation(unet, tmp_path, caplog):
    folder, model = unet
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "encoder_weights": "imagenet", "activation": "softmax"})
    )
    module = load_named(f"smp:{tmp_path}", offline=True).module  # and no network for the encoder's weights
    assert "does not say" not in caplog.text
    assert "ends in the activation 'softmax'; it is left out" in caplog.text
    images = torch.rand(1, 3, 32, 32)
    assert torch.allclose(module(images), model(normalised(images, IMAGENET)), atol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps({**config, "_model_class": "Path"}))
    with pytest.raises(ModelError, match="Unknown architecture of SMP: 'Path'"):
        load_named(f"smp:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({**config, "encoder_name": "resnet34"}))
    with pytest.raises(ModelError, match="do not fit the architecture"):
        load_named(f"smp:{tmp_path}", offline=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unetplusplus", "fpn", "pspnet", "deeplabv3plus", "segformer", "upernet", "linknet"])
def test_smp_architectures_keep_the_contract(smp, tmp_path, name, caplog):
    module = load_named(f"smp:{name}?encoder_name=mobilenet_v2&classes=8").module
    assert "random weights" in caplog.text
    check_contract(module, 8)
    if name == "pspnet":  # the others take longer
        evaluate(scattered(module, 0.1), tmp_path / "run")


@pytest.mark.slow
def test_smp_architectures_take_weights(unet, tmp_path):
    _, model = unet
    torch.save(model.state_dict(), tmp_path / "unet.pt")
    with pytest.raises(ModelError, match=r"do not fit the architecture.*\n.*decoder"):
        load_named(f"smp:unet?encoder_name=resnet18&classes=8&weights={tmp_path / 'unet.pt'}")  # wider by default
    own = importlib.import_module("segmentation_models_pytorch").Unet("resnet18", encoder_weights=None, classes=8)
    torch.save(own.state_dict(), tmp_path / "wide.pt")
    spec = f"smp:unet?encoder_name=resnet18&weights={tmp_path / 'wide.pt'}"
    images = torch.rand(1, 3, 32, 32)
    expected = own.eval()(normalised(images, IMAGENET))
    assert torch.allclose(load_named(spec, num_classes=8).module(images), expected, atol=1e-5)


def test_smp_pickles_are_not_executed(unet, tmp_path):
    folder, _ = unet
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({"weight": Evil(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="are refused"):
        load_named(f"smp:{tmp_path}")
    assert not (tmp_path / "executed").exists()


# ----------------------------------------------------------------------------------------------------------------- timm


@pytest.mark.slow
def test_timm_backbones_carry_upernet(tmp_path, caplog):
    spec = "timm:convnext_atto?channels=16&auxiliary_channels=8&num_classes=8"
    adapted = load_named(spec)
    assert "timm:convnext_atto has random weights" in caplog.text
    assert adapted.id == "timm_convnext_atto_channels_16_auxiliary_channels_8_num_classes_8"
    check_contract(scattered(adapted.module, 0.1), 8)
    state = {key: value.contiguous() for key, value in adapted.module.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "own.safetensors")
    images = torch.rand(1, 3, 64, 64)
    again = load_named(f"{spec}&weights={tmp_path / 'own.safetensors'}").module
    assert torch.equal(again(images), adapted.module(images))
    evaluate(again, tmp_path / "run")
    torch.save({"weight": Evil(tmp_path / "executed")}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="are refused"):
        load_named(f"{spec}&weights={tmp_path / 'evil.pt'}")
    assert not (tmp_path / "executed").exists()


# -------------------------------------------------------------------------------------------------- functions of a user


NET = "import torch\ndef net(classes=8, **more):\n    return torch.nn.Conv2d(3, classes, 1)\n"


def test_functions_of_a_file_are_called_with_the_options(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef net(**options):\n    module = torch.nn.Conv2d(3, 8, 1)\n    module.options = options\n"
        "    return module\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    for path in ("./mine.py", "mine.py", str(tmp_path / "mine.py")):
        adapted = load_named(f"{path}:net?depth=3&rate=0.5&wide=true&old=False&name=none&text=a%26b")
        assert adapted.module.options == {
            "depth": 3, "rate": 0.5, "wide": True, "old": False, "name": None, "text": "a&b"
        }  # fmt: skip
        assert not adapted.module.training
    assert sys.path == before
    evaluate(load_named("./mine.py:net").module, tmp_path / "run")


def test_files_of_two_folders_have_their_own_siblings(tmp_path):
    before, path = set(sys.modules), list(sys.path)
    for number in (3, 5):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "sibling_of_mine.py").write_text(f"CLASSES = {number}\n")
        (folder / "mine.py").write_text(
            "import torch\nfrom sibling_of_mine import CLASSES\n"
            "class Net(torch.nn.Conv2d):\n    def __init__(self):\n        super().__init__(3, CLASSES, 1)\n"
        )
    assert [load_named(f"{tmp_path / str(n)}/mine.py:Net").module.out_channels for n in (3, 5)] == [3, 5]
    (tmp_path / "3" / "sibling_of_mine.py").write_text("CLASSES = 17\n")
    assert load_named(f"{tmp_path}/3/mine.py:Net").module.out_channels == 17
    assert sys.path == path
    assert all(name.startswith("segbench_user_mine_") for name in set(sys.modules) - before)


def test_weights_of_a_function_are_its_argument_or_loaded(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef plain():\n    return torch.nn.Conv2d(3, 8, 1)\n"
        "def own(weights):\n    module = plain()\n    module.read = weights\n    return module\n"
    )
    expected = nn.Conv2d(3, 8, 1).state_dict()
    torch.save(expected, tmp_path / "w.pt")
    module = load_named(f"{tmp_path}/mine.py:plain?weights={tmp_path}/w.pt").module
    assert torch.equal(module.weight, expected["weight"])
    assert load_named(f"{tmp_path}/mine.py:own?weights=7").module.read == "7"
    with pytest.raises(ModelError, match=r"Cannot read the weights absent\.pt"):
        load_named(f"{tmp_path}/mine.py:plain?weights=absent.pt")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import torch\n1 / 0\n", r"Cannot import .*ZeroDivisionError: division by zero \(mine\.py, line 2\)"),
        ("import torch\ndef net(:\n", r"Cannot import .*SyntaxError: .*\(mine\.py, line 2\)"),
        ("import sys\nsys.exit(3)\n", r"Cannot import .*SystemExit: 3 \(mine\.py, line 2\).*__main__"),
        ("from .other import x\n", r"relative import.*package\.module:function"),
        ("import beside_mine\n", r"KeyError: 'x' \(beside_mine\.py, line 3\)"),
        ("def net():\n    import json\n    json.loads('{')\n", r"net\(\) failed: JSONDecode.*\(mine\.py, line 3\)"),
        ("def net(depth): ...\n", r"net\(\) failed: TypeError: .*depth.*called without arguments"),
        ("def nets(): ...\n", r"Unknown function 'net'. Did you mean 'nets'\?"),
        ("import torch\nnet = torch.nn.Identity()\n", r"is no function"),
        ("def net(): return 3\n", r"must return a torch.nn.Module; it gave int"),
    ],
)
def test_errors_in_a_file_name_file_line_and_exception(tmp_path, monkeypatch, code, text):
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "beside_mine.py").write_text("\n\nraise KeyError('x')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=text):
        load_named("./mine.py:net")


def test_functions_that_do_not_take_an_option_are_named(tmp_path):
    (tmp_path / "mine.py").write_text("def net(depth): return depth\n")
    with pytest.raises(ModelError, match=r"unexpected keyword argument 'deep'.*called with deep=3"):
        load_named(f"{tmp_path}/mine.py:net?deep=3")


# -------------------------------------------------------------------------------------------------- specs and their ids


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("torchvision:fcn_resnet5", "Did you mean 'fcn_resnet50'"),
        ("torchvision:resnet50", "Unknown segmentation model of torchvision: 'resnet50'"),
        ("torchvision:fcn_resnet50@COCO_WITH_VOC_LABELS", "Did you mean 'COCO_WITH_VOC_LABELS_V1'"),
        ("torchvision:fcn_resnet50?weight=a.pt", "Did you mean 'weights'"),
        ("torchvision:fcn_resnet50?num_classes=5", "is for weights of your own"),
        ("torchvision:fcn_resnet50@DEFAULT?weights=a.pt", "has two weights"),
        ("torchvision:fcn_resnet50@none?normalize=imagnet", "Did you mean 'imagenet'"),
        ("torchvision:fcn_resnet50?weights=absent.pt", r"Cannot read the weights absent.pt"),
        ("torchvison:fcn_resnet50", "Did you mean 'torchvision'"),
        ("torchvision:", "names no model"),
        ("hf:a/b/c", "is no repository of the hub"),
        ("hf:./absent", "There is no folder ./absent"),
        ("hf:a/b?size=3", "Unknown option of hf: 'size'"),
        ("smp:unett", "Did you mean 'unet'"),
        ("smp:unet", r"Add \?classes=21"),
        ("smp:unet?classes=0", "must be a whole number from 1"),
        ("smp:unet?classes=3&encoder_name=resnet19", "Did you mean 'resnet1"),
        ("smp:unet?classes=3&encoder_name=resnet18&encoder_weights=imagnet", "Did you mean 'imagenet'"),
        ("smp:unet?classes=3&activation=softmax", "Attacks need logits"),
        ("smp:unet?classes=3&in_channels=1", "takes 1 channels"),
        ("smp:unet?classes=3&depth=4", "SMP cannot build unet"),
        ("smp:unet@main?classes=3", "has no revision 'main'"),
        ("timm:convnext_atto", r"Add \?num_classes=21"),
        ("timm:convnext_ato?num_classes=3", "Did you mean 'convnext_atto'"),
        ("timm:convnext_atto@1?num_classes=3", "has no revision"),
        ("mine.py", r"Write mine\.py:function"),
        ("absent.py:net", r"There is no file absent\.py"),
        ("https://example.org/model.pt", "is neither a model nor a spec"),
        ("mine:net?depth", "is no option"),
        ("mine:net?a=1&a=2", "says a twice"),
    ],
)
def test_specs_that_make_no_sense_are_answered(spec, text):
    importlib.import_module("transformers")
    importlib.import_module("segmentation_models_pytorch")
    with pytest.raises(ModelError, match=text):
        load_named(spec, offline=True)


def test_specs_are_told_from_ids_and_cards():
    assert isinstance(parse("hf:a/b"), LibrarySource)
    for name in ("a.b:c", "./a.py:c", "a.py", "C:\\models\\net.py:build"):
        assert isinstance(parse(name), FunctionSource)
    assert isinstance(parse("at_convnext_mini_shapes"), CardSource)
    for name in ("zoo/card.json", "C:\\zoo\\card.json"):
        with pytest.raises(ContentError, match="Cannot read the card"):
            parse(name)
    spec = parse("hf:owner/name@refs/pr/3?multiple=32")
    assert (spec.library, spec.name, spec.revision, spec.options) == ("hf", "owner/name", "refs/pr/3", {"multiple": 32})
    assert parse("smp:./runs@home/unet").name == "./runs@home/unet"
    assert parse("C:\\models\\net.py:build").name == "C:\\models\\net.py:build"


def test_ids_are_valid_differ_and_name_no_folder():
    specs = [
        "hf:owner/name", "hf:owner/name@v1", "hf:owner/other", "hf:/home/someone/name", "hf:/home/other/name",
        "smp:unet?classes=8", "smp:unet?classes=9", "smp:unet?classes=9&weights=/home/someone/a.pt",
        "smp:unet?classes=9&weights=/home/other/a.pt", "torchvision:fcn_resnet50", "torchvision:fcn_resnet50@none",
        "package.models:net", "package.others:net", "/home/someone/mine.py:net", "./mine.py:net", "mine:net",
        "mine:net?depth=3", "mine:net?depth=4", "timm:" + "x" * 90 + "?num_classes=3",
        "timm:" + "x" * 90 + "?num_classes=4",
    ]  # fmt: skip
    ids = [parse(spec).id for spec in specs]
    assert len(set(ids)) == len(specs)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_]{0,79}", name) for name in ids)
    assert not any("someone" in name or "home" in name for name in ids)
    assert identifier("MyNet") == "mynet"
    assert identifier("Ñ") == "model"


@pytest.mark.slow
def test_a_missing_library_is_named_with_the_command():
    code = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "segmentation_models_pytorch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from segbench.errors import ModelError
from segbench import load_model
for spec in ("hf:owner/name", "smp:unet?classes=3"):
    try:
        load_model(spec, offline=True)
    except ModelError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line, library in zip(lines, ("transformers", "segmentation_models_pytorch"), strict=True):
        assert line.startswith(f"This model needs {library}, which cannot be imported")
        assert line.endswith("pip install 'segbench[hub-models]'")
