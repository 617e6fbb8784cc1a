"""What the libraries' models share: normalisation, padding and resizing around a network, options, weights."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbench.errors import ModelError, unknown_name
from segbench.models.architectures.upernet import resize
from segbench.models.checkpoints import PREFIXES, fit_keys, unwrap
from segbench.models.normalization import IMAGENET, NORMALIZATIONS, Normalization
from segbench.models.sources.names import Options
from segbench.models.weights import check_tensor, load_weights, read_weights

log = logging.getLogger("segbench")


class ImageModel(nn.Module):
    """A library's network as the protocol needs it: images in [0,1] to logits at image size.

    The image is normalised, padded at the bottom and on the right with zeros (the mean colour) where the network needs
    it; the logits are resized bilinearly to the padded size and cropped.

    Args:
        network: normalised images (N,3,H',W') to logits (N,K,h,w).
        statistics: mean and standard deviation of each channel, in the order in which the network wants the channels.
        num_classes: K, if it is known.
        multiple: height and width that the network gets are multiples of this.
        square: height and width that the network gets are equal.
        bgr: the network wants blue first.
        reduced_labels: the network was trained with labels reduced by one, so that background has no class.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        statistics: Normalization,
        *,
        num_classes: int | None,
        multiple: int = 1,
        square: bool = False,
        bgr: bool = False,
        reduced_labels: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.num_classes = num_classes
        self.multiple = multiple
        self.square = square
        self.bgr = bgr
        self.reduced_labels = reduced_labels
        mean, std = (torch.tensor(list(values), dtype=torch.float32).reshape(1, 3, 1, 1) for values in statistics)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def extra_repr(self) -> str:
        """The settings that are not in the state dict; they are part of a model's identity."""
        names = ("num_classes", "multiple", "square", "bgr", "reduced_labels")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,3,H,W) in [0,1] to logits (N,K,H,W)."""
        height, width = images.shape[-2:]
        x = images.flip(1) if self.bgr else images
        x = (x - self.mean) / self.std
        high, wide = (size + -size % self.multiple for size in (height, width))
        if self.square:
            high = wide = max(high, wide)
        x = F.pad(x, (0, wide - width, 0, high - height))
        logits: Tensor = self.network(x)
        if logits.shape[-2:] != x.shape[-2:]:
            logits = resize(logits, x.shape[-2:])
        return logits[..., :height, :width]


class WithBackground(nn.Module):
    """A model without a background class on labels that have one: channel 0 is background and is never predicted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,3,H,W) in [0,1] to logits (N,K+1,H,W)."""
        logits: Tensor = self.model(images)
        return torch.cat([logits.detach().amin(dim=1, keepdim=True) - 1, logits], dim=1)


def class_name(module: nn.Module) -> str:
    """The name of a model's class, behind what an adapter puts around it."""
    while type(module).__module__.startswith(__package__):
        inner = getattr(module, "model" if isinstance(module, WithBackground) else "network", None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    return type(module).__name__


def with_background(module: nn.Module) -> nn.Module:
    """Puts a background channel before the classes of a model that was trained with labels reduced by one.

    Its logit is the lowest of the others minus 1, a constant for the gradient: background is never predicted, and
    losses on background pixels stay finite.
    """
    return WithBackground(module)


def require(library: str) -> Any:
    """Imports a library of the extra ``hub-models``; ModelError if it is not installed, or broken."""
    try:
        return importlib.import_module(library)
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"This model needs {library}, which cannot be imported: {error}. pip install 'segbench[hub-models]'"
        ) from error


def normalization_option(options: Options, default: Normalization = IMAGENET) -> Normalization:
    """What the option ``normalize`` says, else ``default``."""
    if "normalize" not in options:
        return default
    name = str(options["normalize"]).lower()
    if name not in NORMALIZATIONS:
        raise ModelError(unknown_name("normalize", name, NORMALIZATIONS))
    return NORMALIZATIONS[name]


def check_options(options: Options, known: Sequence[str], *, library: str) -> None:
    """Refuses options that a library does not take, and names the nearest known ones."""
    for key in options:
        if key not in known:
            raise ModelError(unknown_name(f"option of {library}:", key, known))


def whole_number(options: Options, key: str, default: int | None) -> int | None:
    """A positive whole number among the options."""
    value = options.get(key, default)
    if value is not None and (type(value) is not int or value < 1):
        raise ModelError(f"{key} must be a whole number from 1, not {value!r}.")
    return value


def check_weights_options(options: Options) -> None:
    """Refuses the option ``key``, which names an entry of a weights file, without such a file."""
    if "key" in options and "weights" not in options:
        raise ModelError(f"key={options['key']} names an entry of a weights file. Add weights=<path>, or leave it out.")


def load_weights_file(module: nn.Module, options: Options) -> None:
    """Loads the option ``weights`` strictly: safetensors, or what ``torch.save`` wrote (nothing in it is executed)."""
    load_state(module, read_options(options), source=str(options["weights"]))


def read_options(options: Options) -> dict[str, Tensor]:
    """The weights that the options ``weights``, a path, and ``key``, an entry of that file, name."""
    key = options.get("key")
    return unwrap(read_weights(Path(str(options["weights"])).expanduser()), None if key is None else str(key))


def load_state(module: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Copies unwrapped weights into a module.

    The prefixes that all of their names share are taken off, but not those that all of the module's own names have.
    """
    own = module.state_dict()
    prefixes = tuple(prefix for prefix in PREFIXES if not all(name.startswith(prefix) for name in own))
    state = fit_keys(state, own.keys(), prefixes)
    for key in own.keys() & state.keys():
        check_tensor(key, state[key], own[key], source=source)
    try:
        module.load_state_dict(state)  # a library's module may rename keys of its older versions here
    except RuntimeError:
        load_weights(module, state, source=source)  # lists what does not fit


def warn_random(spec: str) -> None:
    """Says that a model has random weights."""
    log.warning("%s has random weights, its decoder too: its scores mean nothing. Add ?weights=<path>.", spec)
