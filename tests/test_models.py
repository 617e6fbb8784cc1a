"""Architectures against golden logits, and loading that refuses what does not fit."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import segbench
from segbench import cards
from segbench.engine.launch.shards import process_device
from segbench.errors import ContentError, DownloadError, ModelError, UnknownNameError, UsageError
from segbench.files import sha256_bytes
from segbench.models import devices, from_released
from segbench.models.architectures import ARCHITECTURES, WithoutDraws, build
from segbench.models.devices import choose_compute_device
from segbench.models.normalization import NONE
from segbench.models.sources.image_model import ImageModel
from segbench.models.weights import load_weights
from tests.conftest import GOLDEN, recipe_weights, released_layout
from tests.loading import load_named

TINY_CONVNEXT = {"depths": (1, 1, 1, 1), "widths": (8, 8, 8, 8), "channels": 8, "auxiliary_channels": 8}


def released_parameters(name):
    return json.loads((GOLDEN / "architectures" / f"{name}.json").read_text())["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_classes"),
    [
        ("upernet_convnext_t", 21),
        ("upernet_convnext_s", 151),
        ("segmenter_vit_s", 151),
        ("pspnet_resnet50", 21),
        ("pspnet_resnet50_deepstem", 21),
    ],
)
def test_released_layout_gives_the_golden_logits(name, num_classes):
    model = from_released(name, recipe_weights(released_layout(name)), num_classes=num_classes)
    with np.load(GOLDEN / "architectures" / f"{name}.npz") as archive, torch.no_grad():
        logits = model(torch.from_numpy(archive["image"]).double())[..., ::6, ::6].numpy()
        expected = archive["logits"]
    assert np.abs(logits - expected).max() <= 1e-6 * np.abs(expected).max()  # they are stored in float32
    assert not any(module.training for module in model.modules())
    assert sum(parameter.numel() for parameter in model.parameters()) == released_parameters(name)


@pytest.mark.slow
def test_released_checkpoints_that_do_not_fit_are_refused():
    state = {key: torch.zeros(shape) for key, shape in released_layout("upernet_convnext_t").items()}
    with pytest.raises(ModelError, match=r"head.classifier.weight is \(21, 512, 1, 1\), the model has \(19"):
        from_released("upernet_convnext_t", state, num_classes=19)
    del state["backbone.norm0.weight"]
    with pytest.raises(ModelError, match=r"missing backbone.norms.0.weight"):
        from_released("upernet_convnext_t", {**state, "more": torch.zeros(1)}, num_classes=21)
    with pytest.raises(UnknownNameError, match="Did you mean 'upernet_convnext_t'"):
        from_released("upernet_convnext_tiny", state, num_classes=21)


@pytest.mark.slow
def test_shipped_models_load_and_score_as_their_cards_say():
    for card in segbench.list_models("*_shapes"):
        model = segbench.load_model(card.id)
        assert not any(module.training for module in model.modules())
        assert sum(p.numel() for p in model.parameters()) == card.parameters
        data = segbench.load_dataset("shapes")
        with torch.inference_mode():
            predictions = [model(sample.image[None]).argmax(dim=1) for sample in data]
        found = segbench.counts.count(torch.cat(predictions), torch.stack([sample.label for sample in data]), 8)
        assert found.aacc() == pytest.approx(card.expected["aacc"], abs=1e-3)
        assert found.miou() == pytest.approx(card.expected["miou"], abs=1e-3)


@pytest.fixture
def copied_card(tmp_path):
    """A shipped card and its weights in a folder of their own."""
    card = cards.get_card("clean_convnext_mini_shapes")
    for suffix in (".json", ".safetensors"):
        shutil.copy(card.path.with_suffix(suffix), tmp_path / card.path.with_suffix(suffix).name)
    return tmp_path / card.path.name


def test_a_card_is_loaded_from_its_path(copied_card):
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(segbench.load_model(str(copied_card))(image), segbench.load_model(copied_card.stem)(image))


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_damaged_weights_are_named_and_refused(copied_card, damage):
    weights = copied_card.with_suffix(".safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:1000] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DownloadError, match=r"its SHA-256 is [0-9a-f]{64}, the card pins [0-9a-f]{64}"):
        segbench.load_model(str(copied_card))
    text = copied_card.read_text()
    copied_card.write_text(text.replace(cards.read_card(copied_card).sha256, sha256_bytes(weights.read_bytes())))
    if damage == "truncated":
        with pytest.raises(ModelError, match="are damaged"):
            segbench.load_model(str(copied_card))
    weights.unlink()
    with pytest.raises(DownloadError, match=r"put the file at .*clean_convnext_mini_shapes\.safetensors"):
        segbench.load_model(str(copied_card))


def test_weights_of_another_architecture_are_listed(copied_card):
    weights = copied_card.with_suffix(".safetensors")
    other = safetensors.torch.save({"a": torch.zeros(2)})
    old = cards.read_card(copied_card).sha256
    weights.write_bytes(other)
    copied_card.write_text(copied_card.read_text().replace(old, sha256_bytes(other)))
    with pytest.raises(ModelError, match=r"do not fit the architecture \(\d+ keys\)") as caught:
        segbench.load_model(str(copied_card))
    assert len(str(caught.value).splitlines()) == 12  # a head, the first ten, the likely cause


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'clean_convnext_mini_shapes'"):
        segbench.load_model("clean_convnext_mini_shape")
    with pytest.raises(UnknownNameError, match="Did you mean 'upernet_convnext'"):
        build("upernet_convnex", num_classes=2)
    with pytest.raises(ModelError, match=r"does not take these arguments.*blocks"):
        build("upernet_convnext", num_classes=2, blocks=3)
    with pytest.raises(ContentError, match="Cannot read the card"):
        segbench.load_model("nowhere/card.json")


def test_own_models_by_function_name(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Conv2d(3, 8, 1)\ndef nothing():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    subject = load_named("mine:net")
    assert (subject.id, subject.card) == ("net", None)
    assert load_named("mine:net").weights_sha256 != subject.weights_sha256  # it draws its weights
    known = load_named(subject.module).weights_sha256
    assert load_named(subject.module).weights_sha256 == known
    with torch.no_grad():
        subject.module.bias[0] += 1
    assert load_named(subject.module).weights_sha256 != known
    for spec, text in {
        "mine:nothing": "gave int",
        "mine:absent": "Cannot import",
        "absent:net": "Cannot import",
    }.items():
        with pytest.raises(ModelError, match=text):
            load_named(spec)


def test_the_auxiliary_head_is_for_training_only():
    model = build(
        "upernet_convnext", num_classes=3, depths=(1, 1, 1, 1), widths=(8, 8, 8, 8), channels=8, auxiliary_channels=8
    )
    assert isinstance(model, nn.Module)
    logits, auxiliary = model.eval().forward_with_auxiliary(torch.rand(2, 3, 40, 56))
    assert logits.shape == auxiliary.shape == (2, 3, 40, 56)
    assert torch.equal(model(torch.zeros(1, 3, 40, 56)), model.forward_with_auxiliary(torch.zeros(1, 3, 40, 56))[0])


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("net = 3", "is no function"),
        ("def net(num_classes): ...", r"net\(\) failed: TypeError: .*num_classes"),
        ("def net(): return None", "must return a torch.nn.Module; it gave NoneType"),
        ("raise KeyError('x')", "Cannot import"),
    ],
)
def test_own_functions_that_fail_are_named(tmp_path, monkeypatch, code, text):
    name = f"mine{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=text):
        load_named(f"{name}:net")


def test_what_a_state_dict_does_not_hold_is_part_of_the_identity():
    """Class, activation, settings and spec change the function of a model, not its state dict."""

    def digest(*layers):
        torch.manual_seed(0)
        return load_named(nn.Sequential(nn.Conv2d(3, 2, 1), *layers)).weights_sha256

    assert digest(nn.ReLU()) == digest(nn.ReLU())
    assert len({digest(nn.ReLU()), digest(nn.GELU()), digest(nn.LeakyReLU(0.1)), digest(nn.LeakyReLU(0.2))}) == 4
    statistics = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    changes = [{}, {"multiple": 2}, {"square": True}, {"bgr": True}, {"reduced_labels": True}]
    found = set()
    for change in changes:
        torch.manual_seed(0)
        module = ImageModel(nn.Conv2d(3, 2, 1), statistics, num_classes=2, **change)
        found.add(load_named(module).weights_sha256)
    assert len(found) == len(changes)

    class Addressed(nn.Module):
        def extra_repr(self):
            return repr(object())  # <object object at 0x...>, another one each time

    assert load_named(Addressed()).weights_sha256 == load_named(Addressed()).weights_sha256


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(2, 3, dtype=torch.int8), "is int8"),
        (torch.zeros(2, 3, dtype=torch.bool), "is bool"),
        (torch.zeros(2, 3, dtype=torch.complex64), "is complex64"),
        (torch.zeros(2, 3).to(torch.float8_e4m3fn), "is float8_e4m3fn"),
        (torch.full((2, 3), torch.nan), "has NaN"),
        (torch.full((2, 3), torch.inf), "has NaN or infinite"),
        (torch.zeros(2, 3).to_sparse(), "is sparse"),
        (torch.zeros(2, 3, device="meta"), "is sparse, quantised or without content"),
    ],
)
def test_weights_that_would_not_arrive_as_they_are_are_refused(value, said):
    model = nn.Linear(3, 2, bias=False)
    with pytest.raises(ModelError, match=f"weight {said}"):
        load_weights(model, {"weight": value}, source="x")
    load_weights(model, {"weight": torch.ones(2, 3, dtype=torch.bfloat16)}, source="x")
    assert model.weight.dtype == torch.float32


@pytest.mark.slow
def test_every_architecture_is_built_without_draws_whatever_is_in_memory():
    """A truncated normal is drawn again until it fits; values that nobody draws must not keep it going."""
    build_tiny = {
        "upernet_convnext": TINY_CONVNEXT,
        "segmenter_vit": {"width": 32, "depth": 2, "heads": 2, "decoder_depth": 1},
        "pspnet_resnet": {"depths": (1, 1, 1, 1), "width": 8, "channels": 8, "auxiliary_channels": 8},
        "upernet_timm": {"backbone": "test_convnext", "channels": 8, "auxiliary_channels": 8},
    }
    assert set(build_tiny) == set(ARCHITECTURES)
    for name, arguments in build_tiny.items():
        dirty = [torch.full((size,), 1e6) for size in (10, 100, 1000, 10**4, 10**5, 10**6) for _ in range(20)]
        del dirty
        with WithoutDraws():
            model = build(name, num_classes=3, **arguments)
        weights = [value for value in model.state_dict().values() if value.ndim > 1]
        assert all(bool((value == 0).all()) for value in weights if value.requires_grad)
        model.load_state_dict(build(name, num_classes=3, **arguments).state_dict())
        assert bool(torch.isfinite(model.eval()(torch.rand(1, 3, 64, 64))).all())


def test_devices_that_cannot_be_used_are_named():
    for device in ("gpu", "meta", 3.5):
        with pytest.raises(UsageError, match="cannot be used"):
            segbench.load_model("at_convnext_mini_shapes", device=device)
    assert next(segbench.load_model("at_convnext_mini_shapes", device="auto").parameters()).device.type in (
        "cpu",
        "cuda",
    )


def test_mps_is_refused_by_name_where_attacks_run(monkeypatch):
    """It has no float64, so an attack would die in its first step."""
    monkeypatch.setattr(devices, "choose_device", torch.device)  # as on a Mac, where it can be used
    for entrance in (process_device, segbench_check, choose_compute_device):
        with pytest.raises(UsageError, match=r"\(mps\) has no float64.*--device cpu"):
            entrance("mps")
    assert choose_compute_device("cpu") == torch.device("cpu")


def segbench_check(device):
    return segbench.check_model("at_convnext_mini_shapes", device=device)


def test_only_models_are_models():
    for wrong in (lambda x: x, cards.get_card("at_convnext_mini_shapes"), None):
        with pytest.raises(ModelError, match="A model is an id"):
            load_named(wrong)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (lambda: ImageModel(nn.Conv2d(3, 2, 1), NONE, num_classes=2), "segbench.models.adapters.wrap.ImageModel"),
        (lambda: build("upernet_convnext", num_classes=2, **TINY_CONVNEXT), "segbench.models.upernet.UPerNet"),
        (lambda: nn.Conv2d(3, 2, 1), "torch.nn.modules.conv.Conv2d"),
        (lambda: type("Net", (nn.Conv2d,), {"__module__": "image_model"})(3, 2, 1), "image_model.Net"),
    ],
)
def test_the_hash_of_a_model_survives_a_move_of_our_own_code(module, name):
    """Runs and entries know a model of a library by a hash; it is what it was before the folders were moved."""
    model = module()
    digest = hashlib.sha256(f"{name}\0{model!r}\0".encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"\0{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode() + value.contiguous().numpy().tobytes())
    assert load_named(model).weights_sha256 == digest.hexdigest()
