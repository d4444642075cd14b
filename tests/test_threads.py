"""Work ahead keeps its order and its bounds; checkpoints save batches, and save before they let a stage stop."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from curation.errors import Stopped
from curation.run.checkpoints import Checkpoints, PartialLog
from curation.threads import prefetch


@pytest.mark.parametrize("every", [1, 3, 20])
def test_the_order_is_kept_and_no_more_than_the_bound_is_ahead(every: int) -> None:
    """every: one item in so many needs work; the others do not narrow the window."""
    working, most = 0, 0

    def begin(item: int) -> Future[int] | None:
        nonlocal working, most
        if item % every:
            return None
        working += 1
        most = max(most, working)
        return pool.submit(lambda: time.sleep(random.random() / 500) or item * item)

    with ThreadPoolExecutor(4) as pool:
        results = []
        for item, future in prefetch(range(300), begin, lambda item: 1, ahead=8, max_bytes=10**9):
            working -= future is not None
            results.append((item, item * item if future is None else future.result()))
    assert results == [(i, i * i) for i in range(300)]
    assert most == 8 + 1


def test_bytes_are_bounded_too() -> None:
    held = most = 0

    def begin(item: int) -> Future[int]:
        nonlocal held, most
        held += item
        most = max(most, held)
        return pool.submit(lambda: item)

    with ThreadPoolExecutor(2) as pool:
        for item, _ in prefetch([40] * 50, begin, lambda item: item, ahead=10**6, max_bytes=100):
            held -= item
    assert most <= 100 + 40


def test_when_an_item_is_handed_on_does_not_depend_on_speed() -> None:
    """What is recorded between two items (rejects, say) stands in the same place on every run."""

    def trace(delay_s: float) -> list[str]:
        events: list[str] = []

        def source() -> Iterator[int]:
            for i in range(20):
                events.append(f"read {i}")
                yield i

        with ThreadPoolExecutor(3) as pool:

            def begin(i: int) -> Future[None]:
                return pool.submit(time.sleep, delay_s * (i % 4))

            for i, _ in prefetch(source(), begin, lambda i: 1, ahead=5, max_bytes=100):
                events.append(f"out {i}")
        return events

    assert trace(0) == trace(0.002)


def test_what_has_not_begun_is_cancelled_when_the_caller_stops() -> None:
    gate, ran = threading.Event(), []

    def wait(item: int) -> None:
        gate.wait(10)
        ran.append(item)

    with ThreadPoolExecutor(1) as pool:
        ordered = prefetch(range(100), lambda i: pool.submit(wait, i), lambda i: 1, ahead=10, max_bytes=10**6)
        next(ordered)
        ordered.close()  # type: ignore[attr-defined]
        gate.set()
    assert ran == [0]


class Stop:
    """A stage's way to be asked to end."""

    def __init__(self) -> None:
        self.draining = self.urgent = False

    def __call__(self, *, urgent_only: bool = False) -> None:
        if self.urgent or (self.draining and not urgent_only):
            raise Stopped("test")


def checkpoints(folder: Path, stop: Stop, token: str) -> Checkpoints:
    return Checkpoints(lambda: PartialLog(folder, "00000000", "mark", token), stop, every=3)


def test_batches_are_saved_and_found_again(tmp_path: Path) -> None:
    first = checkpoints(tmp_path, Stop(), "one")
    for i in range(7):
        assert first.find(f"k{i}", "digest") is None
        first.add(f"k{i}", "digest", b"%d" % i)
    second = checkpoints(tmp_path, Stop(), "two")  # the first was killed: its last, unfinished batch is lost
    assert [second.find(f"k{i}", "digest") for i in range(7)] == [b"0", b"1", b"2", b"3", b"4", b"5", None]
    assert second.find("k1", "another input") is None


def test_draining_stops_at_the_end_of_a_batch(tmp_path: Path) -> None:
    stop = Stop()
    mine = checkpoints(tmp_path, stop, "one")
    stop.draining = True
    mine.add("a", "d", b"1")
    mine.check_urgent()
    mine.add("b", "d", b"2")
    with pytest.raises(Stopped):
        mine.add("c", "d", b"3")
    assert checkpoints(tmp_path, Stop(), "two").find("c", "d") == b"3"


def test_an_urgent_stop_saves_what_there_is(tmp_path: Path) -> None:
    stop = Stop()
    mine = checkpoints(tmp_path, stop, "one")
    mine.add("a", "d", b"1")
    mine.check_urgent()
    stop.urgent = True
    with pytest.raises(Stopped):
        mine.check_urgent()
    assert checkpoints(tmp_path, Stop(), "two").find("a", "d") == b"1"


def test_a_shard_that_asks_for_nothing_touches_no_file(tmp_path: Path) -> None:
    mine = checkpoints(tmp_path / "partial", Stop(), "one")
    mine.check_urgent()
    mine.save()
    assert not (tmp_path / "partial").exists()
