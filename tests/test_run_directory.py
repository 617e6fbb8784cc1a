"""Who may change a run directory: a command that is refused changes nothing, and two at once lose nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import segbench.engine.rundir.merge as merging
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir import lock
from segbench.engine.rundir.differences import differences
from segbench.engine.rundir.lock import lock_manifest
from segbench.engine.rundir.merge import merge
from segbench.engine.rundir.store import Store
from segbench.engine.studies.compare import compare
from segbench.engine.studies.minimum import minimum
from segbench.engine.studies.targeted import targeted
from segbench.errors import RunError
from segbench.files import sha256_file
from tests.runs import ENVIRONMENT, run

QUIET = RunOptions(progress=False)
HOLDER = """
import sys
from pathlib import Path
from segbench.engine.rundir.lock import claim_shard, lock_manifest
run = Path(sys.argv[1])
with lock_manifest(run) if sys.argv[2] == "run.json" else claim_shard(run, sys.argv[2], "cpu"):
    print("ready", flush=True)
    sys.stdin.read()
"""
ADDER = """
import json, sys
from pathlib import Path
from segbench.engine.rundir.store import Store
run, radii = Path(sys.argv[1]), [float(each) for each in sys.argv[2:]]
manifest = json.loads((run / "run.json").read_text())
print("ready", flush=True)
sys.stdin.read()
for radius in radii:
    Store.create(run, manifest | {"strengths": [radius]})
"""


def process(code, *arguments):
    """A Python process that has said that it is ready; it goes on when its standard input is closed."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    started = subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout.readline() == "ready\n", started.stderr.read()
    return started


@contextmanager
def held(path, what="1/1"):
    """Another process has the shard, or run.json."""
    holder = process(HOLDER, path, what)
    try:
        yield holder
    finally:
        holder.communicate("")


def files(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def copy(reference, tmp_path):
    """A finished run of five images at ε = 4 and 8."""
    return shutil.copytree(reference.path, tmp_path / "run")


def test_a_refused_command_adds_no_radius_and_the_merge_of_the_first_succeeds(copy):
    with held(copy):
        before = files(copy)
        with pytest.raises(RunError, match=r"is in use: process \d+ on .*Nothing was changed"):
            run(copy, eps=16)
        assert files(copy) == before
    assert [row["strength"] for row in merge(Store.open(copy)).entry["results"]] == [4, 8]


class Near(torch.nn.Module):
    """Another model."""

    def __init__(self, model, shift):
        super().__init__()
        self.model, self.shift = model, shift

    def forward(self, images):
        return self.model(images * self.shift)

    def __repr__(self):
        return "Near()"


@pytest.mark.slow
def test_a_refused_study_adds_no_attack_no_source_and_no_clean_unit(tmp_path):
    root, rng = tmp_path / "data", np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("a\nb\nc\n")
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8)).save(root / "images" / f"{number}.png")
        Image.fromarray(rng.integers(0, 3, (16, 20)).astype(np.uint8)).save(root / "masks" / f"{number}.png")
    torch.manual_seed(0)
    model, other = (torch.nn.Conv2d(3, 3, 3, padding=1).eval() for _ in range(2))
    about = {"dataset": "folder", "data_root": root, "iterations": 1, "options": QUIET}
    studies = {
        "compare": lambda out, eps, attacks, **more: compare(model, attacks, eps=eps, out=out, **about, **more),
        "targeted": lambda out, eps, targets: targeted(model, targets, eps=eps, out=out, **about),
        "minimum": lambda out, eps, _: minimum(model, ["mce"], largest=eps, resolution=eps, out=out, **about),
    }
    first = {"compare": ["mce"], "targeted": ["a"], "minimum": None}
    second = {"compare": ["mce", "js"], "targeted": ["b"], "minimum": None}
    for name, study in studies.items():
        out = tmp_path / name
        study(out, 4, first[name])
        (out / "units" / "eps0_clean_0000.parquet").unlink()
        for file in root.rglob("*.png"):  # as if nothing were remembered of it: the pictures are read again
            file.touch()
        with held(out):
            before = files(out)
            with pytest.raises(RunError, match=r"is in use.*Nothing was changed"):
                study(out, 8, second[name])
            assert files(out) == before
    near, far = (Near(other, shift) for shift in (0.9, 0.1))
    studies["compare"](tmp_path / "compare", 4, ["mce"], sources=[near])
    before = files(tmp_path / "compare")
    with pytest.raises(RunError, match=r"attacks on another model of the weights .*Nothing was changed"):
        studies["compare"](tmp_path / "compare", 16, ["cospgd"], sources=[far])
    assert files(tmp_path / "compare") == before


@pytest.mark.slow
def test_processes_that_add_radii_at_once_lose_none(copy):
    ours = [[10 + number + 3 * each for each in range(15)] for number in range(3)]
    adders = [process(ADDER, copy, *radii) for radii in ours]
    for adder in adders:
        adder.stdin.close()
        adder.stdin = None
    for adder in adders:
        assert adder.wait(timeout=120) == 0, adder.stderr.read()
    assert Store.open(copy).manifest["strengths"] == [4, 8, *range(10, 55)]


