"""Models of other packages: found by metadata alone, built when asked for, and told when they are broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODELS = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 8, 1)

def fails():
    raise RuntimeError("no weights")

def nothing():
    return 3
"""


def install(site: Path, name: str, entries: str | bytes, *, metadata: str | None = None) -> None:
    """What pip writes: a folder of metadata beside the package."""
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(metadata or f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    text = entries if isinstance(entries, bytes) else f"[segbench.models]\n{entries}".encode()
    (info / "entry_points.txt").write_bytes(text)


def run(site: Path, code: str) -> tuple[Any, str]:
    """The last line that a process with ``site`` on its path prints, as JSON, and its standard error."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", f"import json, logging, sys\nlogging.basicConfig(format='%(message)s')\n{code}"],
        capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


LIST = """
from segbench.plugins import get_plugin, list_plugins
found = [[plugin.name, plugin.value, plugin.package, plugin.version] for plugin in list_plugins()]
assert get_plugin("no_such_model") is None
assert not {"torch", "my_package"} & set(sys.modules)
print(json.dumps(found))
"""


@pytest.fixture
def site(tmp_path):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "models.py").write_text(MODELS)
    install(
        tmp_path,
        "my-package",
        "my_model = my_package.models:build\nfails = my_package.models:fails\nnothing = my_package.models:nothing\n"
        "absent = my_package.others:build\nmissing = my_package.models:biuld\n",
    )
    return tmp_path


def test_plugins_are_listed_without_importing_them(site):
    found, errors = run(site, LIST)
    names = ("absent", "fails", "missing", "my_model", "nothing")
    assert [plugin[0] for plugin in found] == list(names)
    assert found[3] == ["my_model", "my_package.models:build", "my-package", "1.2"]
    assert errors == ""


def test_broken_packages_are_told_and_left_out(site):
    install(site, "second", "twice = second:build\nMy-Model = second:build\nlong = second\n")
    install(site, "third", "twice = third:build\ngood_one = third.models : build [extra]\n")
    install(site, "broken", b"[segbench.models]\nno_equals_sign\n")
    install(site, "binary", b"[segbench.models]\n\xff\xfe = x:y\n")
    install(site, "nameless", "from_nowhere = nameless:build\n", metadata="Metadata-Version: 2.1\n")
    install(site, "elsewhere", b"[console_scripts]\nmy_model = elsewhere:main\n")
    (site / "leftover-1.0.dist-info").mkdir()  # of an interrupted installation; none of ours
    found, errors = run(site, LIST)
    names = [plugin[0] for plugin in found]
    assert {"my_model", "good_one"} < set(names)
    assert not {"twice", "My-Model", "long", "from_nowhere"} & set(names)
    assert ["good_one", "third.models:build", "third", "1.2"] in found
    assert "The packages second and third both offer a model 'twice'; it is left out" in errors
    assert "pip uninstall third" in errors
    assert "The package second offers a model 'My-Model', which is no id" in errors
    assert "The package second offers the model 'long' as 'second'" in errors
    assert re.search(r"The metadata of the package in .*binary-1\.2\.dist-info cannot be read", errors)
    assert re.search(r"nameless-1\.2\.dist-info cannot be read \(\w+: it has no name\)", errors)
    assert "leftover" not in errors
    assert "Traceback" not in errors


def test_a_package_found_twice_claims_nothing_twice(site):
    install(site / "more", "My_Package", "my_model = my_package.models:build\n")
    found, errors = run(site, f"sys.path.append({str(site / 'more')!r})\n{LIST}")
    assert [plugin[0] for plugin in found].count("my_model") == 1
    assert errors == ""


@pytest.mark.slow
def test_a_plugin_is_a_model_like_any_other(site, tmp_path):
    found, _ = run(
        site,
        f"""
import segbench
from segbench.errors import ModelError
model = segbench.load_model("my_model")
said = {{"training": model.training, "out": model.out_channels}}
options = dict(eps=[8], limit=2, iterations=2, progress=False, out={str(tmp_path / "run")!r})
said["id"] = segbench.evaluate("my_model", "shapes", **options).entry()["model"]["id"]
for name in ("fails", "nothing", "absent", "missing", "my_modle"):
    try:
        segbench.load_model(name)
    except segbench.errors.SegbenchError as error:
        said[name] = str(error)
print(json.dumps(said))
""",
    )
    assert (found["training"], found["out"], found["id"]) == (False, 8, "my_model")
    owner = "The model {!r} of the package my-package 1.2: "
    assert found["fails"].startswith(owner.format("fails"))
    assert "my_package.models:fails() failed: RuntimeError: no weights (" in found["fails"]
    assert "models.py, line 9)" in found["fails"]
    assert found["nothing"].startswith(owner.format("nothing"))
    assert "must return a torch.nn.Module; it gave int" in found["nothing"]
    assert found["absent"].startswith(owner.format("absent"))
    assert "No module named 'my_package.others'. Install the package again" in found["absent"]
    assert "Did you mean 'build'" in found["missing"]
    assert "my_modle" in found["my_modle"]
