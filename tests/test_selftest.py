"""The self-test says ok where all is well, and not where something is broken."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from segbench.attacks import batch, control
from segbench.engine.compute.worker import Worker
from segbench.engine.selftest import attack_checks, device_checks, golden, run
from segbench.engine.selftest.outcome import DIFFERS, NOT_AVAILABLE, OK, Outcome, at_most
from segbench.models import float32

CPU = torch.device("cpu")


def test_the_vectors_of_the_package_are_those_of_the_tests():
    found = golden.arrays()
    sources = {
        "": "apgd_inputs",
        "loss_": "losses",
        "worst_": "worst_case",
        "red_": "apgd_outputs",
        "const_": "apgd_outputs",
    }
    assert len(found) > 30
    for name, values in found.items():
        prefix = next((each for each in sources if each and name.startswith(each)), "")
        with np.load(f"tests/golden/{sources[prefix]}.npz") as archive:
            whole = archive[name if prefix in ("", "red_", "const_") else name.removeprefix(prefix)]
        cut = name in ("x", "y") or prefix in ("red_", "const_")
        assert np.array_equal(values, whole[: golden.IMAGES] if cut else whole), name


@pytest.mark.slow
def test_everything_that_exists_here_is_ok(cli):
    code, out, err = cli("selftest", "--device", "cpu", "--quick", "--json", "--quiet")
    report = json.loads(out)
    assert (code, report["ok"]) == (0, True), report
    assert {check["name"]: check["status"] for check in report["checks"]} == {
        "golden losses": OK,
        "golden attacks": OK,
        "golden worst case": OK,
        "batch against the plain loop": OK,
        "flags and early stop": OK,
        "exact float32": OK,
        "batch sizes": OK,
        "out of memory": OK,
        "pinned copies": NOT_AVAILABLE,
        "two devices": NOT_AVAILABLE,
    }
    assert {"python", "segbench", "torch"} <= set(report["versions"])
    assert "cpu" in err
    assert "all checks available on this device passed" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "speed"])
def test_what_quick_leaves_out_runs_here(name):
    found = run.CHECKS[name](CPU)
    assert found.status == OK, found
    assert name in run.SLOW


def test_compilation_is_compared_where_there_is_a_compiler(monkeypatch):
    def no_compiler(function, **_):
        return lambda *arguments: (_ for _ in ()).throw(RuntimeError("no C++ compiler"))

    def wrong(function, **_):
        return lambda *arguments: (1.01 * function(*arguments)[0], *function(*arguments)[1:])

    found = []
    for stand_in in (lambda function, **_: function, no_compiler, wrong):
        monkeypatch.setattr(torch, "compile", stand_in)
        found.append(device_checks.compilation(CPU).status)
    assert found == [OK, NOT_AVAILABLE, DIFFERS]
    assert "compile" in run.SLOW


@pytest.mark.slow
def test_a_broken_step_rule_differs(cli, monkeypatch):
    """The step is never halved, in the batch alone: golden vectors and the plain loop both notice."""
    monkeypatch.setattr(control, "RHO", -1.0)
    kept = {name: run.CHECKS[name] for name in ("golden losses", "golden attacks", "batch against the plain loop")}
    monkeypatch.setattr(run, "CHECKS", kept)
    code, out, err = cli("selftest", "--device", "cpu", "--quiet")
    assert code == 1
    assert out.count("differs") == 2
    assert "golden attacks, batch against the plain loop. Do not trust results from this machine" in err
    assert "segbench selftest --json" in err


def test_flags_that_are_read_too_early_differ(monkeypatch):
    """As on the second GPU before: whatever lies in the buffer is taken for the flag."""
    monkeypatch.setattr(batch, "to_host", lambda flags: (torch.ones_like(flags), None))
    found = attack_checks.early_stop(CPU)
    assert found.status == DIFFERS
    assert found.detail.startswith("forward passes [1, 1, 1, 1]")


def test_rounding_of_tf32_differs(monkeypatch):
    """A device on which float32 is not exact in a session: products with 10 bits, as TF32 has."""
    exact = torch.matmul

    def rounded(a, b):
        if a.dtype == torch.float64:
            return exact(a, b)
        return exact(*(torch.round(value * 1024) / 1024 for value in (a, b)))

    assert device_checks.float32(CPU).status == OK
    monkeypatch.setattr(torch, "matmul", rounded)
    found = device_checks.float32(CPU)
    assert found.status == DIFFERS
    assert 1e-5 < found.value < 1e-2


def test_each_switch_is_set_beforehand_and_undone_afterwards(monkeypatch):
    seen, before = [], torch.get_float32_matmul_precision()
    switches = {name: lambda act=act: (act(), seen.append(0)) for name, act in device_checks.SWITCHES.items()}
    monkeypatch.setattr(device_checks, "SWITCHES", switches)
    assert device_checks.float32(CPU).status == OK
    assert len(seen) == (8 if float32.HAS_NEW else 5)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("name", ["golden losses", "golden attacks", "exact float32"])
def test_numbers_that_are_none_differ_also_as_json(cli, monkeypatch, name):
    """A device that returns NaN: a maximum passes over it, and JSON has no word for it."""

    def broken(function):
        return lambda *arguments, **options: function(*arguments, **options) * torch.nan

    monkeypatch.setattr(torch, "matmul", broken(torch.matmul))
    monkeypatch.setattr(attack_checks.losses, "js", broken(attack_checks.losses.js))
    attack = attack_checks.attacks.red_eps_apgd
    monkeypatch.setattr(
        attack_checks.attacks,
        "red_eps_apgd",
        lambda *arguments, **options: (found := attack(*arguments, **options))._replace(
            adversarial=found.adversarial * torch.nan
        ),
    )
    monkeypatch.setattr(run, "CHECKS", {name: run.CHECKS[name]})
    code, out, _ = cli("selftest", "--device", "cpu", "--quiet", "--json")
    assert code == 1
    (check,) = json.loads(out)["checks"]
    assert (check["status"], check["value"]) == (DIFFERS, None)


@pytest.mark.slow
def test_memory_that_runs_out_as_on_a_gpu(monkeypatch):
    """An allocator with little memory in place of a GPU's: four images do not fit, two do."""
    monkeypatch.setattr(Worker, "fixed_shape", property(lambda _: False))
    empty, free, most = torch.Tensor.new_empty, 1 << 20, [1 << 20]

    def allocate(tensor, size, **options):
        if isinstance(size, int) and size > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return empty(tensor, size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)
    found = device_checks.halved_batch(CPU, free)
    assert found.status == OK, found
    most[0] //= 2  # not even two
    assert device_checks.halved_batch(CPU, free) == Outcome(DIFFERS, "batch size 1, but 2 images fit")


