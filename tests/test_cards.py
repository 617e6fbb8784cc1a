"""Cards come from strangers: whatever they ask for, building a model ends with a ModelError or a model."""

from __future__ import annotations

import time

import pytest
import torch

from segbench.errors import ModelError, UnknownNameError
from segbench.models.architectures import ARCHITECTURES, Architecture, build, build_described

NAME = "upernet_convnext"
TINY = {"depths": [1, 1, 1, 1], "widths": [8, 8, 8, 8], "channels": 8, "auxiliary_channels": 8}


def described(changes, **options):
    return build_described({"name": NAME, "arguments": {**TINY, **changes}}, num_classes=3, **options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_classes": 3}, "'num_classes' is a field of the card"),
        ({"name": "x"}, "'name' is a field of the card"),
        ({"blocks": 3}, "does not take these arguments: .*blocks"),
        ({"widths": [8, 8, 8, -8]}, "widths must be positive whole numbers"),
        ({"widths": [8, 8, 8, 8.5]}, "widths must be positive whole numbers"),
        ({"widths": [1, 8, 8, 8]}, "widths.0. of 2"),
        ({"widths": "8888"}, "widths must be positive whole numbers"),
        ({"widths": 8}, "does not take these arguments"),
        ({"depths": [1, 1]}, "four numbers"),
        ({"depths": [1, 1, 1, 10**9]}, "more than 1000"),
        ({"depths": [True, 1, 1, 1]}, "depths must be positive"),
        ({"channels": "8"}, "channels must be positive"),
        ({"channels": None}, "channels must be positive"),
        ({"channels": 10**5}, "at most 2000000000"),
        ({"channels": 10**9}, "does not take these arguments"),
        ({"auxiliary_channels": 0}, "auxiliary_channels must be positive"),
        ({"drop_path_rate": "0.1"}, "does not take these arguments"),
        ({"drop_path_rate": -1}, "drop_path_rate must be in"),
    ],
)
def test_arguments_that_build_no_model_are_refused_at_once(changes, said):
    started = time.monotonic()
    with pytest.raises(ModelError, match=said) as caught:
        described(changes)
    assert "`architecture.arguments`" in str(caught.value)
    assert time.monotonic() - started < 5  # nothing of that size was allocated


def test_a_card_with_another_number_of_parameters_is_refused():
    number = sum(parameter.numel() for parameter in described({}).parameters())
    described({}, parameters=number)
    with pytest.raises(ModelError, match=f"would have {number} parameters, the card says 7"):
        described({}, parameters=7)


def test_unknown_architectures_are_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'upernet_convnext'"):
        build_described({"name": "upernet_convnex", "arguments": {}}, num_classes=2)


def test_too_little_memory_is_said(monkeypatch):
    def needy(*, num_classes):
        if torch.empty(0).device.type != "meta":
            raise RuntimeError("can't allocate memory")
        return torch.nn.Conv2d(3, num_classes, 1)

    monkeypatch.setattr("segbench.models.architectures.ARCHITECTURES", {"needy": Architecture(needy)})
    with pytest.raises(ModelError, match="no memory for the 8 parameters of 'needy'"):
        build("needy", num_classes=2)


def test_counting_first_changes_no_weight():
    torch.manual_seed(0)
    ours = described({"drop_path_rate": 0.1})
    torch.manual_seed(0)
    direct = ARCHITECTURES[NAME].build(num_classes=3, **TINY, drop_path_rate=0.1)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), direct.state_dict().values(), strict=True))
    assert all(value.device.type == "cpu" for value in ours.state_dict().values())
