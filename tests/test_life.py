"""The life of a result: evaluated, submitted, checked as CI does, on the page; and five forged ones, each refused.

The model sees background everywhere, until faint stripes turn all pixels into a class that most images lack: attacks
end after a few steps, and the whole protocol takes seconds. The check is the command of
.github/workflows/submission.yml, run as it stands there, on the merge of the submission into the base branch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from filelock import FileLock

from segbench import entries, evidence, schemas
from segbench.evidence import Evidence, Group
from segbench.files import sha256_bytes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
MODEL, LISTED = "clean_fragile_shapes", "at_convnext_mini_shapes"
NET = """
import torch
from torch import nn

class Fragile(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(300.0))

    def forward(self, images):
        rows, columns = (1 - 2 * (torch.arange(size).to(images) % 2) for size in images.shape[-2:])
        logits = images.new_zeros(len(images), 8, *images.shape[-2:])
        for label, stripes in ((3, rows[:, None]), (6, columns), (7, rows[:, None] * columns)):
            found = (images * stripes).mean(dim=(1, 2, 3)) - 0.01
            logits[:, label] = logits[:, label] + self.scale * found[:, None, None]
        return logits

def build():
    return Fragile()
"""


def sh(*command: str | Path, cwd: Path, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def git(cwd: Path, *args: str) -> str:
    return sh("git", "-c", "user.name=A", "-c", "user.email=a@example.org", *args, cwd=cwd).stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the content of this one, as its main branch."""
    root = tmp_path_factory.mktemp("life") / "base"
    root.mkdir()
    for name in ("model_zoo", "entries", "leaderboard"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "README.md", root)
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "Base")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A finished evaluation of a model of one's own; of several workers of pytest, one does it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "fragile"
    command = ("evaluate", "--model", "./net.py:build", "--dataset", "shapes", "--out", "run", "--device", "cpu")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "net.py").write_text(NET)
            sh(sys.executable, "-m", "segbench", *command, "--quiet", cwd=folder)
    return folder / "run"


@pytest.fixture
def submitted(base: Path, run: Path, tmp_path: Path) -> Path:
    """A clone in which `segbench submit` has written, and a commit was made."""
    clone = tmp_path / "clone"
    sh("git", "clone", "-q", base, clone, cwd=tmp_path)
    options = ("--id", MODEL, "--title", "A fragile model", "--method", "clean", "--submitter", "alice", "--yes")
    done = sh(sys.executable, "-m", "segbench", "submit", run, "--checkout", clone, *options, cwd=tmp_path)
    assert re.search(rf"shapes \(sea-v1\): {MODEL} not listed -> rank (\d+) of \1 entries", done.stdout)
    commit(clone)
    return clone


def commit(clone: Path) -> None:
    git(clone, "switch", "-qc", "submission")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "Submission")


def check(clone: Path, tmp_path: Path, code: int) -> tuple[str, str]:
    """The step of the workflow, in a folder with the merged pull request as ``data``; what it said, and its summary."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "submission.yml").read_text("utf-8"))
    (script,) = [step["run"] for step in workflow["jobs"]["check"]["steps"] if step.get("name", "").startswith("Valid")]
    git(clone, "switch", "-q", "main")
    git(clone, "merge", "-q", "--no-ff", "-m", "Merge", "submission")
    (tmp_path / "data").symlink_to(clone)
    summary = tmp_path / "summary.md"
    scripts = Path(sys.executable).parent
    done = sh(
        "bash", "-e", "-c", script, cwd=tmp_path, code=code,
        AUTHOR="alice", GITHUB_STEP_SUMMARY=str(summary), PATH=f"{scripts}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    return done.stderr, summary.read_text("utf-8")


def test_a_result_is_evaluated_submitted_checked_and_shown(submitted: Path, tmp_path: Path) -> None:
    said, summary = check(submitted, tmp_path, 0)
    assert "files are valid" in said
    assert re.search(rf"\| `{MODEL}` \| shapes \(sea-v1\) \| – \| (\d+) \| \1 \|", summary)
    assert "This submission is valid" in summary
    entry = entries.read_entry(submitted / "entries" / "sea-v1" / "shapes" / f"{MODEL}.json")
    assert (entry["claim"]["submitter"], entry["claim"]["tier"]) == ("alice", "checked")
    out = tmp_path / "site"
    sh(sys.executable, "-m", "segbench", "leaderboard", "build", "--root", submitted, "--out", out, cwd=tmp_path)
    assert MODEL in (out / "index.html").read_text("utf-8")
    (page,) = out.glob(f"models/**/{MODEL}.html")
    assert "A fragile model" in page.read_text("utf-8")
    (table,) = [
        table for table in json.loads((out / "leaderboard.json").read_text("utf-8"))["tables"]
        if (table["dataset"], table["protocol"]) == ("shapes", "sea-v1")
    ]  # fmt: skip
    row = next(row for row in table["rows"] if row["id"] == MODEL)
    assert row["scores"]["8"]["miou"]["value"] == entry["results"][1]["miou"]


def edited_score(clone: Path) -> None:
    path = clone / "entries" / "sea-v1" / "shapes" / f"{MODEL}.json"
    entry = json.loads(path.read_text())
    entry["results"][1]["aacc"] += 0.001
    path.write_text(schemas.dump(entry))


def swapped_evidence(clone: Path) -> None:
    """The counts of a better model in place of one's own."""
    folder = clone / "entries" / "sea-v1" / "shapes"
    better = (folder / f"{LISTED}.parquet").read_bytes()
    (folder / f"{MODEL}.parquet").write_bytes(better)


