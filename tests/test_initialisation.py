"""Where a backbone starts: classifiers that are trained here, files, links and names; and what the card says of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

from segbench.cards import read_card
from segbench.data.sets.shapes import load_objects, load_shapes
from segbench.errors import DownloadError, ModelError, UnknownNameError, UsageError
from segbench.files import sha256_file
from segbench.models.architectures import build
from segbench.models.backbones import BACKBONES
from segbench.models.contract import backbone_of
from segbench.training import finishing
from segbench.training.attack import training_attack
from segbench.training.classifier import Classifier
from segbench.training.data import TrainingData, open_data
from segbench.training.initialisation import BACKBONE_NORMALIZATIONS, classifier_file, classifier_recipe, initialise
from segbench.training.loop import build_model, train
from segbench.training.recipe import list_recipes, load_recipe
from tests import servers
from tests.tiny import CONVNEXT, RESNET, VIT, data, folder, measured, tiny, weights

CLASSIFIER = "clean_classifier_mini_shapes"
ARCHITECTURES = pytest.mark.parametrize("architecture", [CONVNEXT, VIT, RESNET], ids=lambda each: each["architecture"])


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    """They take as long as a tiny run, and have tests of their own."""
    monkeypatch.setattr(finishing, "draw", lambda *_: None)


def objects(count=8, held_out=0):
    whole = load_objects("train", count=count)
    return TrainingData(
        replace(whole, image_ids=whole.image_ids[held_out:]), whole.first(held_out), load_objects(count=3)
    )


def classifier(architecture, **changes):
    """The recipe of a classifier; two steps an epoch."""
    settings = {"id": CLASSIFIER, "task": "classification", "epochs": 1, "eps_255": 0, "auxiliary_weight": 0}
    return tiny(**architecture | settings | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of runs with a classifier of two steps, by architecture."""
    runs = {each["architecture"]: tmp_path_factory.mktemp("runs") for each in (CONVNEXT, VIT, RESNET)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finishing, "draw", lambda *_: None)
        for each in (CONVNEXT, VIT, RESNET):
            train(classifier(each), objects(), classifier_file(CLASSIFIER, runs[each["architecture"]]).parent)
    return runs


def images(count=2, side=48):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


# From a classifier that was trained here


@pytest.mark.slow
@ARCHITECTURES
def test_a_backbone_starts_with_the_weights_of_the_classifier(architecture, trained):
    """Each of them, statistics of batch norm included; everything else stays as it was drawn."""
    recipe = tiny(**architecture, init="robust", backbone=CLASSIFIER)
    model, random = build_model(recipe, 8), build_model(recipe, 8)
    runs = trained[architecture["architecture"]]
    start = initialise(model, recipe, runs=runs)
    assert start == (CLASSIFIER, sha256_file(classifier_file(CLASSIFIER, runs)))
    found = weights(classifier_file(CLASSIFIER, runs).parent)
    prefix = "encoder." if architecture is VIT else "backbone."
    changed = 0
    for key, value in model.state_dict().items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and not name.startswith("head."):
            assert torch.equal(value, found[name]), key
            changed += not torch.equal(value, random.state_dict()[key])
        else:
            assert torch.equal(value, random.state_dict()[key]), key
    assert changed > 10


