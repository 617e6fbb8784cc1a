"""The engine: the same counts whatever the batches, order, shards or kills, and nothing taken on trust."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import segbench
from segbench import counts, entries, evidence
from segbench.attacks import random_start
from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.catalogue import get_attack
from segbench.attacks.evaluator import Evaluator
from segbench.attacks.problem import frozen
from segbench.attacks.stages import reduced
from segbench.engine.compute import stream
from segbench.engine.compute.batching import cpu_batch, in_fixed_batches
from segbench.engine.compute.checks import probe, verify_images
from segbench.engine.compute.session import open_session
from segbench.engine.compute.worker import Worker
from segbench.engine.launch.shards import parse_shard
from segbench.engine.rundir.merge import merge
from segbench.engine.rundir.plan import CHECK_ITERATIONS, Unit, plan
from segbench.engine.rundir.store import Store
from segbench.errors import IncompleteError, ModelError, RunError, UsageError
from segbench.models import devices
from segbench.models.devices import cpu_threads
from segbench.protocol import SEA_V1, comparison
from tests.runs import ENVIRONMENT, MODEL, SHORT, command, run, units


@pytest.mark.slow
def test_result_entry_and_table(reference):
    entry = reference.entry()
    assert entry == json.loads(reference.entry_path.read_text())
    assert entries.validate_entry(reference.entry_path, published=False) == []
    assert [row["strength"] for row in entry["results"]] == [4, 8]
    assert entry["protocol"]["deviations"] == ["4 iterations instead of 300", "5 of 32 images", "without ε = 12 (/255)"]
    table = reference.table()
    assert table["eps_255"].tolist() == [0, 4, 8]
    assert (table["miou"].diff().dropna() < 0).all()
    for row, scores in zip(table.to_dict("records"), [entry["clean"], *entry["results"]], strict=True):
        assert all(row[name] == scores[name] for name in ("aacc", "miou"))
        for loss, each in scores.get("per_loss", {}).items():
            assert (row[f"aacc_{loss}"], row[f"miou_{loss}"]) == (each["aacc"], each["miou"])
    found = evidence.from_bytes(reference.evidence_path.read_bytes(), source="evidence")
    assert list(found.groups) == [(0, "clean")] + [(eps, loss) for eps in (4, 8) for loss in ("mce_bal", "mce", "js")]
    data = segbench.load_dataset("shapes").first(5)
    assert all(group.image_ids == data.image_ids for group in found.groups.values())
    labels = torch.stack([sample.label for sample in data])
    for group in found.groups.values():
        assert (group.counts.target == segbench.counts.count(labels, labels, 8).target).all()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batch_size_changes_nothing(reference, tmp_path, batch_size):
    assert units(run(tmp_path / "run", batch_size=batch_size).path) == units(reference.path)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_every_image_is_alone_in_float32(threads):
    """Bit for bit: order and neighbours do not change an adversarial image, with one thread or several."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = segbench.load_dataset("shapes").first(6)
        images, labels = torch.stack([s.image for s in data]), torch.stack([s.label for s in data])
        model, size = segbench.load_model(MODEL), cpu_batch(64, 64)

        def attacked(rows):
            evaluate = Evaluator(model, class_weights=data.class_weights(), size=size, fill=True)
            batch, found = AttackBatch(evaluate), {}
            with frozen(model):
                keys = batch.add([Job(images[i], labels[i], "mce_bal", 4 / 255, reduced(12)) for i in rows])
                while len(batch):
                    batch.step()
                    found |= dict(batch.finished())
            return [found[key].adversarial for key in keys]

        whole = attacked(range(6))
        for order in ([5, 2, 0], [3], [4, 1]):
            for row, image in zip(order, attacked(order), strict=True):
                assert torch.equal(image, whole[row])
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_order_of_images_changes_nothing(reference, tmp_path):
    data = segbench.load_dataset("shapes").first(5)
    backwards = dataclasses.replace(data, image_ids=data.image_ids[::-1])
    other = segbench.evaluate(MODEL, backwards, out=tmp_path / "run", **(SHORT | {"limit": None}))
    ours, theirs = (evidence.from_bytes(r.evidence_path.read_bytes(), source="") for r in (reference, other))
    for key, group in ours.groups.items():
        assert theirs.groups[key].image_ids == group.image_ids[::-1]
        assert all((a == b[::-1]).all() for a, b in zip(group.counts, theirs.groups[key].counts, strict=True))


