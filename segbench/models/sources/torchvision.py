"""``torchvision:<name>[@WEIGHTS]``: segmentation models of torchvision.

The weights are the model's ``DEFAULT`` ones, or those named after ``@``, or random ones after ``@none``. Mean and
standard deviation are those of the weights' transforms; what the transforms resize is not done. The auxiliary head is
loaded with the weights, its output is not used.

Options: ``weights=<path>``, with ``key`` and ``num_classes``, for weights of one's own, and ``normalize``
(``imagenet``, ``half`` or ``none``) instead of ImageNet's mean and standard deviation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segbench.errors import ModelError, unknown_name
from segbench.models.normalization import IMAGENET
from segbench.models.sources.image_model import (
    ImageModel,
    check_options,
    check_weights_options,
    load_state,
    log,
    normalization_option,
    read_options,
    require,
    warn_random,
    whole_number,
)
from segbench.models.sources.names import LibrarySource
from segbench.models.weights import read_weights

VOC_CLASSES = 21


class MainOutput(nn.Module):
    """The main one of a torchvision model's outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N,3,H,W) to logits (N,K,H,W)."""
        logits: Tensor = self.network(x)["out"]
        return logits


def build(source: LibrarySource, *, num_classes: int | None, offline: bool) -> ImageModel:
    """A segmentation model of torchvision; ModelError says what is unknown or cannot be had."""
    name, revision, options = source.name, source.revision, source.options
    check_options(options, ("key", "num_classes", "normalize", "weights"), library="torchvision")
    check_weights_options(options)
    models = require("torchvision.models")
    known = models.list_models(module=models.segmentation)
    if name not in known:
        raise ModelError(unknown_name("segmentation model of torchvision:", name, known))
    if "weights" in options and revision not in (None, "none"):
        raise ModelError(f"torchvision:{name} has two weights, @{revision} and weights=. Leave out one of them.")
    if revision == "none" or "weights" in options:
        classes = whole_number(options, "num_classes", num_classes or VOC_CLASSES) or VOC_CLASSES
        state = read_options(options) if "weights" in options else {}
        network = _build(models, name, classes, any("aux_classifier." in key for key in state))
        if "weights" in options:
            load_state(network, state, source=str(options["weights"]))
        else:
            warn_random(f"torchvision:{name}@none")
        return ImageModel(MainOutput(network), normalization_option(options, IMAGENET), num_classes=classes)
    if "num_classes" in options:
        raise ModelError("num_classes is for weights of your own (weights=<path>) or random ones (@none).")
    weights = _weights(models, name, revision)
    preset = weights.transforms()
    state = _download(weights, name, offline=offline)
    classes = len(weights.meta["categories"])
    network = _build(models, name, classes, any(key.startswith("aux_classifier.") for key in state))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"{_cached(weights)} does not fit torchvision:{name}: {str(error).splitlines()[0]} Delete it and try again."
        ) from error
    return ImageModel(
        MainOutput(network), normalization_option(options, (preset.mean, preset.std)), num_classes=classes
    )


def _build(models: Any, name: str, classes: int, auxiliary: bool) -> nn.Module:
    arguments = {"aux_loss": True} if auxiliary else {}
    network: nn.Module = models.get_model(name, weights=None, weights_backbone=None, num_classes=classes, **arguments)
    return network


def _weights(models: Any, name: str, revision: str | None) -> Any:
    published = models.get_model_weights(name)
    if revision is None:
        return published.DEFAULT
    if revision not in published.__members__:
        raise ModelError(unknown_name(f"weights of torchvision:{name}:", revision, ["none", *published.__members__]))
    return published[revision]


def _cached(weights: Any) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / str(weights.url).rpartition("/")[2]


def _download(weights: Any, name: str, *, offline: bool) -> dict[str, Tensor]:
    """The published weights from torch.hub's folder, downloaded into it if they are not there."""
    path = _cached(weights)
    if not path.is_file():
        if offline:
            raise ModelError(
                f"The weights {path.name} of torchvision:{name} are not on this machine. While online: "
                f"python -c \"import torch; torch.hub.load_state_dict_from_url('{weights.url}', weights_only=True)\""
            )
        log.info("Downloading %s", weights.url)
        try:
            weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except Exception as error:  # urllib, ssl, a hash that differs, a full disk
            raise ModelError(
                f"The weights of torchvision:{name} cannot be downloaded: {type(error).__name__}: {error}. "
                f"Download {weights.url} elsewhere and put it into {path.parent}."
            ) from error
    state: dict[str, Tensor] = dict(read_weights(path))
    return state
