"""Shows the progress of a run: a bar on a terminal, or a line from time to time in a log.

Both tell how far the run is, how long it will still take, and what this process does when it is not working on samples:
it loads a model, waits for another stage or a model server, or leaves the last shards to other workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import orjson

from curation.cluster import WORKER_VARIABLE, note_progress
from curation.jsonio import clean_text
from curation.options import logger, on_terminal
from curation.shards import bucket_of, id_of_record

FIRST_LINES_S = (10.0, 30.0, 60.0)  # after the begin of a run: a log shows early what its job does
LINE_EVERY_S = 60.0  # after these
SAY_WAITING_AFTER_S = 2.0  # what takes less is not worth a line
REPEAT_S = 300.0  # a line that would say the same again
RATE_WINDOW_S = 600.0  # over which the recent rate is measured
TICK_S, _DRAW_S = 1.0, 0.1  # of the thread: for a log, and for a bar
_POINT_EVERY_S = 5.0
_LOOKING_WORKERS = 16  # in a larger job each worker lists receipts less often, so that the filesystem has the same load
_LOOK_SHARE = 0.005  # of a process's time, which listing the receipts of very many shards may take
_MAX_LOOK_EVERY_S = 600.0
_FEW_SHARDS, _LONG_ENOUGH_S = 2, 60.0  # one small shard that took no time says nothing of the others
_MIN_BETWEEN_LOOKS_S = 30.0  # between the first and the last of the listings from which a rate is taken


COMPUTED = "computed"  # what a worker tells its parent beside counts


_WORDING = {  # result of a shard → its words in the last line, in this order
    "worked": "done",
    "done": "were done before",
    "failed": "failed",
    "blocked": "blocked",
    "left": "left",
    "missing": "missing upstream",
    "others": "in other hands",
}


def _log_to_stderr() -> None:
    """Make the log write to the current ``sys.stderr``, which a progress bar replaces while it is shown."""
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


class Tally:
    """Counts the results of shards and samples in this process.  Thread-safe.

    tell: a pipe into which the counts of each shard are written as well, so that the parent of this process can add
        them up (``TalliesOfWorkers``); None if nobody reads.
    """

    def __init__(self, tell: int | None = None) -> None:
        self._shards: Counter[str] = Counter()
        self._samples: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._pipe = tell

    def __getitem__(self, what: str) -> int:
        return self._shards[what]

    def shards(self, what: str, count: int = 1) -> None:
        """worked | done | failed | blocked | left | missing | others"""
        if what in ("worked", "failed"):
            note_progress()
        with self._lock:
            self._shards[what] += count

    def samples(self, counts: Mapping[str, int], notes: Mapping[str, int], shard_id: str) -> None:
        """Count the samples of a shard that is done.

        Args:
            counts: in, kept, dropped and failed.
            notes: The numbers of its receipt's notes that are added up (``Stage.sums``).
            shard_id: The shard.
        """
        with self._lock:
            self._samples.update(counts)
            self._notes.update(notes)
        if self._pipe is not None:
            with contextlib.suppress(OSError):  # the parent is gone, or reads nothing any more
                os.write(self._pipe, orjson.dumps([counts, notes, shard_id]) + b"\n")

    def tell_of_failed_device(self, *, computed: bool) -> None:
        """Tell the parent that this process ends because its device has failed.

        computed: whether the device had worked before: something was published or checkpointed.
        """
        if self._pipe is not None and computed:
            with contextlib.suppress(OSError):
                os.write(self._pipe, orjson.dumps(COMPUTED) + b"\n")

    def text(self, seconds: float, result: Callable[[Mapping[str, int]], str]) -> str:
        """``3 done, 2 failed; samples: 30 in, 20 kept, 8 dropped, 2 failed (5.0/s); 20 captioned``

        result: turns the sums of counts and notes into words (``Stage.result``).
        """
        text = ", ".join(f"{self._shards[what]} {words}" for what, words in _WORDING.items() if self._shards[what])
        if self._samples["in"]:
            text += "; samples: " + ", ".join(f"{n:,} {what}" for what, n in self._samples.items())
            text += f" ({self._samples['in'] / max(seconds, 1e-9):,.1f}/s)"
        return "; ".join(filter(None, (text, result(self._notes + self._samples))))


class TalliesOfWorkers:
    """Adds up what the workers of this process have done.  They write into one pipe, a line for each shard.

    A worker that is killed has told of each shard that it finished.  Only these shards are counted: each worker sees
    every other shard as well, so that the sums of those would be wrong.
    """

    def __init__(self) -> None:
        self.tally = Tally()
        self.computed = False  # whether the device of a worker that ended has worked before it failed
        self._read_end, self.pipe = os.pipe()  # ``pipe`` is for the workers' ``Tally``
        os.set_blocking(self._read_end, False)
        os.set_blocking(self.pipe, False)  # a worker never waits for its parent
        self._rest = b""

    def read(self, progress: Progress) -> None:
        """Add up what was told since the last call, and show it."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._read_end, 1 << 16):
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    if (told := orjson.loads(line)) == COMPUTED:
                        self.computed = True
                        continue
                    counts, notes, shard_id = told
                    self.tally.shards("worked")
                    self.tally.samples(counts, notes, shard_id)
                    progress.samples_done(counts["in"])
                    progress.shard_passed(shard_id, counts["in"])

    def close(self) -> None:
        os.close(self.pipe)
        os.close(self._read_end)


