"""Who holds a shard: real processes where it is about dying, a hand-set clock where it is about waiting."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from curation.errors import InfrastructureError
from curation.run import claims as module
from curation.run.claims import CheckedBuckets, Claim, Claims, Heartbeat
from tests.processes import wait_until

LEASE_S = 60.0
BUCKET = "0"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic, time=time.time))
    return clock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "_claims" / "stage"


class Host:
    """A process on another node, as far as claims can tell; its heartbeat beats when it is told to."""

    numbers = itertools.count()

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.claims = Claims(folder, LEASE_S, stall_s=1800)
        self._identity = (f"node{next(self.numbers)}", "boot", "pid:[1]")
        self._patch = monkeypatch
        self.claims.heartbeat._beat()

    def acquire(self, shard: str = "1") -> Claim | None:
        with self._patch.context() as patch:
            patch.setattr(module, "host_identity", lambda: self._identity)
            return self.claims.acquire(BUCKET, shard)

    def beat(self) -> None:
        self.claims.heartbeat._beat()


@pytest.fixture
def host(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Host]:
    return lambda: Host(folder, monkeypatch)


def record(claim: Claim) -> dict[str, Any]:
    return dict(json.loads(claim.path.read_bytes()))


# ---- on other nodes: nothing counts but the observer's own clock


def test_one_holds_it_until_it_is_given_back(host: Callable[[], Host]) -> None:
    a, b = host(), host()
    mine = a.acquire()
    assert mine is not None
    assert mine.predecessors == []
    assert b.acquire() is None
    assert a.acquire() is None, "not twice by the same process either"
    assert a.claims.holds(mine)
    a.claims.release(mine)
    assert not mine.path.exists()
    theirs = b.acquire()
    assert theirs is not None
    assert theirs.token != mine.token
    assert theirs.predecessors == [], "who gave it back has cleared up behind himself"
    assert not a.claims.holds(mine)
    a.claims.release(mine)
    assert b.claims.holds(theirs), "a claim that others hold is not given back"


def test_a_silent_holder_loses_it_after_a_lease_of_the_observers_clock(host: Callable[[], Host], clock: Clock) -> None:
    a, b = host(), host()
    mine = a.acquire()
    assert mine is not None
    clock.now += 10 * LEASE_S  # however long ago it was made: b has only begun to look
    assert b.acquire() is None
    clock.now += LEASE_S - 1
    assert b.acquire() is None
    clock.now += 1
    theirs = b.acquire()
    assert theirs is not None
    assert theirs.predecessors == [mine.token]
    assert theirs.confirmed_dead is None, "presumed dead, not known to be"
    assert not a.claims.holds(mine)


def test_a_holder_that_beats_is_never_robbed(host: Callable[[], Host], clock: Clock) -> None:
    a, b = host(), host()
    mine = a.acquire()
    assert mine is not None
    for _ in range(20):
        assert b.acquire() is None
        clock.now += LEASE_S * 0.9
        a.beat()
    assert b.acquire() is None
    assert a.claims.holds(mine)


def test_file_times_count_for_nothing(host: Callable[[], Host], clock: Clock, folder: Path) -> None:
    a, b = host(), host()
    mine = a.acquire()
    assert mine is not None
    for path in [mine.path, *(folder / "_beats").iterdir()]:
        os.utime(path, (0, 0))
    assert b.acquire() is None
    clock.now += LEASE_S * 0.9
    a.beat()
    for path in [mine.path, *(folder / "_beats").iterdir()]:
        os.utime(path, (0, 0))
    clock.now += LEASE_S * 0.9
    assert b.acquire() is None


def test_all_claims_of_a_dead_process_expire_together(host: Callable[[], Host], clock: Clock) -> None:
    a, b = host(), host()
    assert all(a.acquire(str(n)) for n in range(5))
    assert b.acquire("0") is None
    clock.now += LEASE_S
    assert all(b.acquire(str(n)) for n in range(5)), "each would cost a lease of waiting otherwise"


def test_a_holder_whose_heartbeat_file_went_away_is_no_sooner_dead(
    host: Callable[[], Host], clock: Clock, folder: Path
) -> None:
    a, b = host(), host()
    assert a.acquire()
    assert b.acquire() is None
    clock.now += LEASE_S / 2
    (folder / "_beats" / a.claims.heartbeat.name).unlink()
    assert b.acquire() is None
    a.beat()
    clock.now += LEASE_S / 2
    assert b.acquire() is None, "it beat again"
    clock.now += LEASE_S
    assert b.acquire() is not None


def test_a_claim_without_a_word_expires_like_a_dead_one(host: Callable[[], Host], clock: Clock, folder: Path) -> None:
    """Its holder was killed between creating the file and writing into it."""
    path = folder / BUCKET / "1.claim"
    path.parent.mkdir(parents=True)
    path.touch()
    b = host()
    assert b.acquire() is None
    clock.now += LEASE_S
    theirs = b.acquire()
    assert theirs is not None
    assert theirs.predecessors == []


def test_an_empty_claim_is_not_taken_for_an_earlier_empty_one(
    host: Callable[[], Host], clock: Clock, folder: Path
) -> None:
    a, b = host(), host()
    path = folder / BUCKET / "1.claim"
    path.parent.mkdir(parents=True)
    path.touch()
    assert b.acquire() is None
    path.unlink()
    assert a.acquire()
    assert b.acquire() is None
    clock.now += LEASE_S * 2
    path.write_bytes(b"")  # a third is just about to write its own
    assert b.acquire() is None


def test_takers_pass_on_the_tokens_of_those_before(host: Callable[[], Host], clock: Clock) -> None:
    tokens = []
    for number in range(20):
        taker = host()
        claim = taker.acquire()
        if claim is None:
            clock.now += LEASE_S
            claim = taker.acquire()
        assert claim is not None
        assert claim.predecessors == tokens[-16:]
        assert record(claim)["predecessors"] == claim.predecessors
        tokens.append(claim.token)
        assert number < 17 or len(claim.predecessors) == 16, "bounded"


def test_a_live_claim_made_meanwhile_is_put_back(
    host: Callable[[], Host], clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a taker's look and its rename, another taker took the shard: its claim must stand."""
    a, b, c = host(), host(), host()
    assert a.acquire()
    assert b.acquire() is None
    assert c.acquire() is None
    clock.now += LEASE_S
    theirs: list[Claim | None] = []
    rename = os.rename

    def slow(source: Path, target: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", rename)
            if not theirs:
                theirs.append(c.acquire())
        rename(source, target)

    monkeypatch.setattr(os, "rename", slow)
    assert b.acquire() is None
    assert theirs[0] is not None
    c.beat()
    assert c.claims.holds(theirs[0])
    assert [p.name for p in (folder / BUCKET).iterdir()] == ["1.claim"]


def test_what_a_dead_process_leaves_is_cleared_away(host: Callable[[], Host], clock: Clock, folder: Path) -> None:
    a, b = host(), host()
    assert a.acquire()
    assert b.acquire() is None
    clock.now += LEASE_S
    claim = b.acquire()
    assert claim is not None
    assert [p.name for p in (folder / BUCKET).iterdir()] == ["1.claim"]
    assert [p.name for p in (folder / "_beats").iterdir()] == [b.claims.heartbeat.name]


def test_left_behind_is_one_listing(host: Callable[[], Host], folder: Path) -> None:
    a, b = host(), host()
    assert not b.claims.left_behind(BUCKET, "1")
    assert a.acquire()
    assert not b.claims.left_behind(BUCKET, "1"), "as it was when b first looked"
    assert host().claims.left_behind(BUCKET, "1")


# ---- one's own lease


def test_who_has_not_beaten_for_a_lease_gives_up_before_the_commit(host: Callable[[], Host], clock: Clock) -> None:
    a = host()
    mine = a.acquire()
    assert mine is not None
    clock.now += LEASE_S - 1
    assert a.claims.holds(mine)
    clock.now += 2
    assert not a.claims.holds(mine)
    a.beat()
    assert a.claims.holds(mine), "nobody took it"


def test_the_own_lease_ends_before_the_observers(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a beat is that before it is written, however long the write takes."""
    beat = Heartbeat(folder / "_beats", LEASE_S, 1800)
    write = os.write

    def slow(descriptor: int, data: bytes) -> int:
        clock.now += LEASE_S
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", slow)
    beat._beat()
    assert not beat.fresh


def test_a_stalled_process_stops_beating_and_begins_again(folder: Path) -> None:
    claims = Claims(folder, lease_s=0.4, stall_s=0.4)
    claims.heartbeat.start()
    path = folder / "_beats" / claims.heartbeat.name
    try:
        time.sleep(1)
        wait_until(lambda: claims.heartbeat.fresh), "without a claim there is nothing to stall on"
        mine = claims.acquire(BUCKET, "1")
        assert mine is not None
        wait_until(lambda: not claims.heartbeat.fresh)
        before = path.read_bytes()
        time.sleep(0.3)
        assert path.read_bytes() == before
        assert not claims.holds(mine)
        claims.heartbeat.progress()
        wait_until(lambda: path.read_bytes() != before)
        wait_until(lambda: claims.holds(mine))
        claims.release(mine)
        wait_until(lambda: time.monotonic() - claims.heartbeat._last_progress > 0.5)
        wait_until(lambda: claims.heartbeat.fresh)
    finally:
        claims.heartbeat.stop()
    assert not path.exists()


def test_a_heartbeat_survives_that_its_folder_is_removed(folder: Path) -> None:
    claims = Claims(folder, lease_s=0.2)
    claims.heartbeat.start()
    try:
        path = folder / "_beats" / claims.heartbeat.name
        path.unlink()
        path.parent.rmdir()
        wait_until(path.exists)
    finally:
        claims.heartbeat.stop()


def test_a_claim_that_was_ours_at_the_last_look_is_given_back_unread(
    host: Callable[[], Host], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can have taken it while the heartbeat was fresh all along; once it has stood still, a look is due."""
    a, b = host(), host()
    looks, read = [], module.read_claim
    monkeypatch.setattr(module, "read_claim", lambda path: looks.append(path) or read(path))  # type: ignore[func-returns-value]
    first, second, third = a.acquire("1"), a.acquire("2"), a.acquire("3")
    assert first and second and third
    a.claims.release(first)
    assert looks == [first.path], "nobody has looked at it since it was made"
    assert a.claims.holds(second) and a.claims.holds(third)
    looks.clear()
    clock.now += LEASE_S / 2
    a.claims.heartbeat._beat()
    clock.now += LEASE_S / 2
    a.claims.release(second)
    assert (looks, second.path.exists()) == ([], False)
    assert b.acquire("3") is None
    clock.now += LEASE_S + 1
    taken = b.acquire("3")
    assert taken is not None and taken.predecessors == [third.token]
    a.claims.heartbeat._beat()  # the process was only asleep, and beats before it gives back
    assert a.claims.heartbeat.fresh
    a.claims.release(third)
    b.claims.heartbeat._beat()
    assert b.claims.holds(taken), "what another has taken over is left alone"


def test_a_shard_that_others_held_and_gave_back_is_known(host: Callable[[], Host], clock: Clock) -> None:
    """Its checkpoints have names that no claim tells."""
    a, b = host(), host()
    first = a.acquire("1")
    assert first is not None and not first.was_released
    assert b.acquire("1") is None
    a.claims.release(first)
    second = b.acquire("1")
    assert second is not None and second.was_released and not second.predecessors
    b.claims.release(second)
    third = b.acquire("1")
    assert third is not None and not third.was_released


def test_a_place_that_cannot_be_written_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "_claims").touch()
    with pytest.raises(InfrastructureError, match="_claims"):
        Claims(tmp_path / "_claims" / "stage").heartbeat.start()
    claims = Claims(tmp_path / "ok")
    (tmp_path / "ok").mkdir()
    (tmp_path / "ok" / BUCKET).touch()
    with pytest.raises(InfrastructureError, match=BUCKET):
        claims.acquire(BUCKET, "1")


# ---- real processes on this machine

TAKER = """
import json, sys
from pathlib import Path
from curation.run.claims import Claims
folder, lease_s, shards = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3].split(",")
claims = Claims(folder, lease_s)
claims.heartbeat.start()
print("ready", flush=True)
sys.stdin.readline()
won = {}
for shard in shards:
    claim = claims.acquire("0", shard)
    if claim is not None:
        won[shard] = [claim.token, claim.predecessors, claim.confirmed_dead]
print(json.dumps(won), flush=True)
sys.stdin.readline()
"""


class Taker:
    """A process that takes what it can of the shards when it is told to, and then holds it until it is killed."""

    def __init__(self, folder: Path, shards: list[str], lease_s: float = 60.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKER, str(folder), str(lease_s), ",".join(shards)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def won(self) -> dict[str, list[Any]]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def kill(self, *, reap: bool = True) -> None:
        self.process.kill()
        if reap:
            self.process.communicate()
        else:
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture
def takers(folder: Path) -> Iterator[Callable[..., list[Taker]]]:
    started: list[Taker] = []

    def start(count: int, shards: list[str], lease_s: float = 60.0) -> list[Taker]:
        new = [Taker(folder, shards, lease_s) for _ in range(count)]
        started.extend(new)
        for taker in new:
            taker.ready()
        return new

    yield start
    for taker in started:
        taker.kill()


def race(takers: list[Taker]) -> list[dict[str, list[Any]]]:
    for taker in takers:
        taker.go()
    return [taker.won() for taker in takers]


def test_of_several_processes_one_takes_each_shard(takers: Callable[..., list[Taker]]) -> None:
    shards = [str(n) for n in range(300)]
    won = race(takers(3, shards))
    assert sorted(itertools.chain(*won)) == sorted(shards), "each once"


def test_a_killed_process_loses_its_shards_at_once_and_to_one_taker(takers: Callable[..., list[Taker]]) -> None:
    shards = [str(n) for n in range(100)]
    (first,) = takers(1, shards)
    (held,) = race([first])
    assert len(held) == 100
    others = takers(3, shards, lease_s=3600.0)  # nobody waits for the end of that
    first.kill()
    won = race(others)
    assert sorted(itertools.chain(*won)) == sorted(shards)
    for shard, (token, predecessors, confirmed_dead) in itertools.chain(*(w.items() for w in won)):
        assert token != held[shard][0]
        # a rival's claim may have come and gone for an instant; the dead one's token is there or another has it
        assert confirmed_dead in (held[shard][0], None)
        assert set(predecessors) <= {held[shard][0]}
    carried = sum(bool(predecessors) for _, predecessors, _ in itertools.chain(*(w.values() for w in won)))
    assert carried > 50


def test_a_zombie_is_dead_and_a_stopped_process_is_not(takers: Callable[..., list[Taker]], folder: Path) -> None:
    dead, frozen = takers(1, ["1"]) + takers(1, ["2"])
    race([dead, frozen])
    dead.kill(reap=False)
    frozen.process.send_signal(signal.SIGSTOP)
    (other,) = takers(1, ["1", "2"])
    (won,) = race([other])
    assert list(won) == ["1"], "a stopped process may go on: its lease has to run out"


def test_another_boot_of_this_host_is_another_host(takers: Callable[..., list[Taker]], folder: Path) -> None:
    """A pid that is gone says nothing when it was given out by another boot, or in another container."""
    (first,) = takers(1, ["1", "2", "3"])
    race([first])
    first.kill()
    for shard, name in (("1", "boot"), ("2", "host"), ("3", "pid_namespace")):
        path = folder / BUCKET / f"{shard}.claim"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {name: "another"}))
    (other,) = takers(1, ["1", "2", "3"])
    assert race([other]) == [{}]


