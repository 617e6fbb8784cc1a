"""Weights files come from strangers: nothing in them is executed. And the whole way from a link to an entry."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import segbench
from segbench.errors import DownloadError, ModelError, UnknownNameError
from segbench.files import sha256_file
from segbench.models import backbones, from_released
from segbench.models.architectures import build
from segbench.models.weights import read_weights
from tests import servers
from tests.conftest import recipe_weights, released_layout

pytestmark = pytest.mark.slow

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


class Evil:
    """A pickle that would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "old", "checkpoint"])
def test_what_is_right_is_read(tmp_path, kind):
    path = tmp_path / "weights.bin"  # the format is seen from the content, not from the name
    if kind == "safetensors":
        safetensors.torch.save_file(STATE, path)
    elif kind == "checkpoint":
        torch.save({"state_dict": STATE, "epoch": 3, "args": {"lr": 0.1}}, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    found = read_weights(path)
    found = found["state_dict"] if kind == "checkpoint" else found
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], value) for key, value in STATE.items())


@pytest.mark.parametrize("form", ["zip", "old", "bare", "inside"])
def test_a_malicious_pickle_is_not_executed(tmp_path, form):
    path, target = tmp_path / "evil.pt", tmp_path / "executed"
    evil = {"a": Evil(target)} if form != "inside" else {"state_dict": STATE, "optimizer": Evil(target)}
    if form == "bare":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form != "old")
    with pytest.raises(ModelError, match="A pickle can run any code"):
        read_weights(path)
    assert not target.exists()


def test_a_whole_module_is_refused_with_the_mend(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ModelError, match=r"refused.*asks for torch.nn.modules.linear.Linear.*safetensors"):
        read_weights(tmp_path / "module.pt")


def test_packed_archives_are_refused_before_they_unpack(tmp_path):
    torch.save(STATE, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member), zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match="packed archive"):
        read_weights(tmp_path / "packed.pt")


def test_a_tensor_that_claims_more_than_it_holds_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1).expand(1 << 30, 3)}}, tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 5000
    with pytest.raises(ModelError, match="repeated numbers: refused"):
        read_weights(tmp_path / "small.pt")


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "weights"
    with pytest.raises(ModelError, match="Cannot read the weights"):
        read_weights(path)
    safetensors.torch.save_file(STATE, path)
    whole = path.read_bytes()
    torch.save(STATE, path)
    zipped = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", b"x", b"PK\x03\x04", whole[:-1], whole[:20], zipped[: len(zipped) // 2], rng.bytes(500)]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"damaged|refused"):
            read_weights(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ModelError, match="hold a Tensor, not a state dict"):
        read_weights(path)