class ReceiptsOfAll:
    """Which shards have a receipt, and how many got one since this process first looked, whoever wrote it.

    A look lists each bucket of receipts once and reads none of them: a commit renames a new file into place, so that
    the inode tells an old receipt from a new one.

    ids: the shards of this run.  before: those that had a receipt at the first look.  new: those that got one since.
    """

    def __init__(self, receipts: Path, ids: Collection[str]) -> None:
        self.before: set[str] = set()
        self.new: set[str] = set()
        self.workers = 0  # heartbeats
        self._looked = False
        self._receipts = receipts
        self._beats = receipts.parent.parent / "_claims" / receipts.name / "_beats"
        self._inodes: dict[str, int] = {}
        self.set_ids(ids)

    def set_ids(self, ids: Collection[str]) -> None:
        self._ids = frozenset(ids)
        self._buckets = sorted({bucket_of(shard_id) for shard_id in self._ids})

    def look(self) -> None:
        found: set[str] = set()
        for bucket in self._buckets:
            with contextlib.suppress(OSError), os.scandir(self._receipts / bucket) as entries:
                for entry in entries:
                    shard_id, inode = id_of_record(entry.name[:-5]), entry.inode()
                    if not entry.name.endswith(".json") or shard_id not in self._ids:
                        continue
                    if self._inodes.get(shard_id) != inode:
                        found.add(shard_id)
                    self._inodes[shard_id] = inode
        if self._looked:
            self.new = self.new | found  # a new set, because another thread may read the old one
        else:
            self.before, self._looked = found, True
        with contextlib.suppress(OSError):
            self.workers = sum(name[0] != "." for name in os.listdir(self._beats))


@dataclass(frozen=True, slots=True)
class Estimate:
    """How far a run is.

    Attributes:
        shards: Shards of the run that are known to be done.
        samples: Samples that this process (with its workers) has finished.
        samples_per_s: The recent rate of this process; None before there is one.
        left_s: How long the rest takes at the recent rate; None before there is one.
        others: Other processes work on the same shards.
        alone: ``left_s`` counts only what this process does, because the rate of the others is not known yet.
    """

    shards: int
    samples: int
    samples_per_s: float | None = None
    left_s: float | None = None
    others: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True)
class _Point:
    """What this process had done at a time: shards, the fraction of those in progress included, and samples."""

    time_s: float
    shards: float
    samples: int


