"""Looking into folders: where a data set lies, which files are pairs, and everything that is wrong with them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from segbench.data import reading
from segbench.data.trees import Listing, Pair
from segbench.errors import DataError

DEEP = 3  # levels above and below a wrong root that are searched for the right one
MOST_FOLDERS = 200  # that are searched on a level
FEW = 3  # names that a message gives; there may be thousands
LEFT_BY_SYSTEMS = ("thumbs.db", "desktop.ini")


def find_base(
    dataset_id: str, root: Path | None, needed: Sequence[str], layout: str, inside: Sequence[str] = (),
    others: Mapping[str, str] = {}, accept: Callable[[Path], bool] = lambda folder: True,
) -> Path:  # fmt: skip
    """The folder that holds all of ``needed``.

    Args:
        dataset_id: for messages.
        root: where the user says it is.
        needed: names of files or folders.
        layout: a drawing of what is expected.
        inside: folders below the root where people usually have it, e.g. ``VOCdevkit/VOC2012``.
        others: names by which other distributions are known, and what these are and what to use instead.
        accept: refuses folders that have what is needed and are another data set.

    Raises:
        DataError: it is not there; says whether the root lies too high or too deep, and where it is.
    """
    expected = f"Expected layout:\n{layout}"
    if root is None:
        raise DataError(f"The data set {dataset_id!r} needs a data root: --data-root FOLDER.\n{expected}")
    if not os.path.isdir(root):  # unlike Path.is_dir it never raises, whatever the name
        raise DataError(f"The data root {root} of {dataset_id!r} is not a folder.\n{expected}")

    def base(folder: Path) -> Path | None:
        places = (folder / place for place in ("", *inside))
        return next((at for at in places if all(os.path.exists(at / name) for name in needed) and accept(at)), None)

    if found := base(root):
        return found
    for above in list(root.resolve().parents)[:DEEP]:
        if found := base(above):
            raise DataError(f"The data root {root} of {dataset_id!r} lies too deep: give {found}.")
    for below in _folders_below(root, DEEP):
        if found := base(below):
            raise DataError(f"The data root {root} of {dataset_id!r} lies too high: give {found}.")
    missing = [name for name in needed if not os.path.exists(root / name)]
    known = next((text for name, text in others.items() if os.path.exists(root / name)), "")
    hint = f"\nThis looks like {known}, or describe it as a folder (docs/data.md)." if known else ""
    raise DataError(f"The data root {root} of {dataset_id!r} has no {', no '.join(missing)}.{hint}\n{expected}")


def _folders_below(root: Path, levels: int) -> list[Path]:
    """Folders below ``root``, the nearest first; not more than a look is worth."""
    found: list[Path] = []
    level = [root]
    for _ in range(levels):
        level = [below for folder in level for below in _folders_in(folder)][:MOST_FOLDERS]
        found += level
    return found


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:  # a folder that may not be read does not hold what the user can use
        return []


def known_split(dataset_id: str, split: str, known: Iterable[str]) -> None:
    """Refuses a split that the data set does not have."""
    if split not in (names := list(known)):
        texts = [repr(name) for name in names]
        listed = " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]])) if texts else "no split"
        raise DataError(f"{dataset_id!r} has the splits {listed}, not {split!r}.")


def paired(images: Path, masks: Path, complete: int | None = None, nested: str = "") -> Listing:
    """All images of a folder with the masks of the same name in another one.

    Args:
        images: the folder.
        masks: the other one.
        complete: number of images of the complete split, where it is known.
        nested: what to do if the pictures lie in sub-folders.
    """
    problems: list[str] = []
    found, labels = by_stem(images, problems), by_stem(masks, problems)
    if not found and not problems:
        below = few(path.name for path in _folders_in(images))
        hint = f" Its sub-folders ({below}) are not searched. {nested}".rstrip() if below else ""
        problems.append(f"no images in {images} (looked for {', '.join(reading.SUFFIXES)}).{hint}")
    listing = join(found, labels, masks, problems, complete)
    return replace(listing, notes=(*_about_unread(images), *_about_unread(masks), *listing.notes))


def _about_unread(folder: Path) -> Iterator[str]:
    try:
        names = [path.name for path in folder.iterdir() if path.suffix.lower() not in reading.SUFFIXES]
        unread = [name for name in names if os.path.isfile(folder / name) and not name.startswith(".")]
    except OSError:  # told as a problem
        return
    if unread := [name for name in unread if name.lower() not in LEFT_BY_SYSTEMS]:
        suffixes = few(sorted({PurePosixPath(name).suffix or "no suffix" for name in unread}))
        known = ", ".join(reading.SUFFIXES)
        noun, verb = ("file", "is") if len(unread) == 1 else ("files", "are")
        yield f"{len(unread)} {noun} in {folder} {verb} not read ({suffixes}): suffixes are {known}."


def few(names: Iterable[str]) -> str:
    """The first names, and how many more there are.

    >>> few("abcde")
    'a, b, c and 2 more'
    """
    every = list(names)
    more = f" and {len(every) - FEW} more" if len(every) > FEW else ""
    return ", ".join(every[:FEW]) + more


def join(
    images: Mapping[str, Path], masks: Mapping[str, Path], folder: Path, problems: list[str], complete: int | None
) -> Listing:
    """Image with mask by name; names that differ in case only belong together if each has no other."""
    single_images, single_masks = _alone(images, masks), _alone(masks, images)
    pairs, alone = dict[str, Pair](), list[str]()
    for image_id, image in images.items():
        folded = image_id.casefold()
        near = single_masks.get(folded) if single_images.get(folded) == image_id else None
        if image_id in masks or near:
            pairs[image_id] = Pair(image, masks[near or image_id])
        else:
            alone.append(image_id)
    used = {pair.mask for pair in pairs.values()}
    left = [path for path in masks.values() if path not in used]
    longer = _by_part(left) if alone else {}
    for image_id in alone:
        mend = "Restore the mask, or remove the image."
        if image_id in longer:
            mend = f"There is {longer[image_id].name}: masks must be named like their images. Rename it."
        problems.append(f"The image {images[image_id]} has no mask in {folder}. {mend}")
    return Listing(pairs, tuple(problems), images=complete, notes=tuple(_about_unused(left, folder)))


def _about_unused(masks: Sequence[Path], folder: Path) -> Iterator[str]:
    if masks:
        noun, verb = ("mask", "has") if len(masks) == 1 else ("masks", "have")
        yield f"{len(masks)} {noun} in {folder} {verb} no image, the first is {masks[0].name}."


def _by_part(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by what is left of their names without what comes before or after a sign: ``a`` of ``a_mask.png``."""
    found: dict[str, Path] = {}
    for path in paths:
        stem = unicodedata.normalize("NFC", path.stem)
        for sign in re.finditer(r"[-_. ]", stem):
            found.setdefault(stem[: sign.start()], path)
            found.setdefault(stem[sign.end() :], path)
    return found


