"""The images of a shard to model servers, each on its own: as soon as one is answered, the next is asked.

A server computes many requests together and begins another the moment that one ends.  So nothing waits for the slowest
of a batch: all shards in hand share one row of **places**, and what the first shard leaves free, the next one takes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from curation.errors import Stopped
from curation.run import ShardContext
from curation.threads import DaemonPool

MOST_PLACES = 2048  # each is a thread
GATHER_S = 0.01  # an answer waits so long for others, so that several share one write
WAIT_S = 0.5  # how often signals are checked while no answer arrives
MAX_BYTES_ASKED = 256 << 20  # of the images of one shard that are asked or wait for their turn
_SPARE = 8  # for so many places one more request waits for its turn, so that no thread waits for the next request

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Places:
    """The requests that all shards of a process may have in flight, with the threads that send them.

    Of the shards that want a place the one that began first gets it, so that they end one after the other.
    """

    def __init__(self, count: int) -> None:
        count = min(count, MOST_PLACES)
        self.pool = DaemonPool(count, "ask")
        self._free = count + max(1, count // _SPARE)
        self._changed = threading.Condition()
        self._waiting: list[int] = []  # the numbers of shards that want a place
        self._last = 0

    def number(self) -> int:
        """The number of a shard that begins."""
        with self._changed:
            self._last += 1
            return self._last

    def take(self, shard: int, or_until: Callable[[], object]) -> bool:
        """Wait until there is a place for a shard, or something else has happened, or for ``WAIT_S``.

        Args:
            shard: Its number.
            or_until: Asked whenever a request ends.

        Returns:
            Whether a place was taken.
        """

        def has_place() -> bool:
            return self._free > 0 and shard == min(self._waiting)

        with self._changed:
            self._waiting.append(shard)
            try:
                self._changed.wait_for(lambda: has_place() or or_until(), WAIT_S)
                taken = has_place()
                self._free -= taken
            finally:
                self._waiting.remove(shard)
                self._changed.notify_all()
            return taken

    def await_end(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds, which is asked whenever a request ends, or for ``WAIT_S``."""
        with self._changed:
            self._changed.wait_for(condition, WAIT_S)

    def give_back(self, tell: Callable[[], None]) -> None:
        """End a request.  tell: called before anybody learns of it."""
        with self._changed:
            tell()
            self._free += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Begin no further request."""
        self.pool.shutdown()


class Asking(Generic[Item, Answer]):
    """The requests of one shard."""

    def __init__(self, places: Places, ask: Callable[[Item], Answer]) -> None:
        """
        Args:
            places: Of all shards.
            ask: Returns the answer for an item.  It is called in many threads at once.
        """
        self._places = places
        self._ask = ask
        self._number = places.number()
        self._halt = threading.Event()
        self._back: deque[Callable[[], tuple[Item, Answer] | None]] = deque()  # each takes one request from the books
        self._awaited = self._bytes = 0
        self._problem: BaseException | None = None  # what a request has raised

    def answers(
        self, items: Iterator[tuple[Item, int]], work: ShardContext, patience_s: float
    ) -> Iterator[list[tuple[Item, Answer]]]:
        """Ask about every item.

        Args:
            items: Each with the bytes that it takes until it is answered.
            work: Its ``check_stop`` is called while answers arrive.
            patience_s: How many seconds to wait for answers after a stop was requested.

        Yields:
            What was answered, as it arrives: several at once, to be recorded before the next ones are waited for.

        Raises:
            Stopped: A stop was requested; what was answered until then was yielded.
            Exception: Whatever else ``ask`` raises.
        """
        try:
            for item, nbytes in items:
                while not self._begins(item, nbytes):
                    yield from self._arrived(work)
                if self._back:
                    yield from self._arrived(work)
            while self._awaited:
                yield from self._arrived(work)
        except Stopped:
            self._halt.set()  # nothing more is begun
            ends = time.monotonic() + patience_s
            while self._awaited and time.monotonic() < ends:
                work.check_stop(urgent_only=True)
                if came := self._take():
                    yield came
            raise
        finally:
            self._halt.set()

    def _begins(self, item: Item, nbytes: int) -> bool:
        """Ask about an item if there is a place for it.  One item has a place, however large it is."""
        if self._awaited and self._bytes + nbytes > MAX_BYTES_ASKED:
            return False
        if not self._places.take(self._number, or_until=lambda: self._back):
            return False
        self._bytes += nbytes
        self._awaited += 1
        self._places.pool.submit(lambda: self._answer(item, nbytes))
        return True

    def _arrived(self, work: ShardContext) -> Iterator[list[tuple[Item, Answer]]]:
        if came := self._take():
            yield came
        if self._problem is not None:
            raise self._problem
        work.check_stop()

    def _take(self) -> list[tuple[Item, Answer]]:
        """The answers that have arrived; waits for the first one a while."""
        self._places.await_end(lambda: self._back)
        if self._awaited > 1:
            time.sleep(GATHER_S)
        came: list[tuple[Item, Answer]] = []
        while self._back:
            if (answered := self._back.popleft()()) is not None:
                came.append(answered)
        return came

    def _answer(self, item: Item, nbytes: int) -> None:
        """In a thread of the pool."""
        problem: BaseException | None = None
        try:
            if self._halt.is_set():
                raise Stopped("the shard is given up")
            answer = self._ask(item)
        except BaseException as error:  # noqa: BLE001 - the shard's thread raises it
            problem = error

        def settle() -> tuple[Item, Answer] | None:
            self._awaited -= 1
            self._bytes -= nbytes
            if problem is None:
                return item, answer
            if not isinstance(problem, Stopped):
                self._problem = self._problem or problem
            return None

        self._places.give_back(lambda: self._back.append(settle))
