"""A finished run as files of a checkout: card, entry and evidence, valid or not written at all."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segbench import cards, content, schemas
from segbench.cards import CARD_VERSION, ModelCard
from segbench.entries import additions, checkouts
from segbench.entries.document import read_entry
from segbench.entries.placement import card_problems, expected_path
from segbench.entries.validation import validate_addition, validate_entry
from segbench.errors import ContentError, UsageError
from segbench.files import sha256_file, sync_folder, write_atomic


@dataclass(frozen=True)
class Submission:
    """What was written.

    Attributes:
        model: id.
        files: card, entry, evidence and perhaps weights, relative to the checkout.
        is_new: the model had no entry on this data set under this protocol.
    """

    model: str
    files: tuple[Path, ...]
    is_new: bool


def find_entry(run: Path) -> Path:
    """The entry of a run directory, or the entry itself.

    Raises:
        ContentError: the run is not finished, or there is no such thing.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise ContentError(f"{run} is neither a run directory nor an entry. Runs lie in runs/.")
    found = [file for file in sorted(run.glob("*.json")) if file.name != "run.json"]
    if len(found) != 1:
        raise ContentError(
            f"{run} holds {len(found)} entries, not one. Finish it: segbench status {run}, segbench merge {run}"
        )
    return found[0]


def checked_entry(path: Path) -> dict[str, Any]:
    """An entry that can be submitted.

    Raises:
        ContentError: it is not valid, not official, or has no evidence.
    """
    if problems := validate_entry(path, published=False):
        raise ContentError("\n".join(problems))
    entry = read_entry(path)
    if not entry["protocol"]["official"]:
        raise ContentError(
            f"{path} is not official ({'; '.join(entry['protocol']['deviations'])}). "
            "Evaluate with the whole protocol: segbench evaluate without --limit, --iterations and --eps."
        )
    if entry["dataset"]["id"] == "folder":
        raise ContentError(
            f"{path} is of a folder without a name, and a leaderboard needs one. Describe the data set (dataset.yaml: "
            "name: NAME), which makes it folder/NAME, and evaluate again."
        )
    if entry["evidence"] is None:
        raise ContentError(f"{path} has no evidence: it cannot be checked.")
    return entry


def find_card(checkout: Path, model: str, dataset: str) -> ModelCard | None:
    """The card of a model in a checkout, on that data set or the one that it is a variant of."""
    for name in (dataset, content.family(dataset)):
        path = checkout / "model_zoo" / content.dataset_folder(name) / f"{model}.json"
        if path.is_file():
            return cards.read_card(path)
    return None


def new_card(entry: Mapping[str, Any], details: Mapping[str, Any]) -> ModelCard:
    """A card for a model that has none.

    Args:
        entry: of the model.
        details: ``id``, ``title``, ``backbone``, ``sources``, ``licence``, ``paper``, ``training`` and
            ``preprocessing``, as in a card.

    Raises:
        UsageError: a detail is not acceptable; names the field.
    """
    card = ModelCard(
        schema_version=CARD_VERSION,
        architecture={"name": slug(entry["model"]["architecture"] or "unknown"), "arguments": {}},
        dataset=content.family(entry["dataset"]["id"]),
        num_classes=entry["dataset"]["num_classes"],
        parameters=entry["model"]["parameters"] or None,
        sha256=entry["model"]["weights_sha256"],
        expected={"aacc": round(entry["clean"]["aacc"], 4), "miou": round(entry["clean"]["miou"], 4)},
        **details,
    )
    if wrong := schemas.problems("card", card.document()):
        raise UsageError("The card would not be valid; give other values:\n  " + "\n  ".join(wrong[:10]))
    return card


def slug(text: str) -> str:
    """An identifier made of a name.

    >>> slug("UPerNet (Swin-T)")
    'upernet_swin_t'
    """
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:80] or "unknown"


def write(
    checkout: Path, entry_path: Path, card: ModelCard, *, submitter: str | None, date: str, reason: str | None = None
) -> Submission:
    """Writes card, entry and evidence into a checkout, checks them, and takes everything back if they are not valid.

    Args:
        checkout: holds ``model_zoo/`` and ``entries/``.
        entry_path: the entry of a run; its evidence lies beside it.
        card: of the model; pins the weights of the entry if it pins none.
        submitter: who submits.
        date: ISO date of the history line, if there is one.
        reason: why an entry that is listed changes; goes into its history.

    Raises:
        UsageError: an entry is replaced without a reason.
        ContentError: what was written is not valid; the checkout is as it was.
    """
    entry = checked_entry(entry_path)
    if card.sha256 is None:
        card = dataclasses.replace(card, sha256=entry["model"]["weights_sha256"])
    card_path = checkout / "model_zoo" / content.dataset_folder(card.dataset) / f"{card.id}.json"
    card, weights = _weights(card, card_path)
    entry["model"] |= {"id": card.id, "title": card.title, "architecture": card.architecture["name"]}
    entry["paper"] = card.paper
    source = entry_path.parent / entry["evidence"]["file"]
    entry["evidence"] = {**entry["evidence"], "file": f"{card.id}.parquet"}
    target = checkout / "entries" / Path(*expected_path(entry))
    listed = _listed(checkout, target)
    known = listed["claim"]["submitter"] if listed is not None else entry["claim"]["submitter"]
    entry["claim"] = {**entry["claim"], "submitter": submitter or known}
    if listed is not None:
        entry["history"] = [*listed["history"], *_line(listed, entry, date, reason)]
    files = weights | {
        card_path: card.to_json().encode(),
        target: schemas.dump(entry).encode(),
        target.with_suffix(".parquet"): source.read_bytes(),
    }
    with _replaced(files):
        if problems := _problems(target.resolve(), card_path):
            raise ContentError("Nothing was submitted:\n" + "\n".join(problems))
    beside = {card_path.with_name(source["file"]) for source in card.sources if source["type"] == "package"}
    return Submission(card.id, tuple(sorted(path.relative_to(checkout) for path in {*files, *beside})), listed is None)


