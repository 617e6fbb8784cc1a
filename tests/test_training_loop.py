"""The training loop: steps against references by hand, the attack, and runs that are stopped, killed or diverge."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn import functional as F

from segbench import attacks, counts, signals
from segbench.cards import read_card
from segbench.data.sets.shapes import CLASS_NAMES, load_shapes
from segbench.engine.evaluate import evaluate
from segbench.errors import DataError, ModelError, RunError, UsageError
from segbench.models import SlidingWindow, load_model
from segbench.models.architectures import build_described
from segbench.protocol import SEA_V1
from segbench.training import finishing, loop, monitor
from segbench.training import step as gradients
from segbench.training.attack import training_attack
from segbench.training.data import batches, open_data
from segbench.training.distributed import Processes
from segbench.training.loop import build_model, train
from segbench.training.monitor import LossWatch, clean_scores, robust_scores
from segbench.training.optimisation import learning_rate_factor, make_optimizer, make_schedule
from tests.tiny import CONVNEXT, ENVIRONMENT, RESNET, VIT, data, folder, measured, recipe_file, segbench, tiny, weights

pytestmark = pytest.mark.slow

ALONE = Processes(torch.device("cpu"))
CHECKPOINT = "checkpoint.pt"
ROOT = Path(__file__).resolve().parents[1]


def batch_of(recipe, epoch=0, step=0):
    """Images in [0,1] and labels of a step."""
    images, labels = list(batches(data().train, recipe, epoch, ALONE))[step]
    return images.float() / 255, labels.long()


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def halted_at(number, signum=signal.SIGTERM):
    """What ``progress`` has to be to stop a run after a step."""

    def progress(at):
        if at.step == number:
            os.kill(os.getpid(), signum)

    return progress


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """They take as long as a tiny run, and have tests of their own."""
    monkeypatch.setattr(finishing, "draw", lambda *_: None)


@pytest.fixture
def built(monkeypatch):
    """The models that runs have built, to look at them while they are trained."""
    models, build = [], loop.build_model

    def kept(*arguments):
        models.append(build(*arguments))
        return models[-1]

    monkeypatch.setattr(loop, "build_model", kept)
    return models


# A step


def loss_by_hand(model, images, labels, auxiliary_weight):
    """Minus the log-probability of the label, averaged over the pixels that have one; both heads."""
    valid = labels != 255
    total = 0
    heads = model.forward_with_auxiliary(images) if auxiliary_weight else [model(images)]
    for logits, weight in zip(heads, (1, auxiliary_weight), strict=False):
        log_probabilities = logits - logits.exp().sum(dim=1, keepdim=True).log()
        chosen = log_probabilities.gather(1, labels.where(valid, 0)[:, None])[:, 0]
        total = total - weight * chosen[valid].sum() / valid.sum()
    return total


def adamw_by_hand(parameter, gradient, memory, lr, decay):
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization, Algorithm 2; the defaults of β."""
    memory["t"] += 1
    memory["m"] = 0.9 * memory["m"] + 0.1 * gradient
    memory["v"] = 0.999 * memory["v"] + 0.001 * gradient**2
    m, v = memory["m"] / (1 - 0.9 ** memory["t"]), memory["v"] / (1 - 0.999 ** memory["t"])
    return parameter - lr * decay * parameter - lr * m / (v.sqrt() + 1e-8)


def sgd_by_hand(parameter, gradient, memory, lr, decay):
    """Momentum 0.8, decay as a part of the gradient."""
    memory["m"] = 0.8 * memory["m"] + gradient + decay * parameter
    return parameter - lr * memory["m"]


