"""A file behind a link, kept in ``<cache>/weights``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from segbench.downloads import links, transfer
from segbench.downloads.checks import Expected
from segbench.downloads.folders import cache_folder, disk_error, safe_file_name
from segbench.downloads.partial import Part
from segbench.downloads.progress import bar
from segbench.downloads.sources import text
from segbench.errors import DownloadError
from segbench.files import sha256_bytes


@dataclass(frozen=True)
class UrlSource:
    """A link as the authors published it; `links.direct` is what is requested."""

    document: Mapping[str, Any]
    remote: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuses links that are not followed."""
        if reason := links.problem(self._url()):
            raise DownloadError(f"The link {self._url()[:200]!r} of a source is not usable: {reason}.")

    def _url(self) -> str:
        return text(self.document, "url")

    def _target(self) -> Path:
        name = safe_file_name(unquote(PurePosixPath(urlsplit(self._url()).path).name))
        return cache_folder() / "weights" / sha256_bytes(self._url().encode())[:16] / name

    def cached(self) -> Path | None:
        """See `Source`."""
        target = self._target()
        return target if target.is_file() else None

    def lock_file(self) -> Path:
        """See `Source`."""
        target = self._target()
        return target.with_name(target.name + ".lock")

    def download(self, expected: Expected, *, name: str, progress: bool, limits: transfer.Limits) -> tuple[Path, str]:
        """See `Source`. The file appears at its place only when all of it is there and right."""
        target = self._target()
        part = Part(target.with_name(target.name + ".part"))
        with bar(name, enabled=progress) as report:
            transfer.download(links.direct(self._url()), part, limits=limits, report=report)
        try:
            digest = expected.check(part.path, called="what arrived")
        except DownloadError:
            part.clear()
            raise
        try:
            part.move_to(target)
        except OSError as error:
            raise disk_error(error, target.parent) from error
        return target, digest

    def by_hand(self) -> str:
        """See `Source`."""
        return f"open {self._url()} in a browser and save the file as {self._target()}"
