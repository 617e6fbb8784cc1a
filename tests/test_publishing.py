"""`publish`: what is written is what the Hub wants, what is uploaded comes back as the same model."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch

import segbench
from segbench import cards, entries
from segbench.files import sha256_bytes, sha256_file
from tests import servers

pytestmark = pytest.mark.slow

MODEL = "at_convnext_mini_shapes"
COMMIT = "c0ffee" * 6 + "abcd"


def test_dry_run_writes_weights_config_and_a_card_that_the_hub_understands(cli, tmp_path):
    code, out, err = cli("publish", MODEL, "--repo", "somebody/at-mini", "--dry-run", "--offline")
    assert (code, out) == (0, "")
    folder = tmp_path / "publish" / MODEL
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = segbench.get_card(MODEL)
    # Safetensors stay as they are: the hash, and with it every entry, remains valid.
    assert sha256_file(folder / "model.safetensors") == card.sha256
    assert card.sha256 in err
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == card.architecture
    assert config["num_classes"] == 8
    data = huggingface_hub.ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("segbench", "image-segmentation", "mit")
    assert data.datasets == ["shapes"]
    scores = {result.metric_name: result.metric_value for result in data.eval_results}
    entry, *_ = entries.entries_of(cards.get_card(MODEL))
    assert scores["clean mIoU"] == pytest.approx(100 * segbench.get_card(MODEL).expected["miou"], abs=0.05)
    assert scores["mIoU under sea-v1, ε = 8/255"] == pytest.approx(100 * entry["results"][1]["miou"], abs=0.05)
    kinds = {result.metric_name: result.metric_type for result in data.eval_results}
    assert all(
        kind == {"aAcc": "accuracy", "mIoU": "mean_iou"}[name.removeprefix("clean ")[:4]]
        for name, kind in kinds.items()
    )
    assert len(kinds) == 2 + 3 * 2 * 2  # clean; three radii under two protocols
    aacc, miou = (100 * entry["results"][2][key] for key in ("aacc", "miou"))
    assert f"| worst case under sea-v1, ε = 12/255 | {aacc:.1f} | {miou:.1f} |" in (folder / "README.md").read_text()


def test_a_pickle_of_tensors_becomes_safetensors_in_our_layout(cli, tmp_path):
    card = segbench.get_card(MODEL)
    model = segbench.load_model(MODEL)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, "mine.pt")
    document = card.document() | {
        "id": "mine", "sources": [{"type": "package", "file": "mine.pt"}],
        "sha256": None, "licence": None, "expected": None,
    }  # fmt: skip
    Path("mine.json").write_text(json.dumps(document))
    assert cli("publish", "mine.json", "--repo", "somebody/mine", "--out", "here", "--dry-run")[0] == 0
    state = safetensors.torch.load_file("here/model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value)
    data = huggingface_hub.ModelCard.load("here/README.md").data
    assert (data.license, data.license_name, data.eval_results) == ("other", "unknown", None)


def test_without_entries_the_scores_of_the_card_are_published(cli):
    card = segbench.get_card(MODEL)
    shutil.copy(card.path.with_suffix(".safetensors"), "mine.safetensors")
    document = card.document() | {"id": "mine", "expected": {"aacc": 0.75, "miou": 0.25}}
    document |= {"sources": [{"type": "package", "file": "mine.safetensors"}]}
    Path("mine.json").write_text(json.dumps(document))
    assert cli("publish", "mine.json", "--repo", "somebody/mine", "--out", "here", "--dry-run")[0] == 0
    results = huggingface_hub.ModelCard.load("here/README.md").data.eval_results
    assert {result.metric_name: (result.metric_type, result.metric_value) for result in results} == {
        "clean aAcc": ("accuracy", 75.0), "clean mIoU": ("mean_iou", 25.0)
    }  # fmt: skip
    assert "| clean | 75.0 | 25.0 |" in Path("here/README.md").read_text()


def test_what_nobody_may_pass_on_is_not_uploaded(cli):
    code, _, err = cli("publish", "pirat_convnext_t_voc", "--repo", "somebody/x")
    assert (code, "names no licence" in err, "--licence" in err) == (2, True, True)
    code, _, err = cli("publish", MODEL, "--repo", "nobody", "--dry-run")
    assert (code, "'nobody' is not user/name" in err) == (2, True)
    code, _, err = cli("publish", "at_convnext_t_voc", "--repo", "a/b", "--dry-run")
    assert (code, "not published" in err) == (1, True)


def read_body(handler: servers.Handler) -> bytes:
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    body = b""
    while size := int(handler.rfile.readline(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body


class WritableHub:
    """What the Hub answers to an upload; the files of the last commit."""

    def __init__(self, host: servers.Host, token: str) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.token = token
        self.host = host
        host.route(r"/api/repos/create", self._create)
        host.route(r"/api/models/[^/]+/[^/]+/preupload/main.*", self._preupload)
        host.route(r"/api/models/[^/]+/[^/]+/commit/main.*", self._commit)
        host.route(r"/api/validate-yaml", self._validate)

    def _answer(self, handler, document, status=200):
        body = json.dumps(document).encode()
        handler.reply(status, {"Content-Type": "application/json"}, body)

    def _body(self, handler) -> bytes | None:
        body = read_body(handler)
        if handler.headers.get("Authorization") == f"Bearer {self.token}":
            return body
        self._answer(handler, {"error": "Invalid username or password."}, 401)
        return None

    def _validate(self, handler, _):
        self.validated = json.loads(read_body(handler))["content"]
        self._answer(handler, {"errors": [], "warnings": []})

    def _create(self, handler, _):
        if (body := self._body(handler)) is not None:
            self.created.append(json.loads(body))
            self._answer(handler, {"url": f"{self.host.url}/somebody/at-mini"})

    def _preupload(self, handler, _):
        if (body := self._body(handler)) is not None:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self._answer(handler, {"files": files})

    def _commit(self, handler, _):
        if (body := self._body(handler)) is not None:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.host.url}/somebody/at-mini/commit/{COMMIT}"
            self._answer(handler, {"commitOid": COMMIT, "commitUrl": url, "success": True})


def segbench_command(*args: str, folder: Path, endpoint: str, token: str | None) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "SEGBENCH_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    env |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "segbench", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_published_weights_come_back_from_the_hub(tmp_path):
    with servers.host() as hub_host, servers.host() as storage:
        writable = WritableHub(hub_host, token="hf_secret")
        refused = segbench_command(
            "publish", MODEL, "--repo", "somebody/at-mini", folder=tmp_path, endpoint=hub_host.url, token="hf_wrong"
        )
        assert refused.returncode == 1
        assert "HF_TOKEN" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not writable.files
        done = segbench_command(
            "publish", MODEL, "--repo", "somebody/at-mini", "--private",
            folder=tmp_path, endpoint=hub_host.url, token="hf_secret",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert writable.validated == writable.files["README.md"].decode()
        assert set(writable.files) == {"README.md", "config.json", "model.safetensors"}
        assert writable.created[-1]["name"] == "at-mini"
        printed = json.loads(done.stdout)
        (source,) = printed["sources"]
        assert source == {"type": "hub", "repo": "somebody/at-mini", "revision": COMMIT, "file": "model.safetensors"}
        assert printed["sha256"] == sha256_bytes(writable.files["model.safetensors"])

        # What it prints, pasted into a card elsewhere, loads the same model.
        resource = servers.Resource(writable.files["model.safetensors"], etag=f'"{printed["sha256"]}"')
        servers.Hub(hub_host, storage, resource, repo="somebody/at-mini", revision=COMMIT, file="model.safetensors")
        document = segbench.get_card(MODEL).document() | {"id": "mine"} | printed
        (tmp_path / "mine.json").write_text(json.dumps(document))
        assert cards.read_card(tmp_path / "mine.json").sources == [source]
        checked = segbench_command(
            "check-model", "mine.json", "--images", "4", "--json", folder=tmp_path, endpoint=hub_host.url, token=None
        )
        assert checked.returncode == 0, checked.stderr
        assert {finding["level"] for finding in json.loads(checked.stdout)} == {"ok"}
        assert len([request for request in storage.log if request.method == "GET"]) == 1


def test_without_a_hub_what_was_written_is_kept(tmp_path):
    with servers.host() as closed:
        endpoint = closed.url
    done = segbench_command(
        "publish", MODEL, "--repo", "somebody/at-mini", folder=tmp_path, endpoint=endpoint, token="hf_secret"
    )
    assert done.returncode == 1
    assert re.search(r"cannot be reached.*is kept in", " ".join(done.stderr.split()))
    assert (tmp_path / "publish" / MODEL / "model.safetensors").is_file()
    assert "Traceback" not in done.stderr
