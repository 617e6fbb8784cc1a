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
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

T = TypeVar("T")


class Report(NamedTuple):
    """How a run tells what it does; ``unit`` and ``images`` may be called from several threads at once.

    Attributes:
        unit: called with a description when a unit begins.
        images: called with a number of image passes done.
        done: called after each unit with a description, its number of images and the aAcc so far of its (ε, loss).
    """

    unit: Callable[[str], None]
    images: Callable[[int], None]
    done: Callable[[str, int, float], None]


SILENT = Report(lambda _: None, lambda _: None, lambda *_: None)


@contextmanager
def bar(total_passes: int, total_images: int, enabled: bool) -> Iterator[Report]:
    """A bar with ε, loss, images, running aAcc and the time left; nothing when ``enabled`` is false.

    The time left counts image passes; an image that is finished early moves the bar on by all of its passes.
    """
    if not enabled:
        yield SILENT
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("images {task.fields[images]}"), TextColumn("{task.fields[aacc]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4, speed_estimate_period=120) as progress:
        task = progress.add_task("start", total=total_passes, images=f"0/{total_images}", aacc="")
        finished = 0

        def done(description: str, count: int, aacc: float) -> None:
            nonlocal finished
            finished += count
            text = f"aAcc {aacc:.3f} at {description}"
            progress.update(task, images=f"{finished}/{total_images}", aacc=text)

        yield Report(
            unit=lambda description: progress.update(task, description=description),
            images=lambda count: progress.update(task, advance=count),
            done=done,
        )


@contextmanager
def counted(total: int, what: str, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar that counts; yields what moves it on, which several threads may call. Nothing when ``enabled`` is false."""
    if not enabled:
        yield lambda _: None
        return
    columns = (
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4, speed_estimate_period=120) as progress:
        task = progress.add_task(what, total=total)
        yield lambda number: progress.update(task, advance=number)


def announce(text: str) -> None:
    """A line on standard error, before a long work begins."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def duration(seconds: float) -> str:
    """For people.

    >>> duration(12_000), duration(100), duration(20), duration(200_000)
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


def watch(items: Sequence[T], description: str, enabled: bool) -> Iterable[T]:
    """The items one by one under a plain bar on standard error, which goes when all are done."""
    return track(items, description, console=Console(stderr=True), disable=not enabled, transient=True)
