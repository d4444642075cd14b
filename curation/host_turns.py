"""Whose turn it is: URLs of many hosts, each asked politely, none of which holds up the others."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from typing import Generic, TypeVar

Job = TypeVar("Job")

_SUCCESSES_FOR_MORE = 16  # before a host that was too busy is asked one more thing at once
_FAILURES_TO_GIVE_UP = 20  # one after the other, of a host that is busy or cannot be reached
_GIVEN_UP_S = 600.0


class _Host(Generic[Job]):
    __slots__ = ("active", "failures", "given_up_until", "limit", "listed", "paused_until", "successes", "waiting")

    def __init__(self, limit: int) -> None:
        self.waiting: deque[Job] = deque()
        self.active = self.successes = self.failures = 0
        self.limit = limit
        self.paused_until = self.given_up_until = 0.0
        self.listed = False  # among those whose turn comes


class HostTurns(Generic[Job]):
    """Jobs by host, at most ``per_host`` of one at once, hosts taking turns.  Times are monotonic seconds.

    A host that says it is too busy is left alone for as long as it asks, and then asked for half as much at once until
    it has answered for a while.  One that fails time after time is given up for a while, so that a table with thousands
    of URLs of a dead host does not wait for each of them.
    """

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._hosts: dict[str, _Host[Job]] = {}
        self._ready: deque[str] = deque()
        self._later: list[tuple[float, int, str, Job | None]] = []  # None: the host itself
        self._number = itertools.count()

    def add(self, host: str, job: Job) -> None:
        entry = self._hosts.get(host)
        if entry is None:
            entry = self._hosts[host] = _Host(self._per_host)
        entry.waiting.append(job)
        self._list(host, entry)

    def add_again(self, host: str, job: Job, at: float) -> None:
        """A job that is to be tried again, not before ``at``."""
        heapq.heappush(self._later, (at, next(self._number), host, job))

    def next(self, now: float) -> tuple[str, Job] | None:
        """A job to begin now; ``done`` is called when its answer is there.  None where nothing may begin yet."""
        self._wake(now)
        while self._ready:
            host = self._ready.popleft()
            entry = self._hosts[host]
            entry.listed = False
            if entry.paused_until > now and not entry.given_up_until > now:
                heapq.heappush(self._later, (entry.paused_until, next(self._number), host, None))
                continue
            if not entry.waiting or entry.active >= entry.limit:
                continue
            job = entry.waiting.popleft()
            entry.active += 1
            self._list(host, entry)
            return host, job
        return None

    def next_at(self) -> float | None:
        """When something that waits for a time is due."""
        return self._later[0][0] if self._later else None

    def is_given_up(self, host: str, now: float) -> bool:
        """Whether a job that ``next`` gave is not worth a try."""
        return self._hosts[host].given_up_until > now

    def done(self, host: str, now: float, *, busy: bool = False, wait_s: float = 0.0, failed: bool = False) -> None:
        """A job of the host is answered.  busy: it asked for less, and to be left alone for ``wait_s``.

        failed: it said nothing of the job itself.
        """
        entry = self._hosts[host]
        entry.active -= 1
        entry.failures = entry.failures + 1 if busy or failed else 0
        if entry.failures >= _FAILURES_TO_GIVE_UP:
            entry.failures, entry.given_up_until = 0, now + _GIVEN_UP_S
        if busy:
            entry.limit, entry.successes = max(1, entry.limit // 2), 0
            entry.paused_until = max(entry.paused_until, now + wait_s)
        elif entry.limit < self._per_host:
            entry.successes += 1
            if entry.successes >= _SUCCESSES_FOR_MORE:
                entry.limit, entry.successes = entry.limit + 1, 0
        self._list(host, entry)
        sound = entry.limit == self._per_host and not entry.failures and not entry.given_up_until
        if not entry.active and not entry.waiting and sound:
            del self._hosts[host]  # millions of them pass by

    def _wake(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            _, _, host, job = heapq.heappop(self._later)
            entry = self._hosts.get(host)
            if entry is None:
                entry = self._hosts[host] = _Host(self._per_host)
            if job is not None:
                entry.waiting.appendleft(job)
            self._list(host, entry)

    def _list(self, host: str, entry: _Host[Job]) -> None:
        if not entry.listed and entry.waiting and entry.active < entry.limit:
            entry.listed = True
            self._ready.append(host)
