"""Sources in order: what is here and right, else what can be downloaded, else why nothing works."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segbench.downloads import checks
from segbench.downloads.checks import Expected
from segbench.downloads.folders import check_name, locked, offline_by_environment
from segbench.downloads.hub import HubSource
from segbench.downloads.sources import PackageSource, Source, text
from segbench.downloads.transfer import LIMITS, Limits
from segbench.downloads.url import UrlSource
from segbench.errors import DownloadError


@dataclass(frozen=True)
class Fetched:
    """A file whose hash was checked.

    Attributes:
        path: the file on this machine.
        sha256: computed from the file.
        source: the source that gave it, now or earlier.
    """

    path: Path
    sha256: str
    source: dict[str, Any]


def fetch(
    sources: Sequence[Mapping[str, Any]],
    *,
    name: str,
    sha256: str | None,
    folder: Path | None = None,
    offline: bool = False,
    progress: bool = True,
    limits: Limits = LIMITS,
    command: str | None = None,
) -> Fetched:
    """The file that the sources offer; a file that is on this machine and right is not downloaded again.

    Args:
        sources: as a card has them: ``package``, ``hub`` or ``url``.
        name: what the file is of, as a model id; a hash that is not pinned is remembered by this name and the source.
        sha256: the pinned hash; with None the hash of the first file is remembered, and a later other file is refused.
        folder: where ``package`` files are.
        offline: never use the network; ``HF_HUB_OFFLINE=1`` says the same.
        progress: draw a bar if standard error is a terminal.
        limits: where a download gives up.
        command: what fetches the file while online, for messages; by default that of a model.

    Raises:
        DownloadError: no source gives a right file; each failure is told, and how to do it by hand.
    """
    if not (known := _parse(sources, name, folder)):
        raise DownloadError(f"{name} is not published: no source is known.")
    pinned = checks.by_card(sha256) if sha256 is not None else None
    expected = [
        pinned or (checks.remembered(name, source.document) if source.remote else Expected(None)) for source in known
    ]
    notes: list[str] = []
    for source, wanted in zip(known, expected, strict=True):
        note = "not on this machine"
        if path := source.cached():
            try:
                return _finish(source, name, sha256, path, wanted.check(path))
            except DownloadError as error:
                note = f"what is on this machine is not right: {error}"
        notes.append(note)
    if offline or offline_by_environment():
        cause = "offline=True" if offline else "HF_HUB_OFFLINE is set"
        command = command or f"segbench show {name} --download"
        raise DownloadError(
            f"{name} is missing, and the network is not to be used ({cause}).\n"
            f"{_listed(known, notes)}\nWhile online: {command}\n{_by_hand(known)}"
        )
    return _download(known, expected, notes, name=name, sha256=sha256, progress=progress, limits=limits)


def cached(sources: Sequence[Mapping[str, Any]], *, name: str, folder: Path | None = None) -> Path | None:
    """Where the file is on this machine, None if it is not. Only looks: no network, no hash."""
    return next((path for source in _parse(sources, name, folder) if (path := source.cached())), None)


def describe(source: Mapping[str, Any]) -> str:
    """A source in one line for people.

    >>> describe({"type": "hub", "repo": "user/model", "revision": "0123456789" * 4, "file": "a.safetensors"})
    'hub: user/model@01234567/a.safetensors'
    """
    kind = source.get("type")
    if kind == "hub":
        return f"hub: {source['repo']}@{source['revision'][:8]}/{source['file']}"
    return f"{kind}: {source.get('url') or source.get('file')}"


def _parse(sources: Sequence[Mapping[str, Any]], name: str, folder: Path | None) -> list[Source]:
    check_name(name)
    return [_source(document, folder) for document in sources]


def _source(document: Mapping[str, Any], folder: Path | None) -> Source:
    kind = text(document, "type")
    if kind == "package":
        return PackageSource(document, folder)
    if kind == "hub":
        return HubSource(document)
    if kind == "url":
        return UrlSource(document)
    raise DownloadError(f"Unknown type {kind!r} of a source. Known: package, hub, url.")


def _download(
    known: list[Source],
    expected: list[Expected],
    notes: list[str],
    *,
    name: str,
    sha256: str | None,
    progress: bool,
    limits: Limits,
) -> Fetched:
    """The first source that works; what failed before it is logged."""
    log = logging.getLogger("segbench")
    failures: list[str] = []
    for source, wanted, note in zip(known, expected, notes, strict=True):
        if source.remote and source.cached():
            log.warning("%s: %s It is downloaded again.", describe(source.document), note)
        try:
            path, digest = _locked_download(source, wanted, name=name, progress=progress, limits=limits)
        except DownloadError as error:
            failures.append(str(error))
            continue
        for failed, failure in zip(known, failures, strict=False):
            log.warning("%s does not work: %s", describe(failed.document), failure)
        return _finish(source, name, sha256, path, digest)
    raise DownloadError(
        f"{name} cannot be fetched: no source works.\n{_listed(known, failures)}\n{_by_hand(known)}\n"
        "Then run the command again."
    )


def _locked_download(
    source: Source, wanted: Expected, *, name: str, progress: bool, limits: Limits
) -> tuple[Path, str]:
    if not source.remote:
        return source.download(wanted, name=name, progress=progress, limits=limits)
    with locked(source.lock_file(), name=name, seconds=limits.total_s):
        if path := source.cached():  # another process may have finished meanwhile
            try:
                return path, wanted.check(path)
            except DownloadError:
                pass
        return source.download(wanted, name=name, progress=progress, limits=limits)


def _finish(source: Source, name: str, sha256: str | None, path: Path, digest: str) -> Fetched:
    if sha256 is None and source.remote:
        checks.remember(name, path, digest, source.document)
    return Fetched(path, digest, dict(source.document))


def _listed(known: list[Source], reasons: list[str]) -> str:
    return "\n".join(
        f"  {describe(source.document)}\n    {reason}" for source, reason in zip(known, reasons, strict=True)
    )


def _by_hand(known: list[Source]) -> str:
    return "By hand:\n" + "\n  or\n".join(f"  {source.by_hand()}" for source in known)
