"""Runs the checks of the self-test one after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from segbench.engine.compute.worker import device_name
from segbench.engine.rundir.manifest import versions
from segbench.engine.selftest import attack_checks, device_checks
from segbench.engine.selftest.outcome import DIFFERS, Outcome
from segbench.engine.telemetry.progress import track_items
from segbench.models.devices import choose_compute_device

CHECKS: Mapping[str, Callable[[torch.device], Outcome]] = {
    "golden losses": attack_checks.golden_losses,
    "golden attacks": attack_checks.golden_attacks,
    "golden worst case": attack_checks.golden_worst_case,
    "batch against the plain loop": attack_checks.plain_loop,
    "flags and early stop": attack_checks.early_stop,
    "exact float32": device_checks.float32,
    "batch sizes": device_checks.batch_sizes,
    "out of memory": device_checks.memory,
    "pinned copies": device_checks.pinned_copies,
    "two devices": device_checks.two_devices,
    "bf16": device_checks.bf16,
    "tf32": device_checks.tf32,
    "compile": device_checks.compilation,
    "speed": device_checks.speed,
}
SLOW = ("compile", "speed", "bf16", "tf32")


class CheckResult(NamedTuple):
    """One check: ``status`` is ``ok``, ``differs`` or ``not available``; ``value`` the number that decided, or None."""

    name: str
    status: str
    detail: str
    value: float | None
    seconds: float


class Report(NamedTuple):
    """What the self-test found on a device, with what a bug report needs."""

    device: str
    versions: Mapping[str, str]
    checks: list[CheckResult]

    @property
    def differing(self) -> list[str]:
        """The names of the checks that differ."""
        return [check.name for check in self.checks if check.status == DIFFERS]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": not self.differing,
            "device": self.device,
            "versions": dict(self.versions),
            "checks": [check._replace(value=_finite(check.value))._asdict() for check in self.checks],
        }


def _finite(value: float | None) -> float | None:
    """JSON has no infinity; ``detail`` says it."""
    return value if value is None or math.isfinite(value) else None


def run_selftest(device: str = "auto", *, quick: bool = False, progress: bool = True) -> Report:
    """Checks on this machine what segbench relies on, in at most two minutes.

    Args:
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda``, ``cuda:1``, ...
        quick: without the other precisions, compilation and speed.
        progress: show a bar on standard error.

    Raises:
        UsageError: the device cannot be used.
    """
    chosen = choose_compute_device(device)
    names = [name for name in CHECKS if not (quick and name in SLOW)]
    results = [_check(name, chosen) for name in track_items(names, "self-test", progress)]
    return Report(device_name(chosen), versions() | _libraries(chosen), results)


def _check(name: str, device: torch.device) -> CheckResult:
    started = time.perf_counter()
    try:
        found = CHECKS[name](device)
    except Exception as error:  # noqa: BLE001 - whatever a device raises is a finding, and the others are still wanted
        found = Outcome(DIFFERS, f"{type(error).__name__}: {error}"[:500])
    return CheckResult(name, found.status, found.detail, found.value, round(time.perf_counter() - started, 2))


def _libraries(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {}
    return {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
