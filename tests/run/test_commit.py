"""The commit under a scheduler that decides which process makes its next filesystem call, and which one dies there.

The processes are threads that run the real code on a real filesystem; every call that another process could notice
waits for its turn.  After every call the folder must be one that a reader can trust.
"""

from __future__ import annotations

import builtins
import errno
import itertools
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from curation.errors import InfrastructureError, LostClaim, ShardError
from curation.run import commit
from curation.run.commit import Commit, StaleTempFiles
from curation.storage import files as storage_files
from curation.storage.files import AtomicFile, fast_digest, link_exclusively, read_record, temporary_name

SHARD = "00000007"
GATES = ("link", "rename", "unlink", "open")


class Crash(BaseException):
    """SIGKILL: no handler and no clean-up of the process has any effect any more."""


class Process(threading.Thread):
    """One process under the scheduler."""

    def __init__(self, name: str, program: Callable[[str], str]) -> None:
        super().__init__(name=name, daemon=True)
        self.go, self.waits = threading.Lock(), threading.Lock()  # cheaper than semaphores, and handed over as well
        self.go.acquire()
        self.waits.acquire()
        self.writes = False  # what it was last let do
        self.dead = False
        self.result: str | None = None
        self.error: BaseException | None = None
        self._program = program

    def run(self) -> None:
        try:
            self.gate()
            self.result = self._program(self.name)
        except Crash:
            self.result = "crashed"
        except BaseException as error:
            self.error = error
        finally:
            self.waits.release()

    def gate(self, *, writes: bool = False) -> None:
        if self.dead:
            raise Crash
        self.waits.release()
        self.go.acquire()
        if self.dead:
            raise Crash
        self.writes = writes

    @property
    def ended(self) -> bool:
        return self.result is not None or self.error is not None