@pytest.mark.parametrize(
    ("settings", "rule", "steps"),
    [
        ({"optimizer": "adamw", "learning_rate": 0.004}, adamw_by_hand, 1),
        ({"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.8}, sgd_by_hand, 3),
    ],
)
def test_optimiser_steps_against_a_reference(tmp_path, settings, rule, steps):
    """Ignored pixels, the auxiliary head, a head ten times as fast, no decay of norms and biases, and the schedule."""
    recipe = tiny(
        eps_255=0, epochs=1, batch_size=12 // steps, warmup_epochs=0, power=0.9, weight_decay=0.1,
        head_learning_rate_factor=10, **settings,
    )  # fmt: skip
    train(recipe, data(), tmp_path)
    model = build_model(recipe, 8).train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    memory, firm, losses = defaultdict(lambda: defaultdict(int)), {}, []
    for step in range(steps):
        images, labels = batch_of(recipe, step=step)
        assert (labels == 255).any()
        loss = loss_by_hand(model, images, labels, 0.4)
        gradients = dict(zip(start, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        losses.append(loss.item())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                lr = recipe.learning_rate * (1 - step / steps) ** 0.9 * (1 if name.startswith("backbone.") else 10)
                decay = 0.1 if name.endswith("weight") and parameter.ndim > 1 else 0
                parameter.copy_(rule(parameter, gradients[name], memory[name], lr, decay))
                firm[name] = gradients[name].abs() > 1e-6  # AdamW turns rounding errors into whole steps elsewhere
    assert float(measured(tmp_path)[0]["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    found = weights(tmp_path)
    for name, parameter in model.named_parameters():
        moved = (parameter - start[name]).abs()
        error = (found[name] - parameter).abs() - 1e-3 * moved.max() - 1e-7
        assert (error[firm[name]] <= 0).all(), name
        assert (moved > 0).any()
    assert torch.stack([part.float().mean() for part in firm.values()]).mean() > 0.9


def test_norms_and_biases_do_not_decay_and_the_head_has_its_own_learning_rate():
    recipe = tiny(weight_decay=0.3, learning_rate=0.5, head_learning_rate_factor=4)
    model = build_model(recipe, 8)
    optimizer = make_optimizer(model, recipe)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    assert len(norms) > 10
    for norm in norms:
        assert all(found[id(parameter)][1] == 0 for parameter in norm.parameters())
    for name, parameter in model.named_parameters():
        expected = 0.5 if name.startswith("backbone.") else 2.0
        assert found[id(parameter)] == (expected, 0.3 if parameter.ndim > 1 else 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_betas_and_momentum_are_those_of_the_recipe(optimizer):
    model = build_model(tiny(), 8)
    made = make_optimizer(model, tiny(optimizer=optimizer, betas=[0.7, 0.9], momentum=0.6))
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters()))
    for group in made.param_groups:
        assert group.get("betas") == ((0.7, 0.9) if optimizer == "adamw" else None)
        assert group.get("momentum") == (0.6 if optimizer == "sgd" else None)


@pytest.mark.parametrize("attack", [{"eps_255": 0}, {"eps_255": 4, "attack_steps": 2}])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, attack):
    """Also where its parts have different numbers of ignored pixels. Without batch norm, which sees parts."""
    settings = VIT | attack | {"optimizer": "sgd", "learning_rate": 0.3, "epochs": 1, "batch_size": 4}
    found = {}
    for parts in (1, 2, 4):
        train(tiny(**settings, accumulation=parts), data(), tmp_path / str(parts))
        found[parts] = weights(tmp_path / str(parts))
    start = build_model(tiny(**settings), 8).state_dict()
    assert any((found[1][key] - start[key]).abs().max() > 1e-3 for key in start)
    for parts in (2, 4):
        for key, value in found[1].items():
            torch.testing.assert_close(found[parts][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_ignored_pixels_alone_move_nothing_and_an_epoch_of_them_is_refused(tmp_path, built):
    whole = data()
    void = replace(whole.train, read=lambda name: (whole.train.read(name)[0], np.full((64, 64), 255, np.uint8)))
    recipe = tiny(**VIT | {"epochs": 1, "weight_decay": 0})
    with pytest.raises(DataError, match=r"Every pixel of the training images is ignored .*segbench data check shapes"):
        train(recipe, replace(whole, train=void), tmp_path)
    assert equal(built[0].state_dict(), build_model(recipe, 8).state_dict())


# Schedule


def test_the_learning_rate_rises_linearly_and_falls_to_zero():
    factors = [learning_rate_factor(step, 10, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[4] == pytest.approx(0.5)
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(1 / 90)
    assert factors[100] == 0


def test_the_decay_is_polynomial():
    """As in mmsegmentation's and Segmenter's schedules: (1 - t)^0.9."""
    assert learning_rate_factor(0, 0, 100, 0.9) == 1
    assert learning_rate_factor(50, 0, 100, 0.9) == pytest.approx(0.5**0.9)
    assert learning_rate_factor(30, 20, 120, 0.9) == pytest.approx(0.9**0.9)
    assert learning_rate_factor(120, 20, 120, 0.9) == 0


def test_the_schedule_counts_in_epochs_and_keeps_the_ratio_of_head_and_backbone():
    recipe = tiny(epochs=4, warmup_epochs=1.5, learning_rate=0.8, power=0.9, head_learning_rate_factor=3)
    optimizer = make_optimizer(build_model(recipe, 8), recipe)
    schedule = make_schedule(optimizer, recipe, 10)
    seen = []
    for _ in range(40):
        seen.append(sorted({group["lr"] for group in optimizer.param_groups}))
        optimizer.step()
        schedule.step()
    assert seen[0] == pytest.approx([0.8 / 15, 2.4 / 15])
    assert seen[14] == seen[15] == pytest.approx([0.8, 2.4])
    assert seen[39] == pytest.approx([0.8 * 0.04**0.9, 2.4 * 0.04**0.9])
    assert all(group["lr"] == 0 for group in optimizer.param_groups)


# The attack in training


@pytest.mark.parametrize("architecture", [CONVNEXT, VIT, RESNET], ids=lambda each: each["architecture"])
def test_the_attack_in_training_is_plain_pgd(architecture):
    """From δ = 0, the last iterate; it changes neither statistics nor modes nor gradients."""
    recipe = tiny(**architecture, eps_255=4, attack_steps=3, step_size_255=1.5)
    model = build_model(recipe, 8).train()
    learned = [parameter.requires_grad for parameter in model.parameters()]
    images, labels = batch_of(recipe)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = images.clone()
    found = training_attack(model, images, labels, recipe)
    assert torch.equal(images, given)
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == learned
    assert all(parameter.grad is None for parameter in model.parameters())
    assert equal(model.state_dict(), before)
    assert not found.requires_grad
    model.eval()
    x = images.clone()
    for _ in range(3):
        x.requires_grad_()
        loss = sum(
            F.cross_entropy(model(x)[row : row + 1], labels[row : row + 1], ignore_index=255) for row in range(4)
        )
        (gradient,) = torch.autograd.grad(loss, x)
        x = x.detach() + 1.5 / 255 * gradient.sign()
        x = images + (x - images).clamp(-4 / 255, 4 / 255)
        x = x.clamp(0, 1)
    different = (found - x).abs() > 1e-6
    assert different.float().mean() < 1e-3  # where a gradient is so small that rounding decides its sign
    assert (found - images).abs().max() <= 4 / 255 + 1e-6
    assert ((found - images).abs() > 3.9 / 255).float().mean() > 0.3
    assert 0 <= found.min() <= found.max() <= 1


def test_the_attack_uses_frozen_statistics_and_each_image_its_own_gradient():
    """So an image's attack is the same in every batch: with those of a batch, batch norm would mix images."""
    recipe = tiny(eps_255=4, attack_steps=2, step_size_255=2)
    model = build_model(recipe, 8).train()
    images, labels = batch_of(recipe)
    together = training_attack(model, images, labels, recipe)
    for row in range(4):
        alone = training_attack(model, images[row : row + 1], labels[row : row + 1], recipe)
        assert ((alone - together[row : row + 1]).abs() > 1e-6).float().mean() < 1e-3


def test_a_model_is_trainable_after_an_attack_that_fails():
    model = build_model(tiny(), 8).train()
    frozen_before = model.backbone.stem[0].weight.requires_grad_(False)
    images, labels = batch_of(tiny())
    with pytest.raises(IndexError):
        training_attack(model, images, labels.where(labels == 255, 8), tiny())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad == (parameter is not frozen_before) for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adversarial_training_learns_on_the_attacked_images(tmp_path):
    """The loss of the first step is that of the images that the attack gives, with the statistics of the batch."""
    recipe, losses = tiny(eps_255=8, attack_steps=2, step_size_255=4, epochs=1), []
    train(recipe, data(), tmp_path, progress=lambda at: losses.append(at.loss))
    model = build_model(recipe, 8).train()
    images, labels = batch_of(recipe)
    attacked = training_attack(model, images, labels, recipe)
    with torch.no_grad():
        expected, clean = (loss_by_hand(model, x, labels, 0.4).item() for x in (attacked, images))
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert abs(losses[0] - clean) > 1e-3


# Scores meanwhile


def test_robust_scores_are_those_of_the_attacks_of_the_protocol(monkeypatch):
    """Each image by itself, each loss by itself, the worst of them and of the clean image; averaged by hand."""
    monkeypatch.setattr(monitor, "CHUNK", 2)
    recipe = tiny(monitor_eps_255=2, monitor_iterations=3)
    model, held_out = build_model(recipe, 8).eval(), data(12, 3).held_out
    found = robust_scores(model, held_out, recipe, "cpu")
    correct, valid = 0, 0
    for sample in held_out:
        image, label = sample.image[None], sample.label[None]
        predictions = [model(image).argmax(dim=1)]
        for loss in SEA_V1.losses:
            seed = SEA_V1.start_seed(sample.image_id, loss, 2.0)
            start = attacks.random_start(image, eps=2 * 2 / 255, seeds=[seed])
            result = attacks.red_eps_apgd(
                model, image, label, eps=2 / 255, loss=loss, iterations=3, start=start,
                class_weights=held_out.class_weights(),
            )  # fmt: skip
            assert (result.adversarial - image).abs().max() <= 2 / 255 + 1e-6
            predictions.append(model(result.adversarial).argmax(dim=1))
        correct += min(((each == label) & (label != 255)).sum().item() for each in predictions)
        valid += (label != 255).sum().item()
    assert found.aacc == pytest.approx(correct / valid, abs=1e-9)
    assert found.miou <= clean_scores(model, held_out, "cpu").miou
    assert found.aacc <= clean_scores(model, held_out, "cpu").aacc


def test_clean_scores_are_those_of_counts():
    model, three = build_model(tiny(), 8).eval(), data(12, 3).held_out
    labels = np.stack([sample.label.numpy() for sample in three])
    with torch.no_grad():
        predictions = model(torch.stack([sample.image for sample in three])).argmax(dim=1).numpy()
    expected = counts.count(predictions, labels, 8)
    found = clean_scores(model, three, "cpu")
    assert found.aacc == pytest.approx(expected.aacc(), abs=1e-4)
    assert found.miou == pytest.approx(expected.miou(), abs=1e-4)


def test_scores_of_a_model_that_keeps_tensors_leave_it_trainable():
    class Keeps(nn.Conv2d):
        kept = None

        def forward(self, images):
            self.kept = super().forward(images) if self.kept is None else self.kept
            return super().forward(images) + self.kept

    model, held_out = Keeps(3, 8, 1), data(12, 1).held_out
    clean_scores(model, held_out, "cpu")
    model(held_out[0].image[None]).sum().backward()


def test_scores_are_measured_when_they_are_due_and_at_the_end(tmp_path):
    recipe = tiny(epochs=5, monitor_every=2, held_out=2, batch_size=10)
    rows = []
    train(recipe, data(12, 2), tmp_path, progress=lambda at: rows.append(at.row) if at.row else None)
    assert [row["epoch"] for row in rows if row["clean_aacc"] is not None] == [2, 4, 5]
    assert all((row["robust_miou"] is None) == (row["clean_aacc"] is None) for row in rows)
    for row in rows:
        if row["clean_aacc"] is not None:
            assert 0 <= row["robust_aacc"] <= row["clean_aacc"] <= 1
            assert 0 <= row["robust_miou"] <= row["clean_miou"] <= 1
    written = measured(tmp_path)
    assert [row["epoch"] for row in written] == ["1", "2", "3", "4", "5"]
    assert [float(row["loss"]) for row in written] == [row["loss"] for row in rows]
    assert [float(row["learning_rate"]) for row in written] == pytest.approx([0.004, 0.004, 0.003, 0.002, 0.001])


def test_scores_meanwhile_change_no_weights(tmp_path):
    """Neither random numbers nor batch norm nor gradients of training see the attack on the held-out images."""
    drop = {"architecture_arguments": CONVNEXT["architecture_arguments"] | {"drop_path_rate": 0.3}}
    for name, every in (("with", 1), ("without", 0)):
        train(tiny(**drop, monitor_every=every), data(12, 2), tmp_path / name)
    assert equal(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_held_out_images_without_a_single_labelled_pixel_are_no_error(tmp_path):
    whole = data(12, 2)
    void = replace(whole.held_out, read=lambda name: (whole.train.read(name)[0], np.full((64, 64), 255, np.uint8)))
    train(tiny(monitor_every=1, epochs=1), replace(whole, held_out=void), tmp_path)
    assert len(measured(tmp_path)) == 1


def test_held_out_images_of_several_sizes_are_scored(tmp_path):
    """Training crops them, evaluation does not."""
    root = folder(tmp_path / "tree", train=12, sizes=((40, 48), (48, 40), (44, 36)))
    recipe = tiny(dataset="folder", crop=32, held_out=3, monitor_every=1, epochs=1)
    whole = open_data(recipe, root)
    assert len({whole.held_out[row].label.shape for row in range(3)}) > 1
    train(recipe, whole, tmp_path / "out")
    assert 0 < float(measured(tmp_path / "out")[0]["robust_aacc"]) <= 1


# Averaged weights


@pytest.mark.parametrize("changes", [{"eps_255": 0, "attack_steps": 0}, {}])
def test_every_step_is_taken_in_training_mode_also_after_an_epoch_was_measured(tmp_path, built, changes):
    """Measuring an epoch puts the model into eval mode, in which batch norms would neither see nor learn a batch."""
    recipe, modes, batches_seen = tiny(**changes, monitor_every=1, held_out=2), [], []

    def progress(at):
        if at.row is None:  # between two steps of an epoch
            modes.append(built[0].training)
            state = built[0].state_dict()
            batches_seen.append(max(int(state[key]) for key in state if key.endswith("num_batches_tracked")))

    train(recipe, data(12, held_out=2), tmp_path / "run", progress=progress)
    assert modes == [True, True]
    assert batches_seen == [1, 3]


def test_averaged_weights_take_the_place_of_the_last_ones(tmp_path, built):
    """An exponential moving average from the first step on, statistics of batch norm included, written out."""
    recipe, averages = tiny(eps_255=0, ema=0.9), []

    def follow(_):
        state = {key: value.double().clone() for key, value in built[0].state_dict().items()}
        averages.append({key: 0.9 * averages[-1][key] + 0.1 * state[key] for key in state} if averages else state)

    train(recipe, data(), tmp_path, progress=follow)
    assert len(averages) == 6
    found = weights(tmp_path)
    last = built[0].state_dict()
    for key, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), averages[-1][key], rtol=1e-5, atol=1e-6, msg=key)
    assert not equal(found, last)


# Precision and compilation


def test_bf16_trains_and_gives_finite_weights_near_those_of_fp32(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        seen = losses[precision] = []
        train(
            tiny(precision=precision, monitor_every=1), data(12, 2), tmp_path / precision,
            progress=lambda at, seen=seen: seen.append(at.loss),
        )  # fmt: skip
    found = weights(tmp_path / "bf16")
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    assert all(value.dtype in (torch.float32, torch.int64) for value in found.values())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


COMPILED = """
import sys
from functools import partial
from pathlib import Path

import torch

from segbench.models import architectures
from segbench.models.contract import PyramidBackbone
from segbench.training import finishing
from segbench.training.loop import train
from tests.tiny import VIT, data, tiny

finishing.draw = lambda *_: None


class Convolution(PyramidBackbone):
    def __init__(self, width):
        super().__init__()
        self.conv, self.widths = torch.nn.Conv2d(3, width, 1), (width,)

    def forward(self, images):
        return [self.conv(images)]


class Small(torch.nn.Module):  # an architecture that nothing in training/ knows
    def __init__(self, num_classes):
        super().__init__()
        self.backbone, self.auxiliary_head = Convolution(num_classes), torch.nn.Identity()

    def forward(self, images):
        return self.backbone(images)[0]


architectures.ARCHITECTURES["small"] = architectures.Architecture(lambda *, num_classes: Small(num_classes))
out, default = Path(sys.argv[1]), torch.compile
for compiled in (False, True):
    recipe = tiny(**VIT, epochs=1, batch_size=12, optimizer="sgd", compile=compiled)
    torch.compile = partial(default, backend="aot_eager")
    train(recipe, data(), out / f"attacked_{compiled}")
    torch.compile = default
    small = {"architecture": "small", "architecture_arguments": {}, "auxiliary_weight": 0}
    with torch._inductor.config.patch({"aot_inductor.debug_compile": True}):  # -O0
        train(tiny(**small, eps_255=0, epochs=1, batch_size=12, compile=compiled), data(), out / f"clean_{compiled}")
"""


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_that_of_eager_mode(tmp_path):
    """A transformer, attacked: traced only, because the compiler takes seconds a kernel. A convolution: compiled.

    In a process of its own: in this one, types of arguments are checked, and the checks would be compiled too.
    """
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, tmp_path], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in ("attacked", "clean"):
        eager, compiled = (measured(tmp_path / f"{name}_{each}") for each in (False, True))
        assert float(compiled[0]["loss"]) == pytest.approx(float(eager[0]["loss"]), rel=1e-4)
        eager, compiled = (weights(tmp_path / f"{name}_{each}") for each in (False, True))
        assert eager.keys() == compiled.keys()
        for key, value in eager.items():
            torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-5, msg=key)


# Runs that diverge


def test_a_loss_that_is_no_number_stops_at_once():
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(RunError, match=r"in epoch 3: training has diverged.*Lower learning_rate.*warmup_epochs"):
            LossWatch(2.0).check(wrong, "epoch 3")


def test_a_loss_that_explodes_stops_and_a_single_bad_step_does_not():
    watch = LossWatch(chance=2.0)
    for loss in (2.1, 1.0, 0.5, 40.0, *(0.4,) * 50, 30.0, 0.3):
        watch.check(loss, "epoch 1")
    for _ in range(10):
        watch.check(9.0, "epoch 2")
    with pytest.raises(RunError, match=r"The loss exploded to [67]\.\d*, from 0\.\d+ in epoch 2"):
        watch.check(50.0, "epoch 2")
    watch = LossWatch(chance=2.0)
    for _ in range(1000):
        watch.check(5.9, "epoch 1")  # high, but below three times chance: a bad start is not a divergence
    with pytest.raises(RunError, match="exploded"):
        LossWatch(chance=2.0, smoothed=1.0, lowest=0.5).check(1e9, "epoch 1")


@pytest.fixture
def poisoned(built):
    """Gives what ``progress`` has to be so that after a step an entry of the model that is trained is no number."""

    def at_step(number, key="head.classifier.bias"):
        def progress(at):
            if at.step == number:
                built[-1].state_dict()[key].view(-1)[0] = math.nan

        return progress

    return at_step


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint_byte_for_byte(tmp_path, poisoned):
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), data(), tmp_path, progress=halted_at(2))
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(RunError, match=r"loss is nan in epoch 2.*if there is one, is an earlier, good one"):
        train(tiny(), data(), tmp_path, progress=poisoned(4))
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob("*.safetensors"))
    train(tiny(), data(), tmp_path)
    train(tiny(), data(), tmp_path / "undisturbed")
    assert equal(weights(tmp_path), weights(tmp_path / "undisturbed"))


@pytest.mark.parametrize("step", [4, 5])
def test_weights_that_are_no_numbers_are_never_written(tmp_path, poisoned, step):
    """Not with the next checkpoint, and not with one on Ctrl-C."""
    poison, saved = poisoned(step), []

    def progress(at):
        saved.append((tmp_path / CHECKPOINT).read_bytes() if at.step > 1 else b"")
        poison(at)
        if at.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunError, match=r"no longer a number in epoch 2: training has diverged"):
        train(tiny(), data(), tmp_path, checkpoint_minutes=0, progress=progress)
    assert (tmp_path / CHECKPOINT).read_bytes() == saved[-1]
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)["model"]
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_statistics_that_are_no_numbers_are_never_written(tmp_path, poisoned):
    """No loss of clean training shows them, but no model could be loaded from such a file."""
    recipe, statistic = tiny(eps_255=0), "head.fuse.norm.running_var"
    with pytest.raises(RunError, match=r"in epoch 2: training has diverged"):
        train(recipe, data(), tmp_path, checkpoint_minutes=0, progress=poisoned(4, statistic))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)["model"]
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_huge_learning_rate_is_said_to_diverge(tmp_path, optimizer):
    recipe = tiny(learning_rate=1e12, optimizer=optimizer, warmup_epochs=0, monitor_every=1, epochs=4)
    with pytest.raises(RunError, match="training has diverged"):
        train(recipe, data(12, 2), tmp_path, checkpoint_minutes=0)
    assert not list(tmp_path.glob("*.safetensors"))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)["model"]
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