@pytest.mark.slow
def test_shards_give_the_same_bytes(reference, tmp_path):
    for shard in ("2/3", "3/3"):
        with pytest.raises(IncompleteError, match=rf"Shard {shard} is done.*units are missing"):
            run(tmp_path / "run", shard=shard)
    result = run(tmp_path / "run", shard="1/3")
    assert units(result.path) == units(reference.path)
    assert result.evidence_path.read_bytes() == reference.evidence_path.read_bytes()


@pytest.mark.slow
def test_ctrl_c_is_resumable(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for background jobs
    )
    while process.poll() is None and not list(out.glob("units/*.parquet")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in errors
    assert "Traceback" not in errors
    status = subprocess.run(
        [sys.executable, "-m", "segbench", "status", str(out)], capture_output=True, text=True, check=False
    )
    assert status.returncode == 3
    assert "units are missing" in status.stderr


def test_finished_units_are_not_done_again(reference, tmp_path, monkeypatch):
    path = tmp_path / "run"
    shutil.copytree(reference.path, path)
    (path / "units" / "eps8_js_0000.parquet").unlink()
    done = []
    original = Store.add
    monkeypatch.setattr(Store, "add", lambda self, found: (done.append(found.unit.name), original(self, found))[1])
    result = run(path)
    assert done == ["eps8_js_0000"]
    assert result.evidence_path.read_bytes() == reference.evidence_path.read_bytes()


def test_another_radius_extends_a_run(reference, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(reference.path, path)
    result = run(path, eps=["0.5"])
    assert [row["strength"] for row in result.entry()["results"]] == [0.5, 4, 8]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"iterations": 5}, r": iterations: 4 there, 5 here\. "),
        ({"limit": 4}, r": images: 5 there, 4 here\. "),
        ({"limit": 4, "iterations": 5}, r": iterations: 4 there, 5 here; images: 5 there, 4 here\. "),
        (
            {"model": "at_convnext_mini_shapes"},
            r": model: clean_convnext_mini_shapes there, at_convnext_mini_shapes here; "
            r"model weights or code: \w{12}\.\.\. there, \w{12}\.\.\. here\. ",
        ),
        ({"precision": "bf16"}, r": precision: fp32 there, bf16 here\. "),
    ],
)
def test_directories_of_other_runs_are_refused(reference, tmp_path, changes, text):
    path = tmp_path / "run"
    shutil.copytree(reference.path, path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(RunError, match=rf"a run with other settings{text}Nothing was changed.*--out"):
        run(path, **changes)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_folders_that_are_no_runs_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not a run directory"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(RunError, match="not a usable run directory"):
        Store.open(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "manifest"])
def test_damaged_runs_are_named_and_left_alone(reference, tmp_path, damage):
    path = tmp_path / "run"
    shutil.copytree(reference.path, path)
    file = path / "units" / "eps4_mce_0000.parquet"
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[:-20])
    elif damage == "flipped":
        middle = data.index(b"mce") - 3  # in a page of the column "loss"
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    elif damage == "foreign":
        shutil.copy(path / "units" / "eps4_js_0000.parquet", file)
    else:
        file = path / "run.json"
        file.write_text(file.read_text().replace('"limit', "").replace('"fingerprint": "', '"fingerprint": "0'))
    damaged = file.read_bytes()
    with pytest.raises(RunError, match=file.name) as caught:
        run(path)
    assert (
        "Nothing was overwritten" in str(caught.value)
        or "Restore it" in str(caught.value)
        or "another" in str(caught.value)
    )
    assert file.read_bytes() == damaged


class Pixelwise(nn.Module):
    """A small trainable stand-in for a user's own model."""

    def __init__(self, num_classes=8, transform=lambda logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, num_classes, 3, padding=1)
        self.transform = transform

    def forward(self, images):
        return self.transform(self.layer(images))


class Hungry(Pixelwise):
    """Holds three images at once."""

    largest = 3

    def forward(self, images):
        if len(images) > self.largest and torch.is_grad_enabled():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(images)


