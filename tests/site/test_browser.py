"""The pages in a real browser: what a reader does, on a desk and on a phone, with and without JavaScript."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.site import samples

pytestmark = pytest.mark.slow

Open = Callable[..., Page]
MODEL = "models/sea-v1/shapes/at_everything_shapes.html"
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
TABLE = ".board:not([hidden]) table"
BY_MEAN = ["pirat_e_shapes", "at_everything_shapes", "pirat_b_shapes", "at_c_shapes", "clean_d_shapes"]
BY_CLEAN = ["clean_d_shapes", "at_c_shapes", "at_everything_shapes", "pirat_b_shapes", "pirat_e_shapes"]


def models(page: Page) -> list[str]:
    return page.locator(f"{TABLE} tbody th a").all_inner_texts()


def column(page: Page, head: str) -> list[str]:
    """The cells of a column by the text of its header."""
    return page.evaluate(  # type: ignore[no-any-return]
        """([table, head]) => {
          const heads = [...document.querySelectorAll(`${table} thead th`)];
          const place = heads.findIndex((one) => one.textContent.trim() === head);
          return [...document.querySelectorAll(`${table} tbody tr`)].map((row) => row.cells[place].textContent.trim());
        }""",
        [TABLE, head],
    )


def choose(page: Page, group: str, label: str) -> None:
    page.locator(f"#{group}").get_by_role("radio", name=label, exact=True).check(force=True)


def overflow(page: Page) -> int:
    """By how many pixels the page is wider than the screen."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def test_the_first_look(visit: Open) -> None:
    page = visit()
    assert models(page) == BY_MEAN
    assert column(page, "rank") == ["=1", "=1", "=1", "4", "5"]
    expect(page.locator("#status")).to_have_text("5 of 5 models, ranked by mIoU, mean over ε = 4, 8, 12/255")
    assert page.locator(f"{TABLE} th[aria-sort]").all_inner_texts() == ["rank"]
    assert page.url.endswith("index.html")


def test_another_radius_and_metric_rank_again(visit: Open) -> None:
    page = visit()
    choose(page, "eps", "12/255")
    assert models(page)[0] == "pirat_e_shapes"
    assert column(page, "rank")[0] == "1"
    choose(page, "metric", "aAcc")
    assert column(page, "ranked by aAcc, 12/255")[0] == "52.0"
    choose(page, "eps", "8/255")
    choose(page, "metric", "mIoU")
    assert models(page)[:2] == ["pirat_b_shapes", "at_everything_shapes"]
    assert column(page, "ranked by mIoU, 8/255")[:2] == ["24.0 22.0–26.0", "23.3 21.3–25.3"]
    assert column(page, "best known")[:2] == ["24.0", "22.8"]
    assert page.url.endswith("#eps=8")
    choose(page, "eps", "clean")
    assert models(page) == BY_CLEAN


