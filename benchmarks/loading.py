"""What it costs to start: to load a model, to begin an evaluation, to print the table of `segbench models`.

    python benchmarks/loading.py [--rounds 5] [--out FILE.json]

The weights are random, in the layout and size of UPerNet ConvNeXt-T (240 MB); the file lies beside its card, and is
hashed and read as one from the cache is. ``call`` is `segbench.load_model` in a process that has imported it; all
others are whole Python processes: ``process`` loads that model, ``mini`` the one of the README, ``evaluate`` attacks
one image with it for one iteration, ``imports`` only imports what that needs, ``torch`` only torch, and ``models`` is
`segbench models`. CPU seconds are those of all threads; other processes on the machine lengthen them less than
seconds on the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import segbench
from segbench.models.architectures import build

TARGETS = {"seconds": {"call": 3.0, "models": 1.0}, "cpu_seconds": {"mini": 3.0}}
MINI = "pirat_convnext_mini_shapes"
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


def process(*command: str) -> tuple[float, float]:
    """Seconds of a whole Python process, and its CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def summary(values: list[float]) -> dict[str, float]:
    return {name: round(of(values), 2) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        card = prepare(Path(folder))
        evaluate = ("evaluate", "--model", MINI, "--limit", "1", "--eps", "8", "--iterations", "1", "--out")
        seconds: dict[str, list[float]] = {"call": []}
        cpu: dict[str, list[float]] = {}
        for number in range(options.rounds):
            call = [sys.executable, "-c", CALL.format(card=card)]
            done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
            seconds["call"].append(float(done.stdout))
            commands = {
                "process": ("-c", LOAD.format(card=card)),
                "mini": ("-c", LOAD.format(card=MINI)),
                "evaluate": ("-m", "segbench", *evaluate, f"{folder}/run{number}"),
                "imports": ("-c", "import segbench.cli.evaluate, segbench.engine.evaluate"),
                "torch": ("-c", "import torch"),
                "models": ("-m", "segbench", "models"),
            }
            for name, command in commands.items():
                for values, value in zip((seconds, cpu), process(*command), strict=True):
                    values.setdefault(name, []).append(value)
    report = {
        "command": "python benchmarks/loading.py",
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "rounds": options.rounds,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "cpu_seconds": {name: summary(values) for name, values in cpu.items()},
        "targets": TARGETS,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
