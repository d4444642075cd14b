"""A partial log that is written a batch at a time, and the moments at which a stage may stop without losing work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from curation.errors import Stopped
from curation.partial import PartialLog


class _CheckStop(Protocol):
    def __call__(self, *, urgent_only: bool = False) -> None: ...


class Checkpoints:
    """Results of single samples: found again after an interruption, saved ``every`` so many.

    open_log: gives the log when the first sample asks for it, so that a shard that needs none touches no file.
    check_stop: ``ShardWork.check_stop``.
    """

    def __init__(self, open_log: Callable[[], PartialLog], check_stop: _CheckStop, every: int) -> None:
        self._open_log = open_log
        self._check_stop = check_stop
        self._every = every
        self._log: PartialLog | None = None
        self._batch: list[tuple[str, str, bytes]] = []

    def find(self, key: str, input_digest: str) -> bytes | None:
        """What an earlier attempt saved for the same input."""
        if self._log is None:
            self._log = self._open_log()
        return self._log.get(key, input_digest)

    def add(self, key: str, input_digest: str, payload: bytes) -> None:
        """Take note of a result that ``find`` did not have; when a batch is full it is saved, and Stopped may come."""
        self._batch.append((key, input_digest, payload))
        if len(self._batch) >= self._every:
            self.save()
            self._check_stop()

    def check_urgent(self) -> None:
        """Between two samples: raise Stopped where not even a batch may be finished, with what there is of it saved."""
        try:
            self._check_stop(urgent_only=True)
        except Stopped:
            self.save()
            raise

    def save(self) -> None:
        """Write down what is not yet."""
        if self._batch:
            if self._log is None:
                self._log = self._open_log()
            self._log.append(self._batch)
            self._batch = []
