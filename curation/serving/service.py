"""What one model server did in a run, in words for the log."""

from __future__ import annotations

import math
import re
from collections import Counter

_STEP = 1.05  # latencies are counted in steps of five per cent
_SHORTEST_S = 1e-4
_HTTP_STATUS = re.compile(r"([45]\d\d): ")


class Service:
    """Counts the requests to one server.  Not thread-safe; times are monotonic seconds.  Its size does not grow."""

    def __init__(self) -> None:
        self.requests = 0
        self.busy = 0  # refusals of a server that has too many requests
        self.failures: Counter[str] = Counter()
        self.most_at_once = 0
        self._seconds = 0.0  # with at least one request in flight
        self._since = 0.0
        self._latencies: Counter[int] = Counter()

    def began(self, in_flight: int, now: float) -> None:
        """A request was sent.  in_flight: the server's requests, this one included."""
        self.requests += 1
        self.most_at_once = max(self.most_at_once, in_flight)
        if in_flight == 1:
            self._since = now

    def ended(self, in_flight: int, now: float) -> None:
        """A request has ended.  in_flight: the server's requests that are left."""
        if in_flight == 0:
            self._seconds += now - self._since

    def answered(self, latency_s: float) -> None:
        self._latencies[math.ceil(math.log(max(latency_s, _SHORTEST_S), _STEP))] += 1

    def failed(self, text: str, *, timed_out: bool = False) -> None:
        """Count a failure.  text: what the server or the connection said; an HTTP status stands at its begin."""
        if timed_out:
            kind = "timeout"
        elif status := _HTTP_STATUS.match(text):
            kind = f"HTTP {status[1]}"
        else:
            kind = "broken connection" if "connection" in text else "unusable reply"
        self.failures[kind] += 1

    def slower_than(self, share: float) -> float:
        """The seconds within which this share of the answers came."""
        left = share * self._latencies.total()
        for step in sorted(self._latencies):
            left -= self._latencies[step]
            if left <= 1e-9:
                return float(_STEP ** (step - 0.5))
        return 0.0

    def in_words(self) -> str:
        """``1,234 requests, 3 failed (2 timeouts, 1 HTTP 500), 12.3 requests/s, typically 0.8 s each (…)``"""
        parts = [_count(self.requests, "request")]
        if failed := self.failures.total():
            kinds = ", ".join(
                f"{n:,} {kind}" if kind.startswith("HTTP") else _count(n, kind)
                for kind, n in self.failures.most_common()
            )
            parts.append(f"{failed:,} failed ({kinds})")
        if self.busy:
            parts.append(f"{self.busy:,} sent again because it was busy")
        if answers := self._latencies.total():
            parts.append(f"{answers / max(self._seconds, 1e-3):,.1f} requests/s")
            parts.append(f"up to {self.most_at_once:,} at once")
            parts.append(
                f"typically {_seconds(self.slower_than(0.5))} each "
                f"(slowest 1 in 20: {_seconds(self.slower_than(0.95))} or more)"
            )
        return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    plural = noun.removesuffix("y") + "ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s" if seconds >= 0.095 else f"{seconds:.2g} s"
