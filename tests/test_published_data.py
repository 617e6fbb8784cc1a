"""Pascal VOC and ADE20K: byte for byte the released preprocessing, and trees as they are distributed."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import segbench
from segbench.data.resizing import ShortSideCrop
from segbench.errors import DataError
from tests.conftest import GOLDEN

IDS = ("0000", "0001", "0002")
CASES = [(kind, image_id) for kind in ("voc", "ade") for image_id in IDS]


@pytest.fixture(scope="module")
def golden_pictures():
    with np.load(GOLDEN / "preprocessing.npz") as archive:
        return dict(archive)


def write_tree(root: Path, kind: str, golden: dict) -> Path:
    """The three golden pictures in the layout of the data set; the folder that holds all of it."""
    if kind == "voc":
        images, masks = (root / "VOCdevkit" / "VOC2012" / name for name in ("JPEGImages", "SegmentationClass"))
        listed = root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt"
        listed.parent.mkdir(parents=True)
        listed.write_text("".join(f"{image_id}\n" for image_id in IDS))
    else:
        images, masks = (root / "ADEChallengeData2016" / name / "validation" for name in ("images", "annotations"))
    for folder in (images, masks):
        folder.mkdir(parents=True)
    for image_id in IDS:
        (images / f"{image_id}.jpg").write_bytes(golden[f"jpg_{image_id}"].tobytes())
        mask = Image.fromarray(golden[f"{kind}_mask_{image_id}"])
        if kind == "voc":  # as distributed: an indexed PNG
            mask.putpalette([value for index in range(256) for value in (index, 255 - index, index // 2)])
        mask.save(masks / f"{image_id}.png")
    return root


@pytest.mark.parametrize(("kind", "image_id"), CASES)
def test_crops_equal_the_released_ones(golden_pictures, kind, image_id):
    picture = Image.open(io.BytesIO(golden_pictures[f"jpg_{image_id}"].tobytes())).convert("RGB")
    rule = ShortSideCrop({"voc": 473, "ade": 512}[kind])
    image, label = rule.image(picture), rule.labels(golden_pictures[f"{kind}_mask_{image_id}"])
    found = np.ascontiguousarray(image.transpose(2, 0, 1))
    assert (found[:, ::8, ::8] == golden_pictures[f"{kind}_image_{image_id}"]).all()
    assert hashlib.sha256(found.tobytes()).hexdigest() == str(golden_pictures[f"{kind}_image_sha256_{image_id}"])
    label = np.where(label == 255, 0, label) if kind == "voc" else label
    assert hashlib.sha256(np.ascontiguousarray(label).tobytes()).hexdigest() == str(
        golden_pictures[f"{kind}_label_sha256_{image_id}"]
    )


@pytest.mark.parametrize("kind", ["voc", "ade"])
def test_a_tree_as_distributed_gives_the_released_tensors(tmp_path, golden_pictures, kind):
    dataset_id, size, classes = {"voc": ("pascal_voc", 473, 21), "ade": ("ade20k", 512, 151)}[kind]
    root = write_tree(tmp_path, kind, golden_pictures)
    data = segbench.load_dataset(dataset_id, root)
    assert data.image_ids == IDS
    assert (data.num_classes, data.class_names[0]) == (classes, "background")
    for sample in data:
        assert sample.image.shape == (3, size, size)
        expected = torch.from_numpy(golden_pictures[f"{kind}_image_{sample.image_id}"]).float() / 255
        assert torch.equal(sample.image[:, ::8, ::8], expected)
        assert torch.equal(
            sample.label[::8, ::8],
            torch.from_numpy(golden_pictures[f"{kind}_label_{sample.image_id}"].astype(np.int64)),
        )
        assert not bool((sample.label == 255).any())  # void counts as background
    weights = data.class_weights()
    assert weights.shape == (classes,)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-4)


def test_the_root_may_be_a_folder_above_and_not_one_below(tmp_path, golden_pictures):
    root = write_tree(tmp_path, "voc", golden_pictures)
    prints = {
        segbench.load_dataset("pascal_voc", place).fingerprint()
        for place in (root, root / "VOCdevkit", root / "VOCdevkit" / "VOC2012")
    }
    assert len(prints) == 1
    with pytest.raises(DataError, match=r"lies too deep: give .*VOC2012\."):
        segbench.load_dataset("pascal_voc", root / "VOCdevkit" / "VOC2012" / "JPEGImages")
    with pytest.raises(DataError, match="no annotations"):
        segbench.load_dataset("ade20k", root)
    with pytest.raises(DataError, match="--data-root"):
        segbench.load_dataset("ade20k")
    with pytest.raises(DataError, match="'sbd' and 'train_aug', not 'test'"):
        segbench.load_dataset("pascal_voc", root, split="test")


def test_broken_trees_are_named(tmp_path, golden_pictures):
    base = write_tree(tmp_path, "voc", golden_pictures) / "VOCdevkit" / "VOC2012"
    (base / "SegmentationClass" / "0001.png").unlink()
    with pytest.raises(DataError, match=r"0001 of val.txt has no mask in .*SegmentationClass. Restore it"):
        segbench.load_dataset("pascal_voc", tmp_path)
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(base / "SegmentationClass" / "0001.png")
    with pytest.raises(DataError, match=r"the image is .* its mask 10x10 pixels: .*0001.jpg with .*0001.png"):
        list(segbench.load_dataset("pascal_voc", tmp_path))
    wrong = np.full(golden_pictures["voc_mask_0001"].shape, 200, np.uint8)
    Image.fromarray(wrong).save(base / "SegmentationClass" / "0001.png")
    with pytest.raises(DataError, match=r"0001.png: the mask has the label 200"):
        list(segbench.load_dataset("pascal_voc", tmp_path))
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        segbench.load_dataset("pascal_voc", tmp_path)
    (base / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(DataError, match=r"Cannot read the list .*val.txt"):
        segbench.load_dataset("pascal_voc", tmp_path)


@pytest.mark.slow
def test_a_partial_copy_makes_an_entry_unofficial(tmp_path, golden_pictures):
    root = write_tree(tmp_path / "data", "voc", golden_pictures)
    torch.manual_seed(0)
    result = segbench.evaluate(
        nn.Conv2d(3, 21, 1), "pascal_voc", data_root=root, limit=1, eps=[4, 8, 12], iterations=1,
        out=tmp_path / "run", progress=False,
    )  # fmt: skip
    entry = result.entry()
    assert entry["protocol"]["deviations"] == ["1 iterations instead of 300", "1 of 1449 images"]
    assert entry["dataset"]["class_weights_from"] == "published values"


def test_class_names_and_weights_are_the_published_ones():
    facts = json.loads((Path(segbench.data.__file__).parent / "files" / "published.json").read_text("utf-8"))
    assert facts["pascal_voc"]["class_names"][15] == "person"
    assert facts["ade20k"]["class_names"][1] == "wall"
    assert facts["pascal_voc"]["class_weights"][:5] == [0.0007, 0.0531, 0.1394, 0.05, 0.0814]
    counted = {name: len(each["class_weights"]) for name, each in facts.items() if "class_weights" in each}
    assert counted == {"pascal_voc": 21, "ade20k": 151}
    assert len(facts["cityscapes"]["palette"]) == len(facts["cityscapes"]["class_names"]) == 19
    assert facts["camvid"]["class_names"][10] == "bicyclist"