@contextmanager
def _replaced(files: Mapping[Path, bytes]) -> Iterator[None]:
    """The files with new contents; what was there comes back if anything fails, also on a full disk."""
    new, old = ({path: path.with_name(f".{path.name}.{name}") for path in files} for name in ("new", "old"))
    begun: list[Path] = []
    try:
        for path, data in files.items():
            write_atomic(new[path], data)
        for path in files:
            begun.append(path)
            if path.exists():
                os.replace(path, old[path])
            os.replace(new[path], path)
            sync_folder(path.parent)
        yield
    except BaseException:
        for path in begun:
            if old[path].exists():
                os.replace(old[path], path)
            elif not new[path].exists():  # a new file that was put there
                path.unlink(missing_ok=True)
        raise
    finally:
        for path in (*new.values(), *old.values()):
            path.unlink(missing_ok=True)


def _listed(checkout: Path, target: Path) -> dict[str, Any] | None:
    """The entry as it is published: in the last commit, or, where there is none, as the file says."""
    try:
        committed = checkouts.committed(checkout, target.relative_to(checkout).as_posix())
    except UsageError:  # no checkout of git
        return read_entry(target) if target.exists() else None
    return None if committed is None else schemas.parse(committed.decode("utf-8"), source=f"{target}, as committed")


def _problems(target: Path, card_path: Path) -> list[str]:
    """What CI would refuse."""
    found = card_problems(card_path, cards.read_card(card_path)) + validate_entry(target, published=True)
    for kind in (additions.EXTERNAL, additions.REPRODUCED):
        for path in sorted(additions.folder_of(target, kind).glob("*.json")):
            found += validate_addition(path)
    return found


def _line(listed: Mapping[str, Any], entry: Mapping[str, Any], date: str, reason: str | None) -> list[dict[str, str]]:
    """The line of history of an entry that is replaced; none if its scores stay."""
    if (listed["clean"], listed["results"]) == (entry["clean"], entry["results"]):
        return []
    if listed["claim"]["tier"] == "reported":
        return [{"date": date, "text": reason or f"Measured; before, the numbers of {listed['claim']['source']}."}]
    if not reason:
        raise UsageError(f"{entry['model']['id']} is listed with other scores. Say why they change: --reason TEXT")
    return [{"date": date, "text": reason}]


def _weights(card: ModelCard, card_path: Path) -> tuple[ModelCard, dict[Path, bytes]]:
    """Weights that travel with a card from elsewhere, named as the model, and the card that says so."""
    sources, found = [], {}
    for source in card.sources:
        beside = card.path.with_name(source["file"]) if source["type"] == "package" and card.path else None
        if beside is None or beside.parent.resolve() == card_path.parent.resolve():
            sources.append(source)
            continue
        if not beside.is_file() or sha256_file(beside) != card.sha256:
            raise ContentError(f"{beside} is not the file that the card {card.path} pins. Put it there again.")
        name = f"{card.id}{beside.suffix}"
        found[card_path.with_name(name)] = beside.read_bytes()
        sources.append({**source, "file": name})
    return dataclasses.replace(card, sources=sources), found


def git_commands(submission: Submission, generated: list[Path]) -> list[list[str]]:
    """What makes a pull request of a submission, ready to be run in the checkout."""
    branch = f"submit-{submission.model}"
    title = f"{'Add' if submission.is_new else 'Update'} {submission.model}"
    files = [str(path) for path in (*submission.files, *generated)]
    return [
        ["git", "switch", "-c", branch],
        ["git", "add", "--", *files],
        ["git", "commit", "-m", title, "--", *files],
        ["git", "push", "-u", "origin", branch],
    ]


def pull_request_command(submission: Submission) -> list[str]:
    """What opens the pull request, where GitHub's command line is there."""
    title = f"{'Add' if submission.is_new else 'Update'} {submission.model}"
    body = "Written by `segbench submit`. CI recomputes every number from the evidence."
    return ["gh", "pr", "create", "--title", title, "--body", body]


def has_github_cli() -> bool:
    """Whether ``gh`` is on this machine."""
    return shutil.which("gh") is not None