@ARCHITECTURES
def test_training_starts_from_it_and_the_card_says_so(architecture, trained, tmp_path):
    """A step that moves next to nothing, so that the backbone at the end is the one at the start."""
    runs = trained[architecture["architecture"]]
    recipe = tiny(
        **architecture, init="robust", backbone=CLASSIFIER, optimizer="sgd", learning_rate=1e-30, epochs=1,
        batch_size=12, extra_data="single objects",
    )  # fmt: skip
    trained_model = train(recipe, data(), tmp_path, runs=runs)
    theirs = weights(classifier_file(CLASSIFIER, runs).parent)
    prefix = "encoder." if architecture is VIT else "backbone."
    for key, value in weights(tmp_path).items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and not name.startswith("head.") and "running" not in name and "num_b" not in name:
            assert (value - theirs[name]).abs().max() < 1e-20, key
    training = read_card(trained_model.document_path).training
    assert (training["method"], training["initialisation"]) == ("PIR-AT", "robust")
    assert training["extra_data"] == "single objects"
    assert training["log"]["backbone"] == {
        "source": CLASSIFIER, "sha256": sha256_file(classifier_file(CLASSIFIER, runs)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("init", "eps", "method"),
    [
        ("robust", 4, "PIR-AT"), ("clean", 4, "AT"), ("random", 4, "AT"),
        ("robust", 0, "clean"), ("clean", 0, "clean"), ("random", 0, "clean"),
    ],
)  # fmt: skip
def test_the_method_is_named_after_attack_and_start(init, eps, method, trained, tmp_path):
    backbone = "" if init == "random" else CLASSIFIER
    recipe = tiny(init=init, backbone=backbone, eps_255=eps, epochs=1, batch_size=12, attack_steps=1)
    assert recipe.method == method
    card = train(recipe, data(), tmp_path, runs=trained["upernet_convnext"]).card
    assert (card.training["method"], card.training["initialisation"]) == (method, init)
    assert (card.training["log"]["backbone"] is None) == (init == "random")


@pytest.mark.slow
def test_a_continued_run_remembers_its_backbone_and_does_not_need_it_again(trained, tmp_path):
    recipe = tiny(init="clean", backbone=CLASSIFIER)
    runs = trained["upernet_convnext"]

    class Killed(Exception):
        pass

    def kill(at):
        if at.step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, data(), tmp_path / "parts", runs=runs, checkpoint_minutes=0, progress=kill)
    card = train(recipe, data(), tmp_path / "parts", runs=tmp_path / "empty").card
    whole = train(recipe, data(), tmp_path / "whole", runs=runs).card
    assert card.sha256 == whole.sha256
    assert card.training["log"]["backbone"] == whole.training["log"]["backbone"]


def test_classification_recipes_are_known_as_backbones():
    assert classifier_recipe(tiny(init="clean", backbone=CLASSIFIER)) == CLASSIFIER
    for other in ("robust_convnext_t", "clean_convnext_mini_shapes", "folder/file.pt", "https://example.org/a.pt"):
        assert classifier_recipe(tiny(init="clean", backbone=other)) is None
    assert classifier_recipe(tiny()) is None


@pytest.mark.slow
def test_every_recipe_of_the_package_names_a_backbone_that_exists_and_fits():
    """Of the mini models, whose classifiers are trained here, the shapes of both are compared."""
    for name in list_recipes():
        recipe = load_recipe(name)
        if recipe.init == "random":
            assert not recipe.backbone
            continue
        theirs = classifier_recipe(recipe)
        if theirs is None:
            assert recipe.backbone in BACKBONES or recipe.init == "clean", name
            continue
        model, other = build_model(recipe, 8), build_model(load_recipe(theirs), 7)
        own = backbone_of(model).state_dict()
        assert {key: value.shape for key, value in backbone_of(other).state_dict().items()} == {
            key: value.shape for key, value in own.items()
        }
        assert (load_recipe(theirs).method == "AT") == (recipe.init == "robust"), name


# From files, links and names


def saved(path, architecture=CONVNEXT, **changes):
    """A classifier with random weights in a file."""
    torch.manual_seed(7)
    model = Classifier(build_model(tiny(**architecture | changes), 8), 5)
    safetensors.torch.save_file({key: value.contiguous() for key, value in model.weights().items()}, path)
    return path


def test_a_file_starts_a_backbone(tmp_path):
    path = saved(tmp_path / "my classifier.safetensors")
    recipe = tiny(init="robust", backbone=str(path))
    model = build_model(recipe, 8)
    assert initialise(model, recipe) == ("my classifier.safetensors", sha256_file(path))
    assert torch.equal(model.backbone.stem[0].weight, safetensors.torch.load_file(path)["stem.0.weight"])


