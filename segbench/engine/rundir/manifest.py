"""The manifest of a run: what is evaluated, and the run's identity. Torch-free."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from segbench import content
from segbench.data import SegmentationDataset
from segbench.engine.rundir.store import MANIFEST_VERSION, run_id
from segbench.protocol import Protocol

FP32 = "fp32"  # the precision that is no part of the identity


def build_manifest(
    model: Mapping[str, Any],
    data: SegmentationDataset,
    used: SegmentationDataset,
    fingerprint: str,
    protocol: Protocol,
    strengths: Sequence[float],
    *,
    checks: Sequence[Mapping[str, Any]],
    probe: Sequence[float],
    precision: str,
    compiled: bool,
    command: str,
) -> dict[str, Any]:
    """The content of ``run.json``.

    ``model`` is that of `segbench.models.load.LoadedModel.describe`; of ``data`` the images ``used`` have this
    fingerprint; ``checks`` and ``probe`` are flags and samples of `segbench.engine.compute.checks.Probe`.
    """
    _, class_weights_from = data.count_weights()
    identity = {
        "protocol": protocol.digest(),
        "weights": model["weights_sha256"],
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
        "model": dict(model),
        "dataset": {
            "id": used.id,
            "split": used.split,
            "images": len(used),
            "available": data.complete or len(data),  # a partial copy is not official, nor is one with other images
            "other_size": used.other_size,
            "num_classes": used.num_classes,
            "fingerprint": fingerprint,
            "class_weights_from": class_weights_from,
            "preprocessing": used.preprocessing,
        },
        "protocol": protocol.fields(),
        "strengths": list(strengths),
        "image_ids": list(used.image_ids),
        "checks": list(checks),
        "probe": list(probe),
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


def versions(packages: Iterable[str] = ("segbench", "torch", "timm", "numpy", "pyarrow")) -> dict[str, str]:
    """Versions of Python and the packages that decide a result; ``unknown`` in a plain checkout."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout at ``folder``; None outside a checkout or without git."""
    if shutil.which("git") is None or not (folder / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else None