def small_worker(model):
    data = segbench.load_dataset("shapes").first(2)
    return Worker(model, data, SEA_V1, torch.device("cpu"), one_core=True)


@pytest.mark.parametrize(("loss", "factor"), [("mce", 2.0), ("pgd", 1.0)])
def test_a_start_is_drawn_in_the_ball_of_the_first_stage(loss, factor):
    """2ε for SEA, whose first radius it is."""
    worker = small_worker(Pixelwise())
    sample, eps = worker.dataset[0], 8 / 255
    job = worker.job(Unit(8.0, loss, 0, (sample.image_id,)), sample)
    seed = SEA_V1.start_seed(sample.image_id, get_attack(loss, SEA_V1.iterations).seed_name, 8.0)
    (expected,) = random_start(sample.image[None], eps=factor * eps, seeds=[seed])
    assert torch.equal(job.start, expected)
    assert 0.95 * factor * eps < float((job.start - sample.image).abs().max()) <= factor * eps + 1e-6
    assert job.eps == eps


def test_the_check_is_mce_at_a_huge_radius_from_the_image_itself():
    """As SEA-v1 has it: the gradient of another loss may vanish where this one does not."""
    worker = small_worker(Pixelwise())
    sample, unit = worker.dataset[0], plan("sea-v1", worker.dataset.image_ids, [8.0], ["mce"])[1]
    assert unit.loss == "check"
    job = worker.job(unit, sample)
    stages = [(stage.radius, stage.iterations) for stage in job.stages]
    assert (job.loss, job.eps, stages, job.start) == (
        "mce",
        evidence.CHECK_EPS_255 / 255,
        [(1.0, CHECK_ITERATIONS)],
        None,
    )


def test_what_is_counted_is_predicted_anew_whatever_the_attack_says_it_saw():
    worker = small_worker(Pixelwise())
    worker.protocol = dataclasses.replace(SEA_V1, iterations=5)
    sample = worker.dataset[0]
    (found,) = worker.attack([Unit(8.0, "mce", 0, (sample.image_id,))], [sample], lambda _: None)
    lying = found._replace(predictions=torch.full_like(found.predictions, 3))
    counted, stats = worker.score([8.0], [sample], [lying])
    predictions, _ = worker.predict(found.adversarial[None].float())
    expected = counts.count(predictions.numpy(), sample.label[None].numpy(), 8, 255)
    assert all(np.array_equal(a, b) for a, b in zip(counted, expected, strict=True))
    assert stats[0]["changed_pixels"] == int((predictions != 3).sum())


def test_out_of_memory_halves_the_batch_and_loses_nothing(tmp_path, monkeypatch):
    """As on a GPU: no fixed shape. The images that are in the batch go on from where they are."""
    monkeypatch.setattr(Worker, "fixed_shape", property(lambda _: False))
    data = segbench.load_dataset("shapes").first(11)
    worker = Worker(Hungry(), data, SEA_V1, torch.device("cpu"), 8)
    units = [unit for unit in plan("sea-v1", data.image_ids, [8.0], ["mce"]) if unit.loss == "mce"]
    short = dataclasses.replace(SEA_V1, iterations=9)
    with open_session(worker.models, worker.device):
        worker.protocol = short
        done = stream.run_unit(worker, units[0], list(data))
        assert worker.batch_size == 2
        roomy = Worker(Hungry(), data, short, torch.device("cpu"), 8)
        roomy.model.largest = 100
        expected = stream.run_unit(roomy, units[0], list(data))
    assert roomy.batch_size == 8
    assert done.stats == expected.stats
    worker.model.largest = 0
    with pytest.raises(RunError, match="Not enough memory for one image"), open_session(worker.models, worker.device):
        stream.run_unit(worker, units[0], list(data))


def test_out_of_memory_on_another_model_halves_the_batch_too(monkeypatch):
    monkeypatch.setattr(Worker, "fixed_shape", property(lambda _: False))
    data = segbench.load_dataset("shapes").first(11)
    protocol = comparison(["mce_from_0123abcd"], iterations=5)
    (unit,) = (each for each in plan(protocol.name, data.image_ids, [8.0], protocol.losses) if each.strength)
    found = []
    for largest in (3, 100):
        source = Hungry()
        source.largest = largest
        worker = Worker(Pixelwise(), data, protocol, torch.device("cpu"), 8, sources={"0123abcd": source})
        with open_session(worker.models, worker.device):
            found.append(stream.run_unit(worker, unit, list(data)))
        assert worker.batch_size == (2 if largest == 3 else 8)
    assert found[0].stats == found[1].stats
    assert all((a == b).all() for a, b in zip(found[0].group.counts, found[1].group.counts, strict=True))
    source.largest = 0
    with pytest.raises(RunError, match="Not enough memory for one image"), open_session(worker.models, worker.device):
        stream.run_unit(worker, unit, list(data))


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
]