# Runs that stop and continue

# Everything that needs random numbers or has a state of its own.
EVERYTHING = {
    "architecture_arguments": CONVNEXT["architecture_arguments"] | {"drop_path_rate": 0.3},
    "ema": 0.9, "crop": 40, "base": 64, "blur": 0.5, "monitor_every": 1, "held_out": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    train(tiny(**EVERYTHING), data(14, 2), out)
    return out


@pytest.mark.parametrize(
    ("steps", "signum"),
    [([1], signal.SIGTERM), ([3], signal.SIGINT), ([2, 4, 5], signal.SIGINT), ([6], signal.SIGTERM)],
)
def test_a_run_that_is_stopped_ends_as_if_it_had_not_been(undisturbed, tmp_path, steps, signum):
    """In the middle of an epoch, at its end, and again and again: the same weights bit for bit, the same metrics."""
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            train(tiny(**EVERYTHING), data(14, 2), tmp_path, progress=halted_at(step, signum))
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
        position = torch.load(tmp_path / CHECKPOINT, weights_only=True)["position"]
        assert 3 * position["epoch"] + position["step"] == step
    continued = train(tiny(**EVERYTHING), data(14, 2), tmp_path)
    assert equal(weights(tmp_path), weights(undisturbed))
    assert measured(tmp_path) == measured(undisturbed)
    assert continued.card.sha256 == read_card(undisturbed / continued.document_path.name).sha256
    ours, theirs = (torch.load(out / CHECKPOINT, weights_only=True)["position"] for out in (tmp_path, undisturbed))
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {"rows", "seconds"}:  # so also what is known of the loss so far
        assert ours[key] == theirs[key], key


def test_a_run_that_raises_between_two_checkpoints_continues_from_the_last(undisturbed, tmp_path):
    class Killed(Exception):
        pass

    def kill(at):
        if at.step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(tiny(**EVERYTHING), data(14, 2), tmp_path, checkpoint_minutes=0, progress=kill)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["position"]["step"] == 1
    train(tiny(**EVERYTHING), data(14, 2), tmp_path)
    assert equal(weights(tmp_path), weights(undisturbed))
    assert measured(tmp_path) == measured(undisturbed)


def test_a_signal_that_follows_at_once_is_the_same_wish(undisturbed, tmp_path, monkeypatch):
    """Schedulers tell each process, and torchrun tells its processes once more; a second Ctrl-C later means now."""

    def told(at):
        if at.step == 2:
            for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), signum)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(**EVERYTHING), data(14, 2), tmp_path, progress=told)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["position"]["step"] == 2
    train(tiny(**EVERYTHING), data(14, 2), tmp_path)
    assert equal(weights(tmp_path), weights(undisturbed))
    monkeypatch.setattr(signals, "ECHO_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), data(), tmp_path / "now", progress=told)
    assert not (tmp_path / "now" / CHECKPOINT).exists()


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    """Whoever has opened one reads it to its end, as the file system does for one that is killed while it writes."""
    opened = {}

    def progress(at):
        if at.step in (2, 4):
            opened[at.step] = (tmp_path / CHECKPOINT).open("rb"), (tmp_path / CHECKPOINT).read_bytes()

    train(tiny(), data(), tmp_path, checkpoint_minutes=0, progress=progress)
    for file, before in opened.values():
        with file:
            assert file.read() == before
    assert len({before for _, before in opened.values()} | {(tmp_path / CHECKPOINT).read_bytes()}) == 3
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == [CHECKPOINT]


def test_a_finished_run_is_not_trained_again(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    seen = []
    train(tiny(**EVERYTHING), data(14, 2), tmp_path / "out", progress=seen.append)
    assert not seen
    for name in (CHECKPOINT, "metrics.csv", f"{tiny().id}.json", f"{tiny().id}.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (undisturbed / name).read_bytes()


def test_another_recipe_does_not_continue_a_checkpoint(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    recipe = tiny(**EVERYTHING)
    for change in ({"seed": 1}, {"epochs": 3}, {"learning_rate": 0.1}, {"precision": "bf16", "monitor_every": 2}):
        name, value = next(iter(change.items()))
        both = f"{name}: {getattr(recipe, name)} there, {value} here"
        said = rf"checkpoint\.pt belongs to another recipe: {both}\. Give another --out folder"
        with pytest.raises(RunError, match=said):
            train(replace(tiny(**EVERYTHING), **change), data(14, 2), tmp_path / "out")
    assert (tmp_path / "out" / CHECKPOINT).read_bytes() == (undisturbed / CHECKPOINT).read_bytes()
    train(tiny(**EVERYTHING), data(14, 2), tmp_path / "elsewhere")  # another folder starts anew
    assert equal(weights(tmp_path / "elsewhere"), weights(undisturbed))


def test_what_is_shown_and_how_much_is_computed_at_once_may_change_when_a_run_continues(tmp_path):
    """For these mend a device with too little memory. Without batch norm, parts change nothing but rounding."""
    recipe = tiny(**VIT | {"optimizer": "sgd", "learning_rate": 0.3}, held_out=2, monitor_every=1)
    train(recipe, data(14, 2), tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data(14, 2), tmp_path / "out", progress=halted_at(2))
    mended = replace(recipe, accumulation=2, monitor_every=0)
    card = train(mended, data(14, 2), tmp_path / "out").card
    assert (card.training["recipe"]["accumulation"], card.training["recipe"]["monitor_every"]) == (2, 0)
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "undisturbed")
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_a_checkpoint_from_before_a_field_was_added_continues(tmp_path):
    """The field had its default then."""
    recipe = tiny(epochs=1)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data(), tmp_path, progress=halted_at(1))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    older = json.loads(state["recipe"])
    assert (older.pop("power"), older.pop("scale")) == (1.0, [0.5, 2.0])
    torch.save(state | {"recipe": json.dumps(older)}, tmp_path / CHECKPOINT)
    train(recipe, data(), tmp_path)
    torch.save(state | {"recipe": json.dumps(older)}, tmp_path / CHECKPOINT)
    with pytest.raises(RunError, match=r"another recipe: power: 1\.0 there, 2\.0 here\."):
        train(replace(recipe, power=2.0), data(), tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied"), "Cannot read the checkpoint .*Permission denied"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Not enough memory to continue"),
    ],
)
def test_a_healthy_checkpoint_is_not_called_damaged(tmp_path, monkeypatch, error, said):
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), data(), tmp_path, progress=halted_at(1))

    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(RunError, match=rf"{said}.*It stays as it is"):
        train(tiny(), data(), tmp_path)


