"""How many requests a model server sustains at once, learnt from how it answers.

A server with four slots that is sent eight requests answers no more of them a second, only later; one that batches
(vLLM, llama.cpp) answers more; one with a short queue refuses.  Nobody is asked to know which is which.
"""

from __future__ import annotations

import math

MIN_ANSWERS = 8  # in a class, before it is judged: replies differ in length
WORTH = 0.25  # of what more requests could bring, so much they must bring
KNEE = 0.8  # of the best throughput: fewer requests that reach it are enough
FORGET_S = 30.0  # servers change: measure anew so often, and after so many round trips at the least
FORGET_ROUND_TRIPS = 50
LONGEST_HOLD_S = 60.0


class _Load:
    """The answers to requests sent as the 2ⁿth to 2ⁿ⁺¹-1th at once: means of requests in flight and of latency."""

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
        """Answers a second, by Little's law."""
        return self.in_flight / max(self.latency_s, 1e-6)


class Concurrency:
    """The limit of one server's requests in flight.  Not thread-safe; times are monotonic seconds.

    It starts at one and grows by one with each answer that comes while the limit is reached, so it doubles with each
    round trip, until that no longer pays: twice the requests in flight must bring at least an eighth more answers a
    second and a quarter of what they could.  Then it goes back to the fewest that reach nearly the best throughput,
    and one more that waits at the server, so that no slot idles while an answer travels.

    A refusal (503) says exactly how many are too many.  A time-out halves.  Neither is tried again at once.
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
        """An answer came after ``latency_s`` to a request that made the requests out ``in_flight``.

        full: whether the limit was reached while it was out.
        """
        if now - latency_s < self._measured_since:
            return  # it was sent under another limit, and waited behind more
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
        if now >= self._held_until or self._settled:  # once, not for each request of the same jam
            self._back_to(max(1, self.limit // 2), now)

    def _back_to(self, limit: int, now: float) -> None:
        if now >= self._held_until:  # not one more of the same burst
            again = self._held_until > 0 and limit >= self.limit - 1  # this try went no further than the last
            self._hold_s = min(LONGEST_HOLD_S, self._hold_s * 2) if again else 1.0
            self._held_until = now + self._hold_s
        self.limit = limit
        self._settled = False
        self._loads.clear()

    def _pays(self, degree: int) -> bool:
        """Whether it is worth to have so many requests out, and not about half.  Yes until there is evidence."""
        more, less = self._loads[degree], self._loads.get(degree - 1)
        if more.answers < MIN_ANSWERS or less is None:
            return True
        return more.throughput / less.throughput - 1 >= WORTH * (more.in_flight / less.in_flight - 1)

    def _knee(self, degree: int) -> int:
        """The fewest requests in flight that were seen to reach nearly the throughput of the most."""
        enough = KNEE * self._loads[degree].throughput
        return math.ceil(min(load.in_flight for load in self._loads.values() if load.throughput >= enough))

    def _measure_anew(self, now: float) -> None:
        """From half the limit on, so that it can be seen whether the other half pays."""
        self.limit = max(1, self.limit // 2)
        self._settled, self._measured_since = False, now
        self._loads.clear()
