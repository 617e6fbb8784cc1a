"""Signals that ask a long run to stop, and what is finished before it does."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ECHO_SECONDS = 2.0  # after a signal, in which another one is the same wish


@contextmanager
def stop_signals(numbers: Sequence[signal.Signals], message: str) -> Iterator[threading.Event]:
    """An event that these signals set, so that what is being done is finished first; a later Ctrl-C stops at once.

    Signals that follow at once are echoes: a terminal and torchrun send one to each process, and so do schedulers.

    Args:
        numbers: the signals; others keep their meaning.
        message: logged with the first one.
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
            logging.getLogger("segbench").warning("%s", message)
        elif number == signal.SIGINT and time.monotonic() - asked > ECHO_SECONDS:
            raise KeyboardInterrupt

    before = {each: signal.signal(each, stop) for each in numbers}
    try:
        yield stopped
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class _Stop(BaseException):
    """Passes every ``except Exception`` on its way, as Ctrl-C does: those around users' code, for example."""


@contextmanager
def raised(number: signal.Signals, error: type[Exception], message: str) -> Iterator[None]:
    """Within, and in the functions that it decorates, a signal ends the work at once, as Ctrl-C does, in an error.

    A handler that the caller had set is called then, too: also if the error comes from `stop_signals`.
    """

    def stop(_: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # echoes
        raise _Stop

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, stop)
    try:
        try:
            yield
        finally:
            signal.signal(number, before)
    except (_Stop, error) as reason:
        if callable(before) and before.__module__ != __name__:
            before(number, None)
        if isinstance(reason, _Stop):
            raise error(message) from None
        raise
