"""Training from the outside: recipes, the images that are trained on, and the command with what it prints."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex

import click
import pytest
import torch
import yaml

import segbench
from segbench import content
from segbench.cards import read_card
from segbench.cli.app import app
from segbench.data.sets.shapes import CLASS_NAMES, load_shapes
from segbench.errors import DataError, RunError, UsageError
from segbench.models.architectures import ARCHITECTURES
from segbench.training import finishing
from segbench.training import recipe as recipes
from segbench.training.data import batches, open_data, steps_an_epoch
from segbench.training.distributed import Processes
from segbench.training.initialisation import initialise
from segbench.training.loop import build_model
from segbench.training.recipe import Recipe, list_recipes, load_recipe
from tests.tiny import FIELDS, VIT, data, folder, measured, recipe_file, tiny, weights

NAME = "at_convnext_mini_shapes"
ALONE = Processes(torch.device("cpu"))


# Recipes


def test_the_learning_rate_may_be_given_by_its_short_name():
    assert load_recipe(NAME, {"lr": "0.125"}) == load_recipe(NAME, {"learning_rate": "0.125"})


def test_recipes_of_the_package_are_valid_and_named_after_their_models():
    assert NAME in list_recipes()
    for name in list_recipes():
        recipe = load_recipe(name)
        assert recipe.id == name
        assert recipe.architecture in ARCHITECTURES
        assert name.startswith(
            {"clean": ("clean_",), "AT": ("at_", "robust_"), "PIR-AT": ("pirat_",)}[recipe.method]
        ), name


@pytest.mark.parametrize("card", segbench.list_models("*_mini_*"), ids=lambda card: card.id)
def test_cards_of_models_that_were_trained_here_hold_the_recipe_of_the_package(card):
    assert card.training["recipe"] == json.loads(json.dumps(dataclasses.asdict(load_recipe(card.id))))


def test_the_models_that_come_with_the_package_are_small():
    assert sum(path.stat().st_size for path in content.folder("model_zoo").rglob("*.safetensors")) < 3_000_000


def test_a_recipe_is_the_same_after_a_round_trip_through_its_line():
    recipe = tiny()
    values = json.loads(recipe.to_json())
    assert Recipe(**{**values, "scale": tuple(values["scale"]), "betas": tuple(values["betas"])}) == recipe


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"learning_rat": "1"}, "Did you mean 'learning_rate'"),
        ({"extends": NAME}, "extends"),
        ({"epochs": "many"}, "epochs must be int"),
        ({"epochs": "true"}, "epochs must be int, not True"),
        ({"epochs": "1.5"}, "epochs must be int"),
        ({"epochs": "0"}, "epochs must be positive"),
        ({"epochs": "{"}, "not valid YAML"),
        ({"title": "2020-13-45"}, "not valid YAML"),
        ({"title": "''"}, "title must have 1 to 200 characters"),
        ({"title": "t" * 201}, "title must have 1 to 200 characters"),
        ({"id": "/elsewhere/x"}, r"id must be 1 to 80 of a-z, 0-9 and _.*'/elsewhere/x'"),
        ({"id": "../x"}, "id must be 1 to 80"),
        ({"id": "a" * 81}, "id must be 1 to 80"),
        ({"id": '"x\\n"'}, "id must be 1 to 80"),
        ({"dataset": "../shapes"}, "dataset must be 1 to 80"),
        ({"dataset": "pascal_voc/../x"}, "dataset must be 1 to 80"),
        ({"split": "../train"}, "split must be 1 to 80"),
        ({"architecture": "upernet convnext"}, "architecture must be 1 to 80"),
        ({"architecture_arguments": "{depths: 2020-01-01}"}, "architecture_arguments must map names"),
        ({"architecture_arguments": "{1: 2}"}, "architecture_arguments must map names"),
        ({"architecture_arguments": "{channels: .nan}"}, "architecture_arguments must map names"),
        ({"architecture_arguments": "&a {depths: *a}"}, r"not valid YAML: aliases \(\*name\) are not allowed"),
        ({"architecture_arguments": "{channels: 8, channels: 9}"}, "not valid YAML: the key 'channels' occurs twice"),
        ({"architecture_arguments": "!!bool x"}, r"not valid YAML: a tag \(!!name\) does not fit its value"),
        ({"architecture_arguments": "[1]"}, "architecture_arguments must be dict"),
        ({"task": "detection"}, "Unknown task 'detection'.*Known: classification, segmentation"),
        ({"init": "robus"}, "Did you mean 'robust'"),
        ({"init": "random", "backbone": "robust_convnext_t"}, "but init is random.*--set backbone="),
        ({"init": "random", "backbone": "", "extra_data": "ImageNet"}, "saw 'ImageNet', but init is random"),
        ({"backbone_normalization": "imagenets"}, "Did you mean 'imagenet'"),
        ({"optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"precision": "fp16"}, "bf16"),
        ({"compile": "maybe"}, "compile must be bool"),
        ({"compile": "1"}, "compile must be bool"),
        ({"seed": str(10**20)}, r"seed must be a finite number below 2\^63"),
        ({"seed": str(2**32)}, r"seed must be in 0\.\.4294967295"),
        ({"seed": "-1"}, "seed must be in"),
        ({"seed": "010"}, "not valid YAML: 010 has a leading zero.* Write 10"),
        ({"batch_size": "1"}, "batch_size must be 2 or more"),
        ({"batch_size": "-4"}, "batch_size must be 2 or more"),
        ({"learning_rate": ".inf"}, "learning_rate must be a finite number"),
        ({"learning_rate": ".nan"}, "learning_rate must be a finite number"),
        ({"learning_rate": "1" + "0" * 400}, "learning_rate must be a finite number"),
        ({"learning_rate": "1e-3"}, r"learning_rate must be int or float, not '1e-3' \(.*write 1\.0e-3\)"),
        ({"learning_rate": "0"}, "learning_rate must be positive"),
        ({"weight_decay": "-0.1"}, "weight_decay must not be negative"),
        ({"power": "0"}, "power must be positive"),
        ({"power": "-0.9"}, "power must be positive"),
        ({"warmup_epochs": "-1"}, "warmup_epochs must not be negative"),
        ({"warmup_epochs": "12", "epochs": "12"}, r"warmup_epochs must be below epochs \(12\), not 12"),
        ({"head_learning_rate_factor": "0"}, "head_learning_rate_factor must be positive"),
        ({"momentum": "1"}, "momentum must be at least 0 and below 1"),
        ({"momentum": "-0.1"}, "momentum must be at least 0 and below 1"),
        ({"betas": "[0.9]"}, r"betas must be two numbers in \[0,1\)"),
        ({"betas": "[0.9, 1]"}, r"betas must be two numbers in \[0,1\)"),
        ({"betas": "0.9"}, "betas must be list"),
        ({"betas": "[0.9, high]"}, "betas must be a finite number"),
        ({"ema": "1"}, "ema must be at least 0 and below 1"),
        ({"ema": "-0.5"}, "ema must be at least 0 and below 1"),
        ({"auxiliary_weight": "-1"}, "auxiliary_weight must not be negative"),
        ({"eps_255": "300"}, r"eps_255 must be in 0\.\.255"),
        ({"eps_255": "-1"}, r"eps_255 must be in 0\.\.255"),
        ({"attack_steps": "0"}, "needs attack_steps"),
        ({"step_size_255": "0"}, "needs attack_steps and step_size_255"),
        ({"eps_255": "0", "attack_steps": "-1"}, "attack_steps must not be negative"),
        ({"eps_255": "0", "step_size_255": "-1"}, "step_size_255 must not be negative"),
        ({"crop": "-1"}, "crop must be 0"),
        ({"crop": "31"}, "crop must be 0 or a side of 32"),
        ({"crop": "9434"}, "crop must be a side of 9433 pixels at most, not 9434"),
        ({"crop": "1000000000"}, "crop must be a side of 9433 pixels at most"),
        ({"base": "-1"}, "base must not be negative"),
        ({"base": "64"}, r"\(base\), so they need a crop"),
        ({"base": "4717", "crop": "64"}, r"base times the largest scale must be 9433 pixels at most, not 4717 \* 2"),
        ({"scale": "[2, 0.5]"}, "scale must be two factors .*the smaller first"),
        ({"scale": "[0, 1]"}, "scale must be two factors above 0"),
        ({"scale": "[1, 11]"}, "scale must be two factors above 0 and up to 10"),
        ({"scale": "[1, 2, 3]"}, "scale must be two factors"),
        ({"scale": "[1, true]"}, "scale must be a finite number"),
        ({"flip": "1.5"}, r"flip is a probability and must be in 0\.\.1"),
        ({"flip": "-0.5"}, "flip is a probability"),
        ({"blur": "2"}, "blur is a probability"),
        ({"accumulation": "0"}, "accumulation must be positive"),
        ({"held_out": "-1"}, "held_out must not be negative"),
        ({"monitor_every": "-1"}, "monitor_every must not be negative"),
        ({"monitor_eps_255": "0"}, "monitor_eps_255 must be above 0 and up to 255"),
        ({"monitor_eps_255": "256"}, "monitor_eps_255 must be above 0 and up to 255"),
        ({"monitor_iterations": "0"}, "monitor_iterations must be positive"),
    ],
)  # fmt: skip
def test_recipes_with_faults_are_refused(changes, text):
    with pytest.raises(UsageError, match=text):
        load_recipe(NAME, changes)


def test_every_field_has_a_value_that_is_refused():
    """So that a new field is not forgotten in the table above; of texts for people anything goes."""
    (table,) = (mark.args[1] for mark in test_recipes_with_faults_are_refused.pytestmark)
    tried = {key for changes, _ in table for key in changes}
    assert {field.name for field in dataclasses.fields(Recipe)} - tried == {"paper_backbone"}


def test_unknown_recipes_are_answered_with_the_nearest():
    with pytest.raises(UsageError, match=f"Did you mean '{NAME}'"):
        load_recipe("at_convnext_mini_shape")
    with pytest.raises(UsageError, match=r"The recipe nowhere\.yaml is no file"):
        load_recipe("nowhere.yaml")


def test_recipes_that_are_no_text_or_no_mapping_are_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes("title: Straße".encode("latin-1"))
    with pytest.raises(UsageError, match=r"Cannot read the recipe .*r\.yaml.*UTF-8"):
        load_recipe(str(path))
    for text in ("", "- a", "word"):
        path.write_text(text)
        with pytest.raises(UsageError, match="must be a mapping of field to value"):
            load_recipe(str(path))
    path.write_text("id: x\ntitle: t\n")
    with pytest.raises(UsageError, match="lacks dataset, architecture, architecture_arguments, epochs, batch_size"):
        load_recipe(str(path))


def test_recipes_that_multiply_aliases_or_say_a_field_twice_are_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)))
    with pytest.raises(UsageError, match=r"r\.yaml is not valid YAML: aliases \(\*name\) are not allowed"):
        load_recipe(str(path))
    path.write_text(f"extends: {NAME}\nepochs: 3\nseed: 1\nepochs: 4\n")
    with pytest.raises(UsageError, match=r"r\.yaml is not valid YAML: the key 'epochs' occurs twice"):
        load_recipe(str(path))


def test_crops_and_scaled_images_may_be_as_large_as_a_picture():
    assert load_recipe(NAME, {"crop": "9433", "base": "4716"}).crop == 9433


def write(path, **values):
    path.write_text(yaml.safe_dump(values), "utf-8")
    return str(path)


def test_a_recipe_extends_another_and_overrides_win(tmp_path):
    """What it says itself goes before what it extends; a list or mapping is replaced as a whole."""
    (tmp_path / "below").mkdir()
    write(tmp_path / "first.yaml", extends=NAME, epochs=3, seed=5, architecture_arguments={"depths": [1, 1, 1, 1]})
    path = write(tmp_path / "below" / "second.yaml", extends="../first.yaml", seed=6, id="second")
    found = load_recipe(path, {"learning_rate": "0.5", "id": "third"})
    package = load_recipe(NAME)
    assert (found.epochs, found.seed, found.id, found.learning_rate) == (3, 6, "third", 0.5)
    assert found.architecture_arguments == {"depths": [1, 1, 1, 1]}
    assert found == dataclasses.replace(
        package, epochs=3, seed=6, id="third", learning_rate=0.5, architecture_arguments={"depths": [1, 1, 1, 1]}
    )


def test_a_recipe_that_extends_nothing_that_exists_is_refused(tmp_path):
    with pytest.raises(UsageError, match=f"Did you mean '{NAME}'"):
        load_recipe(write(tmp_path / "a.yaml", extends="at_convnext_mini_shape"))
    with pytest.raises(UsageError, match=r"gone\.yaml is no file"):
        load_recipe(write(tmp_path / "a.yaml", extends="gone.yaml"))
    for wrong in (None, 3, [NAME]):
        with pytest.raises(UsageError, match="extends must be the name of a recipe"):
            load_recipe(write(tmp_path / "a.yaml", extends=wrong))
    with pytest.raises(UsageError, match=r"a\.yaml: .*learning_rat.*Did you mean 'learning_rate'"):
        load_recipe(write(tmp_path / "a.yaml", extends=NAME, learning_rat=1))


def test_recipes_that_extend_each_other_are_refused(tmp_path):
    write(tmp_path / "a.yaml", extends="b.yaml")
    write(tmp_path / "b.yaml", extends="a.yaml")
    with pytest.raises(UsageError, match=r"a\.yaml -> b\.yaml -> a\.yaml.* extend each other"):
        load_recipe(str(tmp_path / "a.yaml"))
    itself = write(tmp_path / "c.yaml", extends="c.yaml")
    with pytest.raises(UsageError, match="extend each other"):
        load_recipe(itself)


# Images


def test_held_out_images_are_not_trained_on_and_are_the_same_for_every_seed(tmp_path):
    root = folder(tmp_path / "data", train=20)
    seen = set()
    for seed in (0, 1, 7):
        recipe = tiny(dataset="folder", held_out=4, seed=seed)
        found = open_data(recipe, root)
        assert set(found.train.image_ids) | set(found.held_out.image_ids) == {f"{i:03}" for i in range(20)}
        assert not set(found.train.image_ids) & set(found.held_out.image_ids)
        seen.add(found.held_out.image_ids)
        kept_back = {found.held_out.read(image_id)[0].tobytes() for image_id in found.held_out.image_ids}
        plain = dataclasses.replace(recipe, flip=0.0)
        trained = {
            image.permute(1, 2, 0).numpy().tobytes()
            for epoch in range(3)
            for batch in batches(found.train, plain, epoch, ALONE)
            for image in batch.images
        }
        assert len(trained) == 16
        assert not trained & kept_back
        assert len(found.validation) == 2
    assert seen == {("000", "005", "010", "015")}


@pytest.mark.parametrize(("wanted", "images", "found"), [(0, 20, 0), (16, 20, 5), (16, 3, 0), (3, 20, 3)])
def test_at_most_a_quarter_of_the_images_is_held_out(tmp_path, wanted, images, found):
    root = folder(tmp_path / "data", train=images)
    opened = open_data(tiny(dataset="folder", held_out=wanted), root)
    assert (len(opened.held_out), len(opened.train)) == (found, images - found)


def test_training_sees_images_as_stored_and_scores_are_measured_as_in_evaluation(tmp_path):
    root = folder(tmp_path / "data", train=8, sizes=((50, 64), (64, 48)))
    description = {"classes": list(load_shapes().class_names), "resize": {"short_side": 32, "crop": True}}
    (root / "dataset.yaml").write_text(yaml.safe_dump(description))
    opened = open_data(tiny(dataset="folder", held_out=2, crop=32), root)
    sizes = {opened.train.read(image_id)[1].shape for image_id in opened.train.image_ids}
    assert sizes == {(50, 64), (64, 48)}
    for split in (opened.held_out, opened.validation):
        assert {sample.label.shape for sample in split} == {(32, 32)}
    as_evaluated = segbench.load_dataset("folder", root)
    assert torch.equal(opened.validation[1].image, as_evaluated[1].image)
    images, labels = next(batches(opened.train, tiny(crop=32), 0, ALONE))
    assert images.shape == (4, 3, 32, 32)
    assert labels.shape == (4, 32, 32)


def test_another_split_is_trained_on_if_the_recipe_says_so(tmp_path):
    root = folder(tmp_path / "data", train=8, val=5)
    assert len(open_data(tiny(dataset="folder", split="train"), root).train) == 8
    with pytest.raises(DataError, match="tests"):
        open_data(tiny(dataset="folder", split="tests"), root)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_nothing_is_trained_on_the_validation_split(monkeypatch, task):
    monkeypatch.setattr("segbench.data.sets.shapes.OBJECTS", {"train": (1, 8), "val": (2, 2)})
    said = f"The recipe {NAME} trains on the split 'val' of 'shapes', on which .* --set split=train"
    with pytest.raises(UsageError, match=said):
        open_data(tiny(task=task, split="val", auxiliary_weight=0))


def test_data_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match=r"camvid(.|\n)*Expected|--data-root|data root"):
        open_data(tiny(dataset="camvid"), tmp_path / "nothing")
    with pytest.raises(UsageError, match="Did you mean 'camvid'"):
        open_data(tiny(dataset="canvid"), tmp_path)


def test_embedded_scenes_need_no_root(monkeypatch):
    monkeypatch.setattr("segbench.data.sets.shapes.load_shapes", lambda split="val": load_shapes(split, count=16))
    opened = open_data(tiny(held_out=4))
    assert (len(opened.train), len(opened.held_out), len(opened.validation)) == (12, 4, 32)
    objects = {"train": (1, 12), "val": (2, 3)}
    monkeypatch.setattr("segbench.data.sets.shapes.OBJECTS", objects)
    opened = open_data(tiny(task="classification", held_out=4, auxiliary_weight=0))
    assert (len(opened.train), len(opened.held_out), len(opened.validation)) == (9, 3, 3)
    assert opened.train.num_classes == 7


@pytest.mark.parametrize(
    ("batch", "accumulation", "world", "steps"),
    [(4, 1, 1, 3), (4, 1, 2, 3), (4, 2, 1, 3), (12, 3, 2, 1), (5, 1, 1, 2)],
)
def test_an_epoch_has_as_many_steps_as_there_are_whole_batches(batch, accumulation, world, steps):
    recipe = tiny(batch_size=batch, accumulation=accumulation)
    assert steps_an_epoch(recipe, data().train, Processes(torch.device("cpu"), 0, world)) == steps


@pytest.mark.parametrize(("accumulation", "world"), [(2, 1), (1, 2), (2, 2)])
def test_parts_of_one_image_are_refused_where_batch_norm_sees_nothing_else(accumulation, world):
    parts = accumulation * world
    settings, images = {"batch_size": parts, "accumulation": accumulation}, data().train
    together = Processes(torch.device("cpu"), 0, world)
    with pytest.raises(RunError, match=f"parts of one image, .* needs two: --set batch_size={2 * parts}, or"):
        steps_an_epoch(tiny(**settings), images, together)
    assert steps_an_epoch(tiny(**settings | {"batch_size": 2 * parts}), images, together) == 12 // (2 * parts)
    assert steps_an_epoch(tiny(**VIT, **settings), images, together) == 12 // parts


def test_batch_norm_sees_the_images_of_all_gpus():
    settings = tiny(batch_size=4, accumulation=2)
    assert steps_an_epoch(settings, data().train, Processes(torch.device("cuda"), 0, 2)) == 3


# The command


@pytest.fixture
def own_recipes(tmp_path, monkeypatch):
    """A package with tiny recipes instead of its own: a classifier, and a model that starts from it."""
    package = tmp_path / "package"
    (package / "recipes").mkdir(parents=True)
    classifier = load_recipe("clean_classifier_mini_shapes")
    plain = json.loads(classifier.to_json())
    settings = FIELDS | {"id": "own_classifier", "task": "classification", "auxiliary_weight": 0, "eps_255": 0}
    write(package / "recipes" / "own_classifier.yaml", **plain | settings)
    write(
        package / "recipes" / "own_model.yaml", extends="own_classifier", id="own_model", task="segmentation",
        init="robust", backbone="own_classifier", eps_255=4, step_size_255=2, dataset="folder", epochs=1,
    )  # fmt: skip
    monkeypatch.setattr(recipes, "files", lambda _: package)
    monkeypatch.setattr("segbench.data.sets.shapes.OBJECTS", {"train": (1, 8), "val": (2, 2)})
    monkeypatch.setattr(finishing, "draw", lambda *_: None)


def printed_commands(text):
    """The command lines among messages, as a shell would split them."""
    return [shlex.split(line, comments=True) for line in re.findall(r"^ *(segbench .*)$", text, re.MULTILINE)]


def parsed(command):
    """The values of a command line's options; fails for those that do not exist."""
    found = app.get_command(click.Context(app), command[1])
    assert found is not None, command
    return found.make_context(command[1], command[2:]).params