def test_a_pid_given_out_again_is_not_the_holder(folder: Path) -> None:
    claims = Claims(folder, 60)
    claims.heartbeat._beat()
    first = claims.acquire(BUCKET, "1")
    assert first is not None
    first.path.write_text(json.dumps(record(first) | {"pid_start": "1"}))
    second = Claims(folder, 60).acquire(BUCKET, "1")
    assert second is not None
    assert second.confirmed_dead == first.token


def test_a_dead_process_elsewhere_expires_in_real_time(takers: Callable[..., list[Taker]], folder: Path) -> None:
    (first,) = takers(1, ["1"])
    race([first])
    first.kill()
    path = folder / BUCKET / "1.claim"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"host": "another"}))
    claims = Claims(folder, lease_s=0.5)
    began = time.monotonic()
    wait_until(lambda: claims.acquire(BUCKET, "1") is not None)
    assert time.monotonic() - began >= 0.5


def test_claims_are_spread_by_chance_over_the_heartbeat(folder: Path) -> None:
    """Jitter: heartbeats of a thousand tasks must not fall on the file server together."""
    seen = set()
    for _ in range(5):
        waits: list[float] = []
        beat = Heartbeat(folder / "_beats", LEASE_S, 1800)
        beat._ended = SimpleNamespace(wait=lambda s, waits=waits: waits.append(s) or len(waits) > 3)  # type: ignore[assignment]
        beat._run()
        assert all(0.1 * LEASE_S < s < 0.35 * LEASE_S for s in waits)
        seen.update(waits)
    assert len(seen) == 20


