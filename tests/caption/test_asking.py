"""Requests about single images: as many in flight as there are places, over all shards, and bounded in bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from curation.caption.asking import Asking, Places
from curation.errors import InfrastructureError, Stopped


class Work:
    """A shard's work that a stop may be requested of."""

    def __init__(self) -> None:
        self.stopped = self.urgent = False

    def check_stop(self, *, urgent_only: bool = False) -> None:
        if self.urgent or (self.stopped and not urgent_only):
            raise Stopped("asked to")


class Server:
    """Answers when it is told to, and counts."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.open = threading.Event()

    def __call__(self, item: int) -> int:
        self.asked.append(item)
        assert self.open.wait(30)
        return -item


def run(asking: Asking[int, int], items: Iterator[tuple[int, int]], work: Any, patience_s: float = 30.0) -> list[int]:
    return [answer for came in asking.answers(items, work, patience_s) for _, answer in came]


def test_all_places_are_used_by_shards_together_and_each_item_is_asked_once() -> None:
    places, server = Places(4), Server()
    read: list[int] = []

    def items(first: int) -> Iterator[tuple[int, int]]:
        for number in range(first, first + 20):
            read.append(number)
            yield number, 10

    answers: dict[int, list[int]] = {}

    def shard(first: int) -> None:
        answers[first] = run(Asking(places, server), items(first), Work())

    threads = [threading.Thread(target=shard, args=(first,)) for first in (0, 100)]
    for thread in threads:
        thread.start()
    deadline = threading.Event()
    for _ in range(500):
        if len(server.asked) == 4 and len(read) >= 7:
            break
        deadline.wait(0.01)
    assert len(server.asked) == 4 and len(read) <= 4 + 1 + 2, (
        "the places, one that waits, and one that each shard holds"
    )
    server.open.set()
    for thread in threads:
        thread.join(30)
    assert {first: sorted(came) for first, came in answers.items()} == {
        first: sorted(-number for number in range(first, first + 20)) for first in (0, 100)
    }
    assert len(server.asked) == 40
    places.close()


def test_bytes_are_bounded_and_one_item_is_always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.caption.asking.MAX_BYTES_ASKED", 100)
    places, lock, held, most = Places(8), threading.Lock(), [0], [0]

    def items() -> Iterator[tuple[int, int]]:
        for size in [40] * 10 + [1000, 40]:
            with lock:
                held[0] += 1
                most[0] = max(most[0], held[0])
            yield size, size

    def ask(item: int) -> int:
        with lock:
            held[0] -= 1
        return item

    assert len(run(Asking(places, ask), items(), Work())) == 12
    assert most[0] <= 4
    places.close()


def test_what_a_request_raises_is_raised_after_the_answers_that_came() -> None:
    def ask(item: int) -> int:
        if item == 5:
            raise InfrastructureError("no server")
        return item

    places, came = Places(1), []
    with pytest.raises(InfrastructureError, match="no server"):
        for answers in Asking(places, ask).answers(((number, 1) for number in range(9)), Work(), 1.0):  # type: ignore[arg-type]
            came += [answer for _, answer in answers]
    assert came[:5] == [0, 1, 2, 3, 4]
    places.close()


def test_a_stop_waits_for_what_is_asked_and_begins_nothing() -> None:
    places, server, work = Places(2), Server(), Work()
    came: list[int] = []

    def items() -> Iterator[tuple[int, int]]:
        for number in range(100):
            if number == 3:
                work.stopped = True
                threading.Timer(0.2, server.open.set).start()
            yield number, 1

    with pytest.raises(Stopped):
        for answers in Asking(places, server).answers(items(), work, 30.0):  # type: ignore[arg-type]
            came += [answer for _, answer in answers]
    assert sorted(-answer for answer in came) == sorted(server.asked)
    assert len(server.asked) < 10
    places.close()
