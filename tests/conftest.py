"""Shared fixtures. Several workers share the cores, so each computes with one thread."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segbench.cli import main
from segbench.engine.evaluate import Result
from segbench.engine.launch import prepare
from segbench.engine.rundir import store
from segbench.entries import placement
from tests.runs import run

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What a test leaves behind must not change the rounding of the next one."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests download or count is not remembered on the machine."""
    os.environ["SEGBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests make entries of data sets of their own, which are held to each other instead of the known labels."""
    monkeypatch.setattr(placement, "LABELS", {})


@pytest.fixture
def whole_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run the checks, too, which they otherwise leave out (`rundir.plan.is_trial`)."""
    for module in (prepare, store):
        monkeypatch.setattr(module, "is_trial", lambda *_, **__: False)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """The arrays of one golden file by name."""

    def read(name: str) -> dict[str, Any]:
        with np.load(GOLDEN / f"{name}.npz") as archive:
            return dict(archive)

    return read


@pytest.fixture(scope="session")
def golden_network(golden: Callable[[str], dict[str, Any]]) -> nn.Module:
    """The network of the golden attack vectors, float64, eval mode."""
    network = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 7, 1),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
    )
    inputs = golden("apgd_inputs")
    state = {
        key.removeprefix("param_"): torch.from_numpy(value) for key, value in inputs.items() if key.startswith("param_")
    }
    network.load_state_dict(state)
    return network.double().eval()


@pytest.fixture(scope="session")
def golden_batch(golden: Callable[[str], dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and class weights of the golden attack vectors, float64."""
    inputs = golden("apgd_inputs")
    x, weights = (torch.from_numpy(inputs[name]).double() for name in ("x", "class_weights"))
    return x, torch.from_numpy(inputs["y"]).long(), weights


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in an empty folder, with an empty cache: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGBENCH_CACHE", str(tmp_path / "cache"))

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(args)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        code = caught.value.code
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return run


def recipe_weights(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The weight recipe of tests/golden/README.md."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.long)
            continue
        r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("running_var"):
            r = 0.5 + np.abs(r)
        elif name.endswith("running_mean"):
            r = 0.1 * r
        elif r.ndim == 1 and name.endswith("weight"):
            r = 1 + 0.1 * r
        elif name.endswith("gamma"):
            r = 0.5 + 0.1 * r
        elif r.ndim == 1:
            r = 0.1 * r
        else:
            r = r / np.sqrt(np.prod(shape[1:]))
        state[name] = torch.from_numpy(np.asarray(r))
    return state


def released_layout(name: str) -> dict[str, list[int]]:
    """State-dict names and shapes of a released architecture."""
    layout: dict[str, list[int]] = json.loads((GOLDEN / "architectures" / f"{name}.json").read_text())["state_dict"]
    return layout


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """An undisturbed short run, which others are held to."""
    return run(tmp_path_factory.mktemp("reference") / "run")