# ---- claims of other versions, and those who died


FOREIGN = [
    b'{"format": 2, "token": "abc", "beat": "def", "pid": {"of": "another kind"}}',
    b'{"format": 1, "token": "abc"}',
    b"not JSON at all",
    b"[1, 2]",
    b'{"token": ["a"], "beat": 7, "predecessors": "abc", "deaths": [1], "pid": null}',
]


@pytest.mark.parametrize("content", FOREIGN, ids=range(len(FOREIGN)))
def test_a_claim_that_cannot_be_read_is_named_and_expires_by_the_lease(
    content: bytes, host: Callable[[], Host], clock: Clock, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / BUCKET / "1.claim"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    b = host()
    assert b.acquire() is None
    assert not caplog.records, "it may just be being written"
    clock.now += LEASE_S - 1
    assert b.acquire() is None
    assert b.acquire() is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(path) in line
    clock.now += 1
    assert b.acquire() is not None


def test_one_of_a_later_version_that_beats_is_not_robbed(host: Callable[[], Host], clock: Clock, folder: Path) -> None:
    beat = folder / "_beats" / "feed"
    path = folder / BUCKET / "1.claim"
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"format": 99, "token": "abc", "beat": "feed", "new": true}')
    b = host()
    for number in range(5):
        beat.write_bytes(b"%020d whatever it says" % number)
        assert b.acquire() is None
        clock.now += LEASE_S - 1
    clock.now += LEASE_S
    assert b.acquire() is not None