class HungryAlways(Pixelwise):
    """Holds so many images at once, with gradient or without."""

    largest, error = 3, OUT_OF_MEMORY[0]

    def forward(self, images):
        if len(images) > self.largest:
            raise self.error
        return super().forward(images)


@pytest.mark.slow
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:30])
def test_a_whole_run_goes_on_with_smaller_batches(tmp_path, monkeypatch, error):
    """First pass, estimate, attack and score: whatever library says that its memory is used up."""
    monkeypatch.setattr(Worker, "fixed_shape", property(lambda _: False))
    monkeypatch.setattr(HungryAlways, "error", error)
    options = {**SHORT, "limit": 9, "batch_size": 8, "progress": True}
    narrow = segbench.evaluate(HungryAlways(), "shapes", out=tmp_path / "narrow", **options)
    sizes = {json.loads(line)["batch_size"] for line in (tmp_path / "narrow" / "log.jsonl").read_text().splitlines()}
    assert sizes == {2}
    monkeypatch.setattr(HungryAlways, "largest", 100)
    wide = segbench.evaluate(HungryAlways(), "shapes", out=tmp_path / "wide", **options)
    assert narrow.evidence_path.read_bytes() == wide.evidence_path.read_bytes()


def test_scoring_goes_on_with_smaller_batches(tmp_path, monkeypatch):
    """Where the attack fits, and the prediction without gradients does not."""
    monkeypatch.setattr(Worker, "fixed_shape", property(lambda _: False))

    class HungryScore(Pixelwise):
        def forward(self, images):
            if len(images) > 2 and not torch.is_grad_enabled():
                raise OUT_OF_MEMORY[0]
            return super().forward(images)

    data, short = segbench.load_dataset("shapes").first(9), dataclasses.replace(SEA_V1, iterations=3)
    (unit,) = (unit for unit in plan("sea-v1", data.image_ids, [8.0], ["mce"]) if unit.loss == "mce")
    found = []
    for model in (HungryScore(), Pixelwise()):
        worker = Worker(model, data, short, torch.device("cpu"), 8)
        with open_session(worker.models, worker.device):
            found.append(stream.run_unit(worker, unit, list(data)))
        assert worker.batch_size == (2 if isinstance(model, HungryScore) else 8)
    assert found[0].stats == found[1].stats
    assert all((a == b).all() for a, b in zip(found[0].group.counts, found[1].group.counts, strict=True))


def test_a_pass_that_is_filled_up_is_made_smaller_however_few_images_there_are(monkeypatch):
    """Compiled, one image goes through the model beside black ones: there is memory for two, not for eight."""
    monkeypatch.setattr(Worker, "fixed_shape", property(lambda _: False))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(HungryAlways, "largest", 2)
    data, short = segbench.load_dataset("shapes").first(1), dataclasses.replace(SEA_V1, iterations=3)
    (unit,) = (unit for unit in plan("sea-v1", data.image_ids, [8.0], ["mce"]) if unit.loss == "mce")
    worker = Worker(HungryAlways(), data, short, torch.device("cpu"), 8, compiled=True)
    with open_session(worker.models, worker.device):
        done = stream.run_unit(worker, unit, list(data))
    assert worker.batch_size == 2
    assert done.group.image_ids == unit.image_ids


