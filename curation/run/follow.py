"""Follows the previous stage: which of its shards are ready, which will come, and when no more will come.

A follower waits for the receipts of the shards that the runs upstream set out to do (``planned``).  Every few seconds
it lists each bucket in which it waits for a receipt, and reads only receipts that are new.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from curation.errors import UsageError, redact
from curation.run.claims import COUNTER_DIGITS
from curation.run.inputs import numbered, receipts_of
from curation.run.ledger import Ledger
from curation.run.planned import Plan
from curation.shards import Shard, bucket_of, discover, id_of_record, select
from curation.storage.files import is_pattern

logger = logging.getLogger("curation")

_LOOK_S, _MAX_LOOK_S = 1.0, 10.0  # time between two looks: while shards arrive, and while none do
_PAUSES = 5  # the pause after a look is at least so many times as long as the look took
_MAX_CREDIT_S = 30.0  # longest gap between two looks that counts as idle: this process may have been suspended
_WATCHED_BEATS = 16
_LOOKED_AT_AGAIN = 16  # receipts read again at each look although their inode is known: inode numbers are reused
_MAX_LOST = 5000  # lost shards that are searched for at one look
_MAX_DEPTH = 8  # stages before the previous one that are searched


@dataclass(frozen=True, slots=True)
class Follows:
    """What a stage follows: the stage that makes its input, and the folder where that stage's outputs lie.

    suffix: a shard is the file ``<id><suffix>`` in that folder; None if the stage finds its shards elsewhere and
    works on those only.
    """

    stage: str
    folder: Path
    suffix: str | None = None

    def discover(self) -> list[Shard]:
        """The shards that exist now, possibly none.  Raises UsageError if the folder's path is not a folder."""
        if not self.folder.is_dir() and (self.folder.exists() or is_pattern(str(self.folder))):
            raise UsageError(f"--follow waits for a folder of {self.stage}, and {self.folder} is no folder")
        return discover(str(self.folder), self.suffix or "", may_be_empty=True) if self.folder.is_dir() else []


def followed_folder(flag: str, sources: Sequence[str], inside: str, *, waits: bool) -> Path:
    """The folder of the previous stage's files among the sources of a stage.

    Args:
        flag: The option that names the sources.
        sources: Its values.
        inside: What the folder is called inside that of a whole dataset, which may be given instead.
        waits: Whether the stage follows; otherwise the folder is the first source, whatever that is.

    Raises:
        UsageError: A follower is to wait for several folders.
    """
    folder = Path(sources[0])
    if not waits:
        return folder
    if "://" in sources[0]:
        raise UsageError(
            f"--follow waits for receipts on this filesystem, and {flag} {redact(sources[0])} is a URL: give the "
            "folder that the previous stage got as --work_dir"
        )
    if len(sources) > 1:
        raise UsageError(f"--follow waits for one folder, and {flag} names {len(sources):,}: start one run for each")
    if not (folder / "_receipts").is_dir() and (folder / inside / "_receipts").is_dir():
        logger.warning(f"{flag} {folder}: its folder {inside} is followed")
        return folder / inside
    return folder


