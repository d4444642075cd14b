"""A search through every state that attempts at one shard can reach in the model of the commit protocol.

A process that is killed is one that takes no further step, which nobody else can tell from a slow one.  So every
reachable state, and not only those where all have ended, is one that a kill of all the rest may leave, and each kill
between two steps is covered without a step of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tests.run.commit_disk import Disk, Op, generation_of, outputs_are_there, record_of
from tests.run.commit_model import START, Attempt, Model, Process, Rules, State


class Violation(AssertionError):
    """What went wrong, and the operations that lead there."""


def check_reader(disk: Disk) -> str:
    """What must hold at every moment: the receipt's outputs are there, unless a record says that they are being
    replaced, or one was put aside by an attempt that is about to find out that it is named.  What is wrong, or nothing.
    """
    receipt = disk.receipt
    if receipt is None or record_of(disk, receipt.generation + 1) is not None:
        return ""
    there = {*disk.finals, *((path, token) for path, token, _ in disk.aside)}
    if all((path, receipt.token) in there for path in receipt.outputs):
        return ""
    return f"the receipt is {receipt.token}'s, generation {receipt.generation}, and on disk is {dict(disk.finals)}"


def check_survivors(state: State) -> str:
    """What must hold where nobody was killed: nothing that the newest receipt names is missing, for no successor need
    come.  What is wrong, or nothing."""
    receipt = state.disk.receipt
    if receipt is None or any(process.at != "ended" for process in state.processes):
        return ""
    if outputs_are_there(state.disk, receipt) and not state.disk.aside:
        return ""
    return f"all have ended, the receipt is {receipt.token}'s, and on disk is {dict(state.disk.finals)}"


def check_end(disk: Disk, *, hidden: bool) -> str:
    """What must hold when the last successor has ended.  hidden: temporary files must be gone as well."""
    if disk.receipt is None:
        return "there is no receipt"
    wanted = tuple(sorted((path, disk.receipt.token) for path in disk.receipt.outputs))
    if disk.finals != wanted:
        return f"the receipt is {disk.receipt.token}'s, and on disk is {dict(disk.finals)}"
    if disk.records:
        return f"a record is left: {sorted(disk.records)}"
    if hidden and (disk.temporaries or disk.prepared or disk.aside):
        return f"left behind: {sorted(disk.temporaries)} {sorted(disk.prepared)} {sorted(disk.aside)}"
    return ""


@dataclass(frozen=True)
class Searched:
    states: int
    folders: int  # different folders that a successor came to


Place = tuple[int, ...]  # a state: the number of its folder, then those of its processes


class Move(NamedTuple):
    """What a process does next in a folder.  Wherever the others are meanwhile, it is the same."""

    op: Op
    disk: int
    process: int
    goes_back: bool  # it puts an older receipt back


class Numbers:
    """A number for each folder and each process that states are made of: there are far fewer of them than states.

    So the model is asked once for what a process does next in a folder.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._numbers: dict[Disk | Process, int] = {}
        self._values: list[Any] = []
        self._moves: dict[tuple[int, int, int], Move | None] = {}

    def of(self, value: Disk | Process) -> int:
        if value not in self._numbers:
            self._numbers[value] = len(self._values)
            self._values.append(value)
        return self._numbers[value]

    def place(self, state: State) -> Place:
        return tuple(self.of(value) for value in (state.disk, *state.processes))

    def state(self, place: Place) -> State:
        disk, *processes = (self._values[number] for number in place)
        return State(disk, tuple(processes))

    def moves(self, place: Place) -> list[Move | None]:
        """One for each process; None for one that has ended."""
        disk, found = place[0], []
        for who, process in enumerate(place[1:]):
            key = (who, disk, process)
            if key not in self._moves:
                self._moves[key] = self._move(*key)
            found.append(self._moves[key])
        return found

    def _move(self, who: int, disk: int, process: int) -> Move | None:
        before = self._values[disk]
        for op, after, local in self._model.steps(before, self._values[process], who):
            goes_back = generation_of(after.receipt) < generation_of(before.receipt)
            return Move(op, self.of(after), self.of(local), goes_back)
        return None


def search(model: Model, successor: Attempt) -> Searched:
    """Go through every state.  Each is one in which all the rest may have been killed: there a successor comes alone.

    Raises Violation.
    """
    numbers = Numbers(model)
    first, new = numbers.place(model.start), numbers.of(START)
    came_from: dict[Place, Place | None] = {first: None}
    pending, folders = [first], set()
    alike = len({attempt.outputs for attempt in model.attempts}) == 1
    while pending:
        place = pending.pop()
        moves = numbers.moves(place)
        wrong = "" if any(moves) else check_survivors(numbers.state(place))
        if place[0] not in folders:
            folders.add(place[0])
            disk = numbers.state(place).disk
            wrong = check_reader(disk) or wrong or _succeed(model, disk, successor)
        if wrong:
            raise Violation(_story(model, numbers, came_from, place, wrong))
        for who, move in enumerate(moves):
            if alike and who and place[who + 1] == new and place[who] == new:
                break  # attempts that differ in their names alone begin in one order
            if move is None:
                continue
            after = _after(place, who, move)
            if after not in came_from:
                came_from[after] = place
                pending.append(after)
            if move.goes_back:
                wrong = f"then {model.attempts[who].token} puts an older receipt back"
                raise Violation(_story(model, numbers, came_from, place, wrong))
    return Searched(len(came_from), len(folders))


def _after(place: Place, who: int, move: Move) -> Place:
    return (move.disk, *place[1 : who + 1], move.process, *place[who + 2 :])


def _succeed(model: Model, disk: Disk, successor: Attempt) -> str:
    """What is wrong with the folder after a successor ran alone on it; of either kind."""
    for eager in (False, True):
        if wrong := check_end(after_successor(disk, successor, replace(model.rules, eager=eager)), hidden=eager):
            return f"the rest is killed; after a successor {wrong}"
    return ""


def after_successor(disk: Disk, successor: Attempt, rules: Rules) -> Disk:
    alone = Model((successor,), rules)
    state = State(disk, (Process("arrive"),))
    while options := alone.options(state, 0):
        state = options[0][1]
    return state.disk


def _story(model: Model, numbers: Numbers, came_from: dict[Place, Place | None], place: Place, wrong: str) -> str:
    lines: list[str] = []
    while (before := came_from[place]) is not None:
        who, op = next(
            (who, move.op)
            for who, move in enumerate(numbers.moves(before))
            if move is not None and _after(before, who, move) == place
        )
        lines.append(f"{model.attempts[who].token}: {' '.join(op)}")
        place = before
    return "\n".join([*reversed(lines), wrong])
