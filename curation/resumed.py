"""A remote file's bytes in order, over as many connections as it takes.

A connection that breaks is taken up again where it broke, within bounds, and only if it is still the same file.
"""

from __future__ import annotations

import random
import threading
from typing import Final

from curation import transports
from curation.errors import ShardError
from curation.remote import RemoteFile
from curation.transports import Connection, Facts, Interrupted, Patience, Server, server_of

_PROGRESS_BYTES: Final = 256 << 10  # what a connection must bring so that its break does not count against the file


class Resumed:
    """A file's bytes from ``start`` to ``end`` in order.  ``stop`` ends its waits.

    facts: of the version that has to be read; of the first answer where none are given.
    """

    def __init__(
        self,
        file: RemoteFile,
        server: Server,
        patience: Patience,
        stop: threading.Event,
        *,
        start: int = 0,
        end: int | None = None,
        facts: Facts | None = None,
    ) -> None:
        self._file, self._server, self._patience, self._stop = file, server, patience, stop
        self._at, self._end = start, end
        self._facts = facts
        self._connection: Connection | None = None
        self._failures, self._progress = 0, 0

    @property
    def facts(self) -> Facts:
        """Connects, where that has not been done."""
        while self._facts is None:
            try:
                self._connect()
            except Interrupted as error:
                self._wait(error)
        return self._facts

    def read(self) -> bytes:
        """The next bytes, b"" at the end.  Raises ShardError, also when it was stopped."""
        while True:
            try:
                connection = self._connection or self._connect()
                data = connection.read()
                end = self._end if self._end is not None else self.facts.size
                if not data and end is not None and self._at < end:
                    raise Interrupted("the answer ended early")
                if end is not None and self._at + len(data) > end:
                    data = data[: end - self._at]
            except Interrupted as error:
                self._wait(error)
                continue
            self._at += len(data)
            self._progress += len(data)
            return data

    def _connect(self) -> Connection:
        connection = self._server.connect(self._at, self._end)
        try:
            if self._facts is None:
                self._facts = connection.facts
            elif self._facts.differs(connection.facts):
                raise ShardError(f"{self._file}: it changed while it was read; start again", "changed")
            skip = self._at - connection.begins
            while skip > 0:  # a server without ranges begins anew
                data = connection.read()
                if not data:
                    raise Interrupted("the answer ended early")
                skip -= len(data)
            if skip < 0:
                connection = _Rest(connection, data[skip:])
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _wait(self, error: Interrupted) -> None:
        self.close()
        self._failures = 1 if self._progress >= _PROGRESS_BYTES else self._failures + 1
        self._progress = 0
        p = self._patience
        if self._failures >= p.tries:
            size = self._facts.size if self._facts else None
            of = f" of {size:,}" if size is not None else ""
            where = f"broke off at byte {self._at:,}{of}" if self._facts else "cannot be read"
            raise ShardError(f"{self._file}: {where}, {p.tries} times: {error}", "broke_off") from error
        pause = min(p.longest_wait_s, p.first_wait_s * 2 ** (self._failures - 1)) * random.uniform(0.5, 1.0)
        if self._stop.wait(max(pause, min(error.wait_s, p.longest_wait_s))):
            raise ShardError(f"{self._file}: no longer wanted") from error

    def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()


class _Rest:
    """A connection of whose last answer a part is still to be given."""

    def __init__(self, inner: Connection, rest: bytes) -> None:
        self.facts, self.begins = inner.facts, inner.begins
        self._inner, self._rest = inner, rest

    def read(self) -> bytes:
        if self._rest:
            rest, self._rest = self._rest, b""
            return rest
        return self._inner.read()

    def close(self) -> None:
        self._inner.close()


def look_at(file: RemoteFile, patience: Patience | None = None) -> Facts:
    """What is known of a file without reading it.  Raises Unavailable, and ShardError where nobody can be asked."""
    patience = patience or transports.PATIENCE
    server = server_of(file, patience)
    never = threading.Event()
    error: Interrupted | None = None
    try:
        for number in range(patience.tries):
            if error is not None:
                pause = min(patience.longest_wait_s, patience.first_wait_s * 2 ** (number - 1))
                never.wait(max(pause * random.uniform(0.5, 1.0), min(error.wait_s, patience.longest_wait_s)))
            try:
                return server.look()
            except Interrupted as why:
                error = why
    finally:
        server.close()
    raise ShardError(f"{file}: cannot be looked at, {patience.tries} times: {error}", "not_available")
