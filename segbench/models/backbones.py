"""Robust ImageNet classifiers as the start of training.

PIR-AT starts from an l_inf-robust ImageNet classifier (SEA.md, section 8; Croce, Singh, Hein, "Towards Reliable
Evaluation and Fast Training of Robust Semantic Segmentation Models", ECCV 2024, Table 5).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from segbench import downloads
from segbench.errors import ModelError, UnknownNameError, unknown_name
from segbench.models.classifiers import BackboneReport, Family, backbone_state
from segbench.models.normalization import NORMALIZATIONS, Normalization


@dataclass(frozen=True)
class RobustBackbone:
    """A published robust classifier.

    Attributes:
        family: which of our backbones it fits.
        url: of the file; None where it has no stable one.
        clean: ImageNet accuracy in percent; ``robust`` under l_inf attacks with ε = 4/255.
        normalization: by which the classifier normalises in its code, so that the file does not hold it; None where it
            takes images in [0,1] or the file holds it.
        source: where it comes from.
    """

    name: str
    family: Family
    url: str | None
    clean: float
    robust: float
    normalization: Normalization | None
    source: str


def _read(fields: Mapping[str, Any]) -> RobustBackbone:
    known = fields["normalization"]
    return RobustBackbone(**{**fields, "normalization": NORMALIZATIONS[known] if known else None})


BACKBONES: Mapping[str, RobustBackbone] = {
    fields["name"]: _read(fields)
    for fields in json.loads(files("segbench.models").joinpath("backbones.json").read_bytes())
}


def load_backbone(
    model: nn.Module, state_dict: Mapping[str, Any], *, source: str, normalization: Normalization | None = None
) -> BackboneReport:
    """Copies a classifier's weights into the backbone of ``model``; everything else keeps its initialisation.

    ``state_dict`` may be a checkpoint; ``source`` names the file in messages; ``normalization`` as in
    `RobustBackbone`. Keys that nobody knows are logged. ModelError if the classifier does not fit.
    """
    report = backbone_state(model, state_dict, normalization=normalization)
    own = model.state_dict()
    problems = [f"missing {key}" for key in report.missing] + [f"surplus {key}" for key in report.surplus]
    problems += [
        f"{key} is {tuple(value.shape)}, the model has {tuple(own[key].shape)}"
        for key, value in report.state.items()
        if value.shape != own[key].shape
    ]
    if problems:
        listed = "\n  ".join(sorted(problems)[:10])
        raise ModelError(
            f"The weights of {source} do not fit the backbone ({len(problems)} keys):\n  {listed}\n"
            f"Likely cause: {_likely_cause(report)}"
        )
    model.load_state_dict({**own, **report.state})
    if report.unknown:
        logging.getLogger("segbench").warning(
            "%s: %d keys are not known and were left out: %s",
            source, len(report.unknown), ", ".join(report.unknown[:10]),
        )  # fmt: skip
    return report


def fetch_backbone(name: str, *, offline: bool = False, progress: bool = True) -> Path:
    """Fetches the file of a robust classifier; its hash is shown and remembered."""
    backbone = backbone_named(name)
    if backbone.url is None:
        raise ModelError(
            f"{name} has no link of its own ({backbone.source}). Fetch it there, and give its file; to segbench train: "
            "--set backbone=FILE backbone_normalization=imagenet"
        )
    return downloads.fetch(
        [{"type": "url", "url": backbone.url}],
        name=f"backbone_{name}",
        sha256=None,
        offline=offline,
        progress=progress,
        command="the same without --offline",
    ).path


def backbone_named(name: str) -> RobustBackbone:
    """One of `BACKBONES`; UnknownNameError if there is none of that name."""
    if name not in BACKBONES:
        raise UnknownNameError(unknown_name("backbone", name, BACKBONES))
    return BACKBONES[name]


def _likely_cause(report: BackboneReport) -> str:
    if len(report.missing) > len(report.state):
        names = f" Unknown keys: {', '.join(report.unknown[:3])}, ..." if report.unknown else ""
        return f"a classifier of another family, or names that segbench does not know.{names}"
    if report.surplus or report.missing:
        return "a classifier of another depth or stem. Correct the architecture's arguments, or take another file."
    return "a classifier of other widths, or with another stem. Correct the architecture's arguments."
