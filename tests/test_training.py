"""Training: one step against a reference, the schedule, resume to the same weights, and recipes that are refused."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

import segbench
from segbench.cards import read_card
from segbench.cli import main
from segbench.data.shapes import load_shapes
from segbench.errors import RunError, UsageError
from segbench.models.architectures import build
from segbench.training import loop
from segbench.training.loop import Split, batches, learning_rate_factor, load_split, train, training_attack
from segbench.training.recipe import list_recipes, load_recipe

TINY = {
    "epochs": "2",
    "batch_size": "4",
    "attack_steps": "2",
    "architecture_arguments": "{depths: [1, 1, 1, 1], widths: [8, 8, 8, 8], channels: 8, auxiliary_channels: 8}",
}


@pytest.fixture
def recipe():
    return load_recipe("at_convnext_mini_shapes", TINY)


@pytest.fixture(scope="session")
def data():
    return load_shapes("train", count=12)


def test_recipes_of_the_package_are_valid_and_named_after_their_models():
    for name in list_recipes():
        assert load_recipe(name).id == name
    for card in segbench.list_models("*_shapes"):
        assert card.training["recipe"] == json.loads(json.dumps(dataclasses.asdict(load_recipe(card.id))))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"learning_rat": "1"}, "Did you mean 'learning_rate'"),
        ({"epochs": "many"}, "epochs must be int"),
        ({"epochs": "0"}, "epochs must be positive"),
        ({"eps_255": "300"}, r"eps_255 must be in 0\.\.255"),
        ({"attack_steps": "0"}, "needs attack_steps"),
        ({"crop": "-1"}, "crop must be 0"),
        ({"epochs": "{"}, "not valid YAML"),
    ],
)
def test_recipes_with_faults_are_refused(changes, text):
    with pytest.raises(UsageError, match=text):
        load_recipe("at_convnext_mini_shapes", changes)


def test_unknown_recipes_are_answered_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'at_convnext_mini_shapes'"):
        load_recipe("at_convnext_mini_shape")
    with pytest.raises(UsageError, match="does not exist"):
        load_recipe("nowhere.yaml")


def test_schedule():
    factors = [learning_rate_factor(step, 10, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(1 / 90)


def test_batches_are_a_function_of_seed_and_epoch(recipe, data):
    split = load_split(data)
    first, again, later = (list(batches(split, recipe, epoch)) for epoch in (0, 0, 1))
    assert len(first) == 3
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], later[0][0])
    cropped = next(batches(split, dataclasses.replace(recipe, crop=40), 0))
    assert cropped[0].shape == (4, 3, 40, 40)
    assert cropped[1].shape == (4, 40, 40)


def test_flips_and_crops_keep_image_and_label_together(recipe):
    ramp = torch.arange(64 * 64).reshape(1, 64, 64) % 200
    split = Split(
        ramp.to(torch.uint8)[..., None].expand(8, 64, 64, 3).permute(0, 3, 1, 2), ramp.to(torch.uint8).expand(8, 64, 64)
    )
    for images, labels in batches(split, dataclasses.replace(recipe, crop=48), 3):
        assert torch.equal((images[:, 0] * 255).round().long(), labels)


def test_the_attack_in_training_is_plain_pgd(recipe, data):
    model = build(recipe.architecture, num_classes=8, **recipe.architecture_arguments).train()
    images, labels = next(batches(load_split(data), recipe, 0))
    found = training_attack(model, images, labels, recipe)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    x = images.clone()
    for _ in range(recipe.attack_steps):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
        x = x.detach() + recipe.step_size_255 / 255 * gradient.sign()
        x = images + (x - images).clamp(-recipe.eps_255 / 255, recipe.eps_255 / 255)
        x = x.clamp(0, 1)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


def weights(folder):
    return safetensors.torch.load_file(next(folder.glob("*.safetensors")))


def test_a_stopped_run_ends_with_the_same_weights(recipe, data, tmp_path):
    validation = load_shapes().first(2)
    whole = train(recipe, data, validation, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(at):
        if at.step == 5:  # in the second epoch
            raise Killed

    with pytest.raises(Killed):
        train(recipe, data, validation, tmp_path / "parts", progress=kill)
    continued = train(recipe, data, validation, tmp_path / "parts")
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert continued.card.sha256 == whole.card.sha256
    with pytest.raises(RunError, match="belongs to another recipe"):
        train(dataclasses.replace(recipe, seed=1), data, validation, tmp_path / "parts")


def test_one_step_against_a_reference(recipe, data, tmp_path):
    """The first optimiser step, written out by hand."""
    recipe = dataclasses.replace(recipe, epochs=1, eps_255=0.0, batch_size=12)
    train(recipe, data, load_shapes().first(1), tmp_path)
    torch.manual_seed(recipe.seed)
    model = build(recipe.architecture, num_classes=8, **recipe.architecture_arguments).train()
    images, labels = next(batches(load_split(data), recipe, 0))
    logits, auxiliary = model.forward_with_auxiliary(images)
    (F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(auxiliary, labels)).backward()
    found = weights(tmp_path)
    for name, parameter in model.named_parameters():
        before, decay = parameter.detach(), recipe.weight_decay if parameter.ndim > 1 else 0.0
        # AdamW's first step has the bias-corrected moments g and g^2
        step = parameter.grad / (parameter.grad.abs() + 1e-8)
        expected = before * (1 - recipe.learning_rate * decay) - recipe.learning_rate * step
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(recipe, data, tmp_path, monkeypatch):
    train(dataclasses.replace(recipe, epochs=1), data, load_shapes().first(1), tmp_path / "a")
    monkeypatch.setattr(loop, "training_attack", lambda model, images, *_: images * torch.nan)
    with pytest.raises(RunError, match="lower learning_rate"):
        train(recipe, data, load_shapes().first(1), tmp_path / "b")
    with pytest.raises(RunError, match="do not fill one batch"):
        train(dataclasses.replace(recipe, batch_size=64), data, load_shapes().first(1), tmp_path / "c")


def test_train_command_gives_a_model_that_evaluates(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("segbench.data.shapes.TRAINING_IMAGES", 8)
    monkeypatch.setattr("segbench.data.load_shapes", lambda split: load_shapes(split, count=8))
    settings = [f"{key}={value}" for key, value in TINY.items()]
    with pytest.raises(SystemExit) as caught:
        main(["train", "at_convnext_mini_shapes", "--quiet", "--device", "cpu", "--set", *settings])
    assert caught.value.code == 0
    out = capsys.readouterr()
    assert "segbench evaluate --model runs/train-at_convnext_mini_shapes/at_convnext_mini_shapes.json" in out.err
    folder = tmp_path / "runs" / "train-at_convnext_mini_shapes"
    card = read_card(folder / "at_convnext_mini_shapes.json")
    assert card.training["method"] == "AT"
    assert [row["epoch"] for row in csv.DictReader((folder / "log.csv").open())] == ["1", "2"]
    result = segbench.evaluate(str(card.path), eps=[8], limit=1, iterations=1, progress=False)
    assert result.entry()["model"]["weights_sha256"] == card.sha256