def test_a_checkpoint_of_other_code_starts_a_backbone(tmp_path):
    """As PyTorch saves it: wrapped, with a prefix, and with entries that nobody needs."""
    state = {f"module.{key}": value for key, value in safetensors.torch.load_file(saved(tmp_path / "a")).items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.pt")
    recipe = tiny(init="clean", backbone=str(tmp_path / "a.pt"))
    model = build_model(recipe, 8)
    initialise(model, recipe)
    assert torch.equal(model.backbone.stem[0].weight, state["module.stem.0.weight"])


def test_keys_that_nobody_knows_are_named(tmp_path, caplog):
    state = safetensors.torch.load_file(saved(tmp_path / "a"))
    torch.save(state | {"strange.weight": torch.ones(3)}, tmp_path / "a.pt")
    recipe = tiny(init="clean", backbone=str(tmp_path / "a.pt"))
    initialise(build_model(recipe, 8), recipe)
    assert "1 keys are not known and were left out: strange.weight" in caplog.text


def test_a_link_starts_a_backbone(tmp_path, monkeypatch):
    """It is downloaded once; another file behind the same link is refused as of any other download."""
    monkeypatch.setenv("SEGBENCH_CACHE", str(tmp_path / "cache"))
    path = saved(tmp_path / "a.safetensors")
    with servers.host() as host:
        resource = servers.Resource(path.read_bytes())
        recipe = tiny(init="robust", backbone=host.file("/a.safetensors", resource))
        for _ in range(2):
            model = build_model(recipe, 8)
            assert initialise(model, recipe) == (recipe.backbone, sha256_file(path))
            assert torch.equal(model.backbone.stem[0].weight, safetensors.torch.load_file(path)["stem.0.weight"])
        assert len(host.gets()) == 1
        assert initialise(model, recipe, offline=True).sha256 == sha256_file(path)
        other = replace(recipe, backbone=host.file("/other.safetensors", resource))
        with pytest.raises(DownloadError, match="--offline"):
            initialise(model, other, offline=True)


def test_a_link_that_is_not_encrypted_is_refused():
    recipe = tiny(init="robust", backbone="http://example.org/a.pt")
    with pytest.raises(DownloadError, match=r"not encrypted; only https:// is followed"):
        initialise(build_model(recipe, 8), recipe)


def test_published_backbones_are_not_fetched_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGBENCH_CACHE", str(tmp_path))
    recipe = tiny(init="robust", backbone="robust_convnext_t")
    with pytest.raises(DownloadError, match=r"robust_convnext_t.*offline"):
        initialise(build_model(recipe, 8), recipe, offline=True)
    recipe = tiny(**RESNET, init="robust", backbone="robust_resnet50")
    with pytest.raises(ModelError, match=r"robust_resnet50 has no link of its own.*Fetch it there, and give its file"):
        initialise(build_model(recipe, 8), recipe)


def test_a_published_backbone_starts_a_model(tmp_path, monkeypatch):
    """The link of a name is followed; here it leads to a tiny classifier."""
    monkeypatch.setenv("SEGBENCH_CACHE", str(tmp_path / "cache"))
    path = saved(tmp_path / "a.safetensors")
    with servers.host() as host:
        link = host.file("/a.safetensors", servers.Resource(path.read_bytes()))
        monkeypatch.setitem(BACKBONES, "robust_convnext_t", replace(BACKBONES["robust_convnext_t"], url=link))
        recipe = tiny(init="robust", backbone="robust_convnext_t", epochs=1, batch_size=12)
        card = train(recipe, data(), tmp_path / "out").card
    assert card.training["log"]["backbone"]["source"] == "robust_convnext_t"
    assert len(card.training["log"]["backbone"]["sha256"]) == 64
    model = build_model(recipe, 8)
    initialise(model, recipe, offline=True)
    assert torch.equal(model.backbone.stem[0].weight, safetensors.torch.load_file(path)["stem.0.weight"])


def test_random_weights_need_nothing():
    recipe = tiny()
    model = build_model(recipe, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert initialise(model, recipe, offline=True) is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# What is refused


def test_a_start_without_a_backbone_is_refused(tmp_path):
    for init in ("clean", "robust"):
        with pytest.raises(UsageError, match=rf"init is {init}, but no backbone is named.*--set backbone=FILE"):
            train(tiny(init=init), data(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        (CLASSIFIER, ModelError, rf"{CLASSIFIER} is not trained yet .*: segbench train {CLASSIFIER}"),
        ("robust_convnext_x", UnknownNameError, "Did you mean 'robust_convnext_t'"),
        ("clean_classifier_mini_shape", UnknownNameError, f"Did you mean '{CLASSIFIER}'"),
        ("folder/nothing.pt", ModelError, r"folder/nothing\.pt does not exist\. Correct its path"),
        (".", ModelError, r"The backbone \. is no file\. Give the file of its weights: --set backbone=FILE"),
    ],
)
def test_backbones_that_are_not_there_are_refused(tmp_path, name, error, said):
    recipe = tiny(init="clean", backbone=name)
    with pytest.raises(error, match=said):
        initialise(build_model(recipe, 8), recipe, runs=tmp_path)


def test_a_segmentation_recipe_is_not_offered_as_a_backbone(tmp_path):
    """Training it would not help: its file would never be a classifier's."""
    recipe = tiny(init="clean", backbone="clean_convnext_mini_shapes")
    with pytest.raises((ModelError, UsageError)) as caught:
        initialise(build_model(recipe, 8), recipe, runs=tmp_path)
    assert "segbench train clean_convnext_mini_shapes" not in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "changes", "said"),
    [
        (VIT, {}, "a classifier of another family"),
        (CONVNEXT, {"depths": [1, 1, 2, 1]}, "another depth"),
        (CONVNEXT, {"widths": [8, 8, 8, 16]}, "other widths"),
    ],
)
def test_backbones_of_another_architecture_are_refused(tmp_path, theirs, changes, said):
    arguments = {"architecture_arguments": theirs["architecture_arguments"] | changes}
    path = saved(tmp_path / "other.safetensors", theirs, **arguments)
    recipe = tiny(init="robust", backbone=str(path))
    with pytest.raises(ModelError, match=rf"other\.safetensors do not fit the backbone(.|\n)*{said}"):
        train(recipe, data(), tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_files_that_are_no_weights_are_refused(tmp_path):
    (tmp_path / "a.pt").write_text("<html>")
    recipe = tiny(init="robust", backbone=str(tmp_path / "a.pt"))
    with pytest.raises(ModelError, match=r"a\.pt"):
        initialise(build_model(recipe, 8), recipe)


# Normalisation


@pytest.mark.parametrize("name", ["none", "imagenet", "inception"])
def test_a_classifier_that_normalises_in_its_code_is_folded(name, tmp_path):
    """The classifier on normalised images and ours on images in [0,1] give the same logits."""
    path = saved(tmp_path / "a.safetensors", VIT)
    torch.manual_seed(7)
    theirs = Classifier(build_model(tiny(**VIT), 8), 5).eval()
    recipe = tiny(**VIT, init="clean", backbone=str(path), backbone_normalization=name)
    model = build_model(recipe, 8)
    initialise(model, recipe)
    ours = Classifier(model, 5).eval()
    ours.head.load_state_dict(theirs.head.state_dict())
    mean, std = BACKBONE_NORMALIZATIONS[name] or ((0.0,) * 3, (1.0,) * 3)
    x = images()
    normalised = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(ours(x), theirs(normalised), rtol=1e-4, atol=1e-5)
    if name != "none":
        assert (ours(x) - theirs(x)).abs().max() > 1e-3


def test_known_normalisations_are_those_that_people_use():
    assert BACKBONE_NORMALIZATIONS["imagenet"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert BACKBONE_NORMALIZATIONS["inception"] == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# Classifiers


@ARCHITECTURES
def test_logits_of_a_classifier_are_constant_over_the_image(architecture):
    """The mean of the last features, of a transformer the class token, and a linear layer."""
    torch.manual_seed(0)
    model = Classifier(build_model(tiny(**architecture), 8), 5).eval()
    x = images(side=40)
    found = model(x)
    assert found.shape == (2, 5, 40, 40)
    assert torch.equal(found, found[..., :1, :1].expand_as(found))
    with torch.no_grad():
        features = model.backbone(x)
        pooled = features[:, 0] if architecture is VIT else features[-1].flatten(2).mean(dim=-1)
        expected = pooled @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(found[..., 0, 0], expected)


@ARCHITECTURES
def test_every_part_of_a_classifier_that_can_learn_is_used(architecture):
    """DistributedDataParallel would wait for gradients that never come."""
    model = Classifier(build_model(tiny(**architecture), 8), 5)
    model(images()).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_classifier_without_such_a_backbone_is_refused():
    with pytest.raises(ModelError, match="Conv2d has no backbone that segbench knows"):
        Classifier(nn.Conv2d(3, 3, 1), 2)
    timm = build("upernet_timm", num_classes=3, backbone="resnet10t", channels=8, auxiliary_channels=8)
    assert backbone_of(timm) is timm.backbone


def test_a_classifier_starts_from_random_weights_only(tmp_path):
    """Weights of another one do not arrive in it, so that must not be said."""
    recipe = classifier(CONVNEXT, init="clean", backbone=str(saved(tmp_path / "a.safetensors")))
    with pytest.raises((ModelError, UsageError), match=r"takes no classifier's weights|init"):
        train(recipe, objects(), tmp_path / "out")


@ARCHITECTURES
def test_a_classifier_leaves_weights_and_a_report(architecture, tmp_path):
    recipe = classifier(architecture, eps_255=4, attack_steps=1, held_out=2, monitor_every=1)
    result = train(recipe, objects(10, 2), tmp_path)
    assert result.card is None
    assert 0 <= result.scores["robust_accuracy"] <= result.scores["accuracy"] <= 1
    report = json.loads(result.document_path.read_text("utf-8"))
    assert report["sha256"] == sha256_file(result.weights_path)
    assert {key: report[key] for key in result.scores} == result.scores
    assert report["recipe"]["id"] == CLASSIFIER
    (row,) = measured(tmp_path)
    assert float(row["robust_aacc"]) <= float(row["clean_aacc"])
    assert weights(tmp_path)["head.weight"].shape[0] == 7


def test_a_classifier_takes_no_weight_for_an_auxiliary_head(tmp_path):
    with pytest.raises(ModelError, match="no auxiliary head: --set auxiliary_weight=0"):
        train(classifier(CONVNEXT, auxiliary_weight=0.4), objects(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_classifier_is_attacked_as_a_whole():
    """Its logits are the same at each pixel, so PGD raises the loss of the image's class."""
    recipe = classifier(CONVNEXT, eps_255=8, attack_steps=3, step_size_255=4)
    model = build_model(recipe, 7).eval()
    batch = [load_objects("train", count=4)[row] for row in range(4)]
    x, y = torch.stack([each.image for each in batch]), torch.stack([each.label for each in batch])
    attacked = training_attack(model, x, y, recipe)
    model.eval()
    losses = [nn.functional.cross_entropy(model(each)[..., 0, 0], y[:, 0, 0]).item() for each in (x, attacked)]
    assert losses[1] > losses[0]


def test_objects_are_those_of_scenes_one_at_a_time_and_no_scene_is_among_them():
    train_split, val = load_objects("train", count=64), load_objects(count=64)
    assert train_split.class_names == load_shapes().class_names[1:]
    for split in (train_split, val):
        pixels, labels = split.read("00003")
        assert pixels.shape == (48, 48, 3)
        assert len(set(labels.ravel().tolist())) == 1
    assert {int(train_split[row].label[0, 0]) for row in range(64)} == set(range(7))
    assert not any((train_split[row].image - val[row].image).abs().max() < 0.05 for row in range(64))
    assert torch.equal(train_split[5].image, load_objects("train", count=6)[5].image)


def test_classifiers_of_other_data_are_refused(tmp_path):
    root = folder(tmp_path / "data")
    with pytest.raises(UsageError, match="single objects of 'shapes', not on 'folder'"):
        open_data(classifier(CONVNEXT, dataset="folder"), root)
