"""Several processes train as one: the same weights, one of them writes, and gradients are exchanged once a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segbench.errors import RunError, UsageError
from segbench.training.data import open_data, steps_an_epoch
from segbench.training.distributed import Processes, joined
from segbench.training.loop import build_model, train
from tests.tiny import ENVIRONMENT, VIT, data, folder, measured, recipe_file, segbench, tiny, weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# The weights move by the gradient, not by its sign, so that rounding stays rounding.
SETTINGS = VIT | {"optimizer": "sgd", "learning_rate": 0.3, "dataset": "folder", "held_out": 4, "monitor_every": 1}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command):
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def assert_close(found, expected, start):
    """Equal but for rounding, and not because nothing has moved."""
    assert found.keys() == expected.keys()
    moved = max((expected[key] - start[key]).abs().max() for key in start)
    assert moved > 0.01
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < 1e-3 * moved, key


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    """The command under torchrun: adversarial, each process's share in parts; a model without batch norm."""
    root = folder(tmp_path / "data", train=16)
    recipe = recipe_file(tmp_path / "tiny.yaml", **SETTINGS, accumulation=2, crop=32, base=32)
    out, alone = tmp_path / "two", tmp_path / "one"
    options = ["train", recipe, "--data-root", root, "--device", "cpu", "--out", out]
    done = run([*TORCHRUN, *segbench(*options)[1:]])
    settings = tiny(**SETTINGS, accumulation=1, crop=32, base=32)
    train(settings, open_data(settings, root), alone)
    assert_close(weights(out), weights(alone), build_model(settings, 8).state_dict())
    for ours, theirs in zip(measured(out), measured(alone), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)
        assert float(ours["clean_aacc"]) == pytest.approx(float(theirs["clean_aacc"]), abs=0.01)
    assert done.stdout.count("at_convnext_mini_shapes: clean aAcc") == 1
    assert done.stderr.count("epoch 2/2") == 1
    assert done.stderr.count("From here to the leaderboard") == 1


# Run by both processes. What each has seen goes into a file of its own.
SCRIPT = '''
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from segbench.training import finishing, loop, step as steps
from segbench.training.distributed import joined
from tests.tiny import CONVNEXT, VIT, data, tiny

folder = Path(sys.argv[1])
finishing.draw = lambda *_: None
exchanged, summed, attacks = [0], [0], []
all_reduce, attack, parallel = dist.all_reduce, steps.training_attack, steps.DistributedDataParallel


class Counted(parallel):
    """Counts the numbers of gradients that are exchanged."""

    def __init__(self, module):
        super().__init__(module)
        self.register_comm_hook(None, self.exchange)

    @staticmethod
    def exchange(state, bucket):
        exchanged[-1] += bucket.buffer().numel()
        return allreduce_hook(None, bucket)


def counted_sum(*arguments, **options):
    summed[-1] += 1
    return all_reduce(*arguments, **options)


def counted_attack(*arguments):
    before = exchanged[-1], summed[-1]
    found = attack(*arguments)
    attacks.append([exchanged[-1] - before[0], summed[-1] - before[1]])
    return found


steps.DistributedDataParallel, dist.all_reduce, steps.training_attack = Counted, counted_sum, counted_attack
found = {}
with joined(torch.device("cpu")) as processes:
    rank = processes.rank
    settings = VIT | {"optimizer": "sgd", "learning_rate": 0.3, "attack_steps": 3}

    def step(at):
        exchanged.append(0)
        summed.append(0)

    # A folder for each process, so that it is seen what each writes.
    loop.train(tiny(**settings), data(), folder / f"whole_{rank}", processes=processes, progress=step)
    loop.train(
        tiny(**settings, accumulation=2), data(), folder / f"parts_{rank}", processes=processes, progress=step
    )
    found |= {"exchanged": exchanged, "summed": summed, "attacks": attacks}

    def stop(at):  # one process alone is told to
        if at.step == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    steps.DistributedDataParallel, dist.all_reduce, steps.training_attack = parallel, all_reduce, attack
    stopped = folder / "stopped"
    try:
        loop.train(tiny(**settings), data(), stopped, processes=processes, progress=stop)
    except KeyboardInterrupt:
        found["position"] = torch.load(stopped / "checkpoint.pt", weights_only=True)["position"]["step"]
    loop.train(tiny(**settings), data(), stopped, processes=processes)

    def stop_last(at):
        if at.step == at.steps and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    last = folder / "stopped at the end"
    try:
        loop.train(tiny(**settings, epochs=1), data(), last, processes=processes, progress=stop_last)
    except KeyboardInterrupt:
        found["stopped at the end"] = not list(last.glob("*.safetensors"))
    found["continued"] = loop.train(tiny(**settings, epochs=1), data(), last, processes=processes) is not None
    if rank == 1:  # whose machine has another folder
        last = folder / "another machine"
    try:
        loop.train(tiny(**settings, epochs=1), data(), last, processes=processes)
    except loop.RunError as error:
        found["refused"] = str(error)

    # Batch norm, averaged weights, random numbers, and an auxiliary head that is not trained.
    convnext = {"architecture_arguments": CONVNEXT["architecture_arguments"] | {"drop_path_rate": 0.2}}
    try:
        loop.train(tiny(**convnext, ema=0.5), data(), folder / "convnext", processes=processes)
        loop.train(tiny(auxiliary_weight=0), data(), folder / "without", processes=processes)
    except RuntimeError as error:
        found["error"] = str(error)
    (folder / f"seen_{rank}.json").write_text(json.dumps(found))
'''


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder in which two processes have run the script."""
    out = tmp_path_factory.mktemp("together")
    (out / "script.py").write_text(SCRIPT)
    run([*TORCHRUN, out / "script.py", out])
    return out


def test_processes_agree(together, tmp_path):
    """Exchanges, weights, files and stops of one pair of processes: to start one takes longer than all of this."""
    seen = [json.loads((together / f"seen_{rank}.json").read_text()) for rank in range(2)]
    settings = VIT | {"optimizer": "sgd", "learning_rate": 0.3, "attack_steps": 3}
    model = build_model(tiny(**settings), 8)
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    # Each gradient is exchanged once a step, with and without parts; an attack exchanges nothing.
    for each in seen:
        assert each["exchanged"][:12] == [learned] * 12
        sums = each["summed"][:12]  # valid pixels and the wish to stop; the gradients; the loss
        assert sums == [4, *[3] * 5, 5, *[3] * 5]  # and where a run goes on, and whether it is to stop at its end
        assert each["attacks"] == [[0, 0]] * (6 + 12)

    # The weights are those of a single process, also if a process was stopped and the run continued.
    train(tiny(**settings), data(), tmp_path / "alone")
    for name in ("whole_0", "parts_0"):
        assert_close(weights(together / name), weights(tmp_path / "alone"), model.state_dict())
    stopped, whole = weights(together / "stopped"), weights(together / "whole_0")
    assert all(torch.equal(stopped[key], whole[key]) for key in whole)
    assert [each["position"] for each in seen] == [1, 1]
    assert [each["stopped at the end"] for each in seen] == [True, True]
    assert [each["continued"] for each in seen] == [True, False]  # only the process that leads writes
    for each in seen:
        assert "do not find the same checkpoint" in each["refused"]
        assert "--out must be a folder that all machines share" in each["refused"]

    # Only the process that leads writes.
    for name in ("whole", "parts"):
        assert {path.name for path in (together / f"{name}_0").iterdir()} >= {"metrics.csv", "checkpoint.pt"}
        assert not list((together / f"{name}_1").iterdir())


def test_models_with_batch_norm_train_together(together):
    """Statistics are those of a process's share on a CPU, so nothing is compared with a single process."""
    seen = [json.loads((together / f"seen_{rank}.json").read_text()) for rank in range(2)]
    assert [each.get("error") for each in seen] == [None, None]
    for name in ("convnext", "without"):
        assert all(bool(torch.isfinite(value).all()) for value in weights(together / name).values())
        assert len(measured(together / name)) == 2
    start = build_model(tiny(auxiliary_weight=0), 8).state_dict()
    found = weights(together / "without")
    for key, value in found.items():
        if key.startswith("auxiliary_head.") and "running" not in key and "num_batches" not in key:
            assert torch.equal(value, start[key]), key


