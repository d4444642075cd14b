"""The files of one shard as the model of the commit protocol sees them."""

from __future__ import annotations

from typing import NamedTuple

Op = tuple[str, ...]  # what is done, to which files: ("rename", "tmp A a", "A")
OLD = "old "  # before a path: what was put aside there
PREPARED = "R"  # stands for the prepared receipt among the places that are cleared


class Receipt(NamedTuple):
    token: str
    generation: int
    outputs: tuple[str, ...]
    superseded: tuple[str, ...]


class Disk(NamedTuple):
    """What others can see.  Files of which each attempt has its own are named by its token."""

    finals: tuple[tuple[str, str], ...]  # path, token of the attempt that made what lies there; sorted
    temporaries: frozenset[tuple[str, str]]  # path, token
    prepared: frozenset[Receipt]
    receipt: Receipt | None
    records: frozenset[Receipt]  # linked under their generation
    claim: tuple[str, ...]  # predecessors and the holder, last; empty: free
    aside: frozenset[tuple[str, str, str]] = frozenset()  # path, token of the attempt that made it, and of who moved it


def generation_of(receipt: Receipt | None) -> int:
    return receipt.generation if receipt else 0


def record_of(disk: Disk, generation: int) -> Receipt | None:
    return next((record for record in disk.records if record.generation == generation), None)


def outputs_are_there(disk: Disk, receipt: Receipt) -> bool:
    finals = dict(disk.finals)
    return all(finals.get(path) == receipt.token for path in receipt.outputs)


def without(disk: Disk, path: str, token: str) -> Disk:
    if path == PREPARED:
        return disk._replace(prepared=frozenset(r for r in disk.prepared if r.token != token))
    if path.startswith(OLD):
        gone = {file for file in disk.aside if (OLD + file[0], file[2]) == (path, token)}
        return disk._replace(aside=disk.aside - gone)
    return disk._replace(temporaries=disk.temporaries - {(path, token)})


def aside(disk: Disk, path: str, by: str) -> str | None:
    """Which attempt made the file that ``by`` put aside."""
    return next((token for name, token, mover in disk.aside if (name, mover) == (path, by)), None)


def temporary(path: str, token: str) -> str:
    return f"{path} {token}" if path.startswith(OLD) else f"tmp {path} {token}"
