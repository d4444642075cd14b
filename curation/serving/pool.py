"""A pool of HTTP model servers: which gets the next request, how many each gets at once, and what follows a failure.

Every request goes to the server with the fewest outstanding ones, below a limit that starts at one and grows with what
the server sustains.  A server that breaks gets one request on trial now and then, and its requests go to the others.

The limit is learnt from how a server answers.  A server with four slots that gets eight requests answers no more of
them per second, only later; one that batches (vLLM, llama.cpp) answers more; one with a short queue refuses.  The user
need not know which is which.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from curation.errors import InfrastructureError, SampleError, UsageError
from curation.replies import Reply
from curation.serving.wire import (
    CONTEXT_TOKENS,
    PLAIN,
    SERVER_APIS,
    Api,
    EndpointError,
    Manner,
    ModelMissing,
    Request,
    Served,
    ServerApi,
    Session,
    answers,
    detect_api,
    post,
    without_refused,
)
from curation.storage.retry import RetryPolicy
from curation.storage.urls import redact

MIN_ANSWERS_TO_JUDGE = 8  # before a load is judged: replies differ in length
WORTH = 0.25  # the share of what more requests could bring that they must bring
KNEE = 0.8  # of the best throughput: the fewest requests that reach it are enough
FORGET_S = 30.0  # servers change: measure anew after this time, but not before so many round trips
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

    def __init__(self, timeout_s: float) -> None:
        self.limit = 1
        self.timeout_s = timeout_s
        self._loads: dict[int, _Load] = {}
        self._settled = False
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
        self._settled = False
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
TRIALS = RetryPolicy(first_wait_s=1.0, longest_wait_s=60.0)  # waits before a broken server gets a request on trial
BUSY = RetryPolicy(first_wait_s=0.04, longest_wait_s=1.0)  # waits of a request that every server refuses
ATTEMPTS = 4  # of one request that keeps failing while servers are alive
PROBE_S = 5.0  # for a sign of life
MUTE_S, MUTE_LATENCIES, MIN_ANSWERS = 2.0, 10.0, 16

logger = logging.getLogger("curation")


def endpoint_urls(ports: str, host: str = "localhost", endpoints: str | None = None) -> list[str]:
    """The servers' URLs.

    Args:
        ports: Ports of ``host``, separated by commas; each has a server.
        host: Of ``ports``.
        endpoints: Whole URLs, separated by commas, in place of ``ports``.

    Raises:
        UsageError: Something is not a port or not a URL, or none is named.
    """
    if endpoints:
        urls = [url.strip().rstrip("/").removesuffix("/v1") for url in endpoints.split(",") if url.strip()]
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise UsageError(f"--endpoints: {url!r} is not a URL; write http://host:port")
    else:
        numbers = [port.strip() for port in ports.split(",") if port.strip()]
        for port in numbers:
            if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
                raise UsageError(f"--ports: {port!r} is not a port; write 11434,11435")
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
    """One server as the pool sees it, and its circuit breaker.  Only the pool, under its lock, changes it."""

    def __init__(self, url: str, wire: ServerApi, timeout_s: float, manner: Manner = PLAIN) -> None:
        self.url = url
        self.name = redact(url)  # for messages
        self.wire = wire
        self.manner = manner
        self.manner_is_known = False  # it has answered a request of this manner
        self.concurrency = Concurrency(timeout_s)
        self.calls: set[Call] = set()
        self.latency_s = 0.0  # smoothed
        self.counts: Counter[str] = Counter()
        self.problem = ""  # the last one
        self.broken = False  # left alone until a request on trial succeeds
        self.trial_at = 0.0  # monotonic: when one may be sent
        self.leaving = False  # it gets no more requests, and goes when those in flight have ended
        self._broken_at = 0.0
        self._failures = 0  # in a row
        self._trials = 0  # waits since it last answered

    def has_room(self, now: float) -> bool:
        if self.leaving or now < self.trial_at:
            return False
        return len(self.calls) < (1 if self.broken else self.concurrency.limit)

    def timeout_s(self, longest: float) -> float:
        """The time limit for a request's first try: a server that is silent for much longer than usual has failed."""
        usual = self.latency_s if self.counts["answered"] >= MIN_ANSWERS else longest
        return min(longest, max(MUTE_S, MUTE_LATENCIES * usual))

    def begin(self, now: float) -> Call:
        call = Call(self, now, len(self.calls) + 1)
        self.calls.add(call)
        if call.in_flight >= self.concurrency.limit:
            for out in self.calls:
                out.full = True
        return call

    def succeeded(self, call: Call, now: float) -> None:
        latency_s = now - call.began
        self.counts["answered"] += 1
        self.latency_s += (0.2 if self.latency_s else 1.0) * (latency_s - self.latency_s)
        self.concurrency.answered(call.in_flight, latency_s, now, full=call.full)
        self.recovered()

    def recovered(self) -> None:
        self._failures = self._trials = 0
        if self.broken:
            self.broken, self.trial_at = False, 0.0
            logger.info(f"{self.name} answers again")

    def failed(self, error: EndpointError | ModelMissing, call: Call, now: float) -> None:
        """Count a failure, lower the limit, and leave the server alone if it failed before or asks for that."""
        if isinstance(error, ModelMissing):
            error = EndpointError(f"404: {error}", refused=True)
        self.problem = str(error)
        self.counts["busy" if error.busy else "timeouts" if error.timed_out else "errors"] += 1
        others = len(self.calls) - 1
        if error.busy:
            self.concurrency.refused(others, now)
        elif error.timed_out:
            self.concurrency.timed_out(now)
        if self.broken and call.began < self._broken_at:
            return  # one of those in flight when it broke
        if error.busy and others and not self.broken:  # it serves those
            self.trial_at = now + error.retry_after_s
            return
        self._failures += 1
        if self.broken or self._failures >= FAILURES_TO_OPEN or error.refused or error.retry_after_s:
            self._trials += 1
            pause_s = error.retry_after_s or TRIALS.wait_s(self._trials)
            self.trial_at = max(self.trial_at, now + pause_s)
            if not self.broken:
                self.broken, self._broken_at = True, now
                self.concurrency = Concurrency(self.concurrency.timeout_s)  # it comes back cold
                logger.warning(f"{self.name}: {error}; leaving it alone for {pause_s:.1f} s")


