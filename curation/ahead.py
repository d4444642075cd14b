"""Work done ahead by threads, handed on in order, with bounds on how far ahead it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_IDLE_PER_WORKING = 32  # where few items need work, so many others may wait behind each of them


def in_order(
    items: Iterable[T],
    begin: Callable[[T], Future[R] | None],
    size_of: Callable[[T], int],
    ahead: int,
    max_bytes: int,
) -> Iterator[tuple[T, Future[R] | None]]:
    """Each item with what ``begin`` started for it, in the items' order.

    begin: hands the item to a pool, or returns None for one that needs no work.  ``ahead`` items that need work, or
    ``max_bytes`` of them by ``size_of``, are begun before the first of them is awaited: enough for the pool never to
    be idle, and no more than that in memory.  Which items are handed on when does not depend on how fast the pool is.
    What has not begun when the caller stops is cancelled.
    """
    window: deque[tuple[T, Future[R] | None, int]] = deque()
    working = held = 0
    most = _IDLE_PER_WORKING * ahead
    try:
        for item in items:
            future = begin(item)
            size = 0
            if future is not None:
                size = size_of(item)
                working += 1
                held += size
            window.append((item, future, size))
            while window and (window[0][1] is None or working > ahead or held > max_bytes or len(window) > most):
                item, future, size = window.popleft()
                working -= future is not None
                held -= size
                yield item, future
        while window:
            yield window.popleft()[:2]
    finally:
        for _, future, _ in window:
            if future is not None:
                future.cancel()