def test_the_result_holds_what_another_shard_has_finished_meanwhile(copy, monkeypatch):
    """Its radius was added when this process had read run.json."""
    add, manifest = Store.add, json.loads((copy / "run.json").read_text())
    for file in copy.glob("units/eps8_*.parquet"):
        file.rename(copy / file.name)

    def add_and_be_overtaken(store, done):
        add(store, done)
        Store.create(copy, manifest)
        for file in copy.glob("eps8_*.parquet"):
            file.rename(copy / "units" / file.name)

    (copy / "run.json").write_text(json.dumps(manifest | {"strengths": [4]}))
    (copy / "units" / "eps4_js_0000.parquet").unlink()
    monkeypatch.setattr(Store, "add", add_and_be_overtaken)
    assert [row["strength"] for row in run(copy, eps=4).entry()["results"]] == [4, 8]


def test_who_waits_in_vain_for_the_manifest_is_told(copy, monkeypatch):
    monkeypatch.setattr(lock, "MANIFEST_SECONDS", 0.1)
    manifest = json.loads((copy / "run.json").read_text())
    with held(copy, "run.json"):
        before = files(copy)
        with pytest.raises(RunError, match=r"run\.lock has been locked by another process .* Nothing was changed"):
            Store.create(copy, manifest | {"strengths": [16]})
        assert Store.create(copy, manifest).manifest == manifest  # who adds nothing need not wait
        assert files(copy) == before
    assert Store.create(copy, manifest | {"strengths": [16]}).manifest["strengths"] == [4, 8, 16]


def test_without_locks_a_radius_is_added_with_a_warning(copy, monkeypatch, caplog):
    def refuse(lock, timeout):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with lock_manifest(copy):
        pass
    assert "run.lock cannot be locked" in caplog.text
    assert "Start no other process with other radii or attacks meanwhile." in caplog.text
    assert [row["strength"] for row in run(copy, eps=1).entry()["results"]] == [1, 4, 8]


@pytest.mark.parametrize(
    "left", [(), (".DS_Store",), (".run.json.0123456789abcdef.tmp", ".gitkeep"), ("workers/1-of-1.lock",)]
)
def test_an_empty_folder_becomes_a_run_directory(tmp_path, left):
    """Also one with hidden files, or the lock of a process that was killed at once."""
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    result = run(tmp_path, limit=1, iterations=1, eps=8)
    assert result.path == tmp_path
    assert set(left) <= set(files(tmp_path))
    assert len(files(tmp_path / "units")) == 4


def changed(manifest, field, value):
    """A manifest as it would be with another setting."""
    first, _, rest = field.partition(".")
    return {**manifest, first: changed(manifest[first], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("identity", "field", "value", "said"),
    [
        ("protocol", "protocol.iterations", 9, "iterations: 4 there, 9 here"),
        ("protocol", "protocol.seed", 1, "seed: 225 there, 1 here"),
        ("protocol", "protocol.losses", ["mce", "js"], "losses: mce_bal mce js there, mce js here"),
        ("protocol", "protocol.threat.kind", "l2", "kind: linf there, l2 here"),
        ("protocol", "protocol.name", "minimum", "protocol: sea-v1 there, minimum here"),
        ("fingerprint", "dataset.id", "camvid", "data set: shapes there, camvid here"),
        ("fingerprint", "dataset.split", "train", "split: val there, train here"),
        ("fingerprint", "dataset.other_size", "256x256", "size: none there, 256x256 here"),
        ("class_weights", "dataset.class_weights_from", "x", "class weights of mce_bal from: {} there, x here"),
        ("precision", "environment.precision", "tf32", "precision: fp32 there, tf32 here"),
    ],
)
def test_each_setting_that_differs_is_named_with_both_values(reference, identity, field, value, said):
    there = Store.open(reference.path).manifest
    here = changed(changed(there, field, value), f"identity.{identity}", "f" * 64)
    assert differences(there, there) == []
    assert differences(there, here)[0] == said.format(there["dataset"]["class_weights_from"])


def test_what_no_setting_shows_is_named_by_its_hash(reference):
    there = Store.open(reference.path).manifest
    names = {
        "protocol": "protocol", "weights": "model weights or code", "fingerprint": "pixels or labels of the images",
        "class_weights": "class weights of mce_bal",
    }  # fmt: skip
    for key, name in names.items():
        here = changed(there, f"identity.{key}", "f" * 64)
        assert differences(there, here) == [f"{name}: {there['identity'][key][:12]}... there, ffffffffffff... here"]
    here = changed(changed(there, "image_ids", ["x", *there["image_ids"][1:]]), "identity.fingerprint", "f" * 64)
    assert differences(there, here) == [f"image 1: {there['image_ids'][0]} there, x here"]


@pytest.mark.slow
def test_one_merge_at_a_time_and_the_last_one_has_seen_all(copy, monkeypatch):
    """A shard that adds a radius while another one merges: the entry that stays has both."""
    whole, inside, results = merging._merge, threading.Event(), []

    def slow(store, radii):
        inside.set()
        time.sleep(0.5)
        return whole(store, radii)

    manifest = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(manifest | {"strengths": [4]}))
    monkeypatch.setattr(merging, "_merge", slow)
    first = threading.Thread(target=lambda: results.append(merge(Store.open(copy), [4])))
    first.start()
    inside.wait()
    Store.create(copy, manifest | {"strengths": [8]})
    results.append(merge(Store.open(copy), [8]))
    first.join()
    entry = json.loads(results[0].entry_path.read_text())
    assert [row["strength"] for row in entry["results"]] == [4, 8]
    assert entry["evidence"]["sha256"] == sha256_file(results[0].evidence_path)


def test_a_folder_of_that_name_with_files_of_the_user_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "workers").mkdir()
    assert Store.find(tmp_path, {}) is None
    (tmp_path / "workers" / "payroll.csv").write_text("a,b")
    with pytest.raises(RunError, match="is not a run directory"):
        Store.find(tmp_path, {})
