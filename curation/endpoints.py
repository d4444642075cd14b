"""A pool of HTTP model servers: who gets the next request, how many each gets at once, what happens when one fails.

Every request goes to the server with the fewest outstanding ones, below a limit that starts at one and grows with what
the server sustains.  A server that breaks is left alone and tried again with one request now and then; its requests go
to the others.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import requests

from curation.errors import InfrastructureError, SampleError
from curation.options import logger
from curation.wire import WIRES, Api, EndpointError, ModelMissing, Reply, Request, Wire, detect_api, new_session, post

FAILURES_TO_OPEN = 3  # in a row: one broken connection is no broken server
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
ATTEMPTS = 4  # of one request that fails on servers that answer others


def endpoint_urls(ports: str, host: str = "localhost", endpoints: str | None = None) -> list[str]:
    """The servers' URLs: ``endpoints`` (comma-separated, whole URLs) or one on each of ``ports`` of ``host``.

    Raises InfrastructureError for what is neither.
    """
    if endpoints:
        urls = [url.strip().rstrip("/") for url in endpoints.split(",") if url.strip()]
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise InfrastructureError(f"--endpoints: {url!r} is not a URL; write http://host:port")
        urls = [url.removesuffix("/v1") for url in urls]
    else:
        numbers = [port.strip() for port in ports.split(",") if port.strip()]
        for port in numbers:
            if not port.isdigit() or not 0 < int(port) < 65536:
                raise InfrastructureError(f"--ports: {port!r} is not a port; write 11434,11435")
        urls = [f"http://{host}:{port}" for port in numbers]
    if not urls:
        raise InfrastructureError("no endpoint is named: give --ports or --endpoints")
    return list(dict.fromkeys(urls))


@dataclass
class Endpoint:
    """One server, as the pool sees it.  Only the pool, under its lock, changes these."""

    url: str
    wire: Wire
    limit: float = 1.0
    in_flight: int = 0
    latency_s: float = 0.0  # of the last successes, smoothed
    slow_start: bool = True
    failures: int = 0  # in a row
    pause_s: float = FIRST_PAUSE_S
    closed_until: float = 0.0  # monotonic; 0: healthy
    shrunk_at: float = 0.0
    served: int = 0
    counts: dict[str, int] = field(default_factory=dict)


class EndpointPool:
    """Servers that all offer the same model.  Thread-safe: ``ask`` is called from as many threads as there are to be
    requests in flight.

    timeout_s: for an answer.  load_timeout_s: for a cold model to load, before the first request.
    patience_s: how long ``ask`` waits while no server at all answers before it ends the run.
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
    ) -> None:
        self.model = model
        self._urls = list(urls)
        self._api = api
        self._timeout_s = timeout_s
        self._load_timeout_s = load_timeout_s
        self._patience_s = patience_s
        self._endpoints: list[Endpoint] = []
        self._changed = threading.Condition()
        self._sessions = threading.local()
        self._last_success = time.monotonic()

    def open(self) -> None:
        """Find out which servers answer and have the model ready on each.

        Raises InfrastructureError when none answers, or when one of them does not have the model.
        """
        with ThreadPoolExecutor(max(1, len(self._urls))) as pool:
            found = list(pool.map(self._open_one, self._urls))
        self._endpoints = [endpoint for endpoint, _ in found if endpoint is not None]
        for url, (endpoint, why) in zip(self._urls, found, strict=True):
            if endpoint is None:
                logger.warning(f"{url} does not answer ({why}); going on without it")
        if not self._endpoints:
            reasons = "; ".join(f"{url}: {why}" for url, (_, why) in zip(self._urls, found, strict=True))
            raise InfrastructureError(
                f"no endpoint answers ({reasons}). Start the servers, name others with --ports or --endpoints, or use "
                "--embedded for the small stand-in model"
            )
        self._last_success = time.monotonic()

    def ask(self, request: Request, check_stop: Callable[[], None] | None = None) -> Reply:
        """Have the request answered by whichever server is free, again and elsewhere where it fails.

        check_stop: called before each attempt and while waiting; what it raises comes out of here.
        Raises SampleError (``llm_bad_request``, ``llm_timeout``, ``llm_error``) when this request fails on servers that
        answer others, and InfrastructureError when no server has answered anything for ``patience_s``.
        """
        failures = 0
        tried: Endpoint | None = None
        while True:
            endpoint = self._acquire(tried, check_stop)
            began = time.monotonic()
            try:
                reply = self._send(endpoint, request)
            except EndpointError as error:
                self._failed(endpoint, error)
                tried = endpoint
                failures += not error.busy
                if failures >= ATTEMPTS and self._others_are_served(began):
                    reason = "llm_timeout" if error.timed_out else "llm_error"
                    raise SampleError(reason, f"{failures} attempts, the last at {endpoint.url}: {error}") from None
            except SampleError:
                self._succeeded(endpoint, None)  # it answered: the request is at fault
                raise
            except ModelMissing as error:
                raise InfrastructureError(f"{endpoint.url} has no model {self.model!r} any more ({error})") from None
            else:
                self._succeeded(endpoint, time.monotonic() - began)
                return reply
            finally:
                self._release(endpoint)

    def facts(self) -> dict[str, dict[str, object]]:
        """What each server did, for the log: served requests, failures by kind, its limit, its latency in seconds."""
        with self._changed:
            return {
                e.url: {
                    "served": e.served,
                    **e.counts,
                    "limit": round(e.limit, 1),
                    "latency_s": round(e.latency_s, 3),
                }
                for e in self._endpoints
            }

    # ---- opening

    def _open_one(self, url: str) -> tuple[Endpoint | None, str]:
        session = new_session()
        try:
            api: Api = detect_api(session, url, min(self._timeout_s, 10.0)) if self._api == "auto" else self._api
            wire = WIRES[api]
            wire.load(session, url, self.model, self._load_timeout_s)
        except (EndpointError, ModelMissing, SampleError) as error:
            return None, str(error)
        finally:
            session.close()
        return Endpoint(url, wire), ""

    # ---- routing, under the lock

    def _acquire(self, avoid: Endpoint | None, check_stop: Callable[[], None] | None) -> Endpoint:
        with self._changed:
            while True:
                if check_stop is not None:
                    check_stop()
                now = time.monotonic()
                free = [e for e in self._endpoints if e.closed_until <= now and e.in_flight < self._room(e)]
                if len(free) > 1 and avoid in free:
                    free.remove(avoid)
                if free:
                    chosen = min(free, key=lambda e: (e.in_flight, e.latency_s, random.random()))
                    chosen.in_flight += 1
                    return chosen
                if all(e.closed_until for e in self._endpoints) and now - self._last_success > self._patience_s:
                    raise InfrastructureError(
                        f"no endpoint has answered for {self._patience_s:g} s "
                        f"({', '.join(e.url for e in self._endpoints)}). Replies so far are kept: start again when "
                        "the servers are back"
                    )
                opens = [e.closed_until - now for e in self._endpoints if e.closed_until > now]
                self._changed.wait(min([0.5, *opens]))

    @staticmethod
    def _room(endpoint: Endpoint) -> int:
        """How many requests it may have at once: one on trial after a failure."""
        return 1 if endpoint.closed_until else int(endpoint.limit)

    def _release(self, endpoint: Endpoint) -> None:
        with self._changed:
            endpoint.in_flight -= 1
            self._changed.notify()

    def _succeeded(self, endpoint: Endpoint, latency_s: float | None) -> None:
        with self._changed:
            self._last_success = time.monotonic()
            endpoint.served += 1
            endpoint.failures = 0
            if endpoint.closed_until:
                logger.info(f"{endpoint.url} answers again")
                endpoint.closed_until, endpoint.pause_s = 0.0, FIRST_PAUSE_S
            if latency_s is None:
                return
            endpoint.latency_s = 0.8 * endpoint.latency_s + 0.2 * latency_s if endpoint.latency_s else latency_s
            # Growing costs nothing but waiting in the server's own queue, until that wait nears the time-out.
            if endpoint.in_flight >= int(endpoint.limit) and latency_s < self._timeout_s / 2:
                endpoint.limit += 1.0 if endpoint.slow_start else 1.0 / endpoint.limit
                self._changed.notify()

    def _failed(self, endpoint: Endpoint, error: EndpointError) -> None:
        with self._changed:
            now = time.monotonic()
            kind = "busy" if error.busy else "timeouts" if error.timed_out else "errors"
            endpoint.counts[kind] = endpoint.counts.get(kind, 0) + 1
            if error.busy or error.timed_out:
                if now - endpoint.shrunk_at > max(endpoint.latency_s, 0.05):  # once per round trip, not per request
                    endpoint.limit, endpoint.shrunk_at = max(1.0, endpoint.limit / 2), now
                endpoint.slow_start = False
            if error.busy and not error.retry_after_s and endpoint.in_flight > 1:
                return  # it serves the others
            endpoint.failures += 1
            trial_failed = endpoint.closed_until > 0
            if trial_failed or endpoint.failures >= FAILURES_TO_OPEN or error.retry_after_s:
                pause = error.retry_after_s or endpoint.pause_s * random.uniform(0.8, 1.2)
                endpoint.pause_s = min(LONGEST_PAUSE_S, endpoint.pause_s * 2)
                endpoint.closed_until = now + pause
                if not trial_failed:
                    logger.warning(f"{endpoint.url}: {error}; leaving it alone for {pause:.1f} s")

    def _others_are_served(self, since: float) -> bool:
        return self._last_success >= since - self._timeout_s

    # ---- one request

    def _send(self, endpoint: Endpoint, request: Request) -> Reply:
        path, body = endpoint.wire.body(self.model, request)
        return endpoint.wire.reply(post(self._session(), endpoint.url + path, body, self._timeout_s))

    def _session(self) -> requests.Session:
        if not hasattr(self._sessions, "value"):
            self._sessions.value = new_session()
        session: requests.Session = self._sessions.value
        return session
