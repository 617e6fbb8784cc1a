"""Float32, and exact, whatever the caller or a model has set.

torch has two generations of switches for TF32 and bfloat16 inside float32 operations. Both are global, and torch
refuses to read an old one that contradicts the new ones, which `torch.backends.cudnn.flags`, for example, does each
time. So both are set together, and both are restored: also the parts that only inherit from others, and also a state
that torch itself refuses to read.

Source: torch's notes on numerical accuracy and CUDA semantics, "TensorFloat-32 (TF32)".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import backends

HAS_NEW = hasattr(backends.cuda.matmul, "fp32_precision")  # since torch 2.9
_PARENTS = ("all", "cudnn", "mkldnn")  # of the new switches; the others may follow them
# The new switches of matrix products, on CUDA and on the CPU, for each value of the old one.
_MATMUL = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 operations, whatever the caller had set; restored afterwards.

    The switches are global: another thread must not set them meanwhile.
    """
    with _float32("ieee", allow_tf32=False):
        yield


@contextmanager
def plain_torch() -> Iterator[None]:
    """The settings of torch as it begins, whatever the caller had set; restored afterwards.

    Tensors are float32 and on the CPU where no one says otherwise, gradients can be recorded (no `inference_mode`), and
    no autocast of the caller's applies.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def tf32() -> Iterator[None]:
    """TF32 inside float32 operations of CUDA; restored afterwards."""
    with _float32("tf32", allow_tf32=True):
        yield


@contextmanager
def _float32(precision: str, *, allow_tf32: bool) -> Iterator[None]:
    with _quiet():
        before = _save_or_restore()
    try:
        with _quiet():
            _set(_Switches(allow_tf32, "high" if allow_tf32 else "highest", dict.fromkeys(before.new, precision)))
        yield
    finally:
        with _quiet():
            _set(before)


class _Switches(NamedTuple):
    """All switches: the old ones for cuDNN and for products of matrices, and the new ones by name."""

    cudnn_allow_tf32: bool
    matmul_precision: str
    new: dict[str, str]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's advice to use the new switches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _mkldnn(precision: str) -> None:
    """Sets it as `torch.backends.mkldnn.fp32_precision = ...` should, which sets that of all backends instead."""
    backends.mkldnn.set_flags(_fp32_precision=precision)  # type: ignore[no-untyped-call]


def _new() -> dict[str, tuple[Any, Callable[[str], None]]]:
    """The new switches, parents first: what is read, and how it is set."""
    if not HAS_NEW:
        return {}

    def setter(holder: Any) -> Callable[[str], None]:
        return lambda value: setattr(holder, "fp32_precision", value)

    leaves = {
        "cuda.matmul": backends.cuda.matmul,
        **{f"cudnn.{kind}": getattr(backends.cudnn, kind) for kind in ("conv", "rnn")},
        **{f"mkldnn.{kind}": getattr(backends.mkldnn, kind) for kind in ("matmul", "conv", "rnn")},
    }
    return {
        "all": (backends, setter(backends)),
        "cudnn": (backends.cudnn, setter(backends.cudnn)),
        "mkldnn": (backends.mkldnn, _mkldnn),
        **{name: (holder, setter(holder)) for name, holder in leaves.items()},
    }


def _save() -> _Switches:
    """The switches as they are; changes them on the way, so `_set` must follow."""
    if not HAS_NEW:
        return _Switches(backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), {})
    switches = _new()
    now = {name: holder.fp32_precision for name, (holder, _) in switches.items()}
    stored = dict(now)
    for parents, names in ((_PARENTS[:1], _PARENTS[1:]), (_PARENTS, tuple(switches)[3:])):
        seen: list[dict[str, str]] = []
        for value in ("ieee", "tf32"):
            for parent in parents:
                switches[parent][1](value)
            seen.append({name: switches[name][0].fp32_precision for name in names})
        for name in names:
            follows = seen[0][name] != seen[1][name]  # its parents: it has no value of its own
            # As torch begins, those of cuDNN are tf32 where no parent says otherwise. Nothing sets them so again.
            if follows and now[name] == now[_parent(name)]:
                stored[name] = "none"
    return _Switches(_old_cudnn(switches), _old_matmul(switches), stored)


def _save_or_restore() -> _Switches:
    """`_save`; if it is interrupted, the new switches have their values again."""
    now = {name: holder.fp32_precision for name, (holder, _) in _new().items()}
    try:
        return _save()
    except BaseException:
        for name, (_, set_value) in _new().items():
            set_value(now[name])
        raise


def _parent(name: str) -> str:
    return "all" if name in _PARENTS else "mkldnn" if name.startswith("mkldnn.") else "cudnn"


def _old_cudnn(switches: dict[str, tuple[Any, Callable[[str], None]]]) -> bool:
    """The old switch can be read only where the new ones agree with it."""
    for value in ("ieee", "tf32"):
        switches["cudnn.conv"][1](value)
        switches["cudnn.rnn"][1](value)
        try:
            return bool(backends.cudnn.allow_tf32)
        except RuntimeError:
            continue
    raise AssertionError("torch's switch cudnn.allow_tf32 has two values")


def _old_matmul(switches: dict[str, tuple[Any, Callable[[str], None]]]) -> str:
    for name, (cuda, mkldnn) in _MATMUL.items():
        switches["cuda.matmul"][1](cuda)
        switches["mkldnn.matmul"][1](mkldnn)
        try:
            if torch.get_float32_matmul_precision() == name:
                return name
        except RuntimeError:
            continue
    raise AssertionError("torch's float32_matmul_precision has three values")


def _set(switches: _Switches) -> None:
    """The old ones first: they set some of the new ones."""
    torch.set_float32_matmul_precision(switches.matmul_precision)
    backends.cudnn.allow_tf32 = switches.cudnn_allow_tf32
    for name, (_, set_value) in _new().items():
        set_value(switches.new[name])
