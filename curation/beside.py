"""One call that runs beside its caller: the next block is read and parsed while this one is worked on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """A thread for one call at a time, begun with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[T] | None = None

    def start(self, call: Callable[[], T]) -> None:
        """Returns once the call has begun: else a caller that never rests might keep it from beginning at all."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        begun = threading.Event()

        def begin() -> T:
            begun.set()
            return call()

        self._running = self._pool.submit(begin)
        begun.wait()

    def result(self) -> T:
        """Of the call that was started, after waiting for it; what it raised is raised here."""
        assert self._running is not None
        return self._running.result()

    def close(self) -> None:
        """Wait for the call, whatever becomes of it, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