class Pace:
    """Counts what is done in a run, and estimates how long the rest takes.  Times are monotonic.

    Not thread-safe, but ``receipts.look`` may run beside the other methods.

    Args:
        ids: The shards of the run.
        receipts: The receipts of the stage, from which the work of other processes is known; None for none.
        again: Shards that have a receipt are done again.
        workers: How many processes with a heartbeat this object counts.
    """

    def __init__(self, ids: Collection[str], receipts: ReceiptsOfAll | None, *, again: bool, workers: int) -> None:
        self.total = len(ids)
        self.receipts = receipts
        self._workers = workers
        self._receipts_count = not again  # a shard with a receipt is taken for done until one proves to be pending
        self._passed: set[str] = set()
        self._known: set[str] = set()  # shards that need no more work, as far as this process knows
        self._worked = 0
        self._samples = 0
        self._samples_of_worked = 0
        self._in_flight: set[str] = set()
        self._began: _Point | None = None
        self._points: deque[_Point] = deque()
        self._looks: deque[tuple[float, int]] = deque()  # when, and how many shards the other processes had finished

    def expect(self, ids: Collection[str]) -> None:
        self.total = len(ids)
        if self.receipts is not None:
            self.receipts.set_ids(ids)

    def begin(self, shard_id: str, now: float) -> None:
        """This process begins to work on a shard."""
        self._in_flight.add(shard_id)
        if self._began is None:
            self._began = _Point(now, 0.0, self._samples)
        if self._receipts_count and self.receipts is not None and shard_id in self.receipts.before:
            self._receipts_count = False
            self._known = self._passed | self.receipts.new

    def end(self, shard_id: str) -> None:
        """It has ended, whatever came of it."""
        self._in_flight.discard(shard_id)

    def samples_done(self, count: int) -> None:
        self._samples += count

    def passed(self, shard_id: str, samples: int | None, now: float) -> None:
        """A shard needs no more work.  samples: of a shard that this process has worked on."""
        self._passed.add(shard_id)
        self._known.add(shard_id)
        if samples is not None:
            self._worked += 1
            self._samples_of_worked += samples
            if self._began is None:  # a worker process did it: when it began is not known
                self._began = _Point(now, self._worked, self._samples)

    def looked(self, now: float) -> None:
        """Take over what ``receipts.look`` has found."""
        assert self.receipts is not None
        self._known |= self.receipts.new | (self.receipts.before if self._receipts_count else set())
        others = len(self.receipts.new - self._passed)
        self._looks.append((now, max(others, self._looks[-1][1] if self._looks else 0)))
        while len(self._looks) > 2 and now - self._looks[1][0] >= RATE_WINDOW_S:
            self._looks.popleft()

    def estimate(self, now: float) -> Estimate:
        done = len(self._known) - len(self._known & self._in_flight)
        others = self._rate_of_others()
        several = self.receipts is not None and (self.receipts.workers > self._workers or bool(others))
        shards = self._shards_of_this_process()
        base = self._base(now, shards)
        seconds = max(now - base.time_s, 1e-3)
        samples_per_s = (self._samples - base.samples) / seconds if self._samples > base.samples else None
        enough = self._worked >= _FEW_SHARDS or (self._worked and seconds >= _LONG_ENOUGH_S)
        rate = ((shards - base.shards) / seconds if enough else 0.0) + (others or 0.0)
        rest = max(0.0, self.total - done - (shards - self._worked))
        left_s = rest / rate if rate > 0 else None
        return Estimate(done, self._samples, samples_per_s, left_s, several, several and others is None)

    def _base(self, now: float, shards: float) -> _Point:
        """The point from which on the recent rate is measured."""
        point = _Point(now, shards, self._samples)
        if self._began is None:
            return point
        if not self._points or now - self._points[-1].time_s >= _POINT_EVERY_S:
            self._points.append(point)
        while len(self._points) > 2 and now - self._points[1].time_s >= RATE_WINDOW_S:
            self._points.popleft()
        oldest = self._points[0]
        if now - oldest.time_s < RATE_WINDOW_S or shards - oldest.shards < 1:  # or shards take longer than the window
            return self._began
        return oldest

    def _shards_of_this_process(self) -> float:
        """Finished ones, and of those in progress half at most, because nobody knows how large they are."""
        if not self._samples_of_worked:
            return float(self._worked)
        mean = self._samples_of_worked / self._worked
        begun = max(0.0, (self._samples - self._samples_of_worked) / mean)
        return self._worked + min(begun, 0.5 * len(self._in_flight))

    def _rate_of_others(self) -> float | None:
        """Shards a second; None before it is known."""
        if len(self._looks) < 2:
            return None
        (since, before), (until, now) = self._looks[0], self._looks[-1]
        return None if until - since < _MIN_BETWEEN_LOOKS_S else (now - before) / (until - since)


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3 h 20 min``, ``2 days 4 h``: as exact as an estimate can be."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days:,} days {hours} h" if hours else f"{days:,} days"


