"""The rendered leaderboard, and the commands that read content: leaderboard, validate, show, models."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from segbench import content
from segbench.cli import main
from segbench.errors import ContentError
from segbench.leaderboard import END, START, Board, Table, escape, markdown, render, update
from segbench.protocol import LINF
from tests import samples

ROBUST, CLEAN = "at_convnext_mini_shapes", "clean_convnext_mini_shapes"


def score(value: float | None) -> dict[str, Any] | None:
    return None if value is None else {"value": value, "interval": None, "best_known": value, "rank": 1}


def row(model_id: str, mious: dict[str, float], clean: float = 0.5, rank: int = 1, **changes: Any) -> dict[str, Any]:
    """The fields of a row that markdown shows."""
    scores = {view: {"aacc": score(miou + 0.125), "miou": score(miou)} for view, miou in mious.items()}
    if "mean" in scores:
        scores["mean"]["miou"]["rank"] = rank
    scores["clean"] = {"aacc": score(clean + 0.25), "miou": score(clean)}
    return {
        "id": model_id, "architecture": "upernet_convnext", "backbone": "ConvNeXt", "parameters": 104744,
        "scores": scores, "flags": [], "tier": "checked", "unranked": None,
    } | changes  # fmt: skip


def table(rows: list[dict[str, Any]], dataset: str = "shapes", radii: tuple[float, ...] = (4.0, 8.0)) -> Table:
    views = ["clean", "mean", *(f"{eps:g}" for eps in radii)]
    for each in rows:
        each["scores"] = {view: each["scores"].get(view) for view in views}
    return Table("sea-v1", dataset, LINF.fields(), views, list(radii), [], rows)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def ids(rows: list[Any]) -> list[str]:
    return [row["model"]["id"] for row in rows]


def test_rendering_two_entries() -> None:
    weak = row(CLEAN, {"4": 0.02, "8": 0.0, "mean": 0.01}, clean=0.67384, rank=2)
    weak["flags"] = [
        {"name": "falls_to_zero", "level": "warning"},
        {"name": "zero_gradients", "level": "note"},
        {"name": "deterministic", "level": "warning"},
    ]
    ok = [{"name": "deterministic", "level": "ok"}]
    strong = row(ROBUST, {"4": 0.31249, "8": 0.2, "mean": 0.25}, parameters=None, backbone=None, flags=ok)
    assert render(Board([table([strong, weak])])) == (
        "## shapes (sea-v1)\n"
        "\n"
        "| # | model | backbone | parameters | clean | ε = 4/255 | ε = 8/255 | mean | warnings | tier |\n"
        "| --: | :-- | :-- | --: | --: | --: | --: | --: | :-- | :-- |\n"
        "| 1 | `at_convnext_mini_shapes` | upernet\\_convnext | – | 75.0 / 50.0 | 43.7 / 31.2 | 32.5 / 20.0 "
        "| 37.5 / 25.0 | none | checked |\n"
        "| 2 | `clean_convnext_mini_shapes` | ConvNeXt | 0.10M | 92.4 / 67.4 | 14.5 / 2.0 | 12.5 / 0.0 "
        "| 13.5 / 1.0 | falls\\_to\\_zero, deterministic | checked |\n"
        "\n" + markdown.LEGEND
    )


def test_nothing_to_render() -> None:
    assert render(Board([])) == "No entries yet."


def test_reported_entries_are_marked_and_have_no_flags() -> None:
    text = render(Board([table([row("a", {"4": 0.1}, tier="reported")])]))
    assert cells(text.splitlines()[4])[-2:] == ["–", "reported"]
    assert markdown.REPORTED in text


def test_a_radius_that_an_entry_lacks_is_a_dash_and_other_radii_are_named() -> None:
    text = render(Board([table([row("a", {"4": 0.3, "0.25": 0.4}), row("b", {"8": 0.2})], radii=(0.25, 4.0, 8.0))]))
    assert cells(text.splitlines()[2])[5:7] == ["ε = 4/255", "ε = 8/255"]
    assert [cells(line)[5:8] for line in text.splitlines() if "| `" in line] == [
        ["42.5 / 30.0", "–", "–"],
        ["–", "32.5 / 20.0", "–"],
    ]
    assert "Some entries also have results at ε = 0.25/255." in text


def test_a_score_that_nobody_published_is_a_dash() -> None:
    reported = row("a", {"4": 0.1})
    reported["scores"]["clean"]["aacc"] = None
    assert "– / 50.0" in render(Board([table([reported])]))


# Text of strangers.

HOSTILE = [
    "<script>alert(1)</script>", "<a href=x>", "<!-- end of tables -->", "&lt;b&gt;", "&#60;",
    "[x](https://evil.example)", "![x](https://evil.example/x.png)", "https://evil.example", "www.evil.example",
    "me@evil.example", "a | b", "|", "\\|", "\\", "\\`", "`code`", "**bold** _it_ ~~s~~", "# title", "--", "1. one",
    "line\nbreak", "a\r\nb", "\x1b[31mred", "a\u202eb",
]  # fmt: skip


def shown(text: str) -> str:
    """What a reader sees of ``text`` in a markdown cell; fails on anything but text."""
    html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = html.parse(f"| a | b |\n| -- | -- |\n| {escape(text)} | end |\n")
    assert [token.type for token in tokens].count("tr_open") == 2
    inline = [token for token in tokens if token.type == "inline"]
    assert [token.content for token in inline[:2]] == ["a", "b"]
    assert inline[3].content == "end"
    children = inline[2].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    return "".join(child.content for child in children)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_text(text: str) -> None:
    assert shown(text) == "".join(char for char in text if char.isprintable())


@settings(deadline=None, max_examples=300)
@given(
    st.text(st.sampled_from("ab<>&|\\`*_[]()#!~-+=:;./@\"' \n\t\x1bé&amp;&#124;"), max_size=20) | st.text(max_size=20)
)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    printable = "".join(char for char in text if char.isprintable())
    assert shown(text).strip() == printable.strip()


@pytest.mark.parametrize("text", ["https://evil.example", "www.evil.example", "me@evil.example"])
def test_no_bare_address_is_left_for_github_to_link(text: str) -> None:
    assert not any(mark in escape(text) for mark in ("://", "www.", "@"))


def test_a_hostile_entry_does_not_break_the_table_or_the_page(tmp_path: Path) -> None:
    rows = [row("a", {"4": 0.1}, backbone=text) for text in HOSTILE]
    tables = render(Board([table(rows)]))
    lines = [line for line in tables.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(HOSTILE)
    assert {line.count("|") for line in lines} == {11}
    page = samples.checkout(tmp_path) / "leaderboard" / "README.md"
    update(page, tables, check=False)
    assert update(page, tables, check=True)


# Between the markers.


def test_update_writes_between_the_markers_only(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{START}\nold\n{END}\n\nafter\n", "utf-8")
    assert update(page, "| new |", check=False) is False
    assert page.read_text("utf-8") == f"before\n\n{START}\n\n| new |\n\n{END}\n\nafter\n"
    assert update(page, "| new |", check=False) is True


def test_check_changes_nothing(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{START}\nold\n{END}", "utf-8")
    before = page.stat().st_mtime_ns, page.read_bytes()
    assert update(page, "| new |", check=True) is False
    assert (page.stat().st_mtime_ns, page.read_bytes()) == before


@pytest.mark.parametrize(
    "text", ["", START, END, f"{END}\n{START}", f"{START}\n{START}\n{END}", f"{START}\n{END}\n{END}"]
)
def test_missing_markers_are_told(tmp_path: Path, text: str) -> None:
    page = tmp_path / "README.md"
    page.write_text(text, "utf-8")
    with pytest.raises(ContentError, match="must hold these two lines once each, in this order") as caught:
        update(page, "| new |", check=False)
    assert START in str(caught.value)
    assert END in str(caught.value)
    assert page.read_text("utf-8") == text


def test_a_missing_or_unreadable_page_is_told(tmp_path: Path) -> None:
    with pytest.raises(ContentError, match=r"Cannot read .*README\.md"):
        update(tmp_path / "README.md", "", check=False)
    (tmp_path / "README.md").write_bytes(b"\xff")
    with pytest.raises(ContentError, match=r"Cannot read .*README\.md"):
        update(tmp_path / "README.md", "", check=False)


# The commands.

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command: exit code, standard output, standard error."""

    def run(*args: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with two models, which is also the installed content."""
    root = samples.checkout(tmp_path / "checkout")
    samples.publish(root, CLEAN, quality=0.5)
    samples.publish(root, ROBUST, quality=0.9)
    monkeypatch.setattr(content, "folder", lambda name: root / name)
    monkeypatch.setattr(content, "checkout", lambda: root)
    monkeypatch.chdir(tmp_path)  # from the checkout of these tests the command would write its tables
    return root


def test_leaderboard_writes_checks_and_sees_changes(root: Path, cli: Cli) -> None:
    page = root / "leaderboard" / "README.md"
    code, out, err = cli("leaderboard", "--check", "--root", root)
    assert (code, out) == (1, "")
    assert f"{page} is stale. Mend: segbench leaderboard" in err
    code, out, err = cli("leaderboard", "--root", root)
    assert code == 0
    assert "was written" in err
    assert out.strip() in page.read_text("utf-8")
    assert page.read_text("utf-8").endswith("After.\n")
    assert [cells(line)[1] for line in out.splitlines() if "| `" in line] == [f"`{ROBUST}`", f"`{CLEAN}`"]
    assert cli("leaderboard", "--check", "--root", root)[0] == 0
    assert "was up to date" in cli("leaderboard")[2]
    samples.publish(root, "another_convnext_mini_shapes", quality=0.7)
    assert cli("leaderboard", "--check", "--root", root)[0] == 1


def test_leaderboard_as_json_writes_nothing(root: Path, cli: Cli) -> None:
    before = (root / "leaderboard" / "README.md").read_bytes()
    code, out, _ = cli("leaderboard", "--json", "--root", root)
    assert code == 0
    (found,) = json.loads(out)["tables"]
    assert [each["id"] for each in found["rows"]] == [ROBUST, CLEAN]
    assert (root / "leaderboard" / "README.md").read_bytes() == before


def test_leaderboard_of_a_wheel_is_only_printed(root: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "checkout", lambda: None)
    before = (root / "leaderboard" / "README.md").read_bytes()
    code, out, _ = cli("leaderboard")
    assert code == 0
    assert ROBUST in out
    assert (root / "leaderboard" / "README.md").read_bytes() == before


def test_leaderboard_names_a_damaged_entry_and_missing_markers(root: Path, cli: Cli) -> None:
    page = root / "leaderboard" / "README.md"
    page.write_text("# Leaderboard\n")
    code, _, err = cli("leaderboard", "--root", root)
    assert code == 1
    assert START in err
    broken = root / "entries" / "sea-v1" / "shapes" / f"{CLEAN}.json"
    broken.write_text("{")
    code, _, err = cli("leaderboard", "--root", root)
    assert code == 1
    assert f"{broken} is not valid JSON" in err
    assert "Traceback" not in err


def test_leaderboard_of_a_folder_that_is_no_checkout(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("leaderboard", "--root", tmp_path)
    assert code == 1
    assert "Cannot read" in err


def test_validate_all(root: Path, cli: Cli) -> None:
    code, out, err = cli("validate")
    assert (code, out) == (0, "")
    assert "4 files are valid." in err
    code, out, _ = cli("validate", "--json")
    assert code == 0
    assert json.loads(out) == {"checked": 4, "problems": {}}


def forge(root: Path) -> Path:
    path = root / "entries" / "sea-v1" / "shapes" / f"{CLEAN}.json"
    document = json.loads(path.read_text())
    document["clean"]["miou"] = 0.99
    samples.write_json(path, document)
    return path


def test_validate_names_what_is_wrong(root: Path, cli: Cli) -> None:
    path = forge(root)
    code, out, err = cli("validate")
    assert (code, out) == (1, "")
    assert f"{path}: clean.miou states 0.99, the evidence gives" in err
    assert "1 of 4 files have problems." in err
    code, out, _ = cli("validate", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["checked"] == 4
    assert list(found["problems"]) == [str(path)]
    assert any("clean.miou" in text for text in found["problems"][str(path)])


def test_validate_takes_files_and_folders(root: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    path = forge(root)
    good = path.with_name(f"{ROBUST}.json")
    assert cli("validate", good)[0] == 0
    assert cli("validate", path)[0] == 1
    assert cli("validate", good, path)[0] == 1
    assert cli("validate", root / "model_zoo")[0] == 0
    assert cli("validate", root / "entries")[0] == 1
    monkeypatch.chdir(path.parent)  # a relative path is still published
    path.with_suffix(".parquet").unlink()
    code, _, err = cli("validate", path.name)
    assert code == 1
    assert "its evidence cannot be read" in err


def test_validate_of_an_unpublished_entry_knows_it_for_one(root: Path, cli: Cli, tmp_path: Path) -> None:
    """Also without its evidence, and beside weights; it needs no card."""
    document, data = samples.build("mine", dataset="camvid")
    path = tmp_path / "mine.json"
    samples.write_json(path, document)
    path.with_suffix(".safetensors").touch()
    code, _, err = cli("validate", path)
    assert code == 1
    assert "Put the file beside the entry" in err
    path.with_suffix(".parquet").write_bytes(data)
    assert cli("validate", path)[0] == 0


@pytest.mark.parametrize("text", [None, "{", "[]", '{"id": "x"}', "\x00"])
def test_validate_refuses_other_files(root: Path, cli: Cli, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    code, _, err = cli("validate", path)
    assert code == 1
    assert str(path) in err
    assert "Traceback" not in err


def test_validate_of_an_empty_folder(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("validate", tmp_path)
    assert code == 1
    assert "holds no card or entry" in err


def test_validate_looks_at_the_weights(root: Path, cli: Cli) -> None:
    card = next((root / "model_zoo" / "shapes").glob("*.json"))
    weights = card.with_suffix(".safetensors")
    weights.write_bytes(b"other")
    code, _, err = cli("validate", card)
    assert code == 1
    assert "does not have the SHA-256 of the card" in err
    weights.unlink()
    code, _, err = cli("validate", card)
    assert code == 1
    assert "are missing: put them beside it" in err


def test_validate_tells_where_a_card_belongs(root: Path, cli: Cli) -> None:
    card = root / "model_zoo" / "shapes" / f"{CLEAN}.json"
    card.rename(card.with_name("renamed.json"))
    code, _, err = cli("validate", root / "model_zoo")
    assert code == 1
    assert f"the card belongs at model_zoo/shapes/{CLEAN}.json: move it" in err


def test_validate_prints_each_problem_on_a_line_and_no_control_character(root: Path, cli: Cli) -> None:
    card = root / "model_zoo" / "shapes" / f"{CLEAN}.json"
    samples.write_json(card, samples.card(CLEAN, title="", **{"\x1b[2Jkey": 1}))
    code, _, err = cli("validate", card)
    assert code == 1
    lines = err.splitlines()
    assert any(line.startswith("  title: ") for line in lines)
    assert any(line.startswith("  document: ") for line in lines)
    assert "\x1b" not in err


def test_models(root: Path, cli: Cli) -> None:
    code, out, _ = cli("models")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "convnext_mini" in line] == [ROBUST, CLEAN]
    code, out, _ = cli("models", "clean*", "--json")
    assert code == 0
    assert json.loads(out) == [samples.card(CLEAN)]
    assert json.loads(cli("models", "none*", "--json")[1]) == []


def test_show(root: Path, cli: Cli) -> None:
    code, out, _ = cli("show", ROBUST)
    assert code == 0
    for text in ("upernet_convnext", samples.weights_hash(ROBUST), "sea-v1 on shapes, checked", "8/255", "mce_bal"):
        assert text in out
    assert "note: zero_gradients" in out
    code, out, _ = cli("show", ROBUST, "--json")
    found = json.loads(out)
    assert found["card"] == samples.card(ROBUST)
    assert ids(found["entries"]) == [ROBUST]


def test_show_is_harmless_in_a_terminal(root: Path, cli: Cli) -> None:
    card = root / "model_zoo" / "shapes" / f"{ROBUST}.json"
    samples.write_json(card, samples.card(ROBUST, title="\x1b[2Jtitle [bold]x[/bold]"))
    code, out, _ = cli("show", ROBUST)
    assert code == 0
    assert "\x1b" not in out
    assert "?[2Jtitle [bold]x[/bold]" in out


def test_show_of_an_unknown_model(root: Path, cli: Cli) -> None:
    code, out, err = cli("show", ROBUST + "s")
    assert (code, out) == (2, "")
    assert f"Did you mean {ROBUST!r}" in err


@pytest.mark.parametrize(
    "args", [["validate", "--jsn"], ["show"], ["models", "a", "b"], ["leaderboard", "--root"], ["leaderboards"]]
)
def test_wrong_usage_exits_with_2(cli: Cli, args: list[str]) -> None:
    code, out, err = cli(*args)
    assert (code, out) == (2, "")
    assert "Error" in err


@pytest.mark.slow
def test_serve_shows_the_site_until_ctrl_c(tmp_path: Path) -> None:
    root = samples.checkout(tmp_path / "checkout")
    samples.publish(root, ROBUST)
    command = [sys.executable, "-m", "segbench", "leaderboard", "serve", "--port", "0", "--no-browser"]
    process = subprocess.Popen(
        [*command, "--root", str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for background jobs
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert ROBUST in answer.read().decode("utf-8")
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err.splitlines()[-1]) == (0, "Ended.")