def test_a_batch_that_was_nearly_empty_is_full_again_later(monkeypatch):
    """As on a GPU: a pass over the last images of a unit says nothing about memory."""
    monkeypatch.setattr(Worker, "fixed_shape", property(lambda _: False))
    seen = []

    class Watched(Pixelwise):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    data, short = segbench.load_dataset("shapes").first(16), dataclasses.replace(SEA_V1, iterations=3)
    few, many = (Unit(8.0, "mce", 0, data.image_ids[:3]), Unit(8.0, "mce", 1, data.image_ids))
    worker = Worker(Watched(), data, short, torch.device("cpu"), 8)
    with open_session(worker.models, worker.device) as session, session.one_stream(worker, [few, many]) as images:
        runner = stream.Stream(worker, images.take, lambda done: None)
        for unit in (few, many):
            left = [unit]
            runner.run(lambda left=left: left.pop() if left else None)
    assert max(seen) == 8
    assert worker.batch_size == 8


def test_a_model_that_cannot_be_compiled_is_tried_once_for_all_batches_of_a_stream(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *arguments: 1 / 0)
    data, short = segbench.load_dataset("shapes").first(20), dataclasses.replace(SEA_V1, iterations=2)
    units = [unit for unit in plan("sea-v1", data.image_ids, [4.0, 8.0], ["mce"]) if unit.loss == "mce"]
    worker = Worker(Pixelwise(), data, short, torch.device("cpu"), 4, compiled=True)
    with open_session(worker.models, worker.device) as session, session.one_stream(worker, units) as images:
        left, done = list(units), []
        stream.Stream(worker, images.take, done.append).run(lambda: left.pop(0) if left else None)
        left = list(units)  # its batch was empty meanwhile
    assert len(done) == 4
    assert caplog.text.count("Going on without") == 1


def test_images_for_which_there_is_no_memory_wait_for_a_place_in_the_batch(monkeypatch):
    monkeypatch.setattr(Worker, "fixed_shape", property(lambda _: False))
    data, short = segbench.load_dataset("shapes").first(11), dataclasses.replace(SEA_V1, iterations=9)
    (unit,) = (unit for unit in plan("sea-v1", data.image_ids, [8.0], ["mce"]) if unit.loss == "mce")
    add, inside = AttackBatch.add, []

    def narrow(batch, jobs):
        if len(batch) + len(jobs) > 3:
            raise OUT_OF_MEMORY[0]
        inside.append(len(batch) + len(jobs))
        return add(batch, jobs)

    def found():
        worker = Worker(Pixelwise(), data, short, torch.device("cpu"), 8)
        with open_session(worker.models, worker.device):
            return stream.run_unit(worker, unit, list(data))

    expected = found()
    monkeypatch.setattr(AttackBatch, "add", narrow)
    done = found()
    assert max(inside) == 2  # 8, 4, 2
    assert done.stats == expected.stats
    assert all((a == b).all() for a, b in zip(done.group.counts, expected.group.counts, strict=True))
    monkeypatch.setattr(AttackBatch, "add", lambda *_: (_ for _ in ()).throw(OUT_OF_MEMORY[0]))
    with pytest.raises(RunError, match=r"one image \(3, 64, 64\) on cpu \(CUDA out of memory"):
        found()


@pytest.mark.parametrize("largest", [0, 1])
def test_a_model_for_which_there_is_no_memory_is_no_traceback(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(HungryAlways, "largest", largest)
    for entrance in (
        lambda: segbench.evaluate(HungryAlways(), "shapes", out=tmp_path / "run", **SHORT),
        lambda: segbench.check_model(HungryAlways(), "shapes", images=2, progress=False),
    ):
        with pytest.raises(RunError, match="Not enough memory on cpu"):
            entrance()
    assert not (tmp_path / "run").exists()


def test_memory_that_ends_on_a_cpu_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(AttackBatch, "step", lambda _: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(
        RunError, match=r"Not enough memory for 16 images \(3, 64, 64\) on cpu \(MemoryError\). Finished units are kept"
    ):
        run(tmp_path / "run")
    assert (tmp_path / "run" / "units" / "eps0_clean_0000.parquet").exists()


def test_attacks_that_cheat_are_caught(tmp_path, monkeypatch):
    original = AttackBatch.finished

    def cheat(batch):
        return [(key, result._replace(adversarial=result.adversarial + 1e-4)) for key, result in original(batch)]

    monkeypatch.setattr(AttackBatch, "finished", cheat)
    with pytest.raises(RunError, match="left the threat model"):
        run(tmp_path / "run")
    assert not list((tmp_path / "run").glob("units/eps4*"))


def test_verify_images():
    images = torch.full((1, 3, 2, 2), 0.5)
    verify_images(images + 0.1 - 1e-7, images, 0.1)
    for wrong in (images + 0.1001, images * torch.nan):
        with pytest.raises(RunError):
            verify_images(wrong, images, 0.1)
    with pytest.raises(RunError):
        verify_images(images + 0.51, images, 0.6)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Pixelwise(num_classes=5), "has 5 classes, the data set 8"),
        (Pixelwise(transform=lambda u: u[..., ::2, ::2]), r"needed are logits \(2, 8, 64, 64\)"),
        (Pixelwise(transform=lambda u: u * torch.nan), "NaN or infinite"),
        (Pixelwise(transform=lambda u: {"out": u}), "returns dict"),
        (nn.Conv2d(4, 8, 1), "fails on a batch"),
    ],
)
def test_unfit_models_are_refused_before_the_first_attack(tmp_path, model, text):
    with pytest.raises(ModelError, match=text):
        segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


