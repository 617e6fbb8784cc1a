"""From a weights file to tensors. The file comes from strangers: nothing in it is executed."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from segbench.errors import ModelError

# A safetensors file starts with the length of its header (8 bytes), then the header, a JSON object.
_JSON_STARTS = b"{"


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
    if start[8:9] == _JSON_STARTS:
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise ModelError(f"The weights {source} are damaged: {error}. Fetch or copy them again.") from error
    zipped = start.startswith(b"PK")
    if zipped:
        _need_plain_zip(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ModelError(_refusal(source, error)) from error
    except Exception as error:  # what a damaged file gives is not known
        raise ModelError(
            f"The weights {source} are damaged, or neither safetensors nor what torch.save writes "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})."
        ) from error
    if not isinstance(found, Mapping):
        raise ModelError(
            f"The weights {source} hold a {type(found).__name__}, not a state dict. "
            "Save model.state_dict() with safetensors.torch.save_file."
        )
    return found


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
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    reason = lines[0] if lines else "it is not what torch.save writes"
    return (
        f"The weights {source} are refused: reading them would need more than tensors and plain values ({reason}). "
        "A pickle can run any code, so segbench never reads one whole. Ask for a safetensors file; or, if you trust "
        "this one, load it elsewhere and save its state dict with safetensors.torch.save_file."
    )
