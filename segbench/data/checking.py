"""Everything that is wrong with a data set on disk, found in one run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from segbench.data import reading
from segbench.data.dataset import Labels
from segbench.data.folders import few
from segbench.data.parallel import in_order
from segbench.data.problems import NumbersError, Say
from segbench.data.protocols import IGNORE_INDEX, as_stored
from segbench.data.sets import shapes
from segbench.data.trees import Listing, Pair, PairedFiles, Tree, other_size
from segbench.errors import DataError
from segbench.files import sha256_file

VAL, TRAIN, TEST = "val", "train", "test"
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
TURNED, STORED, FITS_STORED, EITHER = "turned", "stored", "fits stored", "either"
DAMAGED = "damaged"  # EXIF
TURNS = {
    TURNED: "turned as it says",
    FITS_STORED: "used as stored, because only so the mask fits",
    EITHER: "turned as it says, but the mask fits both ways",
    STORED: "which is not applied: used as stored",
}
MUCH = 0.2  # share of ignored pixels that is worth a word

Report = Callable[[str, int, int], None]


class Finding(NamedTuple):
    """A problem or a note.

    Attributes:
        split: where it was found first.
        text: says what is wrong, and the mend.
        files: those that are meant; empty if the text is about a folder.
    """

    split: str
    text: str
    files: tuple[Path, ...] = ()


class SplitSize(NamedTuple):
    """How much of a split is there.

    Attributes:
        images: with their masks.
        complete: number of images of the complete split, where it is known.
        left_out: training images that are also in val, which loading leaves out.
    """

    images: int
    complete: int | None
    left_out: int


@dataclass
class Findings:
    """What a check found. Problems must be mended; notes should be known."""

    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    splits: dict[str, SplitSize] = field(default_factory=dict)


class _Cause(NamedTuple):
    """What is wrong with one file: the text, and what a line for many such files is made of."""

    path: Path
    text: str
    kind: str  # the text without names and numbers
    numbers: tuple[int, ...] = ()
    say: Say | None = None


class _Look(NamedTuple):
    """What was seen of one pair; small, because many of them wait."""

    problems: tuple[_Cause, ...]
    pixels: npt.NDArray[np.int64] | None = None  # (K+1,), the last of ignored ones; None if the pair cannot be read
    turn: str = ""


def check(tree: Tree, report: Report = lambda what, done, total: None) -> Findings:
    """Reads every file of every split that is there, and collects what is wrong.

    Args:
        tree: the data set, found by `segbench.data.catalogue.open_tree`.
        report: called with what is being done, and how much of how much is done.
    """
    found, listings = Findings(), dict[str, Listing]()
    told = set[str]()
    for split in dict.fromkeys((VAL, *tree.splits)):  # val is needed, be it there or not
        try:
            listings[split] = listing = tree.find(split)
        except DataError as error:
            problems: tuple[str, ...] = (str(error),)
        else:
            problems = listing.problems
            found.splits[split] = SplitSize(len(listing.pairs), listing.images, len(listing.leaks))
            found.notes += _about_number(split, listing)
            if listing.pairs and (size := other_size(tree.protocol, listing.pairs)):
                text = f"pictures of {size} pixels: a reduced copy; an entry measured on it is unofficial."
                found.notes.append(Finding(split, text))
            found.notes += [Finding(split, text) for text in listing.notes if text not in told]
            told |= set(listing.notes)
        found.problems += [Finding(split, text) for text in problems if text not in told]
        told |= set(problems)
    if TRAIN not in tree.splits and tree.protocol.class_weights is None:
        found.notes.append(Finding(TRAIN, f"{tree.base} has no training split: class weights are counted on val."))
    _check_pairs(found, tree, listings, report)
    _check_twins(found, listings, report)
    return found


def check_embedded() -> Findings:
    """The same of ``shapes``, whose pictures travel in the package with their checksum.

    Raises:
        DataError: the checksum is wrong.
    """
    images = len(shapes.load_shapes(VAL))
    text = "embedded in the package; the checksum is right. The training split is drawn from a seed."
    return Findings(notes=[Finding(VAL, text)], splits={VAL: SplitSize(images, shapes.VALIDATION_IMAGES, 0)})


def _about_number(split: str, listing: Listing) -> Iterator[Finding]:
    there, complete = len(listing.pairs), listing.images
    if complete is not None and there < complete and not listing.problems:
        meaning = "; an entry measured on it is unofficial" if split == VAL else ""
        yield Finding(split, f"partial: {there} of {complete} images{meaning}.")
    if complete is not None and there > complete:
        yield Finding(split, f"{there} images, but the complete split has {complete}. Are there others among them?")
    if listing.leaks:
        yield Finding(
            split,
            f"{few(listing.leaks)}: also in val, so left out when the split is loaded.",
            tuple(listing.pairs[image_id].image for image_id in listing.leaks),
        )


def _check_pairs(found: Findings, tree: Tree, listings: Mapping[str, Listing], report: Report) -> None:
    """Opens every pair once, in the first split that has it."""
    seen, told = dict[Pair, npt.NDArray[np.int64] | None](), set[str]()  # pair to its pixels, which later splits share
    for split, listing in listings.items():
        files = PairedFiles(tree.protocol, listing.pairs)
        ids = [image_id for image_id, pair in sorted(listing.pairs.items()) if pair not in seen]
        turns, ignored = defaultdict[str, list[Path]](list), list[Path]()
        causes = defaultdict[str, list[_Cause]](list)
        report(f"reading {split}", 0, len(ids))
        for done, (image_id, look) in enumerate(zip(ids, in_order(_looker(files), ids), strict=True), 1):
            pair = listing.pairs[image_id]
            for cause in look.problems:
                if cause.text not in told:
                    causes[cause.kind].append(cause)
                told.add(cause.text)
            seen[pair] = look.pixels
            ignored += [pair.mask] if look.pixels is not None and not look.pixels[:-1].any() else []
            turns[look.turn].append(pair.image)
            report(f"reading {split}", done, len(ids))
        found.problems += [_joined(split, each) for each in causes.values()]
        found.notes += _about_pairs(split, tree, turns, ignored)
        used = [seen[listing.pairs[image_id]] for image_id in set(listing.pairs) - set(listing.leaks)]
        found.notes += _without_pixel(split, tree, [pixels for pixels in used if pixels is not None])


def _looker(files: PairedFiles) -> Callable[[str], _Look]:
    """A function that reads one pair and never raises."""
    number = len(files.protocol.class_names)

    def look(image_id: str) -> _Look:
        pair = files.pairs[image_id]
        try:
            labels = files.read(image_id)[1]
        except Exception as error:  # noqa: BLE001 - whatever a damaged file does to a reader is to be told
            return _Look(tuple(_causes(files, image_id, error)))
        return _Look((), _pixels(labels, number), _turn(pair, files.protocol.turned))

    return look


def _causes(files: PairedFiles, image_id: str, error: Exception) -> Iterator[_Cause]:
    """What is wrong with the mask, with the image, or else with the two together."""
    pair, alone = files.pairs[image_id], list[_Cause]()
    for path, read in ((pair.mask, files.labels), (pair.image, files.picture)):
        try:
            read(image_id)
        except Exception as reason:  # noqa: BLE001 - as above
            alone.append(_cause(reason, path, pair))
    yield from alone or [_cause(error, pair.mask, pair)]


def _cause(error: Exception, path: Path, pair: Pair) -> _Cause:
    text = str(error)
    if not isinstance(error, DataError):
        text = f"Cannot read {path}: {type(error).__name__}: {error}. Restore the file."
    if isinstance(error, NumbersError):
        return _Cause(path, text, error.kind, error.numbers, error.say)
    return _Cause(path, text, re.sub(r"\d+", "", text.replace(str(pair.image), "").replace(str(pair.mask), "")))


def _joined(split: str, causes: Sequence[_Cause]) -> Finding:
    """One problem of all files that need the same edit."""
    first, files = causes[0], tuple(cause.path for cause in causes)
    if len(files) == 1:
        return Finding(split, first.text, files)
    names = few(path.name for path in files)
    if first.say:
        numbers = sorted({number for cause in causes for number in cause.numbers})
        return Finding(split, f"{len(files)} files ({names}): {first.say(numbers)}", files)
    return Finding(split, f"{len(files)} files ({names}): {first.text}", files)


def _pixels(labels: Labels, number: int) -> npt.NDArray[np.int64]:
    pixels = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)
    return np.append(pixels[:number], pixels[IGNORE_INDEX])


def _turn(pair: Pair, turned: bool) -> str:
    """What becomes of a picture with an EXIF orientation: a key of `TURNS`; empty if it has none."""
    try:
        with Image.open(pair.image) as image:
            orientation = reading.orientation(image)
            if orientation is None:
                return DAMAGED
            if orientation == 1:
                return ""
            if not turned:
                return STORED
            if image.width == image.height or orientation not in SIDEWAYS:
                return EITHER
            with Image.open(pair.mask) as mask:
                return FITS_STORED if image.size == mask.size else TURNED
    except Exception:  # noqa: BLE001 - both files were readable a moment ago; this is only a note
        return ""


def _about_pairs(split: str, tree: Tree, turns: Mapping[str, list[Path]], ignored: list[Path]) -> Iterator[Finding]:
    for turn, meaning in TURNS.items():
        if paths := turns.get(turn):
            number = "1 picture" if len(paths) == 1 else f"{len(paths)} pictures"
            look = f" Look: segbench data show {tree.protocol.id} --root {tree.base}" if turn == EITHER else ""
            text = f"{few(path.name for path in paths)}: {number} with an EXIF orientation, {meaning}.{look}"
            yield Finding(split, text, tuple(paths))
    if paths := turns.get(DAMAGED):
        text = f"{few(path.name for path in paths)}: the EXIF cannot be read, nor whether it turns; used as stored."
        yield Finding(split, text, tuple(paths))
    if ignored:
        yield Finding(
            split, f"{few(path.name for path in ignored)}: every pixel of the mask is ignored.", tuple(ignored)
        )


def _without_pixel(split: str, tree: Tree, looks: list[npt.NDArray[np.int64]]) -> Iterator[Finding]:
    """Classes that no mask of a split shows, and how much is ignored: both may come from masks misunderstood."""
    if not looks:
        return
    protocol = tree.protocol
    *pixels, ignored = np.sum(looks, axis=0).tolist()
    names = [name for name, number in zip(protocol.class_names, pixels, strict=True) if not number]
    if not names:
        return
    text = f"no pixel of {few(names)}"
    if split == TRAIN:
        text += ": the published class weights are used" if protocol.class_weights else ": its weight in mce_bal is 0"
    if (share := ignored / (sum(pixels) + ignored)) > MUCH:
        text += f"; {share:.0%} of the pixels are ignored"
    plain = not protocol.about_labels and protocol.labels == as_stored(len(protocol.class_names))
    if ignored and len(names) == 1 and plain:  # as home-made masks of 0 and 255 are, if nothing describes them
        kept = ", ".join(f"{label}: {name}" for label, name in enumerate(protocol.class_names) if name not in names)
        text += f". Did you mean label_map: {{{kept}, {IGNORE_INDEX}: {names[0]}}}?"
    yield Finding(split, text if text.endswith("?") else f"{text}.")


def _check_twins(found: Findings, listings: Mapping[str, Listing], report: Report) -> None:
    """Pictures of val that are there twice, and training pictures that are also in val under whatever name."""
    pictures: dict[Path, str] = {}  # to the first split; val comes first
    for split, listing in listings.items():
        if split != TEST:
            for image_id in sorted(set(listing.pairs) - set(listing.leaks)):
                pictures.setdefault(listing.pairs[image_id].image, split)
    leaks = set[Path]()
    for twins in _same_content(pictures, report):
        val, others = ([path for path in twins if (pictures[path] == VAL) is wanted] for wanted in (True, False))
        leaks |= set(others)
        found.problems += [
            Finding(
                pictures[path],
                f"The training image {path} is the same picture as {val[0]} of val. Remove it from training.",
                (path, val[0]),
            )
            for path in others
        ]
        if len(val) > 1:
            found.notes.append(Finding(VAL, f"{few(path.name for path in val)}: the same picture.", tuple(val)))
    found.notes += _same_names(listings, leaks)


def _same_content(pictures: Mapping[Path, str], report: Report) -> Iterator[list[Path]]:
    """Files of the same bytes, at least one of val among them: those of one size are hashed."""
    sizes: defaultdict[int, list[Path]] = defaultdict(list)
    for path in pictures:
        try:
            sizes[path.stat().st_size].append(path)
        except OSError:  # gone: reading it has said so
            continue
    near = [path for group in sizes.values() if len(group) > 1 and _any_val(group, pictures) for path in group]
    same: defaultdict[str, list[Path]] = defaultdict(list)
    report("comparing files", 0, len(near))
    for done, (path, digest) in enumerate(zip(near, in_order(_sha256, near), strict=True), 1):
        same[digest].append(path)
        report("comparing files", done, len(near))
    yield from (group for group in same.values() if len(group) > 1 and _any_val(group, pictures))


def _any_val(paths: Iterable[Path], pictures: Mapping[Path, str]) -> bool:
    return any(pictures[path] == VAL for path in paths)


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError:  # gone, or not to be read: like no other file; reading it has said so
        return str(path)


def _same_names(listings: Mapping[str, Listing], leaks: set[Path]) -> Iterator[Finding]:
    """Ids that train and val share although nothing says that they name the same pictures."""
    if VAL not in listings or TRAIN not in listings:
        return
    train = listings[TRAIN]
    shared = sorted(set(train.pairs) & set(listings[VAL].pairs) - set(train.leaks))
    images = tuple(train.pairs[image_id].image for image_id in shared)
    if images := tuple(image for image in images if image not in leaks):
        text = f"{few(path.name for path in images)}: an image of val has the same id. If it is the same picture, "
        yield Finding(TRAIN, text + "remove it from training.", images)
