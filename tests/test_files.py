"""Atomic writes and hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from segbench.engine.rundir.lock import claim_shard
from segbench.files import create_atomic, sha256_bytes, sha256_file, write_atomic
from segbench.training.checkpoint import own_folder
from segbench.training.distributed import Processes


@pytest.fixture
def umask() -> Iterator[None]:
    """The usual one, whatever the shell has."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_write_and_replace(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "f.json"
    write_atomic(path, b"one")
    assert path.read_bytes() == b"one"
    write_atomic(path, b"")
    assert path.read_bytes() == b""
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_content_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_create_never_replaces(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    assert create_atomic(path, b"first")
    assert not create_atomic(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "f.json", b"new")
    assert list(tmp_path.iterdir()) == []


def test_the_content_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced before it is renamed, the folder after."""
    calls = []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def rename(source: str, target: Path) -> None:
        assert Path(source).parent == target.parent
        assert Path(source).read_bytes() == b"new"
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write_atomic(tmp_path / "f.json", b"new")
    assert calls == ["file", "rename", "folder"]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The files and folders that are synced, by device and inode, in order."""
    done, sync = list[tuple[int, int]](), os.fsync

    def fsync(handle: int) -> None:
        done.append(identity(os.fstat(handle)))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return done


def identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


@pytest.mark.skipif(os.name != "posix", reason="folders are synced on POSIX")
@pytest.mark.parametrize("write", [write_atomic, create_atomic])
def test_the_names_of_a_file_and_of_each_new_folder_are_synced(
    tmp_path: Path, synced: list[tuple[int, int]], write: Callable[[Path, bytes], object]
) -> None:
    """Else a power loss may take the folder, and the file in it, after the call has returned."""
    path = tmp_path / "runs" / "run" / "units" / "f"
    write(path, b"new")
    chain = [tmp_path, tmp_path / "runs", tmp_path / "runs" / "run", path, path.parent]
    assert synced == [identity(each.stat()) for each in chain]
    synced.clear()
    write(path.with_name("g"), b"another")  # no folder is new
    assert synced == [identity(each.stat()) for each in (path.with_name("g"), path.parent)]


def test_new_folders_are_synced_where_a_lock_makes_them(tmp_path: Path, synced: list[tuple[int, int]]) -> None:
    """The lock of a run, and that of a training, come before their files."""
    with (
        claim_shard(tmp_path / "runs" / "run", "1/1", "cpu"),
        own_folder(tmp_path / "train", Processes(torch.device("cpu"))),
    ):
        pass
    above = [tmp_path, tmp_path / "runs", tmp_path / "runs" / "run"]
    assert {identity(each.stat()) for each in above} <= set(synced)
    assert synced.count(identity(tmp_path.stat())) == 2


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF])
@pytest.mark.parametrize("failing", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, number: int
) -> None:
    fail_on_folders(monkeypatch, failing, number)
    write_atomic(tmp_path / "new" / "f", b"one")
    assert create_atomic(tmp_path / "new" / "g", b"two")
    assert [(tmp_path / "new" / name).read_bytes() for name in "fg"] == [b"one", b"two"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENOENT])
@pytest.mark.parametrize("failing", ["open", "fsync"])
def test_an_error_of_the_disk_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, number: int
) -> None:
    fail_on_folders(monkeypatch, failing, number)
    for write in (write_atomic, create_atomic):
        with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
            write(tmp_path / write.__name__, b"new")
        assert caught.value.errno == number


def test_the_data_of_a_file_must_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a folder may refuse, a file may not."""

    def fsync(handle: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Invalid argument"):
        write_atomic(tmp_path / "f", b"new")
    assert list(tmp_path.iterdir()) == []


def fail_on_folders(monkeypatch: pytest.MonkeyPatch, failing: str, number: int) -> None:
    """As file systems do that do not open, or do not sync, a folder."""
    original = getattr(os, failing)

    def fail(what: Any, *arguments: Any, **options: Any) -> Any:
        if stat.S_ISDIR(os.stat(what).st_mode) if os.path.exists(what) else False:
            raise OSError(number, os.strerror(number))
        return original(what, *arguments, **options)

    monkeypatch.setattr(os, failing, fail)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_follow_the_umask(tmp_path: Path, umask: None) -> None:
    """A temporary file is private; the written one is readable like any other."""
    write_atomic(tmp_path / "f", b"")
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o644
    os.umask(0o077)
    write_atomic(tmp_path / "g", b"")
    assert stat.S_IMODE((tmp_path / "g").stat().st_mode) == 0o600
    assert os.umask(0o022) == 0o077  # and the umask is as it was


@pytest.mark.slow
def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """Another process rewrites a file of 1 MB while this one reads it."""
    path = tmp_path / "f"
    write_atomic(path, b"a" * 1_000_000)
    code = (
        "import sys, pathlib; from segbench.files import write_atomic\n"
        "for n in range(40): write_atomic(pathlib.Path(sys.argv[1]), bytes([97 + n % 26]) * 1_000_000)"
    )
    seen = set()
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as writer:
        while writer.poll() is None:
            data = path.read_bytes()
            assert len(data) == 1_000_000
            assert len(set(data)) == 1
            seen.add(data[:1])
    assert writer.returncode == 0
    assert len(seen) > 1


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 2**21 + 7])
def test_sha256_file(tmp_path: Path, size: int) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_sha256_of_the_standard() -> None:
    """FIPS 180-2, appendix B.1."""
    assert sha256_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sha256_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256_file(tmp_path / "none")
