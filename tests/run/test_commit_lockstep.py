"""The real code beside the model of the commit protocol, operation by operation.

The attempts are threads that run ``attempt.Attempts`` on a real folder.  Each file operation that concerns the
shard waits for its turn, must be the one that the model has next, and must leave the files that the model says.
"""

from __future__ import annotations

import builtins
import itertools
import json
import os
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from curation.cluster import Allocation, StopSignal
from curation.options import RunOptions
from curation.run import commit
from curation.run.attempt import Attempts
from curation.run.claims import Claim
from curation.run.ledger import Ledger, State
from curation.run.progress import Progress, Tally
from curation.run.work import ShardContext, Stage
from curation.shards import Shard, bucket_of
from curation.storage import files as storage_files
from tests.run.commit_disk import Disk, Op, Receipt
from tests.run.commit_model import Attempt, Model, Rules
from tests.run.commit_model import (
    State as ModelState,
)
from tests.run.commit_search import after_successor, check_end

SHARD = "00000007"
BOTH = ("A", "B")


def attempts(*outputs: tuple[str, ...]) -> tuple[Attempt, ...]:
    return tuple(Attempt(token, paths) for token, paths in zip("abcdef", outputs, strict=False))


SUCCESSOR = Attempt("s", BOTH)


class Killed(BaseException):
    """No handler and no clean-up of the process has any effect any more."""


class Toy(Stage[RunOptions]):
    name = "toy"

    def __init__(self, output: Path, attempt: Attempt) -> None:
        super().__init__(RunOptions(), output)
        self._attempt = attempt

    def fingerprint(self) -> dict[str, object]:
        return {}

    def process(self, work: ShardContext) -> None:
        work.sample_in()
        work.keep()
        for path in self._attempt.outputs:
            with work.output(self.output / path) as file:
                file.write(self._attempt.token.encode())


class EagerAttempts(Attempts):
    def wanted(self, state: State) -> bool:
        return state.what != "blocked"


class RealAttempt(threading.Thread):
    """One attempt by the real code, stopped before each operation that the model knows."""

    def __init__(self, world: World, attempt: Attempt) -> None:
        super().__init__(daemon=True)
        self.world, self.attempt = world, attempt
        self.next: Op | None = None  # the operation it is about to do
        self.looked = self.dead = False
        self.error: BaseException | None = None
        self._go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        try:
            self.world.attempt(self.attempt, self.gate)
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self.next = None
        self.stopped.release()

    def gate(self, op: Op) -> None:
        if self.dead:
            raise Killed
        self.next = op
        self.stopped.release()
        self._go.acquire()
        if self.dead:
            raise Killed

    def proceed(self) -> None:
        self._go.release()
        self.stopped.acquire()
        if self.error is not None:
            raise self.error

    def kill(self) -> None:
        self.dead = True
        if self.is_alive():
            self._go.release()
            self.join()


