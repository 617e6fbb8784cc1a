"""Work on many files, several at once, in order. Threads: Pillow and numpy decode outside Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST_WORKERS = 8


def default_workers() -> int:
    """Threads that decode: one a core that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """``map(function, items)``, computed ahead by ``workers`` threads; at most two results a thread wait.

    Args:
        function: called in threads.
        items: its arguments.
        workers: threads; 0 computes in the caller's, None for one a core.

    >>> list(in_order(abs, [-1, -2, 3], workers=2))
    [1, 2, 3]
    """
    workers = default_workers() if workers is None else workers
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="segbench-data")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
