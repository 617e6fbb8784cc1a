"""HTTP: fills a part file, continues one, tries again after what may pass.

Nothing that could identify a person is sent: no token, no password of a netrc file.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from segbench.downloads import checks, links
from segbench.downloads.folders import check_space, disk_error, size
from segbench.downloads.partial import Part, Remote, total_size
from segbench.downloads.progress import Report
from segbench.errors import DownloadError

if TYPE_CHECKING:
    from requests import PreparedRequest, Response, Session

PIECE = 1 << 18
OVERLAP = 1 << 14
REDIRECTS = 10
MEANING = {
    401: "it wants a login, and none is sent to links",
    403: "access is forbidden",
    404: "there is no such file: it was moved or removed, or the link has a mistake",
    410: "the file was removed for good",
}


@dataclass(frozen=True)
class Limits:
    """Where a download gives up.

    Attributes:
        max_bytes: size of the file.
        connect_s: seconds until a server answers.
        read_s: seconds without a byte.
        total_s: seconds of the whole download, waiting for other processes not counted.
        attempts: after failures that may pass.
        pause_s: seconds before the second attempt; doubled for each further one.
    """

    max_bytes: int = 8 << 30
    connect_s: float = 15
    read_s: float = 60
    total_s: float = 6 * 3600
    attempts: int = 5
    pause_s: float = 1


LIMITS = Limits()


class _PassingError(Exception):
    """May be over in a moment; ``wait`` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float = 0) -> None:
        super().__init__(reason)
        self.wait = wait


class _StaleError(Exception):
    """What has arrived does not belong to what the server has now."""


def download(url: str, part: Part, *, limits: Limits, report: Report, plain_http: bool = False) -> None:
    """Fills ``part`` with all bytes of ``url``, continuing it where that is safe; ``plain_http``: see `links.problem`.

    Raises:
        DownloadError: what the server does, and what it means. What has arrived stays for the next time.
    """
    from requests import Session

    deadline = time.monotonic() + limits.total_s
    log = logging.getLogger("segbench")
    with Session() as session:
        for attempt in range(1, limits.attempts + 1):
            try:
                return _attempt(session, url, part, limits, deadline, report, plain_http)
            except _StaleError as error:
                log.warning("%s: %s; starting from the first byte.", urlsplit(url).hostname, error)
                part.clear()
                reason = str(error)
            except _PassingError as error:
                reason = str(error)
                pause = max(limits.pause_s * 2 ** (attempt - 1), error.wait)
                if attempt == limits.attempts or time.monotonic() + pause > deadline:
                    break
                log.warning("%s; trying again in %.3g s.", reason, pause)
                time.sleep(pause)
    times = "once" if attempt == 1 else f"{attempt} times"
    raise DownloadError(f"{reason} (tried {times}). {_kept(part)}")


def _kept(part: Part) -> str:
    """What to do next, after a download that ended early."""
    if (remote := part.remote()) is None:
        return "Try again later."
    share = f"{size(part.size())} of {size(remote.total)}" if remote.total else size(part.size())
    return f"{share} have arrived and are kept: run the command again to continue."


def _attempt(
    session: Session, url: str, part: Part, limits: Limits, deadline: float, report: Report, plain_http: bool
) -> None:
    known = part.remote()
    had = part.size() if known else 0
    start = max(0, had - OVERLAP)  # some bytes again, so that a join that does not fit is noticed
    wanted = {"Range": f"bytes={start}-", **known.condition()} if known and had else {}
    with closing(_answer(session, url, wanted, limits, plain_http)) as response:
        partial = response.status_code == 206
        try:
            remote = Remote.of(response.headers, total_size(response.headers, start=start if partial else None))
        except ValueError as error:
            raise _StaleError(str(error)) from error
        if partial and known is None:
            raise DownloadError("answers with a part of the file although all of it was asked for")
        if partial and known and not known.may_be(remote):
            raise _StaleError("the file has changed since the download began")
        pieces = _pieces(response, part, deadline, limits)
        if not partial:
            pieces = _no_page(response, pieces)
            start, had = 0, 0
        _check_size(remote.total, limits)
        done = _write(part, response, remote, pieces, start=start, had=had, limits=limits, report=report)
        if remote.total is not None and done < remote.total and not _encoded(response):
            raise _PassingError(f"{urlsplit(response.url).netloc} ended the connection early")


def _answer(session: Session, url: str, wanted: dict[str, str], limits: Limits, plain_http: bool) -> Response:
    """The answer with the file, redirects followed, each to an allowed link."""
    import requests

    headers = {"Accept-Encoding": "identity", "Accept": "*/*", "User-Agent": "segbench", **wanted}
    local = links.is_loopback(url)
    for _ in range(REDIRECTS + 1):
        if reason := links.problem(url, plain_http=plain_http):
            raise DownloadError(f"leads to a link that is not followed: {reason}")
        if links.is_loopback(url) and not local:
            raise DownloadError(f"leads to a link that is not followed: {urlsplit(url).netloc} is this machine")
        host = urlsplit(url).netloc
        proxies = dict.fromkeys(("http", "https", "all")) if links.is_loopback(url) else None
        try:
            response = session.get(
                url, headers=headers, stream=True, allow_redirects=False, auth=_nobody,
                timeout=(limits.connect_s, limits.read_s), proxies=proxies,  # type: ignore[arg-type]  # None is "none"
            )  # fmt: skip
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
            if isinstance(origin := _innermost(error), ssl.SSLCertVerificationError):
                raise DownloadError(f"the certificate of {host} is not trusted: {origin.verify_message}") from error
            raise _PassingError(_unreachable(host, error)) from error
        except (requests.exceptions.RequestException, ValueError) as error:
            raise DownloadError(f"cannot ask {host}: {error}") from error
        if target := session.get_redirect_target(response):
            url = urljoin(url, target)
            response.close()
            continue
        _check_status(response, host)
        return response
    raise DownloadError(f"redirects more than {REDIRECTS} times")


