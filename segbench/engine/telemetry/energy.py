"""Energy of a run, where the machine tells it: nvidia-smi for GPUs, RAPL for processors."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

RAPL = Path("/sys/class/powercap")
SECONDS = 2.0  # between two readings of a GPU's power


class EnergyMeter:
    """Mean power since it was made: of a GPU, by index or UUID for nvidia-smi, or of the processors; to be closed."""

    def __init__(self, gpu: str | None) -> None:
        self._gpu = gpu
        self._sampled: list[float] = []
        self._stop = threading.Event()
        self._started, self._joules = time.monotonic(), processor_joules()
        self._thread = threading.Thread(target=self._sample, name="segbench-energy", daemon=True)
        if gpu is not None and shutil.which("nvidia-smi"):
            self._look()  # so that the first unit knows, too
            self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def watts(self) -> float | None:
        """Mean power so far; None if the machine does not tell."""
        if self._gpu is not None:
            return sum(self._sampled) / len(self._sampled) if self._sampled else None
        seconds = time.monotonic() - self._started
        now = processor_joules()
        if now is None or self._joules is None or seconds <= 0:
            return None
        joules = sum(_risen(now[name], self._joules[name]) for name in now.keys() & self._joules.keys())
        return joules / seconds

    def _sample(self) -> None:
        while not self._stop.wait(SECONDS):
            self._look()

    def _look(self) -> None:
        if self._gpu is not None and (watts := gpu_watts(self._gpu)) is not None:
            self._sampled.append(watts)


Counter = tuple[float, float]  # joules, and where the counter begins again at 0


def _risen(now: Counter, before: Counter) -> float:
    return now[0] - before[0] if now[0] >= before[0] else now[0] + now[1] - before[0]


def processor_joules(folder: Path = RAPL) -> dict[str, Counter] | None:
    """The energy counter of each processor package; None where they cannot be read (most kernels: root only)."""
    found = {}
    for package in sorted(folder.glob("intel-rapl:[0-9]*")):
        if package.name.count(":") > 1:
            continue  # a part of a package
        try:
            values = [float((package / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")]
        except (OSError, ValueError):
            return None
        found[package.name] = (values[0] / 1e6, values[1] / 1e6)
    return found or None


def gpu_watts(gpu: str, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> float | None:
    """The power that a GPU draws now; None if nvidia-smi does not say."""
    command = ["nvidia-smi", "-i", gpu, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        result = run(command, capture_output=True, text=True, check=False, timeout=10)
        return float(result.stdout.strip()) if result.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