class World:
    """A stage's folder with one shard.  Claims are stood in for: whoever comes takes over from whoever is there."""

    def __init__(self, base: Path, *, eager: bool) -> None:
        self.root = base / "out"
        self.source = base / f"{SHARD}.tar"
        self.source.touch()
        self.bucket = self.root / "_receipts" / Toy.name / bucket_of(SHARD)
        self.bucket.mkdir(parents=True)
        self.claim: tuple[str, ...] = ()
        self.kind = EagerAttempts if eager else Attempts

    def attempt(self, attempt: Attempt, gate: Callable[[Op], None]) -> None:
        token = attempt.token
        gate(("claim", token))
        predecessors, self.claim = list(self.claim), (*self.claim, token)
        self._work(attempt, Claim(SHARD, self.root / "claim", token, predecessors), gate)
        gate(("give back", token))
        if self.claim[-1:] == (token,):
            self.claim = ()

    def _work(self, attempt: Attempt, claim: Claim, gate: Callable[[Op], None]) -> None:
        def holds(claim: Claim) -> bool:
            gate(("holds",))
            return self.claim[-1:] == (claim.token,)

        stage = Toy(self.root, attempt)
        options, allocation = RunOptions(quiet=True), Allocation()
        ledger = Ledger(self.root, stage.name, stage.version, {})
        ledger.prepare(())
        ledger.enter("run", False, None, [SHARD])
        claims: Any = SimpleNamespace(holds=holds, heartbeat=SimpleNamespace(progress=lambda *_: None))
        work = self.kind(
            stage, options, allocation, StopSignal(), ledger, claims, Progress("toy", ["00000000"], True), Tally()
        )
        work.attempt(Shard(SHARD, self.source), claim)

    def arrive(self, attempt: Attempt) -> None:
        """A successor: it lists the folder, and works alone."""
        ledger = Ledger(self.root, Toy.name, Toy.version, {})
        ledger.commit(SHARD).finish_pending(names=os.listdir(self.bucket))
        self.attempt(attempt, lambda op: None)

    def name(self, path: Any) -> str | None:
        """What the model calls a file; None for one that it does not know."""
        path = Path(os.fspath(path))
        if path.parent == self.root and len(path.name) == 1:
            return path.name
        if path.parent == self.root and (match := re.fullmatch(r"\.(.)\.(\w+)\.(tmp|old)", path.name)):
            return f"{match[3]} {match[1]} {match[2]}"
        if path.parent != self.bucket:
            return None
        if path.name == f"{SHARD}.json":
            return "receipt"
        if match := re.fullmatch(rf"\.{SHARD}\.(\d+)\.commit", path.name):
            return f"record {match[1]}"
        if match := re.fullmatch(rf"\.{SHARD}\.(\w+)\.tmp", path.name):
            return f"tmp R {match[1]}"
        raise AssertionError(f"what is {path}?")

    def disk(self) -> Disk:
        """The folder as the model would put it."""
        finals, temporaries, prepared, records, aside, receipt = {}, set(), set(), set(), set(), None
        for folder in (self.root, self.bucket):
            for path in folder.iterdir():
                if not path.is_file():
                    continue
                name = self.name(path) or ""
                kind, *rest = name.split(" ")
                if kind == "receipt":
                    receipt = as_receipt(path)
                elif kind == "record":
                    records.add(as_receipt(path))
                elif kind == "tmp" and rest[0] == "R":
                    prepared.add(as_receipt(path))
                elif kind == "tmp":
                    temporaries.add((rest[0], rest[1]))
                elif kind == "old":
                    aside.add((rest[0], path.read_text(), rest[1]))
                else:
                    finals[kind] = path.read_text()
        return Disk(
            tuple(sorted(finals.items())),
            frozenset(temporaries),
            frozenset(prepared),
            receipt,
            frozenset(records),
            self.claim,
            frozenset(aside),
        )


