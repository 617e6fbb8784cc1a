"""From the bytes of a weights file to tensors. The bytes come from strangers: nothing in them is executed."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch

from segbench.errors import ModelError

# A safetensors file starts with the length of its header (8 bytes), then the header, a JSON object.
_JSON_STARTS = b"{"


def read_weights(data: bytes, *, source: str) -> Mapping[str, Any]:
    """The content of a safetensors file or of what ``torch.save`` wrote, on the CPU.

    Args:
        data: the whole file.
        source: its name in messages.

    Returns:
        The state dict, or the checkpoint that holds one (`segbench.models.released.normalise_keys` unwraps it).

    Raises:
        ModelError: damaged, neither format, or a pickle that would need more than tensors and plain values.
    """
    if data[8:9] == _JSON_STARTS:
        try:
            return safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise ModelError(f"The weights {source} are damaged: {error}. Fetch or copy them again.") from error
    _need_plain_zip(data, source)
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
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


def _need_plain_zip(data: bytes, source: str) -> None:
    """torch.save stores its members as they are; packed ones could unpack to any size."""
    if not data.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise ModelError(f"The weights {source} are damaged: {error}. Fetch or copy them again.") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ModelError(f"The weights {source} are a packed archive, not what torch.save writes. Unpack it first.")


def _refusal(source: str, error: Exception) -> str:
    """Why a pickle was refused: it needs code, or it is no pickle at all."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    reason = lines[0] if lines else "it is not what torch.save writes"
    return (
        f"The weights {source} are refused: reading them would need more than tensors and plain values ({reason}). "
        "A pickle can run any code, so segbench never reads one whole. Ask for a safetensors file; or, if you trust the "
        "file, load it elsewhere and save its state dict with safetensors.torch.save_file."
    )