class NoEndpoint(InfrastructureError):
    """None of the servers that were named answers."""


class EndpointPool:
    """Servers that all offer the same model.

    Thread-safe: ``ask`` is called from as many threads as requests shall be in flight, while servers come (``add``) and
    go (``leave``).

    Args:
        urls: The servers that ``open`` opens; empty where all of them come by ``add``.
        model: The model's name on the servers.
        api: The servers' API, or ``auto`` to find it out.
        timeout_s: Time limit for an answer.
        load_timeout_s: Time limit for a cold model to load, before the first request.
        patience_s: How long ``ask`` waits while no server answers before it ends the run.
        wait_s: How long it waits for the first server, where there are no ``urls``.
        context_tokens: Of every request; the model is loaded with room for so many.
        instructed: Whether a model, of which a server tells something, has the instruction for the task of its own.
        needs_tokens: About how many tokens each request takes with its reply; a server of a shorter context is refused.
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
        instructed: Callable[[Api, Served], bool] = lambda api, served: False,
        needs_tokens: int = 0,
    ) -> None:
        self.model = model
        self._urls = list(urls)
        self._api = api
        self._timeout_s = timeout_s
        self._load_timeout_s = load_timeout_s
        self._patience_s = patience_s
        self._wait_s = wait_s
        self._context_tokens = context_tokens
        self._instructed = instructed
        self._needs_tokens = needs_tokens
        self.absence = "no endpoint is named"  # why there is no server, for the error that ends the run
        self._endpoints: list[Endpoint] = []  # replaced, never changed in place
        self._gone: dict[str, Counter[str]] = {}
        self._had_servers = False  # whether there has ever been a server
        self._changed = threading.Condition()
        self._sessions = threading.local()
        self._last_success = time.monotonic()

    def open(self) -> None:
        """Find out which servers answer, and load the model on each of them.

        Raises InfrastructureError where none answers, or where one of them does not have the model.
        """
        with ThreadPoolExecutor(len(self._urls)) as threads:
            found = list(threads.map(self.try_to_open, self._urls))
        silent = {redact(url): why for url, why in zip(self._urls, found, strict=True) if isinstance(why, str)}
        reasons = "; ".join(f"{name}: {why}" for name, why in silent.items())
        self._endpoints = [endpoint for endpoint in found if isinstance(endpoint, Endpoint)]
        if not self._endpoints:
            raise NoEndpoint(
                f"no endpoint answers ({reasons}). Start the servers, or name others with --ports or --endpoints"
            )
        if reasons:
            logger.warning(f"going on without {reasons}")
        self._had_servers = True
        self._last_success = time.monotonic()

    def ask(self, request: Request, check_stop: Callable[[], None] | None = None) -> Reply:
        """Send a request to a free server; where it fails, send it again, to another server if there is one.

        Args:
            request: What to send.
            check_stop: Called before each attempt and while waiting.  What it raises ends the call.

        Raises:
            SampleError: The request keeps failing although servers are alive (``llm_bad_request``, ``llm_timeout``,
                ``llm_error``).
            InfrastructureError: No server has answered anything for ``patience_s``.
        """
        failures = refusals = 0
        last: Endpoint | None = None
        while True:
            call = self._acquire(last, check_stop)
            last = call.endpoint
            try:
                return self._send(call, request, self._timeout_s if failures else last.timeout_s(self._timeout_s))
            except (EndpointError, ModelMissing) as error:
                problem = error
            if isinstance(problem, EndpointError) and problem.busy:
                refusals += 1
                if refusals > 1:  # the first time another server may be free at once
                    time.sleep(BUSY.wait_s(refusals - 1))
            elif not (isinstance(problem, ModelMissing) or problem.refused):  # these say nothing about the request
                failures += 1
                if failures >= ATTEMPTS and self._any_alive():
                    reason = "llm_timeout" if problem.timed_out else "llm_error"
                    raise SampleError(reason, f"{failures} attempts, the last at {last.name}: {problem}")

    def facts(self) -> dict[str, dict[str, object]]:
        """What each server did, for the log: answers, failures by kind, its limit, and its latency in seconds."""
        with self._changed:
            gone: dict[str, dict[str, object]] = {redact(url): {**counts} for url, counts in self._gone.items()}
            here: dict[str, dict[str, object]] = {
                e.name: {**e.counts, "limit": e.concurrency.limit, "latency_s": round(e.latency_s, 3)}
                for e in self._endpoints
            }
            return {**gone, **here}

    # ---- coming and going

    def try_to_open(self, url: str, known: Literal["ollama", "openai", "auto"] = "auto") -> Endpoint | str:
        """The server with its model loaded, which ``add`` takes; or why it does not answer.

        Raises InfrastructureError where it does not have the model.
        """
        api = known if self._api == "auto" else self._api
        with Session() as session:
            try:
                api = detect_api(session, url, min(self._timeout_s, PROBE_S)) if api == "auto" else api
                served = SERVER_APIS[api].load(session, url, self.model, self._context_tokens, self._load_timeout_s)
            except (EndpointError, ModelMissing, SampleError) as error:
                return str(error)
        return Endpoint(url, SERVER_APIS[api], self._timeout_s, self._manner(url, api, served))

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
            endpoint.counts = self._gone.pop(endpoint.url, endpoint.counts)
            self._endpoints = [*(e for e in self._endpoints if e.url != endpoint.url), endpoint]
            self._had_servers = True
            self._last_success = time.monotonic()
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
            self._gone[endpoint.url] = endpoint.counts

    # ---- routing, under the lock

    def _acquire(self, avoid: Endpoint | None, check_stop: Callable[[], None] | None) -> Call:
        with self._changed:
            while True:
                if check_stop is not None:
                    check_stop()
                now = time.monotonic()
                free = [endpoint for endpoint in self._endpoints if endpoint.has_room(now)]
                if len(free) > 1 and avoid in free:
                    free.remove(avoid)
                if free:
                    return min(free, key=lambda e: (len(e.calls), e.latency_s, random.random())).begin(now)
                self._require_a_possible_success(now)
                opens = [e.trial_at - now for e in self._endpoints if e.trial_at > now]
                self._changed.wait(min([0.5, *opens]))

    def _require_a_possible_success(self, now: float) -> None:
        """Raise InfrastructureError once every server has been broken or gone for too long."""
        if not all(e.broken or e.leaving for e in self._endpoints):
            return
        if now - self._last_success <= (self._patience_s if self._had_servers else self._wait_s):
            return
        if not self._had_servers:
            raise InfrastructureError(f"no model server came within {self._wait_s:g} s ({self.absence})")
        problems = "; ".join(f"{e.name}: {e.problem}" for e in self._endpoints) or self.absence
        raise InfrastructureError(
            f"no endpoint has answered for {self._patience_s:g} s ({problems}). Replies so far are kept: start again "
            "when the servers are back"
        )

    def _send(self, call: Call, request: Request, timeout_s: float) -> Reply:
        """Send a request once, and note what that says about the server."""
        endpoint = call.endpoint
        try:
            reply = self._exchange(endpoint, request, timeout_s)
        except (EndpointError, ModelMissing) as error:
            with self._changed:
                endpoint.failed(error, call, time.monotonic())
            raise
        except SampleError:  # the server works, the request is at fault
            with self._changed:
                self._last_success = time.monotonic()
                endpoint.recovered()
            raise
        else:
            with self._changed:
                self._last_success = now = time.monotonic()
                limit = endpoint.concurrency.limit
                endpoint.succeeded(call, now)
                if endpoint.concurrency.limit > limit:
                    self._changed.notify()  # one thread more than the one for the place that becomes free
            return reply
        finally:
            with self._changed:
                endpoint.calls.discard(call)
                self._remove_if_idle(endpoint)
                self._changed.notify()

    def _exchange(self, endpoint: Endpoint, request: Request, timeout_s: float) -> Reply:
        """One request and its reply.  Where a server does not know a field, it is asked without it from then on."""
        manner = endpoint.manner
        while True:
            path, body = endpoint.wire.body(self.model, request, manner)
            try:
                reply = endpoint.wire.reply(
                    post(self._session(), endpoint.url + path, body, timeout_s), request, manner
                )
            except (SampleError, EndpointError) as error:
                asked_before = endpoint.manner_is_known or bool(request.prompt)
                plainer = None if asked_before else without_refused(manner, error)
                if plainer is None:
                    raise
                manner = plainer
                continue
            if not request.prompt:
                self._learn(endpoint, manner)
            return replace(reply, system=manner.system(request) or manner.own_system)

    def _learn(self, endpoint: Endpoint, manner: Manner) -> None:
        """Ask this server in this manner from now on, because it has answered."""
        with self._changed:
            refused = [*(name for name in endpoint.manner.fields if name not in manner.fields)]
            if endpoint.manner_is_known:
                return
            endpoint.manner, endpoint.manner_is_known = manner, True
        if refused:
            logger.info(
                f"{endpoint.name}: refuses {' and '.join(refused)}; it is asked without, and the model may reason"
            )

    # ---- failures

    def _any_alive(self) -> bool:
        """Whether any server shows a sign of life.  Then it is this request that they cannot answer."""
        return any(answers(self._session(), endpoint.url, PROBE_S) for endpoint in self._endpoints)

    def _session(self) -> Session:
        if not hasattr(self._sessions, "value"):
            self._sessions.value = Session()
        session: Session = self._sessions.value
        return session
