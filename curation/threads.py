"""Threads that work ahead of their caller, with bounds on how far.

``prefetch`` works ahead and hands on in order.  A ``BackgroundCall`` reads and parses the next block while the caller
works on this one.  A ``DaemonPool`` waits for other machines, and all shards that a process works on share it.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_IDLE_PER_WORKING = 32  # where few items need work, so many others may wait behind each of them


def prefetch(
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


class BackgroundCall(Generic[T]):
    """A thread for one call at a time.  A call that it has not begun when the result is wanted, the caller makes.

    So a machine with a core to spare does two things at once, and on a busy one no thread waits to be woken up.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[Callable[[], T], Future[T]] | None = None

    def start(self, call: Callable[[], T]) -> None:
        """Hand over a call; its result is to be taken before the next is handed over."""
        assert self._next is None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self._next = call, self._pool.submit(call)

    def result(self) -> T:
        """Of the call that was handed over; what it raised is raised here."""
        assert self._next is not None
        (call, future), self._next = self._next, None
        return call() if future.cancel() else future.result()

    def close(self) -> None:
        """Wait for the call if it has begun, whatever becomes of it, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


Job = Callable[[], None]


class DaemonPool:
    """A fixed number of threads that take jobs in the order in which they were given.

    One pool for the whole process: while the last replies of one shard are awaited, the next shard's questions are out.
    The threads are daemons: a process that has to end does not wait for a reply that may never come.
    """

    def __init__(self, size: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._size = size
        for number in range(size):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def submit(self, job: Job) -> None:
        """``job`` must deal with its own exceptions: no caller is left to raise them to."""
        self._jobs.put(job)

    def shutdown(self) -> None:
        """The threads end after the jobs that they were given."""
        for _ in range(self._size):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
