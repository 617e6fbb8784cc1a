"""Errors that a user can mend: each says what is wrong and the command or edit that mends it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class SegbenchError(Exception):
    """Base of all errors that segbench raises on purpose; the CLI prints them without a traceback."""

    exit_code = 1


class UsageError(SegbenchError):
    """An argument is out of range or unknown."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A model, data set, protocol, loss or recipe of that name does not exist; the nearest ones are named."""


class ModelError(SegbenchError):
    """A model cannot be loaded, or does not behave as the protocol needs."""


class DataError(SegbenchError):
    """A data set is missing, incomplete or damaged."""


class DownloadError(SegbenchError):
    """A file cannot be fetched, or what came is not the file that was asked for."""


class ContentError(SegbenchError):
    """A card, an entry or evidence is damaged or inconsistent."""


class RunError(SegbenchError):
    """A run directory cannot be used."""


class IncompleteError(SegbenchError):
    """Units of work are missing; run `evaluate` again to continue."""

    exit_code = 3


class ShardDoneError(IncompleteError):
    """A process has done its part of a run; other parts are missing."""


class PreemptedError(IncompleteError):
    """The system asked this process to stop (SIGTERM); what had begun is finished.

    Attributes:
        result: what the call would have returned, if nothing was left to do; else None.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


def difference(name: str, there: Any, here: Any) -> str:
    """A field that differs, with both values.

    >>> difference("iterations", 5, 9), difference("losses", ["mce"], ["mce", "js"]), difference("size", None, 512)
    ('iterations: 5 there, 9 here', 'losses: mce there, mce js here', 'size: none there, 512 here')
    """
    values = (each if isinstance(each, list | tuple) else [] if each is None else [each] for each in (there, here))
    old, new = (" ".join(map(str, each)) or "none" for each in values)
    return f"{name}: {old} there, {new} here"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name: the nearest known ones first.

    >>> unknown_name("data set", "camvd", ["camvid", "shapes"])
    "Unknown data set 'camvd'. Did you mean 'camvid'? Known: camvid, shapes."
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}."
