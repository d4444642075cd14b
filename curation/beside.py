"""One call that runs beside its caller: the next block is read and parsed while this one is worked on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """A thread for one call at a time.  A call that it has not begun when the result is wanted, the caller makes.

    So a machine with a core to spare does two things at once, and on a busy one nobody waits to be woken up.
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
