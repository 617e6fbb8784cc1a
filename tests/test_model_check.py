"""`check-model`: each mistake that people make with a model is found, and a model without one passes."""

from __future__ import annotations

import json
import re

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import segbench
from segbench.cli import main
from segbench.engine.model_check import VARIANTS, check_model
from segbench.errors import DataError, ModelError, UnknownNameError, UsageError
from segbench.files import sha256_file

MODEL = "at_convnext_mini_shapes"
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Fed(nn.Module):
    """The shipped model, fed with changed images."""

    def __init__(self, change) -> None:
        super().__init__()
        self.model = segbench.load_model(MODEL)
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.change(images))


def levels(model, **options):
    options = {"dataset": "shapes", "images": 8, "progress": False, "device": "cpu"} | options
    return {finding.name: finding for finding in check_model(model, **options)}


def test_a_good_model_passes_and_agrees_with_its_card():
    found = levels(MODEL, dataset=None, images=20)
    assert {finding.level for finding in found.values()} == {"ok"}
    expected = segbench.get_card(MODEL).expected
    assert found["clean_score"].value == pytest.approx(expected["aacc"], abs=0.05)
    said = re.match(r"Clean aAcc ([\d.]+), mIoU ([\d.]+) on 20 images", found["clean_score"].message)
    assert [float(number) for number in said.groups()] == [
        pytest.approx(100 * expected[name], abs=7) for name in ("aacc", "miou")
    ]
    assert found["gradient"].value == pytest.approx(1, abs=0.05)
    assert 0 < found["speed"].value < 10
    assert "32 images" in found["speed"].message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x * STD + MEAN, "normalisation is missing"),
        (lambda x: (x - MEAN) / STD, "normalises twice"),
        (lambda x: x / 255, r"trained on \[0,255\]"),
        (lambda x: (x + 1) / 2, r"trained on \[-1,1\]"),
        (lambda x: 2 * x - 1, r"scales to \[-1,1\], but was trained on \[0,1\]"),
        (lambda x: x.flip(1), "trained on BGR"),
    ],
)
def test_wrong_ways_to_feed_a_model_are_recognised(change, said):
    finding = levels(Fed(change))["input_scaling"]
    assert finding.level == "fail"
    assert re.search(said, finding.message)


def test_each_way_is_undone_by_another():
    image = torch.rand(2, 3, 4, 5)
    names = list(VARIANTS)
    there, back = VARIANTS[names[0]][0], VARIANTS[names[1]][0]
    torch.testing.assert_close(back(there(image)), image)
    torch.testing.assert_close(there(image), (image - MEAN) / STD)


def test_a_score_far_below_the_card_is_told(tmp_path):
    card = segbench.get_card(MODEL)
    weights = {key: value.contiguous() for key, value in segbench.load_model(MODEL).state_dict().items()}
    weights["head.classifier.weight"] = weights["head.classifier.weight"].flip(0)
    safetensors.torch.save_file(weights, tmp_path / f"{MODEL}.safetensors")
    path = tmp_path / f"{MODEL}.json"
    path.write_text(card.to_json().replace(card.sha256, sha256_file(tmp_path / f"{MODEL}.safetensors")))
    finding = levels(str(path), dataset=None)["clean_score"]
    assert finding.level == "fail"
    expected = segbench.get_card(MODEL).expected
    assert f"the card says aAcc {100 * expected['aacc']:.1f}" in finding.message
    assert f"the card says mIoU {100 * expected['miou']:.1f}" in finding.message


@pytest.mark.slow
def test_gradients_that_mislead_are_told():
    quantised = Fed(lambda x: (torch.round(x * 32) / 32).detach() + x - x.detach())
    assert levels(quantised)["gradient"].level == "warning"
    nothing = Fed(lambda x: x * 0 + 0.5)
    assert levels(nothing)["gradient"].level == "fail"
    with pytest.raises(ModelError, match="no gradient"):
        levels(Fed(lambda x: x.detach()))


def test_models_that_mix_images_or_break_on_black_are_told():
    with pytest.raises(ModelError, match="mixes the images of a batch"):
        levels(Fed(lambda x: x - 0.1 * x.mean(0, keepdim=True)))
    assert levels(Fed(lambda x: x / x.amax(dim=(1, 2, 3), keepdim=True)))["black_and_white"].level == "fail"
    loud = levels(nn.Sequential(nn.Conv2d(3, 8, 1), Times(1e6)))["logit_range"]
    assert (loud.level, loud.value > 1000) == ("warning", True)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def test_training_mode_is_noted_and_given_back():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    assert levels(model)["eval_mode"].level == "note"
    assert model.training


def test_without_data_noise_has_to_do():
    found = levels(nn.Conv2d(3, 5, 1), dataset=None, size=40)
    assert found["clean_score"].level == "note"
    assert "40x40" in found["speed"].message
    assert "input_scaling" not in found


def test_what_was_asked_for_and_is_not_there_is_an_error():
    with pytest.raises(DataError):
        levels(nn.Conv2d(3, 11, 1), dataset="camvid", data_root="nowhere")
    with pytest.raises(UnknownNameError):
        levels(MODEL, dataset="shape")
    with pytest.raises(UsageError, match="at least 1"):
        levels(MODEL, images=0)
    with pytest.raises(ModelError, match="has 5 classes, the data set 8"):
        levels(nn.Conv2d(3, 5, 1))
    with pytest.raises(ModelError, match="fails on a batch"):
        levels(nn.Conv2d(4, 5, 1), dataset=None)


@pytest.mark.slow
def test_the_command_ends_with_1_if_something_is_wrong(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\nimport segbench\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n"
        f"        super().__init__()\n        self.m = segbench.load_model('{MODEL}')\n"
        "    def forward(self, x):\n        return self.m(x.flip(1))\n\ndef build():\n    return Net()\n"
    )

    def run(*args):
        with pytest.raises(SystemExit) as caught:
            main(["check-model", *args, "--quiet", "--images", "6", "--device", "cpu"])
        return caught.value.code, *capsys.readouterr()

    code, out, err = run(MODEL)
    assert (code, "can be evaluated" in err, "input_scaling" in out) == (0, True, True)
    code, out, err = run("./own.py:build", "--dataset", "shapes")
    assert (code, "not ready to be evaluated: input_scaling" in err) == (1, True)
    code, out, err = run("./own.py:build", "--dataset", "shapes", "--json")
    assert {finding["name"]: finding["level"] for finding in json.loads(out)}["input_scaling"] == "fail"