def test_what_a_heartbeat_says_behind_its_counter_does_not_keep_it_alive(
    host: Callable[[], Host], clock: Clock, folder: Path
) -> None:
    a, b = host(), host()
    assert a.acquire()
    assert b.acquire() is None
    clock.now += LEASE_S
    path = folder / "_beats" / a.claims.heartbeat.name
    path.write_bytes(path.read_bytes()[:20] + b' {"working": {"1": 5}}\n')
    assert b.acquire() is not None


def test_a_taker_knows_who_died_before(host: Callable[[], Host], clock: Clock) -> None:
    a, b, c = host(), host(), host()
    first = a.acquire()
    assert first is not None
    assert first.deaths == ()
    b.acquire()
    clock.now += LEASE_S
    second = b.acquire()
    assert second is not None
    assert [(death.token, death.host, death.alone) for death in second.deaths] == [(first.token, a._identity[0], False)]
    b.claims.mark_alone(second)
    b.beat()
    c.acquire()
    clock.now += LEASE_S
    third = c.acquire()
    assert third is not None
    assert [(death.token, death.alone) for death in third.deaths] == [(first.token, False), (second.token, True)]
    c.claims.mark_alone(third)
    c.claims.release(third)
    fourth = a.acquire()
    assert fourth is not None
    assert fourth.deaths == (), "who gave it back was not killed by it"
    assert sorted(path.name for path in fourth.path.parent.iterdir()) == ["1.claim"]


