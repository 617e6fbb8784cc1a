"""Data sets go through pickle, so that a DataLoader reads them in processes that are started, not forked."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

import segbench
from segbench.data.catalogue import FAMILIES, load_whole, open_tree
from segbench.data.sets.shapes import load_objects, load_shapes
from tests.test_layouts import ade_tree, cityscapes_tree, folder, mask, photograph, voc, voc_pair

WINDOWS = '{"classes": ["sky", "road"], "name": "own", "window": {"size": [16, 16], "stride": [16, 16]}}'


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Root of a tiny copy of each data set, by the part of the id that its layout depends on."""
    root = tmp_path_factory.mktemp("trees")
    base = voc(root / "pascal_voc", val=["a"], train=["b"], trainaug=["b"])
    for image_id in "ab":
        voc_pair(base, image_id)
    ade_tree(root / "ade20k", np.ones((12, 16)))
    cityscapes_tree(root / "cityscapes")
    for split in ("val", "train"):
        photograph(root / "camvid" / split / "a.png")
        mask(root / "camvid" / f"{split}annot" / "a.png", 1)
    colours = np.broadcast_to(np.array([128, 0, 0], np.uint8), (12, 16, 3))
    for frame in ("0016E5_07959", "0001TP_006690"):  # of val and of train
        photograph(root / "camvid-original" / "701_StillsRaw_full" / f"{frame}.png")
        mask(root / "camvid-original" / "LabeledApproved_full" / f"{frame}_L.png", colours)
    folder(root / "folder", [("a.png", "a.png"), ("b.jpg", "b.png")])
    folder(root / "folder-own", [("a.png", "a.png")])
    (root / "folder-own" / "classes.txt").unlink()
    (root / "folder-own" / "dataset.json").write_text(WINDOWS)
    return root


def ids():
    """Every data set and variant of the catalogue."""
    return [
        f"{name}/{variant.replace('<name>', 'own')}".rstrip("/")
        for name, family in FAMILIES.items()
        for variant in family.variants
    ]


def root_of(dataset_id, trees):
    own = trees / dataset_id.replace("/", "-")
    return own if own.is_dir() else trees / dataset_id.partition("/")[0]


def load(dataset_id, trees, **options):
    return segbench.load_dataset(dataset_id, root_of(dataset_id, trees), **options)


def through_pickle(data):
    return pickle.loads(pickle.dumps(data))


def assert_same(found, data):
    assert found.fingerprint() == data.fingerprint()
    assert (found.class_names, found.window, found.palette, len(found)) == (
        data.class_names, data.window, data.palette, len(data)
    )  # fmt: skip
    for ours, theirs in zip(found, data, strict=True):
        assert ours.image_id == theirs.image_id
        assert torch.equal(ours.image, theirs.image)
        assert torch.equal(ours.label, theirs.label)
    assert found.where(found.image_ids[0]) == data.where(data.image_ids[0])


@pytest.mark.parametrize("dataset_id", ids())
def test_each_data_set_is_the_same_after_pickle(trees, dataset_id):
    data = load(dataset_id, trees)
    found = through_pickle(data)
    assert_same(found, data)
    for each in (found, through_pickle(data)):  # pickled before and after the weights were counted
        assert torch.equal(each.class_weights(), data.class_weights())
        assert each.count_weights()[1] == data.count_weights()[1]
    tree = open_tree(dataset_id, root_of(dataset_id, trees))
    assert through_pickle(tree).find("val") == tree.find("val")


def test_splits_subsets_and_whole_pictures_as_well(trees):
    of_files = (
        load("folder", trees).first(1),
        load("camvid", trees, split="train"),
        load("pascal_voc", trees, split="train_aug"),
        load_whole("ade20k", trees / "ade20k", split="val"),
    )
    for data in (*of_files, segbench.load_dataset("shapes"), load_shapes("train", count=3), load_objects(count=3)):
        assert_same(through_pickle(data), data)
        assert torch.equal(through_pickle(data).class_weights(), data.class_weights())


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_give_the_same_samples(trees, start):
    sets = [load(dataset_id, trees) for dataset_id in ("pascal_voc", "camvid/original", "folder/own", "folder")]
    data = ConcatDataset([*sets, segbench.load_dataset("shapes").first(2), load_objects(count=2)])
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=start)
    for found, expected in zip(loader, data, strict=True):
        assert found[2] == expected.image_id
        assert torch.equal(found[0], expected.image)
        assert torch.equal(found[1], expected.label)
