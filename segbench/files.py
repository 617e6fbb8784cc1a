"""Files: atomic writes and hashes."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from segbench.errors import RunError


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of ``data``.

    >>> sha256_bytes(b"")[:8]
    'e3b0c442'
    """
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Writes ``data`` so that ``path`` holds either its old content or all of the new, also after a power loss.

    A temporary file in the same folder, fsync, rename, fsync of the folder.
    """
    with _temporary(path, data) as temporary:
        os.replace(temporary, path)
    _sync_folder(path.parent)


def write_results(files: Mapping[Path, bytes], fix: str) -> None:
    """Writes each file atomically, in order.

    Args:
        files: path to content.
        fix: what the user should do when a file cannot be written, as one or more sentences.

    Raises:
        RunError: names the file that could not be written, the reason and the fix.
    """
    for path, data in files.items():
        try:
            write_atomic(path, data)
        except OSError as error:
            raise RunError(f"Cannot write {path}: {error}. {fix}") from error


def create_atomic(path: Path, data: bytes) -> bool:
    """Like `write_atomic`, but never replaces a file: False if ``path`` exists, also when another process made it."""
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if path.exists():
                return False
            os.replace(temporary, path)
    _sync_folder(path.parent)
    return True


@contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file beside ``path``, gone afterwards; its mode is what the umask allows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
