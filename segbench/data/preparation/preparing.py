"""Data sets brought to disk: downloaded where their authors allow it, checked, unpacked.

Unfinished work lies in ``<root>/.segbench-<data set>``: the download, and what is being unpacked. A run that was
killed is continued from there. The folder is gone when the data set is complete, and so is the archive, unless a person
put it into the root, or asks to keep it.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from segbench.data.catalogue import EMBEDDED, FAMILIES, open_tree, split_id
from segbench.data.preparation.archives import ELSEWHERE, below, opened, unpack
from segbench.data.preparation.distribution import ARCHIVES, BY_HAND, SBD, SBD_PAGE, Archive
from segbench.downloads.folders import check_space, disk_error, locked, offline_by_environment, size
from segbench.downloads.partial import Part
from segbench.downloads.progress import bar
from segbench.downloads.transfer import LIMITS, download
from segbench.errors import DataError, DownloadError, UsageError

SPLITS = ("val", "train")


def prepare(
    dataset_id: str,
    root: Path,
    *,
    sbd: bool = False,
    keep_archive: bool = False,
    progress: bool = True,
    offline: bool = False,
) -> list[str]:
    """Brings a data set to disk; what is there already is not fetched again.

    Files of the user are never overwritten or removed. Into a data set that is there in part only the missing files are
    put; a file that is there with another size than in the archive is an error.

    Args:
        dataset_id: as `load_dataset` has it; all variants of a data set use the same files.
        root: the folder to put it in, and to give as data root later. Made if it is not there.
        sbd: also the training masks of SBD, for ``pascal_voc``.
        keep_archive: keep what was downloaded.
        progress: draw bars if standard error is a terminal.
        offline: never use the network; ``HF_HUB_OFFLINE=1`` says the same.

    Returns:
        What was there, what was done, where it is, and the terms of use: lines for a person.

    Raises:
        UnknownNameError: no data set of that name.
        UsageError: SBD for another data set.
        DataError: it has to be fetched by hand, or an archive is not right; the message says what to do.
        DownloadError: it cannot be downloaded or written; the message also says how to do it by hand.
    """
    name, _ = split_id(dataset_id)
    if sbd and name != "pascal_voc":
        raise UsageError(f"SBD belongs to pascal_voc, not to {dataset_id}. Leave --sbd out.")
    if name == EMBEDDED:
        return [f"{EMBEDDED} is embedded in segbench: nothing to prepare, and it needs no root."]
    if name not in ARCHIVES:
        raise DataError(
            f"{dataset_id!r} is a data set of your own: put it there yourself.\nLayout:\n{FAMILIES[name].layout}"
        )
    try:
        root = root.expanduser()
    except RuntimeError as error:  # ~name of a user who does not exist
        raise DataError(f"The root {root} cannot be found: {error} Write the folder out.") from error
    if root.exists() and not root.is_dir():
        raise DataError(f"The root {root} is not a folder. Give another one.")
    return _Preparation(dataset_id, name, root, sbd, keep_archive, progress, offline).run()


@dataclass(frozen=True)
class _Preparation:
    """One call of `prepare`."""

    dataset_id: str
    name: str
    root: Path
    sbd: bool
    keep_archive: bool
    progress: bool
    offline: bool

    @property
    def work(self) -> Path:
        return self.root / f".segbench-{self.name}"

    @property
    def _augmented(self) -> tuple[str, ...]:
        return ("train_aug",) if self.sbd else ()

    def run(self) -> list[str]:
        missing = self._missing()
        if not missing and not self.work.exists():
            return ["Nothing to do: all is there already.", *self._summary()]
        if by_hand := [archive for archive in missing if not archive.url and not (self.root / archive.file).is_file()]:
            if problem := self._problem(("val",)):
                raise DataError(f"{problem}\n{self._by_hand(by_hand)}")
            return [*self._summary(), f"train is not complete: {self._problem(SPLITS)}", self._by_hand(by_hand)]
        lock = self.work.with_suffix(".lock")
        with locked(lock, name=self.dataset_id, seconds=LIMITS.total_s, elsewhere=ELSEWHERE):
            try:
                lines = self._complete()
            finally:
                shutil.rmtree(self.work / "unpacking", ignore_errors=True)
                with suppress(OSError):
                    self.work.rmdir()  # stays where a download can be continued
                with suppress(OSError):
                    lock.unlink()
        return [*lines, *self._summary()]

    def _complete(self) -> list[str]:
        """Does what is missing, and says what was done."""
        lines = [line for archive in self._missing() for line in self._bring(archive)]  # a look again: it may have come
        if problem := self._problem((*SPLITS, *self._augmented)):
            raise DataError(
                f"{self.dataset_id} was unpacked below {self.root}, but is not complete: {problem}\n"
                "Mend that, or move the folder away and run the same command again."
            )
        try:
            return lines + self._tidy()
        except OSError as error:
            raise disk_error(error, self.work, elsewhere=ELSEWHERE) from error

    def _missing(self) -> list[Archive]:
        """The archives of what is not complete."""
        missing = list(ARCHIVES[self.name]) if self._problem(SPLITS) else []
        return [*missing, SBD] if self._problem(self._augmented) else missing

    def _problem(self, splits: tuple[str, ...]) -> str:
        """What the splits lack; empty if they are complete, or there are none."""
        if not splits:
            return ""
        try:
            tree = open_tree(self.dataset_id, self.root)
            for split in splits:
                listing = tree.find(split)
                if listing.problems:
                    return listing.problems[0]
                if listing.images not in (None, len(listing.pairs)):
                    return f"{split} in {tree.base} has {len(listing.pairs)} of its {listing.images} images."
        except DataError as error:
            return str(error)
        return ""

    def _summary(self) -> list[str]:
        """Where the data set is, how many images its splits have, and whose it is."""
        tree, family = open_tree(self.dataset_id, self.root), FAMILIES[self.name]
        complete = [split for split in (*SPLITS, *self._augmented) if not self._problem((split,))]
        counts = [f"{split} has all its {len(tree.find(split).pairs)} images" for split in complete]
        pages = f"{family.url} and {SBD_PAGE}" if self.sbd else family.url
        return [
            f"{family.title} is in {tree.base}: {', '.join(counts)}.",
            f"The data belong to their authors. Read the terms of use: {pages}",
        ]

    def _by_hand(self, archives: list[Archive]) -> str:
        command = shlex.join(
            ["segbench", "data", "prepare", self.dataset_id, "--root", str(self.root), *(["--sbd"] if self.sbd else [])]
        )
        files = " and ".join(archive.file for archive in archives)
        if archives[0].url:
            how = f"By hand: open {archives[0].url} in a browser, save it as {self.root / files}"
        else:
            how = BY_HAND[self.name].format(url=FAMILIES[self.name].url, files=files) + f", put them into {self.root}"
        return f"{how}, and run the same command again:\n  {command}"

    def _bring(self, archive: Archive) -> list[str]:
        """Gets an archive and unpacks it; says what was done."""
        path, got = self._get(archive)
        place = (self._tree_base() if archive.whole else None) or self.root / archive.folder
        with bar(f"unpacking {archive.file}", enabled=self.progress) as report, opened(path) as entries:
            files = below(entries, archive.folder, only=archive.only)
            if not files:
                raise DataError(
                    f"{path} has no folder {archive.folder}, so it is not the archive that is meant. Delete it.\n"
                    f"{self._by_hand([archive])}"
                )
            temporary = self.work / "unpacking" / archive.file / "unfinished"  # deeper than `find_base` looks
            done = unpack(path, files, place, temporary=temporary, report=report)
        there = f"; {done.there} were there already" if done.there else ""
        return [got, f"Unpacked {done.written} files to {place}{there}."]

    def _get(self, archive: Archive) -> tuple[Path, str]:
        """The archive, its hash checked, and where it is from."""
        given, ours = self.root / archive.file, self.work / archive.file
        if given.is_file():
            if wrong := self._wrong(archive, given):
                raise DataError(
                    f"{given} is not the archive that is meant, or not all of it: {wrong} Delete it, and run the same "
                    f"command again: it is then downloaded.\n{self._by_hand([archive])}"
                )
            return given, f"Used {given}."
        if ours.is_file() and not self._wrong(archive, ours):
            return ours, f"{archive.file} had been downloaded already."
        try:
            self._download(archive, ours)
        except DownloadError as error:
            raise DownloadError(f"{archive.file} cannot be downloaded: {error}\n{self._by_hand([archive])}") from error
        number = size(ours.stat().st_size)
        return ours, f"Downloaded {archive.file} ({number}), its {archive.algorithm.upper()} is right."

    def _download(self, archive: Archive, target: Path) -> None:
        if self.offline or offline_by_environment():
            cause = "offline" if self.offline else "HF_HUB_OFFLINE is set"
            raise DownloadError(f"the network is not to be used ({cause})")
        part = Part(target.with_name(target.name + ".part"), ELSEWHERE)
        try:
            self.work.mkdir(exist_ok=True)
            check_space(2 * archive.bytes - part.size(), self.root, elsewhere=ELSEWHERE)
            with bar(archive.file, enabled=self.progress) as report:
                plain_http = archive.url.startswith("http:")  # its hash is pinned
                download(archive.url, part, limits=LIMITS, report=report, plain_http=plain_http)
            if wrong := self._wrong(archive, part.path):
                part.clear()
                raise DownloadError(f"what arrived is not the file that is expected: {wrong}")
            part.move_to(target)
        except OSError as error:
            raise disk_error(error, self.work, elsewhere=ELSEWHERE) from error

    def _wrong(self, archive: Archive, path: Path) -> str:
        """How the hash differs; empty if it is right, or none is known."""
        if not archive.digest:
            return ""
        digest = hashlib.new(archive.algorithm, usedforsecurity=False)
        try:
            total = path.stat().st_size
            with bar(f"checking {archive.file}", enabled=self.progress) as report, path.open("rb") as stream:
                while piece := stream.read(1 << 20):
                    digest.update(piece)
                    report(stream.tell(), total)
        except OSError as error:
            raise DataError(f"Cannot read {path}: {error.strerror or error}. Make it readable.") from error
        found = digest.hexdigest()
        return "" if found == archive.digest else f"its {archive.algorithm.upper()} is {found}, not {archive.digest}."

    def _tree_base(self) -> Path | None:
        """Where the data set is, perhaps in part."""
        try:
            return open_tree(self.dataset_id, self.root).base
        except DataError:
            return None

    def _tidy(self) -> list[str]:
        """Removes what is not needed any more; never what a person put into the root."""
        lines = []
        for archive in (*ARCHIVES[self.name], *([SBD] if self.sbd else [])):
            ours, given = self.work / archive.file, self.root / archive.file
            Part(self.work / f"{archive.file}.part").clear()
            if ours.exists() and self.keep_archive and not given.exists():
                ours.replace(given)
                lines.append(f"Kept the archive: {given}")
            elif ours.exists():
                ours.unlink()
                lines.append(f"Removed the archive {archive.file}; --keep-archive keeps it.")
        return lines
