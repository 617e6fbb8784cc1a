"""Archives of strangers, unpacked so that they can do no harm.

Everything in an archive is looked at before anything is written. What `tarfile` and `zipfile` extract with, which knows
links, owners and modes, is not used: plain files are written here, below a temporary folder, and moved from there.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from segbench.downloads.folders import check_space, disk_error, size
from segbench.downloads.progress import Report
from segbench.errors import DataError

MAX_FILES = 200_000  # the largest archive that is unpacked has 45 000
MAX_BYTES = 40_000_000_000  # the largest has 12 GB
PIECE = 1 << 20
ELSEWHERE = "give another folder as --root"
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError)


class Entry(NamedTuple):
    """What an archive says of one of its entries.

    Attributes:
        name: the path in the archive, not to be trusted.
        kind: ``file``, ``folder``, or what else it is, in words.
        size: bytes when unpacked.
        open: the content.
    """

    name: str
    kind: str
    size: int
    open: Callable[[], IO[bytes] | None]


Entries = Mapping[PurePosixPath, Entry]


class Unpacked(NamedTuple):
    """How many files were written, and how many were there before."""

    written: int
    there: int


@contextmanager
def opened(path: Path) -> Iterator[Entries]:
    """The files in a ``.tar``, ``.tgz`` or ``.zip`` archive, all of them looked at.

    Raises:
        DataError: it is damaged, or holds what could do harm. Nothing was written.
    """
    with _open(path) as archive:
        entries = _zip_entries(archive) if isinstance(archive, zipfile.ZipFile) else _tar_entries(archive)
        try:
            files = _checked(path, entries)
        except _DAMAGE as error:
            raise _damaged(path, error) from error
        yield files


def below(entries: Entries, folder: str, *, only: tuple[str, ...] = ()) -> dict[PurePosixPath, Entry]:
    """The files of a folder of an archive, by their paths below it.

    Args:
        entries: of the archive.
        folder: its path in the archive. An archive without any folder (but the one that macOS adds) is its content.
        only: names of the folders in it that are wanted; all if empty.
    """
    root = PurePosixPath(folder)
    found = {path.relative_to(root): entry for path, entry in entries.items() if root in path.parents}
    if not found and {path.parts[0] for path in entries if len(path.parts) > 1} <= {"__MACOSX"}:
        found = {path: entry for path, entry in entries.items() if len(path.parts) == 1}
    return {path: entry for path, entry in found.items() if not only or path.parts[0] in only}


def unpack(archive: Path, files: Entries, place: Path, *, temporary: Path, report: Report) -> Unpacked:
    """Writes files of an open archive below ``place``. Files that are there already stay as they are.

    All is written to ``temporary`` first, and moved when it is complete: a process that is killed leaves nothing at
    ``place`` that looks complete, and a new folder appears there at once.

    Args:
        archive: for messages.
        files: what is wanted, by the path below ``place``.
        place: the folder; it may be there.
        temporary: a folder on the same disk, emptied before and gone afterwards.
        report: told of the bytes written, and of all that will be.

    Raises:
        DataError: damaged, or a file is there with another size; nothing was written to ``place``.
        DownloadError: the disk is full, or cannot be written.
    """
    missing = {path: entry for path, entry in files.items() if not _is_there(archive, place / path, entry)}
    total = sum(entry.size for entry in missing.values())
    try:
        if temporary.exists():  # of a process that was killed
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise disk_error(error, temporary.parent, elsewhere=ELSEWHERE) from error
    done = 0
    try:
        check_space(total, temporary, elsewhere=ELSEWHERE)
        for path, entry in missing.items():
            target = temporary / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as stream:
                for piece in _pieces(archive, entry):
                    stream.write(piece)
                    done += len(piece)
                    report(done, total)
        if hasattr(os, "sync"):  # a power loss must not leave a folder that is there, and files that are empty
            os.sync()
        _move(temporary, place, missing)
    except OSError as error:  # of the disk; those of a damaged archive are others by now
        raise disk_error(error, place, elsewhere=ELSEWHERE) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Unpacked(len(missing), len(files) - len(missing))


def _open(path: Path) -> zipfile.ZipFile | tarfile.TarFile:
    try:
        if path.suffix == ".zip":
            return zipfile.ZipFile(path)
        return tarfile.open(path, "r:gz") if path.suffix == ".tgz" else tarfile.open(path, "r:")
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _move(temporary: Path, place: Path, paths: Iterable[PurePosixPath]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        temporary.rename(place)
        return
    for path in paths:
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (temporary / path).rename(place / path)


def _is_there(archive: Path, target: Path, entry: Entry) -> bool:
    """Whether the user has the file. One of another size is theirs, or the rest of an earlier try: they must say."""
    if not os.path.lexists(target):
        return False
    if target.is_file() and target.stat().st_size == entry.size:
        return True
    raise DataError(
        f"{target} is there, and is not the file of {size(entry.size)} in {archive.name}. It is not overwritten, and "
        "nothing was unpacked. Move it away or delete it, and run the same command again."
    )


def _pieces(archive: Path, entry: Entry) -> Iterator[bytes]:
    done = 0
    try:
        if (stream := entry.open()) is not None:
            with stream:
                while piece := stream.read(PIECE):
                    done += len(piece)
                    yield piece
    except _DAMAGE as error:
        raise _damaged(archive, error) from error
    if done != entry.size:
        raise _damaged(archive, f"{entry.name!r} has {done} bytes, not {entry.size}")


def _checked(path: Path, entries: Iterable[Entry]) -> dict[PurePosixPath, Entry]:
    """The files among the entries; of two of one name the last, as tar has it."""
    files: dict[PurePosixPath, Entry] = {}
    total = 0
    for number, entry in enumerate(entries, start=1):
        total += entry.size
        if reason := _harm(entry):
            raise _refused(path, f"its entry {entry.name[:200]!r} {reason}")
        if number > MAX_FILES:
            raise _refused(path, f"it has more than {MAX_FILES} entries")
        if total > MAX_BYTES:
            raise _refused(path, f"it would fill more than {size(MAX_BYTES)}")
        if entry.kind == "file":
            files[PurePosixPath(entry.name)] = entry
    folders = {folder for file in files for folder in file.parents}
    if both := next((file for file in files if file in folders), None):
        raise _refused(path, f"its entry {str(both)!r} is a file and a folder")
    return files


def _harm(entry: Entry) -> str:
    name = PurePosixPath(entry.name)
    if name.is_absolute() or ".." in name.parts or {"\\", ":", "\0"} & set(entry.name):
        return "could lead out of the folder"
    if entry.kind not in ("file", "folder"):
        return f"is {entry.kind}"
    return "has an impossible size" if entry.size < 0 else ""


def _tar_entries(archive: tarfile.TarFile) -> Iterator[Entry]:
    for info in archive:
        kind = "file" if info.isreg() else "folder" if info.isdir() else "a device"
        if info.issym() or info.islnk():
            kind = "a link"
        yield Entry(info.name, kind, info.size, partial(archive.extractfile, info))


def _zip_entries(archive: zipfile.ZipFile) -> Iterator[Entry]:
    for info in archive.infolist():
        mode = stat.S_IFMT(info.external_attr >> 16)  # 0 where the system that made it has no modes
        kind = "folder" if info.is_dir() else "file"
        if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
            kind = "a link" if stat.S_ISLNK(mode) else "a device"
        elif info.flag_bits & 1:
            kind = "encrypted"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = "compressed in an unusual way"
        yield Entry(info.filename, kind, info.file_size, partial(archive.open, info))


def _refused(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} is not unpacked: {reason}. Nothing was written. Delete it, and get it again from its authors."
    )


def _damaged(path: Path, error: Exception | str) -> DataError:
    return DataError(
        f"{path} is damaged or incomplete: {error}. Delete it, get it again, and run the same command again."
    )