# ------------------------------------------------------------------------------------- from a link to an entry


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file in the released layout of UPerNet ConvNeXt-T, with random weights, as ``torch.save`` writes it."""
    path = tmp_path_factory.mktemp("released") / "weights.pt"
    state = recipe_weights(released_layout("upernet_convnext_t"))
    torch.save({key: value.float() if value.is_floating_point() else value for key, value in state.items()}, path)
    return path


@pytest.fixture
def card(tmp_path, released, monkeypatch):
    """The card of a released model, its link one to this machine, and a data set of two images of 21 classes."""
    monkeypatch.setenv("SEGBENCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(rng.integers(0, 21, (32, 32), np.uint8)).save(folder / "masks" / f"{number}.png")
    (folder / "classes.txt").write_text("\n".join(f"class {number}" for number in range(21)))
    with servers.host() as host:
        link = f"{host.url}/index.php/s/zSFgoAngcm47FZm"
        host.file("/index.php/s/zSFgoAngcm47FZm/download", servers.Resource(released.read_bytes()))
        document = segbench.get_card("pirat_convnext_t_voc").document()
        document |= {"sources": [{"type": "url", "url": link}]}
        path = tmp_path / "pirat_convnext_t_voc.json"
        path.write_text(json.dumps(document))
        yield path, folder, host


def test_a_released_file_travels_from_its_link_to_an_entry(card, released, tmp_path, caplog):
    path, folder, host = card
    with pytest.raises(DownloadError, match="--download"):
        segbench.load_model(str(path), offline=True)
    assert host.log == []
    model = segbench.load_model(str(path), progress=False)
    assert "SHA-256 of pirat_convnext_t_voc is" in caplog.text  # its card pins none: shown and remembered
    assert sum(parameter.numel() for parameter in model.parameters()) == 60_181_610
    assert not any(module.training for module in model.modules())
    image = torch.rand(1, 3, 65, 64)
    direct = from_released("upernet_convnext_t", read_weights(released), num_classes=21)
    with torch.no_grad():
        assert torch.equal(model(image), direct(image))
    result = segbench.evaluate(
        str(path), "folder", eps=[8], data_root=folder, out=tmp_path / "run", iterations=2, progress=False, offline=True
    )
    assert len(host.gets()) == 1  # downloaded once, then from the cache
    entry = result.entry()
    assert entry["model"]["id"] == "pirat_convnext_t_voc"
    assert entry["model"]["weights_sha256"] == sha256_file(released)
    assert entry["results"][0]["aacc"] <= entry["clean"]["aacc"]


def test_an_error_message_in_place_of_the_file_is_not_remembered(card, released, tmp_path):
    path, _, host = card
    for body in (b'{"error": "quota exceeded"}', "Nicht gefunden: ä".encode()):
        host.file("/index.php/s/zSFgoAngcm47FZm/download", servers.Resource(body, content_type="application/json"))
        with pytest.raises(DownloadError, match=r"is text, not weights: '.*(quota exceeded|Nicht gefunden)"):
            segbench.load_model(str(path), progress=False)
    assert not (tmp_path / "cache" / "pins").exists()
    host.file("/index.php/s/zSFgoAngcm47FZm/download", servers.Resource(b"\x80\x04not weights\x00" * 100, etag='"v3"'))
    with pytest.raises(ModelError, match=r"If the download went wrong: delete .*/cache/weights/.* and .*/cache/pins/"):
        segbench.load_model(str(path), progress=False)


def test_another_file_behind_the_same_link_is_refused(card, tmp_path):
    path, _, host = card
    segbench.load_model(str(path), progress=False)
    (file,) = [path for path in (tmp_path / "cache" / "weights").rglob("*") if path.stat().st_size > 10**8]
    file.unlink()
    other = safetensors.torch.save(STATE)
    host.file("/index.php/s/zSFgoAngcm47FZm/download", servers.Resource(other, etag='"v2"'))
    with pytest.raises(DownloadError, match=r"SHA-256.*delete"):
        segbench.load_model(str(path), progress=False)


def test_a_script_loads_a_released_model_from_the_cache(card, tmp_path):
    """`segbench.load_model` as a user calls it; benchmarks/loading.py measures how long it takes."""
    path, _, _ = card
    segbench.load_model(str(path), progress=False)
    code = f"import segbench; print(type(segbench.load_model({str(path)!r}, offline=True)).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "UPerNet"


# ------------------------------------------------------------------------------------------- robust backbones


def test_a_robust_backbone_travels_from_its_link_into_a_model(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SEGBENCH_CACHE", str(tmp_path / "cache"))
    arguments = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "channels": 8, "auxiliary_channels": 8}
    torch.manual_seed(0)
    teacher = build("upernet_convnext", num_classes=3, **arguments)
    state = {
        f"module.model.{key.replace('stem.', 'stem.stem.', 1)}": value + 1
        for key, value in teacher.backbone.state_dict().items()
        if not key.startswith("norms.")
    }
    state |= {"module.model.head.fc.weight": torch.zeros(1000, 16), "module.model.strange": torch.zeros(1)}
    torch.save(state, tmp_path / "robust.pt")
    with servers.host() as host:
        link = host.file("/dav/files/x/robust.pt", servers.Resource((tmp_path / "robust.pt").read_bytes()))
        monkeypatch.setattr(
            backbones, "BACKBONES", {"robust_convnext_t": replace(backbones.BACKBONES["robust_convnext_t"], url=link)}
        )
        student = build("upernet_convnext", num_classes=3, **arguments)
        with pytest.raises(DownloadError, match="offline"):
            backbones.fetch_backbone("robust_convnext_t", offline=True)
        report = robust(student, backbones.fetch_backbone("robust_convnext_t", progress=False))
        again = robust(student, backbones.fetch_backbone("robust_convnext_t", offline=True))
    assert len(host.gets()) == 1
    assert report.unknown == again.unknown == ("strange",)
    assert "left out: strange" in caplog.text
    assert "SHA-256 of backbone_robust_convnext_t" in caplog.text
    for key, value in teacher.backbone.state_dict().items():
        expected = value if key.startswith("norms.") else value + 1
        assert torch.equal(student.backbone.state_dict()[key], expected), key


def robust(model, path):
    known = backbones.BACKBONES["robust_convnext_t"].normalization
    return backbones.load_backbone(model, read_weights(path), source=str(path), normalization=known)


def test_a_backbone_without_a_link_needs_a_file(tmp_path):
    model = build("pspnet_resnet", num_classes=3, depths=(1, 1, 1, 1), width=8, channels=8, auxiliary_channels=8)
    with pytest.raises(ModelError, match=r"no link of its own.*Salman2020Do_R50.*give its file"):
        backbones.fetch_backbone("robust_resnet50")
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "r.pt")
    with pytest.raises(ModelError, match="do not fit the backbone"):
        robust(model, tmp_path / "r.pt")
    with pytest.raises(UnknownNameError, match="Did you mean 'robust_vit_s'"):
        backbones.fetch_backbone("robust_vit")
