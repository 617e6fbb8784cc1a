"""Downloads from links, over real sockets to servers on loopback that misbehave as real ones do."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import random
import select
import signal
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from segbench import downloads
from segbench.downloads import Limits, links
from segbench.errors import DownloadError
from tests import servers
from tests.servers import Host, Resource

DATA = random.Random(1).randbytes(400_000)
SHA = hashlib.sha256(DATA).hexdigest()
QUICK = Limits(connect_s=5, read_s=5, total_s=60, attempts=5, pause_s=0.01)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the machine's own caches and settings is used."""
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SEGBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.fixture
def host() -> Iterator[Host]:
    with servers.host() as running:
        yield running


def url(link: str) -> dict[str, str]:
    return {"type": "url", "url": link}


def fetch(*links_: str, sha256: str | None = SHA, limits: Limits = QUICK, **options: Any) -> downloads.Fetched:
    return downloads.fetch([url(link) for link in links_], name="model", sha256=sha256, limits=limits, **options)


def leftovers(cache: Path) -> set[str]:
    """Files of the cache but for locks."""
    return {path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}


# What works


def test_fresh_then_cached(host: Host, cache: Path) -> None:
    link = host.file("/model.pt", Resource(DATA))
    assert downloads.cached([url(link)], name="model") is None
    first = fetch(link)
    assert first == fetch(link)
    assert first.path.read_bytes() == DATA
    assert (first.sha256, first.source) == (SHA, url(link))
    assert first.path.is_relative_to(cache / "weights")
    assert first.path.name == "model.pt"
    assert downloads.cached([url(link)], name="model") == first.path
    assert len(host.log) == 1
    assert leftovers(cache) == {"model.pt"}


