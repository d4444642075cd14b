"""A pool of HTTP model servers: which gets the next request, how many each gets at once, and what follows a failure.

Every request goes to the server with the fewest outstanding ones, below a limit that starts at one and grows with what
the server sustains.  The requests of a server that breaks go to the others.

Where a request fails, either it or the server is at fault.  A **control question** tells: a harmless request of the
same settings.  A server that answers it takes others, so that the request may be blamed, once a second server has
failed on it too.  A server that refuses it refuses everything, because of a setting or a key: no request is blamed, and
where all servers do so, the run ends.  A server that is silent gets as long for it as a model takes to load.

The limit is learnt from how a server answers.  A server with four slots that gets eight requests answers no more of
them per second, only later; one that batches (vLLM, llama.cpp) answers more; one with a short queue refuses.  The user
need not know which is which.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Final, Literal, NoReturn

from curation.errors import InfrastructureError, SampleError, Stopped, UsageError
from curation.jsonio import clean_text
from curation.options import items_in, numbers_in
from curation.replies import Reply
from curation.serving.adapt import adapted, unquieted
from curation.serving.connection import KEY_VARIABLE, EndpointError, ModelMissing, Refused, post
from curation.serving.service import Service
from curation.serving.wire import (
    CONTEXT_TOKENS,
    PLAIN,
    SERVER_APIS,
    Api,
    Manner,
    Request,
    Served,
    ServerApi,
    detect_api,
    while_busy,
)
from curation.storage.retry import RetryPolicy
from curation.storage.search import expand_braces
from curation.storage.urls import redact
from curation.threads import DaemonPool

if TYPE_CHECKING:
    from curation.serving.session import Session  # it needs requests

MIN_ANSWERS_TO_JUDGE = 8  # before a load is judged: replies differ in length
WORTH = 0.25  # the share of what more requests could bring that they must bring
KNEE = 0.8  # of the best throughput: the fewest requests that reach it are enough
FORGET_S = 30.0  # servers change: measure again after this time, but not before so many round trips
FORGET_ROUND_TRIPS = 50
LONGEST_HOLD_S = 60.0


class _Load:
    """Means of requests in flight and of latency, over the requests that were sent as the 2ⁿth to 2ⁿ⁺¹-1th at once."""

    __slots__ = ("answers", "in_flight", "latency_s")

    def __init__(self) -> None:
        self.answers, self.in_flight, self.latency_s = 0, 0.0, 0.0

    def add(self, in_flight: int, latency_s: float) -> None:
        self.answers += 1
        weight = max(1 / self.answers, 1 / 32)
        self.in_flight += weight * (in_flight - self.in_flight)
        self.latency_s += weight * (latency_s - self.latency_s)

    @property
    def throughput(self) -> float:
        """Answers per second, by Little's law."""
        return self.in_flight / max(self.latency_s, 1e-6)


