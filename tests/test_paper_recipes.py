"""The recipes of the paper hold what was published, fit the cards of the zoo, and train each of its architectures."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files

import numpy as np
import pytest
import torch

import segbench
from segbench.errors import UsageError
from segbench.models.architectures import ARCHITECTURES
from segbench.models.backbones import BACKBONES
from segbench.training import loop, optimisation
from segbench.training.data import open_data
from segbench.training.initialisation import initialise
from segbench.training.recipe import load_recipe
from tests.conftest import GOLDEN
from tests.test_layouts import mask, photograph, sbd, voc

# What is trained: its section of Table 4, its size there, and its robust backbone.
TRAINED = {
    "convnext_t_voc": ("upernet_voc", "T", "robust_convnext_t"),
    "convnext_s_voc": ("upernet_voc", "S", "robust_convnext_s"),
    "convnext_t_ade20k": ("upernet_ade", "T", "robust_convnext_t"),
    "convnext_s_ade20k": ("upernet_ade", "S", "robust_convnext_s"),
    "vit_s_ade20k": ("segmenter_ade", "", "robust_vit_s"),
    "resnet50_voc": ("psp_voc", "", "robust_resnet50"),
}
RECIPES = [f"{method}_{trained}" for method in ("clean", "at", "pirat") for trained in TRAINED]
TABLE = json.loads((GOLDEN / "training_table_4.json").read_text())
PAPER = "https://arxiv.org/abs/2306.12941"
# Three methods of one architecture differ in weights and attack only: one is built and trained for each.
ARCHITECTURES_OF_THE_PAPER = ("convnext_t_voc", "convnext_s_ade20k", "vit_s_ade20k", "resnet50_voc")


def told(recipe, section, size):
    """What a recipe says to each setting of a section of Table 4."""
    ratio = f"1:{recipe.head_learning_rate_factor:g}"
    return {
        "crop": recipe.crop,
        "base": recipe.base,
        "optimizer": {"adamw": "AdamW", "sgd": "SGD"}[recipe.optimizer],
        "lr": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "momentum": recipe.momentum,
        "betas": list(recipe.betas),
        "batch": f"16x{recipe.batch_size // 16}" if recipe.batch_size % 16 == 0 else "",
        "epochs": [recipe.epochs],
        "warmup_epochs": [recipe.warmup_epochs],
        "schedule": "poly",  # as test_learning_rates_... finds
        "power": recipe.power,
        "lr_ratio_encoder_decoder": ratio,
        "aux_weight": recipe.auxiliary_weight,
        "drop_path": section.get("drop_path", {}) | {size: recipe.architecture_arguments.get("drop_path_rate")},
    }


@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, setting) for name in RECIPES for setting in TABLE[TRAINED[name.partition("_")[2]][0]]],
)
def test_a_published_setting_is_that_of_the_recipe(name, setting):
    table, size, _ = TRAINED[name.partition("_")[2]]
    published, found = TABLE[table][setting], told(load_recipe(name), TABLE[table], size)[setting]
    if setting in ("epochs", "warmup_epochs"):  # two schedules are published
        assert found[0] in published
    else:
        assert found == published


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_section_leaves_out_is_not_used(name):
    recipe = load_recipe(name)
    section = TABLE[TRAINED[name.partition("_")[2]][0]]
    assert recipe.head_learning_rate_factor == 1 or "lr_ratio_encoder_decoder" in section
    assert recipe.auxiliary_weight == 0 or "aux_weight" in section
    assert "drop_path_rate" not in recipe.architecture_arguments or "drop_path" in section
    schedules = list(zip(section["epochs"], section["warmup_epochs"], strict=True))
    assert (recipe.epochs, recipe.warmup_epochs) in schedules
    assert (recipe.epochs == min(section["epochs"])) == (recipe.dataset == "pascal_voc")


@pytest.mark.parametrize("name", RECIPES)
def test_attack_and_augmentation_are_the_published_ones(name):
    recipe = load_recipe(name)
    clean = name.startswith("clean_")
    assert TABLE["pgd"]["loss"] == "cross-entropy"
    assert recipe.eps_255 == (0 if clean else TABLE["pgd"]["eps_255"])
    assert recipe.step_size_255 / 255 == pytest.approx(0 if clean else TABLE["pgd"]["step_size"])
    assert recipe.attack_steps == (0 if clean else 5)
    text = TABLE["augmentation"]
    assert f"in [{recipe.scale[0]:g}, {recipe.scale[1]:g}] x base" in text.replace("2.0", "2")
    for word, used in (("horizontal flip", recipe.flip), ("crop", recipe.crop), ("Gaussian blur", recipe.blur)):
        assert f"random {word}" in text
        assert used > 0
    assert (recipe.split, recipe.precision) == ("sbd" if recipe.dataset == "pascal_voc" else "train", "fp32")


@cache
def without_memory(trained):
    """The model that three recipes train, on the meta device."""
    recipe = load_recipe(f"pirat_{trained}")
    with torch.device("meta"):
        return ARCHITECTURES[recipe.architecture].build(
            num_classes=segbench.get_card(recipe.id).num_classes, **recipe.architecture_arguments
        )


@pytest.mark.slow
@pytest.mark.parametrize("trained", TRAINED)
def test_learning_rates_rise_linearly_and_fall_by_the_published_power(trained):
    """At every step, of encoder and decoder, in an epoch of three steps."""
    recipe = load_recipe(f"pirat_{trained}")
    section = TABLE[TRAINED[trained][0]]
    assert (section["schedule"], TABLE["warmup"]) == ("poly", "linear")
    optimizer = optimisation.make_optimizer(without_memory(trained), recipe)
    schedule = optimisation.make_schedule(optimizer, recipe, steps_an_epoch=3)
    warmup, steps = 3 * round(recipe.warmup_epochs), 3 * recipe.epochs
    rising = (np.arange(warmup) + 1) / warmup
    falling = (1 - np.arange(steps - warmup) / (steps - warmup)) ** section["power"]
    ratio = int(section.get("lr_ratio_encoder_decoder", "1:1").removeprefix("1:"))
    for step, factor in enumerate([*rising, *falling]):
        rates = {group["lr"] for group in optimizer.param_groups}
        expected = {section["lr"] * factor, ratio * section["lr"] * factor}
        assert sorted(rates) == pytest.approx(sorted(expected), rel=1e-9), step
        optimizer.step()
        schedule.step()


def as_cards_say(recipe):
    """The entries of a card's `training` that a recipe decides."""
    return {
        "method": recipe.method,
        "eps_255": recipe.eps_255,
        "attack_steps": recipe.attack_steps,
        "epochs": recipe.epochs,
        "initialisation": recipe.init,
        "extra_data": recipe.extra_data,
    }


