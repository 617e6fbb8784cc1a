"""Float32 is exact in a session, and torch's switches are left as they were, whatever state they were in."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import backends, nn

from segbench.engine.compute.precision import PRECISIONS, get_precision
from segbench.engine.compute.session import open_session
from segbench.models.float32 import HAS_NEW, exact_float32, tf32

pytestmark = pytest.mark.filterwarnings("ignore:Please use the new API settings", "ignore:TF32 acceleration")
new_switches = pytest.mark.skipif(not HAS_NEW, reason="torch before 2.9 has only the old switches")

ROOT = Path(__file__).resolve().parents[1]
HOLDERS = (
    {
        "all": backends,
        "cudnn": backends.cudnn,
        "cuda.matmul": backends.cuda.matmul,
        "cudnn.conv": backends.cudnn.conv,
        "cudnn.rnn": backends.cudnn.rnn,
        "mkldnn.matmul": backends.mkldnn.matmul,
        "mkldnn.conv": backends.mkldnn.conv,
        "mkldnn.rnn": backends.mkldnn.rnn,
    }
    if HAS_NEW
    else {}
)
OLD: dict[str, tuple[Callable[[], object], Callable[[object], None], tuple[object, ...]]] = {
    "matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        ("highest", "high", "medium"),
    ),
    "matmul.allow_tf32": (
        lambda: backends.cuda.matmul.allow_tf32,
        lambda value: setattr(backends.cuda.matmul, "allow_tf32", value),
        (False, True),
    ),
    "cudnn.allow_tf32": (
        lambda: backends.cudnn.allow_tf32,
        lambda value: setattr(backends.cudnn, "allow_tf32", value),
        (False, True),
    ),
}
CHANGES = [(name, value) for name, (_, _, values) in OLD.items() for value in values]
CHANGES += [(name, value) for name in [*HOLDERS, "mkldnn"] for value in ("none", "ieee", "tf32") if HAS_NEW]
changes = st.lists(st.sampled_from(CHANGES), max_size=6)


def apply(wanted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in wanted:
            if name in OLD:
                OLD[name][1](value)
            elif name == "mkldnn":
                backends.mkldnn.set_flags(_fp32_precision=value)
            else:
                HOLDERS[name].fp32_precision = value


def state():
    """What a user reads of each switch; of one that torch refuses to read, that."""
    seen = {name: holder.fp32_precision for name, holder in HOLDERS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (read, _, _) in OLD.items():
            try:
                seen[name] = read()
            except RuntimeError:
                seen[name] = "refused"
    return seen


@pytest.fixture(autouse=True)
def _as_torch_begins():
    with exact_float32():
        yield


def reset():
    apply([("matmul precision", "highest"), ("cudnn.allow_tf32", False)])
    apply([(name, "none") for name in [*HOLDERS, "mkldnn"] if HAS_NEW])


@given(changes, changes)
def test_all_switches_are_exact_within_and_left_as_they_were(before, after):
    reset()
    apply(before)
    untouched = state()
    apply(after)
    untouched_later = state()

    reset()
    apply(before)
    with exact_float32():
        assert set(state().values()) == {"ieee", False, "highest"} if HAS_NEW else {False, "highest"}
        with backends.cudnn.flags(enabled=True), backends.mkldnn.flags(enabled=True):
            pass  # users' models do this, and torch reads the old switches there
        assert not {"tf32", "bf16", True, "refused"} & set(state().values())
    assert state() == untouched
    apply(after)  # what inherits from another switch still does
    assert state() == untouched_later


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [[], [("matmul precision", "high")], [("cudnn", "ieee")], [("all", "tf32")]], ids=str
)
def test_a_new_process_is_left_as_torch_begins(changes):
    """As torch begins its switches are in a state that none of them sets again."""
    if changes and not HAS_NEW:
        pytest.skip("torch before 2.9 has only the old switches")
    code = (
        "import sys, json; from tests.test_float32 import apply, state; from segbench.models.float32 import *\n"
        "apply(json.loads(sys.argv[1])); before = state()\n"
        "for _ in range(2):\n"
        "    with exact_float32(): assert not {'tf32', True, 'refused'} & set(state().values()), state()\n"
        "    assert state() == before, (before, state())\n"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(changes)], check=True, cwd=ROOT)


@new_switches
def test_a_model_that_sets_the_flags_of_cudnn_runs_in_a_session():
    class Flags(nn.Module):
        def forward(self, images):
            with backends.cudnn.flags(enabled=False):
                return images * 2

    reset()
    apply([("matmul precision", "high")])
    with open_session([Flags()], torch.device("cpu")):
        assert Flags()(torch.ones(1)) == 2
        assert backends.cudnn.allow_tf32 is False
        assert backends.cuda.matmul.allow_tf32 is False
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tf32_is_on_in_its_passes_only(precision):
    with open_session([], torch.device("cpu")):
        with get_precision(precision).setting():
            inside = state()
        assert "tf32" not in state().values()
        assert backends.cudnn.allow_tf32 is False
    assert inside["cudnn.allow_tf32"] is inside["matmul.allow_tf32"] is (precision == "tf32")


def test_exact_and_tf32_can_be_nested():
    with tf32():
        on = state()
        with exact_float32():
            assert state()["cudnn.allow_tf32"] is False
        assert state() == on
        assert on["cudnn.allow_tf32"] is on["matmul.allow_tf32"] is True
