"""What devices do differently: rounding, and running out of memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from segbench.errors import UsageError


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 operations, whatever the caller had set; restored afterwards."""
    with _float32("ieee", allow_tf32=False):
        yield


@contextmanager
def tf32() -> Iterator[None]:
    """TF32 inside float32 operations of CUDA; restored afterwards."""
    with _float32("tf32", allow_tf32=True):
        yield


@contextmanager
def _float32(precision: str, *, allow_tf32: bool) -> Iterator[None]:
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        name: str = "fp32_precision"
        value: str | bool = precision
        holders: list[Any] = [torch.backends.cuda.matmul]
        for backend in (torch.backends.cudnn, torch.backends.mkldnn):
            holders += [getattr(backend, kind) for kind in ("conv", "rnn", "matmul") if hasattr(backend, kind)]
    else:  # torch before 2.9
        name, value = "allow_tf32", allow_tf32
        holders = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [getattr(holder, name) for holder in holders]
    for holder in holders:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, old in zip(holders, before, strict=True):
            setattr(holder, name, old)


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
        raise UsageError(
            f"The device {name!r} cannot be used: {str(error).splitlines()[0]}. See: segbench env"
        ) from error
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


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
