"""Atomic writes and hashes."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from segbench.files import create_atomic, sha256_bytes, sha256_file, write_atomic


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
