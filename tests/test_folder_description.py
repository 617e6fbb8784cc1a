"""Data sets of one's own: what a description can say, and each mistake in it with its mend."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import segbench
from segbench.data.catalogue import FAMILIES, open_tree
from segbench.errors import DataError
from tests.pictures import tiff

CLASSES = ["sky", "road", "car"]
RNG = np.random.default_rng(0)
PHOTOGRAPH = RNG.integers(0, 256, (24, 32, 3), np.uint8)


@pytest.fixture
def root(tmp_path):
    """A folder with one pair, whose mask holds 0, 1, 2 and 255, and no description."""
    place = tmp_path / "data"
    labels = np.zeros((24, 32), np.uint8)
    labels[:6], labels[6:12], labels[12:15] = 1, 2, 255
    pair(place, labels)
    return place


def pair(place: Path, labels: np.ndarray, images="images", masks="masks", name="a"):
    for folder, pixels in ((images, PHOTOGRAPH), (masks, labels)):
        (place / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / folder / f"{name}.png")


def describe(root: Path, document, name="dataset.yaml") -> Path:
    text = document if isinstance(document, str) else json.dumps(document)
    if isinstance(document, dict) and name.endswith("yaml"):
        text = yaml.safe_dump(document, allow_unicode=True)
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def load(root, document=None, dataset_id="folder", **options):
    if document is not None:
        describe(root, document)
    return segbench.load_dataset(dataset_id, root, **options)


def test_a_list_of_classes_and_a_description_say_the_same(root):
    """As YAML and as JSON; the fingerprint knows nothing of the way."""
    prints = set()
    for name, text in {
        "classes.txt": "sky\nroad\ncar\n",
        "dataset.yaml": "classes:\n- sky\n- road\n- car\n",
        "dataset.yml": "classes: [sky, road, car]",
        "dataset.json": json.dumps({"classes": CLASSES}),
    }.items():
        path = describe(root, text, name)
        prints.add(segbench.load_dataset("folder", root).fingerprint())
        path.unlink()
    assert len(prints) == 1


FULL = {
    "name": "my_town",
    "classes": CLASSES,
    "label_map": {7: "sky", 300: "car", 11: 1, 0: "ignore"},
    "ignore": [255, 65535],
    "palette": ["#000000", "#ff8000", "#0000ff"],
    "resize": {"short_side": 16, "crop": True},
    "window": {"size": [32, 16], "stride": [24, 16]},
    "val": {"images": "v/photographs", "masks": "v/labels"},
    "train": {"images": "t/photographs", "masks": "t/labels"},
}


@pytest.mark.parametrize("name", ["dataset.yaml", "dataset.json"])
def test_every_field(root, name):
    labels = RNG.choice(np.array([7, 300, 11, 0, 255, 65535], np.uint16), (24, 32))
    for split in "vt":
        pair(root, labels, f"{split}/photographs", f"{split}/labels", split)
    path = describe(root, FULL, name)
    for place, dataset_id in ((root, "folder"), (path, "folder"), (root, "folder/my_town"), (path, "folder/my_town")):
        data = segbench.load_dataset(dataset_id, place)
        assert (data.id, data.class_names, data.image_ids) == ("folder/my_town", tuple(CLASSES), ("v",))
    assert data.palette == ((0, 0, 0), (255, 128, 0), (0, 0, 255))
    assert (data.window.size, data.window.stride) == ((32, 16), (24, 16))
    assert data.preprocessing == ("short side 16, centre crop 16x16; labels are mapped; windows 32x16, stride 24x16")
    small = np.asarray(Image.fromarray(labels.astype(np.int32)).resize((21, 16), Image.Resampling.NEAREST))[:, 2:18]
    meaning = {7: 0, 300: 2, 11: 1, 0: 255, 255: 255, 65535: 255}
    assert data[0].label.tolist() == [[meaning[value] for value in row] for row in small.tolist()]
    assert data[0].image.shape == (3, 16, 16)
    train = segbench.load_dataset("folder", root, split="train")
    assert train.image_ids == ("t",)
    assert data.count_weights()[1] == "training split"


@pytest.mark.parametrize(
    ("rule", "sides", "said"),
    [
        (None, (24, 32), "as stored"),
        ({"short_side": 48}, (48, 64), "short side 48"),
        ({"short_side": 16, "crop": False}, (16, 21), "short side 16"),
        ({"height": 40, "width": 30}, (40, 30), "resized to 40x30"),
    ],
)
def test_resize_rules(root, rule, sides, said):
    data = load(root, {"classes": CLASSES, "resize": rule, "window": None})
    assert (tuple(data[0].image.shape[1:]), tuple(data[0].label.shape)) == (sides, sides)
    assert (data.preprocessing, data.window) == (said, None)


def test_colours(root):
    colours = {"#804080": "road", "#0000ff": 2, "#000000": "ignore", "#ffffff": "sky"}
    meaning = {(128, 64, 128): 1, (0, 0, 255): 2, (0, 0, 0): 255, (255, 255, 255): 0}
    keys = np.array(list(meaning), np.uint8)
    chosen = RNG.integers(0, 4, (24, 32))
    pair(root, keys[chosen])
    expected = np.array(list(meaning.values()))[chosen]
    assert (load(root, {"classes": CLASSES, "colours": colours})[0].label.numpy() == expected).all()
    image = Image.fromarray(chosen.astype(np.uint8))
    image.putpalette(keys.tobytes())
    image.save(root / "masks" / "a.png")
    assert (load(root)[0].label.numpy() == expected).all()
    described = {"classes": CLASSES, "colours": {key.upper(): value for key, value in colours.items()}}
    assert (load(root, described)[0].label.numpy() == expected).all()
    del colours["#804080"]
    with pytest.raises(DataError, match=r"masks/a\.png: the mask has the colour #804080, which belongs to no class"):
        load(root, {"classes": CLASSES, "colours": colours})[0]


def test_labels_not_named_are_refused_and_ignore_may_be_emptied(root):
    with pytest.raises(DataError, match=r"folder: .*masks/a\.png: the mask has the label 255; allowed are 0\.\.2\. "):
        load(root, {"classes": CLASSES, "ignore": []})[0]
    with pytest.raises(
        DataError, match=r"the mask has the labels 2, 255; allowed are 0\.\.1 and 3 \(ignored\)\. .*label_map in "
    ):
        load(root, {"classes": CLASSES, "label_map": {0: 0, 1: 1, 3: "ignore"}, "ignore": []})[0]


def test_the_edit_that_a_label_or_a_colour_without_meaning_needs(root):
    with pytest.raises(DataError, match=r"label 2; .*ignore them in dataset\.yaml: ignore: \[2, 255\]$"):
        load(root, {"classes": CLASSES[:2]})[0]
    assert set(load(root, {"classes": CLASSES[:2], "ignore": [2, 255]})[0].label.unique().tolist()) == {0, 1, 255}
    (root / "dataset.yaml").unlink()
    (root / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(
        DataError, match=r"in a dataset\.yaml that takes the place of classes\.txt .*: ignore: \[2, 255\]$"
    ):
        load(root)[0]
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[0, 0] = 1, 2, 3
    pair(root, pixels)
    with pytest.raises(DataError, match=r'holds colours\)\. Convert .*, as colours: \{"#804080": sky\}\.$'):
        load(root, {"classes": CLASSES})[0]
    colours = {"#000000": "sky"}
    with pytest.raises(DataError, match=r'colour #010203, .*colours in dataset\.yaml: "#010203": ignore$'):
        load(root, {"classes": CLASSES, "colours": colours})[0]
    ignored = load(root, {"classes": CLASSES, "colours": {**colours, "#010203": "ignore"}})
    assert ignored[0].label.unique().tolist() == [0, 255]


def test_a_number_below_0_in_a_mask_says_what_to_write(root):
    (root / "masks" / "a.png").unlink()
    (root / "masks" / "a.tif").write_bytes(tiff(np.full((24, 32), -1, np.int16)))
    with pytest.raises(DataError, match=r"the label -1; .* write 255 for pixels that do not count\.$"):
        load(root, {"classes": CLASSES})[0]


def test_pictures_may_be_used_as_stored(root):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(PHOTOGRAPH).save(root / "images" / "a.png", exif=exif)
    for turned, expected in {True: PHOTOGRAPH[::-1, ::-1], False: PHOTOGRAPH}.items():
        found = load(root, {"classes": CLASSES, "turned": turned})[0].image.numpy() * 255
        assert (found.round().transpose(1, 2, 0) == expected).all()


def test_a_class_may_be_called_ignore(root):
    data = load(root, {"classes": ["sky", "ignore"], "label_map": {0: "sky", 1: "ignore", 2: 0}})
    assert set(data[0].label.flatten().tolist()) == {0, 1, 255}


def test_pictures_may_lie_elsewhere(root, tmp_path):
    pair(tmp_path / "elsewhere", np.ones((24, 32), np.uint8), name="z")
    for where in ("../elsewhere", str(tmp_path / "elsewhere")):
        folders = {"images": f"{where}/images", "masks": f"{where}/masks"}
        assert load(root, {"classes": CLASSES, "val": folders}).image_ids == ("z",)


def test_the_description_may_lie_anywhere_under_any_name(root, tmp_path):
    folders = {"images": str(root / "images"), "masks": str(root / "masks")}
    path = describe(tmp_path, {"classes": CLASSES, "val": folders}, "town.yaml")
    assert segbench.load_dataset("folder", path).image_ids == ("a",)
    with pytest.raises(DataError, match=r"no classes\.txt, no images"):
        segbench.load_dataset("folder", tmp_path)


def test_a_name_never_makes_a_published_data_set(root):
    for name in FAMILIES:
        assert load(root, {"classes": CLASSES, "name": name}).id == f"folder/{name}"


@pytest.mark.parametrize(
    ("name", "wanted", "said"),
    [
        ("my_town", "folder/your_town", r"dataset\.yaml describes folder/my_town, not folder/your_town"),
        (None, "folder/my_town", r"dataset\.yaml describes folder, not folder/my_town"),
    ],
)
def test_another_data_set_than_asked_for_is_refused(root, name, wanted, said):
    with pytest.raises(DataError, match=said):
        load(root, {"classes": CLASSES} | ({"name": name} if name else {}), wanted)


WINDOW = {"size": [16, 16], "stride": [16, 16]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": ["sky"]}, "classes: .* is not a list of 2 to 255 different class names"),
        ({"classes": ["sky", "sky"]}, "classes: .* different class names"),
        ({"classes": [str(index) for index in range(256)]}, "classes: .* is not a list of 2 to 255"),
        ({"classes": [False, "sky"]}, "classes.0: 'False' is not a class name .*in quotes, if YAML"),
        ({"classes": ["sky", 3]}, "classes.1: '3' is not a class name"),
        ({"classes": ["sky", ""]}, "classes.1: '' is not a class name"),
        ({"classes": ["sky", "x" * 101]}, "classes.1: .* is not a class name"),
        ({"nmae": "x"}, "Unknown field 'nmae'. Did you mean 'name'"),
        ({"labelmap": {0: "sky"}}, "Unknown field 'labelmap'. Did you mean 'label_map'"),
        ({"turned": "no"}, "turned: 'no' is not true or false"),
        ({"name": "My Town"}, "name: 'My Town' is not a name: 1 to 40"),
        ({"name": "a/b"}, "name: 'a/b' is not a name"),
        ({"name": "x" * 41}, "is not a name"),
        ({"label_map": {}}, "label_map: "),
        ({"label_map": {-1: "sky"}}, "label_map: '-1' is not a number of 0 to 65535"),
        ({"label_map": {"07": "sky", "7": "road"}}, "label_map: '07' is not a number"),
        ({"label_map": {65536: "sky"}}, "label_map has the number 65536; masks hold 0 to 65535"),
        ({"label_map": {1: "skie"}}, "'skie' is no class of the list, nor the word 'ignore'"),
        ({"label_map": {1: 3}}, r"the label 3 is none of the 3 classes, 0\.\.2"),
        ({"label_map": {1: 255}}, "label_map.1: '255' is not a class, by label or name"),
        ({"label_map": {1: 1.0}}, "label_map.1: '1.0' is not a class"),
        ({"label_map": {1: True}}, "label_map.1: 'True' is not a class"),
        ({"label_map": {7: "sky"}, "ignore": [7]}, "ignore has the number 7, which is the class 'sky'"),
        ({"ignore": [1]}, "ignore has the number 1, which is the class 'road'. .*label_map with 1: ignore"),
        ({"ignore": [-1]}, "ignore.0: '-1' is not a number of 0 to 65535.*-1 is 255 in a mask of 8 bits.*write that"),
        ({"ignore": 255}, "ignore: '255' is not a list .*such as .255."),
        ({"colours": {"#FF0000": "sky", "#ff0000": "road"}}, "colours has a colour twice, in upper and in lower case"),
        ({"colours": {"red": "sky"}}, "'red' is not a colour"),
        ({"colours": {"#ff0000": "sky"}, "label_map": {1: "sky"}}, "both label_map and colours.*Remove one"),
        (
            {"colours": {"#ff0000": "sky"}, "ignore": [255]},
            "both ignore and colours: give the colours the value ignore",
        ),
        ({"palette": ["#ff0000"]}, "palette has 1 colours for 3 classes. Give one for each"),
        ({"palette": ["#ff000"] * 3}, "palette.0: '#ff000' is not a colour"),
        ({"resize": {"short_side": 15}}, "resize: .* is not a resize rule"),
        ({"resize": {"short_side": 512.5}}, "resize: .* is not a resize rule"),
        ({"resize": {"height": 512}}, "resize: .* is not a resize rule"),
        ({"resize": {"short_side": 512, "height": 512, "width": 512}}, "resize: .* is not a resize rule"),
        ({"window": {"size": [512, 512]}}, "window: 'stride' is a required property"),
        ({"window": WINDOW | {"size": [512]}}, "window.size: .* is not two whole numbers of 16 to 8192"),
        ({"window": WINDOW | {"stride": [17, 16]}}, r"stride \[17, 16\] is larger than its size .* left out"),
        ({"window": WINDOW | {"stride": [16, 17]}}, r"stride \[16, 17\] is larger than its size .* left out"),
        ({"val": {"images": "images"}}, "val: 'masks' is a required property"),
        ({"val": {"images": "", "masks": "m"}}, "val.images: "),
        ({"val": {"images": "nowhere", "masks": "masks"}}, "of 'folder' has no .*nowhere"),
        ({"val": {"images": "a\0b", "masks": "masks"}}, "of 'folder' has no "),
        (
            {"train": {"images": "tarin", "masks": "masks"}},
            r"of 'folder' has no .*tarin, which dataset\.\w+ names as train",
        ),
        (
            {"train": {"images": "masks/../images", "masks": "masks"}},
            "val and train are the same folder .* leave train out",
        ),
        ({"test": {}}, "Unknown field 'test'"),
    ],
)
@pytest.mark.parametrize("name", ["dataset.yaml", "dataset.json"])
def test_mistakes_name_the_file_and_the_field(root, changes, said, name):
    path = describe(root, {"classes": CLASSES} | changes, name)
    with pytest.raises(DataError, match=f"(?s){said}") as caught:
        segbench.load_dataset("folder", root)
    assert str(path if "of 'folder'" not in said else root) in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no fields. It must at least say: classes"),
        ("- sky\n- road\n", "has no fields"),
        ("sky", "has no fields"),
        ("{}", "document: 'classes' is a required property"),
        ("classes: [sky, road", "Cannot read the description"),
        ("\tclasses: [sky, road]", "'\\\\t' that cannot start any token"),
        ("classes: &c [sky, road]\npalette: *c", r"aliases \(\*name\) are not allowed"),
        ("classes: [sky, road]\nclasses: [sky, car]", "the key 'classes' occurs twice"),
        ("classes: [sky, road]\nlabel_map: {1: sky, '1': road}", "the key '1' occurs twice"),
        ("classes: [sky, road]\nlabel_map: {010: sky}", "010 has a leading zero.* Write 10, or quote it"),
        ("classes: [sky, road]\nignore: [00]", "00 has a leading zero.* Write 0, or quote it"),
        ("classes: [sky, road]\nignore: [.nan]", "ignore.0: 'nan' is not a number of 0 to 65535"),
        ("classes: [sky, road]\nignore: [.inf]", "ignore.0: 'inf' is not a number of 0 to 65535"),
        ("classes: [sky, road]\ncolours: {#ff0000: sky}", "Cannot read the description"),
        ("classes: [sky, road]\nname: !!python/name:os.system x", "could not determine a constructor"),
        ("classes: [sky, road]\nname: 2024-01-01", "name: '2024-01-01' is not a name"),
        ("classes: [sky, road]\n? [a]\n: 1", "unhashable key"),
        ("classes: [sky, road]\n---\nclasses: [sky, car]", "single document"),
        ("[" * 9000, "Cannot read the description"),
        ("classes: !!map [a, b]", "what is tagged as a mapping is none"),
        ("classes: !!set [a]", "what is tagged as a mapping is none"),
        ("classes: !!timestamp abc", "a tag .* does not fit its value"),
        ("classes: !!bool abc", "a tag .* does not fit its value"),
        ('classes: !!int ""', "a tag .* does not fit its value"),
    ],
)
def test_yaml_of_strangers(root, text, said):
    path = describe(root, text)
    with pytest.raises(DataError, match=said) as caught:
        segbench.load_dataset("folder", root)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"classes": ["sky", "road"], "classes": ["sky", "car"]}',
            "it is not valid JSON: the key 'classes' occurs twice",
        ),
        ('{"classes": ["sky", "road"], "ignore": [NaN]}', "NaN is not a number of JSON"),
        ('{"classes": ["sky", ', "it is not valid JSON"),
        ('["sky", "road"]', "has no fields"),
    ],
)
def test_json_of_strangers(root, text, said):
    path = describe(root, text, "dataset.json")
    with pytest.raises(DataError, match=said) as caught:
        segbench.load_dataset("folder", root)
    assert str(caught.value).count(str(path)) == 1


@pytest.mark.parametrize("name", ["dataset.yaml", "dataset.json"])
def test_files_that_are_no_description(root, name):
    (root / name).write_bytes(b"classes: [a, b]" + b" " * 2_000_000)
    with pytest.raises(DataError, match=f"{name} has more than 1000000 bytes. Is it the description"):
        segbench.load_dataset("folder", root)
    (root / name).write_bytes("classes: [Straße, b]".encode("latin-1"))
    with pytest.raises(DataError, match=f"Cannot read the description .*{name}: .*utf-8"):
        segbench.load_dataset("folder", root)


def test_two_descriptions_are_refused(root):
    for name in ("dataset.yaml", "dataset.json"):
        describe(root, {"classes": CLASSES}, name)
    with pytest.raises(DataError, match=r"has dataset\.yaml and dataset\.json\. Remove all but one"):
        segbench.load_dataset("folder", root)


def test_a_class_listed_twice_is_refused(root):
    (root / "classes.txt").write_text("sky\nroad\nsky\n")
    with pytest.raises(DataError, match=r"classes\.txt lists the class 'sky' twice. Rename or remove one"):
        segbench.load_dataset("folder", root)


def test_splits_of_a_folder(root):
    tree = open_tree("folder", describe(root, {"classes": CLASSES}))
    assert tree.splits == ("val",)
    with pytest.raises(DataError, match=r"Cannot read the folder .*train/images"):
        segbench.load_dataset("folder", root, split="train")
    with pytest.raises(DataError, match="'folder' has the splits 'val' and 'train', not 'test'"):
        segbench.load_dataset("folder", root, split="test")
