"""Robust ImageNet classifiers as the start of training.

PIR-AT starts from an l_inf-robust ImageNet classifier (SEA.md, section 8; Croce, Singh, Hein, "Towards Reliable
Evaluation and Fast Training of Robust Semantic Segmentation Models", ECCV 2024, Table 5).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from segbench import downloads
from segbench.errors import ModelError, UnknownNameError, unknown_name
from segbench.models.classifiers import BackboneReport, Family, backbone_state
from segbench.models.normalization import IMAGENET, Normalization
from segbench.models.weights import read_weights

__all__ = ["BACKBONES", "BackboneReport", "RobustBackbone", "backbone_state", "load_backbone", "robust_backbone"]


@dataclass(frozen=True)
class RobustBackbone:
    """A published robust classifier.

    Attributes:
        name: ``robust_<architecture>``.
        family: which of our backbones it fits.
        url: of the file; None where it has no stable one.
        clean: ImageNet accuracy in percent.
        robust: the same under l_inf attacks with ε = 4/255.
        normalization: mean and standard deviation by which the classifier normalises in its code, so that the file
            does not hold them; None where it takes images in [0,1] or the file holds them.
        source: where it comes from.
    """

    name: str
    family: Family
    url: str | None
    clean: float
    robust: float
    normalization: Normalization | None
    source: str


_DOWNLOADS = "https://nc.mlcloud.uni-tuebingen.de/public.php/dav/files"
_REVISITING = "Singh, Croce, Hein, Revisiting Adversarial Training for ImageNet, NeurIPS 2023"

BACKBONES: Mapping[str, RobustBackbone] = {
    backbone.name: backbone
    for backbone in (
        RobustBackbone(
            "robust_convnext_t",
            "convnext",
            f"{_DOWNLOADS}/BFLoMrMdn8iBk7Y/convnext_tiny_cvst_robust.pt",
            72.7,
            49.5,
            None,
            f"ConvNeXt-T+ConvStem; {_REVISITING}",
        ),
        RobustBackbone(
            "robust_convnext_s",
            "convnext",
            f"{_DOWNLOADS}/m3bAwNg4CJY4jrp/convnext_s_cvst_robust.pt",
            74.1,
            52.4,
            None,
            f"ConvNeXt-S+ConvStem; {_REVISITING}",
        ),
        RobustBackbone(
            "robust_vit_s",
            "vit",
            f"{_DOWNLOADS}/XLLnoCnJxp74Zqn/weights_vit_s.pt",
            69.2,
            44.4,
            None,
            f"ViT-S/16; {_REVISITING}",
        ),
        RobustBackbone(
            "robust_resnet50",
            "resnet",
            None,
            64.0,
            35.0,
            IMAGENET,
            "ResNet-50; RobustBench model Salman2020Do_R50 (Salman et al., Do Adversarially Robust ImageNet Models "
            "Transfer Better?, NeurIPS 2020)",
        ),
    )
}


def load_backbone(
    model: nn.Module, state_dict: Mapping[str, Any], *, source: str, normalization: Normalization | None = None
) -> BackboneReport:
    """Copies a classifier's weights into the backbone of ``model``; everything else keeps its initialisation.

    Keys that nobody knows are logged.

    Args:
        model: of `segbench.models.architectures`.
        state_dict: of an ImageNet classifier, or a checkpoint that holds one.
        source: name of the file for messages.
        normalization: see `RobustBackbone`.

    Raises:
        ModelError: as `backbone_state`; or the classifier's blocks are not those of the backbone, or of other shapes.
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


def robust_backbone(
    model: nn.Module, name: str, *, file: str | Path | None = None, offline: bool = False, progress: bool = True
) -> BackboneReport:
    """Fetches a robust classifier and copies it into the backbone of ``model``, the start of PIR-AT.

    The hash of the download is shown and remembered; another file behind the same link is refused later.

    Args:
        model: of `segbench.models.architectures`.
        name: of `BACKBONES`.
        file: a file on this machine instead of the download.
        offline: never use the network.
        progress: show a bar while downloading.

    Raises:
        UnknownNameError: no backbone of that name.
        ModelError, DownloadError: it cannot be had, or does not fit the backbone of ``model``.
    """
    path = Path(file) if file else fetch_backbone(name, offline=offline, progress=progress)
    normalization = backbone_named(name).normalization
    return load_backbone(model, read_weights(path), source=f"{name} ({path})", normalization=normalization)


def fetch_backbone(name: str, *, offline: bool = False, progress: bool = True) -> Path:
    """Fetches the file of a robust classifier; its hash is shown and remembered, as `robust_backbone` says.

    Raises:
        UnknownNameError: no backbone of that name.
        ModelError, DownloadError: it cannot be had.
    """
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
    """One of `BACKBONES`.

    Raises:
        UnknownNameError: no backbone of that name.
    """
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
