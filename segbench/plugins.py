"""Models of other packages: entry points of the group ``segbench.models``.

A package says in its metadata ``my_model = my_package.models:build``, and ``segbench.load_model("my_model")`` calls
``build()``. Here only metadata is read: nothing of the package is imported, and torch is not needed.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections import defaultdict
from dataclasses import dataclass

GROUP = "segbench.models"

_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,79}")
_VALUE = re.compile(r"\w+(?:\.\w+)*:\w+(?:\.\w+)*")
_log = logging.getLogger("segbench")


@dataclass(frozen=True)
class Plugin:
    """A model that another package offers.

    Attributes:
        name: the model's id.
        value: ``package.module:function``.
        package: the distribution's name, as in ``pip install``.
        version: the distribution's version.
    """

    name: str
    value: str
    package: str
    version: str


def list_plugins() -> list[Plugin]:
    """All plugins of this environment by name, from metadata alone.

    Names that are no ids, names that two packages claim and broken metadata are told as warnings, and left out.
    """
    claims = defaultdict(list)
    for plugin in _claimed():
        claims[plugin.name].append(plugin)
    plugins = []
    for name, claimants in sorted(claims.items()):
        packages = sorted({plugin.package for plugin in claimants})
        if len(claimants) == 1:
            plugins.append(claimants[0])
        elif len(packages) == 1:
            _log.warning("The package %s names the model %r twice; it is left out.", packages[0], name)
        else:
            _log.warning(
                "The packages %s both offer a model %r; it is left out. Remove one of them: pip uninstall %s",
                " and ".join(packages), name, packages[-1],
            )  # fmt: skip
    return plugins


def get_plugin(name: str) -> Plugin | None:
    """The plugin of that name, or None."""
    return next((plugin for plugin in list_plugins() if plugin.name == name), None)


def _claimed() -> list[Plugin]:
    """What each package claims. Packages are read one by one, so that a broken one spoils none of the others."""
    found: list[Plugin] = []
    seen = set()
    for distribution in importlib.metadata.distributions():
        package = f"the package in {getattr(distribution, '_path', 'an unknown place')}"
        try:
            text = distribution.read_text("entry_points.txt")
            if not text or GROUP not in text:
                continue
            if not (name := distribution.metadata["Name"]):
                raise ValueError("it has no name")
            package, version = name, distribution.version or "unknown"
            key = re.sub(r"[-_.]+", "-", package).lower()
            if key in seen:  # the first on sys.path is the one that is imported
                continue
            seen.add(key)
            offered = [entry for entry in distribution.entry_points if entry.group == GROUP]
        except Exception as error:  # noqa: BLE001  (metadata of strangers may be broken in any way)
            _log.warning(
                "The metadata of %s cannot be read (%s: %s); its models are left out. Install it again.",
                package, type(error).__name__, error,
            )  # fmt: skip
            continue
        for entry in offered:
            value = re.sub(r"\s*\[.*\]\s*$", "", entry.value).replace(" ", "")
            if not _NAME.fullmatch(entry.name):
                _log.warning(
                    "The package %s offers a model %r, which is no id; it is left out. An id has lower case letters, "
                    "digits and underscores, at most 80.", package, entry.name,
                )  # fmt: skip
            elif not _VALUE.fullmatch(value):
                _log.warning(
                    "The package %s offers the model %r as %r; it is left out. It must be package.module:function.",
                    package, entry.name, entry.value,
                )  # fmt: skip
            else:
                found.append(Plugin(entry.name, value, package, version))
    return found