@pytest.mark.slow
def test_the_command_ends_with_commands_that_lead_to_the_leaderboard(cli, tmp_path):
    """They are right for a shell, exist with these options, and the first ones do what they say."""
    root = folder(tmp_path / "my data")
    (root / "classes.txt").unlink()
    (root / "dataset.yaml").write_text(f"name: mine\nclasses: {list(CLASS_NAMES)}\n", "utf-8")
    recipe = recipe_file(tmp_path / "my.yaml", dataset="folder", id="at_tiny_mine", held_out=3, monitor_every=2)
    out = tmp_path / "my run"
    code, text, errors = cli("train", str(recipe), "--data-root", str(root), "--device", "cpu", "--out", str(out))
    assert code == 0, errors
    assert re.fullmatch(r"at_tiny_mine: clean aAcc \d+\.\d, mIoU \d+\.\d percent\n", text)
    card = read_card(out / "at_tiny_mine.json")
    assert card.training["method"] == "AT"
    assert f"weights   {out / 'at_tiny_mine.safetensors'}\ncurves    {out / 'curves.png'}\n" in errors
    lines = re.findall(r"^epoch .*$", errors, re.MULTILINE)
    assert re.fullmatch(r"epoch 1/2  loss \d\.\d{3}  \d+ images/s(  about .* left)?", lines[0])
    assert re.search(r"held out: clean mIoU \d+\.\d, robust \d+\.\d at 4/255$", lines[1])
    evaluate, publish, submit = printed_commands(errors)
    assert parsed(evaluate)["model"] == (str(out / "at_tiny_mine.json"),)
    assert parsed(evaluate)["data_root"] == root
    assert parsed(publish)["model"] == str(out / "at_tiny_mine.json")
    assert parsed(submit)["card"] == out / "at_tiny_mine.json"
    assert parsed(submit)["run"] == parsed(evaluate)["out"]
    code, _, errors = cli(*evaluate[1:], "--limit", "1", "--iterations", "1", "--eps", "8", "--quiet")
    assert code == 0, errors
    entry = json.loads(next(parsed(evaluate)["out"].glob("*.json")).read_text())
    assert entry["model"]["weights_sha256"] == card.sha256
    assert entry["dataset"]["id"] == "folder/mine"
    code, _, errors = cli(*publish[1:], "--dry-run", "--offline")
    assert code == 0, errors


