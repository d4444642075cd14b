"""Many URLs at once, by one event loop in a thread of its own that all shards of the process share.

The loop sends requests, hosts taking turns; a pool of threads examines the images that arrive; each shard's own thread
takes its results in the order in which they come.  A request holds one of a bounded number of slots until its image is
examined, so that memory is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import queue
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from curation.download.fetch import NETWORK_REASONS, Fetcher, FetchError, FetchLimits, host_of
from curation.download.opt_out import LookupCount, OptOutPolicy
from curation.errors import InfrastructureError
from curation.storage.retry import RetryPolicy

JobT = TypeVar("JobT")
_SUCCESSES_FOR_MORE = 16  # before a host that was too busy gets one more request at once
_FAILURES_TO_GIVE_UP = 20  # in a row, of a host that is busy or cannot be reached
_GIVEN_UP_S = 600.0
_UNREAD_BYTES = 256 << 20  # of results that wait for their shard's thread
_RETRIES = RetryPolicy(first_wait_s=0.5)
_FILES = 65_536
_LOOKUPS_AT_ONCE = 64


class _Host(Generic[JobT]):
    __slots__ = ("active", "failures", "given_up_until", "limit", "listed", "paused_until", "successes", "waiting")

    def __init__(self, limit: int) -> None:
        self.waiting: deque[JobT] = deque()
        self.active = self.successes = self.failures = 0
        self.limit = limit
        self.paused_until = self.given_up_until = 0.0
        self.listed = False  # whether it waits for its turn


class HostScheduler(Generic[JobT]):
    """Jobs by host, at most ``per_host`` of a host at once, hosts taking turns.  Times are monotonic seconds.

    A host that says it is too busy is left alone for as long as it asks, and then gets half as many requests at once
    until it has answered for a while.  A host that fails repeatedly is given up for a while, so that a table with
    thousands of URLs of a dead host does not wait for each of them.
    """

    def __init__(self, per_host: int) -> None:
        self._per_host = per_host
        self._hosts: dict[str, _Host[JobT]] = {}
        self._ready: deque[str] = deque()
        self._later: list[tuple[float, int, str, JobT | None]] = []  # None: the host itself
        self._number = itertools.count()

    def add(self, host: str, job: JobT) -> None:
        entry = self._hosts.get(host)
        if entry is None:
            entry = self._hosts[host] = _Host(self._per_host)
        entry.waiting.append(job)
        self._list(host, entry)

    def add_later(self, host: str, job: JobT, at: float) -> None:
        """Add a job that is tried again, not before ``at``."""
        heapq.heappush(self._later, (at, next(self._number), host, job))

    def next(self, now: float) -> tuple[str, JobT] | None:
        """The host and the job to begin now, None where nothing may begin yet.  The caller calls ``done`` later."""
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

    def back(self, host: str, job: JobT) -> None:
        """Give a job back that ``next`` gave and that has not begun; it is the next one."""
        entry = self._hosts[host]
        entry.active -= 1
        entry.waiting.appendleft(job)
        if not entry.listed and entry.active < entry.limit:
            entry.listed = True
            self._ready.appendleft(host)

    def next_at(self) -> float | None:
        """When the first of the waiting jobs and hosts is due, None where none waits."""
        return self._later[0][0] if self._later else None

    def is_given_up(self, host: str, now: float) -> bool:
        """Whether the host of a job that ``next`` gave is given up."""
        return self._hosts[host].given_up_until > now

    def done(self, host: str, now: float, *, busy: bool = False, wait_s: float = 0.0, failed: bool = False) -> None:
        """A job of the host has ended.

        Args:
            host: As ``next`` gave it.
            now: The time.
            busy: The host asked for fewer requests, and to be left alone for ``wait_s``.
            wait_s: See ``busy``.
            failed: The host said nothing about the job itself.
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

    def _list(self, host: str, entry: _Host[JobT]) -> None:
        if not entry.listed and entry.waiting and entry.active < entry.limit:
            entry.listed = True
            self._ready.append(host)


@dataclass(slots=True)
class UrlRequest:
    """One URL to download.

    Attributes:
        url: As the table has it.
        expected: The name of a hash and the hex digest that the bytes must have.
        tries: Further tries that were made.
        is_looked_up: Whether the rules of its site were asked for before it.
        lookups: What was looked up for it.
        opt_out: The rules of the site that forbid it, None for none.
    """

    url: str
    expected: tuple[str, str] | None = None
    tries: int = 0
    is_looked_up: bool = False
    lookups: LookupCount = field(default_factory=LookupCount)
    opt_out: str | None = None