# Devices without enough memory or without a compiler


def short_of_memory(monkeypatch, module, name, fits):
    """Lets a function raise what a GPU raises when it gets more images than fit; gives the sizes that it got."""
    function, sizes = getattr(module, name), []

    def limited(model, images, *arguments, **options):
        sizes.append(len(images))
        if len(images) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return function(model, images, *arguments, **options)

    monkeypatch.setattr(module, name, limited)
    return sizes


def test_a_step_that_does_not_fit_says_which_option_makes_it_fit_and_continues_with_it(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), data(), tmp_path, progress=halted_at(2))
    short_of_memory(monkeypatch, gradients, "training_attack", fits=2)
    with pytest.raises(RunError, match=r"Not enough memory on cpu for 4 images at once.*--set accumulation=2"):
        train(tiny(), data(), tmp_path)
    train(tiny(accumulation=2), data(), tmp_path)
    assert len(measured(tmp_path)) == 2


def test_scores_take_fewer_images_at_once_where_memory_is_short(monkeypatch):
    model, images = build_model(tiny(), 8).eval(), load_shapes().first(5)
    whole = robust_scores(model, images, tiny(), "cpu")
    sizes = short_of_memory(monkeypatch, attacks, "red_eps_apgd", fits=2)
    assert robust_scores(model, images, tiny(), "cpu") == pytest.approx(whole, abs=1e-3)
    assert sizes == [5, 2, 2, 2, 3, 1, 1, 1, 2, 2, 2]
    short_of_memory(monkeypatch, attacks, "red_eps_apgd", fits=0)
    with pytest.raises(RunError, match=r"Not enough memory to score .* of \(64, 64\) pixels.*--set monitor_every=0"):
        robust_scores(model, images, tiny(), "cpu")


