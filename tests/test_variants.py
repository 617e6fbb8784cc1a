"""A variant of a data set through the house: folders, validation, tables, `show` and `publish` keep it apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

import segbench
from segbench import content, entries
from segbench.data import checking
from segbench.data.catalogue import open_tree
from segbench.entries import placement
from segbench.files import sha256_file
from tests import samples

MODEL, VARIANT = "robust_convnext_mini_shapes", "shapes/edges-ignored"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A checkout with an entry of a model on its data set, and one of the same model on a variant."""
    root = samples.checkout(tmp_path / "checkout")
    samples.publish(root, MODEL, quality=0.9)
    entry, data = samples.build(MODEL, quality=0.3, dataset=VARIANT)
    folder = root / "entries" / "sea-v1" / "shapes-edges-ignored"
    folder.mkdir(parents=True)
    samples.write_json(folder / f"{MODEL}.json", entry)
    (folder / f"{MODEL}.parquet").write_bytes(data)
    monkeypatch.setattr(content, "folder", lambda name: root / name)
    monkeypatch.setattr(content, "checkout", lambda: root)
    monkeypatch.setitem(entries.FINGERPRINTS, VARIANT, "f" * 64)
    monkeypatch.setattr(placement, "split_id", lambda _: None)  # a variant that only this test knows
    return root


def test_its_entry_is_valid_with_the_card_of_the_data_set(root, cli):
    code, _, err = cli("validate", str(root / "entries"), str(root / "model_zoo"))
    assert (code, "3 files are valid." in err) == (0, True), err
    card = root / "model_zoo" / "shapes" / f"{MODEL}.json"
    path = root / "entries" / "sea-v1" / "shapes-edges-ignored" / f"{MODEL}.json"
    moved = path.parent.parent / "shapes" / "other.json"
    moved.write_bytes(path.read_bytes())
    (problem,) = [text for text in entries.validate_entry(moved, published=True) if "belongs at" in text]
    assert f"belongs at entries/sea-v1/shapes-edges-ignored/{MODEL}.json" in problem
    card.unlink()
    assert any("Add the card" in text for text in entries.validate_entry(path, published=True))


def test_a_card_of_a_variant_has_a_folder_of_its_own(root, cli):
    folder = root / "model_zoo" / "shapes-edges-ignored"
    folder.mkdir()
    samples.write_json(folder / "own.json", samples.card("own", VARIANT, sources=[]))
    assert cli("validate", str(folder))[0] == 0
    (folder / "own.json").rename(root / "model_zoo" / "shapes" / "own.json")
    code, out, err = cli("validate", str(root / "model_zoo" / "shapes" / "own.json"))
    assert (code, "belongs at model_zoo/shapes-edges-ignored/own.json" in out + err) == (1, True)


def test_it_has_a_table_of_its_own(root, cli):
    code, out, _ = cli("leaderboard", "--root", str(root))
    assert code == 0
    sections = out.split("## ")[1:]
    assert [section.split(" ")[0] for section in sections] == ["shapes", "shapes/edges-ignored"]
    assert [section.count(f"`{MODEL}`") for section in sections] == [1, 1]


def test_show_tells_both_and_publish_only_its_own_data_set(root, cli, tmp_path):
    code, out, _ = cli("show", MODEL)
    assert code == 0
    assert "sea-v1 on shapes, checked" in out
    assert "sea-v1 on shapes/edges-ignored, checked" in out
    real = Path(samples.__file__).parents[1] / "model_zoo" / "shapes" / "at_convnext_mini_shapes"
    card_path = root / "model_zoo" / "shapes" / f"{MODEL}.json"
    document = json.loads(real.with_suffix(".json").read_text()) | {"id": MODEL}
    document["sources"] = [{"type": "package", "file": f"{MODEL}.safetensors"}]
    samples.write_json(card_path, document)
    card_path.with_suffix(".safetensors").write_bytes(real.with_suffix(".safetensors").read_bytes())
    assert sha256_file(card_path.with_suffix(".safetensors")) == document["sha256"]
    code, _, err = cli("publish", MODEL, "--repo", "somebody/mini", "--dry-run", "--offline")
    assert code == 0, err
    page = (tmp_path / "publish" / MODEL / "README.md").read_text()
    clean = json.loads((root / "entries" / "sea-v1" / "shapes" / f"{MODEL}.json").read_text())["clean"]
    assert f"| clean | {100 * clean['aacc']:.1f} | {100 * clean['miou']:.1f} |" in page
    assert page.count("worst case under sea-v1, ε = 4/255") == 1


def test_described_folders_are_no_variants_of_each_other():
    assert content.family("folder/a") != content.family("folder/b") != content.family("folder")
    assert content.family("ade20k/150") == content.family("ade20k/original") == "ade20k"


def test_an_entry_at_another_depth_is_told_where_it_belongs(root, cli):
    """The id of a variant suggests a folder in a folder."""
    right = root / "entries" / "sea-v1" / "shapes-edges-ignored"
    wrong = root / "entries" / "sea-v1" / "shapes" / "edges-ignored"
    right.rename(wrong)
    for place in ((), (str(root / "entries"),)):
        code, out, err = cli("validate", *place)
        assert (code, f"belongs at entries/sea-v1/shapes-edges-ignored/{MODEL}.json" in out + err) == (1, True)


def test_a_reduced_copy_is_said_and_unofficial(tmp_path, caplog):
    """Cityscapes at half its size has all its images, but gives other numbers."""
    for folder, name in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        path = tmp_path / "data" / folder / "val" / "ulm"
        path.mkdir(parents=True)
        for number in range(2):
            mode = "RGB" if folder == "leftImg8bit" else "L"
            Image.new(mode, (32, 16), 7 if mode == "L" else (1, 2, 3)).save(path / f"ulm_{number}_0_{name}.png")
    data = segbench.load_dataset("cityscapes", tmp_path / "data")
    assert "pictures of 32x16 instead of 2048x1024 pixels. An entry measured on them is unofficial" in caplog.text
    notes = [note.text for note in checking.check(open_tree("cityscapes", tmp_path / "data")).notes]
    assert any("pictures of 32x16 instead of 2048x1024 pixels: a reduced copy" in note for note in notes)
    entry = segbench.evaluate(
        nn.Conv2d(3, 19, 1), data, eps=[4, 8, 12], iterations=1, out=tmp_path / "run", progress=False
    ).entry()
    assert "pictures of 32x16 instead of 2048x1024 pixels" in entry["protocol"]["deviations"]
    assert "2 of 500 images" in entry["protocol"]["deviations"]
