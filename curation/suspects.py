"""Shards that kill their workers (a crash in a decoder, more memory than the job has): found, and tried alone at last.

A worker that is asked to end gives its claims back, so that a claim whose holder is gone tells of a crash, a kill or a
lost node.  Of several shards in one process nobody knows which was to blame: one on which two attempts in a row died
without finishing anything is therefore worked on alone, and only a third death there is laid at its door.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from curation.errors import ShardError
from curation.holders import Death

MAX_DEATHS = 3
REASON = "workers_died"
_LOOK_EVERY_S = 0.2


def fruitless(deaths: Sequence[Death], fruitful: set[str]) -> list[Death]:
    """The last deaths in a row of attempts that had begun and finished nothing.

    fruitful: the tokens of attempts that left checkpoints.
    """
    found: list[Death] = []
    for death in reversed(deaths):
        if death.token in fruitful:
            break
        if death.token:  # else it died before it could write its claim
            found.insert(0, death)
    return found


def is_suspect(deaths: Sequence[Death]) -> bool:
    """Whether the shard is to be worked on alone."""
    return len(deaths) >= MAX_DEATHS - 1


def insist_on_innocence(shard_id: str, deaths: Sequence[Death]) -> None:
    """Raise ShardError for a shard on which so many workers died that the next would die too."""
    if len(deaths) >= MAX_DEATHS and any(death.alone for death in deaths):
        who = "; ".join(_describe(death) for death in deaths)
        raise ShardError(f"shard {shard_id}: {len(deaths)} workers died on it one after the other ({who})", REASON)


def _describe(death: Death) -> str:
    ids = death.slurm
    job = ids.get("job_id", "")
    if ids.get("array_job_id") and ids.get("array_task_id"):
        job = f"{ids['array_job_id']}_{ids['array_task_id']}"
    where = f"{death.host or 'an unknown host'}, pid {death.pid}"
    return f"{where}, SLURM job {job}" if job else where


class Room:
    """Shards that one process works on: many at once, or a single one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False
        self._wanting_alone = 0

    @contextlib.contextmanager
    def enter(self, *, alone: bool, check: Callable[[], None]) -> Iterator[None]:
        """Wait until there is room; ``check`` is called meanwhile, and may raise to give up."""
        with self._changed:
            self._wanting_alone += alone
            try:
                while self._alone or (self._inside if alone else self._wanting_alone):
                    check()
                    self._changed.wait(_LOOK_EVERY_S)
            finally:
                self._wanting_alone -= alone
                self._changed.notify_all()
            self._inside += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._alone = False
                self._changed.notify_all()
