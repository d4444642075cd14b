"""Looks up what sites say about automatic downloads, once for each scheme, host and port.

A look-up is at most two requests: ``/robots.txt`` and ``/.well-known/tdmrep.json``.  Its result is kept in memory, up
to a bound, and in files that the processes of a root share.  A look-up that fails on the way to the site says nothing
about its rules: whoever asked gets the failure, and the next one asks again.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

from curation.download.opt_out.cache import DAY_S, Kept, SiteCache
from curation.download.opt_out.rules import SiteRecord, SiteRules, read_robots, read_tdm

OptOut = Literal["respect", "record", "ignore"]
OPT_OUT_KINDS: Final = ("robots", "tdmrep", "x_robots_tag")
_UNREADABLE_S: Final = 600.0  # for which a site that answers with an error is left alone
_MEMORY_BYTES: Final = 64 << 20
_THREADS: Final = 4
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.02, 0.5  # between two looks for the result of another process
ValueT = TypeVar("ValueT")


def kinds_of(rules: str) -> set[str]:
    """Which of ``OPT_OUT_KINDS`` the rules are that a row names; several are separated by a semicolon and a space."""
    starts = (("robots.txt", "robots"), ("tdmrep", "tdmrep"), ("X-Robots-Tag", "x_robots_tag"))
    return {kind for text in rules.split("; ") for start, kind in starts if text.startswith(start)}


@dataclass(frozen=True, slots=True)
class OptOutPolicy:
    """How the rules of sites are treated.

    Attributes:
        respect: Whether an image that a rule forbids is not downloaded; else the rule is only recorded.
        token: The product token by which rules may name this downloader.
        folder: Where the processes of a root share what they have found out; None: nowhere.
    """

    respect: bool
    token: str
    folder: Path | None = None


class SmallReply(NamedTuple):
    """The answer of a site to the request for a file of rules.

    Attributes:
        status: Of HTTP; 0 for a site that was reached but gave no whole answer, of which ``problem`` says why.
        body: Its first bytes, up to a bound.
        is_cut: Whether there is more.
        charset: Which the server named.
        problem: Of a status that means that the file cannot be read now.
    """

    status: int
    body: bytes = b""
    is_cut: bool = False
    charset: str = ""
    problem: str = ""


Ask = Callable[[str, str], Awaitable[SmallReply]]
"""Requests a path of an origin.  What it raises means that the site cannot be reached."""


@dataclass(slots=True)
class LookupCount:
    """Look-ups that the requests of a shard began: how many sites and how many requests."""

    sites: int = 0
    requests: int = 0


class Lookups:
    """The rules of sites.  Make and use it within one event loop.

    Args:
        policy: Whose rules, and where they are shared.
        ask: Sends a request.
        at_once: How many sites are asked at once.
        timeout_s: Of a connection and of an answer; a request takes twice as long at most.
        memory_bytes: About how much the rules that are kept in memory take.
    """

    def __init__(
        self, policy: OptOutPolicy, ask: Ask, at_once: int, timeout_s: float, memory_bytes: int = _MEMORY_BYTES
    ) -> None:
        self.respect, self._token, self._ask = policy.respect, policy.token, ask
        self._at_once = asyncio.Semaphore(at_once)
        self._claim_s = 4 * timeout_s + 5
        self._pool = ThreadPoolExecutor(_THREADS, "opt_out")
        self._cache = None if policy.folder is None else SiteCache(policy.folder, policy.token, self._claim_s)
        self._memory: OrderedDict[str, tuple[float, SiteRules]] = OrderedDict()
        self._memory_bytes, self._memory_bound = 0, memory_bytes
        self._flights: dict[str, asyncio.Task[SiteRules]] = {}

    async def close(self) -> None:
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def known(self, origin: str) -> SiteRules | None:
        """The rules of a site if they are in memory."""
        found = self._memory.get(origin)
        if found is None:
            return None
        if found[0] < time.monotonic():
            self._forget(origin)
            return None
        self._memory.move_to_end(origin)
        return found[1]

    async def rules(self, origin: str, count: LookupCount) -> SiteRules:
        """The rules of a site, looked up once for all that wait for them.  Raises what ``ask`` raises.

        count: gets what this call itself had to look up.
        """
        if (found := self.known(origin)) is not None:
            return found
        flight = self._flights.get(origin)
        if flight is None:
            flight = self._flights[origin] = asyncio.get_running_loop().create_task(self._find(origin, count))
            flight.add_done_callback(lambda task: self._landed(origin, task))
        return await asyncio.shield(flight)

    async def forbidden_by(self, rules: SiteRules, url: str) -> str | None:
        """See ``SiteRules``; a large set of rules is asked in another thread."""
        return await self._elsewhere(rules.forbidden_by, url) if rules.is_large else rules.forbidden_by(url)

    async def reserved_by(self, rules: SiteRules, url: str) -> str | None:
        return await self._elsewhere(rules.reserved_by, url) if rules.is_large else rules.reserved_by(url)

    # ---- one look-up

    def _landed(self, origin: str, task: asyncio.Task[SiteRules]) -> None:
        del self._flights[origin]
        if not task.cancelled():
            task.exception()  # also where all that waited for it were cancelled

    async def _find(self, origin: str, count: LookupCount) -> SiteRules:
        async with self._at_once:
            found = await self._claim(origin)
            if found is None:
                try:
                    kept, rules = await self._elsewhere(self._read, *await self._ask_site(origin, count))
                except BaseException:
                    await self._shared("give_up", origin)
                    raise
                await self._shared("put", origin, kept)
            else:
                kept, rules = found, await self._elsewhere(SiteRules, found.rules)
        self._remember(origin, kept.left_s(time.time()), rules)
        return rules

    async def _claim(self, origin: str) -> Kept | None:
        """What another process has found out; None if it is this one's turn to ask."""
        waits, began = _FIRST_WAIT_S, time.monotonic()
        while True:
            found = await self._shared("claim", origin)
            if isinstance(found, Kept):
                return found
            if not found:
                return None
            if time.monotonic() - began > self._claim_s:  # on another node, which has died
                await self._shared("give_up", origin, found)
                began = time.monotonic()
                continue
            await asyncio.sleep(waits)
            waits = min(2 * waits, _LONGEST_WAIT_S)

    async def _shared(self, name: str, *arguments: Any) -> Any:
        """Call the cache; where its files cannot be used, nobody knows anything and it is our turn."""
        if self._cache is None:
            return None
        try:
            return await self._elsewhere(getattr(self._cache, name), *arguments)
        except (OSError, ValueError, TypeError, KeyError):  # the latter: of records that another version wrote
            return None

    async def _ask_site(self, origin: str, count: LookupCount) -> tuple[SmallReply, SmallReply]:
        count.sites += 1
        count.requests += 1
        robots = await self._ask(origin, "/robots.txt")
        if _problem_of(robots):
            return robots, SmallReply(404)
        count.requests += 1
        try:
            return robots, await self._ask(origin, "/.well-known/tdmrep.json")
        except Exception:  # noqa: BLE001 - a site without a TDM file has no rules of this kind, whatever the reason
            return robots, SmallReply(404)

    def _read(self, robots: SmallReply, tdm: SmallReply) -> tuple[Kept, SiteRules]:
        record: SiteRecord = {}
        if problem := _problem_of(robots):
            record["problem"] = problem.replace(";", ",")[:200]
        elif robots.status < 300:
            record["robots"] = read_robots(robots.body, self._token, robots.charset, is_cut=robots.is_cut)
        if 200 <= tdm.status < 300:
            record["tdm"] = read_tdm(tdm.body, is_cut=tdm.is_cut)
        return Kept(record, time.time(), _UNREADABLE_S if problem else DAY_S), SiteRules(record)

    async def _elsewhere(self, function: Callable[..., ValueT], *arguments: Any) -> ValueT:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    # ---- memory

    def _remember(self, origin: str, for_s: float, rules: SiteRules) -> None:
        self._forget(origin)
        self._memory[origin] = (time.monotonic() + for_s, rules)
        self._memory_bytes += rules.cost
        while self._memory_bytes > self._memory_bound and len(self._memory) > 1:
            self._forget(next(iter(self._memory)))

    def _forget(self, origin: str) -> None:
        found = self._memory.pop(origin, None)
        self._memory_bytes -= 0 if found is None else found[1].cost


def _problem_of(robots: SmallReply) -> str:
    """Why everything is forbidden: the server has an error.  Any other status than success means: no rules."""
    if robots.status == 0:
        return robots.problem or "no answer"
    return f"http_{robots.status}" if robots.status >= 500 else ""
