"""Evaluations on images from files: read once, decoded ahead, the same bytes whatever was remembered."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import segbench
from segbench.data import reading
from segbench.engine.compute import prefetch
from segbench.engine.compute.prefetch import Prefetcher
from segbench.engine.compute.session import open_session
from segbench.engine.compute.worker import Worker
from segbench.engine.launch.local import first_pass
from segbench.engine.rundir.plan import Unit, plan
from segbench.engine.rundir.store import Store
from segbench.errors import DataError, IncompleteError, RunError
from segbench.protocol import SEA_V1

IMAGES = 35  # three units
SHORT = {"eps": 8, "iterations": 1, "progress": False}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Small pictures of two sizes in the layout of `folder`."""
    root, rng = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir()
    (root / "classes.txt").write_text("a\nb\nc\n")
    for number in range(IMAGES):
        size = (16, 20) if number % 3 else (18, 16)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / "images" / f"{number:02}.png")
        Image.fromarray(rng.integers(0, 3, size).astype(np.uint8)).save(root / "masks" / f"{number:02}.png")
    return root


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A machine that remembers nothing."""
    monkeypatch.setenv("SEGBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 3, 3, padding=1).eval()


def stamps(data):
    return {image_id: data.files.stamps([image_id]) for image_id in data.image_ids}


def evaluate(root, out, **changes):
    return segbench.evaluate(model(), "folder", data_root=root, out=out, **(SHORT | changes))


def test_the_first_pass_reads_each_image_once_and_gives_fingerprint_and_clean_counts(tree, own_cache, monkeypatch):
    data, read, lock = segbench.load_dataset("folder", tree), Counter(), threading.Lock()
    original = reading.read_turned_image

    def counted(path, *args):
        with lock:
            read[path.name] += 1
        return original(path, *args)

    monkeypatch.setattr(reading, "read_turned_image", counted)
    worker = Worker(model(), data, SEA_V1, torch.device("cpu"), one_core=True)
    units = plan("sea-v1", data.image_ids, [8.0], SEA_V1.losses)
    with open_session(worker.models, worker.device) as session:
        fingerprint, done = first_pass(session, worker, units, units[:2], progress=False)
    assert set(read.values()) == {1}
    assert len(read) == IMAGES
    assert [finished.unit for finished in done] == units[:2]  # the third is somebody else's, but was hashed
    assert data.known_fingerprint() == fingerprint
    shutil.rmtree(own_cache)
    assert data.known_fingerprint() is None
    assert data.fingerprint() == fingerprint
    with torch.no_grad():
        right = [int((model()(item.image[None]).argmax(1)[0] == item.label).sum()) for item in data.first(32)]
    counted_right = np.concatenate([finished.group.counts.intersection.sum(1) for finished in done])
    assert counted_right.tolist() == right


@pytest.mark.slow
def test_what_was_remembered_changes_no_byte(tree, own_cache, tmp_path):
    fresh = evaluate(tree, tmp_path / "fresh")
    remembered = evaluate(tree, tmp_path / "remembered")
    shutil.rmtree(own_cache)
    shards = []
    for number in (1, 2):  # two machines, each with a cache of its own
        os.environ["SEGBENCH_CACHE"] = str(own_cache / str(number))
        try:
            shards.append(evaluate(tree, tmp_path / "shards", shard=f"{number}/2"))
        except IncompleteError:
            assert number == 1
    for other in (remembered, *shards):
        assert other.evidence_path.read_bytes() == fresh.evidence_path.read_bytes()


def test_a_changed_picture_is_another_run(tree, own_cache, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree")
    evaluate(root, tmp_path / "run")
    path = root / "images" / "05.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    with pytest.raises(
        RunError, match=r": pixels or labels of the images: \w{12}\.{3} there, \w{12}\.{3} here\. Nothing"
    ):
        evaluate(root, tmp_path / "run")


def test_another_data_set_of_the_same_pictures_is_another_run(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree")
    (root / "dataset.yaml").write_text("name: mine\nclasses: [a, b, c]\n")
    evaluate(tree, tmp_path / "run", limit=2)
    with pytest.raises(RunError, match="is the run of the data set folder, not folder/mine"):
        evaluate(root, tmp_path / "run", limit=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim", ["segbench.data.dataset.Fingerprint.finish", "segbench.engine.rundir.store.Store.log"]
)
def test_killed_runs_continue(tree, own_cache, tmp_path, victim):
    """The process kills itself at the end of the first pass, before there is a run directory, or in its third unit."""
    module, name, method = victim.rsplit(".", 2)
    code = f"""
