"""Files: atomic writes and hashes.

What is promised, and where it ends. A reader, and a killed process, see the old content of a file or all of the new:
everywhere. The new content survives a power loss once the call has returned: on a local file system whose disk does
what fsync asks. A file's data, its name in the folder, and the folders that were made for it are synced, in that order.
No such promise is made

- for a folder that the system does not sync (Windows, some network and FUSE file systems): a power loss may take the
  name, and so leave the old content or no file, though never half of one;
- on macOS, where fsync does not empty the disk's own cache, and on disks that confirm what they have not written;
- for other machines that read the same network file system at that moment: they see what its caches show them;
- for who is the first to create a file (`create_atomic`) where there are no hard links (FAT, some FUSE file systems):
  of two processes at the same moment the second may replace what the first one wrote;
- for several files together (`write_results`): each is whole, those after a power loss may be missing;
- for what is appended, as logs are: the last lines may be lost or cut, and whoever reads them must expect that.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from segbench.errors import RunError

# How systems say that this folder cannot be opened or synced; anything else is an error of the disk.
UNSYNCED = (
    errno.EACCES,
    errno.EPERM,
    errno.EINVAL,
    errno.EBADF,
    errno.EISDIR,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
)


# How systems say that there are no hard links here.
UNLINKED = (
    errno.EPERM,
    errno.EMLINK,
    errno.EXDEV,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EINVAL,
)


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

    A temporary file in the same folder, fsync, rename, fsync of the folder. Missing folders are made.
    """
    with _temporary(path, data) as temporary:
        os.replace(temporary, path)
    sync_folder(path.parent)


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
        except OSError as error:
            if error.errno not in UNLINKED:
                raise
            if path.exists():
                return False
            os.replace(temporary, path)
    sync_folder(path.parent)
    return True


@contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """A synced file beside ``path``, gone afterwards; its mode is what the umask allows."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing, each synced in the one that holds it."""
    missing = list(takewhile(lambda each: not each.is_dir(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):  # also one that another process has made meanwhile: who syncs first is not known
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder; nothing happens where the system does not sync folders.

    Raises:
        OSError: what the disk says, e.g. that it is full or broken.
    """
    if os.name != "posix":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in UNSYNCED:
            raise