class Follower:
    """What the previous stage has still to publish, as one process of this stage sees it.  Not thread-safe.

    shards: by id, all known shards of this run; it grows.
    has_grown: set when upstream has planned more shards; the caller clears it after it has read ``planned`` again.
    expecting: whether more shards may become ready.  gave_up: whether the wait ended because upstream was idle.
    """

    def __init__(
        self, follows: Follows, found: Sequence[Shard], choice: str | None, idle_s: float, lease_s: float
    ) -> None:
        self.shards: dict[str, Shard] = {}
        self.has_grown = False
        self.expecting = True
        self.gave_up = False
        self.missing = 0  # shards that it no longer waits for
        self._follows = follows
        self._found = {shard.id: shard for shard in found}
        self._choice = choice
        self._idle_s = idle_s
        self._lease_s = lease_s
        self._upstream = _Records(follows.stage, follows.folder)
        self._waiting: dict[str, set[str]] = {}  # bucket → shards whose new receipt is not there yet
        self._seen: dict[str, int] = {}  # shard → inode of its older receipt
        self._lost: set[str] = set()  # shards that upstream cannot do, because an earlier stage failed on them
        self._pause_s = _LOOK_S
        self._looked = time.monotonic()
        self._next_look = self._looked
        self._idle_for = 0.0
        self._extend(list(found))
        self._extend_by_plan()

    def planned(self) -> list[str]:
        """The shards of this run that upstream has planned, so that they will get a receipt."""
        return sorted(self.shards.keys() & self._upstream.planned)

    @property
    def whom(self) -> str:
        """What messages call the stage that it follows: ``stage 01``."""
        return numbered(self._follows.stage) or self._follows.stage

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def settled(self, shard: Shard) -> bool:
        """Whether upstream has finished a shard; if not, the follower waits for it again."""
        if not self.expecting or self._upstream.fate(shard.id):
            self._seen.pop(shard.id, None)
            return True
        self._waiting.setdefault(bucket_of(shard.id), set()).add(shard.id)
        return False

    def poll(self) -> list[Shard]:
        """Return shards with a new upstream receipt, if it is time to look again.  At the end return all the others,
        which upstream will not do."""
        now = time.monotonic()
        if not self.expecting or now < self._next_look:
            return []
        # First, so that the records of a process that ends meanwhile are still seen.
        alive = self._upstream.look_for_life(self._lease_s)
        grown = self._extend_by_plan()
        arrived, news = self._arrivals()
        moved = grown or news or self._upstream.moved
        self._idle_for = 0.0 if moved else self._idle_for + min(now - self._looked, _MAX_CREDIT_S)
        if not arrived and not alive and self._is_complete():
            return self._end()
        if self._idle_for >= self._idle_s:
            self._give_up()
        self._looked = now
        self._pause_s = _LOOK_S if grown or news else min(self._pause_s * 1.5, _MAX_LOOK_S, self._idle_s / 4)
        took = time.monotonic() - now  # which grows with the number of shards that are waited for
        self._next_look = now + took + max(self._pause_s, _PAUSES * took) * random.uniform(0.8, 1.2)
        return arrived

    # ---- the list of shards

    def _extend_by_plan(self) -> bool:
        grown = self._upstream.look_at_plan()
        if grown:
            self._extend(self._candidates())
            self.has_grown = True
        return grown

    def _candidates(self) -> list[Shard]:
        candidates = dict(self._found)
        if self._follows.suffix is not None:
            for shard_id in self._upstream.planned:
                path = self._follows.folder / f"{shard_id}{self._follows.suffix}"
                candidates.setdefault(shard_id, Shard(shard_id, path))
        return sorted(candidates.values(), key=lambda shard: shard.id)

    def _extend(self, candidates: list[Shard]) -> None:
        for shard in select(candidates, self._choice, may_be_empty=True):
            if shard.id not in self.shards:
                self.shards[shard.id] = shard
                self._waiting.setdefault(bucket_of(shard.id), set()).add(shard.id)

    # ---- looking

    def _arrivals(self) -> tuple[list[Shard], bool]:
        """Shards whose receipts should be read, and whether one of the receipts is new."""
        receipts, news = self._upstream.receipts, False
        arrived: list[Shard] = []
        if receipts is None:
            return arrived, news
        again = set(random.sample(sorted(self._seen), min(_LOOKED_AT_AGAIN, len(self._seen))))
        for bucket, waiting in self._waiting.items():
            with contextlib.suppress(OSError), os.scandir(receipts / bucket) as entries:  # the next look may succeed
                for entry in entries:
                    shard_id, inode = id_of_record(entry.name[:-5]), entry.inode()
                    if shard_id not in waiting or not entry.name.endswith(".json"):
                        continue
                    if self._seen.get(shard_id) != inode:  # a rename replaces a receipt
                        self._seen[shard_id] = inode
                        news = True
                    elif shard_id not in again:
                        continue
                    waiting.discard(shard_id)
                    arrived.append(self.shards[shard_id])
        self._waiting = {bucket: waiting for bucket, waiting in self._waiting.items() if waiting}
        return sorted(arrived, key=lambda shard: shard.id), news

    def _is_complete(self) -> bool:
        """Whether every planned shard has its receipt, or will never have one."""
        planned = self._upstream.planned
        looked_at = 0
        for waiting in self._waiting.values():
            for shard_id in (waiting & planned) - self._lost:
                looked_at += 1
                if looked_at > _MAX_LOST or not self._upstream.is_lost(shard_id):
                    return False
                self._lost.add(shard_id)
        return bool(planned)

    def _end(self) -> list[Shard]:
        self.expecting = False
        if self._choice is not None:
            select(self._candidates(), self._choice)  # raises UsageError for a shard that does not exist
        rest = sorted(shard_id for waiting in self._waiting.values() for shard_id in waiting)
        self._waiting.clear()
        return [self.shards[shard_id] for shard_id in rest]

    def _give_up(self) -> None:
        self.expecting, self.gave_up, self.missing = False, True, self.waiting
        some = sorted(shard_id for waiting in self._waiting.values() for shard_id in waiting)[:3]
        what = f"{self.missing:,} shards are missing ({', '.join(some)}{', ...' if self.missing > 3 else ''})"
        if not self._upstream.planned:
            what = "it has written no list of planned shards"
        self._waiting.clear()
        logger.warning(
            f"no progress in {self._follows.stage} on {self._follows.folder} for {self._idle_s:g} s, and {what}"
            f": run {self._follows.stage} again with the same command, and then this stage"
        )