# ---- buckets that another worker of the run has found done


def checked(folder: Path, beat: str) -> CheckedBuckets:
    """Of a process that has just started."""
    (folder / "_beats").mkdir(parents=True, exist_ok=True)
    (folder / "_beats" / beat).touch()
    (folder / "1").mkdir(exist_ok=True)
    return CheckedBuckets(folder, beat)


def test_one_worker_looks_at_a_bucket_and_the_others_of_its_run_believe_it(folder: Path) -> None:
    one, other = checked(folder, "one"), checked(folder, "other")
    assert not one.are_done("1", "run and shards", ["1000", "1001"])
    one.found_done("1", "1000")
    one.passed("1")
    assert not other.are_done("1", "run and shards", ["1000", "1001"]), "the second is not known to be done"
    one.found_done("1", "1001")
    assert other.are_done("1", "run and shards", ["1000", "1001"])
    assert not other.are_done("1", "another run, or other shards", ["1000", "1001"])
    one.found_done("1", "1001")  # again, and of a bucket that nobody has begun: without effect
    one.found_done("2", "2000")


def test_who_started_after_the_look_looks_again(folder: Path) -> None:
    """An input may have changed in between; a requeued job has the id of the run before."""
    one = checked(folder, "one")
    assert not one.are_done("1", "run", ["1000"])
    later = checked(folder, "later")
    one.found_done("1", "1000")
    assert not later.are_done("1", "run", ["1000"])
    later.found_done("1", "1000")
    assert one.are_done("1", "run", ["1000"]), "the later one's looks came after both had started"


@pytest.mark.parametrize(
    "note",
    [b"", b'{"checked": "ru', b"[]", b'{"checked": "run", "beats": "other"}', b'{"checked": "run"}', b"\xff" * 9],
)
def test_a_note_that_is_no_note_counts_for_nothing(folder: Path, note: bytes) -> None:
    other = checked(folder, "other")
    (folder / "1" / ".checked").write_bytes(note)
    assert not other.are_done("1", "run", ["1000"])
    (folder / "1" / ".checked").write_bytes(b'{"checked": "run", "beats": [7, "other"]}')
    assert other.are_done("1", "run", ["1000"])


def test_the_last_process_removes_the_notes(folder: Path) -> None:
    one, other = checked(folder, "one"), checked(folder, "other")
    one.are_done("1", "run", ["1000"])
    one.found_done("1", "1000")
    (folder / "_beats" / "one").unlink()
    one.clear()
    assert (folder / "1" / ".checked").exists(), "the other one may read it"
    (folder / "_beats" / "other").unlink()
    other.clear()
    assert os.listdir(folder / "1") == []
