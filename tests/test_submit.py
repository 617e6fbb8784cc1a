"""`submit`: from a run directory to a pull request; what is not valid leaves the checkout as it was."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from segbench import cards, entries, evidence, leaderboard
from segbench.cli import main
from segbench.entries import additions, submission
from segbench.errors import ContentError
from segbench.files import sha256_bytes
from segbench.leaderboard import MODELS_END, MODELS_START
from tests import samples

A, B, NEW = "at_convnext_mini_shapes", "clean_convnext_mini_shapes", "new_convnext_mini_shapes"
Cli = Callable[..., tuple[int, str, str]]
COMMIT = "c0ffee" * 6 + "abcd"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option from the environment, no configuration of git of this machine."""
    for name in list(os.environ):
        if name.startswith(("GIT_", "SEGBENCH_SUBMIT", "GH_")):
            monkeypatch.delenv(name)
    for name, value in {
        "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0",
        "GIT_AUTHOR_NAME": "Tester", "GIT_AUTHOR_EMAIL": "tester@example.org",
        "GIT_COMMITTER_NAME": "Tester", "GIT_COMMITTER_EMAIL": "tester@example.org",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def link(folder: Path, *names: str) -> Path:
    """A folder of programs for PATH."""
    folder.mkdir()
    for name in names:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Git, a shell, and no gh."""
    folder = link(tmp_path / "programs", "git", "sh", "cat", "uname", "sed")
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = samples.checkout(tmp_path_factory.mktemp("submit") / "checkout")
    (root / "README.md").write_text(f"# segbench\n\n{MODELS_START}\n{MODELS_END}\n\nInstall it.\n", "utf-8")
    samples.publish(root, A, 0.9)
    samples.publish(root, B, 0.5)
    leaderboard.write_tables(root, leaderboard.load(root))
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "checkout"))


def write_run(folder: Path, model_id: str = NEW, quality: float = 0.7, **options: Any) -> Path:
    """A finished run directory, as `evaluate` leaves it."""
    entry, data = samples.build(model_id, quality, **options)
    folder.mkdir(parents=True)
    samples.write_json(folder / f"{model_id}.json", entry)
    (folder / f"{model_id}.parquet").write_bytes(data)
    (folder / "run.json").write_text("{}", "utf-8")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "one")


def files(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a checkout but git's own: mode and content."""
    return {
        str(path.relative_to(root)): (path.stat().st_mode, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".git" not in path.relative_to(root).parts
    }


def paths(root: Path, model_id: str = NEW, dataset: str = "shapes") -> tuple[Path, Path, Path]:
    """Card, entry and evidence of a model in a checkout."""
    entry = root / "entries" / "sea-v1" / dataset / f"{model_id}.json"
    return root / "model_zoo" / dataset / f"{model_id}.json", entry, entry.with_suffix(".parquet")


def valid(root: Path, model_id: str = NEW) -> None:
    card, entry, _ = paths(root, model_id)
    assert entries.validate_entry(entry, published=True) == []
    assert cards.read_card(card).to_json() == card.read_text("utf-8")
    assert all(leaderboard.write_tables(root, leaderboard.load(root), check=True).values())


def git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """The checkout as a clone of a bare `origin`."""
    git(root, "init", "--quiet", "-b", "main")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "base")
    origin = tmp_path / "origin.git"
    git(root, "clone", "--quiet", "--bare", str(root), str(origin))
    git(root, "remote", "add", "origin", str(origin))
    git(root, "fetch", "--quiet", "origin")
    return root


# A new model.


def test_a_new_model_from_options(root: Path, run: Path, cli: Cli) -> None:
    bibtex = run / "paper.bib"
    bibtex.write_text("@article{x, title = {T}}\n", "utf-8")
    code, out, err = cli(
        "submit", str(run), "--checkout", str(root), "--yes", "--title", "My model", "--submitter", "somebody",
        "--licence", "MIT", "--backbone", "ConvNeXt-mini", "--weights", f"hub:some/model@{COMMIT}:model.safetensors",
        "--preprocessing", "as stored", "--method", "AT", "--train-eps", "8", "--attack-steps", "3", "--epochs", "2.5",
        "--initialisation", "clean", "--extra-data", "ImageNet-1k (backbone)", "--paper-title", "T",
        "--paper-authors", "First Author; Second Author;", "--paper-url", "https://example.org/paper",
        "--paper-venue", "ECCV", "--paper-year", "2024", "--paper-bibtex", str(bibtex),
    )  # fmt: skip
    assert code == 0, err
    card, entry, parquet = paths(root)
    source = json.loads((run / f"{NEW}.json").read_text("utf-8"))
    assert cards.read_card(card).document() == {
        "schema_version": 1, "id": NEW, "title": "My model",
        "architecture": {"name": "upernet_convnext", "arguments": {}}, "backbone": "ConvNeXt-mini",
        "dataset": "shapes", "num_classes": 4, "parameters": 104744,
        "sources": [{"type": "hub", "repo": "some/model", "revision": COMMIT, "file": "model.safetensors"}],
        "sha256": source["model"]["weights_sha256"], "licence": "MIT",
        "paper": {
            "title": "T", "authors": ["First Author", "Second Author"], "url": "https://example.org/paper",
            "venue": "ECCV", "year": 2024, "bibtex": "@article{x, title = {T}}\n",
        },
        "training": {
            "method": "AT", "eps_255": 8.0, "attack_steps": 3, "epochs": 2.5, "initialisation": "clean",
            "extra_data": "ImageNet-1k (backbone)", "recipe": None, "log": None,
        },
        "preprocessing": "as stored",
        "expected": {metric: round(source["clean"][metric], 4) for metric in ("aacc", "miou")},
    }  # fmt: skip
    written = entries.read_entry(entry)
    assert written["claim"] == source["claim"] | {"submitter": "somebody"}
    assert written["model"] == source["model"] | {"title": "My model"}
    assert (written["paper"]["title"], written["history"]) == ("T", [])
    same = ("dataset", "protocol", "clean", "results", "flags", "evidence", "run")
    assert {key: written[key] for key in same} == {key: source[key] for key in same}
    assert parquet.read_bytes() == (run / f"{NEW}.parquet").read_bytes()
    valid(root)
    assert out.splitlines()[0] == f"shapes (sea-v1): {NEW} not listed -> rank 2 of 3 entries"
    (row,) = [line.split() for line in out.splitlines() if line.split()[:1] == ["->"]]  # it, between its neighbours
    assert row[1:3] == ["2", NEW]
    assert all(f" {other} " in out for other in (A, B))
    for file in (card, entry, parquet, root / "README.md", root / "leaderboard" / "README.md"):
        assert f"wrote {file.relative_to(root)}\n" in err


def test_a_new_model_needs_its_method_and_nothing_else(root: Path, run: Path, cli: Cli) -> None:
    before = files(root)
    code, _, err = cli("submit", str(run), "--checkout", str(root), "--yes")
    assert (code, files(root)) == (2, before)
    assert "--method" in err
    assert cli("submit", str(run), "--checkout", str(root), "--yes", "--method", "clean")[0] == 0
    card = cards.read_card(paths(root)[0])
    assert (card.title, card.preprocessing, card.sources) == (f"Model {NEW}", "as stored", [])
    assert card.backbone is card.licence is card.paper is card.training["eps_255"] is None
    valid(root)


def test_what_was_written_passes_the_check_of_ci(clone: Path, run: Path, cli: Cli) -> None:
    assert cli("submit", str(run), "--checkout", str(clone), "--yes", "--method", "AT")[0] == 0
    code, out, err = cli("validate", "--changed", "origin/main", "--root", str(clone))
    assert code == 0, err
    assert f"| `{NEW}` | shapes (sea-v1) | – | 2 | 3 |" in out


def test_only_the_files_of_the_model_and_the_tables_change(root: Path, run: Path, cli: Cli) -> None:
    before, source = files(root), files(run)
    assert cli("submit", str(run), "--checkout", str(root), "--yes", "--method", "AT")[0] == 0
    after = files(root)
    tables = {"leaderboard/README.md"}  # a card without weights is in no table of models
    assert {name for name in after if after[name] != before.get(name)} == {
        *(str(path.relative_to(root)) for path in paths(root)), "README.md", *tables,
    }  # fmt: skip
    assert set(before) <= set(after)
    assert files(run) == source


def test_the_entry_itself_may_be_given(root: Path, run: Path, cli: Cli) -> None:
    code = cli("submit", str(run / f"{NEW}.json"), "--checkout", str(root), "--yes", "--method", "AT")[0]
    assert code == 0
    valid(root)


def test_json_prints_what_was_written(root: Path, run: Path, cli: Cli) -> None:
    code, out, _ = cli("submit", str(run), "--checkout", str(root), "--yes", "--method", "AT", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["model"] == NEW
    assert set(found["files"]) == {
        *(str(path.relative_to(root)) for path in paths(root)), "README.md", "leaderboard/README.md",
    }  # fmt: skip
    move = {"dataset": "shapes", "protocol": "sea-v1", "model": NEW, "before": None, "after": 2, "rows": 3}
    assert found["ranks"] == [move]
    assert [shlex.split(command)[:2] for command in found["commands"]] == [
        ["git", "switch"], ["git", "add"], ["git", "commit"], ["git", "push"],
    ]  # fmt: skip


def test_an_id_may_be_given(root: Path, run: Path, cli: Cli) -> None:
    assert cli("submit", str(run), "--checkout", str(root), "--yes", "--method", "AT", "--id", "other_shapes")[0] == 0
    card, entry, parquet = paths(root, "other_shapes")
    written = entries.read_entry(entry)
    assert cards.read_card(card).id == written["model"]["id"] == "other_shapes"
    assert written["evidence"]["file"] == parquet.name
    assert parquet.read_bytes() == (run / f"{NEW}.parquet").read_bytes()
    valid(root, "other_shapes")
    assert not any(path.exists() for path in paths(root))


@pytest.mark.parametrize(
    "model_id", ["Upper_shapes", "a b", "../x", "../../x", "x/y", "-x", "_x", "x" * 81, "x\n", "ü"]
)
def test_an_id_that_is_none_is_refused(root: Path, run: Path, cli: Cli, model_id: str) -> None:
    before = files(root)
    code, _, err = cli("submit", str(run), "--checkout", str(root), "--yes", "--method", "AT", f"--id={model_id}")
    assert (code, files(root)) == (2, before)
    assert "id: " in err


def test_the_id_of_another_listed_model_is_refused(root: Path, run: Path, cli: Cli) -> None:
    """Its card pins other weights."""
    before = files(root)
    code, _, err = cli(
        "submit", str(run), "--checkout", str(root), "--yes", "--id", A, "--reason", "I would like to have this place."
    )
    assert (code, files(root)) == (1, before)
    assert "model.weights_sha256" in err


# Cards.


def test_a_card_of_the_checkout_is_used(root: Path, run: Path, cli: Cli) -> None:
    card, _, _ = paths(root)
    samples.write_json(card, samples.card(NEW, title="As it stands", licence="MIT"))
    card.with_suffix(".safetensors").write_bytes(NEW.encode())
    text = card.read_bytes()
    code, _, err = cli("submit", str(run), "--checkout", str(root), "--yes")
    assert code == 0, err
    assert card.read_bytes() == text
    assert str(card.with_suffix(".safetensors").relative_to(root)) in err  # it must be in the commit, too
    assert entries.read_entry(paths(root)[1])["model"]["title"] == "As it stands"
    valid(root)


def test_a_card_that_pins_no_weights_pins_those_of_the_entry(root: Path, run: Path, cli: Cli) -> None:
    card, _, _ = paths(root)
    source = {"type": "url", "url": "https://example.org/weights.safetensors"}
    samples.write_json(card, samples.card(NEW, sha256=None, sources=[source]))
    assert cli("submit", str(run), "--checkout", str(root), "--yes")[0] == 0
    assert cards.read_card(card).sha256 == samples.weights_hash(NEW)
    assert cards.read_card(card).document() == samples.card(NEW, sources=[source])
    valid(root)


def test_a_card_that_pins_other_weights_is_refused(root: Path, run: Path, cli: Cli) -> None:
    card, _, _ = paths(root)
    samples.write_json(card, samples.card(NEW, sha256="0" * 64, sources=[]))
    before = files(root)
    code, _, err = cli("submit", str(run), "--checkout", str(root), "--yes")
    assert (code, files(root)) == (1, before)
    assert "model.weights_sha256" in err


def write_card(
    folder: Path, weights: bytes | None = NEW.encode(), name: str = f"{NEW}.safetensors", **changes: Any
) -> Path:
    """A card from elsewhere, e.g. from training, with its weights beside it."""
    folder.mkdir()
    changes.setdefault("sources", [{"type": "package", "file": name}])
    samples.write_json(folder / "card.json", samples.card(NEW, **changes))
    if weights is not None:
        (folder / name).write_bytes(weights)
    return folder / "card.json"


def test_a_card_from_elsewhere_brings_its_weights(clone: Path, run: Path, cli: Cli, tmp_path: Path) -> None:
    card = write_card(tmp_path / "trained", title="Trained")
    code, _, err = cli("submit", str(run), "--checkout", str(clone), "--yes", "--card", str(card))
    assert code == 0, err
    target = paths(clone)[0]
    assert cards.read_card(target).title == "Trained"
    assert target.with_suffix(".safetensors").read_bytes() == NEW.encode()
    assert f"`{NEW}`" in (clone / "README.md").read_text("utf-8")
    valid(clone)
    code, _, err = cli("validate", "--changed", "origin/main", "--root", str(clone))
    assert code == 0, err


@pytest.mark.parametrize("weights", [None, b"other"])
def test_weights_that_the_card_does_not_pin_are_refused(
    root: Path, run: Path, cli: Cli, tmp_path: Path, weights: bytes | None
) -> None:
    card = write_card(tmp_path / "trained", weights)
    before = files(root)
    code, _, err = cli("submit", str(run), "--checkout", str(root), "--yes", "--card", str(card))
    assert (code, files(root)) == (1, before)
    assert f"{NEW}.safetensors is not the file that the card" in err
    assert "Put it there again" in err


@pytest.mark.parametrize("name", ["weights.safetensors", f"{NEW}.pt", "New.safetensors"])
def test_weights_that_ci_would_refuse_are_refused_or_renamed(
    clone: Path, run: Path, cli: Cli, tmp_path: Path, name: str
) -> None:
    """Only <model id>.safetensors may lie in model_zoo/."""
    card = write_card(tmp_path / "trained", name=name)
    before = files(clone)
    code, _, err = cli("submit", str(run), "--checkout", str(clone), "--yes", "--card", str(card))
    if code:
        assert files(clone) == before
        assert name in err
    else:
        code, _, err = cli("validate", "--changed", "origin/main", "--root", str(clone))
        assert code == 0, err


def test_weights_that_are_too_large_for_the_repository_are_refused(
    root: Path, run: Path, cli: Cli, tmp_path: Path
) -> None:
    """They go to the Hub; CI would say so later."""
    data = bytes(10_000_001)
    entry = json.loads((run / f"{NEW}.json").read_text("utf-8"))
    found = evidence.from_bytes((run / f"{NEW}.parquet").read_bytes(), source="f")
    identity = {**found.metadata["identity"], "weights": sha256_bytes(data)}
    parquet = evidence.to_bytes(evidence.Evidence(found.groups, {**found.metadata, "identity": identity}))
    entry["model"]["weights_sha256"] = sha256_bytes(data)
    entry["evidence"]["sha256"] = sha256_bytes(parquet)
    samples.write_json(run / f"{NEW}.json", entry)
    (run / f"{NEW}.parquet").write_bytes(parquet)
    card = write_card(tmp_path / "trained", data, sha256=sha256_bytes(data))
    before = files(root)
    code, _, err = cli("submit", str(run), "--checkout", str(root), "--yes", "--card", str(card))
    assert code != 0
    assert files(root) == before
    assert "segbench publish" in err


def test_a_card_of_another_id_than_the_one_given_is_refused(root: Path, run: Path, cli: Cli, tmp_path: Path) -> None:
    """Or the model would be submitted under a name that nobody asked for."""
    card = write_card(tmp_path / "trained")
    before = files(root)
    code, _, err = cli(
        "submit", str(run), "--checkout", str(root), "--yes", "--card", str(card), "--id", "other_shapes"
    )
    assert (code, files(root)) == (2, before)
    assert "--id" in err


def test_a_card_of_another_data_set_is_refused(root: Path, run: Path, cli: Cli, tmp_path: Path) -> None:
    card = write_card(tmp_path / "trained", dataset="camvid")
    before = files(root)
    code, _, _ = cli("submit", str(run), "--checkout", str(root), "--yes", "--card", str(card))
    assert (code, files(root)) == (1, before)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_card_that_is_none_is_refused(root: Path, run: Path, cli: Cli, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "card.json").write_text(text, "utf-8")
    before = files(root)
    code, _, err = cli("submit", str(run), "--checkout", str(root), "--yes", "--card", str(tmp_path / "card.json"))
    assert (code, files(root)) == (1, before)
    assert "card.json" in err


# Runs that cannot be submitted.


def rewrite(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = run / f"{NEW}.json"
    document = json.loads(path.read_text("utf-8"))
    change(document)
    samples.write_json(path, document)


def refused(root: Path, run: Path, cli: Cli, *options: str, code: int = 1) -> str:
    """What is said; nothing is written."""
    before = files(root)
    found, out, err = cli("submit", str(run), "--checkout", str(root), "--yes", "--method", "AT", *options)
    assert (found, out, files(root)) == (code, "", before)
    return err


def test_a_run_that_is_not_official_is_refused_with_the_mend(root: Path, run: Path, cli: Cli) -> None:
    rewrite(run, lambda entry: entry["protocol"].update(official=False, deviations=["5 of 6 images"]))
    err = refused(root, run, cli)
    assert "is not official (5 of 6 images)" in err
    assert "segbench evaluate without --limit, --iterations and --eps" in err


def test_damaged_evidence_is_refused(root: Path, run: Path, cli: Cli) -> None:
    parquet = run / f"{NEW}.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-20])
    assert "evidence.sha256 is not the hash" in refused(root, run, cli)
    rewrite(run, lambda entry: entry["evidence"].update(sha256=sha256_bytes(parquet.read_bytes())))
    assert "is damaged or not a Parquet file" in refused(root, run, cli)
    parquet.unlink()
    assert "its evidence cannot be read" in refused(root, run, cli)


def test_edited_scores_are_refused(root: Path, run: Path, cli: Cli) -> None:
    rewrite(run, lambda entry: entry["clean"].update(miou=0.99))
    assert "clean.miou states 0.99, the evidence gives" in refused(root, run, cli)


def test_a_reported_entry_is_refused(root: Path, run: Path, cli: Cli) -> None:
    def report(entry: dict[str, Any]) -> None:
        entry |= {"evidence": None, "run": None, "flags": []}
        entry["claim"] |= {"tier": "reported", "source": "A paper"}
        entry["protocol"] |= {"official": False, "deviations": ["of a paper"]}

    rewrite(run, report)
    assert "not official" in refused(root, run, cli)


def test_a_run_of_other_data_than_the_others_is_refused(root: Path, run: Path, cli: Cli) -> None:
    found = evidence.from_bytes((run / f"{NEW}.parquet").read_bytes(), source="f")
    identity = {**found.metadata["identity"], "fingerprint": "0" * 64}
    data = evidence.to_bytes(evidence.Evidence(found.groups, {**found.metadata, "identity": identity}))
    (run / f"{NEW}.parquet").write_bytes(data)

    def change(entry: dict[str, Any]) -> None:
        entry["dataset"]["fingerprint"] = "0" * 64
        entry["evidence"]["sha256"] = sha256_bytes(data)

    rewrite(run, change)
    err = refused(root, run, cli)
    assert "Nothing was submitted" in err
    assert "dataset.fingerprint is 0000" in err


def test_an_unfinished_run_is_refused_with_the_mend(root: Path, run: Path, cli: Cli, tmp_path: Path) -> None:
    (run / f"{NEW}.json").unlink()
    assert f"segbench merge {run}" in refused(root, run, cli)
    for name in ("a", "b"):
        (run / f"{name}.json").write_text("{}", "utf-8")
    assert "holds 2 entries, not one" in refused(root, run, cli)
    assert "neither a run directory nor an entry" in refused(root, tmp_path / "none", cli)


def test_the_checkout_is_that_of_the_current_folder(
    root: Path, run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the one from which the package happens to be installed."""
    monkeypatch.chdir(root / "entries")
    code, _, err = cli("submit", str(run), "--yes", "--method", "AT", "--no-pr")
    assert code == 0, err
    assert (root / "model_zoo" / "shapes" / f"{NEW}.json").is_file()


def test_a_folder_without_a_name_has_no_leaderboard(tmp_path: Path) -> None:
    path = submission.find_entry(write_run(tmp_path / "unnamed", dataset="folder"))
    with pytest.raises(ContentError, match=r"a folder without a name.*dataset\.yaml: name: NAME"):
        submission.checked_entry(path)
    named = submission.find_entry(write_run(tmp_path / "named", dataset="folder/mine"))
    assert submission.checked_entry(named)["dataset"]["id"] == "folder/mine"


def test_a_folder_that_is_no_checkout_is_refused(run: Path, cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("submit", str(run), "--checkout", str(tmp_path), "--yes", "--method", "AT")
    assert code == 2
    assert "git clone the repository, and give it: --checkout FOLDER" in err


# Listed models.


def reported(root: Path, model_id: str = A) -> None:
    """Replaces a listed entry by the numbers of a paper."""
    card, path, parquet = paths(root, model_id)
    entry = json.loads(path.read_text("utf-8")) | {"evidence": None, "run": None, "flags": []}
    entry["claim"] |= {"tier": "reported", "source": "A paper, Table 2"}
    entry["protocol"] |= {"official": False, "deviations": ["of a paper"]}
    entry["clean"] |= {"miou": 0.5}
    parquet.unlink()
    samples.write_json(path, entry)
    samples.write_json(card, json.loads(card.read_text("utf-8")) | {"sha256": None})


def test_a_measurement_replaces_reported_numbers_and_tells_so_by_itself(root: Path, cli: Cli, tmp_path: Path) -> None:
    reported(root)
    run = write_run(tmp_path / "again", A, 0.85)
    code, out, err = cli("submit", str(run), "--checkout", str(root), "--yes")
    assert code == 0, err
    entry = entries.read_entry(paths(root, A)[1])
    (line,) = entry["history"]
    assert line["text"] == "Measured; before, the numbers of A paper, Table 2."
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", line["date"])
    assert (entry["claim"]["tier"], entry["claim"]["source"]) == ("checked", None)
    assert cards.read_card(paths(root, A)[0]).sha256 == samples.weights_hash(A)
    assert f"{A} rank 1 -> rank 1 of 2 entries" in out
    valid(root, A)


def test_a_reported_entry_replaced_with_a_reason_of_ones_own(root: Path, cli: Cli, tmp_path: Path) -> None:
    reported(root)
    run = write_run(tmp_path / "again", A, 0.85)
    assert cli("submit", str(run), "--checkout", str(root), "--yes", "--reason", "Measured by its authors.")[0] == 0
    assert [line["text"] for line in entries.read_entry(paths(root, A)[1])["history"]] == ["Measured by its authors."]


def test_other_scores_of_a_checked_entry_need_a_reason(root: Path, cli: Cli, tmp_path: Path) -> None:
    run = write_run(tmp_path / "again", A, 0.3)
    before = files(root)
    code, _, err = cli("submit", str(run), "--checkout", str(root), "--yes")
    assert (code, files(root)) == (2, before)
    assert f"{A} is listed with other scores. Say why they change: --reason TEXT" in err
    code, out, err = cli(
        "submit", str(run), "--checkout", str(root), "--yes", "--reason", "A bug in the data was found."
    )
    assert code == 0, err
    assert [line["text"] for line in entries.read_entry(paths(root, A)[1])["history"]] == [
        "A bug in the data was found."
    ]
    assert f"{A} rank 1 -> rank 2 of 2 entries" in out
    run = write_run(tmp_path / "third", A, 0.6)
    assert cli("submit", str(run), "--checkout", str(root), "--yes", "--reason", "And another one after it.")[0] == 0
    history = [line["text"] for line in entries.read_entry(paths(root, A)[1])["history"]]
    assert history == ["A bug in the data was found.", "And another one after it."]
    valid(root, A)


def test_the_update_of_a_listed_model_passes_the_check_of_ci(clone: Path, cli: Cli, tmp_path: Path) -> None:
    run = write_run(tmp_path / "again", A, 0.3)
    assert (
        cli("submit", str(run), "--checkout", str(clone), "--yes", "--reason", "A bug in the data was found.")[0] == 0
    )
    code, out, err = cli("validate", "--changed", "origin/main", "--root", str(clone))
    assert code == 0, err
    assert f"| `{A}` | shapes (sea-v1) | 1 | 2 | 2 |" in out


@pytest.mark.parametrize("reason", ["short", "x" * 501])
def test_a_reason_too_short_or_too_long_is_refused(root: Path, cli: Cli, tmp_path: Path, reason: str) -> None:
    run = write_run(tmp_path / "again", A, 0.3)
    err = refused(root, run, cli, "--reason", reason)
    assert "history.0.text: " in err


def test_the_same_scores_again_need_no_reason_and_no_line(root: Path, cli: Cli, tmp_path: Path) -> None:
    run = write_run(tmp_path / "again", A, 0.9)
    before = files(root)
    code, out, _ = cli("submit", str(run), "--checkout", str(root), "--yes")
    assert (code, files(root)) == (0, before)
    assert f"{A} rank 1 -> rank 1 of 2 entries" in out


def test_a_replaced_entry_with_additions_of_the_old_one_is_told(root: Path, cli: Cli, tmp_path: Path) -> None:
    """They belong to evidence that is gone; CI would refuse them, and the board would mix both."""
    _, path, _ = paths(root, A)
    found = evidence.from_bytes(path.with_suffix(".parquet").read_bytes(), source="f")
    document, data = additions.build_external(
        entries.read_entry(path), found, {(8.0, "square"): found.groups[12.0, "js"]}, name="square",
        description="A random search.", author="Somebody", url="https://example.org/square", date="2026-02-01",
    )  # fmt: skip
    folder = additions.folder_of(path, additions.EXTERNAL)
    folder.mkdir()
    samples.write_json(folder / "square.json", document)
    (folder / "square.parquet").write_bytes(data)
    run = write_run(tmp_path / "again", A, 0.3)
    before = files(root)
    code, _, err = cli("submit", str(run), "--checkout", str(root), "--yes", "--reason", "A bug in the data was found.")
    if code == 0:
        assert entries.validate_addition(folder / "square.json") == []
    else:
        assert files(root) == before
        assert "square.json" in err


# Nothing is half written.


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("model_id", [NEW, A])
def test_a_write_that_fails_leaves_the_checkout_as_it_was(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, model_id: str
) -> None:
    run = write_run(tmp_path / "again", model_id, 0.3)
    card = write_card(tmp_path / "trained", title="Trained") if model_id == NEW else paths(root, A)[0]
    calls, real = 0, submission.write_atomic

    def fail_once(path: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(submission, "write_atomic", fail_once)
    before = files(root)
    with pytest.raises(OSError, match="No space left"):
        submission.write(
            root, run / f"{model_id}.json", cards.read_card(card), submitter=None, date="2026-02-01",
            reason="A bug in the data was found.",
        )  # fmt: skip
    assert files(root) == before
    assert calls >= call


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("model_id", [NEW, A])
def test_a_disk_that_stays_full_leaves_the_checkout_as_it_was(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, model_id: str
) -> None:
    """What was there cannot be written again then, so it must not be gone."""
    run = write_run(tmp_path / "again", model_id, 0.3)
    card = write_card(tmp_path / "trained", title="Trained") if model_id == NEW else paths(root, A)[0]
    calls, real = 0, submission.write_atomic

    def full(path: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(submission, "write_atomic", full)
    before = files(root)
    with pytest.raises(OSError, match="No space left"):
        submission.write(
            root, run / f"{model_id}.json", cards.read_card(card), submitter=None, date="2026-02-01",
            reason="A bug in the data was found.",
        )  # fmt: skip
    assert files(root) == before


def test_an_interrupt_while_writing_leaves_the_checkout_as_it_was(
    root: Path, run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = 0, submission.write_atomic

    def interrupted(path: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        real(path, data)
        if calls == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(submission, "write_atomic", interrupted)
    before = files(root)
    code, _, _ = cli("submit", str(run), "--checkout", str(root), "--yes", "--method", "AT")
    assert (code, files(root)) == (130, before)


def test_a_full_disk_is_told_without_traceback(
    root: Path, run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(submission, "write_atomic", full)
    assert "No space left on device" in refused(root, run, cli)


def test_an_update_that_is_not_valid_restores_what_was_there(root: Path, cli: Cli, tmp_path: Path) -> None:
    """Files that exist, and are not all replaced by the same."""
    run = write_run(tmp_path / "again", A, 0.3)
    err = refused(root, run, cli, "--reason", "x" * 501)
    assert "Nothing was submitted" in err


def test_a_board_page_without_markers_is_told_before_anything_is_written(root: Path, run: Path, cli: Cli) -> None:
    (root / "leaderboard" / "README.md").write_text("# Leaderboard\n", "utf-8")
    assert "must hold these two lines once each" in refused(root, run, cli)


def test_a_damaged_entry_of_another_model_is_told_before_anything_is_written(root: Path, run: Path, cli: Cli) -> None:
    paths(root, B)[2].write_bytes(b"x")
    assert f"{B}.parquet" in refused(root, run, cli)


# Text of strangers.

HARMLESS = {
    "script": "<script>alert(1)</script>",
    "escape": "\x1b[31mred\x1b[2J",
    "direction": "abc\u202edef",
    "formula": '=cmd|"/C calc"!A0',
    "markdown": "[x](https://evil.example) | `x` <!-- end of models -->",
    "lines": "one\ntwo\n\n## three",
    "null": "a\x00b",
    "emoji": "🦕 模型",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("option", ["--title", "--submitter", "--backbone"])
def test_hostile_text_is_harmless_or_refused(root: Path, run: Path, cli: Cli, name: str, option: str) -> None:
    before, text = files(root), HARMLESS[name]
    weights = "https://example.org/weights.safetensors"  # so that the model is in the table of models too
    options = {"--method": "AT", "--weights": weights} | {option: text}
    code, out, err = cli(
        "submit", str(run), "--checkout", str(root), "--yes", *(part for each in options.items() for part in each)
    )
    assert "\x1b" not in out + err
    assert "\u202e" not in out + err
    if code:
        assert files(root) == before
        return
    valid(root)
    for page in (root / "README.md", root / "leaderboard" / "README.md"):
        shown = page.read_text("utf-8")
        assert not any(bad in shown for bad in ("\x1b", "\u202e", "\x00", "<script", "](https://evil", "## three"))
        (line,) = [line for line in shown.splitlines() if f"`{NEW}`" in line]
        assert line.count("|") == 7 if page.parent == root else 11
    (table,) = leaderboard.load(root).tables
    assert all(char.isprintable() for char in json.dumps(table.rows, ensure_ascii=False))


@pytest.mark.parametrize(
    ("option", "limit"),
    [("--title", 200), ("--backbone", 100), ("--licence", 200), ("--extra-data", 300), ("--method", 60)],
)
def test_text_that_is_too_long_is_refused_and_the_limit_is_told(
    root: Path, run: Path, cli: Cli, option: str, limit: int
) -> None:
    err = refused(root, run, cli, option, "x" * 100_000, code=2)
    assert str(limit) in err
    assert len(err) < 2000
    assert cli("submit", str(run), "--checkout", str(root), "--yes", "--method", "AT", option, "x" * limit)[0] == 0


def test_a_submitter_that_is_too_long_is_refused_and_the_limit_is_told(root: Path, run: Path, cli: Cli) -> None:
    err = refused(root, run, cli, "--submitter", "x" * 100_000)
    assert "200" in err
    assert len(err) < 2000


# Options.


@pytest.mark.parametrize(
    "weights",
    [
        "model.safetensors", "hub:user/name", "hub:user/name:file.safetensors",
        "hub:user/name@main:model.safetensors", f"hub:user/name@{COMMIT}", f"hub:user/name@{COMMIT}:",
        f"hub:user/name@{COMMIT}:../model.safetensors", f"hub:user/name@{COMMIT}:model.zip",
        f"hub:user/name@{COMMIT.upper()}:model.safetensors", f"hub:../name@{COMMIT}:model.safetensors",
        "http://example.org/x.safetensors", "file:///etc/passwd", "javascript:alert(1)",
        "https://me:secret@example.org/x.safetensors", "https://example.org/a b",
        "x" * 100_000,
    ],
)  # fmt: skip
def test_bad_weights_are_refused_with_the_three_forms(root: Path, run: Path, cli: Cli, weights: str) -> None:
    err = refused(root, run, cli, "--weights", weights, code=2)
    assert "Write hub:user/name@COMMIT:FILE, an https link, or none." in err


def test_weights_of_this_machine_only_are_refused(root: Path, run: Path, cli: Cli) -> None:
    """A card may name them for a try; nobody else could use it, and `validate` refuses it."""
    before = files(root)
    code, _, _ = cli(
        "submit",
        str(run),
        "--checkout",
        str(root),
        "--yes",
        "--method",
        "AT",
        "--weights",
        "http://localhost/x.safetensors",
    )
    assert code != 0
    assert files(root) == before


@pytest.mark.parametrize(
    ("weights", "sources"),
    [
        ("none", []),
        ("", []),
        ("https://example.org/x.pt", [{"type": "url", "url": "https://example.org/x.pt"}]),
        (
            f"hub:user/name@{COMMIT}:a/b.bin",
            [{"type": "hub", "repo": "user/name", "revision": COMMIT, "file": "a/b.bin"}],
        ),
    ],
)
def test_the_three_forms_of_weights(
    root: Path, run: Path, cli: Cli, weights: str, sources: list[dict[str, str]]
) -> None:
    assert cli("submit", str(run), "--checkout", str(root), "--yes", "--method", "AT", "--weights", weights)[0] == 0
    assert cards.read_card(paths(root)[0]).sources == sources


@pytest.mark.parametrize(
    "options",
    [
        ["--paper-title", "T"],
        ["--paper-title", "T", "--paper-authors", "A", "--paper-url", "https://example.org/"],
        ["--paper-title", "T", "--paper-authors", "A", "--paper-year", "2024"],
        ["--paper-title", "T", "--paper-url", "https://example.org/", "--paper-year", "2024"],
        ["--paper-title", "T", "--paper-url", "https://example.org/", "--paper-year", "2024", "--paper-authors", " ; "],
    ],
)
def test_an_incomplete_paper_is_refused(root: Path, run: Path, cli: Cli, options: list[str]) -> None:
    err = refused(root, run, cli, *options, code=2)
    assert "--paper-authors, --paper-url and --paper-year" in err or "paper.authors" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [("authors", "A"), ("url", "https://example.org/"), ("venue", "V"), ("year", "2024"), ("bibtex", "x.bib")],
)
def test_a_paper_without_title_is_refused(root: Path, run: Path, cli: Cli, option: str, value: str) -> None:
    assert f"--paper-{option} needs --paper-title." in refused(root, run, cli, f"--paper-{option}", value, code=2)


PAPER = ["--paper-title", "T", "--paper-authors", "A", "--paper-url", "https://example.org/", "--paper-year", "2024"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--paper-url", "http://example.org/"], "paper.url: "),
        (["--paper-url", "javascript:alert(1)"], "paper.url: "),
        (["--paper-year", "20244"], "paper.year: "),
        (["--paper-title", "x" * 301], "paper.title: "),
        (["--paper-bibtex", "none.bib"], "Cannot read none.bib"),
    ],
)
def test_a_bad_paper_is_refused(root: Path, run: Path, cli: Cli, changes: list[str], said: str) -> None:
    assert said in refused(root, run, cli, *PAPER, *changes, code=2)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--train-eps", "-1", "training.eps_255: "),
        ("--train-eps", "nan", "not a number that a card can hold"),
        ("--train-eps", "256", "training.eps_255: "),
        ("--attack-steps", "-1", "training.attack_steps: "),
        ("--epochs", "-1", "training.epochs: "),
        ("--epochs", "inf", "not a number that a card can hold"),
        ("--attack-steps", "many", "is not a valid integer"),
        ("--initialisation", "magic", "is not one of"),
        ("--preprocessing", "x" * 501, "preprocessing: "),
    ],
)
def test_bad_values_are_refused(root: Path, run: Path, cli: Cli, option: str, value: str, said: str) -> None:
    assert said in refused(root, run, cli, option, value, code=2)


def test_a_slug_is_an_identifier() -> None:
    for text in ("UPerNet (Swin-T)", "", "___", "ü", "x" * 200, "a" * 79 + "-b", "1 2"):
        assert re.fullmatch(r"[a-z0-9][a-z0-9_]{0,79}", submission.slug(text))


# Git.


def printed(out: str) -> list[list[str]]:
    return [shlex.split(line) for line in out.splitlines() if line.startswith(("git ", "gh "))]


def on_origin(clone: Path, branch: str) -> list[str]:
    """The files of the branch's one commit on top of main, at the origin."""
    origin = git(clone, "remote", "get-url", "origin")
    assert git(Path(origin), "rev-list", "--count", f"main..{branch}") == "1"
    return git(Path(origin), "diff", "--name-only", "main", branch).splitlines()


def expected_files(clone: Path, model_id: str = NEW) -> list[str]:
    return sorted(
        [*(str(path.relative_to(clone)) for path in paths(clone, model_id)), "README.md", "leaderboard/README.md"]
    )


def test_the_printed_commands_push_a_branch(clone: Path, run: Path, cli: Cli) -> None:
    code, out, err = cli("submit", str(run), "--checkout", str(clone), "--yes", "--method", "AT")
    assert code == 0
    assert f"In {clone}:" in err
    assert "open the pull request on GitHub" in err
    commands = printed(out)
    assert [command[:2] for command in commands] == [
        ["git", "switch"], ["git", "add"], ["git", "commit"], ["git", "push"],
    ]  # fmt: skip
    assert git(clone, "branch", "--show-current") == "main"  # nothing was run
    for command in commands:
        subprocess.run(command, cwd=clone, check=True, capture_output=True)
    assert on_origin(clone, f"submit-{NEW}") == expected_files(clone)
    assert git(clone, "log", "-1", "--format=%s") == f"Add {NEW}"
    assert git(clone, "status", "--short") == ""


def test_the_printed_lines_may_be_pasted_into_a_shell(clone: Path, run: Path, cli: Cli) -> None:
    _, out, _ = cli("submit", str(run), "--checkout", str(clone), "--yes", "--method", "AT", "--title", "a; touch x")
    lines = "\n".join(line for line in out.splitlines() if line.startswith("git "))
    subprocess.run(["sh", "-e", "-c", lines], cwd=clone, check=True, capture_output=True)
    assert on_origin(clone, f"submit-{NEW}") == expected_files(clone)


def test_other_changes_of_the_checkout_are_not_committed(clone: Path, run: Path, cli: Cli) -> None:
    (clone / "mine.txt").write_text("staged\n", "utf-8")
    git(clone, "add", "mine.txt")
    _, out, _ = cli("submit", str(run), "--checkout", str(clone), "--yes", "--method", "AT")
    for command in printed(out):
        subprocess.run(command, cwd=clone, check=True, capture_output=True)
    assert on_origin(clone, f"submit-{NEW}") == expected_files(clone)
    assert git(clone, "status", "--short") == "A  mine.txt"


def test_the_commands_of_a_second_call_push_the_same_files(clone: Path, run: Path, cli: Cli) -> None:
    """Whoever only looked at first, and calls again, finds the files written already."""
    assert cli("submit", str(run), "--checkout", str(clone), "--yes", "--method", "AT")[0] == 0
    code, out, err = cli("submit", str(run), "--checkout", str(clone), "--yes")
    assert code == 0, err
    for command in printed(out):
        subprocess.run(command, cwd=clone, check=True, capture_output=True)
    assert on_origin(clone, f"submit-{NEW}") == expected_files(clone)


def test_an_update_says_so(clone: Path, cli: Cli, tmp_path: Path) -> None:
    run = write_run(tmp_path / "again", A, 0.3)
    _, out, _ = cli("submit", str(run), "--checkout", str(clone), "--yes", "--reason", "A bug in the data was found.")
    for command in printed(out):
        subprocess.run(command, cwd=clone, check=True, capture_output=True)
    assert git(clone, "log", "-1", "--format=%s") == f"Update {A}"
    entry, parquet = (str(path.relative_to(clone)) for path in paths(clone, A)[1:])
    assert on_origin(clone, f"submit-{A}") == sorted([entry, parquet, "leaderboard/README.md"])


# The pull request.


@pytest.fixture
def gh(programs: Path, tmp_path: Path) -> Path:
    """A fake gh; writes its arguments, one a line, and where it ran."""
    record = tmp_path / "gh.txt"
    file = programs / "gh"
    file.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > "{record}"\npwd >> "{record}"\necho https://example.org/1\n', "utf-8"
    )
    file.chmod(0o755)
    return record


@pytest.fixture
def fd_cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Like `cli`, with the output of the programs that it runs."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(args)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return run


def test_pr_runs_everything(clone: Path, run: Path, fd_cli: Cli, gh: Path) -> None:
    code, _, err = fd_cli("submit", str(run), "--checkout", str(clone), "--yes", "--method", "AT", "--pr")
    assert code == 0, err
    assert on_origin(clone, f"submit-{NEW}") == expected_files(clone)
    lines = gh.read_text("utf-8").splitlines()
    assert lines[:4] == ["pr", "create", "--title", f"Add {NEW}"]
    assert lines[4] == "--body"
    assert "CI recomputes every number from the evidence" in lines[5]
    assert lines[6:] == [str(clone)]
    assert f"$ git switch -c submit-{NEW}" in err


def test_pr_after_a_call_without_it(clone: Path, run: Path, fd_cli: Cli, gh: Path) -> None:
    assert fd_cli("submit", str(run), "--checkout", str(clone), "--yes", "--method", "AT", "--no-pr")[0] == 0
    assert not gh.exists()
    code, _, err = fd_cli("submit", str(run), "--checkout", str(clone), "--yes", "--pr")
    assert code == 0, err
    assert on_origin(clone, f"submit-{NEW}") == expected_files(clone)
    assert gh.read_text("utf-8").startswith("pr\ncreate\n")


def test_pr_with_json_leaves_standard_output_to_the_json(clone: Path, run: Path, fd_cli: Cli, gh: Path) -> None:
    code, out, _ = fd_cli("submit", str(run), "--checkout", str(clone), "--yes", "--method", "AT", "--pr", "--json")
    assert code == 0
    assert json.loads(out)["model"] == NEW
    assert gh.exists()


def test_without_pr_and_without_a_terminal_nothing_is_run(clone: Path, run: Path, fd_cli: Cli, gh: Path) -> None:
    code, out, _ = fd_cli("submit", str(run), "--checkout", str(clone), "--yes", "--method", "AT")
    assert code == 0
    assert printed(out)[-1][:3] == ["gh", "pr", "create"]
    assert not gh.exists()
    assert git(clone, "branch", "--list") == "* main"


def test_a_command_that_fails_stops_the_others(clone: Path, run: Path, fd_cli: Cli, gh: Path) -> None:
    git(clone, "branch", f"submit-{NEW}")
    code, _, err = fd_cli("submit", str(run), "--checkout", str(clone), "--yes", "--method", "AT", "--pr")
    assert code == 1
    assert "`git switch` failed. The files are written; go on by hand from there." in err
    assert not gh.exists()
    valid(clone)


def test_pr_without_gh_is_refused_before_anything_is_written(clone: Path, run: Path, fd_cli: Cli) -> None:
    err = refused(clone, run, fd_cli, "--pr", code=2)
    assert "gh" in err
    assert "--no-pr" in err


# On a terminal.


class Terminal:
    """`python -m segbench` on a pseudo-terminal, which answers what it is asked."""

    def __init__(self, *args: str, cwd: Path) -> None:
        self.master, slave = pty.openpty()
        self.text, self.seen = "", 0
        env = {**os.environ, "SEGBENCH_CACHE": str(cwd / "cache"), "TERM": "dumb", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER, *args], cwd=cwd, env=env, stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True,
        )  # fmt: skip
        os.close(slave)

    def read(self, until: str | None, limit_s: float = 60) -> None:
        """Reads on until a text that has not been read past yet, or the end."""
        end = time.monotonic() + limit_s
        while until is None or (place := self.text.find(until, self.seen)) < 0:
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"waited for {until!r} after:\n{self.text}"
            try:
                data = os.read(self.master, 4096)
            except OSError:  # Linux: the other end is closed
                data = b""
            if not data:
                assert until is None, f"ended before {until!r}:\n{self.text}"
                return
            self.text += data.decode("utf-8", "replace").replace("\r\n", "\n")
        self.seen = place + len(until)

    def answer(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, again while nothing happens: Python may miss one between its prompt and its wait."""
        for _ in range(20):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.answer("\x03")
                self.process.wait(timeout=0.5)
                return

    def end(self) -> int:
        self.read(None)
        code = self.process.wait(timeout=60)
        os.close(self.master)
        return code


# Takes the terminal as its own, so that Ctrl-C reaches it, and runs segbench as `python -m segbench` does.
STARTER = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.argv[0] = "segbench"
runpy.run_module("segbench", run_name="__main__", alter_sys=True)
"""

QUESTIONS = (
    "Title", "Training method", "Backbone", "Weights", "Licence", "Title of the paper", "ε of the training attack",
    "Steps of the training attack", "Epochs", "Initialisation", "Extra data", "Preprocessing", "Your GitHub account",
)  # fmt: skip


@pytest.fixture
def camvid(tmp_path: Path) -> tuple[Path, Path]:
    """A checkout and a run on a data set whose labels this version does not know."""
    root = samples.checkout(tmp_path / "camvid")
    samples.publish(root, "a_camvid", 0.9, dataset="camvid")
    leaderboard.write_tables(root, leaderboard.load(root))
    return root, write_run(tmp_path / "runs" / "camvid", "b_camvid", 0.5, dataset="camvid")


@pytest.fixture
def terminals() -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*args: str, cwd: Path) -> Terminal:
        started.append(Terminal(*args, cwd=cwd))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


@pytest.mark.slow
def test_questions_are_answered_on_a_terminal_and_enter_is_unknown(
    camvid: tuple[Path, Path], tmp_path: Path, terminals: Callable[..., Terminal]
) -> None:
    root, run = camvid
    terminal = terminals("submit", str(run), "--checkout", str(root), "--no-pr", cwd=tmp_path)
    answers = {
        "Training method": "AT",
        "Epochs": "2.5",
        "Steps of the training attack": "3",
        "Your GitHub account": "me",
    }
    for question in QUESTIONS:
        terminal.read(f"{question}")
        terminal.read(": ")
        terminal.answer(answers.get(question, "") + "\n")
    assert terminal.end() == 0, terminal.text
    assert "b_camvid has no card yet. Some questions" in terminal.text
    assert "camvid (sea-v1): b_camvid not listed -> rank 2 of 2 entries" in terminal.text
    assert "Traceback" not in terminal.text
    card_path, entry_path, _ = paths(root, "b_camvid", "camvid")
    card = cards.read_card(card_path)
    assert (card.title, card.preprocessing) == ("Model b_camvid", "as stored")  # the defaults in brackets
    assert card.backbone is card.licence is card.paper is None
    assert card.sources == []
    assert card.training == {
        "method": "AT", "eps_255": None, "attack_steps": 3, "epochs": 2.5, "initialisation": None, "extra_data": None,
        "recipe": None, "log": None,
    }  # fmt: skip
    assert entries.read_entry(entry_path)["claim"]["submitter"] == "me"


@pytest.mark.slow
def test_what_was_given_is_not_asked(
    camvid: tuple[Path, Path], tmp_path: Path, terminals: Callable[..., Terminal]
) -> None:
    root, run = camvid
    terminal = terminals(
        "submit", str(run), "--checkout", str(root), "--no-pr", "--yes", "--method", "AT", cwd=tmp_path
    )
    assert terminal.end() == 0, terminal.text
    assert not any(question in terminal.text for question in QUESTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("question", ["Title", "Your GitHub account"])
def test_ctrl_c_at_a_question_leaves_the_checkout_untouched(
    camvid: tuple[Path, Path], tmp_path: Path, terminals: Callable[..., Terminal], question: str
) -> None:
    root, run = camvid
    before = files(root)
    terminal = terminals("submit", str(run), "--checkout", str(root), "--no-pr", "--method", "AT", cwd=tmp_path)
    for each in QUESTIONS:
        if each == "Training method":
            continue
        terminal.read(each)
        terminal.read(": ")
        if each == question:
            break
        terminal.answer("\n")
    terminal.interrupt()
    assert terminal.end() == 130, terminal.text
    assert files(root) == before
    assert "Traceback" not in terminal.text


@pytest.mark.slow
def test_a_closed_terminal_leaves_the_checkout_untouched(
    camvid: tuple[Path, Path], tmp_path: Path, terminals: Callable[..., Terminal]
) -> None:
    root, run = camvid
    before = files(root)
    terminal = terminals("submit", str(run), "--checkout", str(root), "--no-pr", cwd=tmp_path)
    terminal.read("Title")
    terminal.read(": ")
    terminal.answer("\x04")
    assert terminal.end() in (2, 130), terminal.text
    assert files(root) == before


@pytest.mark.slow
def test_a_bad_answer_is_told_and_asked_again(
    camvid: tuple[Path, Path], tmp_path: Path, terminals: Callable[..., Terminal]
) -> None:
    root, run = camvid
    before = files(root)
    terminal = terminals(
        "submit", str(run), "--checkout", str(root), "--no-pr", "--method", "AT", "--title", "T", "--backbone", "B",
        "--licence", "MIT", cwd=tmp_path,
    )  # fmt: skip
    terminal.read("Weights")
    terminal.read(": ")
    terminal.answer("somewhere\n")
    terminal.read("or none.")  # what is right
    terminal.read("Weights")
    terminal.read(": ")
    terminal.answer("\n")
    terminal.read("Title of the paper")
    terminal.read(": ")
    terminal.interrupt()
    assert terminal.end() == 130, terminal.text
    assert files(root) == before


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "opened"), [("y", True), ("", False)])
def test_on_a_terminal_with_gh_the_pull_request_is_asked_for(
    camvid: tuple[Path, Path], tmp_path: Path, terminals: Callable[..., Terminal], gh: Path, answer: str, opened: bool
) -> None:
    root, run = camvid
    git(root, "init", "--quiet", "-b", "main")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "base")
    git(root, "clone", "--quiet", "--bare", str(root), str(tmp_path / "origin.git"))
    git(root, "remote", "add", "origin", str(tmp_path / "origin.git"))
    samples.write_json(paths(root, "b_camvid", "camvid")[0], samples.card("b_camvid", "camvid", sources=[]))
    terminal = terminals("submit", str(run), "--checkout", str(root), "--submitter", "me", cwd=tmp_path)
    terminal.read("Open the pull request now?")
    terminal.answer(f"{answer}\n")
    assert terminal.end() == 0, terminal.text
    assert gh.exists() is opened
    assert (git(root, "branch", "--show-current") == "submit-b_camvid") is opened
    if not opened:
        assert "gh pr create" in terminal.text
