"""Models of the hub: its own client, in processes of their own, against a server that speaks its protocol.

The client reads its ``HF_*`` variables when it is imported.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.servers import Host

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIENT = """
import json, logging, sys
from segbench.errors import ModelError
from segbench.models.load import load
from segbench.models.sources.names import parse
logging.basicConfig(format="%(message)s")
said = []
for spec, offline in json.loads(sys.argv[1]):
    try:
        found = load(parse(spec), offline=offline)
        said.append([found.id, found.module.num_classes])
    except ModelError as error:
        said.append(str(error))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Mapping[str, bytes]:
    """The files of a repository: a tiny SegFormer, and what must not be downloaded."""
    transformers = importlib.import_module("transformers")
    folder = tmp_path_factory.mktemp("repository")
    config = transformers.SegformerConfig(
        num_labels=8, depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    transformers.SegformerImageProcessor().save_pretrained(folder)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**found, "pytorch_model.bin": b"a pickle", "code.py": b"1 / 0", "README.md": b"# A model"}


def offer(host: Host, files: Mapping[str, bytes]) -> None:
    """``user/tiny``, its branch ``main`` and tag ``v1``; ``user/gated``; ``user/empty`` without files."""

    def known(handler: Any, repo: str, revision: str | None) -> bool:
        answer = None
        if repo not in ("user/tiny", "user/gated", "user/empty"):
            answer = 401, "RepoNotFound"
        elif revision not in (None, "main", "v1", COMMIT):
            answer = 404, "RevisionNotFound"
        elif repo == "user/gated":
            answer = 403, "GatedRepo"
        if answer:
            handler.reply(answer[0], {"X-Error-Code": answer[1], "X-Error-Message": "no"}, b"")
        return answer is None

    def info(handler: Any, match: Any) -> None:
        if known(handler, match["repo"], match["revision"]):
            body = {"id": match["repo"], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            handler.reply(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def resolve(handler: Any, match: Any) -> None:
        if not known(handler, match["repo"], match["revision"]):
            return
        data = files.get(match["file"])
        if data is None or match["repo"] == "user/empty":
            handler.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
            return
        etag = hashlib.sha256(data).hexdigest()
        handler.reply(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, data)

    host.route(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/?]+))?(\?.*)?", info)
    host.route(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", resolve)


def client(folder: Path, endpoint: str, *asked: tuple[str, bool]) -> tuple[list[Any], str]:
    """What a process says of specs, and its standard error."""
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "PYTHONPATH", "OMP_NUM_THREADS") if key in os.environ}
    environment = {**kept, "HOME": str(folder), "HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(asked)],
        capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_repository_without_a_processor_is_known_as_such_offline(tmp_path, files):
    with servers.host() as host:
        offer(host, {name: data for name, data in files.items() if name != "preprocessor_config.json"})
        said, errors = client(tmp_path, host.url, ("hf:user/tiny", False), ("hf:user/tiny", True))
    assert said == [["hf_user_tiny", 8]] * 2
    assert "are not normalised" in errors


def test_models_of_the_hub_are_downloaded_once_and_found_offline(tmp_path, files):
    local = tmp_path / "local"  # names a backbone of the hub, which the library asks for
    local.mkdir()
    (local / "model.safetensors").write_bytes(files["model.safetensors"])
    (local / "config.json").write_text(json.dumps({"model_type": "upernet", "backbone": "other/backbone"}))
    with servers.host() as host:
        offer(host, files)
        said, _ = client(
            tmp_path, host.url,
            ("hf:user/tiny", True), ("hf:user/tiny", False), ("hf:user/tiny@v1", False), ("hf:user/tiny@v9", False),
            ("hf:user/absent", False), ("hf:user/gated", False), ("hf:user/empty", False), ("hf:a/b/c", False),
            (f"hf:{local}", True),
        )  # fmt: skip
        asked = {request.path.rpartition("/")[2] for request in host.log if "/resolve/" in request.path}
        endpoint = host.url
    assert said[0] == "user/tiny is not on this machine. While online: hf download user/tiny"
    assert said[1:3] == [["hf_user_tiny", 8], ["hf_user_tiny_v1", 8]]
    assert asked == {"config.json", "preprocessor_config.json", "model.safetensors"}
    for text, expected in zip(
        said[3:],
        [
            "The repository user/tiny has no revision 'v9'. After @ goes a branch, a tag or a commit.",
            "The hub has no repository 'user/absent', or it is private. Correct the name",
            "The repository user/gated is gated. Accept its terms on its page, then set HF_TOKEN, or: hf auth login",
            "The repository user/empty has no config.json",
            "'a/b/c' is no repository of the hub",
            "transformers ",
        ],
        strict=True,
    ):
        assert text.startswith(expected)

    assert "other" not in "".join(request.path for request in host.log)

    # A cache that another program filled may lack the processor: that is not the same as a model without one.
    (snapshot,) = (tmp_path / "hf" / "hub" / "models--user--tiny" / "snapshots").iterdir()
    processor = snapshot / "preprocessor_config.json"
    kept = processor.readlink()
    processor.unlink()
    said, _ = client(tmp_path, endpoint, ("hf:user/tiny", True), ("hf:user/tiny?normalize=none", True))
    assert said[0].startswith("Of hf:user/tiny") or said[0].startswith(
        "Of user/tiny only the weights are on this machine"
    )
    assert said[1] == ["hf_user_tiny_normalize_none", 8]
    processor.symlink_to(kept)

    said, errors = client(  # nothing listens there any more
        tmp_path, endpoint, ("hf:user/tiny", True), ("hf:user/tiny", False), ("hf:user/other", False)
    )
    assert said[:2] == [["hf_user_tiny", 8]] * 2
    assert "user/tiny is taken from its cache" in errors
    assert said[2].startswith("user/other is not on this machine, and cannot be downloaded: ")
    assert said[2].endswith("hf download user/other")


def test_a_model_of_smp_comes_from_the_hub_and_then_from_the_cache(tmp_path):
    smp = importlib.import_module("segmentation_models_pytorch")
    smp.Unet(
        "mobilenet_v2", encoder_weights=None, classes=5, encoder_depth=3, decoder_channels=(8, 8, 8)
    ).save_pretrained(tmp_path / "unet")
    files = {path.name: path.read_bytes() for path in (tmp_path / "unet").iterdir()}
    with servers.host() as host:
        offer(host, files)
        said, _ = client(tmp_path, host.url, ("smp:user/tiny", False), ("smp:user/absent", False))
    assert said[0] == ["smp_user_tiny", 5]
    assert said[1].startswith("The hub has no repository 'user/absent'")
    said, _ = client(tmp_path, host.url, ("smp:user/tiny", True))
    assert said == [["smp_user_tiny", 5]]
