"""One task after the other in this process, or several at once in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from curation.errors import InfrastructureError

Task = TypeVar("Task")
Result = TypeVar("Result")


def results_in_order(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """What ``work`` makes of each task, in their order.  InfrastructureError where a process is killed."""
    if workers < 2:
        yield from map(work, tasks)
        return
    # spawn: not a copy of this process's threads and locks
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(work, tasks)
        except BrokenProcessPool:
            raise InfrastructureError("a process was killed (out of memory?): try fewer --workers") from None