def test_own_model_in_training_mode_is_put_in_eval_mode_and_noted(tmp_path):
    model = nn.Sequential(nn.Dropout(0.5), Pixelwise()).train()
    entry = segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT).entry()
    flags = {flag["name"]: flag for flag in entry["flags"]}
    assert flags["eval_mode"]["level"] == "note"
    assert flags["deterministic"]["level"] == "ok"
    assert entry["model"]["id"] == "sequential"
    with pytest.raises(UsageError, match="needs a data set"):
        segbench.evaluate(model)


class Masked(Pixelwise):
    """Deliberate gradient masking: the input is rounded, so every gradient is zero."""

    def forward(self, images):
        return super().forward((images * 8).round() / 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flag"),
    [
        (Pixelwise(transform=lambda u: u.softmax(dim=1)), "output_scale"),
        (Pixelwise(transform=lambda u: u + 0.1 * torch.rand_like(u)), "deterministic"),
        (Masked(), "zero_gradients"),
    ],
)
def test_unreliable_models_are_flagged(tmp_path, model, flag):
    entry = segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT).entry()
    levels = {found["name"]: found["level"] for found in entry["flags"]}
    assert levels[flag] == "warning"


def test_a_score_that_stays_up_at_a_huge_radius_is_flagged(tmp_path, whole_check):
    entry = segbench.evaluate(Masked(), "shapes", out=tmp_path / "run", **SHORT).entry()
    flags = {found["name"]: found for found in entry["flags"]}
    expected = "warning" if flags["falls_to_zero"]["value"] > 0.02 else "ok"
    assert flags["falls_to_zero"]["level"] == expected
    assert flags["falls_to_zero"]["value"] > 0.02


def test_shipped_models_are_not_flagged():
    for path in entries.entry_paths():
        entry = entries.read_entry(path)
        assert [flag["name"] for flag in entry["flags"] if flag["level"] == "warning"] == []


def test_images_of_several_sizes_and_without_valid_pixels(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"a": (20, 24), "b": (16, 16), "c": (20, 24), "d": (16, 16)}
    pixels = {name: rng.integers(0, 256, (*size, 3), np.uint8) for name, size in sizes.items()}
    labels = {name: rng.integers(0, 8, size) for name, size in sizes.items()}
    labels["b"][:] = 255
    labels["c"][:10] = 255
    weights = np.full(8, 1 / 8)
    data = segbench.data.SegmentationDataset(
        "folder",
        "val",
        tuple("abcdefgh"),
        tuple(sorted(sizes)),
        lambda name: (pixels[name], labels[name]),
        lambda: (weights, "by hand"),
    )
    entry = segbench.evaluate(Pixelwise(), data, out=tmp_path / "run", **SHORT).entry()
    found = evidence.from_bytes((tmp_path / "run" / "pixelwise.parquet").read_bytes(), source="")
    for group in found.groups.values():
        assert group.image_ids == ("a", "b", "c", "d")
        assert group.counts.target.sum(axis=1).tolist() == [480, 0, 240, 256]
    assert entry["results"][0]["aacc"] <= entry["clean"]["aacc"]


