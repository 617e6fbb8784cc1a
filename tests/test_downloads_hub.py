"""Downloads from the Hub: its own client, in processes of their own, against a server that speaks the resolve protocol.

The client reads its ``HF_*`` variables when it is imported, so each case is a process.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.servers import Hub, Resource
from tests.test_downloads import read_terminal, terminal, wait_until

pytestmark = pytest.mark.slow

DATA = random.Random(3).randbytes(400_000)
SHA = hashlib.sha256(DATA).hexdigest()

CLIENT = """
import json, sys
from segbench import downloads
from segbench.errors import DownloadError
sources, options = json.loads(sys.argv[1])
limits = downloads.Limits(pause_s=0.01, attempts=3)
try:
    found = downloads.fetch(sources, name="model", limits=limits, **options)
    here = downloads.cached(sources, name="model")
    said = {"path": str(found.path), "sha256": found.sha256, "source": found.source, "cached": str(here)}
except DownloadError as error:
    said = {"error": str(error), "cached": str(downloads.cached(sources, name="model"))}
print(json.dumps(said))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with servers.host() as endpoint, servers.host() as storage:
        yield Hub(endpoint, storage, Resource(DATA, etag=f'"{SHA}"'))


class Machine:
    """A machine with caches of its own, whose Hub is ``hub``."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub, self.code = folder, hub, CLIENT
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "LD_LIBRARY_PATH") if key in os.environ}
        self.environment = {
            **kept,
            "HOME": str(folder),
            "SEGBENCH_CACHE": str(folder / "cache"),
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": hub.hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *sources: dict[str, str], sha256: str | None = SHA, **options: Any) -> subprocess.Popen[str]:
        environment = {**self.environment, **options.pop("environment", {})}
        stderr = options.pop("stderr", subprocess.PIPE)
        task = json.dumps([sources or [self.hub.source], {"sha256": sha256, **options}])
        command = [sys.executable, "-c", self.code, task]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        )  # fmt: skip

    def fetch(self, *sources: dict[str, str], **options: Any) -> dict[str, Any]:
        """What the client said, and under ``log`` what it wrote to standard error."""
        process = self.start(*sources, **options)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        said: dict[str, Any] = json.loads(out)
        return {**said, "log": err}


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path, hub)


def test_fresh_then_cached_then_offline(machine: Machine, hub: Hub) -> None:
    first = machine.fetch()
    assert Path(first["path"]).read_bytes() == DATA
    assert (first["sha256"], first["source"], first["cached"]) == (SHA, hub.source, first["path"])
    assert Path(first["path"]).is_relative_to(machine.folder / "hf")
    assert len(hub.bodies()) == 1
    asked = len(hub.hub.log)
    for options in ({}, {"offline": True}, {"environment": {"HF_HUB_OFFLINE": "1"}}):
        assert machine.fetch(**options)["path"] == first["path"]
    assert (len(hub.bodies()), len(hub.hub.log)) == (1, asked)


def test_offline_without_the_file(machine: Machine, hub: Hub) -> None:
    for options in ({"offline": True}, {"environment": {"HF_HUB_OFFLINE": "1"}}):
        said = machine.fetch(**options)
        assert said["error"].startswith("model is missing, and the network is not to be used")
        assert "While online: segbench show model --download" in said["error"]
        assert said["cached"] == "None"
    assert hub.hub.log == hub.storage.log == []


def test_a_file_put_by_hand(machine: Machine) -> None:
    error = machine.fetch(offline=True)["error"]
    place = Path(re.search(r"save the file as (.*)", error)[1])
    place.parent.mkdir(parents=True)
    place.write_bytes(DATA)
    assert machine.fetch(offline=True)["path"] == str(place)


@pytest.mark.parametrize("linked", [True, False])
def test_a_wrong_file_put_by_hand(machine: Machine, hub: Hub, linked: bool) -> None:
    """It is replaced when the right one has come, not before; what a person keeps elsewhere stays as it is."""
    error = machine.fetch(offline=True)["error"]
    place = Path(re.search(r"save the file as (.*)", error)[1])
    place.parent.mkdir(parents=True)
    own = machine.folder / "own.pt" if linked else place
    own.write_bytes(b"another model")
    if linked:
        place.symlink_to(own)
    hub.gated = True
    assert "is gated" in machine.fetch()["error"]
    assert place.read_bytes() == b"another model"
    hub.gated = False
    assert machine.fetch()["path"] == str(place)
    assert place.read_bytes() == DATA
    assert own.read_bytes() == (b"another model" if linked else DATA)
    assert {path.name for path in place.parent.iterdir()} == {place.name}


def test_continues_after_a_cut_connection(machine: Machine, hub: Hub) -> None:
    """The client keeps pieces of 10 MiB."""
    large = random.Random(4).randbytes(24 << 20)
    digest = hashlib.sha256(large).hexdigest()
    hub.resource.data, hub.resource.etag = large, f'"{digest}"'
    hub.resource.faults = [servers.cut(22 << 20)]
    assert machine.fetch(sha256=digest)["sha256"] == digest
    first, second = hub.bodies()
    assert "range" not in first.headers
    assert second.headers["range"] == f"bytes={20 << 20}-"
    assert (second.status, second.sent) == (206, 4 << 20)


def test_passing_errors_are_tried_again(machine: Machine, hub: Hub) -> None:
    """What the client does not try again by itself: an error of the storage host, a reset, a body that is too short."""

    def short(handler: servers.Handler, resource: Resource) -> None:
        handler.reply(200, {}, DATA[:1000])

    for faults in ([servers.status(500), servers.reset(100_000)], [short]):
        hub.resource.faults = list(faults)
        said = machine.fetch()
        assert said["sha256"] == SHA, said
        assert "trying again in" in said["log"]
        Path(said["path"]).resolve().unlink()


def test_the_hub_is_in_trouble_for_a_moment(machine: Machine, hub: Hub) -> None:
    hub.head_faults = [servers.status(500)]
    assert machine.fetch()["sha256"] == SHA


def test_a_body_that_is_always_truncated(machine: Machine, hub: Hub) -> None:
    hub.resource.faults = [lambda handler, _: handler.reply(200, {}, DATA[:1000])] * 9
    said = machine.fetch()
    assert f"the connection to {hub.hub.url} failed: Consistency check failed" in said["error"]
    assert "tried 3 times" in said["error"]
    assert said["cached"] == "None"


def test_a_wrong_hash_and_a_damaged_file(machine: Machine, hub: Hub) -> None:
    said = machine.fetch(sha256="0" * 64)
    assert (
        f"what arrived is not the file that is expected: its SHA-256 is {SHA}, the card pins {'0' * 64}"
        in said["error"]
    )
    path = Path(said["cached"])  # it is what the Hub has, so the card is wrong: others may use the file
    assert "what the Hub has is not the file" in machine.fetch(sha256="0" * 64)["error"]
    assert len(hub.bodies()) == 1
    assert machine.fetch()["path"] == str(path)
    path.resolve().write_bytes(DATA[:-1] + b"!")
    assert "what is on this machine is not right" in machine.fetch(offline=True)["error"]
    said = machine.fetch()
    assert (said["path"], path.read_bytes()) == (str(path), DATA)
    assert "is not right" in said["log"]
    assert len(hub.bodies()) == 2


def test_an_unpinned_hash_is_remembered(machine: Machine, hub: Hub) -> None:
    assert f"SHA-256 of model is {SHA} (its card pins none)" in machine.fetch(sha256=None)["log"]
    again = machine.fetch(sha256=None)
    assert again["log"] == ""
    Path(again["path"]).resolve().unlink()
    Path(again["path"]).unlink()
    hub.resource.data, hub.resource.etag = DATA[::-1], '"other"'
    assert "this machine remembers" in machine.fetch(sha256=None)["error"]


def test_what_the_hub_refuses(machine: Machine, hub: Hub) -> None:
    cases = {
        "no file other.pt in commit": {"file": "other.pt"},
        "has no commit ffffffff": {"revision": "f" * 40},
        "no public repository user/other. If it is private: set HF_TOKEN, or run: hf auth login": {
            "repo": "user/other"
        },
    }
    for message, change in cases.items():
        said = machine.fetch({**hub.source, **change})
        assert message in said["error"]
    hub.gated = True
    assert "user/model is gated. Accept its terms at https://huggingface.co/user/model" in machine.fetch()["error"]
    assert hub.bodies() == []


def test_a_private_repository(machine: Machine, hub: Hub) -> None:
    """The token goes to the Hub and to nobody else."""
    hub.token = "hf_secret"
    said = machine.fetch()
    assert "no public repository user/model. If it is private: set HF_TOKEN" in said["error"]
    assert "your token is not accepted" in machine.fetch(environment={"HF_TOKEN": "hf_wrong"})["error"]
    with servers.host() as other:
        link = other.redirect("/a.pt", other.file("/b.pt", Resource(DATA)))
        environment = {"HF_TOKEN": "hf_secret"}
        first = machine.fetch({"type": "url", "url": link}, environment=environment)
        assert machine.fetch(environment=environment)["sha256"] == first["sha256"] == SHA
        assert hub.hub.log[-1].headers["authorization"] == "Bearer hf_secret"
        assert not any("authorization" in request.headers for request in [*other.log, *hub.storage.log])
        assert (len(other.log), len(hub.bodies())) == (2, 1)


def test_web_pages_instead_of_the_hub(machine: Machine, hub: Hub) -> None:
    """A login page of the network, before the Hub and before its storage."""
    page = b"<!DOCTYPE html><title>Hotel</title>"
    hub.resource.data, hub.resource.content_type = page.ljust(len(DATA)), "text/html"
    said = machine.fetch(sha256=None)
    assert "what arrived is a web page, not weights: 'Hotel'" in said["error"]
    assert said["cached"] == "None"
    hub.hub.route("/.*", lambda handler, _: handler.reply(200, {"Content-Type": "text/html", "ETag": '"x"'}, page))
    assert "the server does not answer as the Hub does. Check HF_ENDPOINT" in machine.fetch()["error"]


def test_two_processes_download_once(machine: Machine, hub: Hub) -> None:
    go = threading.Event()
    hub.resource.faults = [servers.hold(100_000, go)]
    first = machine.start()
    wait_until(hub.bodies)
    second = machine.start()
    assert second.stderr is not None
    assert "waiting for another process" in second.stderr.readline()
    go.set()
    for process in (first, second):
        assert json.loads(process.communicate(timeout=60)[0])["sha256"] == SHA
    assert len(hub.bodies()) == 1


def test_a_killed_process_leaves_no_lock(machine: Machine, hub: Hub) -> None:
    never = threading.Event()
    hub.resource.faults = [servers.hold(100_000, never)]
    process = machine.start()
    wait_until(hub.bodies)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert machine.fetch()["sha256"] == SHA
    never.set()


def test_a_link_is_the_second_source(machine: Machine, hub: Hub) -> None:
    with servers.host() as other:
        link = {"type": "url", "url": other.file("/a.pt", Resource(DATA))}
        said = machine.fetch({**hub.source, "file": "gone.pt"}, link)
    assert said["source"] == link
    assert "hub: user/model@01234567/gone.pt does not work: user/model has no file gone.pt" in said["log"]


def test_a_full_disk(machine: Machine, hub: Hub) -> None:
    machine.code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))" + CLIENT
    said = machine.fetch()
    assert f"the disk of {machine.folder / 'hf' / 'hub'} is full (File too large). Free some space" in said["error"]
    assert "set HF_HOME" in said["error"]
    assert len(hub.bodies()) == 1


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_is_that_of_the_client(machine: Machine, progress: bool) -> None:
    outer, inner = terminal()
    process = machine.start(progress=progress, stderr=inner)
    os.close(inner)
    drawn = read_terminal(outer)
    assert process.wait(20) == 0
    assert (b"400k" in drawn) is progress