import importlib, os, signal, sys, torch, segbench
torch.set_num_threads(1)
torch.manual_seed(0)
holder, calls = getattr(importlib.import_module({module!r}), {name!r}), []
original = holder.{method}
def fatal(*arguments):
    calls.append(1)
    if len(calls) == (1 if {method!r} == "finish" else 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
holder.{method} = fatal
model = torch.nn.Conv2d(3, 3, 3, padding=1).eval()
segbench.evaluate(model, 'folder', data_root=sys.argv[1], out=sys.argv[2], **{SHORT})
"""
    out, reference = tmp_path / "run", evaluate(tree, tmp_path / "reference")
    shutil.rmtree(own_cache)
    done = subprocess.run([sys.executable, "-c", code, str(tree), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert out.exists() == (method == "log")
    assert evaluate(tree, out).evidence_path.read_bytes() == reference.evidence_path.read_bytes()


@pytest.mark.slow
def test_a_damaged_picture_stops_a_run_and_nothing_is_lost(tree, own_cache, tmp_path, monkeypatch):
    """It is read well in the first pass, and is damaged when its turn comes; then it is put back."""
    root, out = shutil.copytree(tree, tmp_path / "tree"), tmp_path / "run"
    reference = evaluate(root, tmp_path / "reference")
    path = root / "images" / "34.png"
    content = path.read_bytes()
    log, logged = Store.log, []

    def damage(store, record):
        logged.append(record["unit"])
        if len(logged) == 4:  # the three clean units and the check are done
            path.write_bytes(content[:60] + bytes(len(content) - 60))
        log(store, record)

    monkeypatch.setattr(prefetch, "PIXELS_AHEAD", 1)
    monkeypatch.setattr(Store, "log", damage)
    with pytest.raises(DataError, match=r"Cannot read the image .*34\.png"):
        evaluate(root, out)
    assert len(logged) >= 5  # what had begun was finished
    path.write_bytes(content)
    monkeypatch.setattr(Store, "log", log)
    assert evaluate(root, out).evidence_path.read_bytes() == reference.evidence_path.read_bytes()


def test_pictures_that_change_during_a_run_are_noticed(tree, own_cache, tmp_path, monkeypatch):
    root, log, logged = shutil.copytree(tree, tmp_path / "tree"), Store.log, []

    def change(store, record):
        logged.append(record["unit"])
        if len(logged) == 4:
            Image.new("RGB", Image.open(root / "images" / "34.png").size).save(root / "images" / "34.png")
        log(store, record)

    monkeypatch.setattr(prefetch, "PIXELS_AHEAD", 1)
    monkeypatch.setattr(Store, "log", change)
    with pytest.raises(DataError, match=r"34\.png with .* changed while the run was reading the data set"):
        evaluate(root, tmp_path / "run")


@pytest.mark.slow
def test_a_data_set_without_a_pixel_that_counts_is_refused(tree, own_cache, tmp_path, caplog):
    root = shutil.copytree(tree, tmp_path / "tree")
    for path in (root / "masks").iterdir():
        Image.fromarray(np.where(np.asarray(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
    entry = evaluate(root, tmp_path / "run").entry()
    assert "no pixel of b, c in 'val'. Is it so" in caplog.text
    assert entry["clean"]["miou"] <= 1
    for path in (root / "masks").iterdir():
        Image.fromarray(np.full(np.asarray(Image.open(path)).shape, 255, np.uint8)).save(path)
    with pytest.raises(DataError, match=r"No pixel of folder counts: every label is 255 .*segbench data check folder"):
        evaluate(root, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    segbench.load_dataset("folder", root).fingerprint()
    with pytest.raises(RunError, match="No pixel of folder counts"):
        evaluate(root, tmp_path / "remembered")


def test_units_are_given_in_any_order_and_decoded_ahead_within_bounds(tree, monkeypatch):
    data = segbench.load_dataset("folder", tree)
    units = [unit for unit in plan("sea-v1", data.image_ids, [8.0], SEA_V1.losses) if unit.loss != "check"]
    monkeypatch.setattr(prefetch, "PIXELS_AHEAD", 20 * 16 * 20)
    before = threading.active_count()
    with closing(Prefetcher(data, units, torch.device("cpu"), stamps(data))) as images:
        for unit in (units[0], units[2], units[1], *units[3:]):
            samples = images.take(unit)
            assert tuple(sample.image_id for sample in samples) == unit.image_ids
            assert sum(map(len, images._ready.values())) <= 20
    assert threading.active_count() == before


def test_an_unknown_unit_is_read_as_well(tree):
    data = segbench.load_dataset("folder", tree)
    with closing(Prefetcher(data, [], torch.device("cpu"), stamps(data))) as images:
        (sample,) = images.take(Unit(8.0, "mce", 9, ("07",)))
    assert torch.equal(sample.image, data[7].image)
    assert torch.equal(sample.label, data[7].label)
