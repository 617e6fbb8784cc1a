"""Who may import whom (setup.cfg, `[importlinter]`), that the contracts bite, and what starts without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
# Runs commands in one process, then says on the last line how they ended and which heavy modules were loaded.
RUN = """
import json, sys
from segbench.cli import main
codes = []
for args in json.loads(sys.argv[1]):
    try:
        main(args)
    except SystemExit as end:
        codes.append(end.code)
heavy = sorted({"torch", "torchvision", "timm"} & set(sys.modules))
print()
print(json.dumps({"codes": codes, "heavy": heavy}))
"""


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of ``root/setup.cfg`` on the package in ``root``."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONIOENCODING": "utf-8", "COLUMNS": "300"}
    return subprocess.run(
        [sys.executable, "-c", LINT], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def test_contracts_are_kept():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("counts.py", "from segbench import evidence", "Layers:"),
        ("data/dataset.py", "from segbench import cards", "Layers:"),
        ("files.py", "from segbench import content", "Layers:"),
        ("unplaced.py", "", "Layers:"),
        ("attacks/start.py", "from segbench import files", "Attacks, counts and ensemble"),
        ("cards.py", "def sneak():\n    import torch", "What needs no torch"),
        ("cli/app.py", "import segbench.engine.compute.worker", "What needs no torch"),
        ("engine/rundir/store.py", "import torch", "What needs no torch"),
        ("engine/__init__.py", "import torch", "What starts without torch"),
        ("__main__.py", "import torch", "What starts without torch"),
        ("engine/rundir/plan.py", "from segbench.engine.compute import batching", "Engine:"),
        ("engine/compute/worker.py", "from segbench.engine.telemetry import energy", "Engine:"),
        ("engine/telemetry/progress.py", "from segbench.engine.launch import shards", "Engine:"),
        ("engine/launch/prepare.py", "from segbench.engine import evaluate", "Engine:"),
        ("engine/launch/prepare.py", "from segbench.engine.studies import common", "Engine:"),
        ("engine/evaluate.py", "from segbench.engine import model_check", "Engine:"),
        ("engine/evaluate.py", "from segbench.engine.studies import compare", "Engine:"),
        ("engine/unplaced.py", "", "Engine:"),
        ("models/architectures/upernet.py", "from segbench.models import released", "Models:"),
        ("models/sources/names.py", "from segbench.models import load", "Models:"),
        ("models/weights.py", "from segbench.models import sliding", "Models:"),
        ("models/unplaced.py", "", "Models:"),
        ("models/sources/names.py", "from segbench.models.sources import hf", "Sources:"),
        ("models/sources/hf.py", "from segbench.models.sources import smp", "Sources:"),
        ("models/sources/unplaced.py", "", "Sources:"),
    ],
)
def test_contracts_bite(tmp_path, file, line, contract):
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    shutil.copytree(ROOT / "segbench", tmp_path / "segbench", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "segbench" / file).open("a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [text for text in done.stdout.splitlines() if text.rstrip().endswith("BROKEN") or " BROKEN " in text]
    assert any(text.startswith(contract) for text in broken), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "commands",
    [
        [["models"], ["models", "--json"], ["show", "clean_convnext_mini_shapes"]],
        [["validate"], ["leaderboard", "--json"]],
        [["--help"], ["evaluate", "--help"], ["train", "--help"], ["status", "--help"], ["merge", "--help"]],
    ],
    ids=["zoo", "content", "help"],
)
def test_commands_without_torch(commands):
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == {"codes": [0] * len(commands), "heavy": []}, done.stderr


def test_importing_segbench_is_light():
    code = "import sys, segbench; assert not {'torch', 'numpy', 'pandas', 'pyarrow'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