def as_receipt(path: Path) -> Receipt:
    value = json.loads(path.read_bytes())
    outputs = tuple(output["path"] for output in value["outputs"])
    return Receipt(value["token"], value["generation"], outputs, tuple(value.get("superseded", ())))


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that touches a file of the shard becomes a point at which the test decides who goes on."""

    def gated(call: Callable[..., Any], describe: Callable[..., Op | None]) -> Callable[..., Any]:
        def waiting(*arguments: Any, **keywords: Any) -> Any:
            current = threading.current_thread()
            if isinstance(current, RealAttempt):
                op = describe(current, *arguments)
                if op is not None:
                    current.gate(op)
            return call(*arguments, **keywords)

        return waiting

    def files(verb: str, count: int) -> Callable[..., Op | None]:
        def describe(current: RealAttempt, *arguments: Any) -> Op | None:
            names = [current.world.name(path) for path in arguments[:count]]
            if None in names or (verb, str(names[0])[:4]) == ("read", "old "):  # what one has put aside is one's own
                return None
            return (verb, *[str(name) for name in names])

        return describe

    def creating(current: RealAttempt, path: Any, flags: int, *rest: Any) -> Op | None:
        return files("create", 1)(current, path) if flags & os.O_CREAT else None

    def looking(current: RealAttempt, folder: Any) -> Op | None:
        if current.looked or Path(folder) not in (current.world.root, current.world.bucket):
            return None
        current.looked = True
        return ("look",)

    for name, describe in {
        "link": files("link", 2),
        "rename": files("rename", 2),
        "unlink": files("unlink", 1),
        "open": creating,
        "scandir": looking,
    }.items():
        monkeypatch.setattr(os, name, gated(getattr(os, name), describe))
    monkeypatch.setattr(storage_files, "open", gated(builtins.open, files("read", 1)), raising=False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power is lost here
    monkeypatch.setattr(commit.time, "sleep", lambda seconds: None)


Choice = Callable[[list[int], int | None], int | None]  # those that live, who was last → who goes on; None: kill all


def play(
    base: Path,
    cast: tuple[Attempt, ...],
    before: tuple[str, ...],
    choose: Choice,
    *,
    eager: bool = True,
    rules: Rules | None = None,
) -> int:
    """One run of the real code beside the model; how many operations there were."""
    base.mkdir()
    world = World(base, eager=eager)
    if before:
        world.attempt(Attempt("o", before), lambda op: None)
    model = Model(cast, rules or Rules(eager=eager), before)
    state: ModelState = model.start
    real = [RealAttempt(world, attempt) for attempt in cast]
    trace: list[str] = []
    last: int | None = None
    try:
        for process in real:
            process.start()
            process.stopped.acquire()
            assert process.error is None, process.error
        while alive := [who for who, process in enumerate(real) if process.next is not None]:
            last = choose(alive, last)
            if last is None:
                break
            op = real[last].next
            trace.append(f"{cast[last].token}: {' '.join(op or ())}")
            allowed = dict(model.options(state, last))
            assert op in allowed, f"the model would do one of {list(allowed)}"
            state = allowed[op]
            real[last].proceed()
            assert world.disk() == state.disk
        else:
            assert all(process.at == "ended" for process in state.processes)
        for process in real:
            process.kill()
        world.kind = EagerAttempts
        world.arrive(SUCCESSOR)
        assert world.disk() == after_successor(state.disk, SUCCESSOR, Rules(eager=True))
        assert not check_end(world.disk(), hidden=True)
    except AssertionError as error:
        raise AssertionError("\n".join([*trace, str(error)])) from error
    finally:
        for process in real:
            process.kill()
    return len(trace)


def with_switches(*switches: int, kill_at: int | None = None) -> Choice:
    """The first runs until a step in ``switches``, then the next; at ``kill_at`` all are killed."""
    steps = itertools.count()

    def choose(alive: list[int], last: int | None) -> int | None:
        step = next(steps)
        if step == kill_at:
            return None
        others = [who for who in alive if who != last]
        if last in alive and not (step in switches and others):
            return last
        return others[0]

    return choose


def randomly(rng: random.Random) -> Choice:
    stay, death = rng.random(), rng.choice([0.0, 0.0, 0.02])

    def choose(alive: list[int], last: int | None) -> int | None:
        if rng.random() < death:
            return None
        return last if last in alive and rng.random() < stay else rng.choice(alive)

    return choose


CASTS: dict[str, tuple[tuple[Attempt, ...], tuple[str, ...], bool]] = {
    "first": (attempts(BOTH, BOTH, BOTH), (), True),
    "once": (attempts(BOTH, BOTH, BOTH), (), False),
    "superseding": (attempts(BOTH, BOTH, BOTH), ("A", "X"), True),
    "different": (attempts(BOTH, ("A",), ("B",)), BOTH, True),
}


@pytest.mark.parametrize("cast", CASTS)
def test_the_real_code_takes_the_steps_of_the_model(cast: str, stepped: None, tmp_path: Path) -> None:
    who, before, eager = CASTS[cast]
    for seed in range(60):
        play(tmp_path / str(seed), who, before, randomly(random.Random(f"{cast} {seed}")), eager=eager)


@pytest.mark.parametrize("cast", ["first", "superseding"])
def test_every_order_of_two_with_up_to_two_switches(cast: str, stepped: None, tmp_path: Path) -> None:
    who, before, eager = CASTS[cast]
    longest = play(tmp_path / "first", who[:2], before, with_switches(), eager=eager)
    assert longest > 25
    orders = [*((n,) for n in range(longest)), *itertools.combinations(range(longest), 2)]
    for number, switches in enumerate(orders):
        play(tmp_path / str(number), who[:2], before, with_switches(*switches), eager=eager)


def test_a_kill_before_every_step(stepped: None, tmp_path: Path) -> None:
    who, before, _ = CASTS["superseding"]
    longest = play(tmp_path / "first", who[:2], before, with_switches())
    for step in range(longest):
        play(tmp_path / str(step), who[:2], before, with_switches(kill_at=step))


def test_a_model_in_another_order_is_not_taken_for_the_real_code(stepped: None, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the model would do one of"):
        play(tmp_path / "run", attempts(BOTH), (), with_switches(), rules=Rules(receipt_last=False))
