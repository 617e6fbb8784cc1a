"""A card: its weights, from wherever they are published, in its architecture."""

from __future__ import annotations

from torch import nn

from segbench import downloads
from segbench.cards import ModelCard, fetch_weights
from segbench.errors import ModelError
from segbench.models.architectures import WithoutDraws, build_described
from segbench.models.released import normalise_keys
from segbench.models.weights import load_weights, read_weights


def build(card: ModelCard, *, offline: bool, progress: bool) -> tuple[nn.Module, str]:
    """Fetches the weights of a card, checks their hash, builds its architecture and loads them; the hash too."""
    if not card.sources:
        raise ModelError(
            f"The weights of {card.id} are not published: its card has no source. "
            "Models with weights: segbench models --available"
        )
    fetched = fetch_weights(card, offline=offline, progress=progress)
    with WithoutDraws():  # the weights come from the file
        module = build_described(card.architecture, num_classes=card.num_classes, parameters=card.parameters)
    try:
        state = normalise_keys(card.architecture["name"], read_weights(fetched.path), module.state_dict().keys())
    except ModelError as error:
        if card.sha256 is not None or fetched.source["type"] == "package":
            raise
        pin = downloads.pin_file(card.id, fetched.source)
        raise ModelError(
            f"{error}\nIf the download went wrong: delete {fetched.path} and {pin}, and try again."
        ) from error
    load_weights(module, state, source=str(fetched.path))
    return module, fetched.sha256