class _Records:
    """The records of another stage: receipts, options, plan and heartbeats.  They exist once the stage has begun.

    folder: a folder into which the stage publishes.
    """

    def __init__(self, stage: str, folder: Path) -> None:
        self.moved = False  # whether a heartbeat changed between the last two looks
        self._stage = stage
        self._folder = folder
        self._ledger: Ledger | None = None
        self._plan: Plan | None = None
        self._parents: dict[tuple[str, str], _Records] = {}
        self._beats: dict[str, bytes] = {}  # heartbeat → its counter, empty if it was not read yet
        self._last_moved = 0.0

    @property
    def receipts(self) -> Path | None:
        ledger = self._found()
        return None if ledger is None else ledger.receipts

    @property
    def planned(self) -> set[str]:
        return set() if self._plan is None else self._plan.ids

    def look_at_plan(self) -> bool:
        """Read new plans and options versions; returns whether further shards were planned."""
        ledger = self._found()
        if ledger is None or self._plan is None:
            return False
        ledger.load_options_versions()
        return self._plan.look()

    def fate(self, shard_id: str) -> str:
        """``done`` or ``failed`` if a receipt under the current options says so; empty while there is none."""
        ledger = self._found()
        if ledger is None:
            return ""
        receipt = ledger.commit(shard_id).read_receipt()
        status = receipt.get("status") if receipt else None
        if receipt is None or status not in ("done", "failed"):
            return ""
        if receipt.get("epoch") != ledger.governing(shard_id).number:
            ledger.load_options_versions()  # the receipt may be newer than the versions read so far
        return str(status) if receipt.get("epoch") == ledger.governing(shard_id).number else ""

    def is_lost(self, shard_id: str, depth: int = 0) -> bool:
        """Whether the shard failed in this or an earlier stage, so that it will get no receipt."""
        fate = self.fate(shard_id)
        if fate or self._ledger is None or self._plan is None or depth > _MAX_DEPTH:
            return fate == "failed"
        for stage, folder in self._plan.sources:
            if (stage, folder) not in self._parents:
                self._parents[stage, folder] = _Records(stage, self._ledger.root / folder)
        return any(parent._has_lost(shard_id, depth + 1) for parent in self._parents.values())

    def _has_lost(self, shard_id: str, depth: int) -> bool:
        if self._found() is None:  # its files were made elsewhere
            return False
        if self.is_lost(shard_id, depth):
            return True
        self.look_at_plan()
        return bool(self.planned) and shard_id not in self.planned and not self.fate(shard_id)

    def look_for_life(self, lease_s: float) -> bool:
        """Whether a process of the stage is running: some heartbeat has changed within the last lease.

        Sets ``moved``.  If there are many heartbeats, each call reads only some of them, in turn.
        """
        self.moved = False
        ledger = self._found()
        if ledger is None:
            return False
        folder = ledger.root / "_claims" / self._stage / "_beats"
        try:
            names = {name for name in os.listdir(folder) if name[0] != "."}
        except OSError:
            names = set()
        self.moved = not names <= self._beats.keys()  # a new process
        self._beats = {name: self._beats.get(name, b"") for name in names}
        for name in random.sample(sorted(names), min(_WATCHED_BEATS, len(names))):
            counter = _read_counter(folder / name)
            self.moved = self.moved or bool(self._beats[name] and counter and counter != self._beats[name])
            self._beats[name] = counter or self._beats[name]
        if self.moved:
            self._last_moved = time.monotonic()
        return bool(names) and time.monotonic() - self._last_moved < lease_s

    def _found(self) -> Ledger | None:
        if self._ledger is None and (receipts := receipts_of(self._folder, self._stage)) is not None:
            self._ledger = Ledger(receipts.parent.parent, self._stage, 0, {}, read_only=True)
            self._plan = Plan(self._ledger.root, self._stage)
            self._ledger.load_options_versions()
        return self._ledger


def _read_counter(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read(COUNTER_DIGITS) or b""
    except OSError:
        return b""
