"""Seconds to build the leaderboard's site, and milliseconds until Chromium has answered a reader.

    python benchmarks/leaderboard_site.py [--rows 2000] [--rounds 5] [--out FILE.json]

The rows are made up and have everything in them: intervals, attacks, 21 classes, histograms, flags, paper and cost. The
board is ready before the clock starts, so this is the time of rendering and writing. What a reader does is measured in
the page, from before it to after two animation frames, so with layout and paint; plots are drawn later, when they are
on the screen, and are measured alone. The page draws 100 rows until the reader asks for all, and 100 again when the
order changes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from segbench.leaderboard.site import build
from tests.site import samples
from tests.site.browser import launched

TARGETS = {"build_seconds": 20.0, "sort_milliseconds": 200.0}
# what is done: (what, on what, its value or text)
ACTIONS = {
    "sort by clean mIoU": ("click", ".board thead button", "clean mIoU"),
    "sort by model": ("click", ".board thead button", "model"),
    "sort by parameters": ("click", ".board thead button", "params"),
    "rank by 8/255": ("click", "#eps label", "8/255"),
    "rank by aAcc": ("click", "#metric label", "aAcc"),
    "search": ("input", "#search", "convnext-t"),
    "filter by tier": ("change", "#filters select[name=tier]", "checked"),
    "hide a column": ("click", "#chooser label", "Method"),
}
MEASURE = """async ([what, where, value]) => {
  const frames = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const found = [...document.querySelectorAll(where)];
  const element = what === 'click' ? found.find((one) => one.textContent.trim() === value) : found[0];
  await frames();
  const start = performance.now();
  if (what === 'click') element.click();
  else {
    element.value = value;
    element.dispatchEvent(new Event(what, { bubbles: true }));
  }
  await frames();
  const spent = performance.now() - start;
  document.getElementById('reset').click();
  await new Promise((done) => setTimeout(done, 200));
  return spent;
}"""
ALL_ROWS = "() => document.querySelector('.more:not([hidden]) button').click()"
SORT = ("click", ".board thead button", "params")
PLOT = """async () => {
  const plot = document.getElementById('plot-pareto');
  const start = performance.now();
  plot.scrollIntoView();
  while (!plot.dataset.drawn) await new Promise(requestAnimationFrame);
  return performance.now() - start;
}"""


def reading(page: Page, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each action: median and largest."""
    found = {name: [page.evaluate(MEASURE, list(action)) for _ in range(rounds)] for name, action in ACTIONS.items()}
    found["draw the Pareto plot"] = [page.evaluate(PLOT)]
    page.evaluate("scrollTo(0, 0)")
    for name, action in (("sort after all rows", SORT), ("tick after all rows", ("click", "tbody input", ""))):
        found[name] = []
        for _ in range(rounds):
            page.evaluate(ALL_ROWS)
            page.wait_for_timeout(2500)
            found[name].append(page.evaluate(MEASURE, list(action)))
    return {name: {"median": round(statistics.median(v), 1), "largest": round(max(v), 1)} for name, v in found.items()}


def measure(rows: int, rounds: int) -> dict[str, Any]:
    board = samples.many(rows)
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for _ in range(2):  # the second time nothing has changed, and nothing is written
            started = time.perf_counter()
            made = build(board, Path(folder), content_root=Path(folder), docs=None)
            seconds.append(round(time.perf_counter() - started, 2))
        with launched() as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            started = time.perf_counter()
            page.goto((Path(folder) / "index.html").as_uri())
            opened = time.perf_counter() - started
            milliseconds = reading(page, rounds)
            version = browser.version
        return {
            "command": f"python benchmarks/leaderboard_site.py --rows {rows} --rounds {rounds}",
            "device": f"{platform.machine()}, {os.cpu_count()} cores",
            "chromium": version.partition(".")[0],
            "rows": rows,
            "build_seconds": seconds[0],
            "build_again_seconds": seconds[1],
            "files": len(made),
            "megabytes": round(sum(path.stat().st_size for path in made) / 1e6, 1),
            "index_megabytes": round((Path(folder) / "index.html").stat().st_size / 1e6, 2),
            "open_seconds": round(opened, 2),
            "milliseconds": milliseconds,
            "targets": TARGETS,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = measure(options.rows, options.rounds)
    table = Table(
        "action", "median ms", "largest ms", title=f"{options.rows} rows, built in {report['build_seconds']} s"
    )
    for name, values in report["milliseconds"].items():
        table.add_row(name, f"{values['median']:.0f}", f"{values['largest']:.0f}")
    Console(stderr=True).print(table)
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
