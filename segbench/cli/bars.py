"""Progress bars on standard error, for a person who looks on."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from segbench.cli.app import printable

if TYPE_CHECKING:
    from rich.progress import TaskID

Report = Callable[[str, int, int], None]


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yields a function of what is being done, and how much of how much is done; a bar if a person looks on."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(printable(what)), total=total)
            bars.update(tasks[what], completed=done)

        yield report


def steps(report: Report, what: str, total: int) -> Callable[[], None]:
    """A function to be called after each image."""
    done = itertools.count(1)
    return lambda: report(what, next(done), total)
