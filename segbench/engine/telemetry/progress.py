"""The progress of an evaluation, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

T = TypeVar("T")


class ProgressReport(NamedTuple):
    """How a run reports what it does; ``unit`` and ``images`` are thread-safe.

    Attributes:
        unit: called with a description when a unit begins.
        images: called with a number of image passes done.
        done: called after each unit with a description, its number of images and the aAcc so far of its (ε, loss).
    """

    unit: Callable[[str], None]
    images: Callable[[int], None]
    done: Callable[[str, int, float], None]


SILENT = ProgressReport(lambda _: None, lambda _: None, lambda *_: None)


@contextmanager
def progress_bar(total_passes: int, total_images: int, enabled: bool) -> Iterator[ProgressReport]:
    """A bar with ε, loss, images, running aAcc and the time left; nothing when ``enabled`` is false.

    The time left counts image passes; an image that is finished early moves the bar on by all of its passes.
    """
    if not enabled:
        yield SILENT
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("images {task.fields[images]}"), TextColumn("{task.fields[aacc]}"),
    )  # fmt: skip
    with _progress(*columns) as progress:
        task = progress.add_task("start", total=total_passes, images=f"0/{total_images}", aacc="")
        finished = 0

        def done(description: str, count: int, aacc: float) -> None:
            nonlocal finished
            finished += count
            text = f"aAcc {aacc:.3f} at {description}"
            progress.update(task, images=f"{finished}/{total_images}", aacc=text)

        yield ProgressReport(
            unit=lambda description: progress.update(task, description=description),
            images=lambda count: progress.update(task, advance=count),
            done=done,
        )


@contextmanager
def counting_bar(total: int, what: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar that counts; yields the thread-safe function that advances it. Nothing when ``enabled`` is false."""
    if not enabled:
        yield lambda _: None
        return
    with _progress(TextColumn(what), BarColumn(), MofNCompleteColumn()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda number: progress.update(task, advance=number)


def _progress(*columns: ProgressColumn) -> Progress:
    """These columns, the time elapsed and the time left, on standard error."""
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))
    return Progress(*columns, *times, console=Console(stderr=True), refresh_per_second=4, speed_estimate_period=120)


def announce(text: str) -> None:
    """A line on standard error, before long work begins."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def format_duration(seconds: float) -> str:
    """A length of time for people.

    >>> format_duration(12_000), format_duration(100), format_duration(20), format_duration(200_000)
    ('3 h 20 min', '2 min', '20 s', '2 d 8 h')
    """
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def track_items(items: Sequence[T], description: str, enabled: bool) -> Iterable[T]:
    """The items one by one, under a plain bar on standard error that disappears at the end."""
    return track(items, description, console=Console(stderr=True), disable=not enabled, transient=True)