def test_a_file_beside_the_card(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(DATA)
    source = {"type": "package", "file": "a.safetensors"}
    found = downloads.fetch([source], name="model", sha256=None, folder=tmp_path)
    assert (found.path, found.sha256) == (tmp_path / "a.safetensors", SHA)
    assert leftovers(cache) == set()  # the user's own: not remembered
    with pytest.raises(DownloadError, match="the card pins 0000"):
        downloads.fetch([source], name="model", sha256="0" * 64, folder=tmp_path)
    assert (tmp_path / "a.safetensors").exists()
    with pytest.raises(DownloadError, match=r"b\.pt is missing"):
        downloads.fetch([{"type": "package", "file": "b.pt"}], name="model", sha256=None, folder=tmp_path)
    with pytest.raises(DownloadError, match="not the name of a file"):
        downloads.fetch([{"type": "package", "file": "../b.pt"}], name="model", sha256=None, folder=tmp_path)


@pytest.mark.parametrize("prefix", ["/index.php/s/zSFgoAngcm47FZm", "/s/zSFgoAngcm47FZm"])
def test_nextcloud_share_link(host: Host, prefix: str) -> None:
    host.file(f"{prefix}/download", Resource(DATA))
    link = host.url + prefix
    found = fetch(link)
    assert found.sha256 == SHA
    assert found.source == url(link)


def test_share_links() -> None:
    drive = "https://drive.usercontent.google.com/download?id=1A_b-C&export=download&confirm=t"
    table = {
        "https://nc.example.org/cloud/index.php/s/abc/": "https://nc.example.org/cloud/index.php/s/abc/download",
        "https://nc.example.org/s/zSFgoAngcm47FZm/download": "https://nc.example.org/s/zSFgoAngcm47FZm/download",
        "https://www.dropbox.com/s/x/a.pt?dl=0": "https://www.dropbox.com/s/x/a.pt?dl=1",
        "https://github.com/u/r/blob/main/blob/a.pt": "https://github.com/u/r/raw/main/blob/a.pt",
        "https://github.com/u/r/releases/download/v1/a.pt": "https://github.com/u/r/releases/download/v1/a.pt",
        "https://drive.google.com/file/d/1A_b-C/view?usp=sharing": drive,
        "https://drive.google.com/open?id=1A_b-C": drive,
        "https://zenodo.org/records/1/files/a.pt?download=1": "https://zenodo.org/records/1/files/a.pt?download=1",
    }
    assert {link: links.direct(link) for link in table} == table


def test_redirects_are_followed(host: Host) -> None:
    target = host.file("/there/model.pt", Resource(DATA))
    host.redirect("/b", target)
    assert fetch(host.redirect("/a", "/b")).sha256 == SHA


def test_unknown_size_and_compression(host: Host) -> None:
    import gzip

    assert fetch(host.file("/chunked.pt", Resource(DATA, tells_length=False))).sha256 == SHA
    packed = Resource(gzip.compress(DATA), encoding="gzip")
    packed.faults = [servers.cut(100_000)]
    assert fetch(host.file("/packed.pt", packed)).sha256 == SHA
    assert "range" not in host.log[-1].headers


def test_the_bar_is_drawn_on_a_terminal_only(host: Host, tmp_path: Path) -> None:
    link = host.file("/model.pt", Resource(DATA))
    outer, inner = terminal()
    process = client(link, stderr=inner)
    os.close(inner)
    drawn = read_terminal(outer)
    assert process.wait(20) == 0
    assert b"model" in drawn
    assert b"400.0/400.0 kB" in drawn
    (tmp_path / "cache").rename(tmp_path / "old")
    assert client(link).communicate(timeout=20)[1] == ""


# Continuing


def test_continues_after_a_cut_connection(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    resource = Resource(DATA, faults=[servers.cut(150_000), servers.reset(100_000)])
    assert fetch(host.file("/model.pt", resource)).sha256 == SHA
    first, second, third = host.gets()
    assert "range" not in first.headers
    assert second.headers["if-range"] == '"v1"'
    starts = [int(request.headers["range"].removeprefix("bytes=").removesuffix("-")) for request in (second, third)]
    assert 100_000 < starts[0] < 150_000 <= starts[1]
    assert sum(request.sent for request in host.gets()) < 1.2 * len(DATA)
    assert "the connection" in caplog.text
    assert "trying again in" in caplog.text


@pytest.mark.parametrize("etag", ['"v1"', 'W/"v1"', None])
def test_continues_in_a_later_call(host: Host, cache: Path, etag: str | None) -> None:
    resource = Resource(DATA, etag=etag, faults=[servers.cut(300_000)])
    link = host.file("/model.pt", resource)
    with pytest.raises(
        DownloadError,
        match=r"ended the connection early \(tried once\)\. 300\.0 kB of 400\.0 kB have arrived and are kept",
    ):
        fetch(link, limits=Limits(attempts=1))
    assert leftovers(cache) == {"model.pt.part", "model.pt.part.json"}
    assert fetch(link).sha256 == SHA
    assert host.gets()[1].status == 206
    assert leftovers(cache) == {"model.pt"}


def test_continues_after_a_kill(host: Host, cache: Path) -> None:
    never = threading.Event()
    resource = Resource(DATA, faults=[servers.hold(300_000, never)])
    link = host.file("/model.pt", resource)
    process = client(link)
    wait_until(lambda: any(path.stat().st_size >= 280_000 for path in cache.rglob("*.part")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not any(path.name == "model.pt" for path in cache.rglob("*"))
    assert fetch(link).path.read_bytes() == DATA  # the lock did not survive the process either
    last = host.gets()[-1]
    assert last.status == 206
    assert last.sent < 150_000
    never.set()


def test_ctrl_c_keeps_what_has_arrived(host: Host, cache: Path) -> None:
    never = threading.Event()
    link = host.file("/model.pt", Resource(DATA, faults=[servers.hold(300_000, never)]))
    process = client(link)
    wait_until(lambda: any(path.stat().st_size >= 280_000 for path in cache.rglob("*.part")))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert fetch(link).sha256 == SHA
    assert host.gets()[-1].sent < 150_000
    never.set()


def test_a_server_that_ignores_ranges(host: Host) -> None:
    resource = Resource(DATA, ranges=False, faults=[servers.cut(150_000)])
    assert fetch(host.file("/model.pt", resource)).sha256 == SHA
    assert [(request.status, "range" in request.headers) for request in host.gets()] == [(200, False), (200, True)]


@pytest.mark.parametrize("etags", [('"v1"', '"v2"'), ('W/"v1"', 'W/"v2"'), (None, None)])
def test_the_file_changed_between_the_parts(host: Host, etags: tuple[str | None, str | None]) -> None:
    """Seen by If-Range, by the ETag of the answer, or by the bytes at the join where there is no ETag."""
    changed = len(DATA) if etags == (None, None) else 100_000  # bytes; those at the join are the same
    old = random.Random(2).randbytes(changed) + DATA[changed:]
    resource = Resource(old, etag=etags[0], faults=[servers.cut(150_000)])
    link = host.file("/model.pt", resource)
    with pytest.raises(DownloadError, match="ended the connection early"):
        fetch(link, sha256=None, limits=Limits(attempts=1))
    resource.data, resource.etag = DATA, etags[1]
    assert fetch(link, sha256=None).path.read_bytes() == DATA


def test_the_file_became_shorter(host: Host) -> None:
    resource = Resource(DATA + DATA, etag=None, faults=[servers.cut(700_000)])
    link = host.file("/model.pt", resource)
    with pytest.raises(DownloadError, match="ended the connection early"):
        fetch(link, limits=Limits(attempts=1))
    resource.data = DATA
    assert fetch(link).sha256 == SHA
    assert [request.status for request in host.gets()] == [200, 416, 200]


def test_a_wrong_content_range_is_not_trusted(host: Host) -> None:
    resource = Resource(DATA, faults=[servers.cut(150_000)])

    def shifted(handler: servers.Handler, resource: Resource) -> None:
        handler.reply(206, {"ETag": '"v1"', "Content-Range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"}, DATA)

    resource.faults.append(shifted)
    assert fetch(host.file("/model.pt", resource)).sha256 == SHA
    with pytest.raises(DownloadError, match="a part of the file although all of it"):
        fetch(host.file("/other.pt", Resource(DATA, faults=[shifted])))


# What passes, and what does not


def test_passing_errors_are_tried_again(host: Host) -> None:
    faults = [servers.status(500), servers.status(429, Retry_After="0"), servers.status(503), servers.cut(10)]
    assert fetch(host.file("/model.pt", Resource(DATA, faults=faults))).sha256 == SHA
    assert len(host.gets()) == 5


def test_a_server_that_stays_broken(host: Host) -> None:
    link = host.file("/model.pt", Resource(DATA, faults=[servers.status(502)] * 9))
    with pytest.raises(DownloadError, match=r"answers 502 Bad Gateway \(tried 5 times\)"):
        fetch(link)
    assert len(host.gets()) == 5


def test_a_body_that_is_always_truncated(host: Host, cache: Path) -> None:
    link = host.file("/model.pt", Resource(DATA, ranges=False, faults=[servers.cut(1000)] * 9))
    with pytest.raises(DownloadError, match=r"1\.0 kB of 400\.0 kB have arrived"):
        fetch(link)
    assert "model.pt" not in leftovers(cache)


def test_a_truncated_body_of_unknown_size_is_no_file(host: Host, cache: Path) -> None:
    def broken(handler: servers.Handler, resource: Resource) -> None:
        handler.reply(200, {"Transfer-Encoding": "chunked", "ETag": resource.etag}, DATA[:100_000], whole=False)

    link = host.file("/model.pt", Resource(DATA, faults=[broken]))
    assert fetch(link, sha256=None).sha256 == SHA
    assert [request.status for request in host.gets()] == [200, 206]


@pytest.mark.parametrize(
    ("code", "meaning"),
    [(401, "wants a login"), (403, "forbidden"), (404, "moved or removed"), (410, "for good"), (418, "cannot be had")],
)
def test_refusals_are_not_tried_again(host: Host, code: int, meaning: str) -> None:
    link = host.file("/model.pt", Resource(DATA, faults=[servers.status(code)] * 2))
    with pytest.raises(DownloadError, match=f"answers {code} .*{meaning}"):
        fetch(link)
    assert len(host.gets()) == 1


def test_no_connection(cache: Path) -> None:
    with servers.host() as gone:
        link = gone.url + "/model.pt"
    with pytest.raises(DownloadError, match="refuses connections") as caught:
        fetch(link)
    place = downloads.fetching.UrlSource(url(link))._target()
    assert f"open {link} in a browser and save the file as {place}" in str(caught.value)


@pytest.mark.slow
def test_a_silent_server_and_a_drip(host: Host) -> None:
    never = threading.Event()
    link = host.file("/model.pt", Resource(DATA, faults=[servers.hold(100_000, never)] * 2))
    with pytest.raises(DownloadError, match=r"has gone silent \(tried 2 times\)\. .* of 400\.0 kB have arrived"):
        fetch(link, limits=Limits(read_s=0.2, attempts=2, pause_s=0))
    never.set()
    link = host.file("/drip.pt", Resource(DATA, faults=[servers.drip(0.02)]))
    began = time.monotonic()
    with pytest.raises(DownloadError, match=r"took longer than 0\.5 s"):
        fetch(link, limits=Limits(total_s=0.5))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("declared", [True, False])
def test_too_large(host: Host, cache: Path, declared: bool) -> None:
    link = host.file("/model.pt", Resource(DATA, tells_length=declared))
    with pytest.raises(DownloadError, match=r"too large: more than 200\.0 kB"):
        fetch(link, limits=Limits(max_bytes=200_000))
    assert len(host.gets()) == 1
    assert leftovers(cache) == set()


def test_redirects_that_are_not_followed(host: Host) -> None:
    with pytest.raises(DownloadError, match="redirects more than 10 times"):
        fetch(host.redirect("/loop", "/loop"))
    assert len(host.gets()) == 11
    for target, reason in {
        "http://example.org/a.pt": "not encrypted",
        "file:///etc/passwd": "file:// is not followed",
        "https://me:secret@example.org/a.pt": "user name or a password",
    }.items():
        with pytest.raises(DownloadError, match=reason):
            fetch(host.redirect(f"/{len(target)}", target))
    with pytest.raises(DownloadError, match="not encrypted"):
        fetch("http://example.org/a.pt")


def test_an_untrusted_certificate(tmp_path: Path, host: Host) -> None:
    (tmp_path / "pem").write_text(SELF_SIGNED)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    host.server.socket = context.wrap_socket(host.server.socket, server_side=True)
    with pytest.raises(DownloadError, match=r"certificate of localhost:\d+ is not trusted: self"):
        fetch(f"https://localhost:{host.server.server_port}/model.pt")


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_refused(host: Host, cache: Path, content_type: str) -> None:
    page = b"\xef\xbb\xbf \n<!DOCTYPE html><html><head><title>Sign in\n&amp; \x1b[31mgo</title></head>" + b" " * 9999
    link = host.file("/model.pt", Resource(page, content_type=content_type))
    with pytest.raises(DownloadError, match=r"answers with a web page, not with a file: 'Sign in & \[31mgo'"):
        fetch(link, sha256=None)
    assert len(host.gets()) == 1
    assert leftovers(cache) == set()


def test_a_web_page_does_not_cost_what_has_arrived(host: Host, cache: Path) -> None:
    link = host.file("/model.pt", Resource(DATA, faults=[servers.cut(300_000), servers.page("Log in")]))
    with pytest.raises(DownloadError, match="'Log in'"):
        fetch(link)
    assert fetch(link).sha256 == SHA
    assert host.gets()[-1].sent < 150_000


def test_binary_of_a_careless_server(host: Host) -> None:
    assert fetch(host.file("/model.pt", Resource(DATA, content_type="text/html"))).sha256 == SHA


def test_an_empty_file(host: Host) -> None:
    with pytest.raises(DownloadError, match="empty"):
        fetch(host.file("/model.pt", Resource(b"")), sha256=None)


def test_a_full_disk(host: Host, cache: Path) -> None:
    """The system refuses to write on: a limit on the size of files, as a quota."""
    resource = Resource(DATA)
    code = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))" + CLIENT
    process = client(host.file("/model.pt", resource), code=code)
    error = process.communicate(timeout=20)[1]
    assert f"the disk of {next(cache.glob('weights/*'))} is full (File too large). Free some space." in error
    assert len(host.gets()) == 1
    assert leftovers(cache) == {"model.pt.part", "model.pt.part.json"}
    assert fetch(f"{host.url}/model.pt").sha256 == SHA
    assert host.gets()[-1].status == 206


def test_more_than_the_disk_has(host: Host) -> None:
    def huge(handler: servers.Handler, resource: Resource) -> None:
        handler.reply(200, {"Content-Length": str(1 << 60)}, DATA)

    link = host.file("/model.pt", Resource(DATA, faults=[huge]))
    with pytest.raises(DownloadError, match=r"are needed, .* are free"):
        fetch(link, limits=Limits(max_bytes=1 << 62))


def test_a_cache_that_cannot_be_written(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEGBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"cannot write to .*SEGBENCH_CACHE"):
        fetch(host.file("/model.pt", Resource(DATA)))


# Hashes


def test_a_wrong_hash(host: Host, cache: Path) -> None:
    link = host.file("/model.pt", Resource(DATA))
    with pytest.raises(DownloadError, match=f"SHA-256 is {SHA}, the card pins {'0' * 64}"):
        fetch(link, sha256="0" * 64)
    assert leftovers(cache) == set()


def test_a_damaged_file_is_downloaded_again(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    link = host.file("/model.pt", Resource(DATA))
    path = fetch(link).path
    path.write_bytes(DATA[:-1] + b"!")
    with pytest.raises(DownloadError, match="what is on this machine is not right"):
        fetch(link, offline=True)
    assert fetch(link).path.read_bytes() == DATA
    assert len(host.gets()) == 2
    assert "is not right" in caplog.text


def test_an_unpinned_hash_is_remembered(host: Host, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    resource = Resource(DATA)
    link = host.file("/model.pt", resource)
    path = fetch(link, sha256=None).path
    (pin,) = (cache / "pins").iterdir()
    assert pin.name.startswith("model-")
    assert f"SHA-256 of model is {SHA} (its card pins none); remembered in {pin}" in caplog.text
    known = json.loads(pin.read_text())
    assert (known["name"], known["sha256"], known["bytes"], known["source"]) == ("model", SHA, len(DATA), url(link))
    caplog.clear()
    assert fetch(link, sha256=None).sha256 == SHA
    assert caplog.text == ""
    path.unlink()
    resource.data = DATA[::-1]
    with pytest.raises(DownloadError, match=f"this machine remembers {SHA}. .*on purpose: delete {pin} and try again"):
        fetch(link, sha256=None)
    pin.unlink()
    assert fetch(link, sha256=None).path.read_bytes() == DATA[::-1]
    pin.write_text("{")
    with pytest.raises(DownloadError, match="Delete it"):
        fetch(link, sha256=None)


def test_a_file_put_by_hand(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    link = host.url + "/model.pt"
    with pytest.raises(DownloadError, match="answers 404") as caught:
        fetch(link, sha256=None)
    place = Path(str(caught.value).partition("save the file as ")[2].splitlines()[0])
    place.write_bytes(b"<html><title>Share</title></html>")
    with pytest.raises(DownloadError, match="a web page, not weights: 'Share'"):
        fetch(link, sha256=None, offline=True)
    place.write_bytes(DATA)
    assert fetch(link, sha256=None, offline=True).path == place
    assert f"SHA-256 of model is {SHA}" in caplog.text


# Several sources, offline, several processes


def test_the_second_source(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = host.url + "/gone.pt", host.file("/model.pt", Resource(DATA))
    assert fetch(bad, good).source == url(good)
    assert f"url: {bad} does not work: " in caplog.text
    assert "404" in caplog.text
    caplog.clear()
    assert fetch(bad, good).source == url(good)
    assert (caplog.text, len(host.gets())) == ("", 2)


def test_no_source_works(host: Host) -> None:
    bad = [host.url + "/a.pt", host.url + "/b.pt"]
    with pytest.raises(DownloadError) as caught:
        fetch(*bad)
    message = str(caught.value)
    assert message.startswith("model cannot be fetched")
    assert all(f"url: {link}\n" in message and f"open {link} in a browser" in message for link in bad)
    assert message.count("404") == 2


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_offline(host: Host, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    link, other = host.file("/model.pt", Resource(DATA)), host.file("/other.pt", Resource(DATA))
    fetch(link)
    if by == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = {"offline": by == "argument"}
    assert fetch(link, **options).sha256 == SHA
    with pytest.raises(
        DownloadError, match=r"model is missing.*\n.*\n.*\nWhile online: segbench show model --download"
    ):
        fetch(other, **options)
    with pytest.raises(DownloadError, match="While online: segbench train x"):
        fetch(other, command="segbench train x", **options)
    assert len(host.log) == 1


def test_two_processes_download_once(host: Host) -> None:
    go = threading.Event()
    link = host.file("/model.pt", Resource(DATA, faults=[servers.hold(100_000, go)]))
    first = client(link)
    wait_until(lambda: host.log)
    second = client(link)
    assert second.stderr is not None
    assert "waiting for another process" in second.stderr.readline()
    go.set()
    for process in (first, second):
        assert json.loads(process.communicate(timeout=20)[0])["sha256"] == SHA
    assert len(host.gets()) == 1


def test_no_credentials_are_sent(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("default login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(host.redirect("/a", host.file("/model.pt", Resource(DATA))))
    assert len(host.log) == 2
    assert not any({"authorization", "cookie"} & set(request.headers) for request in host.log)
    assert "secret" not in str(host.log)


# Arguments


def test_arguments_that_are_refused() -> None:
    for name in ("", "../x", "a/b", ".hidden", "a\n"):
        with pytest.raises(DownloadError, match="cannot name a download"):
            downloads.fetch([url("https://example.org/a.pt")], name=name, sha256=None)
    with pytest.raises(DownloadError, match="not published"):
        downloads.fetch([], name="model", sha256=None)
    assert downloads.cached([], name="model") is None
    with pytest.raises(DownloadError, match="'' is no SHA-256"):
        fetch("https://example.org/a.pt", sha256="")
    with pytest.raises(DownloadError, match="Unknown type 'ftp'"):
        downloads.fetch([{"type": "ftp"}], name="model", sha256=None)
    with pytest.raises(DownloadError, match="needs 'url'"):
        downloads.fetch([{"type": "url"}], name="model", sha256=None)
    hub = {"type": "hub", "repo": "user/model", "revision": "0" * 40, "file": "a.pt"}
    for key, value in {"revision": "main", "repo": "user/a..b", "file": "../a.pt"}.items():
        with pytest.raises(DownloadError, match=value):
            downloads.fetch([{**hub, key: value}], name="model", sha256=None)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert downloads.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SEGBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert downloads.cache_folder() == tmp_path / "segbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert downloads.cache_folder() == tmp_path / ".cache" / "segbench"


def test_the_import_is_light() -> None:
    heavy = "{'requests', 'rich', 'huggingface_hub', 'torch'}"
    code = f"import sys, segbench.downloads; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# Helpers

# Nobody's key, of a certificate for localhost that nobody trusts.
SELF_SIGNED = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgDuOtwFkLcvJeJ6Gr
JgITRFNsStT0Guo7P8B15iLK3JmhRANCAAT1/7/yfHhsGUZ2RIferg4qNjZGfDqa
q3SQrhLAU27ExFXWdf3wA8dMGnoTO/WyqNPBQM10+1woEW/NKWdGnalO
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBfjCCASWgAwIBAgIUKz6IFe2LficbML4+CNTakTkch7AwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzAwNTU1NVoYDzIxMjYxMDMw
MDA1NTU1WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAT1/7/yfHhsGUZ2RIferg4qNjZGfDqaq3SQrhLAU27ExFXWdf3wA8dM
GnoTO/WyqNPBQM10+1woEW/NKWdGnalOo1MwUTAdBgNVHQ4EFgQUMeyTRp3z84iC
YMZ86k0Uqfo/nUMwHwYDVR0jBBgwFoAUMeyTRp3z84iCYMZ86k0Uqfo/nUMwDwYD
VR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNHADBEAiB7X5Ml6UiM9dh0XnYDCwWS
LmE2VsotywIMVu0USzZbkgIgdTf08SRA7nHn++qEQGnNwXstg0joN69yxGcHjksF
CPo=
-----END CERTIFICATE-----
"""

CLIENT = """
import json, sys
from segbench import downloads
found = downloads.fetch([{"type": "url", "url": sys.argv[1]}], name="model", sha256=sys.argv[2])
print(json.dumps({"path": str(found.path), "sha256": found.sha256}))
"""


def client(link: str, *, stderr: int = subprocess.PIPE, code: str = CLIENT) -> subprocess.Popen[str]:
    """A process of its own that downloads."""
    command = [sys.executable, "-c", code, link, SHA]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


def terminal() -> tuple[int, int]:
    """Both ends of a terminal of 100 columns: what a person sees, and what a process writes to."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    return outer, inner


def read_terminal(outer: int) -> bytes:
    """What is written to a terminal until nobody has it open."""
    drawn = b""
    while select.select([outer], [], [], 20)[0]:
        try:
            piece = os.read(outer, 4096)
        except OSError:
            break
        if not piece:
            break
        drawn += piece
    os.close(outer)
    return drawn


def wait_until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
