"""What a change to a checkout does to cards and entries: the rules that a submission keeps.

The change is everything between the merge base with a revision and the files as they are now, so the same rules run
before a commit on one's own machine and in CI on a pull request. Nothing of the checkout is executed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segbench import schemas
from segbench.errors import ContentError, UsageError

GENERATED = ("README.md", "leaderboard/README.md")
_DATASET = r"[a-z0-9][a-z0-9_-]*"
_ID = r"[a-z0-9][a-z0-9_]{0,79}"
OWNED = re.compile(
    rf"model_zoo/{_DATASET}/(?P<card>{_ID})\.(?:json|safetensors)"
    rf"|entries/[a-z0-9-]+/{_DATASET}/(?P<entry>{_ID})\.(?:json|parquet)"
    rf"|entries/[a-z0-9-]+/{_DATASET}/(?P<beside>{_ID})\.(?:external|reproduced)/{_ID}\.(?:json|parquet)"
)
MAX_WEIGHTS_BYTES = 10_000_000
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

    Raises:
        UsageError: git is missing, ``root`` is no checkout, or it does not know ``revision``.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./~^@{}-]{0,200}", revision):
        raise UsageError(f"{revision!r} names no revision of git. Try: --changed origin/main")
    base = _git(root, "merge-base", "--end-of-options", revision, "HEAD").strip()
    raw = _git(root, "diff", "--raw", "-z", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-abbrev", base, "--")
    fields = raw.split("\0")[:-1]
    found = []
    for about, path in zip(fields[::2], fields[1::2], strict=True):
        _, mode, _, _, status = about.removeprefix(":").split(" ")
        found.append(Change(status[0], mode, path))
    others = _git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0")[:-1]
    for path in others:
        mode = "120000" if (root / path).is_symlink() else "100644"
        found.append(Change("A", mode, path))
    return base, sorted(found, key=lambda change: change.path)


def _git(root: Path, *args: str) -> str:
    """What git says of a checkout of strangers; hooks, monitors and programs of its configuration do not run."""
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=", "-C", str(root), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    except OSError as error:
        raise UsageError(f"git cannot be run: {error}. Install it.") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it failed"])[0]
        raise UsageError(f"git {args[0]} in {root}: {said}. Is it a checkout with that revision? git fetch origin")
    return done.stdout


def problems(root: Path, base: str, found: list[Change]) -> list[str]:
    """Which rules of a submission a change breaks, each with its mend; empty when all are kept.

    One pull request adds any number of new models, or changes one that is listed; it touches no other file; no score
    of a listed entry changes or vanishes without a line of its history.
    """
    texts, new, listed = list[str](), set[str](), set[str]()
    for change in found:
        if change.path in GENERATED and change.status == "M":
            continue
        if change.model is None:
            texts.append(f"{change.path}: not a file of a model. {MEND} Take it out: git checkout {base[:12]} -- FILE")
            continue
        adds = change.status == "A" and "." not in change.path.split("/")[-2]  # not beside an entry that is listed
        (new if adds else listed).add(change.model)
        if change.status != "D" and change.mode != "100644":
            texts.append(
                f"{change.path}: it is a link, a program or a submodule (mode {change.mode}): add a plain file."
            )
        if change.status != "D" and change.path.endswith((".parquet", ".safetensors")):
            texts += _alone(root, change.path)
        if change.status in "MDT":
            texts += _history(root, base, change)
    new -= listed
    if listed and (new or len(listed) > 1):
        texts.append(
            f"it changes {', '.join(sorted(listed))}" + (f" and adds {', '.join(sorted(new))}" if new else "") + ": "
            "one pull request adds new models, or changes one that is listed. Make one of each."
        )
    return texts


def _alone(root: Path, path: str) -> list[str]:
    """Data need the document that names them, and stay small: everybody downloads them with the package."""
    file, found = root / path, []
    if not file.with_suffix(".json").is_file():
        found.append(f"{path}: no {file.stem}.json beside it names this file. Add it, or take the file out.")
    if not file.is_symlink() and file.is_file() and (size := file.stat().st_size) > MAX_WEIGHTS_BYTES:
        found.append(f"{path}: {size} bytes; larger weights go to the Hub: segbench publish.")
    return found


def _history(root: Path, base: str, change: Change) -> list[str]:
    """An entry that was listed keeps its scores, or says in its history why they changed."""
    match = re.fullmatch(rf"entries/[^/]+/[^/]+/{_ID}\.json", change.path)
    if not match:
        if change.status == "D":
            return [f"{change.path}: it is deleted: what was published stays. Restore it."]
        return []
    if change.status == "D":
        return [f"{change.path}: an entry is deleted: what was published stays. Restore it."]
    try:
        before = schemas.parse(_git(root, "show", f"{base}:{change.path}"), source=f"{change.path} before")
        after = schemas.parse((root / change.path).read_text("utf-8"), source=change.path)
        old, new = _scores(before), _scores(after)
        told = list(before.get("history", [])), list(after["history"])
    except (OSError, UnicodeDecodeError, ContentError, KeyError, TypeError, AttributeError) as error:
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
    return {where: value for where, value in found.items() if value is not None}