class Concurrency:
    """The limit of one server's requests in flight.  Not thread-safe; times are monotonic seconds.

    The limit starts at one and grows by one with each answer that comes while it is reached, so it doubles with each
    round trip, until that no longer pays: twice the requests in flight must bring at least a quarter of the answers per
    second that they could.  Then it goes back to the fewest requests that reach nearly the best throughput, and one
    more that waits at the server, so that no slot is idle while an answer travels.

    A refusal (503) says exactly how many requests are too many.  A time-out halves the limit.  After either, the limit
    does not grow for a while.
    """

    def __init__(self, timeout_s: float, slots: int = 0) -> None:
        """slots: Requests that the server computes at once, where that is known: nothing is measured then, until it
        refuses one."""
        self.limit = slots + max(1, slots // 16) if slots else 1
        self.timeout_s = timeout_s
        self._known = slots > 0
        self._loads: dict[int, _Load] = {}
        self._settled = self._known
        self._settled_at = self._measured_since = 0.0
        self._held_until = 0.0  # after a refusal or a time-out
        self._hold_s = 1.0

    def answered(self, in_flight: int, latency_s: float, now: float, *, full: bool) -> None:
        """Count an answer.

        Args:
            in_flight: Outstanding requests when its request was sent, itself included.
            latency_s: How long it took.
            now: The time.
            full: Whether the limit was reached meanwhile.
        """
        if now - latency_s < self._measured_since:
            return  # it was sent under a higher limit and waited behind more requests
        if self._known:
            return
        degree = in_flight.bit_length()
        self._loads.setdefault(degree, _Load()).add(in_flight, latency_s)
        if self._settled:
            if now - self._settled_at > max(FORGET_S, FORGET_ROUND_TRIPS * latency_s):
                self._measure_anew(now)
        elif not self._pays(degree):
            self.limit = min(self.limit, self._knee(degree) + 1)
            self._settled, self._settled_at = True, now
        elif full and now >= self._held_until and latency_s < self.timeout_s / 2:
            self.limit += 1

    def refused(self, accepted: int, now: float) -> None:
        """The server was too busy for a request while it had ``accepted`` others."""
        self._back_to(max(1, min(self.limit, accepted)), now)

    def timed_out(self, now: float) -> None:
        """The server did not answer in time."""
        if now >= self._held_until or self._settled:  # only once for all requests of the same jam
            self._back_to(max(1, self.limit // 2), now)

    def _back_to(self, limit: int, now: float) -> None:
        if now >= self._held_until:  # else it is one more of the same burst
            again = self._held_until > 0 and limit >= self.limit - 1  # this try went no further than the last
            self._hold_s = min(LONGEST_HOLD_S, self._hold_s * 2) if again else 1.0
            self._held_until = now + self._hold_s
        self.limit = limit
        self._settled = self._known = False
        self._loads.clear()

    def _pays(self, degree: int) -> bool:
        """Whether so many requests in flight are worth more than half as many.  True until there is evidence."""
        more, less = self._loads[degree], self._loads.get(degree - 1)
        if more.answers < MIN_ANSWERS_TO_JUDGE or less is None:
            return True
        return more.throughput / less.throughput - 1 >= WORTH * (more.in_flight / less.in_flight - 1)

    def _knee(self, degree: int) -> int:
        """The fewest requests in flight that were seen to reach nearly the throughput of the most."""
        enough = KNEE * self._loads[degree].throughput
        return math.ceil(min(load.in_flight for load in self._loads.values() if load.throughput >= enough))

    def _measure_anew(self, now: float) -> None:
        """Begin again at half the limit, to see whether the other half pays."""
        self.limit = max(1, self.limit // 2)
        self._settled, self._measured_since = False, now
        self._loads.clear()


FAILURES_TO_OPEN = 3  # in a row: one broken connection does not mean a broken server
TRIALS = RetryPolicy(first_wait_s=1.0, longest_wait_s=60.0)  # waits before a broken server is asked again
BUSY = RetryPolicy(first_wait_s=0.04, longest_wait_s=1.0)  # waits of a request that every server refuses
ATTEMPTS = 4  # of one request that keeps failing while servers answer others
PROBE_S = 5.0  # for a sign of life
MUTE_S, MUTE_LATENCIES, MIN_ANSWERS = 2.0, 10.0, 16
GRACE_S = 10.0  # where servers register: from the last that came until it counts that all refuse
LONG_EXAMINATION_S = 5.0  # after which the log says how long it took
FIRST_REQUESTS = 4  # where so many fail and none has been answered, no other will be
# What people copy from the manuals of servers; the requests bring it with them.
_PATH_OF_API = re.compile(r"(?:/v1(?:/(?:chat/completions|completions|models))?|/api/(?:chat|generate|tags))?/*$")
_LONG_KEY = 12  # characters; shorter ones ("EMPTY") are words, and no secrets
CONTROL = "A dog sleeps on a sofa."

logger = logging.getLogger("curation")


def endpoint_urls(ports: str, host: str = "localhost", endpoints: str | None = None) -> list[str]:
    """The servers' URLs.

    Args:
        ports: Ports of ``host`` and ranges of them (``numbers_in``); each has a server.
        host: Of ``ports``.
        endpoints: Whole URLs, with commas or white space between them, in place of ``ports``; a range in braces stands
            for several, as in ``http://node{1..4}:8000``.

    Raises:
        UsageError: Something is not a port or not a URL, or none is named.
    """
    if endpoints:
        urls = [_PATH_OF_API.sub("", url) for item in items_in(endpoints) for url in expand_braces(item)]
        for url in urls:
            if not url.startswith(("http://", "https://")):
                shown = re.sub(r"[^/@]*@", "", redact(url))  # perhaps a password, without the scheme
                raise UsageError(f"--endpoints: {shown!r} is not a URL; write http://host:port")
    else:
        numbers = numbers_in("--ports", ports, low=1, high=65535, what="a port", example="11434,11435 or 11434-11437")
        urls = [f"http://{host}:{port}" for port in numbers]
    if not urls:
        raise UsageError("no endpoint is named: give --ports or --endpoints")
    return list(dict.fromkeys(urls))


class Call:
    """One request in flight.

    Attributes:
        endpoint: Its server.
        began: When it was sent.
        in_flight: The server's requests in flight when it was sent, itself included.
        full: Whether the server was at its limit meanwhile.
    """

    __slots__ = ("began", "endpoint", "full", "in_flight")

    def __init__(self, endpoint: Endpoint, began: float, in_flight: int) -> None:
        self.endpoint = endpoint
        self.began = began
        self.in_flight = in_flight
        self.full = False


class Endpoint:
    """One server as the pool sees it, and its circuit breaker.  Only the pool, under its lock, changes it.

    Attributes:
        manner: How it is asked.
        manner_is_known: It has answered a request of this manner.
        answered_at: When it last answered anything (monotonic); 0 where it never has.
        problem: The last one, for people.
        broken: It gets no requests until it has answered a control question.
        examined: It is being asked one.
        refuses: What it said when it refused a control question: it refuses everything.
        trial_at: When it may be asked again (monotonic).
        leaving: It gets no more requests, and goes when those in flight have ended.
    """

    def __init__(self, url: str, wire: ServerApi, timeout_s: float, manner: Manner = PLAIN, slots: int = 0) -> None:
        self.url = url
        self.name = redact(url)  # for messages
        self.wire = wire
        self.manner = manner
        self.manner_is_known = False
        self.concurrency = Concurrency(timeout_s, slots)
        self.calls: set[Call] = set()
        self.latency_s = 0.0  # smoothed
        self.counts: Counter[str] = Counter()
        self.service = Service()
        self.answered_at = 0.0
        self.problem = ""
        self.broken = False
        self.examined = False
        self.refuses = ""
        self.trial_at = 0.0
        self.leaving = False
        self.one_control = threading.Lock()
        self._failures = 0  # in a row
        self._trials = 0  # waits since it last answered
        self._told = False  # the log says that it is left alone

    def has_room(self, now: float) -> bool:
        return self.takes_requests and now >= self.trial_at and len(self.calls) < self.concurrency.limit

    @property
    def takes_requests(self) -> bool:
        return not (self.broken or self.leaving)

    def is_due(self, now: float) -> bool:
        """Whether it may be asked a control question, to see whether it works again."""
        return self.broken and not self.leaving and not self.examined and now >= self.trial_at

    def timeout_s(self, longest: float) -> float:
        """The time limit for a request's first try: a server that is silent for much longer than usual has failed."""
        usual = self.latency_s if self.counts["answered"] >= MIN_ANSWERS else longest
        return min(longest, max(MUTE_S, MUTE_LATENCIES * usual))

    def begin(self, now: float) -> Call:
        call = Call(self, now, len(self.calls) + 1)
        self.calls.add(call)
        self.service.began(len(self.calls), now)
        if call.in_flight >= self.concurrency.limit:
            for out in self.calls:
                out.full = True
        return call

    def succeeded(self, call: Call, now: float) -> None:
        latency_s = now - call.began
        self.counts["answered"] += 1
        self.service.answered(latency_s)
        self.latency_s += (0.2 if self.latency_s else 1.0) * (latency_s - self.latency_s)
        self.concurrency.answered(call.in_flight, latency_s, now, full=call.full)
        self.works(now)

    def works(self, now: float) -> None:
        """It has answered."""
        self.answered_at = now
        self._failures = self._trials = 0
        self.refuses = ""
        if self.broken:
            self.broken, self.trial_at = False, 0.0
        if self._told:
            self._told = False
            logger.info(f"{self.name} answers again")

    def failed(self, error: EndpointError, call: Call, now: float) -> None:
        """Count a failure and lower the limit.  It is broken where it failed before, or said nothing to anybody."""
        self.problem = str(error)
        self.counts["busy" if error.busy else "timeouts" if error.timed_out else "errors"] += 1
        if error.busy:
            self.service.busy += 1
        else:
            self.service.failed(self.problem, timed_out=error.timed_out)
        others = len(self.calls) - 1
        if error.busy:
            self.concurrency.refused(others, now)
        elif error.timed_out:
            self.concurrency.timed_out(now)
        if self.broken:
            return  # one of those in flight when it broke
        if error.busy and others:  # it serves those
            self.trial_at = now + error.retry_after_s
            return
        self._failures += 1
        silent = error.timed_out and self.answered_at < call.began
        if error.refused or error.retry_after_s:
            self.leave_alone(now, error.retry_after_s)
        elif silent or self._failures >= FAILURES_TO_OPEN:  # perhaps because of the requests: it is asked at once
            self.broken = True

    def leave_alone(self, now: float, asked_s: float = 0.0) -> None:
        """Ask it nothing for a while, because of ``problem``; the log says so once."""
        self._trials += 1
        pause_s = asked_s or TRIALS.wait_s(self._trials)
        self.trial_at = max(self.trial_at, now + pause_s)
        self.broken = True
        self.concurrency = Concurrency(self.concurrency.timeout_s)  # it comes back cold
        if not self._told:
            self._told = True
            why = "refuses every request" if self.refuses else "does not answer"
            logger.warning(f"{self.name} {why}: {self.problem}; no requests to it for {pause_s:.1f} s")

    def refuse(self, words: str, now: float) -> None:
        """It refuses everything."""
        self.counts["refused"] += 1
        self.service.failed(words)
        self.refuses = self.problem = words
        if not self.answered_at:
            self._trials = 1000  # the longest wait: it never took a request
        self.leave_alone(now)


@dataclass(frozen=True, slots=True)
class Waiting:
    """How long a request is sent again and again while servers live, and are too busy for it.

    Attributes:
        stall_s: Seconds without a reply to any request, after which the run ends; or without one to this request while
            others get theirs, after which it fails alone.  An answer to a control question is no reply.
        stopping: Whether the process was asked to end, so that nothing more is sent and no server is waited for.
    """

    stall_s: float = 1800.0
    stopping: Callable[[], bool] = lambda: False


LONG: Final = Waiting()


@dataclass(slots=True)
class _Tries:
    """What has come of one request so far.

    Attributes:
        last: The server that it was sent to last.
        refused_by: Servers that refuse it although they answer others.
        refusal: What the last of these said.
        failures: How often a server failed on it.
        failing_since: When the first of these tries began (monotonic).
        problem: The last failure.
        refusals: How often a server was too busy for it.
        unanswered_since: When a server first did not take it (monotonic).
    """

    last: Endpoint | None = None
    refused_by: set[Endpoint] = field(default_factory=set)
    refusal: Refused | None = None
    failures: int = 0
    failing_since: float = math.inf
    problem: EndpointError | None = None
    refusals: int = 0
    unanswered_since: float = math.inf

    def failed(self, call: Call, error: EndpointError) -> None:
        self.failures += 1
        self.failing_since = min(self.failing_since, call.began)
        self.problem = error


class Denied(str):
    """Why a server does not let us in, which waiting does not change."""

    __slots__ = ()


class NoEndpoint(InfrastructureError):
    """None of the servers that were named answers."""


class EndpointPool:
    """Servers that all offer the same model.

    Thread-safe: ``ask`` is called from a thread for each simultaneous request, while servers come (``add``) and go
    (``leave``).

    Args:
        urls: The servers that ``open`` opens; empty where all of them come by ``add``.
        model: The model's name on the servers.
        api: The servers' API, or ``auto`` to find it out.
        timeout_s: Time limit for an answer.
        load_timeout_s: Time limit for a model to load, before the first request and whenever the server is silent.
        patience_s: How long ``ask`` waits while no server answers before it ends the run.
        wait_s: How long it waits for the first server, where there are no ``urls``.
        context_tokens: Of every request; the model is loaded with room for so many.
        key: Sent to every server; see ``Session``.
        instructed: Whether a model, of which a server tells something, has the instruction for the task of its own.
        needs_tokens: About how many tokens each request takes with its reply; a server of a shorter context is refused.
        waiting: How long a request is sent again and again.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        api: Literal["ollama", "openai", "auto"] = "auto",
        timeout_s: float = 10.0,
        load_timeout_s: float = 300.0,
        patience_s: float = 60.0,
        wait_s: float = 600.0,
        context_tokens: int = CONTEXT_TOKENS,
        key: str = "",
        instructed: Callable[[Api, Served], bool] = lambda api, served: False,
        needs_tokens: int = 0,
        waiting: Waiting = LONG,
    ) -> None:
        self.model = model
        self._urls = list(urls)
        self._api = api
        self._timeout_s = timeout_s
        self._load_timeout_s = load_timeout_s
        self._patience_s = patience_s
        self._wait_s = wait_s
        self._context_tokens = context_tokens
        self._key = key
        self._instructed = instructed
        self._needs_tokens = needs_tokens
        self._bounds = waiting
        self.expects: Callable[[], bool] = lambda: False  # whether a server is being started, however long that takes
        self._doom = ""  # why no server will ever answer
        self.absence = "no endpoint is named"  # why there is no server, for the error that ends the run
        self.denied = False  # every server that is registered has refused to let us in
        self._endpoints: list[Endpoint] = []  # replaced, never changed in place
        self._gone: dict[str, tuple[Counter[str], Service]] = {}
        self._opening = False
        self._had_servers = False  # whether there has ever been a server
        self._changed = threading.Condition()
        self._sessions = threading.local()
        self._last_success = self._last_came = time.monotonic()
        self._askers = 0
        # The first request: later tries are warmer or longer, and may be refused for that.
        self._usual: Request | None = None
        self._last_reply = -math.inf  # to a request, not to a control question
        self._any_answer = False  # to a request, not to a control question
        self._blamed = 0  # requests, as long as there is none

    def open(self) -> None:
        """Find out which servers answer, and load the model on each of them.

        Raises InfrastructureError where none answers, or where one of them does not have the model.
        """
        self._opening = True
        threads, answers = DaemonPool(len(self._urls), "open"), [Future[Endpoint | str]() for _ in self._urls]

        def attempt(url: str, answer: Future[Endpoint | str]) -> None:
            try:
                answer.set_result(self.try_to_open(url))
            except BaseException as error:  # noqa: BLE001 - this thread's caller raises it
                answer.set_exception(error)

        try:
            for url, answer in zip(self._urls, answers, strict=True):
                threads.submit(partial(attempt, url, answer))
            threads.shutdown()
            found = [answer.result() for answer in answers]
        finally:
            self._opening = False
        silent = {redact(url): why for url, why in zip(self._urls, found, strict=True) if isinstance(why, str)}
        reasons = listed([f"{name}: {why}" for name, why in silent.items()])
        self._endpoints = [endpoint for endpoint in found if isinstance(endpoint, Endpoint)]
        if not self._endpoints:
            raise NoEndpoint(
                f"no endpoint answers ({reasons}). {self._key_hint(reasons)}Start the servers, or name others by "
                "ports or endpoints"
            )
        if reasons:
            logger.warning(f"continuing without {reasons}")
        self._had_servers = True
        self._last_success = time.monotonic()

    def ask(self, request: Request, check_stop: Callable[[], None] | None = None) -> Reply:
        """Send a request to a free server; where it fails, send it again, to another server if there is one.

        Args:
            request: What to send.
            check_stop: Called before each attempt and while waiting.  What it raises ends the call.

        Raises:
            SampleError: The request keeps failing although servers answer others (``llm_bad_request``,
                ``llm_timeout``, ``llm_error``).
            InfrastructureError: No server has answered anything for ``patience_s``, or all refuse everything.
            Stopped: The process was asked to end before the request was sent.
        """
        tries = _Tries()
        with self._asking(request):
            while True:
                call = self._acquire(tries, check_stop)
                endpoint = tries.last = call.endpoint
                try:
                    longest = self._timeout_s
                    return self._send(call, request, longest if tries.failures else endpoint.timeout_s(longest))
                except Refused as error:
                    self._judge_refusal(call, tries, error)
                except EndpointError as error:
                    tries.unanswered_since = min(tries.unanswered_since, call.began)
                    self._require_an_end(tries, error)
                    if error.busy:
                        tries.refusals += 1
                        if tries.refusals > 1:  # the first time another server may be free at once
                            time.sleep(BUSY.wait_s(tries.refusals - 1))
                    elif not error.refused:  # else it says nothing about the request
                        tries.failed(call, error)

    @contextlib.contextmanager
    def _asking(self, request: Request) -> Iterator[None]:
        """The time without an answer counts only while somebody asks: the stage before may pause for long."""
        with self._changed:
            if self._askers == 0:
                self._last_success = time.monotonic()
            self._askers += 1
            self._usual = self._usual or request
        try:
            yield
        finally:
            with self._changed:
                self._askers -= 1

    def adaptations(self) -> dict[str, list[str]]:
        """How servers are asked that refused the usual request, by name, for receipts."""
        with self._changed:
            return {e.name: list(e.manner.changes) for e in self._endpoints if e.manner.changes}

    def facts(self) -> dict[str, dict[str, object]]:
        """What each server did, for the log: answers, failures by kind, its limit, and its latency in seconds."""
        with self._changed:
            gone: dict[str, dict[str, object]] = {redact(url): {**counts} for url, (counts, _) in self._gone.items()}
            here: dict[str, dict[str, object]] = {
                e.name: {**e.counts, "limit": e.concurrency.limit, "latency_s": round(e.latency_s, 3)}
                for e in self._endpoints
            }
            return {**gone, **here}

    def summary(self) -> list[str]:
        """What each server did, in words, a line for each server that was asked anything."""
        with self._changed:
            gone = [(redact(url), service) for url, (_, service) in self._gone.items()]
            here = [(endpoint.name, endpoint.service) for endpoint in self._endpoints]
            return [f"server {name}: {service.in_words()}" for name, service in [*gone, *here] if service.requests]

    def waiting(self) -> str:
        """What requests wait for, in words; empty where a server takes them."""
        with self._changed:
            if self._opening or (self.expects() and not self._endpoints):
                return f"waiting until the model servers have loaded {clean_text(self.model)}"
            if not self._askers or any(endpoint.takes_requests for endpoint in self._endpoints):
                return ""
            problems = listed([f"{e.name}: {e.problem}" for e in self._endpoints], 2) or self.absence
            return f"waiting for a model server: {clean_text(problems)}"

    # ---- coming and going

    def doom(self, why: str) -> None:
        """No server will answer any more: whoever asks gets InfrastructureError."""
        with self._changed:
            self._doom = why
            self._changed.notify_all()

    def try_to_open(
        self, url: str, known: Literal["ollama", "openai", "auto"] = "auto", slots: int = 0
    ) -> Endpoint | str:
        """The server with its model loaded, which ``add`` takes; or why it does not answer.

        slots: Requests that it computes at once, where that is known.

        Raises InfrastructureError where it does not have the model.
        """
        api = known if self._api == "auto" else self._api
        with self._new_session() as session:
            try:
                api = detect_api(session, url, min(self._timeout_s, PROBE_S)) if api == "auto" else api
                served = SERVER_APIS[api].load(session, url, self.model, self._context_tokens, self._load_timeout_s)
            except SampleError as error:
                return Denied(error.detail)
            except (EndpointError, ModelMissing) as error:
                return clean_text(str(error))
        return Endpoint(url, SERVER_APIS[api], self._timeout_s, self._manner(url, api, served), slots)

    def _manner(self, url: str, api: Api, served: Served) -> Manner:
        """How to ask a server.  Raises InfrastructureError where the context of its model is too short."""
        # Ollama's context is the one that each request asks for; other servers have begun with theirs.
        contexts = [served.context_tokens, self._context_tokens if api == "ollama" else 0]
        holds = min((tokens for tokens in contexts if tokens), default=0)
        if holds and self._needs_tokens > holds:
            raise InfrastructureError(
                f"{redact(url)}: the context of {self.model!r} holds {holds:,} tokens, and the system prompt (or "
                f"--prompt) with a reply takes about {self._needs_tokens:,}: shorten the prompt by about "
                f"{4 * (self._needs_tokens - holds):,} characters, or lower --max_tokens"
            )
        fields = SERVER_APIS[api].quiet_fields(served)
        return Manner(self._instructed(api, served), served.system, fields, served.context_tokens)

    def members(self) -> dict[str, bool]:
        """The servers that get requests, and whether each of them works."""
        with self._changed:
            return {e.url: not e.broken for e in self._endpoints if not e.leaving}

    def add(self, endpoint: Endpoint) -> None:
        """Send requests to this server from now on."""
        with self._changed:
            if known := self._gone.pop(endpoint.url, None):
                endpoint.counts, endpoint.service = known
            self._endpoints = [*(e for e in self._endpoints if e.url != endpoint.url), endpoint]
            self._had_servers = True
            self._last_success = self._last_came = time.monotonic()
            self._changed.notify_all()

    def leave(self, url: str) -> None:
        """Send no more requests to this server.  Answers to those in flight still count."""
        with self._changed:
            for endpoint in self._endpoints:
                if endpoint.url == url and not endpoint.leaving:
                    endpoint.leaving = True
                    if not endpoint.broken:  # requests that wait for another server wait from now on
                        self._last_success = time.monotonic()
                    self._remove_if_idle(endpoint)

    def _remove_if_idle(self, endpoint: Endpoint) -> None:
        """Remove a leaving server that has no request in flight.  The caller holds the lock."""
        if endpoint.leaving and not endpoint.calls and endpoint in self._endpoints:
            self._endpoints = [e for e in self._endpoints if e is not endpoint]
            self._gone[endpoint.url] = (endpoint.counts, endpoint.service)

    # ---- routing, under the lock

    def _acquire(self, tries: _Tries, check_stop: Callable[[], None] | None) -> Call:
        with self._changed:
            while True:
                if check_stop is not None:
                    check_stop()
                if self._bounds.stopping():
                    raise Stopped("the process was asked to end")
                now = time.monotonic()
                for endpoint in self._endpoints:
                    if endpoint.is_due(now):
                        endpoint.examined = True
                        threading.Thread(target=self._examine, args=(endpoint,), daemon=True).start()
                self._blame_request(tries)
                free = [e for e in self._endpoints if e.has_room(now) and e not in tries.refused_by]
                if len(free) > 1 and tries.last in free:
                    free.remove(tries.last)
                if free:
                    return min(free, key=lambda e: (len(e.calls), e.latency_s, random.random())).begin(now)
                self._require_a_possible_success(now)
                opens = [e.trial_at - now for e in self._endpoints if e.trial_at > now]
                self._changed.wait(min([0.5, *opens]))

    def _blame_request(self, tries: _Tries) -> None:
        """Raise SampleError where a request has failed often enough, and servers answer others meanwhile."""
        if tries.refusal is not None and not any(
            e.takes_requests or e.examined for e in self._endpoints if e not in tries.refused_by
        ):
            self._blame(tries.refusal)
        answer_others = any(endpoint.answered_at > tries.failing_since for endpoint in self._endpoints)
        if tries.problem is not None and tries.failures >= ATTEMPTS and answer_others:
            reason = "llm_timeout" if tries.problem.timed_out else "llm_error"
            name = tries.last.name if tries.last else ""
            self._blame(SampleError(reason, f"{tries.failures} attempts, the last at {name}: {tries.problem}"))

    def _require_an_end(self, tries: _Tries, error: EndpointError) -> None:
        """Raise where a request was sent again and again for ``stall_s``, and nothing came of it.

        It is asked after a try, so that the time for which a server wants to be left alone is given to it.

        Raises:
            SampleError: Other requests were answered meanwhile.
            InfrastructureError: None was.
        """
        stall_s, now = self._bounds.stall_s, time.monotonic()
        with self._changed:
            last_reply, name = self._last_reply, tries.last.name if tries.last else ""
        if now - tries.unanswered_since <= stall_s:
            return
        if last_reply > tries.unanswered_since:
            raise SampleError("llm_error", f"no answer in {stall_s:g} s (--stall_s), the last at {name}: {error}")
        raise InfrastructureError(
            f"no request has been answered for {stall_s:g} s (--stall_s), though the model servers live: {name} says "
            f"{error}. Replies so far are kept: look at the servers and their limits, and run the same command again"
        )

    def _blame(self, error: SampleError) -> NoReturn:
        """Raise it; or InfrastructureError, where every request fails from the first one on: that is a setting."""
        self._blamed += not self._any_answer
        if self._blamed >= FIRST_REQUESTS and not self._any_answer:
            raise InfrastructureError(
                f"none of the first {self._blamed} requests was answered, though the servers answer a harmless one: "
                f"{error}. Look at --timeout, --max_tokens and the system prompt or --prompt"
            )
        raise error

    def _require_a_possible_success(self, now: float) -> None:
        """Raise InfrastructureError once every server has been broken or gone for too long, or refuses everything."""
        here = [endpoint for endpoint in self._endpoints if not endpoint.leaving]
        if self._doom and not here:
            raise InfrastructureError(f"{self._doom}. Replies so far are kept: run the same command again")
        if not all(endpoint.broken for endpoint in here) or self.expects():
            return
        problems = listed([f"{e.name}: {e.problem}" for e in self._endpoints]) or self.absence
        others_may_come = not self._urls and now - self._last_came < GRACE_S
        refused = all(e.refuses and not e.answered_at for e in here) if here else self.denied and not self._had_servers
        if refused and not others_may_come:
            raise InfrastructureError(
                f"the model servers refuse every request ({problems}). {self._key_hint(problems)}No sample is "
                "marked as failed: start again when the setting is right"
            )
        if any(endpoint.examined for endpoint in here):
            return
        if now - self._last_success <= (self._patience_s if self._had_servers else self._wait_s):
            return
        if not self._had_servers:
            raise InfrastructureError(f"no model server registered within {self._wait_s:g} s ({self.absence})")
        raise InfrastructureError(
            f"no endpoint has answered for {self._patience_s:g} s ({problems}). {self._key_hint(problems)}Replies so "
            "far are kept: start again when the servers are back"
        )

    def _send(self, call: Call, request: Request, timeout_s: float) -> Reply:
        """Send a request once, and note what that says about the server."""
        endpoint = call.endpoint
        try:
            reply = self._exchange(self._session(), endpoint, request, timeout_s)
        except EndpointError as error:
            with self._changed:
                endpoint.failed(error, call, time.monotonic())
            raise
        except ModelMissing as error:  # or a gateway that does not find what this request needs: the control tells
            raise Refused(404, str(error), access=True) from None
        except Refused:
            raise
        except SampleError:  # the server works, the request is at fault
            with self._changed:
                self._last_success = self._last_reply = now = time.monotonic()
                endpoint.works(now)
            raise
        else:
            with self._changed:
                self._last_success = self._last_reply = now = time.monotonic()
                self._any_answer = True
                limit = endpoint.concurrency.limit
                endpoint.succeeded(call, now)
                if endpoint.concurrency.limit > limit:
                    self._changed.notify()  # one thread more than the one for the place that becomes free
            return reply
        finally:
            with self._changed:
                endpoint.calls.discard(call)
                endpoint.service.ended(len(endpoint.calls), time.monotonic())
                self._remove_if_idle(endpoint)
                self._changed.notify()

    def _exchange(self, session: Session, endpoint: Endpoint, request: Request, timeout_s: float) -> Reply:
        """One request and its reply.  A server that refuses a field is asked again without it, and from then on."""
        manner = endpoint.manner
        while True:
            path, body = endpoint.wire.body(self.model, request, manner)
            try:
                payload = post(session, endpoint.url + path, body, timeout_s)
                reply = endpoint.wire.reply(payload, request, manner)
            except (SampleError, EndpointError) as error:
                known = endpoint.manner_is_known and manner is endpoint.manner
                other = adapted(manner, request, error, known=known or bool(request.prompt))
                if isinstance(error, EndpointError):
                    error.args = (redact(clean_text(str(error)), self._key),)
                if other is None:
                    raise
                manner = other
                continue
            if len(self._key) >= _LONG_KEY and self._key in reply.text:
                raise EndpointError("its reply holds the key")
            known = endpoint.manner_is_known and manner is endpoint.manner
            if (other := unquieted(manner, reply, known=known)) is not None:
                manner = other
                continue
            if reply.text.strip():
                self._learn(endpoint, manner, of_chat=not request.prompt)
            return replace(reply, system=manner.system(request) or manner.own_system, adapted=manner.changes)

    def _learn(self, endpoint: Endpoint, manner: Manner, *, of_chat: bool) -> None:
        """Ask this server in this manner from now on, because it has answered."""
        with self._changed:
            new = [change for change in manner.changes if change not in endpoint.manner.changes]
            endpoint.manner_is_known = endpoint.manner_is_known or of_chat
            if new:
                endpoint.manner = manner
        if new:
            logger.info(f"{endpoint.name} refuses the usual request and gets a changed one: {', '.join(new)}")

    # ---- who is at fault

    def _judge_refusal(self, call: Call, tries: _Tries, error: Refused) -> None:
        """Find out whether a server refuses this request, or everything."""
        endpoint = call.endpoint
        with endpoint.one_control:  # one thread asks for all whose requests are refused now
            with self._changed:
                if endpoint.broken:  # another thread has found out
                    return
                takes_others = endpoint.answered_at > call.began and not error.access
            try:
                if not takes_others:
                    self._exchange(self._session(), endpoint, self._control(), self._timeout_s)
            except (Refused, ModelMissing) as refusal:
                self._set_aside(endpoint, refusal)
                return
            except EndpointError as failure:
                with self._changed:
                    endpoint.failed(failure, call, time.monotonic())
                tries.failed(call, failure)
                return
            except SampleError:
                pass  # it answers
            with self._changed:
                if not takes_others:
                    self._last_success = now = time.monotonic()
                    endpoint.works(now)
                endpoint.counts["refused"] += 1
                endpoint.service.failed(error.detail)
            tries.refused_by.add(endpoint)
            tries.refusal = error

    def _control(self) -> Request:
        """A harmless request of the usual settings."""
        assert self._usual is not None
        if self._usual.prompt:
            return replace(self._usual, prompt=CONTROL)
        return replace(self._usual, user=CONTROL, jpeg=_grey_picture() if self._usual.jpeg else b"")

    def _set_aside(self, endpoint: Endpoint, refusal: Refused | ModelMissing | InfrastructureError) -> None:
        words = refusal.detail if isinstance(refusal, SampleError) else clean_text(str(refusal))
        with self._changed:
            endpoint.refuse(f"404: {words}" if isinstance(refusal, ModelMissing) else words, time.monotonic())
            self._changed.notify_all()

    def _examine(self, endpoint: Endpoint) -> None:
        """In a thread: let a server load its model again, if it has to, and ask it a control question."""
        began = time.monotonic()
        control = self._control()

        def question(left_s: float) -> Reply:
            return self._exchange(session, endpoint, control, left_s)

        try:
            with self._new_session() as session:
                endpoint.wire.load(session, endpoint.url, self.model, self._context_tokens, self._load_timeout_s)
                asked = time.monotonic()
                while_busy(question, self._load_timeout_s)
                if time.monotonic() - asked > self._timeout_s:  # it had to load its model, or is always so slow
                    question(self._timeout_s)
        except (Refused, ModelMissing, InfrastructureError) as refusal:
            self._set_aside(endpoint, refusal)
        except EndpointError as error:
            with self._changed:
                endpoint.problem = clean_text(str(error))
                endpoint.leave_alone(time.monotonic(), error.retry_after_s)
        except SampleError:
            self._answered(endpoint, began)
        else:
            self._answered(endpoint, began)
        finally:
            with self._changed:
                endpoint.examined = False
                self._changed.notify_all()

    def _answered(self, endpoint: Endpoint, began: float) -> None:
        with self._changed:
            self._last_success = now = time.monotonic()
            endpoint.works(now)
        if now - began > LONG_EXAMINATION_S:
            logger.info(f"{endpoint.name} did not answer, and answers again after {now - began:.0f} s (--load_timeout)")

    def _key_hint(self, problems: str) -> str:
        """What to do where servers want to know who asks; "" where they do not."""
        if not re.search(r"\b(?:401|403|407): ", problems):
            return ""
        if not self._urls:
            return "Servers that register get a key only where --api_key_env names its environment variable. "
        return f"A key for them is taken from the environment variable {KEY_VARIABLE}, or another with --api_key_env. "

    def _new_session(self) -> Session:
        from curation.serving.session import Session

        return Session(self._key, registered=not self._urls)

    def _session(self) -> Session:
        if not hasattr(self._sessions, "value"):
            self._sessions.value = self._new_session()
        session: Session = self._sessions.value
        return session


def listed(problems: Sequence[str], most: int = 5) -> str:
    """The problems of servers in one line; of many only some."""
    more = [f"and {len(problems) - most:,} more"] if len(problems) > most else []
    return "; ".join([*problems[:most], *more])


@lru_cache(maxsize=1)
def _grey_picture() -> bytes:
    import numpy as np

    from curation.images import encode_jpeg

    return encode_jpeg(np.full((64, 64, 3), 127, np.uint8), 90)
