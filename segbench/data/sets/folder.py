"""Any folder of images and masks, described by a file (`dataset.yaml`) or by a plain list of classes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from segbench import schemas
from segbench.data.folders import find_base, known_split, paired
from segbench.data.protocols import IGNORE_INDEX, Colour, DataProtocol, LabelMap, Window, voc_colours
from segbench.data.resizing import Resize, Resized, ShortSide, ShortSideCrop, Whole
from segbench.data.trees import Listing, Tree
from segbench.errors import ContentError, DataError, unknown_name
from segbench.schemas import strict_yaml

DESCRIPTIONS = ("dataset.yaml", "dataset.yml", "dataset.json")
CLASS_LIST = "classes.txt"
MAX_BYTES = 1_000_000
IGNORE = "ignore"
COMMENTS, SEPARATORS = ("#", "//", ";", "%"), (",", ";", "\t", "|")
NO_CLASS = re.compile(r"[\[<(_]*ignored?[\])>_]*|-1\b.*", re.IGNORECASE)
HEAD = re.compile(  # of a list: words for its columns, how many lines follow, a key of YAML
    r"((class|label|category|categories|id|index|name)(es|s)?(\s*\(\d+\))?[\s_,;:|]*)+|nc\s*:.*|names\s*:.*",
    re.IGNORECASE,
)
FROM_LIST = f"a {DESCRIPTIONS[0]} that takes the place of {CLASS_LIST} (docs/data.md)"
USUAL_FOLDERS = {
    "val": {"images": "images", "masks": "masks"},
    "train": {"images": "train/images", "masks": "train/masks"},
}
LAYOUT = """\
<data root>/
  dataset.yaml                    classes, and what else there is to say (docs/data.md); or instead of it
  classes.txt                     one class name a line; the line's number from 0 is the label
  images/  a.jpg  b.png ...       photographs
  masks/   a.png  b.png ...       one channel, 0..K-1, 255 = ignored
  train/images/  train/masks/     optional: the split on which class weights are counted"""
NESTED = """\
Name the folders of each split in dataset.yaml:
  val: {images: images/val, masks: masks/val}
  train: {images: images/train, masks: masks/train}"""
VARIANTS = ("", "<name>")


def find(root: Path | None, variant: str) -> Tree:
    """The tree at ``root``, a folder or its description; ``variant`` is the name in the description, or empty."""
    if root is not None and os.path.isfile(root) and root.suffix.lower() in (".yaml", ".yml", ".json"):
        base, file = root.parent, root
    else:
        base, file = _base(root)
    document = _read(file)
    name: str = document.get("name", "")
    if variant not in ("", name):
        raise DataError(f"{file} describes {'folder/' + name if name else 'folder'}, not folder/{variant}.")
    protocol = _protocol(document, file)
    folders = _folders(document, base, file, protocol.id)
    there = [split for split, paths in folders.items() if all(path.is_dir() for path in paths)]
    return Tree(protocol, base, tuple(there), partial(_listing, protocol.id, folders))


def _listing(dataset_id: str, folders: Mapping[str, tuple[Path, Path]], split: str) -> Listing:
    known_split(dataset_id, split, folders)
    images, masks = folders[split]
    return paired(images, masks, nested=NESTED)


def _folders(document: Mapping[str, Any], base: Path, file: Path, dataset_id: str) -> dict[str, tuple[Path, Path]]:
    """Images and masks of each split; those of val and those that the description names are there."""
    found: dict[str, tuple[Path, Path]] = {}
    for split, usual in USUAL_FOLDERS.items():
        named = document.get(split, usual)
        images, masks = found[split] = base / named["images"], base / named["masks"]
        missing = [str(path) for path in (images, masks) if not path.is_dir()]
        if missing and (split == "val" or split in document):
            source = f", which {file.name} names as {split}" if split in document else ""
            raise DataError(
                f"The data root {base} of {dataset_id!r} has no {', no '.join(missing)}{source}.\n"
                f"Expected layout:\n{LAYOUT}"
            )
    (val, _), (train, _) = found["val"], found["train"]
    if train.is_dir() and train.resolve() == val.resolve():
        raise DataError(
            f"{file}: val and train are the same folder {val}. Give training pictures a folder of their own, or leave "
            "train out."
        )
    return found


def _base(root: Path | None) -> tuple[Path, Path]:
    """The folder, and the file in it that describes it."""
    if root is not None and os.path.isdir(root):
        given = [root / name for name in DESCRIPTIONS if (root / name).is_file()]
        if len(given) > 1:
            raise DataError(f"{root} has {' and '.join(path.name for path in given)}. Remove all but one.")
        if given:
            return root, given[0]
    base = find_base("folder", root, (CLASS_LIST, "images", "masks"), LAYOUT)
    return base, base / CLASS_LIST


def _class_names(path: Path) -> tuple[str, ...]:
    """One name a line; blank lines only at the end, because the line's number is the label."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the class list {path}: {error}. It must be a text file in UTF-8.") from error
    names = tuple(line.strip() for line in text.rstrip().splitlines())
    if not all(names):
        raise DataError(
            f"{path}: line {names.index('') + 1} is blank, but the line's number is the label. Name the class or "
            "remove the line."
        )
    if fault := _fault(names):
        raise DataError(
            f"{path}: {fault}, but the line's number from 0 is the label. Remove or correct it, or list the classes in "
            f"{DESCRIPTIONS[0]}."
        )
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise DataError(f"{path} lists {len(names)} classes; 2 to {IGNORE_INDEX} are possible, one name a line.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path} lists the class {twice[0]!r} twice. Rename or remove one.")
    return names


