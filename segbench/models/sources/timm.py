"""``timm:<backbone>``: UPerNet on a backbone of timm, our architecture ``upernet_timm``.

Options: ``num_classes``, ``weights=<path>`` with ``key``, ``channels``, ``auxiliary_channels``, and ``normalize``:
``imagenet``, the default, is the mean and standard deviation that timm gives for the backbone; or ``none``.
"""

from __future__ import annotations

from torch import nn

from segbench.errors import ModelError
from segbench.models.architectures import build as build_architecture
from segbench.models.sources.image_model import (
    check_options,
    check_weights_options,
    load_weights_file,
    warn_random,
    whole_number,
)
from segbench.models.sources.names import LibrarySource


def build(source: LibrarySource, *, num_classes: int | None, offline: bool) -> nn.Module:
    """UPerNet on a backbone of timm; ModelError says what is unknown or does not fit."""
    name, revision, options = source.name, source.revision, source.options
    check_options(
        options, ("auxiliary_channels", "channels", "key", "normalize", "num_classes", "weights"), library="timm"
    )
    check_weights_options(options)
    if revision is not None:
        raise ModelError(f"A backbone of timm has no revision {revision!r}. Leave out @ and what follows.")
    classes = whole_number(options, "num_classes", num_classes)
    if classes is None:
        raise ModelError(f"timm:{name} does not say how many classes. Add ?num_classes=21")
    arguments = {key: value for key, value in options.items() if key not in ("key", "num_classes", "weights")}
    arguments.setdefault("normalize", "imagenet")
    if arguments["normalize"] == "none":
        arguments["normalize"] = None
    try:
        module = build_architecture("upernet_timm", num_classes=classes, backbone=name, **arguments)
    except ModelError as error:
        raise ModelError(str(error).replace("Correct `architecture.arguments`.", "Correct the spec.")) from error
    if "weights" in options:
        load_weights_file(module, options)
    else:
        warn_random(f"timm:{name}")
    return module
