"""The manifest of a run: what is evaluated, and the run's identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from segbench import content
from segbench.cards import ModelCard
from segbench.data import SegmentationDataset
from segbench.engine.checks import Probe
from segbench.engine.merge import git_commit, versions
from segbench.engine.precision import FP32
from segbench.engine.store import MANIFEST_VERSION, run_id
from segbench.models import adapters
from segbench.models.adapters.wrap import class_name
from segbench.models.load import Subject
from segbench.protocol import Protocol


def describe(
    subject: Subject,
    data: SegmentationDataset,
    used: SegmentationDataset,
    fingerprint: str,
    protocol: Protocol,
    radii: Sequence[float],
    found: Probe,
    precision: str,
    command: str,
    compiled: bool,
) -> dict[str, Any]:
    """What ``run.json`` says."""
    _, source = data.count_weights()
    identity = {
        "protocol": protocol.digest(),
        "weights": subject.weights_sha256,
        "fingerprint": fingerprint,
        "class_weights": class_weights_hash(data),
    }
    if precision != FP32:
        identity["precision"] = precision
    root = content.checkout()
    return {
        "schema_version": MANIFEST_VERSION,
        "run_id": run_id(identity),
        "identity": identity,
        "model": _model(subject),
        "dataset": {
            "id": used.id,
            "split": used.split,
            "images": len(used),
            "available": data.complete or len(data),  # a partial copy is not official, nor is one with other images
            "other_size": used.other_size,
            "num_classes": used.num_classes,
            "fingerprint": identity["fingerprint"],
            "class_weights_from": source,
            "preprocessing": used.preprocessing,
        },
        "protocol": json.loads(json.dumps(dataclasses.asdict(protocol))),
        "radii_255": list(radii),
        "image_ids": list(used.image_ids),
        "checks": found.flags,
        "probe": found.sample,
        "environment": {
            "versions": versions(),
            "git_commit": git_commit(root) if root else None,
            "precision": precision,
            "compiled": compiled,
            "command": command,
        },
    }


def class_weights_hash(data: SegmentationDataset) -> str:
    """SHA-256 of the class weights of `mce_bal`."""
    weights, _ = data.count_weights()
    return hashlib.sha256(np.ascontiguousarray(weights, "<f8").tobytes()).hexdigest()


def _model(subject: Subject) -> dict[str, Any]:
    card: ModelCard | None = subject.card
    return {
        "id": subject.id,
        "title": card.title if card else subject.id,
        "architecture": card.architecture["name"] if card else class_name(subject.module),
        "parameters": sum(p.numel() for p in subject.module.parameters()),
        "weights_sha256": subject.weights_sha256,
        "paper": card.paper if card else None,
    }


def command_line(
    model: str | nn.Module,
    dataset: str,
    limit: int | None,
    iterations: int | None,
    precision: str = FP32,
    *,
    compiled: bool = False,
    verb: str = "evaluate",
) -> str:
    """The command that repeats this run, but for its radii. It is published, so it names no folder of this machine."""
    if isinstance(model, nn.Module):
        name = type(model).__name__
    else:
        name = Path(model).name if model.endswith(".json") else adapters.public(model)
    parts = [f"segbench {verb} --model", shlex.quote(name), "--dataset", shlex.quote(dataset)]
    parts += ["--limit", str(limit)] if limit is not None else []
    parts += ["--iterations", str(iterations)] if iterations is not None else []
    parts += ["--precision", precision] if precision != FP32 else []
    parts += ["--compile"] if compiled else []
    return " ".join(parts)[:2000]
