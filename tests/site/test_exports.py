"""JSON, CSV and BibTeX of the site."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segbench.leaderboard.site import bibtex, exports, text
from segbench.protocol import LINF
from tests.site import samples

OWN = """@inproceedings{croce2024towards,
  title = {A {B}},
  author = {G{\\"o}del, K. and \\v{C}ech, E.},
  year = {2024}
}
"""


def paper(**changes: Any) -> dict[str, Any]:
    return {
        "title": "On 50% of {all} things_here",
        "authors": ["Kurt Gödel", "Ann & Co"],
        "url": "https://ok.example/a_b",
        "venue": None,
        "year": 2024,
        "bibtex": None,
    } | changes


@pytest.mark.slow
def test_json_has_everything_but_the_details(site: Path) -> None:
    document = json.loads((site / "leaderboard.json").read_text())
    assert document["schema_version"] == 2
    board = samples.small_board()
    assert [(part["protocol"], part["dataset"]) for part in document["tables"]] == [
        ("sea-v1", "shapes"),
        ("sea-v1", "camvid/small"),
    ]
    row = next(row for row in board.tables[0].rows if row["id"] == "at_everything_shapes")
    del row["detail"]
    assert LINF.printed(row) in document["tables"][0]["rows"]


def test_csv_has_a_line_for_each_entry_and_radius(site: Path) -> None:
    frame = pd.read_csv(site / "leaderboard.csv")
    assert len(frame) == 5 * 4 + 3 * 5
    line = frame[(frame.id == "at_everything_shapes") & (frame.eps_255 == 8)].iloc[0]
    assert (line.aacc, line.aacc_best_known, line.miou, line.miou_low) == (0.687, 0.674, 0.233, pytest.approx(0.213))
    assert (line.parameters, line.training_passes, line.warnings, line.date) == (
        104744,
        300,
        "sea_overestimates",
        "2026-11-22",
    )
    assert set(frame[frame.id == "first_camvid"].eps_255) == {0, 0.25, 4, 8, 12}
    missing = frame[(frame.id == "clean_d_shapes") & (frame.eps_255 == 0)].iloc[0]
    assert pd.isna(missing.aacc)
    assert missing.miou == 0.7


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@SUM(1)", " =1", "\t=1", "\r=1", "\u200b=1", "＝1", "\n@x"])
def test_no_cell_of_text_is_a_formula(formula: str) -> None:
    assert exports.cell(formula).startswith("'")


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40))
def test_any_text_stays_in_its_cell(words: str) -> None:
    row = samples.row("x", {"clean": (0.5, 0.5), "4": (0.4, 0.3)}, title=words, method=words)
    board = samples.Board([samples.Table("sea-v1", "shapes", LINF.fields(), ["clean", "mean", "4"], [4.0], [], [row])])
    lines = list(csv.reader(exports.to_csv(board).splitlines()))
    assert [len(line) for line in lines] == [len(lines[0])] * 3
    assert not lines[1][lines[0].index("title")].startswith(("=", "+", "-", "@", "\t", "\r"))


def test_an_empty_board_has_files() -> None:
    assert json.loads(exports.to_json(samples.Board([])))["tables"] == []
    assert exports.to_csv(samples.Board([])) == '"protocol","dataset","threat","id","strength","eps_255"\n'
    assert bibtex.bibliography(samples.Board([])) == ""


def test_papers_are_listed_once(site: Path) -> None:
    assert (site / "leaderboard.bib").read_text().count("@inproceedings{") == 1


def test_keys_are_unique() -> None:
    rows = [
        samples.row(
            "a", {"clean": (0.5, 0.5), "4": (0.4, 0.3)}, paper=paper(title=title, bibtex=OWN.replace("A {B}", title))
        )
        for title in ("One", "Two")
    ]
    board = samples.Board([samples.Table("sea-v1", "shapes", LINF.fields(), ["clean", "mean", "4"], [4.0], [], rows)])
    made = bibtex.bibliography(board)
    assert "@inproceedings{croce2024towards," in made
    assert "@inproceedings{croce2024towards-2," in made


def test_an_entry_of_the_card_is_kept() -> None:
    assert bibtex.entry(paper(bibtex=OWN)) == OWN.strip()


def test_an_entry_is_made_from_the_fields() -> None:
    assert bibtex.entry(paper(venue="ECCV")) == (
        "@inproceedings{godel2024thingshere,\n"
        "  title = {{On 50\\% of (all) things\\_here}},\n"
        "  author = {Kurt Gödel and Ann \\& Co},\n"
        "  booktitle = {ECCV},\n"
        "  year = {2024},\n"
        "  url = {https://ok.example/a_b}\n"
        "}"
    )


@pytest.mark.parametrize(
    "bad",
    [
        "@misc{a, title = {\\input{/etc/passwd}}}",
        "@misc{a, title = {\\write18{rm}}}",
        "@misc{a, title = {^^5cinput x}}",
        "@misc{a, title = {x}} @misc{b, title = {y}}",
        "@misc{a, title = {x}",
        "@misc{a, title = {x}}}",
        "@misc{a, title = {x}} trailing",
        "@string{a, b = {x}}",
        "@preamble{a, {x}}",
        "@misc{a, note = {x % y}}",
        "@misc{a, note = {$x$}}",
        "@misc{a, note = {\\csname input\\endcsname}}",
        "@misc{, title = {x}}",
        "@misc{a, title = {\u202ex}}",
        "text",
        "",
    ],
)
def test_dangerous_bibtex_is_not_used(bad: str) -> None:
    assert not bibtex.harmless(bad)
    assert "passwd" not in bibtex.entry(paper(bibtex=bad))


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60), st.text(max_size=30))
def test_a_made_entry_is_balanced_whatever_the_title(title: str, author: str) -> None:
    made = bibtex.entry(paper(title=title, authors=[author]))
    body = made.replace("\\{", "").replace("\\}", "")
    assert body.count("{") == body.count("}")
    assert made.endswith("\n}")


@pytest.mark.parametrize(
    "url",
    [
        None,
        "",
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "data:text/html,x",
        "http://plain.example/",
        "//host.example/",
        "https://user@host.example/",
        'https://ok.example/" onclick="x',
        "https://ok.example/ x",
        "https://",
        "https:///x",
        "https://[::1",
        "https://ok.example:99999999/",
        "\nhttps://ok.example/",
        "https://ok.example\\@evil.example/",
        "https://ex\u0430mple.example/",
        "https://ok.example/" + "x" * 3000,
    ],
)
def test_links_that_are_not_plain_https(url: str | None) -> None:
    assert text.link(url) is None
