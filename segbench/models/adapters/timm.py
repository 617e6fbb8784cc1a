"""``timm:<backbone>``: UPerNet on a backbone of timm, our architecture ``upernet_timm``.

Options: ``num_classes``, ``weights=<path>``, ``channels``, ``auxiliary_channels``, and ``normalize``: ``imagenet``, the
default, is the mean and standard deviation that timm gives for the backbone; or ``none``.
"""

from __future__ import annotations

from torch import nn

from segbench.errors import ModelError
from segbench.models.adapters.wrap import Options, load_file, only, warn_random, whole
from segbench.models.architectures import build


def load(name: str, *, revision: str | None, options: Options, num_classes: int | None, offline: bool) -> nn.Module:
    """UPerNet on a backbone of timm.

    Args:
        name: as in ``timm.list_models()``.
        revision: there is none.
        options: see the module.
        num_classes: K, if the options do not say.
        offline: nothing is ever downloaded.

    Raises:
        ModelError: unknown backbone, arguments or weights that do not fit.
    """
    only(options, ("auxiliary_channels", "channels", "normalize", "num_classes", "weights"), library="timm")
    if revision is not None:
        raise ModelError(f"A backbone of timm has no revision {revision!r}. Leave out @ and what follows.")
    classes = whole(options, "num_classes", num_classes)
    if classes is None:
        raise ModelError(f"timm:{name} does not say how many classes. Add ?num_classes=21")
    arguments = {key: value for key, value in options.items() if key not in ("num_classes", "weights")}
    arguments.setdefault("normalize", "imagenet")
    if arguments["normalize"] == "none":
        arguments["normalize"] = None
    try:
        module = build("upernet_timm", num_classes=classes, backbone=name, **arguments)
    except ModelError as error:
        raise ModelError(str(error).replace("Correct `architecture.arguments`.", "Correct the spec.")) from error
    if "weights" in options:
        load_file(module, str(options["weights"]))
    else:
        warn_random(f"timm:{name}")
    return module