def _fault(lines: Sequence[str]) -> str:
    """The first line of a list that names no class, in words: it would shift the labels of those below."""
    for number, line in enumerate(lines, 1):
        if line.startswith(COMMENTS):
            return f"line {number} is a comment ({line!r})"
        if NO_CLASS.fullmatch(line):
            return f"line {number} is no class ({line!r}): ignored pixels are {IGNORE_INDEX} in masks"
    if not lines:
        return ""
    if HEAD.fullmatch(lines[0]) or (lines[0].endswith(":") and not lines[-1].endswith(":")):
        return f"line 1 looks like a head line ({lines[0]!r})"
    if lines[0] == str(len(lines) - 1):
        return f"line 1 looks like the number of classes ({lines[0]!r})"
    for mark, kind in (("- ", "a list of YAML"), ('"', "quoted"), ("'", "quoted")):
        if all(line.startswith(mark) for line in lines):
            return f"its lines are {kind} ({lines[0]!r})"
    for separator in SEPARATORS:
        rows = [line.split(separator) for line in lines]
        is_table = len({len(row) for row in rows}) == 1 != len(rows[0])
        numbers = (
            is_table
            and len(rows) > 1
            and any(all(cell.strip().isdecimal() for cell in column[1:]) for column in zip(*rows, strict=True))
        )
        if is_table and (numbers or separator != ","):
            return f"its lines are rows of a table ({lines[0]!r})"
    numbered = [re.match(r"(\d+)[\s:=.)]", line) for line in lines]
    wrong = (place for place, found in enumerate(numbered) if found and int(found[1]) != place)
    if all(numbered) and (place := next(wrong, None)) is not None:
        return f"line {place + 1} is numbered otherwise ({lines[place]!r})"
    return ""


def _read(path: Path) -> Mapping[str, Any]:
    """The description, checked against ``schemas/dataset.schema.json``."""
    if path.name == CLASS_LIST:
        return {"classes": list(_class_names(path))}
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} has more than {MAX_BYTES} bytes. Is it the description of a data set?")
        text = path.read_text("utf-8-sig")
        is_json = path.suffix.lower() == ".json"
        document = schemas.parse(text, source="it") if is_json else strict_yaml.parse(text)
    except (OSError, ValueError, ContentError) as error:
        raise DataError(f"Cannot read the description {path}: {error}") from error
    document = _with_text_keys(document)
    if not isinstance(document, dict):
        raise DataError(f"The description {path} has no fields. It must at least say: classes: [sky, road, ...]")
    fields = schemas.validator("dataset").schema["properties"]  # type: ignore[index]
    if unknown := [key for key in document if key not in fields]:
        raise DataError(f"The description {path} is not valid:\n  {unknown_name('field', unknown[0], fields)}")
    if wrong := schemas.problems("dataset", document):
        raise DataError(f"The description {path} is not valid:\n  " + "\n  ".join(wrong[:10]))
    return document


