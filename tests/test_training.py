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
from segbench.data.sets.shapes import load_shapes
from segbench.errors import DataError, ModelError, RunError, UsageError
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
        ({"crop": "31"}, "crop must be 0 or a side of 32"),
        ({"epochs": "{"}, "not valid YAML"),
        ({"title": "2020-13-45"}, "not valid YAML"),
        ({"id": "/elsewhere/x"}, r"id must be 1 to 80 of a-z, 0-9 and _.*'/elsewhere/x'"),
        ({"id": "../x"}, "id must be 1 to 80"),
        ({"id": "a" * 81}, "id must be 1 to 80"),
        ({"id": '"x\\n"'}, "id must be 1 to 80"),
        ({"dataset": "../shapes"}, "dataset must be 1 to 80"),
        ({"title": "''"}, "title must have 1 to 200 characters"),
        ({"title": "t" * 201}, "title must have 1 to 200 characters"),
        ({"seed": str(10**20)}, r"seed must be a finite number below 2\^63"),
        ({"seed": str(2**32)}, r"seed must be in 0\.\.4294967295"),
        ({"seed": "-1"}, "seed must be in"),
        ({"batch_size": "1"}, "batch_size must be 2 or more"),
        ({"weight_decay": "-0.1"}, "weight_decay must not be negative"),
        ({"auxiliary_weight": "-1"}, "auxiliary_weight must not be negative"),
        ({"eps_255": "0", "attack_steps": "-1"}, "attack_steps must not be negative"),
        ({"learning_rate": ".inf"}, "learning_rate must be a finite number"),
        ({"learning_rate": ".nan"}, "learning_rate must be a finite number"),
        ({"learning_rate": "1" + "0" * 400}, "learning_rate must be a finite number"),
        ({"architecture_arguments": "{depths: 2020-01-01}"}, "architecture_arguments must map names"),
        ({"architecture_arguments": "{1: 2}"}, "architecture_arguments must map names"),
        ({"architecture_arguments": "{channels: .nan}"}, "architecture_arguments must map names"),
        ({"architecture_arguments": "&a {depths: *a}"}, "architecture_arguments must map names"),
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


def test_recipes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes("title: Straße".encode("latin-1"))
    with pytest.raises(UsageError, match=r"Cannot read the recipe .*r\.yaml.*UTF-8"):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_classes": 3}, "'num_classes' is a field of the card"),
        ({"widths": [0, 8, 8, 8]}, "widths must be positive"),
        ({"drop_path_rate": 2}, "drop_path_rate must be in"),
    ],
)
def test_arguments_that_build_nothing_are_refused_before_anything_is_written(recipe, data, tmp_path, arguments, said):
    with pytest.raises(ModelError, match=said):
        train(dataclasses.replace(recipe, architecture_arguments=arguments), data, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"id": "../x"}, {"id": "/x"}, {"title": ""}, {"title": "t" * 201}, {"epochs": -1}])
def test_a_run_that_cannot_end_with_a_valid_card_does_not_start(recipe, data, tmp_path, change):
    """However the recipe was made; nothing is written, least of all outside of the folder."""
    with pytest.raises(UsageError, match="card would not be valid"):
        train(dataclasses.replace(recipe, **change), data, data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_training(recipe, data, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(RunError, match="Give another --out folder"):
        train(recipe, data, data, tmp_path / "out")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other content"])
def test_damaged_checkpoints_are_named_and_kept(recipe, data, tmp_path, damage):
    train(dataclasses.replace(recipe, epochs=1), data, load_shapes().first(1), tmp_path)
    path = tmp_path / "checkpoint.pt"
    if damage == "other content":
        torch.save([1], path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"<html>"}[damage])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RunError, match=r"checkpoint\.pt is damaged .*Delete it"):
        train(recipe, data, load_shapes().first(1), tmp_path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_images_of_several_sizes_are_named(data):
    smaller = data.read(data.image_ids[2])
    mixed = dataclasses.replace(
        data, read=lambda name: data.read(name) if name != "00002" else tuple(array[:40, :32] for array in smaller)
    )
    with pytest.raises(DataError, match=r"'00000' is 64x64, '00002' is 32x40 pixels\. Crop or resize"):
        load_split(mixed)


def test_images_too_small_for_the_architecture_are_refused(data):
    small = dataclasses.replace(data, read=lambda name: tuple(array[:31] for array in data.read(name)))
    with pytest.raises(DataError, match="32x32 pixels or more"):
        load_split(small)


def test_scores_of_a_model_that_keeps_tensors_leave_it_trainable(data):
    class Keeps(torch.nn.Conv2d):
        kept = None

        def forward(self, images):
            self.kept = super().forward(images) if self.kept is None else self.kept
            return super().forward(images) + self.kept

    model = Keeps(3, 8, 1)
    loop.clean_scores(model, data.first(1), "cpu")
    model(data[0].image[None]).sum().backward()


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
    monkeypatch.setattr("segbench.data.sets.shapes.TRAINING_IMAGES", 8)
    monkeypatch.setattr("segbench.data.sets.shapes.load_shapes", lambda split: load_shapes(split, count=8))
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
