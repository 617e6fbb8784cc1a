"""From a weights file to tensors. The file comes from strangers: nothing in it is executed."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from segbench.errors import ModelError


def read_weights(path: Path) -> Mapping[str, Any]:
    """The content of a safetensors file or of what ``torch.save`` wrote, on the CPU.

    Returns:
        The state dict, or the checkpoint that holds one (`segbench.models.released.normalise_keys` unwraps it). Its
        tensors may be views of the file: copy them before it changes.

    Raises:
        ModelError: damaged, neither format, or a pickle that would need more than tensors and plain values.
    """
    source = str(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise ModelError(f"Cannot read the weights {source}: {error}") from error
    if is_safetensors(start):
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise ModelError(f"The weights {source} are damaged: {error}. Fetch or copy them again.") from error
    if not start:
        raise ModelError(f"The weights {source} are damaged: the file is empty. Fetch or copy it again.")
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


def is_safetensors(start: bytes) -> bool:
    """Whether a file that begins so is safetensors: 8 bytes of length, then a JSON object."""
    return start[8:9] == b"{"


def _need_content(found: Any, source: str) -> None:
    """A tensor of a pickle may repeat one number a billion times; copied, it would fill the memory."""
    values = found.values() if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else ()
    for value in values:
        if isinstance(value, Tensor) and value.layout is torch.strided:
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ModelError(
                    f"The weights {source} hold a tensor {tuple(value.shape)} of repeated numbers: refused."
                )
        else:
            _need_content(value, source)


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
