"""Checkpoints as people save them: which weights are taken, which are named, and what is no checkpoint at all."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from torch import Tensor

import segbench
from segbench.downloads import checks
from segbench.errors import DownloadError, ModelError, UnknownNameError
from segbench.models.architectures import build
from segbench.models.backbones import load_backbone
from segbench.models.checkpoints import PREFIXES, fit_keys, unwrap
from segbench.models.sources.names import parse
from segbench.models.weights import read_weights

CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)))

def net():
    return Net()

def with_key(key):
    assert key == "a_key_of_ours"
    return Net()
"""


def state(value: float) -> dict[str, Tensor]:
    shapes = {"weight": (4, 3, 3, 3), "bias": (4,)}
    norm = {f"norm.{name}": torch.full((4,), value) for name in ("weight", "bias", "running_mean", "running_var")}
    conv = {f"conv.{name}": torch.full(shape, value) for name, shape in shapes.items()}
    last = {"last.weight": torch.full((8, 4, 1, 1), value), "last.bias": torch.full((8,), value)}
    return {**conv, **norm, "norm.num_batches_tracked": torch.tensor(1), **last}


def below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


RAW, EMA = state(1.0), state(2.0)
OPTIMISER = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
LOSS = {"loss.weight": torch.ones(3), "criterion.class_weights": torch.ones(8)}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A file with this content, loaded into the network: the value that its weights have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(CODE)

    def load(content, options: str = "") -> float:
        torch.save(content, tmp_path / "best.pt")
        return float(segbench.load_model(f"./own.py:net?weights=best.pt{options}").conv.bias[0].detach())

    return load


WHERE = [  # content, options, value: 1 is raw, 2 averaged
    ({"model": RAW, "model_ema": EMA, "optimizer": OPTIMISER, "epoch": 3}, "", 1),
    ({"model_ema": EMA, "model": RAW}, "", 1),
    ({"model": RAW, "model_ema": EMA}, "&key=model_ema", 2),
    ({"state_dict": RAW, "state_dict_ema": EMA}, "", 1),
    ({"state_dict": RAW, "state_dict_ema": EMA}, "&key=state_dict_ema", 2),
    ({"student": RAW, "teacher": EMA}, "", 1),
    ({"params": RAW, "params_ema": EMA}, "&key=params_ema", 2),
    *[({name: RAW, "optimizer": OPTIMISER, "epoch": 3}, "", 1) for name in ("net", "network", "weights", "params")],
    *[({name: EMA, "epoch": 3, "rng": {"cpu": torch.ones(1)}}, "", 2) for name in ("ema", "teacher", "module", "any")],
    ({"state_dict": {"model": RAW}}, "", 1),
    ({"model": {"state_dict": RAW, "iteration": 7}}, "", 1),
    ({"checkpoint": {"model": {"state_dict": below("module.", RAW)}}}, "", 1),
    ({"checkpoint": {"model": RAW, "ema": EMA}}, "&key=checkpoint.ema", 2),
    ({"checkpoint": {"model": RAW, "ema": EMA}}, "&key=ema", 2),
    ({"model": RAW, "ema": {"state_dict": below("module.", EMA), "decay": 0.9}}, "&key=ema", 2),
    ({"state_dict": {**below("model.", RAW), **LOSS}}, "", 1),
    ({"n_averaged": torch.tensor(3), **below("module.", EMA)}, "", 2),
    ({"state_dict": {**below("model_ema.", EMA), **below("model.", RAW), **LOSS}}, "", 1),
    ({"state_dict": {**below("model.", RAW), **below("model_ema.", EMA), **LOSS}}, "&key=model_ema", 2),
    (below("segmentor.net.module.", RAW), "", 1),
]


@pytest.mark.parametrize("number", range(len(WHERE)))
def test_the_weights_of_a_checkpoint_are_found(number, load):
    content, options, value = WHERE[number]
    assert load(content, options) == value