Examine = Callable[[UrlRequest, bytes], bytes]  # the record of the bytes that came, for the shard's checkpoint
Refuse = Callable[[UrlRequest, FetchError], bytes]  # the record of a URL that gave none


class ShardResults:
    """The results of one shard's requests, as they come."""

    def __init__(self, owner: Downloader, count: int) -> None:
        self._owner = owner
        self._left = count
        self._queue: queue.SimpleQueue[tuple[UrlRequest, bytes] | BaseException] = queue.SimpleQueue()
        self.ended = False

    def take(self, most: int, timeout_s: float) -> list[tuple[UrlRequest, bytes]] | None:
        """Up to ``most`` requests with their records, [] where none came in time; None after the last one."""
        if not self._left:
            return None
        found: list[tuple[UrlRequest, bytes]] = []
        try:
            found.append(self._one(timeout_s))
            while len(found) < min(most, self._left):
                found.append(self._one(0))
        except queue.Empty:
            if not found:
                self._owner.require_live_thread()
        self._left -= len(found)
        self._owner.note_taken(sum(len(record) for _, record in found))
        return found

    def put(self, item: tuple[UrlRequest, bytes] | BaseException) -> None:
        self._queue.put(item)

    def end(self) -> None:
        """Cancel the requests that are still under way."""
        self.ended = True
        self._owner.drop(self)

    def _one(self, timeout_s: float) -> tuple[UrlRequest, bytes]:
        item = self._queue.get(timeout=timeout_s) if timeout_s else self._queue.get_nowait()
        if isinstance(item, BaseException):
            raise item
        return item


_Download = tuple[UrlRequest, ShardResults]