@pytest.mark.slow
def test_a_card_of_training_is_valid_and_tells_everything(cli, tmp_path):
    root = folder(tmp_path / "data")
    recipe = recipe_file(tmp_path / "my.yaml", dataset="folder", paper_backbone="Tiny")
    code, text, errors = cli(
        "train", str(recipe), "--data-root", str(root), "--device", "cpu", "--json", "--quiet", "--set", "seed=3"
    )
    assert code == 0, errors
    assert "epoch" not in errors.partition("From here")[0]
    run = tmp_path / "runs" / f"train-{NAME}"
    card = read_card(run / f"{NAME}.json")
    assert json.loads(text) == card.document()
    assert card.training["recipe"] == json.loads(load_recipe(str(recipe), {"seed": "3"}).to_json())
    assert (card.training["extra_data"], card.backbone, card.dataset) == (None, "Tiny", "folder")
    assert "segbench submit" not in errors  # a folder without a name has no leaderboard
    assert "a leaderboard needs a data set with a name: docs/data.md" in errors
    assert card.num_classes == 8
    assert card.parameters == sum(
        value.numel() for key, value in weights(run).items() if "running" not in key and "num_batches" not in key
    )
    rows = list(csv.DictReader((run / "metrics.csv").open(encoding="utf-8")))
    log = card.training["log"]
    assert [log["loss_first_epoch"], log["loss_last_epoch"]] == [float(row["loss"]) for row in rows]
    assert log["images"] == 12
    assert set(card.expected) == {"aacc", "miou"}


