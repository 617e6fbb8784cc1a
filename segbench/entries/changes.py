"""What a change to a checkout does to cards and entries: the rules that a submission keeps.

The change is everything between the merge base with a revision and the files as they are now, so the same rules run
before a commit on one's own machine and in CI on a pull request.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from segbench import schemas
from segbench.entries.additions import account
from segbench.entries.checkouts import PLAIN, Change, Tree, blobs, tree
from segbench.entries.placement import MAX_WEIGHTS_BYTES
from segbench.errors import ContentError

GENERATED = {"README.md": "models", "leaderboard/README.md": "tables"}  # page -> what is written between markers
_TABLES = "<!-- {0}: written by `segbench leaderboard`, do not edit -->(?:(?!<!--).)*<!-- end of {0} -->"
MEND = "A submission holds the files of its own model, and what `segbench leaderboard` writes."
UNREADABLE = (OSError, ValueError, ContentError, KeyError, TypeError, AttributeError)


def problems(root: Path, base: str, found: Sequence[Change], *, author: str | None = None) -> list[str]:
    """Which rules of a submission a change breaks, each with its mend; empty when all are kept.

    One pull request adds any number of new models, or changes one that is listed; it touches no other file; no score
    of a listed entry changes or vanishes without a line of its history; what others submitted stays theirs.

    Args:
        root: the checkout.
        base: the commit that the change is measured from.
        found: its files.
        author: account of who makes the change; None if that is not to be compared with who submitted what.
    """
    texts, new, listed, beside = list[str](), set[str](), set[str](), set[str]()
    before = tree(root, base)
    for change in found:
        if change.path in GENERATED and change.status == "M":
            texts += _page(root, base, before, change)
            continue
        if change.model is None:
            name = change.path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            texts.append(f"{name}: not a file of a model. {MEND} Take it out: git checkout {base[:12]} -- FILE")
            continue
        if change.status != "A":
            listed.add(change.model)
        else:
            (beside if change.kind == "beside" else new).add(change.model)
        texts += _file(root, change)
        if change.status != "A":
            texts += _published(root, before, change)
    listed |= beside - new  # an addition to an entry that was there before
    new -= listed
    if listed and (new or len(listed) > 1):
        texts.append(
            f"it changes {', '.join(sorted(listed))}" + (f" and adds {', '.join(sorted(new))}" if new else "") + ": "
            "one pull request adds new models, or changes one that is listed. Make one of each."
        )
    texts += _taken(before, found) + _reproduced_at_once(root, found, author)
    return texts if author is None else texts + _foreign(root, before, found, author)


def _taken(before: Tree, found: Sequence[Change]) -> list[str]:
    """An id names one model: a card of the same id on another data set would take its place."""
    cards = {path.split("/")[1]: set[str]() for path in before if path.startswith("model_zoo/")}
    for path in before:
        if path.startswith("model_zoo/") and path.endswith(".json"):
            cards[path.split("/")[1]].add(Path(path).stem)
    texts = []
    for change in found:
        if change.status == "A" and change.kind == "card":
            own = change.path.split("/")[1]
            others = [name for name, ids in cards.items() if change.model in ids and name != own]
            if any(name.partition("-")[0] != own.partition("-")[0] for name in others):
                texts.append(f"{change.path}: {change.model} is a model of {others[0]}: give this one another id.")
    return texts


def _reproduced_at_once(root: Path, found: Sequence[Change], author: str | None) -> list[str]:
    """Nobody reproduces what they submit: a record comes alone, from who made it."""
    texts, submitted = [], {change.model for change in found if change.kind == "entry"}
    for change in found:
        if change.kind != "beside" or ".reproduced/" not in change.path or change.status == "D":
            continue
        if change.model in submitted:
            texts.append(f"{change.path}: a reproduction comes in a pull request of its own, after its entry.")
        if author is None or not change.path.endswith(".json"):
            continue
        try:
            by = _now(root, change.path)["by"]
        except UNREADABLE:
            continue  # what is wrong with it is said where it is validated
        if by is None or account(by) != account(author):
            texts.append(f"{change.path}: by is {by!r}, but {author} submits it: who reproduces adds the record.")
    return texts


def _file(root: Path, change: Change) -> list[str]:
    """Plain files only; and data need the document that names them."""
    if change.status == "D":
        return []
    found = []
    if change.mode != PLAIN:
        found.append(f"{change.path}: it is a link, a program or a submodule (mode {change.mode}): add a plain file.")
    if change.path.endswith((".parquet", ".safetensors")):
        found += _alone(root, change.path)
    return found


def _page(root: Path, base: str, before: Tree, change: Change) -> list[str]:
    """Of a generated page only the tables may change."""
    if change.mode == PLAIN:
        both = (*blobs(root, [before[change.path][1]]), (root / change.path).read_bytes())
        pattern = re.compile(_TABLES.format(GENERATED[change.path]), re.DOTALL)
        pages = [pattern.sub("", data.decode("utf-8", "replace").replace("\r\n", "\n"), count=1) for data in both]
        if pages[0] == pages[1]:
            return []
    return [f"{change.path}: something else than its tables changed. Restore it: git checkout {base[:12]} -- FILE"]


def _alone(root: Path, path: str) -> list[str]:
    """Data need the document that names them, and stay small: everybody downloads them with the package."""
    file, found = root / path, []
    try:
        document = schemas.parse(file.with_suffix(".json").read_text("utf-8"), source=path)
        sources = document["sources"] if file.suffix == ".safetensors" else [document["evidence"] or {}]
        named = file.name in [source.get("file") for source in sources]
    except UNREADABLE:
        named = False
    if not named:
        found.append(f"{path}: no {file.stem}.json beside it names this file. Add it, or take the file out.")
    if not file.is_symlink() and file.is_file() and (size := file.stat().st_size) > MAX_WEIGHTS_BYTES:
        found.append(f"{path}: {size} bytes; larger weights go to the Hub: segbench publish.")
    return found


def _published(root: Path, before: Tree, change: Change) -> list[str]:
    """What was published stays, or says why it changes."""
    if change.status == "D":
        if change.kind == "beside" and _other_weights(root, before, change):
            return []
        return [f"{change.path}: it is deleted: what was published stays. Restore it."]
    if change.kind == "beside":
        if _only_computed_again(root, before, change):
            return []
        return [f"{change.path}: it is what others have shown: restore it, and add another one beside it."]
    if change.kind == "entry" and change.path.endswith(".json"):
        return _history(root, before, change)
    return []


def _beside(change: Change) -> str:
    """The path of the entry that an addition lies beside."""
    return re.sub(r"\.(?:external|reproduced)/.*", ".json", change.path)


def _other_weights(root: Path, before: Tree, change: Change) -> bool:
    """Whether the entry beside an addition is now that of another model file, to which the addition says nothing."""
    path = _beside(change)
    try:
        hashes = [each["model"]["weights_sha256"] for each in (_was(root, before, path), _now(root, path))]
    except UNREADABLE:
        return False
    return bool(hashes[0] != hashes[1])


def _only_computed_again(root: Path, before: Tree, change: Change) -> bool:
    """Whether only the results of an addition changed, beside an entry with new evidence (and new clean counts)."""
    path = _beside(change)
    try:
        was, now = _was(root, before, change.path), _now(root, change.path)
        hashes = [each["evidence"]["sha256"] for each in (_was(root, before, path), _now(root, path))]
    except UNREADABLE:
        return False
    return bool(hashes[0] != hashes[1] and {**was, "results": None} == {**now, "results": None})


def _was(root: Path, before: Tree, path: str) -> Any:
    (data,) = blobs(root, [before[path][1]])
    return schemas.parse(data.decode("utf-8"), source=f"{path} before")


def _now(root: Path, path: str) -> Any:
    return schemas.parse((root / path).read_text("utf-8"), source=path)


def _history(root: Path, before: Tree, change: Change) -> list[str]:
    """An entry that was listed keeps its scores, or says in its history why they changed."""
    try:
        was, now = _was(root, before, change.path), _now(root, change.path)
        old, new = _scores(was), _scores(now)
        told = list(was.get("history", [])), list(now["history"])
        tiers = was["claim"]["tier"], now["claim"]["tier"]
        _ = was["model"]["weights_sha256"], now["model"]["weights_sha256"], now["claim"]["submitter"]
    except UNREADABLE as error:
        return [f"{change.path}: it cannot be compared with what was published: {error}"]
    if told[1][: len(told[0])] != told[0]:
        return [f"{change.path}: lines of its history were changed or removed: restore them, add new ones below."]
    differences = [
        f"{where} {value:g} -> {'gone' if where not in new else format(new[where], 'g')}"
        for where, value in old.items()
        if new.get(where) != value
    ]
    if tiers == ("checked", "reported"):
        differences.insert(0, "its evidence is gone")
    if tiers == ("checked", "checked") and was["model"]["weights_sha256"] != now["model"]["weights_sha256"]:
        differences.insert(0, "other weights")
    if was["claim"]["submitter"] not in (None, now["claim"]["submitter"]):
        differences.insert(0, "another submitter")
    if differences and len(told[1]) == len(told[0]):
        return [
            f"{change.path}: published scores changed or vanished ({'; '.join(differences[:4])}) without a line in "
            '`history`: add {"date": ..., "text": why} at its end.'
        ]
    return []


def _scores(entry: Mapping[str, Any]) -> dict[str, float]:
    found = {f"clean {metric}": entry["clean"][metric] for metric in ("aacc", "miou")}
    for row in entry["results"]:
        for metric in ("aacc", "miou"):
            where = f"{metric} at ε = {row['strength']:g}/255"
            found[where] = row[metric]
            for attack, scores in (row.get("per_loss") or {}).items():
                found[f"{attack} {where}"] = scores[metric]
    known = {where: value for where, value in found.items() if value is not None}
    if wrong := [where for where, value in known.items() if not isinstance(value, int | float)]:
        raise TypeError(f"{wrong[0]} is no number")
    return known


def _foreign(root: Path, before: Tree, found: Sequence[Change], author: str) -> list[str]:
    """Files of others that were changed: only who submitted a model changes it. Anybody may measure a reported one."""
    texts = []
    for change in found:
        if change.status == "A" or change.model is None or change.kind == "beside":
            continue
        owners = _owners(root, before, change.model)
        if account(author) in owners or _is_measured(root, before, change):
            continue
        who = ", ".join(sorted(owners)) or "nobody who could be asked"
        texts.append(
            f"{change.path}: {change.model} was submitted by {who}, not by {author}: take the change out, "
            "and open an issue (a wrong row)."
        )
    return texts


def _owners(root: Path, before: Tree, model: str) -> Collection[str]:
    """Accounts that submitted the entries of a model."""
    pattern = re.compile(rf"entries/[^/]+/[^/]+/{re.escape(model)}\.json")
    found = set()
    for path in filter(pattern.fullmatch, before):
        try:
            submitter = _was(root, before, path)["claim"]["submitter"]
        except UNREADABLE:
            continue
        if isinstance(submitter, str):
            found.add(account(submitter))
    return found


def _is_measured(root: Path, before: Tree, change: Change) -> bool:
    """Whether a reported entry is replaced, or its card only pins the weights that were measured."""
    try:
        if change.kind == "entry":
            path = change.path.removesuffix(".parquet").removesuffix(".json") + ".json"
            return bool(_was(root, before, path)["claim"]["tier"] == "reported")
        was, now = _was(root, before, change.path), _now(root, change.path)
    except UNREADABLE:
        return False
    return was["sha256"] is None and {**was, "sha256": now["sha256"]} == now


def card_changes(root: Path, base: str, found: Sequence[Change]) -> list[str]:
    """For people who review: which fields of cards that were listed change."""
    before, texts = tree(root, base), []
    for change in found:
        if change.kind == "card" and change.status == "M" and change.path.endswith(".json"):
            was, now = _was(root, before, change.path), _now(root, change.path)
            fields = [key for key in {**was, **now} if was.get(key) != now.get(key)]
            texts.append(f"{change.path}: {', '.join(fields)}")
    return texts
