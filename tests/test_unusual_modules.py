"""Modules that keep to less than `torch.nn.Module` promises: each is evaluated, or refused with the fix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import segbench
from segbench import attacks
from segbench.engine.compute import batch_size
from segbench.engine.compute.worker import Worker
from segbench.engine.launch.ray import _pickled, _Setup
from segbench.errors import ModelError
from segbench.models.load import load
from segbench.models.sources.names import parse
from segbench.protocol import SEA_V1

pytestmark = pytest.mark.filterwarnings("ignore:.*(deprecated|beta state)")
CPU = torch.device("cpu")
K = 8  # classes of shapes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, K, 3, padding=1), nn.BatchNorm2d(K)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class TrainReturnsNothing(Net):
    """As people write it to freeze batch norm."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.norm.eval()


class EvalReturnsNothing(Net):
    def eval(self):
        super().eval()


class ToReturnsNothing(Net):
    def to(self, *arguments, **options):
        super().to(*arguments, **options)


class CannotBePrinted(Net):
    def extra_repr(self):
        return self.missing


class StateDictFails(Net):
    def state_dict(self, *arguments, **options):
        raise RuntimeError("not now")


class StateDictIsNothing(Net):
    def state_dict(self, *arguments, **options):
        return None


class SparseBuffer(Net):
    def __init__(self, layout: torch.layout = torch.sparse_coo) -> None:
        super().__init__()
        self.register_buffer("mixing", torch.eye(K).to_sparse(layout=layout))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        n, _, height, width = y.shape
        return (self.mixing @ y.transpose(0, 1).reshape(K, -1)).reshape(K, n, height, width).transpose(0, 1)


