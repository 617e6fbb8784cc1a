"""The cache folder, names that are safe in it, locks between processes, and what a failing disk says."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from segbench.errors import DownloadError

_TRUE = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads HF_HUB_OFFLINE
CACHE_ELSEWHERE = "set SEGBENCH_CACHE to a folder elsewhere"
FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}


def cache_folder() -> Path:
    """``SEGBENCH_CACHE``, else ``XDG_CACHE_HOME/segbench``, else ``~/.cache/segbench``."""
    if own := os.environ.get("SEGBENCH_CACHE"):
        return Path(own).expanduser().absolute()
    if (xdg := os.environ.get("XDG_CACHE_HOME")) and Path(xdg).is_absolute():
        return Path(xdg) / "segbench"
    return Path("~/.cache/segbench").expanduser()


def offline_by_environment() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def check_name(name: str) -> None:
    """Refuses a name that is not one plain part of a path."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", name):
        raise DownloadError(f"{name!r} cannot name a download. Use letters, digits, '_', '-' and '.', a letter first.")


def safe_file_name(text: str) -> str:
    """A file name made of ``text``, which comes from a link.

    >>> safe_file_name("a model (1).pt"), safe_file_name("../"), safe_file_name("")
    ('a_model_1_.pt', 'file', 'file')
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip("._-")[-100:].lstrip("._-") or "file"


@contextmanager
def locked(path: Path, *, name: str, seconds: float, elsewhere: str = CACHE_ELSEWHERE) -> Iterator[None]:
    """Only one process at a time is inside; the system frees the lock of a process that dies.

    ``elsewhere`` says how the user chooses another folder, for messages.

    Raises:
        DownloadError: the folder cannot be written, or another process holds the lock for too long.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logging.getLogger("segbench").warning("%s: waiting for another process that downloads it.", name)
            lock.acquire(timeout=seconds)
    except Timeout as error:
        raise DownloadError(
            f"another process has held {path} for {seconds:.0f} s. End that process, or wait for it."
        ) from error
    except OSError as error:
        raise disk_error(error, path.parent, elsewhere=elsewhere) from error
    except NotImplementedError as error:
        raise DownloadError(f"the file system of {path.parent} has no locks: {elsewhere}, on another one.") from error
    try:
        yield
    finally:
        lock.release()


def disk_error(error: OSError, folder: Path, *, elsewhere: str = CACHE_ELSEWHERE) -> DownloadError:
    """What a file that cannot be written means, and how to mend it; ``elsewhere``: how to choose another folder."""
    mend = f"Or {elsewhere}."
    if error.errno in FULL:
        return DownloadError(f"the disk of {folder} is full ({error.strerror}). Free some space. {mend}")
    return DownloadError(f"cannot write to {folder}: {error.strerror or error}. Make it writable. {mend}")


def check_space(needed: int, folder: Path, *, elsewhere: str = CACHE_ELSEWHERE) -> None:
    """Refuses a download that the disk has no room for; ``elsewhere``: how to choose another folder."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # some network file systems do not tell; writing will
        return
    if needed > free:
        raise DownloadError(
            f"the disk of {folder} is full: {size(needed)} are needed, {size(free)} are free. Free some space, "
            f"or {elsewhere}."
        )


def size(number: int) -> str:
    """Bytes for people.

    >>> size(999), size(352_321_536)
    ('999 bytes', '352.3 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} bytes"