def evidence_of_another_model(clone: Path) -> None:
    """Entry and evidence of a listed model under a new name, every number right."""
    folder = clone / "entries" / "sea-v1" / "shapes"
    mine, theirs = (json.loads((folder / f"{name}.json").read_text()) for name in (MODEL, LISTED))
    data = (folder / f"{LISTED}.parquet").read_bytes()
    for field in ("clean", "results", "flags"):
        mine[field] = theirs[field]
    mine["run"] |= {key: theirs["run"][key] for key in ("forward_passes", "backward_passes")}
    mine["evidence"]["sha256"] = sha256_bytes(data)
    (folder / f"{MODEL}.parquet").write_bytes(data)
    (folder / f"{MODEL}.json").write_text(schemas.dump(mine))


def missing_images(clone: Path) -> None:
    """The four worst images are left out, everywhere and consistently."""
    path = clone / "entries" / "sea-v1" / "shapes" / f"{MODEL}.json"
    entry = json.loads(path.read_text())
    found = evidence.from_bytes(path.with_suffix(".parquet").read_bytes(), source="f")
    clean = found.groups[evidence.CLEAN]
    keep = set(np.array(clean.image_ids)[np.sort(np.argsort(clean.counts.correct)[4:])].tolist())

    def without(group: Group) -> Group:
        rows = np.array([row for row, image_id in enumerate(group.image_ids) if image_id in keep])
        return Group(tuple(group.image_ids[row] for row in rows), group.counts.take(rows))

    about = {**found.metadata["dataset"], "available": len(keep)}
    forged = Evidence(
        {key: without(group) for key, group in found.groups.items()}, {**found.metadata, "dataset": about}
    )
    data = evidence.to_bytes(forged)
    entry |= entries.recompute(forged, seed=0, orders=8)
    entry["flags"] = entries.reliability(forged, entry)
    entry["dataset"]["images"] = len(keep)
    entry["evidence"]["sha256"] = sha256_bytes(data)
    path.with_suffix(".parquet").write_bytes(data)
    path.write_text(schemas.dump(entry))


def foreign_file(clone: Path) -> None:
    """The name of a listed model is changed on the way."""
    card = clone / "model_zoo" / "shapes" / f"{LISTED}.json"
    card.write_text(card.read_text().replace("UPerNet", "Upernet"))


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (edited_score, "results.1.aacc states"),
        (swapped_evidence, "evidence.sha256 is not the hash of clean_fragile_shapes.parquet: the evidence was changed"),
        (evidence_of_another_model, "the evidence was made with another model than the entry states"),
        (missing_images, "images are missing, or labels were changed"),
        (foreign_file, f"it changes {LISTED} and adds {MODEL}: one pull request adds new models"),
    ],
    ids=["edited score", "swapped evidence", "evidence of another model", "missing images", "foreign file"],
)
def test_a_forged_submission_is_refused_with_its_reason(
    submitted: Path, tmp_path: Path, forge: Callable[[Path], None], said: str
) -> None:
    forge(submitted)
    git(submitted, "commit", "-qam", "Forged")
    stderr, summary = check(submitted, tmp_path, 1)
    assert said in stderr
    assert "This submission has problems" in summary
