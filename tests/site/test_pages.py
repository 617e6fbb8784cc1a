"""The files of a site: what they hold, what they refuse, and that they are the same every time."""

from __future__ import annotations

import base64
import builtins
import hashlib
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from segbench.errors import SegbenchError
from segbench.leaderboard.site import build, files
from segbench.leaderboard.site.pages import Script
from tests.site import samples

MODEL = "models/sea-v1/shapes/at_everything_shapes.html"
VOID = {"meta", "link", "input", "br", "col", "img", "hr", "path", "rect", "line", "circle", "polyline"}


class Reader(HTMLParser):
    """What a browser would find: elements with attributes, the content of scripts, and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            tag, attributes, text = self.raw[-1]
            self.raw[-1] = (tag, attributes, text + data)


def pages(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.html"))


def read(path: Path) -> Reader:
    return Reader(path.read_text("utf-8"))


def test_files_of_the_site(site: Path) -> None:
    found = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    models = {f"models/sea-v1/shapes/{row['id']}.html" for row in samples.small_board().tables[0].rows}
    models |= {f"models/sea-v1/camvid-small/{name}_camvid.html" for name in ("first", "second", "third")}
    entry = "entries/sea-v1/shapes/at_everything_shapes"
    assert found == models | {
        "index.html",
        "read.html",
        "protocol.html",
        "leaderboard.json",
        "leaderboard.csv",
        "leaderboard.bib",
        f"{entry}.json",
        f"{entry}.parquet",
    }


@pytest.mark.slow
def test_the_same_board_gives_the_same_bytes(site: Path, tmp_path: Path, content: Path, documents: Path) -> None:
    made = build(samples.small_board(), tmp_path, content_root=content, docs=documents)
    assert [path.relative_to(tmp_path) for path in made] == sorted(
        path.relative_to(site) for path in site.rglob("*") if path.is_file()
    )
    for path in made:
        assert path.read_bytes() == (site / path.relative_to(tmp_path)).read_bytes()
        os.utime(path, (0, 0))
    build(samples.small_board(), tmp_path, content_root=content, docs=documents)
    assert {path.stat().st_mtime for path in made} == {0}  # what has not changed is not written


def test_every_link_leads_to_a_file_or_a_plain_https_address(site: Path, hostile: Path) -> None:
    for folder in (site, hostile):
        for path in pages(folder):
            for tag, attributes in read(path).elements:
                for name in ("href", "src"):
                    address = attributes.get(name)
                    if address is None or (tag == "link" and address.startswith("data:image/svg+xml,")):
                        continue
                    if address.startswith("https://"):
                        assert tag == "a"
                        assert "noreferrer" in (attributes.get("rel") or "")
                    elif not address.startswith("#"):
                        assert (path.parent / address.partition("#")[0]).resolve().is_relative_to(folder.resolve())
                        assert (path.parent / address.partition("#")[0]).is_file(), address


def test_the_policy_allows_what_was_written_and_nothing_else(site: Path, hostile: Path) -> None:
    for path in [*pages(site), *pages(hostile)]:
        reader = read(path)
        policy = next(
            attributes["content"] or ""
            for tag, attributes in reader.elements
            if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
        )
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert "unsafe" not in policy
        found: dict[str, set[str]] = {"script": set(), "style": set()}
        for tag, attributes, text in reader.raw:
            if attributes.get("type") != "application/json":
                digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                found[tag].add(f"'sha256-{digest}'")
        assert set(rules["script-src"].split()) == found["script"]
        assert set(rules["style-src"].split()) == found["style"]


def test_no_element_can_run_or_load_anything(hostile: Path) -> None:
    for path in pages(hostile):
        for tag, attributes in read(path).elements:
            assert tag not in ("iframe", "object", "embed", "img", "base", "form") or attributes.get("id") == "controls"
            assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcdoc")]


def test_hostile_text_is_shortened_and_stripped(hostile: Path) -> None:
    for path in pages(hostile):
        text = path.read_text("utf-8")
        assert "A" * 2000 not in text
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", text)
        assert "\u0335\u0321" * 5 not in text
    assert b"etc/passwd" not in (hostile / "leaderboard.bib").read_bytes()
    assert not list(hostile.rglob("passwd"))
    lines = (hostile / "leaderboard.csv").read_text().splitlines()
    assert not [line for line in lines if re.search('(^|,)"?[=+@]', line)]


def test_names_of_pages_stay_in_the_site() -> None:
    table = samples.hostile_board().tables[0]
    path = files.model_page(table, samples.hostile_row())
    assert re.fullmatch(r"models/sea-v1/shapes/[A-Za-z0-9_-]+\.html", path)


@pytest.mark.parametrize(
    "path",
    [None, "", "/etc/passwd", "../secret", "secret", "entries/../secret", "entries", "entries/link", "entries/.x"],
)
def test_only_files_below_entries_are_copied(path: str | None, tmp_path: Path) -> None:
    (tmp_path / "entries").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "entries" / ".x").write_text("x")
    (tmp_path / "entries" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "entries" / "good.json").write_text("{}")
    assert files.copied(tmp_path, path) is None
    assert files.copied(tmp_path, "entries/good.json") == "entries/good.json"


def test_a_script_cannot_end_its_element() -> None:
    assert Script("x = '</script>' + '</SCRIPT>' + '<!--'").source == "x = '<\\/script>' + '<\\/SCRIPT>' + '<\\!--'"


def test_the_index_without_javascript_is_sorted_and_whole(site: Path) -> None:
    text = (site / "index.html").read_text("utf-8")
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    names = re.findall(r'<th scope="row"><a href="[^"]+">([^<]+)</a>', body)
    assert names == [row["id"] for row in samples.small_board().tables[0].rows]
    assert re.findall(r'<tr[^>]*><td class="n">([^<]+)</td>', body)[0] == "=1"
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', text[: text.index("</thead>")])
    plain = [re.sub("<[^>]+>", "", head).strip() for head in heads]
    wanted = "rank,model,best known,clean aAcc,8/255 mIoU,flags,method,architecture,backbone,params,tier,extra data"
    wanted += ",training passes,cost of the run,paper,weights,evidence"
    assert set(wanted.split(",")) <= set(plain)
    assert 'href="entries/sea-v1/shapes/at_everything_shapes.parquet"' in body
    assert "1 warning, 1 note" in body


def test_a_model_page_tells_how_to_get_its_numbers_again(site: Path) -> None:
    text = (site / MODEL).read_text("utf-8")
    assert "segbench evaluate --model at_everything_shapes<" in text
    assert "segbench verify entries/sea-v1/shapes/at_everything_shapes.json<" in text
    assert "segbench reproduce entries/sea-v1/shapes/at_everything_shapes.json --sample 20<" in text
    assert 'href="../../../entries/sea-v1/shapes/at_everything_shapes.parquet"' in text
    reported = (site / "models/sea-v1/shapes/clean_d_shapes.html").read_text("utf-8")
    assert "arXiv 2306.12941v2, Table 2" in reported
    assert "segbench evaluate" not in reported
    variant = (site / "models/sea-v1/camvid-small/first_camvid.html").read_text("utf-8")
    assert "segbench data prepare camvid --root DATA<" in variant
    assert "segbench evaluate --model first_camvid --dataset camvid/small --data-root DATA<" in variant


def test_numbers_of_a_model_page(site: Path) -> None:
    text = (site / MODEL).read_text("utf-8")
    assert '<td class="n lower">22.8</td>' in text
    assert '<td class="n s14">68.8</td>' in text  # share of images that a loss won
    assert 'moon</th><td class="n">–</td>' in text
    assert text.count('class="histogram"') == 4
    assert "mIoU in percent: 52.3 at 0, 37.5 at 4/255, 23.3 at 8/255, 12.0 at 12/255" in text
    assert "1 min 42 s" in text


def test_documents(site: Path) -> None:
    text = (site / "protocol.html").read_text("utf-8")
    assert '<a href="read.html#ranks">ranks</a>' in text
    assert '<a href="https://ok.example/x" rel="noreferrer">a page</a>' in text
    assert "&lt;script&gt;" in text
    for words in ("a file", "plain", "picture"):
        assert words in text
        assert f">{words}</a>" not in text
    assert '<th scope="col" class="right">steps</th>' in text
    assert '<h2 id="ranks">' in (site / "read.html").read_text("utf-8")
    index = (site / "index.html").read_text("utf-8")
    assert 'href="protocol.html"' in index
    assert "submit.html" not in index


def test_a_board_without_tables(tmp_path: Path) -> None:
    made = build(samples.Board([]), tmp_path, content_root=tmp_path, docs=None)
    assert {path.name for path in made} == {"index.html", "leaderboard.json", "leaderboard.csv", "leaderboard.bib"}
    assert "No entries yet." in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("library", ["altair", "vl_convert", "jinja2"])
def test_a_missing_library_is_named(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == library:
            raise ImportError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(SegbenchError, match=rf"{library}.*pip install 'segbench\[site\]'"):
        build(samples.Board([]), tmp_path, content_root=tmp_path, docs=None)
