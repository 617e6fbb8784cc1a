"""What a change to a checkout does to cards and entries: the rules that a submission keeps.

The change is everything between the merge base with a revision and the files as they are now, so the same rules run
before a commit on one's own machine and in CI on a pull request. Nothing of the checkout is executed.
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
from typing import Any

from segbench import schemas
from segbench.entries.placement import MAX_WEIGHTS_BYTES
from segbench.errors import ContentError, UsageError

PLAIN, PROGRAM, LINK, SUBMODULE = "100644", "100755", "120000", "160000"  # modes of git
OF_A_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_CONFIG_PARAMETERS")
_TABLES = re.compile(r"<!-- (\w+): written by `segbench leaderboard`, do not edit -->.*?<!-- end of \1 -->", re.DOTALL)
GENERATED = ("README.md", "leaderboard/README.md")
_DATASET = r"[a-z0-9][a-z0-9_-]*"
_ID = r"[a-z0-9][a-z0-9_]{0,79}"
OWNED = re.compile(
    rf"model_zoo/{_DATASET}/(?P<card>{_ID})\.(?:json|safetensors)"
    rf"|entries/[a-z0-9-]+/{_DATASET}/(?P<entry>{_ID})\.(?:json|parquet)"
    rf"|entries/[a-z0-9-]+/{_DATASET}/(?P<beside>{_ID})\.(?:external|reproduced)/{_ID}\.(?:json|parquet)"
)
MEND = "A submission holds the files of its own model, and what `segbench leaderboard` writes."


@dataclass(frozen=True)
class Change:
    """One file of a change: ``status`` is A, M, D or T, ``mode`` the new mode of git, ``path`` with slashes."""

    status: str
    mode: str
    path: str

    @property
    def model(self) -> str | None:
        """The model that the file belongs to; None for a file of no model."""
        match = OWNED.fullmatch(self.path)
        return next((name for name in match.groups() if name), None) if match else None


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


def tree(root: Path, commit: str) -> dict[str, tuple[str, str]]:
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


def problems(root: Path, base: str, found: list[Change]) -> list[str]:
    """Which rules of a submission a change breaks, each with its mend; empty when all are kept.

    One pull request adds any number of new models, or changes one that is listed; it touches no other file; no score
    of a listed entry changes or vanishes without a line of its history.
    """
    texts, new, listed, beside = list[str](), set[str](), set[str](), set[str]()
    before = tree(root, base)
    for change in found:
        if change.path in GENERATED and change.status == "M":
            texts += _page(root, base, before, change)
            continue
        if change.model is None:
            name = os.fsencode(change.path).decode("utf-8", "replace")
            texts.append(f"{name}: not a file of a model. {MEND} Take it out: git checkout {base[:12]} -- FILE")
            continue
        if change.status != "A":
            listed.add(change.model)
        elif "." in change.path.split("/")[-2]:
            beside.add(change.model)
        else:
            new.add(change.model)
        if change.status != "D" and change.mode != "100644":
            texts.append(
                f"{change.path}: it is a link, a program or a submodule (mode {change.mode}): add a plain file."
            )
        if change.status != "D" and change.path.endswith((".parquet", ".safetensors")):
            texts += _alone(root, change.path)
        if change.status in "MDT":
            texts += _history(root, before, change)
    listed |= beside - new  # an addition to an entry that was there before
    new -= listed
    if listed and (new or len(listed) > 1):
        texts.append(
            f"it changes {', '.join(sorted(listed))}" + (f" and adds {', '.join(sorted(new))}" if new else "") + ": "
            "one pull request adds new models, or changes one that is listed. Make one of each."
        )
    return texts


def _page(root: Path, base: str, before: Mapping[str, tuple[str, str]], change: Change) -> list[str]:
    """Of a generated page only the tables may change."""
    if change.mode == PLAIN:
        both = (*blobs(root, [before[change.path][1]]), (root / change.path).read_bytes())
        pages = [_TABLES.sub("", data.decode("utf-8", "replace").replace("\r\n", "\n")) for data in both]
        if pages[0] == pages[1]:
            return []
    return [f"{change.path}: something else than its tables changed. Restore it: git checkout {base[:12]} -- FILE"]


def _alone(root: Path, path: str) -> list[str]:
    """Data need the document that names them, and stay small: everybody downloads them with the package."""
    file, found = root / path, []
    try:
        document = schemas.parse(file.with_suffix(".json").read_text("utf-8"), source=path)
        sources = document["sources"] if file.suffix == ".safetensors" else [document["evidence"] or {}]
        named = file.name in [source.get("file") for source in sources]
    except (OSError, UnicodeDecodeError, ContentError, KeyError, TypeError, AttributeError):
        named = False
    if not named:
        found.append(f"{path}: no {file.stem}.json beside it names this file. Add it, or take the file out.")
    if not file.is_symlink() and file.is_file() and (size := file.stat().st_size) > MAX_WEIGHTS_BYTES:
        found.append(f"{path}: {size} bytes; larger weights go to the Hub: segbench publish.")
    return found


def _history(root: Path, before: Mapping[str, tuple[str, str]], change: Change) -> list[str]:
    """An entry that was listed keeps its scores, or says in its history why they changed."""
    match = re.fullmatch(rf"entries/[^/]+/[^/]+/{_ID}\.json", change.path)
    if not match:
        if change.status == "D":
            return [f"{change.path}: it is deleted: what was published stays. Restore it."]
        return []
    if change.status == "D":
        return [f"{change.path}: an entry is deleted: what was published stays. Restore it."]
    try:
        (published,) = blobs(root, [before[change.path][1]])
        was = schemas.parse(published.decode("utf-8"), source=f"{change.path} before")
        after = schemas.parse((root / change.path).read_text("utf-8"), source=change.path)
        old, new = _scores(was), _scores(after)
        told = list(was.get("history", [])), list(after["history"])
    except (OSError, ValueError, ContentError, KeyError, TypeError, AttributeError) as error:
        return [f"{change.path}: it cannot be compared with what was published: {error}"]
    if told[1][: len(told[0])] != told[0]:
        return [f"{change.path}: lines of its history were changed or removed: restore them, add new ones below."]
    differences = [
        f"{where} {value:g} -> {'gone' if where not in new else format(new[where], 'g')}"
        for where, value in old.items()
        if new.get(where) != value
    ]
    if differences and len(told[1]) == len(told[0]):
        return [
            f"{change.path}: published scores changed or vanished ({'; '.join(differences[:4])}) without a line in "
            '`history`: add {"date": ..., "text": why} at its end.'
        ]
    return []


def _scores(entry: Mapping[str, Any]) -> dict[str, float]:
    found = {f"clean {metric}": entry["clean"][metric] for metric in ("aacc", "miou")}
    for row in entry["results"]:
        for metric in ("aacc", "miou"):
            found[f"{metric} at ε = {row['eps_255']:g}/255"] = row[metric]
    known = {where: value for where, value in found.items() if value is not None}
    if wrong := [where for where, value in known.items() if not isinstance(value, int | float)]:
        raise TypeError(f"{wrong[0]} is no number")
    return known
