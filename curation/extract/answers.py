"""Answers of model servers about the samples of one shard: recorded as they come, so that none is asked for twice."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from curation.errors import Stopped
from curation.run.checkpoints import PartialLog

MOST_UNWRITTEN = 32  # answers that one write records together, …
UNWRITTEN_S = 1.0  # … or those of so many seconds


class Answers:
    """The answers about one shard.  Thread-safe: requests end in many threads at once."""

    def __init__(self, log: PartialLog) -> None:
        """log: The shard's, which a later attempt finds."""
        self._log = log
        self._lock = threading.Lock()
        self._unwritten: list[tuple[str, str, bytes]] = []
        self._written_at = time.monotonic()
        self._halted = self._closed = False
        self.in_flight = 0  # requests

    def find(self, key: str, digest: str) -> bytes | None:
        """The answer that this or an earlier attempt has recorded.

        Args:
            key: Who was asked about which sample.
            digest: Of all that the answer depends on.
        """
        return self._log.get(key, digest)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """A request.  Raises Stopped where none may begin any more."""
        with self._lock:
            self.check()
            self.in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1

    def check(self) -> None:
        """Raise Stopped where no request may begin any more."""
        if self._halted:
            raise Stopped("the shard is given up")

    def keep(self, key: str, digest: str, answer: bytes) -> None:
        """Record an answer, at the latest with the next ones."""
        with self._lock:
            self._unwritten.append((key, digest, answer))
            late = time.monotonic() - self._written_at > UNWRITTEN_S
            if late or self._halted or len(self._unwritten) >= MOST_UNWRITTEN:
                self._write()

    def write(self) -> None:
        """Record what is not recorded yet."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        if self._unwritten and not self._closed:
            self._log.append(self._unwritten)
        self._unwritten = []
        self._written_at = time.monotonic()

    def halt(self) -> None:
        """Let no further request begin.  Answers that still come are recorded at once."""
        self._halted = True

    def close(self) -> None:
        """The same, and record no answer any more: the shard's log may be gone."""
        self.halt()
        with self._lock:
            try:
                self._write()
            finally:
                self._closed = True
