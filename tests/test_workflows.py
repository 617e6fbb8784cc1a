"""What GitHub runs: no rights, no secrets, no code of a stranger; and that it needs no torch."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
HEAVY = {"torch", "timm", "safetensors"}
BLOCKED = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "timm", "safetensors", "torchvision"}:
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Block())
from segbench.cli import main
codes = []
for args in json.loads(sys.argv[1]):
    try:
        main(args)
    except SystemExit as end:
        codes.append(end.code)
print(json.dumps(codes))
"""


def read(path: Path) -> dict:
    document = yaml.safe_load(path.read_text("utf-8"))
    document["on"] = document.pop(True, document.get("on"))  # YAML 1.1 reads `on` as true
    return document


def steps(document: dict) -> list[dict]:
    return [step for job in document["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_no_rights_no_secrets_and_pinned_actions(path):
    document, text = read(path), path.read_text("utf-8")
    assert document["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    assert "pull_request_target" not in text
    assert "workflow_run" not in text
    for job in document["jobs"].values():
        assert job["timeout-minutes"] <= 30
        assert set(job.get("permissions", {})) <= {"pages", "id-token"}
    for step in steps(document):
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]), step
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False
        # Text of a pull request (its title, its branch) never becomes part of a script.
        assert "${{" not in step.get("run", "")


def test_submissions_run_code_of_the_base_branch_on_data_of_the_pull_request():
    document = read(ROOT / ".github" / "workflows" / "submission.yml")
    assert list(document["on"]) == ["pull_request"]
    assert set(document["on"]["pull_request"]["paths"]) == {"entries/**", "model_zoo/**"}
    assert "permissions" not in document["jobs"]["check"]
    checkouts = {step["with"]["path"]: step["with"] for step in steps(document) if "checkout" in step.get("uses", "")}
    assert checkouts["code"]["ref"] == "${{ github.event.pull_request.base.ref }}"
    assert "ref" not in checkouts["data"]  # the merge of the pull request: its first parent is the base branch
    for step in steps(document):
        script = step.get("run", "")
        for line in script.splitlines():
            assert "data" not in line or line.startswith("segbench validate --root data --changed HEAD^1"), line


def test_only_the_deployment_may_write_pages():
    document = read(ROOT / ".github" / "workflows" / "pages.yml")
    assert "pull_request" not in document["on"]
    assert document["on"]["push"]["branches"] == ["main"]
    assert "permissions" not in document["jobs"]["build"]
    assert document["jobs"]["deploy"]["permissions"] == {"pages": "write", "id-token": "write"}


def test_the_list_without_torch_is_that_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = [*config["options"]["install_requires"].split(), *config["options.extras_require"]["site"].split()]
    lines = (ROOT / ".github" / "torch_free.txt").read_text("utf-8").splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    assert listed == [line for line in wanted if re.split("[<>=]", line)[0] not in HEAVY]


@pytest.mark.slow
def test_checks_and_site_work_without_torch(tmp_path):
    commands = [
        ["validate"],
        ["verify", "entries/sea-v2/shapes/at_convnext_mini_shapes.json"],
        ["leaderboard", "--check"],
    ]
    commands += [["leaderboard", "build", "--out", str(tmp_path / "site")]]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * len(commands), done.stderr
    assert (tmp_path / "site" / "index.html").is_file()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_github_needs(path):
    """GitHub's syntax for issue forms: name, description, a body of known types with unique ids."""
    document = yaml.safe_load(path.read_text("utf-8"))
    if path.stem == "config":
        assert document == {"blank_issues_enabled": True}
        return
    assert document["name"]
    assert document["description"]
    assert {part["type"] for part in document["body"]} <= {"markdown", "input", "textarea", "dropdown", "checkboxes"}
    ids = [part["id"] for part in document["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    assert all(part["attributes"]["label"] for part in document["body"] if part["type"] != "markdown")
    for part in document["body"]:
        assert part["type"] not in ("dropdown", "checkboxes") or part["attributes"]["options"]


def test_every_form_that_the_documentation_names_is_there():
    assert {path.stem for path in FORMS} == {"add_a_model", "bug", "stronger_attack", "wrong_row", "config"}
