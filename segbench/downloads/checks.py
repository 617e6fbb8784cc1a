"""What a file must be: neither a web page nor text, and of the hash that the card pins or that this machine remembers.

A card may pin no hash, as long as nobody has published one. The hash of the first file that arrives is then remembered
in ``<cache>/pins``, by the name and the source, and another file is refused from then on.
"""

from __future__ import annotations

import html
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from segbench.downloads.folders import cache_folder, disk_error
from segbench.errors import DownloadError
from segbench.files import create_atomic, sha256_bytes, sha256_file

HEAD_BYTES = 1 << 16
LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Expected:
    """The hash that a file must have.

    Attributes:
        sha256: None when nothing is known of the file.
        origin: who says so.
        mend: what to do if the authors replaced the file on purpose.
    """

    sha256: str | None
    origin: str = ""
    mend: str = ""

    def check(self, path: Path, *, called: str = "") -> str:
        """The SHA-256 of a file that is what it must be.

        Args:
            path: the file.
            called: what it is in messages, by default its path.

        Raises:
            DownloadError: it cannot be read, is empty, is a web page, or has another hash.
        """
        try:
            with path.open("rb") as stream:
                head = stream.read(HEAD_BYTES)
            digest = sha256_file(path)
        except OSError as error:
            raise DownloadError(f"cannot read {path}: {error.strerror or error}") from error
        if what := no_weights(head):
            raise DownloadError(f"{called or path} is {what}.")
        if self.sha256 not in (None, digest):
            raise DownloadError(
                f"{called or path} is not the file that is expected: its SHA-256 is {digest}, "
                f"{self.origin} {self.sha256}. {self.mend}"
            )
        return digest


def by_card(sha256: str) -> Expected:
    """What a card pins."""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise DownloadError(
            f"{sha256[:100]!r} is no SHA-256: 64 lower case hexadecimal digits. Correct it in the card."
        )
    return Expected(sha256, "the card pins", "If the authors replaced it on purpose, the card needs the new hash.")


def remembered(name: str, source: Mapping[str, Any]) -> Expected:
    """What this machine remembers of a file whose card pins no hash; nothing at first."""
    path = pin_file(name, source)
    try:
        document = json.loads(path.read_text("utf-8"))
        digest = document["sha256"]
    except (FileNotFoundError, NotADirectoryError):  # a cache that cannot be a folder is told when it is written
        return Expected(None)
    except (OSError, ValueError, KeyError, TypeError):
        digest = None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise DownloadError(f"Cannot read {path}, which remembers the hash of {name}. Delete it.")
    return Expected(
        digest, "this machine remembers", f"If the authors replaced it on purpose: delete {path} and try again."
    )


def remember(name: str, path: Path, sha256: str, source: Mapping[str, Any]) -> None:
    """Remembers the hash of the first file of that name and source.

    Raises:
        DownloadError: another process has just remembered another hash.
    """
    known = remembered(name, source)
    if known.sha256 is None:
        document = {
            "name": name,
            "sha256": sha256,
            "source": dict(source),
            "bytes": path.stat().st_size,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        pin = pin_file(name, source)
        log = logging.getLogger("segbench")
        try:
            written = create_atomic(pin, (json.dumps(document, indent=2) + "\n").encode())
        except OSError as error:
            reason = disk_error(error, pin.parent)
            log.warning("SHA-256 of %s is %s (its card pins none); it is not remembered: %s", name, sha256, reason)
            return
        if written:
            log.warning(
                "SHA-256 of %s is %s (its card pins none); remembered in %s, a different file will be refused.",
                name, sha256, pin,
            )  # fmt: skip
            return
        known = remembered(name, source)
    known.check(path)


def pin_file(name: str, source: Mapping[str, Any]) -> Path:
    """Where the hash is remembered; a card of the same name with another source has another one."""
    key = sha256_bytes(json.dumps(dict(source), sort_keys=True).encode())[:8]
    return cache_folder() / "pins" / f"{name}-{key}.json"


def no_weights(head: bytes) -> str | None:
    r"""What a file is that begins so and cannot be weights, and what to do; None if it may be weights.

    >>> no_weights(b"PK\x03\x04"), no_weights(b'{"error": "not found"}')
    (None, 'text, not weights: \'{"error": "not found"}\'')
    """
    if not head:
        return "empty. Fetch or copy the file again"
    if is_page(head):
        return f"a web page, not weights: {title(head)}. Fetch the file itself, by the link behind its download button"
    if head.startswith(LFS):
        return (
            "a pointer of git-lfs, not the weights themselves. In the repository: git lfs install && git lfs pull; or "
            "fetch the file by its download link"
        )
    if is_text(head):
        start = "".join(char for char in head[:100].decode("utf-8", "replace") if char.isprintable())
        return f"text, not weights: {start!r}"
    return None


def is_page(head: bytes, content_type: str = "") -> bool:
    r"""Whether an answer is a web page, by its first bytes, or by its type unless its bytes are binary.

    >>> is_page(b"\xef\xbb\xbf \n<!DOCTYPE html><html>"), is_page(b"PK\x03\x00", "text/html")
    (True, False)
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:16].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return True
    return (
        content_type.partition(";")[0].strip().lower() in ("text/html", "application/xhtml+xml") and b"\0" not in head
    )


def is_text(head: bytes) -> bool:
    r"""Whether the first bytes are text, as an error message in place of a file is; weights never are.

    >>> is_text(b'{"error": "not found"}\n'), is_text(b"PK\x03\x04"), is_text(b"\x80\x02}q\x00.")
    (True, False, False)
    """
    try:
        text = head[:1024].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < min(len(head), 1024) - 3:  # not a character that the cut divides
            return False
        text = head[: error.start].decode("utf-8")
    return all(char.isprintable() or char in "\t\r\n" for char in text)


def title(page: bytes) -> str:
    r"""The title of a web page, in quotes and printable.

    >>> title(b"<html><title> Sign\n in &amp; \x1b[31mgo</title>")
    "'Sign in & [31mgo'"
    """
    match = re.search(r"<title[^>]*>(.*?)</title", page.decode("utf-8", "replace"), re.IGNORECASE | re.DOTALL)
    text = " ".join(html.unescape(match[1]).split()) if match else ""
    text = "".join(char for char in text if char.isprintable())[:100]
    return f"'{text}'" if text else "(a page without a title)"