def test_headers_sort_both_ways_and_missing_values_come_last(visit: Open) -> None:
    page = visit()
    button = page.locator(TABLE).get_by_role("button", name="clean aAcc")
    button.click()
    assert column(page, "clean aAcc") == ["90.0", "85.3", "84.0", "80.0", "–"]
    button.click()
    assert column(page, "clean aAcc") == ["80.0", "84.0", "85.3", "90.0", "–"]
    assert page.locator(f"{TABLE} th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.locator(TABLE).get_by_role("button", name="params").click()
    assert column(page, "params") == ["0.10M", "0.10M", "26.4M", "81.8M", "–"]
    page.locator(TABLE).get_by_role("button", name="rank", exact=True).click()
    assert models(page) == BY_MEAN


def test_the_keyboard_is_enough(visit: Open) -> None:
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.locator(TABLE).get_by_role("button", name="model", exact=True).focus()
    page.keyboard.press("Enter")
    assert models(page) == sorted(BY_MEAN)
    assert page.evaluate("document.activeElement.textContent") == "model"
    page.locator(".board:not([hidden]) .scroll").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.board:not([hidden]) .scroll').scrollLeft > 0")


@pytest.mark.parametrize(
    ("name", "value", "left"),
    [
        ("architecture", "segmenter_vit", ["at_c_shapes"]),
        ("architecture", "(none)", ["clean_d_shapes"]),
        ("tier", "reported", ["pirat_e_shapes", "clean_d_shapes"]),
        ("extra_data", "COCO", ["at_c_shapes"]),
        ("size", "large", ["pirat_e_shapes"]),
        ("backbone", "ViT-S/16", ["at_c_shapes"]),
    ],
)
def test_filters(visit: Open, name: str, value: str, left: list[str]) -> None:
    page = visit()
    page.locator(f"#filters select[name={name}]").select_option(value)
    assert models(page) == left
    page.get_by_role("button", name="Reset").click()
    assert models(page) == BY_MEAN


def test_search_finds_ids_methods_and_authors(visit: Open) -> None:
    page = visit()
    for words, left in (("pirat", 2), ("hein reliable", 1), ("PIR-AT e_shapes", 1), ("nothing like it", 0), ("", 5)):
        page.get_by_label("Search").fill(words)
        assert len(models(page)) == left
        expect(page.locator("#status")).to_contain_text(f"{left} of 5 models")


def test_the_address_keeps_what_was_chosen(visit: Open) -> None:
    page = visit(
        "index.html#eps=8&metric=aacc&tier=reported&sort=-model&rows=pirat_e_shapes&columns=method,score&q=shapes"
    )
    assert models(page) == ["pirat_e_shapes", "clean_d_shapes"]
    assert page.locator(f"{TABLE} thead th:visible").count() == 4
    assert page.get_by_label("pirat_e_shapes in the plots").is_checked()
    page.get_by_label("Search").fill("clean")
    assert models(page) == ["clean_d_shapes"]
    choose(page, "eps", "mean")
    page.get_by_label("Data set").select_option("sea-v1/camvid/small")
    assert models(page) == ["first_camvid", "second_camvid", "third_camvid"]
    assert page.url.endswith("#data=sea-v1/camvid/small&metric=aacc")
    page.go_back()
    assert models(page) == ["clean_d_shapes"]
    page.go_back()
    assert page.locator("#eps input:checked").get_attribute("value") == "8"
    page.go_forward()
    assert page.locator("#eps input:checked").get_attribute("value") == "mean"
    other = visit(page.url.replace("file://", "").rpartition("/")[2])
    assert models(other) == models(page)


@pytest.mark.parametrize(
    "anchor",
    [
        "eps=999&metric=no&data=x/y&tier=<b>&sort=constructor&rows=__proto__,no&columns=&q=",
        "%E0%A4%A&eps=%00&rows=%E0%A4%A",
        "main",
        "sort=-__proto__&size=toString&architecture=hasOwnProperty",
    ],
)
def test_bad_addresses_are_ignored(visit: Open, anchor: str) -> None:
    page = visit(f"index.html#{anchor}")
    assert models(page) == BY_MEAN
    assert page.locator("#eps input:checked").get_attribute("value") == "mean"


def test_columns_can_be_chosen(visit: Open) -> None:
    page = visit()
    architecture = page.locator(f"{TABLE} thead th", has_text="architecture")
    expect(architecture).to_be_hidden()
    page.locator("#chooser summary").click()
    page.get_by_label("Architecture", exact=True).and_(page.locator("input")).check()
    expect(architecture).to_be_visible()
    assert "architecture" in page.url
    page.keyboard.press("Escape")
    expect(page.locator("#chooser fieldset")).to_be_hidden()


def test_the_rows_that_are_shown_can_be_downloaded(visit: Open) -> None:
    page = visit("index.html#eps=8&tier=reproduced")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download these rows").click()
    assert waiting.value.suggested_filename == "segbench-shapes.csv"
    lines = list(csv.reader(Path(waiting.value.path()).read_text("utf-8-sig").splitlines()))
    assert lines[0][:4] == [
        "Rank (mIoU, ε = 8/255)",
        "Model",
        "Chosen score (mIoU, ε = 8/255)",
        "Best known (mIoU, ε = 8/255)",
    ]
    assert [line[:4] for line in lines[1:]] == [
        ["1", "at_everything_shapes", "23.3", "22.8"],
        ["4", "at_c_shapes", "10", "10"],
    ]
    assert lines[1][lines[0].index("Flags")] == "1 warning, 1 note"


@pytest.mark.parametrize("path", ["index.html", MODEL])
def test_the_call_that_loads_a_model_can_be_copied(visit: Open, path: str) -> None:
    page = visit(path, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name='Copy segbench.load_model("at_everything_shapes")').or_(
        page.locator("p.load button")
    ).first.click()
    expect(page.locator("#said")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == 'segbench.load_model("at_everything_shapes")'
    assert page.locator("[data-copy*=clean_d]").count() == 0  # no weights, nothing to load


def test_plots_are_drawn_and_follow_the_ticks(visit: Open) -> None:
    page = visit()
    for name in ("curve_miou", "curve_aacc", "pareto", "size"):
        page.locator(f"#plot-{name}").scroll_into_view_if_needed()
        expect(page.locator(f"#plot-{name} svg")).to_be_visible()
    curve = page.locator("#plot-curve_miou svg")
    assert curve.locator(".mark-line path").count() == 5
    assert (
        curve.locator(".mark-rule.role-mark line").count() == 3 * 3
    )  # three of the five have intervals, at three radii
    assert page.locator("#plot-pareto .mark-symbol.role-mark path").count() == 5
    assert page.locator("#plot-size .mark-symbol.role-mark path").count() == 4  # one has no number of parameters
    for name in ("at_c_shapes", "pirat_b_shapes"):
        page.get_by_label(f"{name} in the plots").check()
    page.locator("#plot-curve_miou").scroll_into_view_if_needed()
    expect(curve.locator(".mark-line path")).to_have_count(2)
    expect(curve.locator(".role-legend-label text")).to_have_text(["at_c_shapes", "pirat_b_shapes"])
    choose(page, "eps", "8/255")
    page.locator("#plot-pareto").scroll_into_view_if_needed()
    expect(page.locator("#plot-pareto .role-axis-title text")).to_have_text(["clean mIoU (%)", "mIoU, ε = 8/255 (%)"])


def test_a_point_tells_its_numbers(visit: Open) -> None:
    page = visit()
    page.locator("#plot-pareto").scroll_into_view_if_needed()
    page.locator("#plot-pareto .mark-symbol.role-mark path").first.hover(force=True)
    expect(page.locator("#tip")).to_contain_text("model: pirat_e_shapes")


@pytest.mark.parametrize("path", ["index.html", MODEL, "protocol.html"])
def test_nothing_overflows_on_a_phone(visit: Open, path: str) -> None:
    page = visit(path, **PHONE)
    assert overflow(page) <= 0
    if path == "index.html":
        page.locator("#plot-size").scroll_into_view_if_needed()
        expect(page.locator("#plot-size svg")).to_be_visible()
        page.locator("#chooser summary").click()
        page.locator("details.explain summary").click()
        assert overflow(page) <= 0


def test_dark_and_light(visit: Open) -> None:
    page = visit(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.locator("#plot-size").scroll_into_view_if_needed()
    label = page.locator("#plot-size .role-axis-title text").first
    before = label.get_attribute("fill")
    page.get_by_role("button", name="Switch to the light theme").click()
    light = page.evaluate(ground)
    assert light != dark
    page.locator("#plot-size").scroll_into_view_if_needed()
    page.wait_for_function(
        "before => document.querySelector('#plot-size .role-axis-title text').getAttribute('fill') !== before",
        arg=before,
    )
    page.reload()
    assert page.evaluate(ground) == light  # remembered
    assert visit(color_scheme="light").evaluate(ground) == light


@pytest.mark.parametrize("path", ["index.html", MODEL, "protocol.html"])
def test_without_javascript_all_tables_are_there(visit: Open, path: str) -> None:
    page = visit(path, java_script_enabled=False, **PHONE)
    assert page.locator(".js-only:visible").count() == 0
    if path == "index.html":
        expect(page.locator(".board:visible")).to_have_count(2)
        assert page.locator("#board-0 tbody th a").all_inner_texts() == BY_MEAN
        assert page.locator("#board-0 thead th:visible").count() == page.locator("#board-0 thead th").count()
    else:
        expect(page.locator("h1")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["index.html", MODEL, "protocol.html"])
def test_axe_has_no_findings(visit: Open, path: str, scheme: str) -> None:
    page = visit(path, color_scheme=scheme)
    for summary in page.locator("summary").all():
        summary.click()
    if path == "index.html":
        page.locator("#plot-size").scroll_into_view_if_needed()
        expect(page.locator("#plot-size svg")).to_be_visible()
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert [(one["id"], one["impact"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shaded_cells_can_be_read(visit: Open, scheme: str) -> None:
    page = visit(MODEL, color_scheme=scheme)
    ratios: dict[str, float] = page.evaluate(
        """() => {
          const element = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
          const canvas = element.getContext('2d', { willReadFrequently: true });
          const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          const light = (colour) => {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => linear(v / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const cell = document.querySelector('.heat tbody td');
          return Object.fromEntries([...Array(21).keys()].map((shade) => {
            cell.className = `n s${shade}`;
            const style = getComputedStyle(cell);
            const [high, low] = [light(style.color), light(style.backgroundColor)].sort((a, b) => b - a);
            return [shade, (high + 0.05) / (low + 0.05)];
          }));
        }"""
    )
    assert len(ratios) == 21
    assert min(ratios.values()) >= 4.5
    assert ratios["0"] > ratios["20"]


def test_hostile_text_does_nothing(visit: Open, hostile: Path) -> None:
    page = visit("index.html", folder=hostile)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("window.pwned") is None
    assert overflow(page) <= 0
    page.get_by_label("Search").fill("<script> nobody")
    page.locator("#plot-pareto").scroll_into_view_if_needed()
    expect(page.locator("#plot-pareto")).to_have_text("Nothing to draw.")
    page.get_by_role("button", name="Reset").click()
    box = page.locator("input[aria-label*='<b>x</b>']")
    box.check()
    page.locator("#plot-curve_miou").scroll_into_view_if_needed()
    expect(page.locator("#plot-curve_miou svg")).to_be_visible()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download these rows").click()
    lines = list(csv.reader(Path(waiting.value.path()).read_text("utf-8-sig").splitlines()))
    method = lines[0].index("Method")
    assert [line[method][:2] for line in lines[1:] if line[1].startswith("../")] == ["'="]
    page.reload()
    assert page.evaluate("window.pwned") is None
    page.locator("tbody th a", has_text="<b>x</b>").click()
    expect(page.locator("h1")).to_contain_text("<b>x</b>")
    assert page.evaluate("window.pwned") is None
    assert overflow(page) <= 0
    for link in page.locator("a").all():
        assert re.match(r"(https://|[./#\w])", link.get_attribute("href") or "")
        assert not (link.get_attribute("href") or "").startswith(("javascript", "data", "http:"))


def test_many_rows_are_drawn_when_asked_for(visit: Open, tmp_path: Path) -> None:
    from segbench.leaderboard.site import build

    build(samples.many(130), tmp_path, content_root=tmp_path, docs=None)
    page = visit("index.html", folder=tmp_path)
    assert len(models(page)) == 100
    expect(page.locator("#status")).to_contain_text("the first 100 are drawn")
    page.get_by_role("button", name="Show all 130").click()
    assert len(models(page)) == 130
    page.locator("tbody input").nth(120).check()
    assert len(models(page)) == 130
    page.locator(TABLE).get_by_role("button", name="params").click()
    assert len(models(page)) == 100  # another order starts at its first rows


def test_an_address_that_finds_nothing(visit: Open) -> None:
    page = visit("index.html#q=nobody")
    assert models(page) == []
    page.get_by_role("button", name="Reset").click()
    assert models(page) == BY_MEAN


def test_print_is_a_plain_page(visit: Open) -> None:
    page = visit()
    page.emulate_media(media="print")
    expect(page.locator("#controls")).to_be_hidden()
    expect(page.locator(TABLE)).to_be_visible()
