"""Ctrl-C and SIGTERM while a model is trained."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ECHO_SECONDS = 2.0  # after a signal, in which another one is the same wish


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a step is finished first; another Ctrl-C later stops at once.

    Signals that follow at once are echoes: a terminal and torchrun send one to each process, and so do schedulers.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    asked = 0.0

    def stop(number: int, frame: Any) -> None:
        nonlocal asked
        if not stopped.is_set():
            asked = time.monotonic()
            stopped.set()
            logging.getLogger("segbench").warning("Stopping after this step. Another Ctrl-C stops at once.")
        elif number == signal.SIGINT and time.monotonic() - asked > ECHO_SECONDS:
            raise KeyboardInterrupt

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