def test_other_errors_of_a_model_stay_what_they_are(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(gradients, "training_attack", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(tiny(), data(), tmp_path)


def test_compilation_without_a_compiler_says_to_do_without(tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    with pytest.raises(RunError, match=r"torch\.compile does not work here: .*--set compile=false"):
        train(tiny(compile=True), data(), tmp_path)


def test_weights_are_written_before_they_are_scored(tmp_path):
    """So that a damaged image of the validation split costs no training."""

    def damaged(image_id):
        raise DataError(f"{image_id} is damaged")

    whole = data()
    broken = replace(whole, validation=replace(whole.validation, read=damaged))
    with pytest.raises(DataError, match=r"is damaged\nTraining is done, and .* is written\. The same command goes on"):
        train(tiny(), broken, tmp_path)
    found = weights(tmp_path)
    assert not list(tmp_path.glob("at_*.json"))
    train(tiny(), whole, tmp_path)
    assert equal(weights(tmp_path), found)
    assert list(tmp_path.glob("at_*.json"))


def test_a_data_set_with_windows_is_scored_as_it_is_evaluated(tmp_path):
    """The card's score and those on held-out images are the protocol's."""
    root = folder(tmp_path / "data", sizes=((48, 64),))
    (root / "classes.txt").unlink()
    (root / "dataset.yaml").write_text(
        f"classes: {list(CLASS_NAMES)}\nwindow: {{size: [32, 32], stride: [16, 16]}}\n", "utf-8"
    )
    recipe = tiny(dataset="folder", held_out=2, monitor_every=1, crop=32, epochs=1)
    seen = []
    trained = train(recipe, open_data(recipe, root), tmp_path / "out", progress=seen.append)
    model, held_out = load_model(str(trained.document_path)), open_data(recipe, root).held_out
    assert held_out.window is not None
    inside = SlidingWindow(model, (32, 32), (16, 16))
    expected = clean_scores(inside, held_out, "cpu")
    assert seen[-1].row["clean_miou"] == pytest.approx(expected.miou, abs=1e-6)
    assert clean_scores(model, held_out, "cpu") != expected
    result = evaluate(str(trained.document_path), data_root=root, out=tmp_path / "run", eps=4, iterations=1,
                      progress=False)  # fmt: skip
    assert result.entry()["clean"]["miou"] == pytest.approx(trained.scores["miou"], abs=1e-6)


def test_statistics_over_several_gpus_leave_activations_in_place():
    """What torch's own function drops where timm joins a norm and its activation."""
    torch.manual_seed(0)
    model = build_described(
        {"name": "upernet_timm", "arguments": {"backbone": "efficientnet_b0", "channels": 8}}, num_classes=3
    ).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        after = convert_sync_batchnorm(model)(images)
    assert sum(isinstance(part, nn.SyncBatchNorm) for part in model.modules()) > 40
    assert torch.equal(before, after)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other content", "a part is missing", "other shapes"])
def test_damaged_checkpoints_are_named_and_kept(tmp_path, damage):
    recipe = tiny()
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data(), tmp_path, progress=halted_at(1))
    path = tmp_path / CHECKPOINT
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    if damage == "other content":
        torch.save([1], path)
    elif damage == "a part is missing":
        torch.save({key: value for key, value in state.items() if key != "optimizer"}, path)
    elif damage == "other shapes":
        torch.save(state | {"model": {key: value[..., None] for key, value in state["model"].items()}}, path)
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"<html>"}[damage])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RunError, match=r"checkpoint\.pt is damaged .*Delete it to start again, or give another --out"):
        train(recipe, data(), tmp_path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_a_checkpoint_executes_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"recipe": tiny().to_json(), "position": Evil()}, tmp_path / CHECKPOINT)
    with pytest.raises(RunError, match="damaged"):
        train(tiny(), data(), tmp_path)
    assert not (tmp_path / "evil").exists()