def agree(recipe, card):
    """Where the card knows."""
    known = {key: value for key, value in card.training.items() if value is not None}
    assert {key: value for key, value in as_cards_say(recipe).items() if key in known} == known
    assert (recipe.dataset, recipe.paper_backbone) == (card.dataset, card.backbone)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_agrees_with_its_card(name):
    recipe = load_recipe(name)
    cards = [card for card in segbench.list_models(name) if card.paper["url"] == PAPER]
    if not cards:  # at_resnet50_voc has one of other authors
        assert name.startswith("clean_") or name in ("at_convnext_s_ade20k", "at_resnet50_voc")
    for card in cards:
        agree(recipe, card)
        assert recipe.title == card.title
    trained = name.partition("_")[2]
    robust = load_recipe(f"pirat_{trained}")
    assert recipe.architecture_arguments == robust.architecture_arguments
    parameters = sum(parameter.numel() for parameter in without_memory(trained).parameters())
    for card in (*cards, segbench.get_card(robust.id)):  # PIR-AT has the same architecture
        arguments = {key: value for key, value in recipe.architecture_arguments.items() if key != "drop_path_rate"}
        assert card.architecture == {"name": recipe.architecture, "arguments": arguments}
        assert recipe.title.partition(",")[0].startswith(card.title.partition(",")[0].partition(" + ")[0])
        assert card.parameters in (None, parameters)


VARIANTS = [card.id for card in segbench.list_models() if re.search(r"_(2step|32ep|300ep)_", card.id)]


