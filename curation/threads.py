"""Threads that work ahead of their caller, within limits.

``prefetch`` works ahead and returns results in order.  A ``BackgroundCall`` does the next piece of work while the
caller processes the current one.  A ``DaemonPool`` waits for other machines; all shards in flight share it.
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

_IDLE_PER_WORKING = 32  # so many items that need no work may wait for each that does


def prefetch(
    items: Iterable[T],
    begin: Callable[[T], Future[R] | None],
    size_of: Callable[[T], int],
    ahead: int,
    max_bytes: int,
) -> Iterator[tuple[T, Future[R] | None]]:
    """Yield each item with the future that ``begin`` returned for it, in the order of the items.

    begin: gives the item to a pool, or returns None if it needs no work.  ``ahead`` items that need work, or
    ``max_bytes`` of them as measured by ``size_of``, are begun before the first one is awaited.  So the pool is never
    idle and the memory stays bounded.  The speed of the pool does not change which items are begun at which point.
    Work that has not begun when the caller stops is cancelled.
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
    """A thread for one call at a time.  If it has not begun the call when the result is needed, the caller makes it.

    So with a free core two things happen at once, and on a busy machine nobody waits until the thread wakes up.

    Args:
        name: The thread's.
        beside: Whether there is a thread at all; without one, the caller makes each call when it needs the result.
    """

    def __init__(self, name: str, *, beside: bool = True) -> None:
        self._name, self._beside = name, beside
        self._pool: ThreadPoolExecutor | None = None
        self._next: tuple[Callable[[], T], Future[T] | None] | None = None

    def start(self, call: Callable[[], T]) -> None:
        """Start a call.  ``result`` must be called before the next ``start``."""
        assert self._next is None
        if self._pool is None and self._beside:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self._next = call, None if self._pool is None else self._pool.submit(call)

    def result(self) -> T:
        """The result of the last call; an exception that it raised is raised here."""
        assert self._next is not None
        (call, future), self._next = self._next, None
        return call() if future is None or future.cancel() else future.result()

    def close(self) -> None:
        """Wait for the call if it has begun, ignore its result, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


Job = Callable[[], None]


class DaemonPool:
    """A fixed number of threads that take jobs in the order of submission.

    The whole process has one pool, so that the next shard's requests are sent while the last replies of one shard are
    awaited.  The threads are daemons, so that a process that must end does not wait for a reply that may never come.
    """

    def __init__(self, size: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._size = size
        for number in range(size):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def submit(self, job: Job) -> None:
        """Submit a job.  It must handle its own exceptions, because no caller waits for it."""
        self._jobs.put(job)

    def shutdown(self) -> None:
        """Let the threads end after the submitted jobs."""
        for _ in range(self._size):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
