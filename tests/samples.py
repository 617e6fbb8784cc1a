"""A small, consistent checkout for tests: cards, entries and evidence that validate, made without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from segbench import entries, evidence, schemas
from segbench.counts import Counts, count
from segbench.evidence import CHECK_LOSS, CHECK_SEARCH, CLEAN, Evidence, Group
from segbench.files import sha256_bytes
from segbench.leaderboard import END, START
from segbench.protocol import SEA_V1, Protocol

NUM_CLASSES = 4
IMAGE_IDS = tuple(f"image_{number}" for number in range(6))
RADII = (4.0, 8.0, 12.0)
PROTOCOL = SEA_V1


def counts(accuracy: float, seed: int, images: int = len(IMAGE_IDS)) -> Counts:
    """Counts of the same labels whatever the seed, a share of ``accuracy`` of the pixels being right."""
    labels = np.random.default_rng(0).integers(0, NUM_CLASSES, (len(IMAGE_IDS), 8, 8))[:images]
    rng = np.random.default_rng([1, seed])
    wrong = (labels + rng.integers(1, NUM_CLASSES, labels.shape)) % NUM_CLASSES
    return count(np.where(rng.random(labels.shape) < accuracy, labels, wrong), labels, NUM_CLASSES)


def card(model_id: str, dataset: str = "shapes", **changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "id": model_id,
        "title": f"Model {model_id}",
        "architecture": {"name": "upernet_convnext", "arguments": {}},
        "backbone": "ConvNeXt-mini",
        "dataset": dataset,
        "num_classes": NUM_CLASSES,
        "parameters": 104744,
        "sources": [{"type": "package", "file": f"{model_id}.safetensors"}],
        "sha256": weights_hash(model_id),
        "licence": None,
        "paper": None,
        "training": {
            "method": "clean", "eps_255": 0, "attack_steps": 0, "epochs": 1, "initialisation": "random",
            "extra_data": None, "recipe": None, "log": None,
        },
        "preprocessing": "none",
        "expected": None,
    } | changes  # fmt: skip


def weights_hash(model_id: str) -> str:
    return sha256_bytes(model_id.encode())  # `publish` writes the id as the weights file


def manifest(model_id: str, *, dataset: str = "shapes", protocol: Protocol = PROTOCOL) -> dict[str, Any]:
    fingerprint = entries.FINGERPRINTS.get(dataset, "f" * 64)
    return {
        "identity": {"protocol": protocol.digest(), "weights": weights_hash(model_id), "fingerprint": fingerprint},
        "model": {
            "id": model_id, "title": f"Model {model_id}", "architecture": "upernet_convnext", "parameters": 104744,
            "weights_sha256": weights_hash(model_id), "paper": None,
        },
        "dataset": {
            "id": dataset, "split": "val", "images": len(IMAGE_IDS), "available": len(IMAGE_IDS),
            "num_classes": NUM_CLASSES, "fingerprint": fingerprint, "class_weights_from": "training split",
            "preprocessing": "as stored",
        },
        "protocol": protocol.fields(),
    }  # fmt: skip


def make_evidence(found: dict[str, Any], quality: float = 0.9, failed: str = "") -> Evidence:
    """Scores that fall with ε, and a check at a huge ε that reaches 0; the check ``failed`` is a warning."""
    groups = {CLEAN: Group(IMAGE_IDS, counts(quality, 0)), (64.0, CHECK_LOSS): Group(IMAGE_IDS[:4], counts(0.0, 1, 4))}
    if found["protocol"]["name"] != SEA_V1.name:
        groups[8.0, CHECK_SEARCH] = Group(IMAGE_IDS[:4], counts(0.95, 2, 4))
    for row, eps in enumerate(RADII):
        for column, loss in enumerate(found["protocol"]["losses"]):
            accuracy = quality * (0.7, 0.4, 0.1)[row] + 0.02 * column
            groups[(eps, loss)] = Group(IMAGE_IDS, counts(accuracy, 10 * row + column + 2))
    metadata = {
        "num_classes": NUM_CLASSES,
        "run_id": "0" * 64,
        "identity": found["identity"],
        "protocol": found["protocol"],
        "dataset": {key: found["dataset"][key] for key in ("id", "split", "available", "class_weights_from")},
        "checks": [
            entries.flag(name, float(name == failed), "warning" if name == failed else "ok", "As it should be.")
            for name in ("deterministic", "output_scale", "eval_mode")
        ],
        "gradients": {"attacks": 54, "zero_gradients": 1, "nonfinite_gradients": 0, "nonfinite_logits": 0},
        "passes": {"forwards": 10, "backwards": 9},
        "changed_pixels": 0,
    }
    return Evidence(groups, metadata)


RUN = {
    "versions": {"segbench": "0.1.0"}, "git_commit": None, "device": "cpu", "precision": "fp32", "seconds": 1.5,
    "forward_passes": 10, "backward_passes": 9, "peak_memory_bytes": None, "compiled": False, "batch_size": None,
    "gpu_hours": None, "images_per_second": None, "energy_joules": None, "command": "segbench evaluate",
}  # fmt: skip


def build(model_id: str, quality: float = 0.9, failed: str = "", **options: Any) -> tuple[dict[str, Any], bytes]:
    """An entry and its evidence."""
    found = manifest(model_id, **options)
    content = make_evidence(found, quality, failed)
    data = evidence.to_bytes(content)
    entry = entries.build(
        found, content, evidence_name=f"{model_id}.parquet", evidence_bytes=data, run=RUN, submitter="alice",
        date="2026-01-31",
    )  # fmt: skip
    return entry, data


def publish(root: Path, model_id: str, quality: float = 0.9, **options: Any) -> Path:
    """Writes card, entry and evidence where they belong in the checkout ``root``; returns the entry's path."""
    dataset = options.get("dataset", "shapes")
    entry, data = build(model_id, quality, **options)
    card_path = root / "model_zoo" / dataset / f"{model_id}.json"
    path = root / "entries" / entry["protocol"]["name"] / dataset / f"{model_id}.json"
    for file in (card_path, path):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_json(card_path, card(model_id, dataset))
    card_path.with_suffix(".safetensors").write_bytes(model_id.encode())
    write_json(path, entry)
    path.with_suffix(".parquet").write_bytes(data)
    return path


def checkout(root: Path) -> Path:
    """An empty checkout: the folders, and a leaderboard page with its markers."""
    for name in ("model_zoo", "entries", "leaderboard"):
        (root / name).mkdir(parents=True)
    (root / "leaderboard" / "README.md").write_text(f"# Leaderboard\n\n{START}\n{END}\n\nAfter.\n", "utf-8")
    return root


def write_json(path: Path, document: Any) -> None:
    path.write_text(schemas.dump(document), "utf-8")
