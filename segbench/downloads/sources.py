"""What a source of a file can do, and the source that is a file beside the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from segbench.downloads.checks import Expected
from segbench.downloads.transfer import Limits
from segbench.errors import DownloadError


class Source(Protocol):
    """A place that a file comes from.

    Attributes:
        document: the source as the card has it.
        remote: whether it is elsewhere, so that a file of it without a pinned hash is remembered.
    """

    remote: ClassVar[bool]

    @property
    def document(self) -> Mapping[str, Any]:
        """See above."""

    def cached(self) -> Path | None:
        """The file, if it is on this machine; nothing is checked."""

    def lock_file(self) -> Path:
        """Held while downloading."""

    def download(self, expected: Expected, *, name: str, progress: bool, limits: Limits) -> tuple[Path, str]:
        """Gets the file although `cached` has none, or a damaged one; returns it with its SHA-256.

        Raises:
            DownloadError: it cannot be had, or is not what is expected; then it is not left behind.
        """

    def by_hand(self) -> str:
        """How a person gets the file to where `cached` finds it."""


@dataclass(frozen=True)
class PackageSource:
    """A file beside the card. It belongs to the user: never written, removed or remembered."""

    document: Mapping[str, Any]
    folder: Path | None
    remote: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses names that lead elsewhere."""
        file = text(self.document, "file")
        if Path(file).name != file:
            raise DownloadError(f"The package file {file!r} is not the name of a file beside the card.")

    def cached(self) -> Path | None:
        """See `Source`."""
        path = self.folder / self.document["file"] if self.folder else None
        return path if path and path.is_file() else None

    def lock_file(self) -> Path:
        """See `Source`; nothing is downloaded."""
        raise DownloadError(f"{self._place()} is missing")

    def download(self, expected: Expected, *, name: str, progress: bool, limits: Limits) -> tuple[Path, str]:
        """See `Source`: there is nowhere to get it from."""
        if path := self.cached():
            return path, expected.check(path)
        raise DownloadError(f"{self._place()} is missing")

    def by_hand(self) -> str:
        """See `Source`."""
        return f"put the file at {self._place()}"

    def _place(self) -> str:
        return str(self.folder / self.document["file"]) if self.folder else f"{self.document['file']} beside the card"


def text(document: Mapping[str, Any], key: str) -> str:
    """A field of a source.

    Raises:
        DownloadError: it is missing or no text.
    """
    value = document.get(key)
    if not isinstance(value, str) or not value:
        raise DownloadError(f"The source {dict(document)!r} needs {key!r}. Correct it in the card.")
    return value