@pytest.mark.parametrize("model_id", VARIANTS)
def test_the_other_published_rows_are_a_few_settings_away(model_id):
    """Those that the comments of pirat_convnext_t_voc.yaml give."""
    overrides = {"id": model_id}
    if "_2step" in model_id:
        overrides |= {"attack_steps": "2"}
    if epochs := re.search(r"_(32|300)ep", model_id):
        overrides |= {"epochs": epochs[1], "warmup_epochs": {"32": "5", "300": "30"}[epochs[1]]}
    trained = re.sub(r"_(2step|32ep|300ep)", "", model_id)
    recipe = load_recipe(trained, overrides)
    section = TABLE[TRAINED[trained.partition("_")[2]][0]]
    assert (recipe.epochs, recipe.warmup_epochs) in zip(section["epochs"], section["warmup_epochs"], strict=True)
    agree(recipe, segbench.get_card(model_id))


def test_there_are_eight_such_rows():
    assert len(VARIANTS) == 8


@pytest.mark.parametrize("trained", TRAINED)
def test_robust_starts_are_named_and_clean_ones_are_asked_for(trained):
    recipe = load_recipe(f"pirat_{trained}")
    assert (recipe.init, recipe.backbone) == ("robust", TRAINED[trained][2])
    assert recipe.backbone in BACKBONES
    for method in ("at", "clean"):
        recipe = load_recipe(f"{method}_{trained}")
        assert (recipe.init, recipe.backbone) == ("clean", "")
        with pytest.raises(UsageError, match=r"init is clean, but no backbone is named.*--set backbone=FILE"):
            initialise(torch.nn.Identity(), recipe)


class EnoughError(Exception):
    """Stops a run: neither checkpoints nor weights of these sizes are to be written."""


@pytest.mark.slow
@pytest.mark.parametrize("trained", ARCHITECTURES_OF_THE_PAPER)
def test_two_steps_of_each_architecture_change_all_weights(tmp_path, monkeypatch, trained):
    overrides = {
        "init": "random", "backbone": "''", "extra_data": "''", "batch_size": "2", "base": "72",
        "crop": "65" if trained == "resnet50_voc" else "64", "epochs": "2", "warmup_epochs": "0", "held_out": "0",
        "monitor_every": "0", "attack_steps": "2",
    }  # fmt: skip
    recipe = load_recipe(f"pirat_{trained}", overrides)
    data = open_data(recipe, tree(tmp_path / "data", recipe.dataset))
    assert (len(data.train), len(data.held_out)) == (4, 0)
    models, before, losses = [], {}, []

    def build(*arguments):
        models.append(original(*arguments))
        before.update({name: parameter.detach().clone() for name, parameter in models[0].named_parameters()})
        return models[0]

    def stop(at):
        losses.append(at.loss)
        if at.step == 2:
            raise EnoughError

    original = loop.build_model
    monkeypatch.setattr(loop, "build_model", build)
    with pytest.raises(EnoughError):
        loop.train(recipe, data, tmp_path / "out", progress=stop)
    (model,) = models
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert optimisation.all_finite(model.state_dict().values())
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in learned.items() if torch.equal(parameter, before[name])] == []


def tree(root, dataset):
    """Four small training pictures, and one to validate on, as the data set is distributed."""
    names = [f"2008_{number:06}" for number in range(4)]
    if dataset == "pascal_voc":
        base = voc(root, val=["2007_000033"])
        sbd(base, [*names, "2007_000033"], images=names)  # one of val, which is left out
        return base
    rng = np.random.default_rng(0)
    for folder, ids in (("training", names), ("validation", names[:1])):
        for name in ids:
            photograph(root / "images" / folder / f"ADE_{name}.jpg", (30, 40))
            mask(root / "annotations" / folder / f"ADE_{name}.png", rng.integers(0, 151, (30, 40)))
    return root


def test_one_recipe_of_the_paper_is_written_out_and_the_others_extend_it():
    folder = files("segbench.training") / "recipes"
    whole = [name for name in RECIPES if "\nextends: " not in "\n" + (folder / f"{name}.yaml").read_text("utf-8")]
    assert whole == ["pirat_convnext_t_voc"]
