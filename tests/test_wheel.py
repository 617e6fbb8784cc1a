"""The wheel: ships every file of the package and the content folders, and works away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import segbench
from segbench import cards, entries

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CONTENT = ("model_zoo", "entries", "leaderboard")
BUILD_FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
MODEL = "clean_convnext_mini_shapes"


def repository_files() -> list[str]:
    """Paths that are, or with the next commit will be, in the repository; a file that git ignores is not."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("NOT CHECKED: the wheel's content is compared with git, and this is not a git checkout.")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({path for path in done.stdout.split("\0") if path and (ROOT / path).is_file()})


def run(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command without the variables that could lead it back to the checkout."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SEGBENCH_"))}
    environment = {**kept, "PYTHONNOUSERSITE": "1", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that the checkout gets no ``build`` folder and no old one leaks in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, source)
    for name in ("segbench", *CONTENT):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a fresh virtual environment with the wheel and the dependencies of this one."""
    root = tmp_path_factory.mktemp("clean")
    venv.create(root, with_pip=False)
    scripts = root / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, *install, cwd=root)
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=root).stdout.strip()
    # Only now: pip must not see the segbench of this environment. A path named in a .pth file is searched for
    # packages after the environment's own, and its own .pth files (an editable install is one) are not read.
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(purelib, "borrowed.pth").write_text("\n".join(borrowed) + "\n", "utf-8")
    return scripts


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """An empty working folder."""
    return tmp_path


def test_the_wheel_holds_what_the_repository_holds(wheel):
    expected = set()
    for path in repository_files():
        top = path.split("/")[0]
        if top == "segbench":
            expected.add(path)
        elif top in CONTENT:
            expected.add(f"segbench/_content/{path}")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert sorted(expected - shipped) == [], "not shipped: add the package or the ending to setup.cfg"
    assert sorted(shipped - expected) == [], "shipped, but not in the repository"


def test_the_wheel_ships_each_kind_of_data_from_subfolders(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for card in cards.card_paths(ROOT / "model_zoo"):
        relative = card.relative_to(ROOT / "model_zoo").as_posix()
        assert f"segbench/_content/model_zoo/{relative}" in names
        files = {source["file"] for source in cards.read_card(card).sources if source["type"] == "package"}
        assert {f"segbench/_content/model_zoo/{card.parent.name}/{file}" for file in files} <= set(names)
    for entry in entries.entry_paths(ROOT / "entries"):
        relative = entry.relative_to(ROOT / "entries").as_posix()
        assert f"segbench/_content/entries/{relative}" in names
        if entries.read_entry(entry)["evidence"]:
            assert f"segbench/_content/entries/{relative.removesuffix('.json')}.parquet" in names
    endings = {Path(name).suffix for name in names if name.startswith("segbench/")}
    assert endings >= {
        ".py",
        ".typed",
        ".json",
        ".npz",
        ".yaml",
        ".safetensors",
        ".parquet",
        ".md",
        ".j2",
        ".css",
        ".js",
    }


def test_the_wheel_names_its_licence_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = {name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
        text = archive.read(metadata["METADATA"]).decode()
        commands = archive.read(metadata["entry_points.txt"]).decode()
    assert f"Version: {segbench.__version__}\n" in text
    assert "License: MIT\n" in text or "License-Expression: MIT\n" in text
    assert any(name.endswith("LICENSE") for name in metadata)
    assert "segbench = segbench.cli:main" in commands


def test_segbench_comes_from_the_wheel(clean, empty):
    code = "import segbench; from segbench.content import checkout, folder; "
    code += "print(segbench.__file__, folder('entries'), checkout(), sep='\\n')"
    package, content, checkout = run(clean / "python", "-c", code, cwd=empty).stdout.splitlines()
    assert Path(package).resolve().is_relative_to(clean.parent.resolve())
    assert Path(content).resolve().is_relative_to(Path(package).resolve().parent)
    assert checkout == "None"


def test_the_zoo_of_the_wheel(clean, empty):
    models = json.loads(run(clean / "segbench", "models", "--json", cwd=empty).stdout)
    assert {card["id"] for card in models} == {path.stem for path in cards.card_paths(ROOT / "model_zoo")}
    assert MODEL in run(clean / "python", "-m", "segbench", "show", MODEL, cwd=empty).stdout


def test_the_content_of_the_wheel_validates(clean, empty):
    done = run(clean / "segbench", "validate", "--json", cwd=empty)
    report = json.loads(done.stdout)
    documents = [*cards.card_paths(ROOT / "model_zoo"), *entries.entry_paths(ROOT / "entries")]
    assert report == {"checked": len(documents), "problems": {}}
    run(clean / "segbench", "leaderboard", cwd=empty)
    assert list(empty.iterdir()) == [], "commands that only read wrote something"


def test_evaluate_from_an_empty_folder(clean, empty):
    options = ("--limit", "1", "--iterations", "1", "--eps", "8", "--device", "cpu", "--quiet")
    run(clean / "segbench", "evaluate", "--model", MODEL, *options, cwd=empty)
    (entry,) = empty.glob(f"runs/*/{MODEL}.json")
    assert entry.with_suffix(".parquet").is_file()
    assert json.loads(entry.read_text("utf-8"))["protocol"]["official"] is False
    run(clean / "segbench", "validate", entry, cwd=empty)
