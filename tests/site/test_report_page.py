"""The page of `segbench report` in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from segbench.engine.launch.options import RunOptions
from segbench.engine.studies.compare import compare
from segbench.reporting.gallery import Pictures
from segbench.reporting.report import make, page
from segbench.reporting.runs import read_runs
from tests.runs import MODEL, run

Open = Callable[..., Page]
QUIET = RunOptions(progress=False, shard="1/1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of an evaluation and a comparison."""
    root = tmp_path_factory.mktemp("report")
    runs = [
        run(root / "evaluation").path,
        compare(MODEL, ["mce", "segpgd"], eps=8, limit=3, iterations=3, out=root / "comparison", options=QUIET).path,
    ]
    (root / "report.html").write_bytes(page(make(read_runs(runs), Pictures(1, (), None, None, QUIET))))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_has_no_findings(visit: Open, folder: Path, scheme: str) -> None:
    shown = visit("report.html", folder=folder, color_scheme=scheme)
    found = Axe().run(shown, options={"resultTypes": ["violations"]}).response["violations"]
    assert [(one["id"], one["impact"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found] == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_every_picture_is_shown_and_nothing_is_wider_than_the_window(visit: Open, folder: Path, width: int) -> None:
    shown = visit("report.html", folder=folder, viewport={"width": width, "height": 900})
    pictures = shown.locator("img")
    assert pictures.count() >= 9
    assert shown.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 300)")
    assert shown.evaluate("[...document.images].every(image => image.getBoundingClientRect().width >= 340)")
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert shown.locator("h1").inner_text() == "UPerNet ConvNeXt-mini, clean training"
