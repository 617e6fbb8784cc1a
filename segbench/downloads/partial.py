"""The part of a download that has arrived, and what is known of the remote file so that it can be continued."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from segbench.downloads.folders import CACHE_ELSEWHERE
from segbench.files import write_atomic


@dataclass(frozen=True)
class Remote:
    """What a server says of a file.

    Attributes:
        etag: its ETag, None when it has none.
        modified: its Last-Modified, None when it has none.
        total: its size in bytes, None when it is not told.
    """

    etag: str | None
    modified: str | None
    total: int | None

    @classmethod
    def of(cls, headers: Mapping[str, str], total: int | None) -> Remote:
        """From the headers of an answer."""
        return cls(headers.get("ETag"), headers.get("Last-Modified"), total)

    def condition(self) -> dict[str, str]:
        """``If-Range``: the rest, or all if the file has changed; not with a weak ETag (RFC 9110, 13.1.5)."""
        if self.etag and not self.etag.startswith("W/"):
            return {"If-Range": self.etag}
        return {"If-Range": self.modified} if self.modified and not self.etag else {}

    def may_be(self, other: Remote) -> bool:
        """Whether nothing shows that ``other`` is another file."""
        pairs = ((self.etag, other.etag), (self.modified, other.modified), (self.total, other.total))
        return all(mine is None or theirs is None or mine == theirs for mine, theirs in pairs)


@dataclass(frozen=True)
class Part:
    """A file that is being downloaded, ``<target>.part``; beside it ``<target>.part.json``, what its server said.

    Attributes:
        path: the file.
        elsewhere: how the user chooses another folder for it, for messages.
    """

    path: Path
    elsewhere: str = CACHE_ELSEWHERE

    @property
    def _notes(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def size(self) -> int:
        """The bytes that have arrived."""
        return self.path.stat().st_size if self.path.exists() else 0

    def remote(self) -> Remote | None:
        """What the server said when the part was begun; None when it cannot be continued."""
        try:
            return Remote(**json.loads(self._notes.read_text("utf-8"))) if self.size() else None
        except (OSError, ValueError, TypeError):
            return None

    def begin(self, remote: Remote | None) -> BinaryIO:
        """Opens the part for a download from the first byte; with None it is one that cannot be continued."""
        self._notes.unlink(missing_ok=True)
        self.path.write_bytes(b"")
        if remote is not None:
            write_atomic(self._notes, json.dumps(asdict(remote)).encode())
        return self.path.open("ab")

    def tail(self, start: int) -> bytes:
        """The bytes from ``start`` on."""
        with self.path.open("rb") as stream:
            stream.seek(start)
            return stream.read()

    def clear(self) -> None:
        """Forgets what has arrived."""
        self._notes.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def move_to(self, target: Path) -> None:
        """The finished part becomes the file."""
        self.path.replace(target)
        self._notes.unlink(missing_ok=True)


def total_size(headers: Mapping[str, str], *, start: int | None) -> int | None:
    """The size of the whole file by the headers of an answer, None when it is not told.

    Args:
        headers: of the answer.
        start: where a partial answer (206) must begin; None for a whole one.

    Raises:
        ValueError: a partial answer that begins elsewhere, or a size that is no number.

    >>> total_size({"Content-Range": "bytes 5-9/10"}, start=5), total_size({"Content-Length": "10"}, start=None)
    (10, 10)
    """
    if start is None:
        length = headers.get("Content-Length")
        return None if length is None else int(length)
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", "").strip())
    if not found or int(found[1]) != start:
        raise ValueError(f"asked for the bytes from {start} on, the answer has {headers.get('Content-Range')!r}")
    return None if found[3] == "*" else int(found[3])