def test_training_outside_of_the_main_thread_leaves_signals_alone(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, tiny(epochs=1), data(), tmp_path).result()
    assert weights(tmp_path)


def test_a_killed_process_continues_to_the_same_weights(tmp_path):
    """SIGKILL, SIGTERM and SIGINT hit real processes in the middle of an epoch; compared with a run left alone."""
    tree = folder(tmp_path / "my tree", train=56)  # 23 steps an epoch
    changes = EVERYTHING | {"dataset": "folder", "crop": 32, "base": 32, "batch_size": 2, "held_out": 10}
    recipe = recipe_file(tmp_path / "my recipe.yaml", **changes)
    command = segbench(
        "train", recipe, "--out", tmp_path / "parts", "--data-root", tree, "--device", "cpu",
        "--checkpoint-minutes", "0", "--quiet",
    )  # fmt: skip
    path, at = tmp_path / "parts" / CHECKPOINT, [0]
    for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        known = path.stat().st_mtime_ns if path.exists() else 0
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not path.exists() or path.stat().st_mtime_ns == known:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=600)
        if signum == signal.SIGKILL:
            assert process.returncode == -signum
        else:
            assert process.returncode == 130
            assert [line for line in errors.splitlines() if line] == [
                "Stopping after this step. Another Ctrl-C stops at once.",
                "Error: interrupted. What is finished is kept: run the same command again to continue.",
            ]
        assert not list((tmp_path / "parts").glob("*.safetensors"))
        position = torch.load(path, weights_only=True)["position"]
        assert 0 < position["step"] < 23
        at.append(23 * position["epoch"] + position["step"])
    assert at == sorted(set(at))
    for name in ("parts", "whole"):  # both by the command: another number of threads would round otherwise
        own = [*command, "--out", tmp_path / name]
        subprocess.run(own, env=ENVIRONMENT, check=True, capture_output=True, timeout=600)
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")