def _with_text_keys(value: Any) -> Any:
    """YAML has numbers as keys, JSON has not."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(entry) for key, entry in value.items()}
    return [_with_text_keys(entry) for entry in value] if isinstance(value, list) else value


def _protocol(document: Mapping[str, Any], path: Path) -> DataProtocol:
    names = tuple(document["classes"])
    palette = tuple(_colour(text) for text in document.get("palette", ())) or voc_colours(len(names))
    if len(palette) != len(names):
        raise DataError(f"{path}: palette has {len(palette)} colours for {len(names)} classes. Give one for each.")
    return DataProtocol(
        id=f"folder/{document['name']}" if "name" in document else "folder",
        class_names=names,
        labels=_labels(document, names, path),
        about_labels="labels are mapped" if {"label_map", "colours"} & set(document) else "",
        resize=_resize(document.get("resize")),
        window=_window(document.get("window"), path),
        palette=palette,
        turned=document.get("turned", True),
        bits=document.get("bits"),
    )


def _labels(document: Mapping[str, Any], names: tuple[str, ...], path: Path) -> LabelMap:
    if "colours" in document and "label_map" in document:
        raise DataError(f"{path} has both label_map and colours: masks hold numbers or colours. Remove one of them.")
    if "colours" in document and "ignore" in document:
        raise DataError(f"{path} has both ignore and colours: give the colours the value {IGNORE} instead.")
    ignored = dict.fromkeys(document.get("ignore", (IGNORE_INDEX,)), IGNORE_INDEX)
    if "colours" in document:
        colours = {_colour(key): _target(value, names, path) for key, value in document["colours"].items()}
        if len(colours) < len(document["colours"]):
            raise DataError(f"{path}: colours has a colour twice, in upper and in lower case. Remove one.")
        return LabelMap(colours=colours, description=path.name)
    if "label_map" in document:
        mapped = {int(key): _target(value, names, path) for key, value in document["label_map"].items()}
        if too_large := [value for value in mapped if value > 65535]:
            raise DataError(f"{path}: label_map has the number {too_large[0]}; masks hold 0 to 65535.")
    else:
        mapped = {label: label for label in range(len(names))}
    if clash := [value for value in document.get("ignore", ()) if mapped.get(value, IGNORE_INDEX) != IGNORE_INDEX]:
        raise DataError(
            f"{path}: ignore has the number {clash[0]}, which is the class {names[mapped[clash[0]]]!r}. "
            f"Remove it from ignore, or write a label_map with {clash[0]}: {IGNORE}."
        )
    if "label_map" in document:
        mend = f"Correct the mask or label_map in {path.name}."
        return LabelMap({**ignored, **mapped}, mend=mend, description=path.name)
    listed = path.name == CLASS_LIST
    return LabelMap({**ignored, **mapped}, description=FROM_LIST if listed else path.name)


def _target(value: int | str, names: tuple[str, ...], path: Path) -> int:
    """A class by label or name, or ``ignore``."""
    if value == IGNORE and IGNORE not in names:
        return IGNORE_INDEX
    if isinstance(value, str):
        if value not in names:
            raise DataError(f"{path}: {value!r} is no class of the list, nor the word {IGNORE!r}. Correct it.")
        return names.index(value)
    if value >= len(names):
        raise DataError(f"{path}: the label {value} is none of the {len(names)} classes, 0..{len(names) - 1}.")
    return value


def _colour(text: str) -> Colour:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def _window(document: Mapping[str, Any] | None, path: Path) -> Window | None:
    if not document:
        return None
    (height, width), (down, across) = document["size"], document["stride"]
    if down > height or across > width:
        raise DataError(
            f"{path}: the window's stride {[down, across]} is larger than its size {[height, width]}: "
            "the pixels between windows would be left out. Make the stride smaller."
        )
    return Window((height, width), (down, across))


def _resize(document: Mapping[str, Any] | None) -> Resize:
    if not document:
        return Whole()
    if "short_side" in document:
        side = document["short_side"]
        return ShortSideCrop(side) if document.get("crop") else ShortSide(side)
    return Resized(document["height"], document["width"])