class Downloader:
    """Downloads the URLs of all shards.  ``submit`` may be called from any thread.

    Args:
        limits: Of one request.
        examine: Makes a record of the bytes of a response.  Called in a pool of threads.
        refuse: Makes a record of a URL that gave no bytes.
        per_host: Requests to one host at once.
        retries: Further tries of a URL that may yet work.
        max_wait_s: Longest ``Retry-After`` that is waited for; a host that asks for more has failed.
        threads: Size of the pool that examines.
        opt_out: How the rules of sites are treated; None: only X-Robots-Tag counts.
    """

    def __init__(
        self,
        limits: FetchLimits,
        examine: Examine,
        refuse: Refuse,
        *,
        per_host: int,
        retries: int,
        max_wait_s: float,
        threads: int,
        opt_out: OptOutPolicy | None = None,
    ) -> None:
        import aiohttp  # noqa: F401 - for the thread below: if it is missing, the caller learns of it here

        if opt_out is not None:
            import protego  # noqa: F401 - likewise

        self._limits, self._opt_out = limits, opt_out
        self._examine, self._refuse = examine, refuse
        self._retries, self._max_wait_s = retries, max_wait_s
        self._scheduler: HostScheduler[_Download] = HostScheduler(per_host)
        self._running: dict[asyncio.Task[None], _Download] = {}
        self._looking: dict[str, tuple[asyncio.Task[None], list[tuple[str, _Download]]]] = {}  # by origin: who waits
        self._pool = ThreadPoolExecutor(threads, "examine")
        self._lock = threading.Lock()
        self._unread = 0
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        _allow_many_files()
        self._thread = threading.Thread(target=self._run, name="downloads", daemon=True)
        self._thread.start()

    def submit(self, requests: Iterable[UrlRequest]) -> ShardResults:
        """Begin with these requests, in about this order."""
        jobs = list(requests)
        results = ShardResults(self, len(jobs))
        self._call(self._add, jobs, results)
        return results

    def close(self) -> None:
        self._closing = True
        self.wake()
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def require_live_thread(self) -> None:
        if not self._thread.is_alive():
            raise InfrastructureError("the thread that downloads has ended; this is a bug")

    def note_taken(self, count: int) -> None:
        with self._lock:
            was_full = self._unread > _UNREAD_BYTES
            self._unread -= count
        if was_full:
            self.wake()

    def wake(self) -> None:
        self._call(self._changed.set)

    def drop(self, results: ShardResults) -> None:
        """Cancel the requests that are under way for a shard."""
        self._call(self._cancel, results)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function, *arguments)

    # ---- in the loop's thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_default_executor(ThreadPoolExecutor(_LOOKUPS_AT_ONCE, "dns"))
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    def _add(self, jobs: list[UrlRequest], results: ShardResults) -> None:
        for request in jobs:
            try:
                self._scheduler.add(host_of(request.url), (request, results))
            except FetchError as error:
                self._deliver(results, request, self._refuse(request, error))
        self._changed.set()

    async def _serve(self) -> None:
        fetcher = Fetcher(self._limits, self._opt_out)
        try:
            while not self._closing:
                self._changed.clear()
                self._begin(fetcher)
                due = self._scheduler.next_at()
                wait_s = None if due is None else max(0.0, due - time.monotonic())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
        finally:
            tasks = [*self._running, *(task for task, _ in self._looking.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await fetcher.close()

    def _cancel(self, results: ShardResults) -> None:
        for task, (_, whose) in list(self._running.items()):
            if whose is results:
                task.cancel()

    def _begin(self, fetcher: Fetcher) -> None:
        now = time.monotonic()
        most = self._limits.connections
        while len(self._running) < most and len(self._looking) < most and self._unread <= _UNREAD_BYTES:
            found = self._scheduler.next(now)
            if found is None:
                return
            host, job = found
            if job[1].ended:
                self._scheduler.done(host, now)
                continue
            if self._scheduler.is_given_up(host, now):
                self._scheduler.done(host, now, failed=True)
                error = FetchError("host_down", f"{host} failed repeatedly")
                self._deliver(job[1], job[0], self._refuse(job[0], error))
                continue
            origin = None if job[0].is_looked_up else fetcher.unknown_origin(job[0].url)
            if origin is not None:
                self._look_up(fetcher, origin, host, job)
                continue
            task = self._loop.create_task(self._one(fetcher, host, *job))
            self._running[task] = job
            task.add_done_callback(self._task_done)

    def _look_up(self, fetcher: Fetcher, origin: str, host: str, job: _Download) -> None:
        """Ask for the rules of a site first.  Meanwhile its jobs hold turns of their host, but no slot of a request."""
        if origin in self._looking:
            self._looking[origin][1].append((host, job))
            return
        task = self._loop.create_task(fetcher.look_up(origin, job[0].lookups))
        self._looking[origin] = task, [(host, job)]
        task.add_done_callback(partial(self._looked_up, origin))

    def _looked_up(self, origin: str, task: asyncio.Task[None]) -> None:
        _, waiting = self._looking.pop(origin)
        error = None if task.cancelled() else task.exception()
        for host, job in reversed(waiting):
            if isinstance(error, FetchError):
                self._failed(host, *job, error)
            else:  # also after a bug, which ``fetch`` meets again
                job[0].is_looked_up = True
                self._scheduler.back(host, job)
        self._changed.set()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        _, results = self._running.pop(task)
        self._changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            results.put(error)  # a bug, or no memory: the shard's thread raises it

    async def _one(self, fetcher: Fetcher, host: str, request: UrlRequest, results: ShardResults) -> None:
        try:
            data, request.opt_out = await fetcher.fetch(request.url, request.lookups)
        except FetchError as error:
            self._failed(host, request, results, error)
            return
        except asyncio.CancelledError:
            self._scheduler.done(host, time.monotonic())
            raise
        self._scheduler.done(host, time.monotonic())
        self._deliver(results, request, await self._loop.run_in_executor(self._pool, self._examine, request, data))

    def _failed(self, host: str, request: UrlRequest, results: ShardResults, error: FetchError) -> None:
        now = time.monotonic()
        wait_s = _RETRIES.wait_s(request.tries + 1) if error.wait_s is None else error.wait_s
        failed = error.reason in NETWORK_REASONS
        too_long = wait_s > self._max_wait_s  # then the host has failed
        self._scheduler.done(host, now, busy=error.busy and not too_long, wait_s=wait_s, failed=failed or too_long)
        if error.retryable and request.tries < self._retries and not too_long:
            request.tries += 1
            self._scheduler.add_later(host, (request, results), now + wait_s)
        else:
            self._deliver(results, request, self._refuse(request, error))

    def _deliver(self, results: ShardResults, request: UrlRequest, record: bytes) -> None:
        with self._lock:
            self._unread += len(record)
        results.put((request, record))


def _allow_many_files() -> None:
    """Every connection is a file, and the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