# Refusals before anything is written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_classes": 3}, "'num_classes' is a field of the card"),
        ({"widths": [0, 8, 8, 8]}, "widths must be positive"),
        ({"drop_path_rate": 2}, "drop_path_rate must be in"),
    ],
)
def test_arguments_that_build_nothing_are_refused_before_anything_is_written(tmp_path, arguments, said):
    with pytest.raises(ModelError, match=said):
        train(replace(tiny(), architecture_arguments=arguments), data(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_architecture_without_auxiliary_head_takes_no_weight_for_it(tmp_path):
    with pytest.raises(ModelError, match="segmenter_vit has no auxiliary head: --set auxiliary_weight=0"):
        train(tiny(**VIT | {"auxiliary_weight": 0.4}), data(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"id": "../x"}, {"id": "/x"}, {"title": ""}, {"title": "t" * 201}, {"epochs": -1}])
def test_a_run_that_cannot_end_with_a_valid_card_does_not_start(tmp_path, change):
    """However the recipe was made; nothing is written, least of all outside of the folder."""
    with pytest.raises(UsageError, match="card would not be valid"):
        train(replace(tiny(), **change), data(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RunError, match="Give another --out folder"):
        train(tiny(), data(), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 64}, r"12 training images do not fill one batch of 64: lower batch_size"),
        ({"batch_size": 4, "accumulation": 3}, r"batch of 4 .* 1 processes with accumulation 3: take a multiple of 3"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(tmp_path, changes, said):
    with pytest.raises(RunError, match=said):
        train(tiny(**changes), data(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", [CONVNEXT, VIT, RESNET], ids=lambda each: each["architecture"])
def test_each_architecture_trains_and_its_weights_load_again(tmp_path, architecture):
    trained = train(tiny(**architecture, epochs=1), data(), tmp_path)
    model = load_model(str(trained.document_path))
    assert equal(model.state_dict(), weights(tmp_path))
    assert clean_scores(model, load_shapes().first(1), "cpu").aacc == pytest.approx(trained.scores["aacc"], abs=1e-4)


@pytest.mark.parametrize("change", ["other images", "other classes", "other files"])
def test_a_checkpoint_of_other_images_is_refused(tmp_path, change):
    """Also if all images have the names of the ones before."""
    roots = [folder(tmp_path / "one"), folder(tmp_path / "two", train=16 if change == "other images" else 12)]
    if change == "other classes":
        (roots[1] / "classes.txt").write_text("\n".join([*CLASS_NAMES, "another"]) + "\n")
    if change == "other files":
        Image.new("RGB", (32, 32)).save(roots[1] / "train" / "images" / "003.png")
    recipe = tiny(epochs=1, dataset="folder")
    train(recipe, open_data(recipe, roots[0]), tmp_path / "out")
    kept = (tmp_path / "out" / CHECKPOINT).read_bytes()
    said = r"run on other images or classes\. Give the same --data-root, or another --out"
    with pytest.raises(RunError, match=said):
        train(recipe, open_data(recipe, roots[1]), tmp_path / "out")
    assert (tmp_path / "out" / CHECKPOINT).read_bytes() == kept
    roots[0].rename(tmp_path / "elsewhere")  # the same data, moved
    train(recipe, open_data(recipe, tmp_path / "elsewhere"), tmp_path / "out")


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    refused = []

    def progress(at):
        with pytest.raises(RunError, match=r"Another process trains into .*out\. Wait for its end, or give another"):
            train(tiny(seed=1), data(), tmp_path / "out")
        refused.append(at)

    train(tiny(), data(), tmp_path / "out", progress=progress)
    assert len(refused) == 6
    train(tiny(), data(), tmp_path / "undisturbed")
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "undisturbed"))


def test_a_finished_run_stays_as_it_was_written(tmp_path):
    """The card tells how the weights came to be, not with what options the command was given once more."""
    before = train(tiny(), data(), tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    again = train(tiny(accumulation=2, monitor_every=1), data(), tmp_path)
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert (again.scores, again.card.to_json()) == (before.scores, before.card.to_json())
    for damaged in (before.document_path, before.weights_path):
        damaged.write_bytes(damaged.read_bytes()[:-9])  # is mended
        train(tiny(), data(), tmp_path)
        assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_compiler_that_the_same_signal_kills_is_no_fault(tmp_path, monkeypatch):
    """A terminal sends Ctrl-C to the compiler, too."""
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), data(), tmp_path, progress=halted_at(2))
    kept = (tmp_path / CHECKPOINT).read_bytes()

    def killed(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RunError("torch.compile does not work here: g++ was killed")

    monkeypatch.setattr(gradients, "training_attack", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), data(), tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept
