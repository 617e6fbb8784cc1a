"""From an untrusted weights file to the tensors of a model: nothing in it is executed, and everything must fit."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from segbench.downloads import checks
from segbench.errors import ModelError

# State-dict names whose tensors have the size K.
_OF_CLASSES = re.compile(r"(^|\.)(classifier\.(weight|bias)|cls_emb|mask_norm\.(weight|bias))$")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_weights(path: Path) -> Mapping[str, Any]:
    """The content of a safetensors file or of what ``torch.save`` wrote, on the CPU.

    Returns:
        The state dict, or the checkpoint that holds one (`segbench.models.checkpoints.unwrap` finds it). Its
        tensors may be views of the file: copy them before it changes.

    Raises:
        ModelError: damaged, neither format, or a pickle that would need more than tensors and plain values.
    """
    source, start = str(path), check_is_weights(path)
    if is_safetensors(start):
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise ModelError(f"The weights {source} are damaged: {error}. Fetch or copy them again.") from error
    zipped = start.startswith(b"PK")
    if zipped:
        _need_plain_zip(path)
    try:
        with warnings.catch_warnings():  # of torch, on the way in which the file was pickled
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ModelError(_refusal(source, error)) from error
    except Exception as error:  # what a damaged file gives is not known
        raise ModelError(
            f"The weights {source} are damaged, or neither safetensors nor what torch.save writes "
            f"({type(error).__name__}). Fetch or copy them again."
        ) from error
    _need_content(found, source)
    if not isinstance(found, Mapping):
        raise ModelError(
            f"The weights {source} hold a {type(found).__name__}, not a state dict. "
            "Save the model with safetensors.torch.save_model(model, file)."
        )
    return found


def check_is_weights(path: Path) -> bytes:
    """The first bytes of a file; ModelError if it is a web page, a pointer of git-lfs or other text, or empty."""
    try:
        with path.open("rb") as stream:
            start = stream.read(checks.HEAD_BYTES)
    except OSError as error:
        raise ModelError(f"Cannot read the weights {path}: {error}") from error
    if what := checks.no_weights(start):
        raise ModelError(f"{path} is {what}.")
    return start


def is_safetensors(start: bytes) -> bool:
    """Whether a file that begins so is safetensors: 8 bytes of length, then a JSON object."""
    return start[8:9] == b"{"


def _need_content(found: Any, source: str) -> None:
    """A tensor of a pickle may repeat one number a billion times; copied, it would fill the memory.

    Lists and mappings may hold each other, or themselves: each is looked into once.
    """
    seen, waiting = set[int](), [found]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            is_dense = value.layout is torch.strided
            if is_dense and value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ModelError(
                    f"The weights {source} hold a tensor {tuple(value.shape)} of repeated numbers: refused."
                )
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value


def _need_plain_zip(path: Path) -> None:
    """torch.save stores its members as they are; packed ones could unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise ModelError(f"The weights {path} are damaged: {error}. Fetch or copy them again.") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ModelError(f"The weights {path} are a packed archive, not what torch.save writes. Unpack it first.")


def _refusal(source: str, error: Exception) -> str:
    """Why a pickle was refused: it needs code, or it is no pickle at all."""
    match = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
    reason = f"it asks for {match[1]}" if match else "it is not what torch.save writes"
    return (
        f"The weights {source} are refused: reading them would need more than tensors and plain values ({reason}). "
        "A pickle can run any code, so segbench never reads one whole. Ask for a safetensors file; or, if you trust "
        "this one, load it elsewhere and save it with safetensors.torch.save_model(model, file)."
    )


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], *, source: str) -> None:
    """Copies a state dict into ``model``; every key and shape must fit, else ModelError with the likely cause."""
    if wrong := [key for key, value in state_dict.items() if not isinstance(value, Tensor)]:
        kind = type(state_dict[wrong[0]]).__name__
        raise ModelError(f"The weights of {source} hold {wrong[0]!r}, which is {kind} and not a tensor. Remove it.")
    own = model.state_dict()
    for key in own.keys() & state_dict.keys():
        check_tensor(key, state_dict[key], own[key], source=source)
    missing, surplus = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    misshaped = {
        key: (tuple(state_dict[key].shape), tuple(own[key].shape))
        for key in own.keys() & state_dict.keys()
        if own[key].shape != state_dict[key].shape
    }
    problems = [f"missing {key}" for key in missing] + [f"surplus {key}" for key in surplus]
    problems += [f"{key} is {theirs}, the model has {ours}" for key, (theirs, ours) in misshaped.items()]
    if problems:
        listed = "\n  ".join(sorted(problems)[:10])
        raise ModelError(
            f"The weights of {source} do not fit the architecture ({len(problems)} keys):\n  {listed}\n"
            f"Likely cause: {_likely_cause(missing, surplus, misshaped, len(own))}"
        )
    model.load_state_dict(state_dict)


def check_tensor(key: str, found: Tensor, own: Tensor, *, source: str) -> None:
    """Refuses a tensor of a file that would not arrive in the model as it is: sparse, quantised, not finite, ..."""
    if problem := _problem(found, own):
        raise ModelError(f"The weights of {source} cannot be used: {key} {problem}. Save them as float32 again.")


def _problem(found: Tensor, own: Tensor) -> str | None:
    if found.layout is not torch.strided or found.is_quantized or found.is_meta:
        return "is sparse, quantised or without content"
    if own.is_floating_point():
        if found.dtype not in FLOATS:
            return f"is {str(found.dtype).removeprefix('torch.')}"
        if not bool(torch.isfinite(found).all()):
            return "has NaN or infinite values"
    return None


def _likely_cause(
    missing: Set[str],
    surplus: Set[str],
    misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    size: int,
) -> str:
    """What a person would guess from the keys of a model of ``size`` entries that do not fit."""
    if not missing and not surplus and all(_OF_CLASSES.search(key) for key in misshaped):
        counts = {_differing(theirs, ours) for theirs, ours in misshaped.values()}
        if len(counts) == 1 and (found := counts.pop()) is not None:
            theirs, ours = found
            return f"another number of classes: the weights have K={theirs}, the model {ours}. Correct `num_classes`."
    if len(missing) > size / 2 and len(surplus) > size / 2:
        return (
            "another architecture, or a layout that segbench does not know. Correct `architecture.name`, "
            "or rename the keys to those of the model's state_dict()."
        )
    if missing and not surplus and not misshaped:
        if all(key.startswith("auxiliary_head.") for key in missing):
            return "the auxiliary head was left out of the file. Save the state dict with it; the head counts as part."
        if all(key.endswith(".num_batches_tracked") for key in missing):
            return "the file is from a PyTorch before 0.4.1. Add the missing entries as torch.tensor(0)."
    if missing or surplus:
        return "other arguments (another depth, another stem) or another architecture. Correct `architecture`."
    return "other arguments (another width). Correct `architecture.arguments`."


def _differing(theirs: tuple[int, ...], ours: tuple[int, ...]) -> tuple[int, int] | None:
    """The one size in which two shapes differ; None where it is not one."""
    pairs = [pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]]
    return pairs[0] if len(theirs) == len(ours) and len(pairs) == 1 else None
