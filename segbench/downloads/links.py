"""Links: which ones are followed, and the direct link behind a share link.

============= ============================================== ====================================================
site          as people paste it                             what is requested
============= ============================================== ====================================================
Nextcloud     ``https://host/index.php/s/TOKEN``,            the same with ``/download``
(ownCloud)    ``https://host/s/TOKEN``
Dropbox       ``https://www.dropbox.com/...?dl=0``           the same with ``dl=1``
GitHub        ``https://github.com/user/repo/blob/...``      the same with ``/raw/``
Google Drive  ``https://drive.google.com/file/d/ID/view``,   ``https://drive.usercontent.google.com/download?id=ID``
              ``.../open?id=ID``                             ``&export=download&confirm=t``
============= ============================================== ====================================================
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import SplitResult, parse_qs, parse_qsl, urlencode, urlsplit, urlunsplit

_NEXTCLOUD = re.compile(r"(?:/[^/]+)*/index\.php/s/[A-Za-z0-9_-]+/?|(?:/[^/]+)?/s/[A-Za-z0-9]{10,64}/?")
_DRIVE_FILE = re.compile(r"/file/d/([A-Za-z0-9_-]+)(?:/.*)?")


def problem(url: str, *, plain_http: bool = False) -> str | None:
    """Why a link is not followed; None when it may be.

    Args:
        url: the link.
        plain_http: also follow http:// links; only for a file whose hash is pinned in this code.

    >>> problem("https://example.org/a.pt"), problem("http://127.0.0.1:8000/a.pt")
    (None, None)
    >>> problem("http://example.org/a.pt")
    'http://example.org is not encrypted; only https:// is followed (http:// only to this machine)'
    >>> problem("http://example.org/a.zip", plain_http=True)
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"not a link: {error}"
    if parts.scheme not in ("http", "https"):
        return f"{parts.scheme}:// is not followed, only https://"
    if not host:
        return "not a link: it names no host"
    if parts.username is not None or parts.password is not None:
        return "a link must not hold a user name or a password"
    if parts.scheme == "https" or plain_http or is_loopback(url):
        return None
    return f"http://{parts.netloc} is not encrypted; only https:// is followed (http:// only to this machine)"


def is_loopback(url: str) -> bool:
    """Whether a link leads to this machine.

    >>> is_loopback("http://[::1]:80/"), is_loopback("http://localhost.example.org/")
    (True, False)
    """
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def direct(url: str) -> str:
    """The link that answers with the file itself; links that are not in the table stay as they are.

    >>> direct("https://nc.example.org/index.php/s/zSFgoAngcm47FZm")
    'https://nc.example.org/index.php/s/zSFgoAngcm47FZm/download'
    >>> direct("https://www.dropbox.com/scl/fi/abc/a.pt?rlkey=x&dl=0")
    'https://www.dropbox.com/scl/fi/abc/a.pt?rlkey=x&dl=1'
    >>> direct("https://drive.google.com/file/d/1aB_c/view?usp=sharing")
    'https://drive.usercontent.google.com/download?id=1aB_c&export=download&confirm=t'
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").removeprefix("www.")
    if host == "dropbox.com":
        query = {**dict(parse_qsl(parts.query)), "dl": "1"}
        return urlunsplit(parts._replace(query=urlencode(query), fragment=""))
    if host == "github.com":
        path = re.sub(r"^(/[^/]+/[^/]+)/blob/", r"\1/raw/", parts.path)
        return urlunsplit(parts._replace(path=path, fragment=""))
    if host == "drive.google.com" and (file := _drive_id(parts)):
        return f"https://drive.usercontent.google.com/download?id={file}&export=download&confirm=t"
    if _NEXTCLOUD.fullmatch(parts.path):
        return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/download", query="", fragment=""))
    return urlunsplit(parts._replace(fragment=""))


def _drive_id(parts: SplitResult) -> str | None:
    if match := _DRIVE_FILE.fullmatch(parts.path):
        return match[1]
    named = parse_qs(parts.query).get("id", [""])[0]
    return named if parts.path in ("/open", "/uc") and re.fullmatch(r"[A-Za-z0-9_-]+", named) else None
