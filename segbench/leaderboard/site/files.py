"""The files of a site: where each goes, what is copied beside the pages, and writing many of them quickly."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from segbench.content import dataset_folder
from segbench.files import write_atomic
from segbench.leaderboard.site.shape import Row, Table
from segbench.leaderboard.site.text import segment

_WRITERS = 8  # mostly waiting for the disk


def model_page(table: Table, row: Row) -> str:
    """Path of a model's page below the site.

    A model may be on several data sets and protocols, so both are in the path.
    """
    parts = (table.protocol, dataset_folder(table.dataset), row["id"])
    return "/".join(("models", *map(segment, parts))) + ".html"


def copied(content_root: Path, path: str | None) -> str | None:
    """``path`` if it is a file below ``entries/`` of ``content_root``, to be copied to the same place; else None."""
    if path is None:
        return None
    pure = PurePosixPath(path)
    if pure.is_absolute() or not pure.parts or pure.parts[0] != "entries" or pure.as_posix() != path:
        return None
    if any(segment(part) != part or part.startswith(".") for part in pure.parts):
        return None
    source = content_root / pure
    inside = source.resolve().is_relative_to((content_root / "entries").resolve())
    return path if inside and source.is_file() else None


def write_all(out: Path, files: Iterable[tuple[str, bytes | Path]]) -> list[Path]:
    """Writes each file, a copy where a path is given; a file that already has these bytes is left alone."""

    def write(item: tuple[str, bytes | Path]) -> Path:
        path, content = out / item[0], item[1]
        data = content.read_bytes() if isinstance(content, Path) else content
        if not _holds(path, data):
            write_atomic(path, data)
        return path

    with ThreadPoolExecutor(_WRITERS) as pool:
        return sorted(pool.map(write, files))


def _holds(path: Path, data: bytes) -> bool:
    try:
        return os.path.getsize(path) == len(data) and path.read_bytes() == data
    except OSError:
        return False
