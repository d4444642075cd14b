"""Passes over what cannot be read like a file: remote files, the output of commands, folders of loose files.

``open_blocks`` hides which of them it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Final, Protocol

from curation.blocks import Block, Blocks, FileBlocks
from curation.errors import InfrastructureError, ShardError
from curation.loose_shards import LooseStream
from curation.shards import TAR, is_loose
from curation.storage import remote_read
from curation.storage.remote_read import Resumed, server_of
from curation.storage.urls import RemoteFile, Source, without_secrets

AHEAD_BYTES: Final = 16 << 20
UNKNOWN: Final = 1 << 62
_PIPE_BYTES: Final = 1 << 20
_STDERR_LINES = 5


class Stream(Protocol):
    """Bytes that come in order.  ``size`` is None until it is known, at the latest when the end was read."""

    size: int | None

    def read_at(self, view: memoryview, start: int) -> int:
        """Fill ``view`` as far as it goes; what lies before the bytes read last costs more.  Raises ShardError."""

    def let_go(self) -> None:
        """Whoever waits in ``read_at`` gets a ShardError soon."""

    def close(self) -> None: ...


def open_blocks(source: str | Source) -> Blocks:
    """A pass over a shard.  Raises ShardError where it is not there."""
    if isinstance(source, RemoteFile):
        return StreamBlocks(AheadStream(source) if source.command is None else CommandStream(source))
    path = os.fspath(source)
    if not path.endswith(TAR) and is_loose(Path(path)):
        return StreamBlocks(LooseStream(path))
    return FileBlocks(path)


class StreamBlocks(Blocks):
    """Of a stream, whose size may turn out at its end."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        super().__init__(UNKNOWN if stream.size is None else stream.size)

    def advance(self, kept_from: int, wanted: int) -> Block:
        block = super().advance(kept_from, wanted)
        if self._stream.size is not None:
            self.size = self._stream.size
        return block

    def fill(self, view: memoryview, start: int) -> int:
        with self._lock:
            return self._stream.read_at(view, start)

    def let_go(self) -> None:
        self._stream.let_go()

    def close(self) -> None:
        self._stream.close()


