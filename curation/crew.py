"""Threads that wait on other machines, shared by all shards that a process works on at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Job = Callable[[], None]


class Crew:
    """A fixed number of threads that take jobs in the order in which they were given.

    One crew for the whole process: while the last replies of one shard are awaited, the next shard's questions are out.
    The threads are daemons: a process that has to end does not wait for a reply that may never come.
    """

    def __init__(self, size: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._size = size
        for number in range(size):
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True).start()

    def give(self, job: Job) -> None:
        """``job`` must deal with its own exceptions: there is nobody to raise them to."""
        self._jobs.put(job)

    def dismiss(self) -> None:
        """The threads end after the jobs that they were given."""
        for _ in range(self._size):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