def in_words(told: Estimate, total: int, who: str) -> str:
    """``12 of 100 shards, 1,234 samples, 35.2 samples/s, about 4 min left``"""
    parts = [f"{told.shards:,} of {total:,} shards"]
    parts.append(f"{told.samples:,} samples{f' by {who}' if told.others else ''}")
    if told.samples_per_s is not None:
        parts.append(f"{told.samples_per_s:,.1f} samples/s")
    return ", ".join([*parts, *filter(None, [time_left(told, who)])])


def time_left(told: Estimate, who: str) -> str:
    """``about 4 min left``; empty before there is a rate."""
    if told.left_s is None:
        return ""
    return f"about {duration(told.left_s)} left{f' with {who} alone' if told.alone else ''}"


class Progress:
    """Shows the shards and samples that are done.  Thread-safe; a call costs a lock and an addition.

    A thread of its own writes the lines, so that a log also tells what a process waits for.

    Args:
        title: The stage's name.
        ids: The shards of the run.
        quiet: Show nothing.
        receipts: The folder of the stage's receipts, which tell what other workers have done.
        again: Shards that have a receipt are done again (``--rerun``).
        world: How many workers the job has.
        doing: What the stage does now apart from working on samples, in words; empty for nothing.
        lines: Write the lines on how far it is; a worker whose parent adds up all of them does not.
        workers: How many processes this one shows the progress of.
    """

    def __init__(
        self,
        title: str,
        ids: Collection[str],
        quiet: bool,
        *,
        receipts: Path | None = None,
        again: bool = False,
        world: int = 1,
        doing: Callable[[], str] = str,
        lines: bool = True,
        workers: int = 1,
    ) -> None:
        self._title = title
        self._quiet = quiet
        self._doing = doing
        self._lines = lines
        self._workers = workers
        self._lock = threading.Lock()
        self._began = time.monotonic()
        all_receipts = None if receipts is None else ReceiptsOfAll(receipts, ids)
        self._pace = Pace(ids, all_receipts, again=again, workers=workers)
        self._who = "this worker" if workers == 1 else f"these {workers} workers"
        self._look_every_s = LINE_EVERY_S * max(1.0, world / _LOOKING_WORKERS)
        self._looked_at: float | None = None
        self._now = ("", "")  # what the process does: a fixed key, and the words
        self._said = _Said(title, self._who)
        self._bar: Any = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._quiet:
            return self
        if on_terminal() and WORKER_VARIABLE not in os.environ and self._workers == 1:
            self._begin_bar()
        self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)  # a filesystem that hangs must not keep the process
        if self._bar is not None:
            self._bar.stop()
            _log_to_stderr()

    def expect(self, ids: Collection[str]) -> None:
        """Set the shards of the run, once they are known."""
        with self._lock:
            self._pace.expect(ids)

    def now(self, key: str, words: str = "") -> None:
        """Tell what this process does while it works on no sample.

        Args:
            key: Stays the same as long as it is the same thing; empty where it works on samples again.
            words: Such as ``waiting for stage 01``, in case they differ from ``key``.
        """
        self._now = (key, words or key)

    def begin(self, shard_id: str) -> None:
        """This process begins to work on a shard."""
        self.now("")
        with self._lock:
            self._pace.begin(shard_id, time.monotonic())

    def end(self, shard_id: str) -> None:
        """This process works no longer on the shard."""
        with self._lock:
            self._pace.end(shard_id)

    def samples_done(self, count: int) -> None:
        with self._lock:
            self._pace.samples_done(count)

    def shard_passed(self, shard_id: str, samples: int | None = None) -> None:
        """Count a shard that is done, failed, blocked, or was done before.

        samples: how many it has; None where this process has not worked on it.
        """
        with self._lock:
            self._pace.passed(shard_id, samples, time.monotonic())

    # ---- the thread that tells

    def _tell(self) -> None:
        while not self._ended.wait(_DRAW_S if self._bar is not None else TICK_S):
            now = time.monotonic()
            key, words = self._phase()
            if self._bar is not None:
                self._look(now)
                self._draw(now, words)
                continue
            self._said.phase(key, words, now)
            if self._lines and now >= self._began + self._said.next_line_s:
                self._look(now)
                with self._lock:
                    told, total = self._pace.estimate(now), self._pace.total
                self._said.line(told, total, words, now, now - self._began)

    def _phase(self) -> tuple[str, str]:
        words = self._doing()
        return (words.partition(":")[0], words) if words else self._now

    def _look(self, now: float) -> None:
        """List what all workers have done, if it is time; short runs never do."""
        due = self._began + FIRST_LINES_S[0] if self._looked_at is None else self._looked_at + self._look_every_s - 1
        if now >= due and self._pace.receipts is not None:
            self._looked_at = now
            self._pace.receipts.look()
            took = time.monotonic() - now
            self._look_every_s = max(self._look_every_s, min(took / _LOOK_SHARE, _MAX_LOOK_EVERY_S))
            with self._lock:
                self._pace.looked(now)

    def _begin_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("shards · {task.fields[told]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._bar.add_task(self._title, total=self._pace.total, told="0 samples")
        self._bar.start()
        _log_to_stderr()  # now the bar's own stream, so that lines appear above the bar

    def _draw(self, now: float, words: str) -> None:
        with self._lock:
            told, total = self._pace.estimate(now), self._pace.total
        parts = [f"{told.samples:,} samples"]
        if told.samples_per_s is not None:
            parts.append(f"{told.samples_per_s:,.1f}/s")
        parts += filter(None, [time_left(told, self._who), clean_text(words)])
        self._bar.update(self._task, completed=told.shards, total=total, told=" · ".join(parts))


class _Said:
    """What the log has been told, so that a line is not written again and again."""

    def __init__(self, title: str, who: str) -> None:
        self.next_line_s = FIRST_LINES_S[0]  # after the begin
        self._title = title
        self._who = who
        self._key, self._since, self._told_at = "", 0.0, 0.0
        self._last: tuple[int, int] | None = None
        self._last_at = 0.0

    def phase(self, key: str, words: str, now: float) -> None:
        if key != self._key:
            self._key, self._since, self._told_at = key, now, 0.0
        if not key or now - self._since < SAY_WAITING_AFTER_S - TICK_S:
            return
        if not self._told_at:
            self._told_at = now
            logger.info(f"{self._title}: {words}")
        elif now - self._told_at >= REPEAT_S:
            self._told_at = now
            logger.info(f"{self._title}: still {words} ({duration(now - self._since)})")

    def line(self, told: Estimate, total: int, words: str, now: float, since_begin_s: float) -> None:
        later = [at for at in FIRST_LINES_S if at > since_begin_s]
        self.next_line_s = later[0] if later else since_begin_s + LINE_EVERY_S
        state = (told.shards, told.samples)
        last = (0, 0) if self._last is None and words else self._last  # the words have said why nothing is done yet
        if state == last and now - max(self._last_at, self._told_at) < REPEAT_S:
            return
        self._last, self._last_at = state, now
        logger.info(f"{self._title}: {in_words(told, total, self._who)}")