@pytest.mark.slow
def test_a_classifier_that_is_not_there_is_trained_first_and_only_once(cli, tmp_path, own_recipes):
    root = folder(tmp_path / "data")
    command = ["train", "own_model", "--data-root", str(root), "--device", "cpu", "--set", "attack_steps=1"]
    code, text, errors = cli(*command)
    assert code == 0, errors
    assert "own_model starts from own_classifier, which is trained first, into runs/train-own_classifier" in errors
    assert text.startswith("own_model: clean aAcc")
    assert text.count("\n") == 1
    file = tmp_path / "runs" / "train-own_classifier" / "own_classifier.safetensors"
    before = file.stat().st_mtime_ns
    card = read_card(tmp_path / "runs" / "train-own_model" / "own_model.json")
    assert (card.training["method"], card.training["initialisation"]) == ("PIR-AT", "robust")
    assert card.training["log"]["backbone"]["source"] == "own_classifier"
    code, _, errors = cli(*command, "--out", "elsewhere")
    assert code == 0, errors
    assert "trained first" not in errors
    assert file.stat().st_mtime_ns == before
    first, again = (weights(tmp_path / name) for name in ("runs/train-own_model", "elsewhere"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    code, text, errors = cli("train", "own_classifier", "--device", "cpu", "--out", "other")
    assert code == 0, errors
    assert re.fullmatch(r"own_classifier: clean accuracy \d+\.\d, robust accuracy \d+\.\d percent\n", text)
    (option,) = re.findall(r"Start a model from it: --set (.*)$", errors, re.MULTILINE)
    pairs = dict(word.split("=", 1) for word in shlex.split(option))
    recipe = load_recipe("own_model", pairs)
    assert initialise(build_model(recipe, 8), recipe) is not None


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["at_convnext_mini_shape"], 2, f"Did you mean '{NAME}'"),
        ([NAME, "--set", "learning_rat=1"], 2, "Did you mean 'learning_rate'"),
        ([NAME, "--set", "learning_rate"], 2, "--set takes field=value, not 'learning_rate'"),
        ([NAME, "--set", "epochs=0"], 2, "epochs must be positive"),
        ([NAME, "--device", "gpu"], 2, "gpu"),
        ([NAME, "--checkpoint-minutes", "-1"], 2, "--checkpoint-minutes"),
        ([NAME, "--checkpoint-minutes", "nan"], 2, "--checkpoint-minutes must be a number, not nan"),
        ([NAME, "--set", "dataset=camvid", "--data-root", "nowhere"], 1, "nowhere"),
    ],
)
def test_mistakes_on_the_command_line_are_told_with_the_mend(cli, tmp_path, arguments, code, said):
    found, text, errors = cli("train", *arguments)
    assert (found, text) == (code, "")
    assert said in errors
    assert not (tmp_path / "runs").exists()