def exported() -> nn.Module:
    sizes = {0: torch.export.Dim("n", min=1, max=64), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    return torch.export.export(Net().eval(), (torch.rand(2, 3, 32, 32),), dynamic_shapes=(sizes,)).module()


class Normalised(nn.Module):
    """A user's wrapper around an exported network, beside a part that can be switched."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.network = nn.Dropout(0.5), exported()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.dropout(x))


WORKING = {
    "train returns nothing": TrainReturnsNothing,
    "eval returns nothing": EvalReturnsNothing,
    "to returns nothing": ToReturnsNothing,
    "cannot be printed": CannotBePrinted,
    "state_dict fails": StateDictFails,
    "state_dict is nothing": StateDictIsNothing,
    "sparse buffer": SparseBuffer,
    "compressed sparse buffer": lambda: SparseBuffer(torch.sparse_csr),
    "exported": exported,
    "exported, wrapped": Normalised,
    "frozen TorchScript": lambda: torch.jit.freeze(torch.jit.trace(Net().eval(), torch.rand(2, 3, 64, 64))),
    "DataParallel": lambda: nn.DataParallel(Net()),
}


def meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Net()


class CannotBeSwitched(Net):
    def train(self, mode: bool = True):
        raise RuntimeError("for deployment only")


class CannotBeMoved(Net):
    def to(self, *arguments, **options):
        raise ValueError("a model with device_map cannot be moved")


UNATTACKABLE = {
    "lazy": (lambda: nn.LazyConv2d(K, 1), r"weight of the model has no shape yet.*call it once"),
    "meta": (meta, r"conv.weight of the model is on the meta device.*to_empty"),
    "inference mode": (made_in_inference_mode, r"inference_mode\(\).*outside of it"),
    "a class": (lambda: Net, r"the class Net. Pass an instance: Net\(\.\.\.\)"),
    "a function": (lambda: abs, r"the function abs. Wrap it"),
    "a state dict": (lambda: Net().state_dict(), r"weights without a model.*load_state_dict"),
    "an exported program": (
        lambda: torch.export.export(nn.Conv2d(3, K, 1), (torch.rand(1, 3, 8, 8),)),
        r"an ExportedProgram. Pass its module: program.module\(\)",
    ),
}
UNUSABLE = UNATTACKABLE | {
    "cannot be switched": (CannotBeSwitched, r"eval mode: RuntimeError: for deployment only. Correct its train\(\)"),
    "cannot be moved": (CannotBeMoved, "moved to cpu: ValueError: a model with device_map.*without device_map"),
}


@pytest.fixture(scope="module")
def data():
    return segbench.load_dataset("shapes").first(2)


def scores(model: nn.Module, data, folder):
    options = {"eps": 4, "iterations": 3, "progress": False, "device": "cpu"}
    return segbench.evaluate(model, data, out=folder / "run", **options).table()


@pytest.fixture(scope="module")
def usual(data, tmp_path_factory):
    return scores(Net(), data, tmp_path_factory.mktemp("usual"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WORKING if name != "exported, wrapped"])
def test_modules_that_keep_to_less_are_evaluated_like_others(name, data, usual, tmp_path):
    assert scores(WORKING[name](), data, tmp_path).equals(usual)


@pytest.mark.parametrize("name", WORKING)
def test_they_are_checked_too_and_put_in_eval_mode(name, data):
    model = WORKING[name]()
    found = {finding.name: finding for finding in segbench.check_model(model, data, progress=False, device="cpu")}
    assert found["deterministic"].level == "ok"
    assert found["gradient"].level == "ok"
    switched = {"exported": 0, "frozen TorchScript": 0}
    assert found["eval_mode"].value == switched.get(name, 1)


@pytest.mark.parametrize("name", UNUSABLE)
def test_modules_that_cannot_be_used_are_refused_with_the_fix(name, data):
    make, said = UNUSABLE[name]
    with pytest.raises(ModelError, match=said):
        segbench.evaluate(make(), data, eps=4, progress=False, device="cpu")
    with pytest.raises(ModelError, match=said):
        segbench.check_model(make(), data, progress=False, device="cpu")


def test_a_model_that_is_refused_is_left_as_it_was(data):
    model = nn.Sequential(nn.Conv2d(3, K, 1), CannotBeSwitched())
    with pytest.raises(ModelError):
        segbench.check_model(model, data, progress=False, device="cpu")
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("name", UNATTACKABLE)
def test_the_attacks_refuse_them_too(name):
    make, said = UNATTACKABLE[name]
    images, labels = torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)
    with pytest.raises(ModelError, match=said):
        attacks.apgd(make(), images, labels, eps=0.1, loss="ce", iterations=1)


def test_the_attacks_name_what_is_no_logits():
    images, labels = torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)

    class Named(Net):
        def forward(self, x: Tensor):
            return {"out": super().forward(x)}

    for model, said in ((Named(), "returns dict, not a tensor of logits"), (nn.Conv2d(3, K, 3), r"\(1, 8, 6, 6\)")):
        with pytest.raises(ModelError, match=said):
            attacks.pgd(model, images, labels, eps=0.1, loss="ce", iterations=1, step_size=0.1)


def test_functions_that_return_them_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Conv2d):\n    def train(self, mode=True):\n"
        "        super().train(mode)\n    def to(self, *arguments):\n        super().to(*arguments)\n"
        "def build():\n    return Net(3, 8, 1)\ndef lazy():\n    return nn.LazyConv2d(8, 1)\n"
        "def kind():\n    return Net\n"
    )
    assert not segbench.load_model("./own.py:build").training
    with pytest.raises(ModelError, match="has no shape yet"):
        segbench.load_model("./own.py:lazy")
    with pytest.raises(ModelError, match=r"it gave the class Net. Pass an instance"):
        segbench.load_model("./own.py:kind")


def test_the_callers_inference_mode_hides_no_gradient(data):
    model = Net()
    with torch.inference_mode():
        found = segbench.check_model(model, data, progress=False, device="cpu")
    assert {finding.name: finding.level for finding in found}["gradient"] == "ok"


def test_what_state_dicts_leave_out_is_part_of_the_identity():
    class OnlyAdapter(Net):
        def state_dict(self, *arguments, **options):
            return {"adapter": torch.zeros(1)}

    def identity(model: nn.Module) -> str:
        return load(parse(model)).weights_sha256

    one, other = OnlyAdapter(), OnlyAdapter()
    assert identity(one) == identity(other)
    with torch.no_grad():
        other.conv.bias.add_(1)
    assert identity(one) != identity(other)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_numbers_and_places_are_part_of_the_identity(layout):
    def identity(matrix: Tensor) -> str:
        model = Net()
        model.register_buffer("mixing", matrix.to_sparse(layout=layout))
        return load(parse(model)).weights_sha256

    assert len({identity(torch.eye(K)), identity(2 * torch.eye(K)), identity(torch.eye(K).flip(0))}) == 3
    assert identity(torch.eye(K)) == identity(torch.eye(K))


def test_extra_state_without_a_printed_form_that_lasts():
    class Holding(Net):
        def get_extra_state(self):
            return object()

    assert load(parse(Holding())).weights_sha256 == load(parse(Holding())).weights_sha256


def test_the_batch_size_of_a_model_that_cannot_be_printed_is_remembered(data, monkeypatch):
    monkeypatch.setattr(batch_size, "fits", lambda worker, size: size <= 6)
    model = CannotBePrinted()
    worker = Worker(model, data, SEA_V1, CPU)
    assert batch_size.find_batch_size(worker) == 6
    monkeypatch.setattr(batch_size, "fits", None)
    assert batch_size.find_batch_size(worker) == 6


@pytest.mark.slow
def test_a_model_that_ray_cannot_send_is_named(data):
    cloudpickle = pytest.importorskip("ray").cloudpickle
    worker = Worker(torch.jit.trace(Net().eval(), torch.rand(2, 3, 64, 64)), data, SEA_V1, CPU)
    with pytest.raises(ModelError, match=r"cannot be sent to the actors of Ray.*--engine local"):
        _pickled(cloudpickle, _Setup(worker, "cpu", 1))
