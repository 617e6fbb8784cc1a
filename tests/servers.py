"""HTTP servers on loopback that behave, and misbehave, as real ones do: a file host, and the Hub with its storage host.

Each keeps a log of what it was asked and of how many bytes of bodies it sent.
"""

from __future__ import annotations

import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PIECE = 1 << 14


@dataclass
class Request:
    """What a client asked and got; the names of headers in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0


@dataclass
class Resource:
    """A file on a server; ``faults`` are used up one by one, by one GET each."""

    data: bytes
    etag: str | None = '"v1"'
    modified: str | None = None
    content_type: str = "application/octet-stream"
    ranges: bool = True
    tells_length: bool = True
    encoding: str | None = None
    faults: list[Callable[[Handler, Resource], None]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Answers from the routes of its server."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.request_log = Request(self.command, self.path, {key.lower(): value for key, value in self.headers.items()})
        self.server.log.append(self.request_log)
        for pattern, route in self.server.routes:
            if match := re.fullmatch(pattern, self.path):
                try:
                    route(self, match)
                except (BrokenPipeError, ConnectionResetError):  # the client was killed, or had enough
                    self.close_connection = True
                return
        self.reply(404, {"Content-Type": "text/html"}, b"<!doctype html><title>Not here</title>")

    def reply(
        self,
        status: int,
        headers: dict[str, str | None],
        body: bytes,
        *,
        declared: int | None = None,
        whole: bool = True,
    ) -> None:
        """Sends an answer; the connection ends after a body that is not as long as ``declared``, or not ``whole``."""
        self.request_log.status = status
        self.send_response(status)
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, value)
        if headers.get("Transfer-Encoding") != "chunked" and "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body) if declared is None else declared))
        self.end_headers()
        if self.command == "HEAD":
            return
        if headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(
                b"%x\r\n%s\r\n" % (len(p), p) for p in (body[i : i + PIECE] for i in range(0, len(body), PIECE))
            )
            body += b"0\r\n\r\n" if whole else b"ff\r\n"
        self.send(body)
        if not whole or declared not in (None, len(body)):
            self.close_connection = True

    def send(self, body: bytes) -> None:
        for start in range(0, len(body), PIECE):
            piece = body[start : start + PIECE]
            self.wfile.write(piece)
            self.request_log.sent += len(piece)

    def send_resource(self, resource: Resource, extra: dict[str, str | None] | None = None) -> None:
        """The file, or the range that was asked for; or the next fault."""
        if resource.faults and self.command == "GET":
            resource.faults.pop(0)(self, resource)
            return
        status, headers, body = self.prepared(resource)
        self.reply(status, {**headers, **(extra or {})}, body)

    def prepared(self, resource: Resource) -> tuple[int, dict[str, str | None], bytes]:
        """Status, headers and body for what was asked."""
        data = resource.data
        headers = {
            "ETag": resource.etag,
            "Last-Modified": resource.modified,
            "Content-Type": resource.content_type,
            "Content-Encoding": resource.encoding,
            "Transfer-Encoding": None if resource.tells_length else "chunked",
        }
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if not asked or not resource.ranges or condition not in (None, resource.etag, resource.modified):
            return 200, headers, data
        start = int(asked[1])
        if start >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        return 206, {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:]

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 32
    log: list[Request]
    routes: list[tuple[str, Callable[[Handler, re.Match[str]], None]]]

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # an OSError is a client that was killed, or had enough


@dataclass
class Host:
    """A running server."""

    server: _Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def log(self) -> list[Request]:
        return self.server.log

    def gets(self) -> list[Request]:
        return [request for request in self.log if request.method == "GET"]

    def route(self, pattern: str, answer: Callable[[Handler, re.Match[str]], None]) -> None:
        """Answers paths, with their query, that match; routes made later go first."""
        self.server.routes.insert(0, (pattern, answer))

    def file(self, path: str, resource: Resource) -> str:
        """Offers a file; its link."""
        self.route(re.escape(path), lambda handler, _: handler.send_resource(resource))
        return self.url + path

    def redirect(self, path: str, target: str) -> str:
        """Offers a redirect; its link."""
        self.route(re.escape(path), lambda handler, _: handler.reply(302, {"Location": target}, b""))
        return self.url + path


@contextmanager
def host() -> Iterator[Host]:
    """A server on a free port of 127.0.0.1."""
    server = _Server(("127.0.0.1", 0), Handler)
    server.log, server.routes = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield Host(server)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# Faults: what one GET gets instead of the file.


def status(code: int, **headers: str) -> Callable[[Handler, Resource], None]:
    """An error, as a server in trouble answers."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda handler, _: handler.reply(code, named, b"trouble")


