"""Shows the progress of a run: a bar on a terminal, or a line from time to time in a log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Self

import orjson

from curation.cluster import WORKER_VARIABLE, note_progress
from curation.options import logger, on_terminal

LINE_EVERY_S = 30.0


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

    def samples(self, counts: Mapping[str, int], notes: Mapping[str, Any] | None = None) -> None:
        """Count the samples of a shard that is done.

        Args:
            counts: in, kept, dropped and failed.
            notes: The notes of its receipt, of which the whole numbers are added up.
        """
        whole = {name: value for name, value in (notes or {}).items() if type(value) is int}
        with self._lock:
            self._samples.update(counts)
            self._notes.update(whole)
        if self._pipe is not None:
            with contextlib.suppress(OSError):  # the parent is gone, or reads nothing any more
                os.write(self._pipe, orjson.dumps([counts, whole]) + b"\n")

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
        self._read_end, self.pipe = os.pipe()  # ``pipe`` is for the workers' ``Tally``
        os.set_blocking(self._read_end, False)
        os.set_blocking(self.pipe, False)  # a worker never waits for its parent
        self._rest = b""

    def read(self) -> None:
        """Add up what was told since the last call."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._read_end, 1 << 16):
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    self.tally.shards("worked")
                    self.tally.samples(*orjson.loads(line))

    def close(self) -> None:
        self.read()
        os.close(self.pipe)
        os.close(self._read_end)


class Progress:
    """Shows the shards and samples that are done.  Thread-safe; a call costs a lock and an addition."""

    def __init__(self, title: str, shards: int, quiet: bool) -> None:
        self._title = title
        self._shards = shards
        self._quiet = quiet
        self._shards_done = 0
        self._samples = 0
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._last_line = self._began
        self._bar: Any = None

    def __enter__(self) -> Self:
        if not self._quiet and on_terminal() and WORKER_VARIABLE not in os.environ:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("shards · {task.fields[samples]:,} samples · {task.fields[rate]:,.1f}/s"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=self._shards, samples=0, rate=0.0)
            self._bar.start()
            _log_to_stderr()  # now the bar's own stream, so that lines appear above the bar
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            _log_to_stderr()

    def expect(self, shards: int) -> None:
        """Set the total number of shards, once it is known."""
        with self._lock:
            self._shards = shards
            if self._bar is not None:
                self._bar.update(self._task, total=shards)

    def samples_done(self, count: int) -> None:
        with self._lock:
            self._samples += count
            self._show()

    def shard_passed(self) -> None:
        """Count a shard that is done, failed, blocked, or was done before."""
        with self._lock:
            self._shards_done += 1
            self._show()

    def _show(self) -> None:
        now = time.monotonic()
        rate = self._samples / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._shards_done, samples=self._samples, rate=rate)
        elif now - self._last_line >= LINE_EVERY_S and not self._quiet:
            self._last_line = now
            logger.info(
                f"{self._title}: {self._shards_done}/{self._shards} shards, {self._samples:,} samples, {rate:,.1f}/s"
            )