def _alone(names: Iterable[str], others: Mapping[str, Path]) -> dict[str, str]:
    """Folded name to name, of those that are not among the others, and that no second one differs from in case only."""
    found: dict[str, list[str]] = {}
    for name in names:
        if name not in others:
            found.setdefault(name.casefold(), []).append(name)
    return {folded: each[0] for folded, each in found.items() if len(each) == 1}


def by_stem(folder: Path, problems: list[str], suffixes: Sequence[str] = reading.SUFFIXES) -> dict[str, Path]:
    """The pictures in a folder by name without suffix, composed as Unicode NFC; what is wrong goes to ``problems``."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        problems.append(f"Cannot read the folder {folder}: {error.strerror or error}. Restore it.")
        return {}
    found: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() not in suffixes or path.name.startswith("."):  # macOS leaves ._name.png
            continue
        if problem := _unusable(path):
            problems.append(problem)
            continue
        stem = unicodedata.normalize("NFC", path.stem)
        if stem in found:
            problems.append(f"{folder} has {found[stem].name} and {path.name}: image ids must be unique. Rename one.")
            continue
        found[stem] = path
    return found


def _unusable(path: Path) -> str:
    try:
        path.name.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 come as half characters, which nothing can write
        return f"The name of the file {str(path)!r} is not valid UTF-8. Rename it."
    if os.path.isfile(path):
        return ""
    if path.is_symlink() and not os.path.exists(path):
        return f"{path} is a link to {os.readlink(path)!r}, which does not exist. Restore the file."
    return f"{path} is not a file. Rename or remove it."


def read_ids(path: Path, layout: str) -> list[str]:
    """The ids in a list, one a line; the first word counts (VOC adds a flag in some lists).

    Lists of paths, as ``/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png``, are in use as well.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the list {path}: {error}\nExpected layout:\n{layout}") from error
    ids = [_id(line.split()[0]) for line in lines if line.strip()]
    if not ids:
        raise DataError(f"The list {path} is empty. Restore it.")
    return ids


def _id(word: str) -> str:
    name = PurePosixPath(unicodedata.normalize("NFC", word))
    return name.stem if name.suffix.lower() in reading.SUFFIXES else name.name


def listed(
    ids: Sequence[str], source: Path, images: Mapping[str, Path], masks: Mapping[str, Path], folders: tuple[Path, Path],
    problems: list[str], complete: int | None = None,
) -> Listing:  # fmt: skip
    """The pairs of the ids of a list."""
    pairs = {}
    for image_id in dict.fromkeys(ids):
        missing = False
        for kind, found, folder in zip(("image", "mask"), (images, masks), folders, strict=True):
            if image_id not in found:
                problems.append(f"{image_id} of {source.name} has no {kind} in {folder}. Restore it.")
                missing = True
        if not missing:
            pairs[image_id] = Pair(images[image_id], masks[image_id])
    return Listing(pairs, tuple(problems), images=complete)