class AheadStream:
    """A remote file, of which a thread fetches a few megabytes ahead.  What is wanted again is fetched again."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._patience = file, remote_read.PATIENCE
        self._server = server_of(file, self._patience)
        self._stop = threading.Event()
        self._source = Resumed(file, self._server, self._patience, self._stop)
        try:
            self._facts = self._source.facts
        except BaseException:
            self._server.close()
            raise
        self.size = self._facts.size
        self._at = 0
        self._chunk = memoryview(b"")
        self._ended = False
        self._ahead: deque[bytes | Exception] = deque()
        self._held = 0  # bytes in it
        self._news = threading.Condition()
        threading.Thread(target=self._fetch, name="fetch-ahead", daemon=True).start()

    def read_at(self, view: memoryview, start: int) -> int:
        if start < self._at:
            return self._again(view, start)
        total = 0
        while total < len(view) and self._more():
            if self._at < start:
                count = min(start - self._at, len(self._chunk))
            else:
                count = min(len(view) - total, len(self._chunk))
                view[total : total + count] = self._chunk[:count]
                total += count
            self._chunk = self._chunk[count:]
            self._at += count
        return total

    def _more(self) -> bool:
        """Whether there are bytes at hand, after waiting for them."""
        if len(self._chunk) or self._ended:
            return bool(len(self._chunk))
        data = self._take()
        if isinstance(data, Exception):
            self._ended = True
            raise data
        if not data:
            self._ended, self.size = True, self._at
        self._chunk = memoryview(data)
        return bool(data)

    def _take(self) -> bytes | Exception:
        with self._news:
            self._news.wait_for(lambda: self._ahead or self._stop.is_set())
            if not self._ahead:
                return ShardError(f"{self._file}: no longer wanted")
            data = self._ahead.popleft()
            self._held -= len(data) if isinstance(data, bytes) else 0
            self._news.notify_all()
            return data

    def _again(self, view: memoryview, start: int) -> int:
        """Bytes that were read before: those of a sample that is too large to be kept."""
        again = Resumed(
            self._file,
            self._server,
            self._patience,
            self._stop,
            start=start,
            end=start + len(view),
            facts=self._facts,
        )
        total = 0
        try:
            while total < len(view) and (data := again.read()):
                view[total : total + len(data)] = data
                total += len(data)
        finally:
            again.close()
        return total

    def _fetch(self) -> None:
        """In a thread, to the end or until nobody wants it any more."""
        try:
            while True:
                data: bytes | Exception
                try:
                    data = self._source.read()
                except Exception as error:  # noqa: BLE001  the reader's: raised there
                    data = error
                with self._news:
                    self._ahead.append(data)
                    self._held += len(data) if isinstance(data, bytes) else 0
                    self._news.notify_all()
                    self._news.wait_for(lambda: self._held < AHEAD_BYTES or self._stop.is_set())
                if not data or isinstance(data, Exception) or self._stop.is_set():
                    return
        finally:
            self._source.close()
            self._server.close()

    def let_go(self) -> None:
        with self._news:
            self._stop.set()
            self._news.notify_all()

    def close(self) -> None:
        """The thread ends by itself, at the latest when its connection times out."""
        self.let_go()
        self._ahead.clear()


class CommandStream:
    """What a command writes, kept in an unnamed temporary file while it runs: a sample may be wanted again.

    The bash that runs it fails where any part of a pipeline fails; whatever was written before counts for nothing then.
    """

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.size: int | None = None
        self._written = 0
        self._error: Exception | None = None
        self._news = threading.Condition()
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        try:
            self._spool = tempfile.TemporaryFile(prefix="curation-")  # noqa: SIM115  closed by close
            self._process = subprocess.Popen(
                ["bash", "-o", "pipefail", "-c", file.command or ""],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise InfrastructureError(f"{file}: cannot be run ({error})") from error
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._pumper = threading.Thread(target=self._pump, daemon=True)
        self._listener.start()
        self._pumper.start()

    def read_at(self, view: memoryview, start: int) -> int:
        with self._news:
            self._news.wait_for(lambda: self._written >= start + len(view) or self.size is not None or self._error)
            if self._error is not None and self._written < start + len(view):
                raise self._error
        total = 0
        while total < len(view) and (count := os.preadv(self._spool.fileno(), [view[total:]], start + total)):
            total += count
        return total

    def _pump(self) -> None:
        """In a thread: from the command to the file, and its exit status at the end."""
        error: Exception | None = None
        assert self._process.stdout is not None
        try:
            while data := os.read(self._process.stdout.fileno(), _PIPE_BYTES):
                at = 0
                while at < len(data):
                    at += os.pwrite(self._spool.fileno(), data[at:], self._written + at)
                with self._news:
                    self._written += at
                    self._news.notify_all()
        except OSError as why:
            error = InfrastructureError(f"{tempfile.gettempdir()}: {why.strerror}; set TMPDIR to a folder with room")
            self.let_go()
        status = self._process.wait()
        self._listener.join()
        if status and error is None:
            error = ShardError(f"{self._file}: exit status {status}{self._last_words()}", "command_failed")
        with self._news:
            self._error = error
            self.size = self._written if error is None else None
            self._news.notify_all()

    def _last_words(self) -> str:
        return ": " + without_secrets("; ".join(self._stderr)) if self._stderr else ", it said nothing on stderr"

    def _listen(self) -> None:
        """In a thread: the last lines of what it complains of, so that it never has to wait to complain."""
        assert self._process.stderr is not None
        while line := self._process.stderr.readline(4096):
            if text := line.decode("utf-8", "replace").strip():
                self._stderr.append(text[:300])

    def let_go(self) -> None:
        """The command and what it started are ended, if they have not ended."""
        if self._process.poll() is None or self._pumper.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.let_go()
        self._pumper.join()
        self._listener.join()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._spool.close()
