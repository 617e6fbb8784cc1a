"""Model cards: one JSON file per model, ``model_zoo/<dataset>/<id>.json``."""

from __future__ import annotations

import dataclasses
import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segbench import content, downloads, schemas
from segbench.errors import ContentError, UnknownNameError, unknown_name

CARD_VERSION = 1


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model; the fields are those of ``schemas/card.schema.json``.

    Attributes:
        id: ``<method>_<backbone>_<dataset>``.
        architecture: ``{"name", "arguments"}`` for `segbench.models.architectures.build`.
        backbone: in the words of its paper; None if it has none, or nobody said.
        sources: where the weights are, tried in order: ``package`` {file} beside the card, ``hub`` {repo, revision,
            file}, ``url`` {url}; none if the weights are not published.
        sha256: of the weights file; None while nobody has pinned it.
        training: method, ε of the training attack, steps, epochs, initialisation, extra data, recipe and log.
        expected: clean aAcc and mIoU in [0,1] on the data set.
        path: the file that the card was read from; None when it was not read.
    """

    schema_version: int
    id: str
    title: str
    architecture: dict[str, Any]
    backbone: str | None
    dataset: str
    num_classes: int
    parameters: int | None
    sources: list[dict[str, Any]]
    sha256: str | None
    licence: str | None
    paper: dict[str, Any] | None
    training: dict[str, Any]
    preprocessing: str
    expected: dict[str, Any] | None
    path: Path | None = dataclasses.field(default=None, compare=False, repr=False)

    def document(self) -> dict[str, Any]:
        """The card as JSON data."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "path"}

    def to_json(self) -> str:
        """The card as its file's text."""
        return schemas.dump(self.document())


def read_card(path: Path) -> ModelCard:
    """A card from its file.

    Raises:
        ContentError: missing, not JSON, or against the schema; names the file and the field.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ContentError(f"Cannot read the card {path}: {error}") from error
    document = schemas.parse(text, source=str(path))
    if found := schemas.problems("card", document):
        raise ContentError(f"The card {path} is not valid:\n  " + "\n  ".join(found[:10]))
    return ModelCard(**document, path=path)


def fetch_weights(card: ModelCard, *, offline: bool = False, progress: bool = True) -> downloads.Fetched:
    """The weights file of a card, downloaded if need be, its hash checked.

    Raises:
        DownloadError: no source gives it; each failure is told, and what to do.
    """
    known = card.path is None or card.path.parent.parent == content.folder("model_zoo")
    return downloads.fetch(
        card.sources,
        name=card.id,
        sha256=card.sha256,
        folder=_folder(card),
        offline=offline,
        progress=progress,
        command=f"segbench show {card.id if known else card.path} --download",
    )


def cached_weights(card: ModelCard) -> Path | None:
    """Where the weights file of a card is on this machine, None if it is not; its hash is not checked."""
    return downloads.cached(card.sources, name=card.id, folder=_folder(card)) if card.sources else None


def _folder(card: ModelCard) -> Path | None:
    return card.path.parent if card.path else None


def card_paths(root: Path | None = None) -> list[Path]:
    """All card files of a model zoo, sorted; the installed one by default."""
    return sorted((root or content.folder("model_zoo")).glob("*/*.json"))


def list_models(
    pattern: str = "*",
    *,
    dataset: str | None = None,
    architecture: str | None = None,
    method: str | None = None,
    available: bool = False,
) -> list[ModelCard]:
    """Cards sorted by id, all of them or those that a filter leaves.

    Args:
        pattern: shell pattern of the id; this and the next three ignore case.
        dataset: shell pattern of the data set.
        architecture: part of the architecture's name, or of a word of the title, where the backbone is named.
        method: shell pattern of the training method.
        available: only models whose weights can be had.

    >>> [card.id for card in list_models("clean_*_shapes")]
    ['clean_convnext_mini_shapes']
    >>> [card.id for card in list_models(architecture="segmenter", available=True)]
    ['pirat_vit_mini_shapes', 'pirat_vit_s_ade20k']
    """
    paths = [path for path in card_paths() if fnmatch.fnmatchcase(path.stem, pattern.lower())]
    wanted = [
        card
        for card in map(read_card, paths)
        if _fits(dataset, card.dataset)
        and _fits(architecture and f"*{architecture}*", card.architecture["name"], *card.title.split())
        and _fits(method, card.training["method"])
        and (card.sources or not available)
    ]
    return sorted(wanted, key=lambda card: card.id)


def _fits(pattern: str | None, *texts: str) -> bool:
    return pattern is None or any(fnmatch.fnmatchcase(text.lower(), pattern.lower()) for text in texts)


def get_card(model_id: str) -> ModelCard:
    """The card of that id.

    Raises:
        ModelError: unknown id; the nearest ones are named.
        ContentError: the card is damaged.
    """
    paths = {path.stem: path for path in card_paths()}
    if model_id not in paths:
        raise UnknownNameError(unknown_name("model", model_id, paths) + " List them: segbench models")
    card = read_card(paths[model_id])
    if card.id != model_id:
        raise ContentError(f"The card {paths[model_id]} says it is {card.id!r}. Rename the file or correct `id`.")
    return card