class World:
    """A stage's output folder with its one shard, and what was ever published in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.receipts = root / "_receipts"
        self.receipts.mkdir(parents=True)
        (root / "edits").mkdir()
        self.published: dict[int, str] = {}  # generation → token
        self.claimants: list[str] = []  # of those that respect claims; the last one holds it

    def commit(self) -> Commit:
        return Commit(self.root, self.receipts, SHARD)

    def attempt(self, token: str, *, claims: bool) -> str:
        """What the runner does: claim, read the receipt, write outputs, commit, clear away the dead.

        claims: takes the shard over from whoever holds it, presumes the earlier holders dead though they may live, and
        gives up when it finds itself presumed dead.  Without, the attempts know nothing of each other.
        """
        dead = list(self.claimants) if claims else []
        if claims:
            self.claimants.append(token)
            wait_for_turn()
        commit = self.commit()
        receipt = commit.read_receipt()
        if commit.finish_pending(int(receipt["generation"]) if receipt else 0):
            receipt = commit.read_receipt()
        generation = int(receipt["generation"]) + 1 if receipt else 1
        outputs = []
        for name in (f"{SHARD}.json", f"edits/{SHARD}.json"):
            with AtomicFile(self.root / name, token) as file:
                file.write(f"{name} by {token}".encode() * (1 + token_number(token)))
            outputs.append(file)
        record = {
            "token": token,
            "generation": generation,
            "status": "done",
            "outputs": [
                {
                    "path": os.path.relpath(file.final, self.root),
                    "temporary": file.temporary.name,
                    "size": file.size,
                    "digest": file.digest,
                }
                for file in outputs
            ],
        }
        try:
            if claims and self.claimants[-1] != token:
                raise LostClaim
            commit.write(record)
        except LostClaim:
            return "lost"
        finally:
            if not commit.named:
                for file in outputs:
                    file.discard()
        places = [*(file.final for file in outputs), self.receipts / SHARD]
        StaleTempFiles().clear(places, token, dead)
        return "won"

    def check(self) -> None:
        """What a reader may rely on at every moment."""
        receipt = plain_read(self.receipts / f"{SHARD}.json")
        latest = max(self.published, default=0)
        if receipt is None:
            assert not self.published, "a receipt went away"
            return
        generation = receipt["generation"]
        assert generation >= latest, f"generation {latest} was replaced by {generation}"
        winner = self.published.setdefault(generation, receipt["token"])
        assert winner == receipt["token"], f"generation {generation} was won by {winner} and by {receipt['token']}"
        if plain_read(self.receipts / f".{SHARD}.{generation + 1}.commit") is None:  # else it is being replaced
            for output in receipt["outputs"]:
                path = self.root / output["path"]
                assert path.exists(), f"{path.name} of {receipt['token']} is missing"
                assert path.stat().st_size == output["size"], f"{path.name} is not {receipt['token']}'s"
                assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == output["digest"]

    def recover(self, tokens: list[str]) -> None:
        """A successor that comes when all others have ended or died, and lists the folder first."""
        self.commit().finish_pending(names=os.listdir(self.receipts))
        self.check()
        self.claimants = tokens
        self.attempt("successor", claims=True)
        self.check()
        assert self.published, "nothing was published"
        temporary = [str(p.relative_to(self.root)) for p in self.root.rglob(".*") if p.is_file()]
        assert not temporary, f"left behind: {temporary}"


def wait_for_turn(*, writes: bool = False) -> None:
    current = threading.current_thread()
    if isinstance(current, Process):
        current.gate(writes=writes)


def token_number(token: str) -> int:
    return sum(token.encode()) % 7


def plain_read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_bytes()) if path.exists() else None


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that others can notice becomes a point at which the scheduler decides."""

    def gate(call: Callable[..., Any], *, writes: bool) -> Callable[..., Any]:
        def waiting(*arguments: Any, **keywords: Any) -> Any:
            wait_for_turn(writes=writes)
            return call(*arguments, **keywords)

        return waiting

    for name in GATES:
        monkeypatch.setattr(os, name, gate(getattr(os, name), writes=True))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power is lost here
    monkeypatch.setattr(storage_files, "open", gate(builtins.open, writes=False), raising=False)
    monkeypatch.setattr(commit.time, "sleep", lambda seconds: None)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is to be had: this is about order, not about disks."""
    base = Path("/dev/shm") / f"curation-test-{os.getpid()}" if os.access("/dev/shm", os.W_OK) else tmp_path
    base.mkdir(exist_ok=True)
    yield base
    shutil.rmtree(base, ignore_errors=True)


Choice = Callable[[list[Process], Process | None], tuple[Process, bool]]  # whose turn, and whether it dies


def play(root: Path, programs: dict[str, Callable[[World, str], str]], choose: Choice) -> list[str]:
    """One run: the trace, after the folder was checked at every step and a successor has come."""
    world = World(root)
    processes = [
        Process(name, lambda token, program=program: program(world, token))  # type: ignore[misc]
        for name, program in programs.items()
    ]
    for process in processes:
        process.start()
        process.waits.acquire()
    trace: list[str] = []
    last: Process | None = None
    try:
        while alive := [process for process in processes if not process.ended]:
            last, dies = choose(alive, last)
            last.dead = dies
            trace.append(last.name + ("†" if dies else ""))
            last.go.release()
            last.waits.acquire()
            if last.writes:  # else the folder is as it was
                world.check()
        for process in processes:
            process.join()
            if process.error is not None:
                raise process.error
        won = {process.name for process in processes if process.result == "won"}
        assert won <= set(world.published.values()), f"{won} say they won, {world.published} were published"
        world.recover(list(programs))
    except AssertionError as error:
        raise AssertionError(f"{error}; order {' '.join(trace)}") from error
    finally:
        for process in processes:  # whoever still waits
            process.dead = True
            if process.is_alive():
                process.go.release()
        shutil.rmtree(root)
    return trace


def attempt(world: World, token: str) -> str:
    return world.attempt(token, claims=False)


def taker(world: World, token: str) -> str:
    return world.attempt(token, claims=True)


def finish_only(world: World, token: str) -> str:
    """A reader that comes by and finishes what it finds."""
    for _ in range(2):
        commit = world.commit()
        receipt = commit.read_receipt()
        commit.finish_pending(int(receipt["generation"]) if receipt else 0)
    return "read"


CASTS: dict[str, dict[str, Callable[[World, str], str]]] = {
    "two": {"a": attempt, "b": attempt},
    "takers": {"a": taker, "b": taker},
    "reader": {"a": attempt, "b": attempt, "r": finish_only},
    "three": {"a": attempt, "b": attempt, "c": attempt},
    "three takers": {"a": taker, "b": taker, "c": taker},
}


def randomly(rng: random.Random, death: float) -> Choice:
    stay = rng.random()

    def choose(alive: list[Process], last: Process | None) -> tuple[Process, bool]:
        process = last if last in alive and rng.random() < stay else rng.choice(alive)
        assert process is not None
        return process, rng.random() < death

    return choose


def with_switches(first: int, switches: tuple[int, ...], death: int | None = None) -> Choice:
    """One process runs until a step in ``switches``, then the next; whoever is at step ``death`` dies there."""
    step = -1

    def choose(alive: list[Process], last: Process | None) -> tuple[Process, bool]:
        nonlocal step
        step += 1
        if last is None:
            process = alive[first]
        elif last not in alive:
            process = alive[0]
        elif step in switches:
            others = [process for process in alive if process is not last]
            process = others[0] if others else last
        else:
            process = last
        return process, step == death

    return choose


@pytest.mark.parametrize("cast", CASTS)
def test_random_orders_with_deaths(cast: str, gated: None, folder: Path) -> None:
    for seed in range(200):
        rng = random.Random(f"{cast} {seed}")
        play(folder / str(seed), CASTS[cast], randomly(rng, rng.choice([0.0, 0.02, 0.1])))


@pytest.mark.soak
@pytest.mark.parametrize("cast", CASTS)
def test_many_random_orders_with_deaths(cast: str, gated: None, folder: Path) -> None:
    for seed in range(20_000):
        rng = random.Random(f"soak {cast} {seed}")
        play(folder / str(seed), CASTS[cast], randomly(rng, rng.choice([0.0, 0.02, 0.1])))


@pytest.mark.parametrize("cast", ["two", "takers"])
def test_every_order_of_two_with_up_to_two_switches(cast: str, gated: None, folder: Path) -> None:
    longest = len(play(folder / "first", CASTS[cast], with_switches(0, ())))
    orders = [(), *itertools.combinations(range(longest), 1), *itertools.combinations(range(longest), 2)]
    for switches in orders:  # both do the same, so it is all one who begins
        play(folder / "next", CASTS[cast], with_switches(0, switches))


@pytest.mark.parametrize("cast", ["two", "takers"])
def test_every_death_with_every_switch(cast: str, gated: None, folder: Path) -> None:
    """One is interrupted anywhere, the other goes on, and whoever is running dies anywhere after that."""
    longest = len(play(folder / "first", CASTS[cast], with_switches(0, ())))
    for switch in range(longest):
        for death in range(switch, longest):
            play(folder / "next", CASTS[cast], with_switches(0, (switch,), death))


def test_one_attempt_dies_at_every_step_and_a_successor_finishes(gated: None, folder: Path) -> None:
    steps = len(play(folder / "first", {"a": attempt}, with_switches(0, ())))
    assert steps > 8
    for death in range(steps):
        play(folder / str(death), {"a": attempt}, with_switches(0, (), death))


# ---- the same said one by one


def prepare(world: World, token: str, generation: int, text: bytes) -> tuple[Commit, AtomicFile, dict[str, Any]]:
    with AtomicFile(world.root / f"{SHARD}.json", token) as file:
        file.write(text)
    output = {"path": f"{SHARD}.json", "temporary": file.temporary.name, "size": file.size, "digest": file.digest}
    receipt = {"token": token, "generation": generation, "status": "done", "outputs": [output]}
    return world.commit(), file, receipt


def test_a_late_commit_of_an_old_generation_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path / "out")
    late, _, late_receipt = prepare(world, "late", 1, b"late")
    for token, generation in (("first", 1), ("second", 2)):
        commit, _, receipt = prepare(world, token, generation, token.encode())
        commit.write(receipt)
    with pytest.raises(LostClaim):
        late.write(late_receipt)
    assert not late.named
    assert (world.root / f"{SHARD}.json").read_bytes() == b"second"
    assert world.commit().read_receipt()["token"] == "second"  # type: ignore[index]
    assert not list(world.receipts.glob(".*"))


def test_the_temporary_files_of_a_commit_that_broke_off_stay_for_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk error in the middle of the renames: the record is valid, so the attempt must not tidy up after itself."""
    world = World(tmp_path / "out")
    commit, file, receipt = prepare(world, "a", 1, b"whole")

    def broken(source: Any, target: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", broken)
        with pytest.raises(InfrastructureError, match="Input/output error"):
            commit.write(receipt)
    assert commit.named
    assert file.temporary.exists()
    assert world.commit().finish_pending()
    world.check()
    assert (world.root / f"{SHARD}.json").read_bytes() == b"whole"


def test_a_loser_finishes_what_the_winner_could_not(tmp_path: Path) -> None:
    world = World(tmp_path / "out")
    dead, _, dead_receipt = prepare(world, "dead", 1, b"dead")
    (world.receipts / temporary_name(SHARD, "dead")).write_text(json.dumps(dead_receipt))
    os.link(dead.prepared("dead"), world.receipts / f".{SHARD}.1.commit")
    late, _, receipt = prepare(world, "late", 1, b"late")
    with pytest.raises(LostClaim):
        late.write(receipt)
    world.check()
    assert world.published == {1: "dead"}
    assert not list(world.receipts.glob(".*"))


def test_nobody_commits_without_a_record_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record that was in the way is gone when it is read: the link is tried again, whatever else can be seen."""
    world = World(tmp_path / "out")
    commit, _, receipt = prepare(world, "a", 1, b"x")
    link, links = os.link, 0

    def in_the_way_once(source: Any, target: Any) -> None:
        nonlocal links
        links += 1
        if links == 1:
            raise FileExistsError(errno.EEXIST, "File exists")
        link(source, target)

    monkeypatch.setattr(os, "link", in_the_way_once)
    commit.write(receipt)
    world.check()
    assert links == 2


@pytest.mark.parametrize("code", ["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EMLINK", "EXDEV"])
def test_a_commit_that_could_not_begin_leaves_no_prepared_receipt(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path / "out")
    commit, _, receipt = prepare(world, "a", 1, b"x")

    def unsupported(source: Any, target: Any) -> None:
        raise OSError(getattr(errno, code), "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    with pytest.raises(InfrastructureError, match=r"hard link.*choose an output folder on another filesystem"):
        commit.write(receipt)
    with pytest.raises(InfrastructureError, match=r"hard link.*choose an output folder on another filesystem"):
        link_exclusively(world.receipts / "_epoch.1.json", b"{}")
    assert not commit.named
    assert not list(world.receipts.iterdir())


def test_an_answer_lost_on_its_way_is_no_foreign_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may carry out a link, lose the answer, and find its own link when it asks again."""
    world = World(tmp_path / "out")
    commit, _, receipt = prepare(world, "a", 1, b"x")
    link = os.link

    def twice(source: Any, target: Any) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    commit.write(receipt)
    world.check()
    assert world.published == {1: "a"}


def test_a_commit_record_that_is_none_stops_the_run_by_name(tmp_path: Path) -> None:
    world = World(tmp_path / "out")
    commit, _, receipt = prepare(world, "a", 1, b"x")
    (world.receipts / f".{SHARD}.1.commit").write_bytes(b"")
    with pytest.raises(InfrastructureError, match=r"00000007\.1\.commit"):
        commit.write(receipt)
    assert not commit.named


def test_a_receipt_with_any_text_can_be_read_again(tmp_path: Path) -> None:
    """A lone surrogate in a warning, or a huge number, must not make the shard pending for ever."""
    world = World(tmp_path / "out")
    commit, _, receipt = prepare(world, "a", 1, b"x")
    receipt |= {"warnings": ["caption \ud800 \x00"], "notes": {"big": 1 << 70}}
    commit.write(receipt)
    assert world.commit().read_receipt() == receipt | {"warnings": ["caption \ufffd \0"]}


def test_output_is_hashed_sized_and_hidden_until_the_commit(tmp_path: Path) -> None:
    final = tmp_path / "new" / "00000000.tar"
    with AtomicFile(final, "0123456789abcdef") as file:
        pieces = [b"a", bytearray(b"bc"), memoryview(b"d" * (3 << 20)), b"", b"e" * 100]
        for piece in pieces:
            assert file.write(piece) == len(piece)
        assert file.tell() == sum(map(len, pieces))
        assert not final.exists()
    assert file.temporary.name == temporary_name("00000000.tar", "0123456789abcdef")
    assert file.temporary.read_bytes() == b"".join(bytes(piece) for piece in pieces)
    assert (file.size, file.digest) == (file.temporary.stat().st_size, fast_digest(file.temporary))
    file.discard()
    assert not list(final.parent.iterdir())


def test_output_that_an_error_cuts_short_goes_away(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="bad"), AtomicFile(tmp_path / "x", "t"):
        raise ValueError("bad")
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOENT])
def test_ones_own_file_gone_is_a_lost_claim(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = AtomicFile(tmp_path / "x", "t")
    file.write(b"x")

    def gone(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", gone)
    with pytest.raises(LostClaim):
        file.close()


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    file = AtomicFile(tmp_path / "x", "t")
    os.close(file._descriptor)
    file._descriptor = os.open("/dev/full", os.O_WRONLY)
    file.write(b"x")
    with pytest.raises(InfrastructureError, match="the disk is full"):
        file.close()
    assert file._descriptor == -1


def test_long_names(tmp_path: Path) -> None:
    """A name that fits must not fail for its temporary name's sake; one that does not must fail before the commit."""
    name = "k" * 251 + ".jpg"
    with AtomicFile(tmp_path / name, "0123456789abcdef") as file:
        file.write(b"x")
    os.rename(file.temporary, file.final)
    with pytest.raises(ShardError, match="too long"):
        AtomicFile(tmp_path / ("k" + name), "0123456789abcdef")


def test_links_are_exclusive_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "_epoch.1.json"
    assert link_exclusively(path, b"1")
    assert not link_exclusively(path, b"2")
    assert path.read_bytes() == b"1"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_reading_what_is_replaced_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(b'{"a": 1}')
    stale = iter([True, True, False])

    def moving(*arguments: Any) -> Any:
        if next(stale):
            raise OSError(errno.ESTALE, "Stale file handle")
        return builtins.open(*arguments)

    monkeypatch.setattr(storage_files, "open", moving, raising=False)
    assert read_record(path) == {"a": 1}


def test_what_is_no_record_is_none(tmp_path: Path) -> None:
    for number, data in enumerate([b"", b"[1]", b"{", b"null", b"\xff"]):
        path = tmp_path / str(number)
        path.write_bytes(data)
        assert read_record(path) is None
    assert read_record(tmp_path / "absent") is None


def test_leftovers_of_others_go_and_ones_own_and_other_shards_stay(tmp_path: Path) -> None:
    own, dead, late = "0" * 16, "d" * 16, "e" * 16
    final = tmp_path / "a.json"
    long = tmp_path / ("k" * 250)
    keep = [temporary_name(final.name, own), temporary_name("a.json.b", dead), temporary_name("b.json", dead), "a.json"]
    go = [temporary_name(final.name, dead), temporary_name(long.name, dead)]
    for name in keep + go:
        (tmp_path / name).touch()
    leftovers = StaleTempFiles()
    leftovers.look([final, long])
    go.append(temporary_name(final.name, late))  # of one that died after the look
    (tmp_path / go[-1]).touch()
    leftovers.clear([final, long], own, [late])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(keep)