def test_overrides_may_also_come_one_by_one_and_a_value_may_hold_a_sign(cli, tmp_path):
    root = folder(tmp_path / "data")
    recipe = recipe_file(tmp_path / "my.yaml", dataset="folder", epochs=1, attack_steps=1)
    code, _, errors = cli(
        "train", str(recipe), "--data-root", str(root), "--device", "cpu", "--out", "o", "--quiet",
        "--set", "title=a = b", "seed=2", "--set", "batch_size=6",
    )  # fmt: skip
    assert code == 0, errors
    card = read_card(tmp_path / "o" / f"{NAME}.json")
    assert (card.title, card.training["recipe"]["seed"]) == ("a = b", 2)
    assert measured(tmp_path / "o")[0]["step"] == "2"


@pytest.mark.slow
def test_a_continued_command_needs_the_same_recipe(cli, tmp_path):
    root = folder(tmp_path / "data")
    recipe = recipe_file(tmp_path / "my.yaml", dataset="folder", epochs=1, attack_steps=1)
    command = ["train", str(recipe), "--data-root", str(root), "--device", "cpu", "--quiet"]
    assert cli(*command)[0] == 0
    before = (tmp_path / "runs" / f"train-{NAME}" / "checkpoint.pt").read_bytes()
    code, _, errors = cli(*command, "--set", "epochs=2")
    assert code == 1
    assert (
        "belongs to another recipe: epochs: 1 there, 2 here. Give another --out folder, or delete the checkpoint."
        in errors
    )
    assert (tmp_path / "runs" / f"train-{NAME}" / "checkpoint.pt").read_bytes() == before
    assert cli(*command)[0] == 0
