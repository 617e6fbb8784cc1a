"""What was measured while training: CSV, JSON lines, and TensorBoard. Curves are in `segbench.training.curves`."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segbench.files import write_atomic

COLUMNS = (
    "epoch", "step", "loss", "learning_rate", "seconds", "images_per_second",
    "clean_aacc", "clean_miou", "robust_aacc", "robust_miou",
)  # fmt: skip
CSV, LINES, BOARD = "metrics.csv", "metrics.jsonl", "tensorboard"
EVENTS = "events.out.tfevents.{:010d}.segbench"  # TensorBoard reads what has "tfevents" in its name, in that order
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d{10})\.segbench")
TAGS: Mapping[str, str] = {
    "loss": "training/loss",
    "learning_rate": "training/learning_rate",
    "images_per_second": "training/images_per_second",
    "clean_aacc": "held_out/clean_aacc",
    "clean_miou": "held_out/clean_miou",
    "robust_aacc": "held_out/robust_aacc",
    "robust_miou": "held_out/robust_miou",
}


def write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """``metrics.csv`` and ``metrics.jsonl``, a row for each epoch; scores in [0,1], missing where none was measured."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folder / CSV, table.getvalue().encode())
    write_atomic(folder / LINES, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())


def board(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Makes TensorBoard show ``rows``, in ``folder/tensorboard``; does nothing if TensorBoard cannot be imported.

    Only what is new is added to the file of events, as an open TensorBoard reads on where it stopped. If earlier rows
    have changed (a killed run continued from an earlier epoch), a new file begins, and the old one is emptied: it
    stays, since an open TensorBoard does not go on to the next one if it is gone.

    Args:
        folder: of the run.
        rows: of all epochs so far, as in `write`. The time of a point is the training time, not that of a clock.
    """
    events = _events(rows)
    if events is None:
        return
    place = folder / BOARD
    place.mkdir(parents=True, exist_ok=True)
    numbers = sorted(int(found[1]) for path in place.iterdir() if (found := _EVENTS.fullmatch(path.name)))
    newest = numbers.pop() if numbers else 0
    path = place / EVENTS.format(newest)
    written = path.read_bytes() if path.exists() else b""
    if events.startswith(written):  # also if a process was killed while it wrote the end
        with path.open("ab") as stream:
            stream.write(events[len(written) :])
    else:
        write_atomic(place / EVENTS.format(newest + 1), events)
        numbers.append(newest)
    for number in numbers:
        os.truncate(place / EVENTS.format(number), 0)


def _events(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A file of events: the same bytes for the same rows; None if TensorBoard cannot be imported."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from torch.utils.tensorboard import RecordWriter
        from torch.utils.tensorboard.summary import scalar
    except Exception:  # noqa: BLE001 - beside an ImportError, a protobuf or NumPy that it does not fit raises anything
        return None
    # The second event hides what an open TensorBoard has read in the file before.
    events = [Event(file_version="brain.Event:2"), Event(step=0, session_log=SessionLog(status=SessionLog.START))]
    for row in rows:
        for column, tag in TAGS.items():
            if row[column] is not None:
                summary = scalar(tag, row[column])  # type: ignore[no-untyped-call]
                events.append(Event(step=row["step"], wall_time=row["seconds"], summary=summary))
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()