def _nobody(request: PreparedRequest) -> PreparedRequest:
    """Sends no credentials; without it requests would send those of a netrc file, which may be meant for any host."""
    return request


def _check_status(response: Response, host: str) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    response.close()
    said = f"{host} answers {status} {response.reason or ''}".rstrip()
    if status == 416:
        raise _StaleError("the file is shorter than what had arrived")
    if status in (408, 425, 429) or status >= 500:
        asked = response.headers.get("Retry-After", "")
        raise _PassingError(said, wait=min(int(asked), 300) if asked.isdecimal() else 0)
    raise DownloadError(f"{said}: {MEANING.get(status, 'the file cannot be had there')}")


def _pieces(response: Response, part: Part, deadline: float, limits: Limits) -> Iterator[bytes]:
    """The body as it arrives; a drip cannot outlast the time limit."""
    from urllib3.exceptions import HTTPError

    read = getattr(response.raw, "read1", response.raw.read)  # urllib3 1 has no read1
    while True:
        try:
            piece: bytes = read(PIECE, decode_content=True)
        except (HTTPError, OSError) as error:
            raise _PassingError(_broken(urlsplit(response.url).netloc, error)) from error
        if not piece:
            return
        yield piece
        if time.monotonic() > deadline:
            raise DownloadError(f"took longer than {limits.total_s:g} s. {_kept(part)}")


def _no_page(response: Response, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same pieces, refused before anything is written if they are a web page."""
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= 512:
            break
    if checks.is_page(head, response.headers.get("Content-Type", "")):
        while len(head) < checks.HEAD_BYTES and (more := next(pieces, b"")):
            head += more
        raise DownloadError(
            f"answers with a web page, not with a file: {checks.title(head)}. "
            "Open the link in a browser; if the file is there, put its direct link in the card"
        )
    if not head:
        raise DownloadError("answers with an empty file")
    return chain([head], pieces)


def _write(
    part: Part, response: Response, remote: Remote, pieces: Iterator[bytes], *,
    start: int, had: int, limits: Limits, report: Report,
) -> int:  # fmt: skip
    """Writes the pieces, which begin at byte ``start`` of the file, behind the ``had`` bytes that are there.

    Returns:
        The bytes that are there now.
    """
    done = had
    try:
        check_space((remote.total or had) - had, part.path.parent, elsewhere=part.elsewhere)
        repeated = part.tail(start) if had else b""
        with part.path.open("ab") if had else part.begin(None if _encoded(response) else remote) as stream:
            for piece in pieces:
                again = min(len(repeated), len(piece))
                if piece[:again] != repeated[:again]:
                    raise _StaleError("the file has changed since the download began")
                repeated = repeated[again:]
                done += len(piece) - again
                if done > limits.max_bytes:
                    break
                stream.write(piece[again:])
                report(done, remote.total)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:  # of the disk; those of the network are others by now
        raise disk_error(error, part.path.parent, elsewhere=part.elsewhere) from error
    if done > limits.max_bytes:
        part.clear()
    _check_size(done, limits)
    if repeated:
        raise _PassingError(f"{urlsplit(response.url).netloc} ended the connection early")
    return done


def _encoded(response: Response) -> bool:
    """Whether the server compresses on the way, asked not to: sizes and ranges then speak of other bytes."""
    return response.headers.get("Content-Encoding", "identity").lower() != "identity"


def _check_size(number: int | None, limits: Limits) -> None:
    if number is not None and number > limits.max_bytes:
        raise DownloadError(f"is too large: more than {size(limits.max_bytes)}. Is it the right link?")


def _innermost(error: BaseException) -> BaseException:
    """Where an error began; libraries wrap it several times."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _broken(host: str, error: Exception) -> str:
    """Why a body ended early, short."""
    origin = _innermost(error)
    if isinstance(origin, TimeoutError):
        return f"{host} has gone silent"
    if isinstance(origin, OSError):
        return f"the connection to {host} broke: {origin.strerror or origin}"
    return f"{host} ended the connection early"


def _unreachable(host: str, error: Exception) -> str:
    """Why no connection came about, short."""
    origin = _innermost(error)
    if isinstance(origin, socket.gaierror):
        return f"{host} cannot be found: no network, or a mistake in the name"
    if isinstance(origin, ConnectionRefusedError):
        return f"{host} refuses connections"
    if isinstance(origin, TimeoutError):
        return f"{host} does not answer"
    return f"{host} cannot be reached: {origin}"
