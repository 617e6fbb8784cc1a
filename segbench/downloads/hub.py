"""A file of a repository on the Hugging Face Hub, in the client's own cache.

``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN`` and the rest are read by huggingface_hub itself.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from segbench.downloads.checks import Expected
from segbench.downloads.folders import FULL, cache_folder, disk_error
from segbench.downloads.sources import text
from segbench.downloads.transfer import Limits
from segbench.errors import DownloadError
from segbench.files import sha256_bytes, sha256_file

LOGIN = "set HF_TOKEN, or run: hf auth login"


@dataclass(frozen=True)
class HubSource:
    """A file of one commit; a branch could change."""

    document: Mapping[str, Any]
    remote: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuses what does not name one file of one commit."""
        for key in ("repo", "revision", "file"):
            text(self.document, key)
        if not re.fullmatch("[0-9a-f]{40}", self.document["revision"]):
            raise DownloadError(
                f"The revision {self.document['revision']!r} of {self.document['repo']} is no commit. "
                "Put its 40 hexadecimal digits in the card; a branch could change."
            )
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.document["repo"], re.ASCII):
            raise DownloadError(f"The repository {self.document['repo']!r} of a source is not user/name.")
        if any(part in ("", ".", "..") for part in self.document["file"].split("/")) or "\\" in self.document["file"]:
            raise DownloadError(f"The file {self.document['file']!r} of a source is not a path inside a repository.")

    def _parts(self) -> tuple[str, str, str]:
        return self.document["repo"], self.document["revision"], self.document["file"]

    def cached(self) -> Path | None:
        """See `Source`."""
        from huggingface_hub import try_to_load_from_cache

        repo, revision, file = self._parts()
        try:
            found = try_to_load_from_cache(repo, file, revision=revision)
        except ValueError as error:  # of names that the Hub does not allow
            raise DownloadError(f"The repository {repo!r} of a source cannot exist on the Hub: {error}") from error
        return Path(found) if isinstance(found, str) else None

    def lock_file(self) -> Path:
        """See `Source`. The client's own lock says nothing to a person who waits."""
        key = sha256_bytes("\n".join(self._parts()).encode())[:16]
        return cache_folder() / "locks" / f"hub-{key}.lock"

    def download(self, expected: Expected, *, name: str, progress: bool, limits: Limits) -> tuple[Path, str]:
        """See `Source`. A damaged file in the client's cache is replaced."""
        if (path := self.cached()) and _is_the_hubs(path):
            return path, expected.check(path, called="what the Hub has")
        with _bars(progress):
            path = self._tried_again(limits)
        try:
            return path, expected.check(path, called="what arrived")
        except DownloadError:
            if not _is_the_hubs(path):
                _discard(path)
            raise

    def _tried_again(self, limits: Limits) -> Path:
        """The client tries again by itself, but not after all that may pass while the body is sent."""
        for attempt in range(1, limits.attempts + 1):
            try:
                return self._client()
            except _PassingError as error:
                pause = limits.pause_s * 2 ** (attempt - 1)
                if attempt == limits.attempts:
                    raise DownloadError(f"{error} (tried {attempt} times). Try later.") from error
                logging.getLogger("segbench").warning("%s; trying again in %.3g s.", error, pause)
                time.sleep(pause)
        raise DownloadError("no attempt is allowed")

    def _client(self) -> Path:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        # HTTPError of requests, httpx or httpx2, whichever this version of the client is built on.
        transport: type[Exception] = HfHubHTTPError.__bases__[0]
        repo, revision, file = self._parts()
        if not constants.ENDPOINT.startswith(("https://", "http://")):
            raise DownloadError(f"HF_ENDPOINT is {constants.ENDPOINT!r}, not a link. Correct or unset it")
        try:
            with _aside(self.cached()) as damaged:
                return Path(hf_hub_download(repo, file, revision=revision, force_download=damaged))
        except (transport, OSError, ValueError, RuntimeError) as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> Exception:
        """An error of the client in our words."""
        from huggingface_hub import constants, errors

        repo, revision, file = self._parts()
        if isinstance(error, errors.LocalEntryNotFoundError | ValueError) and isinstance(error.__cause__, Exception):
            cause = self._told(error.__cause__)  # the client has tried several times
            return DownloadError(f"{cause}. Try again later") if isinstance(cause, _PassingError) else cause
        if isinstance(error, errors.GatedRepoError):
            return DownloadError(f"{repo} is gated. Accept its terms at https://huggingface.co/{repo}, then {LOGIN}")
        if isinstance(error, errors.RepositoryNotFoundError):
            return DownloadError(f"the Hub has no public repository {repo}. If it is private: {LOGIN}")
        if isinstance(error, errors.RevisionNotFoundError):
            return DownloadError(f"{repo} has no commit {revision}. Correct the revision in the card")
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return DownloadError(f"{repo} has no file {file} in commit {revision}. Correct the file in the card")
        if isinstance(error, errors.HfHubHTTPError):
            return _status(error)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return DownloadError("the Hub's client is set offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)")
        if isinstance(error, errors.FileMetadataError):
            return DownloadError(
                "the server does not answer as the Hub does. Check HF_ENDPOINT, and whether a proxy is in between"
            )
        if isinstance(error, OSError) and (error.errno in FULL or error.filename is not None):
            return disk_error(error, Path(constants.HF_HUB_CACHE), elsewhere="set HF_HOME to a folder elsewhere")
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        return _PassingError(f"the connection to {constants.ENDPOINT} failed: {reason}")

    def by_hand(self) -> str:
        """See `Source`."""
        from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE

        repo, revision, file = self._parts()
        place = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / revision / file
        return f"open {ENDPOINT}/{repo}/resolve/{revision}/{file} in a browser and save the file as {place}"


class _PassingError(Exception):
    """May be over in a moment."""


def _status(error: Any) -> Exception:
    status = error.response.status_code
    if status in (401, 403):
        return DownloadError(f"the Hub answers {status}: your token is not accepted there. To mend it, {LOGIN}")
    if status == 429 or status >= 500:
        return _PassingError(f"the Hub answers {status}")
    return DownloadError(f"the Hub answers {status}: {error.server_message or 'the file cannot be had there'}")


def _is_the_hubs(path: Path) -> bool:
    """Whether a cached file is what the Hub has, by the name of the client's blob: large files are named by hash.

    If a card pins another hash then the card is wrong, and the file, which others may use, stays.
    """
    return path.is_symlink() and path.readlink().name == sha256_file(path)


def _discard(path: Path) -> None:
    """Removes a file of the client's cache that is not right: the link in the snapshot, and what it leads to."""
    with suppress(OSError):
        if path.is_symlink() and (blob := path.parent / path.readlink()).parent.name == "blobs":
            blob.unlink()
        path.unlink()


@contextmanager
def _aside(damaged: Path | None) -> Iterator[bool]:
    """Moves a damaged file out of the client's sight, which would return it; it comes back if nothing better comes.

    It may be a link to a file that a person keeps elsewhere: what it leads to is not touched.
    """
    if damaged is None:
        yield False
        return
    aside = damaged.with_name(damaged.name + ".damaged")
    damaged.replace(aside)
    try:
        yield True
    finally:
        if damaged.exists():
            aside.unlink()
        else:
            aside.replace(damaged)


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """The client's own bars; not drawn unless wanted, and as they were afterwards."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
