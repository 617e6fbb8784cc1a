"""Sites that are built once, and a headless Chromium that tells of every error and every request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from segbench.leaderboard.site import build
from tests.site import samples
from tests.site.browser import chromium_path, launched

DOCUMENTS = {
    "read_the_leaderboard.md": "# How to read the leaderboard\n\n## Ranks\n\nShared ones.\n",
    "protocol.md": (
        "# The protocol\n\nSee [ranks](read_the_leaderboard.md#ranks), [a file](../setup.cfg), "
        "[a page](https://ok.example/x), [bad](javascript:alert(1)), [plain](http://plain.example/), "
        "![picture](x.png) and <script>window.pwned=1</script>.\n\n"
        "| loss | steps |\n| :-- | --: |\n| js | 300 |\n\n```sh\nsegbench evaluate\n```\n"
    ),
}


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two of the three documents."""
    folder = tmp_path_factory.mktemp("docs")
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the entry and the evidence of one row."""
    root = tmp_path_factory.mktemp("content")
    folder = root / "entries/sea-v1/shapes"
    folder.mkdir(parents=True)
    (folder / "at_everything_shapes.json").write_text('{"schema_version": 1}')
    (folder / "at_everything_shapes.parquet").write_bytes(b"PAR1")
    (root / "secret").write_text("not for the site")
    return root


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, content: Path, documents: Path) -> Path:
    """The site of `samples.small_board`."""
    out = tmp_path_factory.mktemp("site")
    build(samples.small_board(), out, content_root=content, docs=documents)
    return out


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory, content: Path) -> Path:
    """The site of `samples.hostile_board`."""
    out = tmp_path_factory.mktemp("hostile")
    build(samples.hostile_board(), out, content_root=content, docs=None)
    return out


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for each worker."""
    if chromium_path() is None:
        pytest.fail("The pages are tested in a real browser. Mend: apt-get install chromium")
    with launched() as browser:
        yield browser


Open = Callable[..., Page]


@pytest.fixture
def visit(chromium: Browser, site: Path) -> Iterator[Open]:
    """Opens a page of the site in a fresh context; at the end: no error, and no request but to files."""
    contexts, problems = [], []

    def visit(path: str = "index.html", *, folder: Path = site, **options: Any) -> Page:
        options = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: problems.append(request.url) if not local(request.url) else None)
        file, _, anchor = path.partition("#")
        page.goto((folder / file).as_uri() + (f"#{anchor}" if anchor else ""))
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:"))
