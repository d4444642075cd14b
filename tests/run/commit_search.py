"""A search through every state that attempts at one shard can reach in the model of the commit protocol.

A process that is killed is one that takes no further step, which nobody else can tell from a slow one.  So every
reachable state, and not only those where all have ended, is one that a kill of all the rest may leave, and each kill
between two steps is covered without a step of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.run.commit_disk import Disk, Op, generation_of, outputs_are_there, record_of
from tests.run.commit_model import Attempt, Model, Process, Rules, State


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


def search(model: Model, successor: Attempt) -> Searched:
    """Go through every state.  Each is one in which all the rest may have been killed: there a successor comes alone.

    Raises Violation.
    """
    came_from: dict[State, tuple[State, str, Op] | None] = {model.start: None}
    pending, folders = [model.start], set()
    alike = len({attempt.outputs for attempt in model.attempts}) == 1
    while pending:
        state = pending.pop()
        if wrong := check_reader(state.disk) or check_survivors(state):
            raise Violation(_story(came_from, state, wrong))
        if state.disk not in folders:
            folders.add(state.disk)
            if wrong := _succeed(model, state.disk, successor):
                raise Violation(_story(came_from, state, f"the rest is killed; after a successor {wrong}"))
        for who, process in enumerate(state.processes):
            if alike and who and process.at == "claim" and state.processes[who - 1].at == "claim":
                break  # attempts that differ in their names alone begin in one order
            for op, after in model.options(state, who)[:1]:
                seen = after in came_from
                if not seen:
                    came_from[after] = (state, model.attempts[who].token, op)
                    pending.append(after)
                if state.disk.receipt and generation_of(after.disk.receipt) < state.disk.receipt.generation:
                    wrong = f"then {model.attempts[who].token} puts an older receipt back"
                    raise Violation(_story(came_from, state, wrong))
    return Searched(len(came_from), len(folders))


def _succeed(model: Model, disk: Disk, successor: Attempt) -> str:
    """What is wrong with the folder after a successor ran alone on it; of either kind."""
    for eager in (False, True):
        if wrong := check_end(after_successor(disk, successor, replace(model.rules, eager=eager)), hidden=eager):
            return wrong
    return ""


def after_successor(disk: Disk, successor: Attempt, rules: Rules) -> Disk:
    alone = Model((successor,), rules)
    state = State(disk, (Process("arrive"),))
    while options := alone.options(state, 0):
        state = options[0][1]
    return state.disk


def _story(came_from: dict[State, tuple[State, str, Op] | None], state: State, wrong: str) -> str:
    lines: list[str] = []
    while (step := came_from[state]) is not None:
        state, token, op = step
        lines.append(f"{token}: {' '.join(op)}")
    return "\n".join([*reversed(lines), wrong])
