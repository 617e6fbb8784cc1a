"""The progress of an evaluation, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Report(NamedTuple):
    """How a run tells what it does.

    Attributes:
        unit: called with a description and the image passes of the unit before it starts.
        images: called with the number of images after each forward pass.
        done: called after each unit with its images and the running aAcc of its (ε, loss).
    """

    unit: Callable[[str, int], None]
    images: Callable[[int], None]
    done: Callable[[int, float], None]


SILENT = Report(lambda _, __: None, lambda _: None, lambda _, __: None)


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
        TextColumn("images {task.fields[images]}"), TextColumn("aAcc {task.fields[aacc]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4, speed_estimate_period=120) as progress:
        task = progress.add_task("start", total=total_passes, images=f"0/{total_images}", aacc="-")
        state = {"end": 0.0, "images": 0}

        def unit(description: str, passes: int) -> None:
            state["end"] = progress.tasks[0].completed + passes
            progress.update(task, description=description)

        def images(count: int) -> None:
            progress.update(task, completed=min(progress.tasks[0].completed + count, state["end"]))

        def done(count: int, aacc: float) -> None:
            state["images"] += count
            progress.update(
                task, completed=state["end"], images=f"{state['images']}/{total_images}", aacc=f"{aacc:.3f}"
            )

        yield Report(unit, images, done)
