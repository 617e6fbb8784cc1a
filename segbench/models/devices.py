"""What devices do differently: which there are, running out of memory, threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from segbench.attacks.memory import is_out_of_memory
from segbench.errors import RunError, UsageError


def choose_device(name: str | torch.device) -> torch.device:
    """``auto`` is CUDA if there is one, else the CPU; UsageError if torch cannot use the device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UsageError(f"The device {name!r} cannot be used: {_first_line(error)}. See: segbench env") from error
    return device


def choose_compute_device(name: str | torch.device) -> torch.device:
    """`choose_device` for attacks and training; UsageError for MPS, which has no float64: attacks keep counts in it."""
    if str(name).partition(":")[0] == "mps":
        raise UsageError(
            "Apple's GPU (mps) has no float64, in which attacks keep count: use --device cpu. "
            'Inference works there: segbench.load_model(..., device="mps").'
        )
    return choose_device(name)


@contextmanager
def memory_explained(text: str, then: str = "") -> Iterator[None]:
    """Memory that runs out within is a RunError: "Not enough memory", ``text``, ``then``, and what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"Not enough memory {text} ({_first_line(error)}). {then}Close other programs, or use another --device."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


@contextmanager
def cpu_threads(number: int | None = None) -> Iterator[None]:
    """So many CPU threads; restored afterwards.

    By default as many as this process has cores to itself: torch counts the cores of the machine, but a container, a
    cpuset or processes beside this one leave fewer, and more threads than cores are slow. ``OMP_NUM_THREADS`` wins.
    """
    before = torch.get_num_threads()
    if number is None and "OMP_NUM_THREADS" not in os.environ:
        beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
        number = max(1, min(before, _cores()) // max(1, int(beside) if beside.isdecimal() else 1))
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    """Cores that this process may use: by its affinity and by the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