def test_plan_covers_every_image_once_per_group():
    ids = [f"{i:03d}" for i in range(37)]
    found = plan("sea-v1", ids, [4, 8], ["mce", "js"])
    assert len({unit.name for unit in found}) == len(found)
    for key in {(unit.strength, unit.loss) for unit in found if unit.loss != "check"}:
        assert [i for unit in found if (unit.strength, unit.loss) == key for i in unit.image_ids] == ids
    assert len({unit.name for unit in plan("sea-v1", ids, [4.0, 4.0000001], ["mce"])}) == 10
    assert parse_shard(None) == (1, 1)
    for wrong in ("0/3", "4/3", "x", "1", "1/0"):
        with pytest.raises(UsageError, match="A shard is written"):
            parse_shard(wrong)


def test_cpu_batches_depend_on_the_image_alone():
    class Sizes(nn.Module):
        seen: list[int] = []  # noqa: RUF012

        def forward(self, images):
            self.seen.append(len(images))
            return images

    model = Sizes()
    for n in (1, 5, 16, 17, 40):
        x = torch.rand(n, 3, 64, 64)
        assert torch.equal(in_fixed_batches(model, x), x)
    assert set(model.seen) == {cpu_batch(64, 64)} == {16}
    x = torch.rand(3, 3, 180, 240)  # one short batch
    model.seen.clear()
    assert torch.equal(in_fixed_batches(model, x), x)
    assert model.seen == [2, 2]


def test_the_size_of_a_cpu_batch_is_fixed_for_every_image_size():
    """Bytes depend on it: a change here changes results, so it is spelled out."""
    sizes = {1: 16, 64: 16, 65: 15, 128: 4, 147: 3, 148: 2, 182: 2, 256: 2, 257: 1, 473: 1, 512: 1, 1000: 1}
    assert {side: cpu_batch(side, side) for side in sizes} == sizes
    assert cpu_batch(180, 240) == cpu_batch(240, 180) == 2


@pytest.mark.parametrize(("stateless", "threads"), [(True, 1), (False, 2)])
def test_a_model_is_probed_on_as_many_threads_as_it_is_attacked_on(monkeypatch, tmp_path, stateless, threads):
    """One for small images; all for a model that may keep state, of which one pass runs at a time."""

    class Threads(nn.Conv2d):
        seen: set[int] = set()  # noqa: RUF012

        def forward(self, images):
            self.seen.add(torch.get_num_threads())
            return super().forward(images)

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("segbench.models.load.LoadedModel.is_stateless", stateless)
    Threads.seen.clear()
    with cpu_threads(2):
        run(tmp_path / "run", model=Threads(3, 8, 1), dataset="shapes", limit=1, eps=[4], iterations=2)
    assert Threads.seen == {threads}


def test_probe_finds_nothing_wrong_with_a_shipped_model():
    found = probe(segbench.load_model(MODEL), torch.rand(2, 3, 64, 64), 8, was_training=False)
    assert {flag["level"] for flag in found.flags} == {"ok"}


@pytest.mark.slow
def test_modules_that_keep_state_are_safe(tmp_path, monkeypatch):
    """A forward that hands a feature on through a hook's closure, as research code does: never shared by threads."""
    model, kept = Pixelwise(), {}
    model.layer.register_forward_hook(lambda module, args, output: kept.__setitem__("features", output))
    model.transform = lambda logits: kept["features"] * 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = segbench.evaluate(model, "shapes", out=tmp_path / "alone", **(SHORT | {"limit": 20}))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    again = segbench.evaluate(model, "shapes", out=tmp_path / "again", **(SHORT | {"limit": 20}))
    assert units(again.path) == units(alone.path)
    assert model.layer.weight.requires_grad


def test_a_users_module_is_left_as_it_was(tmp_path):
    model = nn.Sequential(nn.Dropout(0.5), Pixelwise()).train()
    model[1].eval()
    segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT)
    assert [part.training for part in model.modules()] == [True, True, False, False]


@pytest.mark.slow
def test_a_model_whose_code_changed_is_refused(tmp_path):
    model = Pixelwise()
    segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT)
    segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT)
    model.transform = lambda logits: logits + logits.mean(dim=(1, 2, 3), keepdim=True)
    with pytest.raises(RunError, match=r"the same weights, but other logits or gradients.*--out"):
        segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT)


class Gated(Pixelwise):
    """Logits that do not change with ``open``, and a gradient that does."""

    open = False

    def forward(self, images):
        return super().forward(images if self.open else images.detach() + 1e-8 * (images - images.detach()))


