"""``smp:<repo or ./folder>`` and ``smp:<architecture>``: segmentation_models_pytorch.

- A repository of the hub, or a folder that ``save_pretrained`` wrote.
- An architecture (unet, unetplusplus, fpn, pspnet, deeplabv3plus, segformer, upernet, ...) with ``encoder_name``,
  ``classes``, ``weights=<path>`` with ``key``, and what else its constructor takes. ``encoder_weights`` is none unless
  asked for.

Images are normalised as the pretrained encoder's were: as SMP says for the ``encoder_weights`` in the configuration.
Where the configuration has none, ImageNet's mean and standard deviation are taken, and a warning says so; the option
``normalize`` (``imagenet``, ``half`` or ``none``) decides otherwise. Sizes are padded to a multiple of the encoder's
output stride and the logits cropped. An activation after the last layer is left out: attacks need logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from segbench.errors import ModelError, unknown_name
from segbench.models.normalization import IMAGENET, Normalization
from segbench.models.sources.hub import fetch, folder_of, weights_in
from segbench.models.sources.image_model import (
    ImageModel,
    check_weights_options,
    load_weights_file,
    log,
    normalization_option,
    require,
    warn_random,
    whole_number,
)
from segbench.models.sources.names import LibrarySource, Options

LIBRARY = "segmentation_models_pytorch"
MULTIPLE = 32  # of sizes, where the encoder does not say
# Encoders and their weights that SMP lists with ImageNet's mean and standard deviation, on RGB in [0,1]. Of others it
# reads them from the hub.
IMAGENET_ENCODERS = ("densenet", "mit_b", "mobilenet_v2", "resnet", "resnext", "se_", "senet", "vgg")
IMAGENET_WEIGHTS = ("imagenet", "instagram", "ssl", "swsl")


class FirstOutput(nn.Module):
    """The masks of a model that may also give image labels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N,3,H,W) to logits (N,K,H,W)."""
        output = self.network(x)
        logits: Tensor = output[0] if isinstance(output, tuple) else output
        return logits


def build(source: LibrarySource, *, num_classes: int | None, offline: bool) -> ImageModel:
    """A saved model of SMP, or an architecture; ModelError says what is missing or does not fit."""
    name, revision, options = source.name, source.revision, source.options
    smp = require(LIBRARY)
    if "/" in name or name.startswith((".", "~")) or Path(name).is_dir():
        if unknown := [key for key in options if key != "normalize"]:
            raise ModelError(f"A saved model takes no option but normalize, not {unknown[0]}. Leave it out.")
        return _saved(smp, name, revision, options, offline)
    if revision is not None:
        raise ModelError(f"An architecture of SMP has no revision {revision!r}. Leave out @ and what follows.")
    return _architecture(smp, name, options, num_classes, offline)


def _saved(smp: Any, name: str, revision: str | None, options: Options, offline: bool) -> ImageModel:
    folder = folder_of(name, revision, offline=offline)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        class_name = config.pop("_model_class")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{name} was not saved by SMP: its config.json has no _model_class. A model of transformers: hf:{name}"
        ) from error
    classes_of = {known.__name__: known for known in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if class_name not in classes_of:
        raise ModelError(unknown_name("architecture of SMP:", str(class_name), classes_of))
    if config.get("activation") is not None:
        log.warning("%s ends in the activation %r; it is left out, for logits.", name, config["activation"])
    trained_with = config.get("encoder_weights")
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    network = _built(classes_of[class_name], {**arguments, "encoder_weights": None, "activation": None}, name)
    files = weights_in(folder)
    if len(files) != 1:
        raise ModelError(f"{name} has its weights in {len(files)} files; SMP writes one. Save it with save_pretrained.")
    load_weights_file(network, {"weights": str(files[0])})
    return _wrapped(smp, network, name, config.get("encoder_name"), trained_with, options, offline)


def _architecture(smp: Any, name: str, options: Options, num_classes: int | None, offline: bool) -> ImageModel:
    known = smp.MODEL_ARCHITECTURES_MAPPING
    if name.lower() not in known:
        raise ModelError(
            f"{unknown_name('architecture of SMP:', name.lower(), known)} "
            "A repository is owner/name, a folder begins with ./"
        )
    check_weights_options(options)
    if options.get("activation") is not None:
        raise ModelError("Attacks need logits. Leave out activation=")
    classes = whole_number(options, "classes", num_classes)
    if classes is None:
        raise ModelError(f"smp:{name} does not say how many classes. Add ?classes=21")
    arguments: dict[str, Any] = {
        key: value for key, value in options.items() if key not in ("key", "normalize", "weights")
    }
    arguments = {"encoder_name": "resnet34", "encoder_weights": None, **arguments, "classes": classes}
    encoder, pretrained = arguments["encoder_name"], arguments["encoder_weights"]
    _known_encoder(smp, encoder)
    if pretrained is not None and "weights" not in options:
        _fetch_encoder(smp, encoder, pretrained, offline)
    elif pretrained is not None:
        arguments["encoder_weights"] = None  # those of the file come instead
    network = _built(known[name.lower()], arguments, name)
    if "weights" in options:
        load_weights_file(network, options)
    else:
        warn_random(f"smp:{name}")
    return _wrapped(smp, network, name, encoder, pretrained, options, offline)


def _built(factory: Any, arguments: dict[str, Any], name: str) -> nn.Module:
    if arguments.get("in_channels", 3) != 3:
        raise ModelError(f"{name} takes {arguments['in_channels']} channels; images have 3.")
    try:
        network: nn.Module = factory(**arguments)
    except Exception as error:  # what the arguments break is not known here
        text = str(error).strip("'\"").split(", supported encoders")[0]
        raise ModelError(f"SMP cannot build {name} from these arguments: {type(error).__name__}: {text}") from error
    return network


def _wrapped(
    smp: Any, network: Any, name: str, encoder: Any, pretrained: Any, options: Options, offline: bool
) -> ImageModel:
    if "normalize" in options:
        statistics, bgr = normalization_option(options, IMAGENET), False
    elif pretrained is None:
        log.warning(
            "smp:%s does not say how its images were normalised: ImageNet's mean and standard deviation are taken. If "
            "they were others, add ?normalize=none (or half).", name,
        )  # fmt: skip
        statistics, bgr = IMAGENET, False
    else:
        statistics, bgr = _preprocessing(smp, str(encoder), pretrained, offline)
    classes = [part.out_channels for part in network.segmentation_head.modules() if isinstance(part, nn.Conv2d)]
    stride = getattr(network.encoder, "output_stride", MULTIPLE)
    return ImageModel(
        FirstOutput(network),
        statistics,
        num_classes=classes[-1] if classes else None,
        multiple=stride if isinstance(stride, int) else MULTIPLE,
        bgr=bgr,
    )


def _preprocessing(smp: Any, encoder: str, pretrained: Any, offline: bool) -> tuple[Normalization, bool]:
    """Mean and standard deviation for [0,1] in the order of the encoder's channels, and whether that is BGR."""
    if pretrained in IMAGENET_WEIGHTS and encoder.startswith(IMAGENET_ENCODERS):
        return IMAGENET, False
    try:
        if not encoder.startswith("tu-"):
            _fetch_encoder(smp, encoder, pretrained, offline)
        found = smp.encoders.get_preprocessing_params(encoder, pretrained=pretrained)
    except Exception as error:  # an unknown name, the hub's client
        raise ModelError(
            f"How images are normalised for the encoder {encoder!r} with the weights {pretrained!r} cannot be read: "
            f"{error} Or say it yourself: add ?normalize=imagenet (or half, none)."
        ) from error
    scale = float(found["input_range"][1])
    statistics = [value / scale for value in found["mean"]], [value / scale for value in found["std"]]
    return statistics, found["input_space"] == "BGR"


def _fetch_encoder(smp: Any, encoder: Any, pretrained: Any, offline: bool) -> None:
    """Puts the pretrained encoder into the hub's cache, where SMP finds it."""
    if str(encoder).startswith("tu-"):
        if offline:
            raise ModelError(f"The weights of {encoder} may need the network. Leave out encoder_weights, or offline.")
        return
    _known_encoder(smp, encoder)
    published = smp.encoders.encoders[encoder]["pretrained_settings"]
    if pretrained not in published:
        raise ModelError(unknown_name(f"encoder_weights of {encoder}:", str(pretrained), published))
    settings = published[pretrained]
    if "repo_id" in settings:  # before SMP 0.5 they are addresses
        fetch(settings["repo_id"], settings["revision"], offline=offline)


def _known_encoder(smp: Any, encoder: Any) -> None:
    known = smp.encoders.encoders
    if encoder not in known and not str(encoder).startswith(("tu-", "timm-")):
        near = unknown_name("encoder of SMP:", str(encoder), known).split(" Known: ")[0]
        raise ModelError(f"{near} All: segmentation_models_pytorch.encoders.get_encoder_names(), and tu-<timm model>.")