def test_a_single_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(CPU) as processes:
        assert processes == Processes(CPU, 0, 1)
        assert processes.leads
        assert processes.total(1.5, 2) == [1.5, 2]
        processes.wait()
        assert not torch.distributed.is_initialized()
    assert not Processes(CPU, 1, 2).leads


# Of one among two processes, as torchrun sets them.
VARIABLES = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", None, r"RANK=\(not set\)"),
        ("RANK", "first", "RANK=first"),
        ("RANK", "2", "WORLD_SIZE=2, RANK=2"),
        ("WORLD_SIZE", "two", "WORLD_SIZE=two"),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK=-1"),
        ("MASTER_ADDR", None, r"MASTER_ADDR=\(not set\)"),
        ("MASTER_PORT", "", r"MASTER_PORT=\(not set\)"),
        ("MASTER_PORT", "http", "MASTER_PORT=http"),
    ],
)
def test_variables_that_torchrun_has_not_set_are_answered_with_its_command(monkeypatch, name, value, said):
    for each in VARIABLES:
        monkeypatch.delenv(each, raising=False)
    for each, text in (VARIABLES | {name: value}).items():
        if text is not None:
            monkeypatch.setenv(each, text)
    with (
        pytest.raises(UsageError, match=f"(?s){said}.*torchrun --nproc-per-node 2 -m segbench train.*unset WORLD_SIZE"),
        joined(CPU),
    ):
        pass


def test_more_processes_than_devices_are_refused(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(UsageError, match=r"Process 1 of this machine has no GPU: there are 1\. torchrun --nproc"),
        joined(torch.device("cuda")),
    ):
        pass


@pytest.mark.parametrize(
    ("batch", "accumulation", "world", "said"),
    [
        (4, 1, 3, "batch of 4 images cannot be divided among 3 processes with accumulation 1: take a multiple of 3"),
        (4, 4, 2, "among 2 processes with accumulation 4: take a multiple of 8, --set batch_size=N"),
    ],
)
def test_batches_that_cannot_be_divided_are_refused(batch, accumulation, world, said):
    with pytest.raises(RunError, match=said):
        steps_an_epoch(tiny(batch_size=batch, accumulation=accumulation), data().train, Processes(CPU, 0, world))
