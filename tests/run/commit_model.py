"""A model of the commit protocol, one step a file operation.

The steps are those of ``run.commit``, ``run.attempt`` and ``storage.files``, in their order; test_commit_lockstep runs
those beside this model.  commit_search goes through all that can happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tests.run.commit_disk import (
    OLD,
    PREPARED,
    Disk,
    Op,
    Receipt,
    aside,
    generation_of,
    outputs_are_there,
    record_of,
    temporary,
    without,
)


class Process(NamedTuple):
    """Where an attempt is.  Only what it still needs is remembered, so that states that differ in nothing else meet."""

    at: str
    receipt: Receipt | None = None  # as it was read after claiming; once the commit begins, its own
    value: Receipt | None = None  # the record that it finishes
    then: str = ""  # where it goes on after that
    todo: tuple[tuple[str, str], ...] = ()  # files that a loop has still to go through, as (path, token)
    found: frozenset[tuple[str, str]] = frozenset()  # other attempts' files that it will clear away, or that are named
    found_receipt: Receipt | None = None  # the newest, when it is asked what is named
    paths: tuple[str, ...] = ()  # that the last receipt named, where it clears as well
    groups: tuple[tuple[tuple[str, str], ...], ...] = ()  # the files to clear, in the order of the places
    predecessors: tuple[str, ...] = ()  # whom it took the claim from
    sources: tuple[str, ...] = ()  # whose files put aside it has still to look for, after those in ``todo``


Step = tuple[Op, Disk, Process]


class State(NamedTuple):
    disk: Disk
    processes: tuple[Process, ...]


@dataclass(frozen=True)
class Rules:
    """The protocol and the ways in which a test breaks it.

    eager: an attempt works on the shard even if it is done, as a rerun with other options would.
    """

    eager: bool = True
    check_void: bool = True  # step 3
    receipt_last: bool = True  # step 4: the outputs before the receipt
    receipt_after_record: bool = True  # of step 3, for one who comes upon a record
    check_claim: bool = True
    link_exclusive: bool = True  # step 2
    put_aside: bool = True  # before what was superseded is removed
    record_before_receipt: bool = True  # when it is asked what may be removed
    tidy_superseded: bool = True  # who finds a done shard removes what its receipt superseded, claim left behind or not


@dataclass(frozen=True)
class Attempt:
    token: str
    outputs: tuple[str, ...]


START = Process("claim")
GIVE_BACK = Process("give_back")
ENDED = Process("ended")


class Model:
    """Attempts on one shard, on which there may be a receipt of an older attempt ``o``."""

    def __init__(self, attempts: tuple[Attempt, ...], rules: Rules, before: tuple[str, ...] = ()) -> None:
        self.attempts = attempts
        self.rules = rules
        old = Receipt("o", 1, before, ()) if before else None
        finals = tuple(sorted((path, "o") for path in before))
        empty: frozenset[tuple[str, str]] = frozenset()
        self.start = State(Disk(finals, empty, frozenset(), old, frozenset(), ()), (START,) * len(attempts))

    # ---- what a process does next

    def options(self, state: State, who: int) -> list[tuple[Op, State]]:
        """Its next operation with the state after it: one, or several where the order within a loop is open."""
        before, after = state.processes[:who], state.processes[who + 1 :]
        steps = self.steps(state.disk, state.processes[who], who)
        return [(op, State(disk, (*before, local, *after))) for op, disk, local in steps]

    def steps(self, disk: Disk, process: Process, who: int) -> list[Step]:
        """The same for the folder and the process alone: it knows of the others only what they leave in the folder."""
        if process.at == "ended":
            return []
        step: Callable[[Disk, Process, Attempt], list[Step]] = getattr(self, "_" + process.at)
        return step(disk, process, self.attempts[who])

    def _arrive(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        """A process that is new lists the folder and finishes whatever record it finds, valid or void."""
        for value in sorted(disk.records):
            return [(("list",), disk, Process("finish", None, value, "arrive"))]
        receipt = disk.receipt
        if self.rules.eager or receipt is None or receipt.token == "o" or not outputs_are_there(disk, receipt):
            return [(("list",), disk, START)]
        lies = any(path in dict(disk.finals) for path in receipt.superseded)
        left = disk.claim or (self.rules.tidy_superseded and lies)
        tidy = self._tidied(disk, receipt, disk.claim) if left else GIVE_BACK
        return [(("list",), disk._replace(claim=(me.token,)), tidy)]

    def _claim(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        """Takes it from whoever has it, presumed dead."""
        local = Process("first_receipt", predecessors=disk.claim)
        return [(("claim", me.token), disk._replace(claim=(*disk.claim, me.token)), local)]

    def _first_receipt(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        return [(("read", "receipt"), disk, p._replace(at="first_record", receipt=disk.receipt))]

    def _first_record(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        generation = generation_of(p.receipt) + 1
        value = record_of(disk, generation)
        if value is None:
            return [(("read", f"record {generation}"), disk, self._decided(disk, p, p.receipt, me))]
        local = p._replace(at="finish", receipt=None, value=value, then="second_receipt")
        if not self.rules.receipt_after_record:
            local = self._publishing(local)
        return [(("read", f"record {generation}"), disk, local)]

    def _second_receipt(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        return [(("read", "receipt"), disk, self._decided(disk, p, disk.receipt, me))]

    def _decided(self, disk: Disk, p: Process, receipt: Receipt | None, me: Attempt) -> Process:
        """Whether the shard is to be done: there is no receipt, it is of other options, or its outputs are gone."""
        if not self.rules.eager and receipt is not None and receipt.token != "o" and outputs_are_there(disk, receipt):
            return self._tidied(disk, receipt, p.predecessors)
        return p._replace(at="write", receipt=receipt, todo=tuple((path, me.token) for path in me.outputs))

    def _write(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        """Step 1: the outputs under temporary names."""
        file, rest = p.todo[0], p.todo[1:]
        local = p._replace(todo=rest) if rest else self._after_writing(p, me)
        op = ("create", temporary(*file))
        return [(op, disk._replace(temporaries=disk.temporaries | {file}), local)]

    def _after_writing(self, p: Process, me: Attempt) -> Process:
        last = p.receipt
        before = (*last.outputs, *last.superseded) if last else ()
        own = Receipt(me.token, generation_of(last) + 1, me.outputs, tuple(p for p in before if p not in me.outputs))
        return p._replace(at="look", receipt=own, todo=(), paths=before)

    def _look(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        """The listing of the folders: one step, as the first listing's time is what counts."""
        found = {file for file in disk.temporaries if file[0] in (*me.outputs, *p.paths)}
        found |= {(OLD + path, by) for path, _, by in disk.aside if path in (*me.outputs, *p.paths)}
        found |= {(PREPARED, receipt.token) for receipt in disk.prepared}
        others = frozenset(file for file in found if file[1] != me.token)
        return [(("look",), disk, p._replace(at="holds", found=others))]

    def _holds(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        held = not self.rules.check_claim or disk.claim[-1:] == (me.token,)
        local = p._replace(at="prepare") if held else self._discarding(me)
        return [(("holds",), disk, local)]

    def _prepare(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        assert p.receipt is not None
        disk = disk._replace(prepared=disk.prepared | {p.receipt})
        return [(("create", temporary(PREPARED, me.token)), disk, p._replace(at="link"))]

    def _link(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        """Step 2."""
        own = p.receipt
        assert own is not None
        op = ("link", temporary(PREPARED, me.token), f"record {own.generation}")
        if own not in disk.prepared:
            return [(op, disk, p._replace(at="unprepare"))]
        there = record_of(disk, own.generation)
        if there is not None and self.rules.link_exclusive:
            return [(op, disk, p._replace(at="foreign_record"))]
        records = (disk.records - {there}) | {own} if there else disk.records | {own}
        return [(op, disk._replace(records=records), p._replace(at="finish", value=own, then="outcome"))]

    def _foreign_record(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        assert p.receipt is not None
        value = record_of(disk, p.receipt.generation)
        local = p._replace(at="link") if value is None else p._replace(at="finish", value=value, then="outcome")
        return [(("read", f"record {p.receipt.generation}"), disk, local)]

    # ---- steps 3 and 4

    def _finish(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        value = p.value
        assert value is not None
        op = ("read", "receipt")
        if self.rules.check_void and generation_of(disk.receipt) >= value.generation:
            return [(op, disk, p._replace(at="unlink_record"))]
        return [(op, disk, self._publishing(p))]

    def _publishing(self, p: Process) -> Process:
        assert p.value is not None
        names = [(path, p.value.token) for path in p.value.outputs]
        prepared = (PREPARED, p.value.token)
        return p._replace(at="publish", todo=(*names, prepared) if self.rules.receipt_last else (prepared, *names))

    def _publish(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        value, file, rest = p.value, p.todo[0], p.todo[1:]
        assert value is not None
        local = p._replace(todo=rest) if rest else p._replace(at="unlink_record", todo=())
        path, token = file
        if path == PREPARED:
            op = ("rename", temporary(PREPARED, token), "receipt")
            for receipt in disk.prepared:
                if receipt.token == token:
                    if token == me.token and p.then == "outcome":
                        local = local._replace(then="won")  # nobody else can have put it there
                    disk = disk._replace(prepared=disk.prepared - {receipt}, receipt=receipt)
        else:
            op = ("rename", temporary(path, token), path)
            if file in disk.temporaries:
                finals = dict(disk.finals) | {path: token}
                disk = disk._replace(temporaries=disk.temporaries - {file}, finals=tuple(sorted(finals.items())))
        return [(op, disk, local)]

    def _unlink_record(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        assert p.value is not None
        generation = p.value.generation
        there = record_of(disk, generation)
        after = disk._replace(records=disk.records - {there}) if there else disk
        local = p._replace(at=p.then, value=None, then="")
        if p.then == "won":
            local = self._clearing(after, p, me)
        elif p.then == "left_records":
            local = self._after_records(local)
        return [(("unlink", f"record {generation}"), after, local)]

    # ---- afterwards

    def _outcome(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        op = ("read", "receipt")
        if disk.receipt is None or disk.receipt.token != me.token:
            return [(op, disk, p._replace(at="unprepare"))]
        return [(op, disk, self._clearing(disk, p, me))]

    def _unprepare(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        prepared = frozenset(receipt for receipt in disk.prepared if receipt.token != me.token)
        return [(("unlink", temporary(PREPARED, me.token)), disk._replace(prepared=prepared), self._discarding(me))]

    def _discarding(self, me: Attempt) -> Process:
        return Process("discard", todo=tuple((path, me.token) for path in me.outputs))

    def _discard(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        file, rest = p.todo[0], p.todo[1:]
        local = p._replace(todo=rest) if rest else Process("give_back")
        return [(("unlink", temporary(*file)), disk._replace(temporaries=disk.temporaries - {file}), local)]

    def _clearing(self, disk: Disk, p: Process, me: Attempt) -> Process:
        """The winner clears away what it found, and whatever those it took the claim from have written since."""
        own = p.receipt
        assert own is not None
        groups = []
        for places in ({*me.outputs, *p.paths}, {PREPARED}):
            names = {file for file in p.found if file[0].removeprefix(OLD) in places}
            groups.append(tuple(sorted(names | {(place, token) for place in places for token in p.predecessors})))
        groups = [group for group in groups if group]
        local = Process("clear", own, groups=tuple(groups), sources=p.predecessors)
        return local if local.groups else self._tidied(disk, own, p.predecessors)

    def _clear(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        """Within a group in any order; the search takes the first."""
        steps = []
        for file in p.groups[0]:
            path, token = file
            group = tuple(other for other in p.groups[0] if other != file)
            local = p._replace(groups=(group, *p.groups[1:]) if group else p.groups[1:])
            after = without(disk, path, token)
            assert p.receipt is not None
            local = local if local.groups else self._tidied(after, p.receipt, p.sources)
            steps.append((("unlink", temporary(path, token)), after, local))
        return steps

    def _tidied(self, disk: Disk, receipt: Receipt, sources: tuple[str, ...]) -> Process:
        """Where others had the claim before, the records that they may have left; then what was superseded."""
        left = tuple(str(record.generation) for record in sorted(disk.records, key=generation_of)) if sources else ()
        return self._after_records(Process("left_records", receipt, paths=left, sources=sources))

    def _left_records(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        """In any order; the search takes the first."""
        steps: list[Step] = []
        for number in p.paths:
            local = p._replace(paths=tuple(other for other in p.paths if other != number))
            value = record_of(disk, int(number))
            if value is None:  # somebody has finished it since the listing
                local = self._after_records(local)
            else:
                local = local._replace(at="finish", value=value, then="left_records")
            steps.append((("read", f"record {number}"), disk, local))
        return steps

    def _after_records(self, p: Process) -> Process:
        assert p.receipt is not None
        if p.paths:
            return p
        return Process("still_mine", p.receipt, sources=p.sources) if p.receipt.superseded else GIVE_BACK

    def _still_mine(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        own = p.receipt
        assert own is not None
        if disk.receipt is None or disk.receipt.token != own.token:
            return [(("read", "receipt"), disk, GIVE_BACK)]
        todo = tuple((path, "") for path in own.superseded)
        if not self.rules.put_aside:
            return [(("read", "receipt"), disk, Process("supersede", todo=todo))]
        return [(("read", "receipt"), disk, Process("put_aside", own, todo=todo, sources=p.sources))]

    def _supersede(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        """Without a name of one's own in between: an error."""
        (path, _), rest = p.todo[0], p.todo[1:]
        finals = tuple(pair for pair in disk.finals if pair[0] != path)
        return [(("unlink", path), disk._replace(finals=finals), p._replace(todo=rest) if rest else GIVE_BACK)]

    def _put_aside(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        """What was superseded, then what the dead had put aside of it, under a name of one's own."""
        (path, source), rest = p.todo[0], p.todo[1:]
        op = ("rename", temporary(OLD + path, source) if source else path, temporary(OLD + path, me.token))
        made_by = aside(disk, path, source) if source else dict(disk.finals).get(path)
        if made_by is not None:
            if source:
                disk = disk._replace(aside=disk.aside - {(path, made_by, source)})
            else:
                disk = disk._replace(finals=tuple(pair for pair in disk.finals if pair[0] != path))
            disk = disk._replace(aside=disk.aside | {(path, made_by, me.token)})
            p = p._replace(paths=(*p.paths, path))
        if rest:
            return [(op, disk, p._replace(todo=rest))]
        if p.paths:
            first = "next_record" if self.rules.record_before_receipt else "newest"
            return [(op, disk, p._replace(at=first, todo=()))]
        return [(op, disk, self._next_source(p))]

    def _next_source(self, p: Process) -> Process:
        own = p.receipt
        assert own is not None
        if not p.sources:
            return GIVE_BACK
        todo = tuple((path, p.sources[0]) for path in own.superseded)
        return Process("put_aside", own, todo=todo, sources=p.sources[1:])

    def _next_record(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        newest = p.found_receipt or p.receipt
        generation = generation_of(newest) + 1
        local = p._replace(at="newest", value=record_of(disk, generation))
        if not self.rules.record_before_receipt:
            local = self._removing(disk, local, me)
        return [(("read", f"record {generation}"), disk, local)]

    def _newest(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        """The receipt after the record of the next commit: where it is newer, again from there."""
        newest = p.found_receipt or p.receipt
        local = p._replace(found_receipt=disk.receipt)
        if not self.rules.record_before_receipt:
            return [(("read", "receipt"), disk, local._replace(at="next_record"))]
        if generation_of(disk.receipt) > generation_of(newest):
            return [(("read", "receipt"), disk, local._replace(at="next_record", value=None))]
        return [(("read", "receipt"), disk, self._removing(disk, local, me))]

    def _removing(self, disk: Disk, p: Process, me: Attempt) -> Process:
        """It is settled what is named: a file that is one of those is put back, the others go."""
        named = frozenset((path, it.token) for it in (p.found_receipt, p.value) if it for path in it.outputs)
        todo = tuple((path, "") for path in p.paths)
        return self._next_of(disk, p._replace(todo=todo, paths=(), value=None, found_receipt=None, found=named), me)

    def _next_of(self, disk: Disk, p: Process, me: Attempt) -> Process:
        path, _ = p.todo[0]
        return p._replace(at="put_back" if (path, aside(disk, path, me.token)) in p.found else "remove")

    def _put_back(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        path, _ = p.todo[0]
        finals, made_by = dict(disk.finals), aside(disk, path, me.token)
        if made_by is not None:
            finals.setdefault(path, made_by)
        after = disk._replace(finals=tuple(sorted(finals.items())))
        return [(("link", temporary(OLD + path, me.token), path), after, p._replace(at="remove"))]

    def _remove(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        (path, _), rest = p.todo[0], p.todo[1:]
        after = without(disk, OLD + path, me.token)
        local = self._next_of(after, p._replace(todo=rest), me) if rest else self._next_source(p)
        return [(("unlink", temporary(OLD + path, me.token)), after, local)]

    def _give_back(self, disk: Disk, p: Process, me: Attempt) -> list[Step]:
        claim = () if disk.claim[-1:] == (me.token,) else disk.claim
        return [(("give back", me.token), disk._replace(claim=claim), ENDED)]
