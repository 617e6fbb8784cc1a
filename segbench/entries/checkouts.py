"""Checkouts of git that come from strangers: which files a change touches, and what was committed.

Nothing of a checkout is executed: git is asked only for what its own files say, and files are hashed here, because git
would run the filters that a checkout's configuration names.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from segbench.errors import UsageError

PLAIN, PROGRAM, LINK, SUBMODULE = "100644", "100755", "120000", "160000"  # modes of git
OF_A_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_CONFIG_PARAMETERS")
_DATASET = r"[a-z0-9][a-z0-9_-]*"
_ID = r"[a-z0-9][a-z0-9_]{0,79}"
OWNED = re.compile(
    rf"model_zoo/{_DATASET}/(?P<card>{_ID})\.(?:json|safetensors)"
    rf"|entries/[a-z0-9-]+/{_DATASET}/(?P<entry>{_ID})\.(?:json|parquet)"
    rf"|entries/[a-z0-9-]+/{_DATASET}/(?P<beside>{_ID})\.(?:external|reproduced)/{_ID}\.(?:json|parquet)"
)

Tree = Mapping[str, tuple[str, str]]  # path -> mode and object id


@dataclass(frozen=True)
class Change:
    """One file of a change: ``status`` is A, M, D or T, ``mode`` the new mode of git, ``path`` with slashes."""

    status: str
    mode: str
    path: str

    @property
    def kind(self) -> str | None:
        """``card``, ``entry`` or ``beside`` (an addition) with their data; None for a file of no model."""
        match = OWNED.fullmatch(self.path)
        return match.lastgroup if match else None

    @property
    def model(self) -> str | None:
        """The model that the file belongs to; None for a file of no model."""
        match = OWNED.fullmatch(self.path)
        return match[match.lastgroup or 0] if match else None


def changes(root: Path, revision: str) -> tuple[str, list[Change]]:
    """The commit that a checkout's change is measured from, and every file that it touches, untracked ones included.

    Files are hashed here, not by git, which would run the filters that a checkout's configuration names.

    Raises:
        UsageError: git is missing, ``root`` is not the top of a checkout, or git does not know ``revision``.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./~^@{}-]{0,200}", revision):
        raise UsageError(f"{revision!r} names no revision of git. Try: --changed origin/main")
    _check_top(root)
    base = _git(root, "merge-base", "--end-of-options", revision, "HEAD").decode().strip()
    before, found = tree(root, base), []
    now = _working_tree(root)
    for path, (mode, oid) in before.items():
        if path not in now:
            found.append(Change("D", "000000", path))
        elif now[path] != mode or not _holds(root / path, mode, oid):
            found.append(Change("M", now[path], path))
    found += [Change("A", mode, path) for path, mode in now.items() if path not in before]
    return base, sorted(found, key=lambda change: change.path)


def tree(root: Path, commit: str) -> Tree:
    """Path -> mode and object id of every file of a commit."""
    found = {}
    for line in _split(_git(root, "ls-tree", "-r", "-z", "--full-tree", commit)):
        about, _, path = line.partition("\t")
        mode, _, oid = about.split(" ")
        found[path] = (mode, oid)
    return found


def blobs(root: Path, oids: Sequence[str]) -> list[bytes]:
    """The contents of files of a commit, as they were committed."""
    answer, found = _git(root, "cat-file", "--batch", stdin="".join(f"{oid}\n" for oid in oids).encode()), []
    for oid in oids:
        about, _, rest = answer.partition(b"\n")  # oid, type, size
        if about.endswith(b"missing"):
            raise UsageError(f"{oid[:12]} is missing from {root}: fetch the whole history. git fetch --unshallow")
        size = int(about.split(b" ")[2])
        found.append(rest[:size])
        answer = rest[size + 1 :]
    return found


def committed(root: Path, path: str) -> bytes | None:
    """A file as the last commit has it; None if it has none.

    Raises:
        UsageError: ``root`` is not the top of a checkout with a commit.
    """
    _check_top(root)
    found = tree(root, "HEAD").get(path)
    return blobs(root, [found[1]])[0] if found else None


def _check_top(root: Path) -> None:
    top = _git(root, "rev-parse", "--show-toplevel").decode(errors="replace").rstrip("\n")
    if Path(top).resolve() != root.resolve():
        raise UsageError(f"{root} is a folder inside a checkout. Give its top: --root {top}")


def _working_tree(root: Path) -> dict[str, str]:
    """Path -> mode of every file of the working tree that is not ignored; a mode that no file has for others."""
    found = {}
    for line in _split(_git(root, "ls-files", "-z", "--stage", "--cached")):
        about, _, path = line.partition("\t")
        if about.startswith(SUBMODULE):
            found[path] = SUBMODULE
        elif (mode := _mode(root / path)) is not None:
            found[path] = mode
    for path in _split(_git(root, "ls-files", "-z", "--others", "--exclude-standard")):
        found[path] = SUBMODULE if path.endswith("/") else _mode(root / path) or PLAIN
    return found


def _mode(path: Path) -> str | None:
    """The mode that git would give a file; None if there is none."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return PLAIN  # a name that cannot be looked at is told as one that belongs to no model
    if stat.S_ISLNK(found.st_mode):
        return LINK
    if stat.S_ISDIR(found.st_mode):
        return SUBMODULE
    return PROGRAM if os.name == "posix" and found.st_mode & stat.S_IXUSR else PLAIN


def _holds(path: Path, mode: str, oid: str) -> bool:
    """Whether a file has the content of a git object, or did before its line ends were converted."""
    if mode == SUBMODULE:
        return True  # what is in it is no part of this repository
    data = os.fsencode(os.readlink(path)) if mode == LINK else path.read_bytes()
    return any(_oid(each, len(oid)) == oid for each in (data, data.replace(b"\r\n", b"\n")))


def _oid(data: bytes, digits: int) -> str:
    digest = hashlib.sha1 if digits == 40 else hashlib.sha256
    return digest(b"blob %d\0" % len(data) + data).hexdigest()


def _split(listing: bytes) -> list[str]:
    return [os.fsdecode(part) for part in listing.split(b"\0")[:-1]]


def _git(root: Path, *args: str, stdin: bytes = b"") -> bytes:
    """What git says of a checkout of strangers: hooks, monitors and programs of its configuration do not run.

    Only commands are used that read git's own files, and nothing is fetched.
    """
    command = ["git", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}", "-C", str(root), *args]
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_REPOSITORY}
    environment |= {"GIT_ALLOW_PROTOCOL": "", "GIT_NO_LAZY_FETCH": "1", "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, check=False, env=environment, input=stdin)
    except OSError as error:
        raise UsageError(f"git cannot be run: {error}. Install it.") from error
    if done.returncode:
        said = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it failed"])[0]
        raise UsageError(f"git {args[0]} in {root}: {said}. Is it a checkout with that revision? git fetch origin")
    return done.stdout
