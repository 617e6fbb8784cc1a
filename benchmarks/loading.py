"""Seconds until a released model is loaded from the cache, and until `segbench models` has printed its table.

    python benchmarks/loading.py [--rounds 5] [--out FILE.json]

The weights are random, in the layout and size of UPerNet ConvNeXt-T (240 MB); the file lies beside its card, and is
hashed and read as one from the cache is. ``call`` is `segbench.load_model` in a process that has imported it,
``process`` a whole Python process that loads the model, ``imports`` one that only imports torch and timm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import segbench
from segbench.models.architectures import build

TARGETS = {"call": 3.0, "models": 1.0}
LOAD = "import segbench; segbench.load_model({card!r}, offline=True)"
CALL = (
    "import time, segbench; load = segbench.load_model; import segbench.models.load\n"
    "start = time.perf_counter(); load({card!r}, offline=True); print(time.perf_counter() - start)"
)


def prepare(folder: Path) -> str:
    """A card of a released model with a file beside it, as large as the real one; its path."""
    document = segbench.get_card("pirat_convnext_t_voc").document()
    model = build(document["architecture"]["name"], num_classes=document["num_classes"])
    torch.save(model.state_dict(), folder / "weights.pt")
    document["sources"] = [{"type": "package", "file": "weights.pt"}]
    path = folder / "pirat_convnext_t_voc.json"
    path.write_text(json.dumps(document))
    return str(path)


def process(*command: str) -> float:
    """Seconds of a whole process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        card = prepare(Path(folder))
        calls = [sys.executable, "-c", CALL.format(card=card)]
        seconds: dict[str, list[float]] = {"call": [], "process": [], "imports": [], "models": []}
        for _ in range(options.rounds):
            done = subprocess.run(calls, check=True, stdout=subprocess.PIPE, text=True)
            seconds["call"].append(float(done.stdout))
            seconds["process"].append(process("-c", LOAD.format(card=card)))
            seconds["imports"].append(process("-c", "import torch, timm.models.convnext"))
            seconds["models"].append(process("-m", "segbench", "models"))
    report = {
        "command": "python benchmarks/loading.py",
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "rounds": options.rounds,
        "seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "targets": TARGETS,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
