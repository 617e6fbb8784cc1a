"""In which precision gradients are computed. What an attack returns is always scored in float32 with TF32 off."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from segbench.engine.rundir.manifest import FP32
from segbench.errors import UsageError
from segbench.models.float32 import tf32

PRECISIONS = (FP32, "tf32", "bf16")


class Precision(NamedTuple):
    """How a pass of an attack is computed: dtype of autocast or None, and the context around forward and backward.

    A session has made float32 exact; the context changes that for the pass.
    """

    autocast: torch.dtype | None
    setting: Callable[[], AbstractContextManager[Any]]


def check_precision(name: str, device: torch.device) -> None:
    """Refuses a precision that is unknown or does not exist on the device; warns if it is slow there."""
    if name not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, not {name!r}.")
    if name == "tf32" and device.type != "cuda":
        raise UsageError(f"tf32 exists on NVIDIA GPUs only, not on {device.type}; use --precision fp32 or bf16.")
    if device.type == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        raise UsageError(
            "NVIDIA_TF32_OVERRIDE=1 forces TF32 on, also where results are scored: unset NVIDIA_TF32_OVERRIDE, and use "
            "--precision tf32 if gradients may be computed in it."
        )
    if name == "bf16" and not has_bf16(device):
        logging.getLogger("segbench").warning(
            "%s has no bfloat16 instructions: bf16 works, but slower than fp32.", device.type
        )


def has_bf16(device: torch.device) -> bool:
    """Whether it has instructions for bfloat16; on a CPU, those that oneDNN needs."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def get_precision(name: str) -> Precision:
    """The precision of that name."""
    return {
        FP32: Precision(None, nullcontext),
        "tf32": Precision(None, tf32),
        "bf16": Precision(torch.bfloat16, nullcontext),
    }[name]