def test_a_model_whose_gradient_was_mended_is_not_answered_with_the_old_run(tmp_path):
    model = Gated()
    segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT)
    model.open = True
    with pytest.raises(RunError, match=r"other logits or gradients.*--out"):
        segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT)


class Noisy(Pixelwise):
    """As random as ``sigma`` says, which its state dict does not."""

    sigma = 0.05

    def forward(self, images):
        return super().forward(images + self.sigma * torch.randn_like(images))


@pytest.mark.slow
def test_random_models_are_told_apart_and_can_be_continued(tmp_path, caplog):
    model = Noisy()
    first = segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT)
    again = segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT)
    assert again.entry() == first.entry()
    assert "everything was there already, nothing is computed again" in caplog.text
    model.sigma = 50
    with pytest.raises(RunError, match="draws random numbers"):
        segbench.evaluate(model, "shapes", out=tmp_path / "run", **SHORT)


class BrokenLater(Pixelwise):
    """NaN logits on images that the probe does not see."""

    def forward(self, images):
        logits = super().forward(images)
        broken = (images == segbench.load_dataset("shapes")[4].image).flatten(1).all(dim=1)
        return logits.masked_fill(broken[:, None, None, None], torch.nan)


def test_nan_logits_on_any_clean_image_are_refused(tmp_path):
    with pytest.raises(ModelError, match="NaN or infinite values on the clean image '00004'"):
        segbench.evaluate(BrokenLater(), "shapes", out=tmp_path / "run", **(SHORT | {"batch_size": 1, "device": "cpu"}))


class Cached(Pixelwise):
    """Keeps a tensor made in the first forward, like a position map."""

    grid = None

    def forward(self, images):
        if self.grid is None:
            self.grid = self.layer(images[:1]).detach() * 0 + 1
        return super().forward(images) * self.grid


@pytest.mark.slow
def test_models_that_cache_tensors_work(tmp_path):
    segbench.evaluate(Cached(), "shapes", out=tmp_path / "run", **SHORT)


def test_models_without_gradient_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no gradient with respect to the images.*\.detach"):
        segbench.evaluate(Pixelwise(transform=lambda u: u.detach()), "shapes", out=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_only_the_asked_radii_are_done(reference, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(IncompleteError):
        run(path, shard="1/50")
    result = run(path, eps=16)
    assert [row["strength"] for row in result.entry()["results"]] == [16]
    assert result.entry()["run"]["command"].endswith("--limit 5 --iterations 4 --eps 16")
    assert not (path / "units" / "eps8_js_0000.parquet").exists()


@pytest.mark.slow
def test_a_kill_before_the_first_unit_and_shards_started_together(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.0123456789abcdef.tmp").write_text("{")  # what a kill leaves behind
    result = run(tmp_path / "run", limit=1, eps=[8])
    manifest = json.loads((result.path / "run.json").read_text())
    for attempt in range(10):
        folder = tmp_path / f"together{attempt}"
        with ThreadPoolExecutor(4) as pool:
            stores = list(pool.map(lambda _, folder=folder: Store.create(folder, manifest), range(4)))
        assert [store.manifest["run_id"] for store in stores] == [manifest["run_id"]] * 4


def test_damaged_logs_and_manifests_are_no_tracebacks(reference, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(reference.path, path)
    with (path / "log.jsonl").open("a") as stream:
        stream.write('5\n{"unit": 3}\n{"un')
    assert merge(Store.open(path)).entry["run"] == reference.entry()["run"]
    (path / "log.jsonl").unlink()
    assert merge(Store.open(path)).entry["run"]["seconds"] is None
    (path / "run.json").write_text('{"schema_version": 3}')
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        Store.open(path)


def test_threads_are_as_many_as_the_process_has_cores_to_itself(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert 1 <= devices._cores() <= os.cpu_count()
    monkeypatch.setattr(devices, "_cores", lambda: 6)
    torch.set_num_threads(8)

    def inside() -> int:
        with cpu_threads():
            return torch.get_num_threads()

    assert inside() == 6  # torch counted the machine's, a container has fewer
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert inside() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert inside() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert inside() == 8
    assert torch.get_num_threads() == 8
