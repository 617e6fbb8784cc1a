"""What devices do differently: rounding, and running out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 operations, whatever the caller had set; restored afterwards."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        name: str = "fp32_precision"
        value: str | bool = "ieee"
        holders: list[Any] = [torch.backends.cuda.matmul]
        for backend in (torch.backends.cudnn, torch.backends.mkldnn):
            holders += [getattr(backend, kind) for kind in ("conv", "rnn", "matmul") if hasattr(backend, kind)]
    else:  # torch before 2.9
        name, value = "allow_tf32", False
        holders = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [getattr(holder, name) for holder in holders]
    for holder in holders:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, old in zip(holders, before, strict=True):
            setattr(holder, name, old)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