def test_what_was_taken_is_said_where_there_is_a_choice(load, caplog):
    caplog.set_level(logging.WARNING, "segbench")
    load({"model": RAW, "optimizer": OPTIMISER})
    assert not caplog.records
    load({"model": RAW, "model_ema": EMA})
    assert "under 'model', 'model_ema'. Those of 'model' are taken (others: &key=model_ema" in caplog.text
    caplog.clear()
    load({"state_dict": {**below("model.", RAW), **below("ema.", EMA), "loss.weight": torch.ones(3)}})
    assert "under 'model' are taken; 10 other entries" in caplog.text
    assert "(Those under 'ema.': &key=ema in a spec.)" in caplog.text
    caplog.clear()
    load({"model": RAW, "model_ema": EMA}, "&key=model_ema")
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ({"state_dict": RAW, "state_dict_ema": EMA}, "&key=ema_state", "Known: state_dict, state_dict_ema"),
        (RAW, "&key=model", "Unknown entry of the checkpoint: 'model'"),
        ({"first": RAW, "second": EMA}, "", r"under 'first', 'second'. Say which ones: add &key=first"),
        ({"swa": RAW, "ema": EMA}, "", r"under 'swa', 'ema'. Say which ones"),
        (
            {"model": RAW, "ema": {"shadow_params": [torch.ones(3)]}},
            "&key=ema",
            "'shadow_params' is list, not a tensor",
        ),
        ({**RAW, "epoch": 3}, "", "'epoch' is int, not a tensor"),
        ({**RAW, **LOSS}, "", "surplus loss.weight"),
        ({"log": [1, 2]}, "", "'log' is list, not a tensor"),
    ],
)
def test_what_cannot_be_chosen_is_named(content, options, said, load):
    with pytest.raises((ModelError, UnknownNameError), match=said):
        load(content, options)


def test_a_function_with_that_parameter_gets_the_key(load):
    load(RAW)
    assert segbench.load_model("./own.py:with_key?weights=best.pt&key=a_key_of_ours").conv.bias[0] == 1
    assert segbench.load_model("./own.py:with_key?key=a_key_of_ours")


def test_the_key_is_part_of_the_models_name():
    source = parse("./own.py:net?weights=best.pt&key=model_ema")
    assert source.public_name == "./own.py:net?weights=best.pt&key=model_ema"
    assert source.id == "own_net_weights_best_key_model_ema"


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["torchvision:lraspp_mobilenet_v3_large?num_classes=3", "timm:resnet10t?num_classes=3"]
)
def test_models_of_libraries_take_a_key(spec, tmp_path):
    if spec.startswith("timm"):
        weights = segbench.load_model(spec).state_dict()
    else:
        weights = segbench.load_model(spec.replace("?", "@none?")).network.network.state_dict()
    averaged = {key: value * 0 + 0.5 if value.is_floating_point() else value for key, value in weights.items()}
    torch.save({"model": weights, "ema": averaged}, tmp_path / "best.pt")
    loaded = segbench.load_model(f"{spec}&weights={tmp_path / 'best.pt'}&key=ema")
    assert all(bool((parameter == 0.5).all()) for parameter in loaded.parameters())
    with pytest.raises(ModelError, match=r"key=ema names an entry of a weights file. Add weights=<path>"):
        segbench.load_model(f"{spec}&key=ema")


@pytest.mark.slow
def test_released_layouts_and_backbones_beside_other_entries():
    small = {"depths": [1, 1, 1, 1], "width": 8, "channels": 8, "auxiliary_channels": 8}
    model, other = (build("pspnet_resnet", num_classes=3, **small) for _ in range(2))
    checkpoint = {"state_dict": {**below("model.", model.state_dict()), "loss.weight": torch.ones(3)}}
    found = segbench.models.normalise_keys("pspnet_resnet", checkpoint, model.state_dict().keys())
    assert found.keys() == model.state_dict().keys()
    classifier = {
        key.removeprefix("backbone."): v for key, v in model.state_dict().items() if key.startswith("backbone.")
    }
    report = load_backbone(other, {**below("net.", classifier), "loss.weight": torch.ones(3)}, source="a file")
    assert torch.equal(other.backbone.stem[0].weight, model.backbone.stem[0].weight)
    assert report.unknown == ("loss.weight",)


# What is no checkpoint