def cut(after: int) -> Callable[[Handler, Resource], None]:
    """Ends the connection after that many bytes of the body; the header promised all."""

    def fault(handler: Handler, resource: Resource) -> None:
        code, headers, body = handler.prepared(resource)
        handler.reply(code, headers, body[:after], declared=len(body))

    return fault


def reset(after: int) -> Callable[[Handler, Resource], None]:
    """Like `cut`, with a TCP reset, as a firewall that has lost the connection."""

    def fault(handler: Handler, resource: Resource) -> None:
        cut(after)(handler, resource)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return fault


def hold(after: int, event: threading.Event) -> Callable[[Handler, Resource], None]:
    """Sends that many bytes of the body, and the rest when the event happens."""

    def fault(handler: Handler, resource: Resource) -> None:
        code, headers, body = handler.prepared(resource)
        handler.reply(code, {**headers, "Content-Length": str(len(body))}, body[:after])
        event.wait(60)
        handler.send(body[after:])

    return fault


def drip(seconds: float) -> Callable[[Handler, Resource], None]:
    """Sends one byte every ``seconds``."""

    def fault(handler: Handler, resource: Resource) -> None:
        code, headers, body = handler.prepared(resource)
        handler.reply(code, {**headers, "Content-Length": str(len(body))}, b"")
        for start in range(len(body)):
            handler.send(body[start : start + 1])
            threading.Event().wait(seconds)

    return fault


def page(title: str) -> Callable[[Handler, Resource], None]:
    """A web page with status 200."""
    body = f"\n<!DOCTYPE html>\n<html><head><title>{title}</title></head>{' ' * 600}</html>".encode()
    return lambda handler, _: handler.reply(200, {"Content-Type": "text/html; charset=utf-8"}, body)


@dataclass
class Hub:
    """The Hub's resolve protocol, with large files on a storage host of their own.

    Attributes:
        hub: answers ``/{repo}/resolve/{revision}/{file}``.
        storage: where the bytes are.
        resource: the file.
        head_faults: used up one by one by HEAD.
        token: what a private repository needs.
    """

    hub: Host
    storage: Host
    resource: Resource
    repo: str = "user/model"
    revision: str = "0123456789abcdef0123456789abcdef01234567"
    file: str = "weights/model.safetensors"
    token: str | None = None
    gated: bool = False
    head_faults: list[Callable[[Handler, Resource], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.storage.file("/storage/blob?signature=x", self.resource)
        self.hub.route(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve)

    @property
    def source(self) -> dict[str, str]:
        return {"type": "hub", "repo": self.repo, "revision": self.revision, "file": self.file}

    def bodies(self) -> list[Request]:
        return [request for request in self.storage.gets() if urlsplit(request.path).path == "/storage/blob"]

    def _resolve(self, handler: Handler, match: re.Match[str]) -> None:
        if self.head_faults and handler.command == "HEAD":
            self.head_faults.pop(0)(handler, self.resource)
            return
        authorization = handler.headers.get("Authorization")
        code = None
        if match["repo"] != self.repo or (self.token and authorization is None):
            code = (401, "RepoNotFound", "Repository not found")  # the Hub does not tell whether it exists
        elif self.token and authorization != f"Bearer {self.token}":
            code = (401, None, "Invalid credentials in Authorization header")
        elif self.gated:
            code = (403, "GatedRepo", "Access to model is restricted")
        elif match["revision"] != self.revision:
            code = (404, "RevisionNotFound", "Invalid rev id")
        elif match["file"] != self.file:
            code = (404, "EntryNotFound", "Entry not found")
        if code:
            handler.reply(code[0], {"X-Error-Code": code[1], "X-Error-Message": code[2]}, b"")
            return
        handler.reply(
            302,
            {
                # Another host by its name too: some clients tell hosts apart by names, without ports.
                "Location": f"{self.storage.url.replace('127.0.0.1', 'localhost')}/storage/blob?signature=x",
                "X-Repo-Commit": self.revision,
                "X-Linked-Etag": self.resource.etag,
                "X-Linked-Size": str(len(self.resource.data)),
                "ETag": '"pointer"',
            },
            b"",
        )
