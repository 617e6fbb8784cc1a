"""What a pass over a data set found, remembered by the path, size and time of change of its files."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import PIL
from PIL import features

from segbench.downloads import cache_folder
from segbench.files import sha256_bytes, write_atomic

VERSION = 2  # to be raised when reading changes


def key_of(*parts: Any) -> str:
    """A key made of JSON data: files with their stamps, and what was done with them.

    The versions of Pillow and of its decoders, which may round differently, belong to it.
    """
    return sha256_bytes(json.dumps([VERSION, *_decoders(), *parts], sort_keys=True).encode())


@lru_cache(maxsize=1)
def _decoders() -> list[str | None]:
    return [PIL.__version__, *(features.version(name) for name in ("jpg", "libjpeg_turbo", "webp", "libtiff"))]


def recall(kind: str, key: str) -> dict[str, Any] | None:
    """What was remembered under ``key``; None if there is nothing, or it is damaged."""
    try:
        document = json.loads(_path(kind, key).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def remember(kind: str, key: str, document: dict[str, Any]) -> None:
    """Remembers JSON data. A cache that cannot be written costs time, not the result: it is only said."""
    path = _path(kind, key)
    try:
        write_atomic(path, json.dumps(document).encode())
    except OSError as error:
        logging.getLogger("segbench").warning(
            "%s cannot be written (%s): the next run has to find it out again.", path, error
        )


def _path(kind: str, key: str) -> Path:
    return cache_folder() / "data" / f"{kind}-{key[:32]}.json"