PAGE = b"<!DOCTYPE html><html><title>Sign in to Drive</title>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (PAGE, "a web page, not weights: 'Sign in to Drive'.*download button"),
        (POINTER, "a pointer of git-lfs, not the weights themselves.*git lfs pull"),
        (b'{"error": "quota exceeded"}', 'text, not weights: \'{"error"'),
        (b"", "empty"),
    ],
)
def test_files_that_are_no_weights_are_named_as_what_they_are(content, said, tmp_path):
    path = tmp_path / "best.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=said):
        read_weights(path)
    with pytest.raises(DownloadError, match=said):
        checks.Expected(None).check(path)


@pytest.mark.slow
def test_a_clone_without_git_lfs_is_named(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "segformer", "num_labels": 3}')
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ModelError, match=r"a pointer of git-lfs.*git lfs pull"):
        segbench.load_model(f"hf:{tmp_path}")


def shared(levels: int, width: int = 10) -> list:
    """Lists of the same list: width**levels nodes in a few hundred bytes."""
    value: list = [1]
    for _ in range(levels):
        value = [value] * width
    return value


def itself() -> dict:
    mapping: dict = {"state_dict": RAW}
    mapping["state_dict_before"] = mapping
    mapping["log"] = [mapping]
    return mapping


def fan(levels: int, width: int = 1000) -> dict:
    value: dict = {str(number): 1 for number in range(width)}
    for _ in range(levels):
        value = dict.fromkeys(map(str, range(width)), value)
    return value


@pytest.mark.parametrize(
    ("make", "fits"),
    [
        (itself, True),
        (lambda: {"model": RAW, "log": shared(12)}, True),
        (lambda: {"log": shared(12)}, False),
        (lambda: {"model": RAW, "history": fan(5)}, True),
        (lambda: fan(5), False),
    ],
)
def test_mappings_that_hold_each_other_end_at_once(make, fits, load):
    content, started = make(), time.monotonic()
    if fits:
        assert load(content) == 1
    else:
        with pytest.raises(ModelError, match="not a tensor"):
            load(content)
    assert time.monotonic() - started < 5


def test_deep_checkpoints_end_at_once():
    deep: dict = {"state_dict": RAW}
    for _ in range(100_000):
        deep = {"state_dict": deep}
    with pytest.raises(ModelError, match="not a tensor"):
        unwrap(deep)


def test_many_prefixes_end_at_once():
    names = {f"p{number}.a.b.c.d.weight": torch.ones(1) for number in range(20_000)}
    started = time.monotonic()
    fit_keys(names, ["weight"], PREFIXES)
    assert time.monotonic() - started < 5


def test_repeated_numbers_are_found_at_any_depth(tmp_path):
    torch.save({"a": [{"b": (torch.zeros(1).expand(1 << 30, 3),)}]}, tmp_path / "small.pt")
    with pytest.raises(ModelError, match="repeated numbers: refused"):
        read_weights(tmp_path / "small.pt")


def test_a_prefix_as_key_takes_raw_weights_before_averaged_ones(caplog):
    """Whichever comes first in the file."""
    raw, ema = below("model.", RAW), below("model.", EMA)
    for checkpoint in ({"state_dict_ema": ema, "state_dict": raw}, {"state_dict": raw, "state_dict_ema": ema}):
        caplog.clear()
        assert float(unwrap(checkpoint, "model")["conv.bias"][0]) == 1
        assert "&key=state_dict_ema.model" in caplog.text


@pytest.mark.parametrize(
    "checkpoint", [{"model": {"ema": EMA, "raw": RAW}}, {"teacher": EMA, "anything": RAW}, {"a_ema": EMA, "b": RAW}]
)
def test_averaged_weights_are_known_by_their_names_alone(checkpoint):
    assert float(unwrap(checkpoint, None)["conv.bias"][0]) == 1


def test_averaged_weights_beside_the_raw_ones_in_one_mapping(load, caplog):
    assert load(RAW | below("model_ema.", EMA)) == 1
    assert "&key=model_ema" in caplog.text
    assert load(RAW | below("model_ema.", EMA), "&key=model_ema") == 2


def test_the_key_that_a_warning_names_is_found(caplog):
    checkpoint = {"model": below("backbone.", RAW), "model_ema": below("backbone.", EMA)}
    assert float(unwrap(checkpoint, "backbone")["conv.bias"][0]) == 1
    assert "&key=model_ema.backbone" in caplog.text
    assert float(unwrap(checkpoint, "model_ema.backbone")["conv.bias"][0]) == 2