def test_attacks_on_the_device_that_is_not_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(current.append(device.index)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    current, asked = [], []
    monkeypatch.setattr(device_checks, "pinned_copies", lambda device: Outcome(OK, "fine"))
    for name in ("early_stop", "golden_attacks"):
        monkeypatch.setattr(attack_checks, name, lambda device: asked.append(device) or Outcome(OK, "fine"))
    assert (
        device_checks.two_devices(torch.device("cuda", 1)).detail == "cuda:0 while cuda:1 is the current device: fine"
    )
    monkeypatch.setattr(attack_checks, "early_stop", lambda device: Outcome(DIFFERS, "early"))
    found = device_checks.two_devices(torch.device("cuda", 0))
    assert asked == [torch.device("cuda", 0)] * 2
    assert found == Outcome(DIFFERS, "on cuda:1 while cuda:0 is the current device: early")
    assert device_checks.two_devices(CPU).status == NOT_AVAILABLE


def test_a_check_that_raises_differs_and_the_others_still_run(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run, "CHECKS", {"first": broken, "second": lambda device: at_most(1.0, 2.0, "fine")})
    report = run.run_selftest("cpu", progress=False)
    assert [check.status for check in report.checks] == [DIFFERS, OK]
    assert report.differing == ["first"]
    assert "illegal memory access" in report.checks[0].detail
    assert report.checks[1].detail == "fine (limit 2)"
    json.dumps(report.as_dict(), allow_nan=False)
