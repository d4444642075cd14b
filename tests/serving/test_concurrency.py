"""The limit of requests in flight finds what a server sustains, in simulated time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest

from curation.serving.pool import FORGET_S, Concurrency


def simulate(
    serve: Callable[[float, int], float | None],
    seconds: float,
    threads: int = 64,
    timeout_s: float = 10.0,
) -> tuple[Concurrency, int, int]:
    """A client with ``threads`` requests to send at any time, against ``serve(now, in_flight)``: when the answer comes,
    or None for a refusal.  Gives the limit, and how many were answered and refused."""
    concurrency = Concurrency(timeout_s)
    out: list[tuple[float, int, float, list[bool]]] = []  # answered at, in flight when sent, sent at, full
    now, answered, refused = 0.0, 0, 0
    while now < seconds:
        while len(out) < min(threads, concurrency.limit):
            at = serve(now, len(out) + 1)
            if at is None:
                refused += 1
                concurrency.refused(len(out), now)
                break
            heapq.heappush(out, (at, len(out) + 1, now, [False]))
        if len(out) >= concurrency.limit:
            for *_, full in out:
                full[0] = True
        if not out:
            now += 0.01
            continue
        now, in_flight, sent, full = heapq.heappop(out)
        answered += 1
        concurrency.answered(in_flight, now - sent, now, full=full[0])
    return concurrency, answered, refused


def slots(count: int, service: Callable[[], float]) -> Callable[[float, int], float]:
    """A server that works on ``count`` requests at once and lets the others wait."""
    free = [0.0] * count

    def serve(now: float, in_flight: int) -> float:
        at = max(now, heapq.heappop(free)) + service()
        heapq.heappush(free, at)
        return at

    return serve


def test_it_starts_at_one() -> None:
    assert Concurrency(10.0).limit == 1


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_all_slots_are_filled_and_few_requests_wait(count: int) -> None:
    concurrency, answered, _ = simulate(slots(count, lambda: 0.05), 20.0)
    assert answered >= 0.97 * 20 / 0.05 * count
    assert count < concurrency.limit <= 2 * count + 1


@pytest.mark.parametrize("count", [1, 4, 16])
def test_replies_of_uneven_length(count: int) -> None:
    rng = random.Random(1)
    _, answered, _ = simulate(slots(count, lambda: rng.lognormvariate(-0.1, 0.5)), 300.0, timeout_s=30.0)
    mean = 1.025  # of that distribution, in seconds
    assert answered >= 0.85 * 300 / mean * count


def test_it_doubles_each_round_trip() -> None:
    concurrency, _, _ = simulate(lambda now, in_flight: now + 0.1, 0.45)
    assert concurrency.limit >= 16


def test_a_server_that_batches_gets_many() -> None:
    """Each further request costs a hundredth of the time of one, as on a GPU that decodes a batch."""
    concurrency, _, _ = simulate(lambda now, in_flight: now + 0.1 * (1 + in_flight / 100), 10.0)
    assert concurrency.limit >= 40


@pytest.mark.parametrize("count", [1, 4, 7])
def test_refusals_say_how_many(count: int) -> None:
    def serve(now: float, in_flight: int) -> float | None:
        return now + 0.05 if in_flight <= count else None

    concurrency, answered, refused = simulate(serve, 20.0)
    assert concurrency.limit == count or concurrency.limit == count + 1
    assert answered >= 0.97 * 20 / 0.05 * count
    assert refused < 25, "what was refused is not tried again at once"


def test_time_outs_halve_once_for_a_jam() -> None:
    concurrency, _, _ = simulate(lambda now, in_flight: now + 0.1, 0.45)
    before = concurrency.limit
    for _ in range(before):
        concurrency.timed_out(0.5)
    assert concurrency.limit == before // 2
    concurrency.timed_out(100.0)
    assert concurrency.limit == before // 4


def test_it_stops_growing_long_before_the_time_out() -> None:
    concurrency, _, _ = simulate(slots(1, lambda: 1.0), 60.0, timeout_s=10.0)
    assert concurrency.limit <= 6


@pytest.mark.parametrize(("before", "after"), [(2, 8), (8, 2)])
def test_a_server_that_changes_is_measured_anew(before: int, after: int) -> None:
    old, new = slots(before, lambda: 0.05), slots(after, lambda: 0.05)
    concurrency, _, _ = simulate(lambda now, in_flight: (old if now < 5 else new)(now, in_flight), 5 + 3 * FORGET_S)
    assert after < concurrency.limit <= 2 * after + 1


def test_a_server_whose_slots_are_known_is_full_from_the_start_until_it_refuses() -> None:
    known = Concurrency(10.0, slots=32)
    assert known.limit == 34, "and two more that wait there"
    for number in range(500):
        known.answered(34 - number % 34, 1.0, number / 10, full=True)
    assert known.limit == 34
    known.refused(20, 60.0)
    assert known.limit == 20
    for number in range(200):
        known.answered(20, 1.0, 70.0 + number, full=True)
    assert known.limit > 20, "it is measured from then on"
