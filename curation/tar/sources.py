"""Reads shards that are not local tar files: remote files, the output of commands, and folders of loose files.

``open_blocks`` gives all of them one interface.  A folder of loose files (img2dataset's layout ``files``) is read as if
it were a tar of its files, with the samples in the order of their keys.  If a sample has no json, it is made from its
row in the table ``<folder>.parquet`` next to the folder.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import signal
import stat
import subprocess
import tempfile
import threading
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import orjson

from curation.errors import InfrastructureError, ShardError, install
from curation.shards import TAR, is_loose
from curation.storage import remote_read
from curation.storage.remote_read import ResumingReader, server_of
from curation.storage.urls import Source, Url, redact
from curation.tar.blocks import Block, Blocks, FileBlocks
from curation.tar.headers import RECORD, ZERO_BLOCK, make_header, padded, padding, split_name
from curation.tar.recognise import GZIP, HEAD_BYTES, LOOK_BYTES, holds_headers, not_a_tar

MAX_FILES: Final = 10_000_000


_JSON = "json"


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size: int
    mtime: int

    def header(self) -> bytes:
        return make_header(os.fsencode(self.name), self.size, self.mtime)


class LooseStream:
    """A folder as a tar that is produced while it is read; nothing is written.

    Each file costs one open, one stat and one read.  ``size`` is None until the end was read.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.size: int | None = None
        self._names = _sorted_names(folder)
        self._rows = _Rows(folder)
        self._next = 0  # index of the next name
        self._starts: list[int] = []  # the offset of each part
        self._parts: list[_File | bytes] = []
        self._end = 0
        self._open: tuple[str, int] | None = None  # name and descriptor

    def read_at(self, view: memoryview, start: int) -> int:
        total = 0
        while total < len(view):
            if start + total < self._end:
                total += self._copy(view[total:], start + total)
            elif self.size is None:
                self._extend()
            else:
                break
        return total

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    # ---- the parts of the tar

    def _extend(self) -> None:
        """Add the next file, or the end of the archive."""
        if self._next == len(self._names):
            end = 2 * len(ZERO_BLOCK)
            self._add(bytes(end + -(self._end + end) % RECORD))
            self.size = self._end
            return
        name = self._names[self._next]
        self._next += 1
        descriptor = self._descriptor(name)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return
        self._add(_File(name, found.st_size, int(found.st_mtime)))
        key = _key(name)
        following = self._names[self._next] if self._next < len(self._names) else ""
        if _key(following) != key and key and f"{key}.{_JSON}" not in self._nearby(key):
            self._fill_in(key, int(found.st_mtime))

    def _nearby(self, key: str) -> set[str]:
        """The names of the sample that ends before the next name."""
        at = self._next - 1
        names = set()
        while at >= 0 and _key(self._names[at]) == key:
            names.add(self._names[at])
            at -= 1
        return names

    def _fill_in(self, key: str, mtime: int) -> None:
        row = self._rows.find(key)
        if row is not None:
            data = orjson.dumps(row, default=str)
            self._add(make_header(os.fsencode(f"{key}.{_JSON}"), len(data), mtime) + data + padding(len(data)))

    def _add(self, part: _File | bytes) -> None:
        self._starts.append(self._end)
        self._parts.append(part)
        self._end += len(part) if isinstance(part, bytes) else len(part.header()) + padded(part.size)

    # ---- its bytes

    def _copy(self, view: memoryview, at: int) -> int:
        """Copy the bytes of one part from ``at`` on."""
        number = bisect.bisect_right(self._starts, at) - 1
        part = self._parts[number]
        inside = at - self._starts[number]
        header, name, size = (part, "", 0) if isinstance(part, bytes) else (part.header(), part.name, part.size)
        if inside < len(header):
            piece = header[inside : inside + len(view)]
            view[: len(piece)] = piece
            return len(piece)
        inside -= len(header)
        if inside >= size:  # padding
            count = min(len(view), padded(size) - inside)
            view[:count] = bytes(count)
            return count
        wanted = min(len(view), size - inside)
        count = os.preadv(self._descriptor(name), [view[:wanted]], inside)
        if count == 0:
            raise ShardError(f"{self._folder}/{name}: it became shorter while it was read; start again", "changed")
        return count

    def _descriptor(self, name: str) -> int:
        if self._open is None or self._open[0] != name:
            self.close()
            path = f"{self._folder}/{name}"
            try:
                self._open = name, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
        return self._open[1]


def table_of(folder: Path) -> Path:
    """The path where img2dataset puts a folder's table."""
    return folder.with_name(f"{folder.name}.parquet")


class _Rows:
    """The table next to a folder, which is read when a row is first needed."""

    def __init__(self, folder: str) -> None:
        self._path = table_of(Path(folder))
        self._there = self._path.is_file()
        self._rows: dict[str, int] | None = None
        self._table: Any = None

    def find(self, key: str) -> Mapping[str, Any] | None:
        if not self._there:
            return None
        if self._rows is None:
            self._load()
        assert self._rows is not None
        number = self._rows.get(key)
        if number is None:
            return None
        (row,) = self._table.slice(number, 1).to_pylist()
        return {str(name): value for name, value in row.items() if not isinstance(value, bytes)}

    def _load(self) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise InfrastructureError(f"{self._path}: needs pyarrow: {install('pyarrow')}") from None
        try:
            self._table = pyarrow.parquet.ParquetFile(self._path).read()
            keys = self._table["key"].to_pylist() if "key" in self._table.column_names else []
        except (OSError, pyarrow.ArrowException) as error:
            raise ShardError(f"{self._path}: cannot be read as a table ({error})") from error
        self._rows = {str(key): number for number, key in enumerate(keys) if key is not None}


def _sorted_names(folder: str) -> list[str]:
    """The folder's files sorted by key and then suffix, so that a sample's files are adjacent; without hidden files."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and not entry.is_dir()]
    except OSError as error:
        raise ShardError(f"{folder}: cannot be listed ({error.strerror})") from error
    if len(names) > MAX_FILES:
        raise ShardError(f"{folder}: more than {MAX_FILES:,} files")
    return sorted(names, key=lambda name: (_key(name) or "", name))


def _key(name: str) -> str | None:
    split = split_name(os.fsencode(name))
    return None if split is None else os.fsdecode(split[0])


AHEAD_BYTES: Final = 16 << 20


UNKNOWN: Final = 1 << 62


_PIPE_BYTES: Final = 1 << 20


_STDERR_LINES = 5


_GZIP_ONLY = 31  # zlib's window bits for gzip with a header


_ANY_RATIO_BYTES = 1 << 30


_MAX_RATIO = 100  # deflate reaches 1,030 with zeros; tars of pictures stay below 2, and of text alone below 10


class Stream(Protocol):
    """Bytes that arrive in order."""

    @property
    def size(self) -> int | None:
        """None until it is known, at the latest when the end was read."""

    def read_at(self, view: memoryview, start: int) -> int:
        """Fill ``view`` up to the end of the stream; to go back costs more.  Raises ShardError."""

    def cancel(self) -> None:
        """Make a caller that waits in ``read_at`` get a ShardError soon."""

    def close(self) -> None: ...


def open_blocks(source: str | Source) -> Blocks:
    """Open a shard for one pass.  What is compressed with gzip is unpacked on the way.

    Args:
        source: A tar on a filesystem, a folder of loose files, or what ``curation.storage.urls`` can read.

    Raises:
        ShardError: It does not exist, or it is ``not_a_tar``, which the message then describes.
    """
    if isinstance(source, Url):
        stream = PrefetchStream(source) if source.command is None else CommandStream(source)
        return _checked(StreamBlocks(_Rereadable(stream)), str(source))
    path = os.fspath(source)
    if not path.endswith(TAR) and is_loose(Path(path)):
        return StreamBlocks(LooseStream(path))
    return _checked(FileBlocks(path), path)


def _checked(blocks: Blocks, path: str) -> Blocks:
    """The blocks of the tar that ``blocks`` are, or hold in compressed form.  Raises ShardError ``not_a_tar``."""
    try:
        head = _head_of(blocks)
        if head.startswith(GZIP) and not_a_tar(head):
            blocks = StreamBlocks(GunzipStream(path, blocks))
            head = _head_of(blocks)
            if problem := _problem_of(blocks, head):
                raise ShardError(f"{path}: compressed with gzip, and inside it is {problem}", "not_a_tar")
        elif problem := _problem_of(blocks, head):
            raise ShardError(f"{path}: {problem}", "not_a_tar")
    except BaseException:
        blocks.cancel()
        blocks.close()
        raise
    return blocks


def _problem_of(blocks: Blocks, head: bytes) -> str:
    """What ``not_a_tar`` says, but for a tar whose first header is lost: it begins with what its first member holds."""
    problem = not_a_tar(head)
    if not problem or len(head) < HEAD_BYTES or head.startswith(GZIP):
        return problem
    data = bytearray(LOOK_BYTES)
    del data[blocks.fill(memoryview(data), 0) :]
    return "" if holds_headers(data) else problem


def _head_of(blocks: Blocks) -> bytes:
    head = bytearray(HEAD_BYTES)
    return bytes(head[: blocks.fill(memoryview(head), 0)])


class StreamBlocks(Blocks):
    """The blocks of a stream, whose size may be known only at its end."""

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

    def cancel(self) -> None:
        self._stream.cancel()

    def close(self) -> None:
        self._stream.close()


class _Rereadable:
    """A stream whose first bytes stay in memory, so that to look at them and then read from the start costs nothing."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._head = b""

    @property
    def size(self) -> int | None:
        return self._stream.size

    def read_at(self, view: memoryview, start: int) -> int:
        if start == 0 and len(self._head) < min(len(view), LOOK_BYTES):
            more = bytearray(min(len(view), LOOK_BYTES) - len(self._head))
            self._head += more[: self._stream.read_at(memoryview(more), len(self._head))]
        known = self._head[start : start + len(view)]
        view[: len(known)] = known
        rest = view[len(known) :]
        return len(known) + (self._stream.read_at(rest, start + len(known)) if rest else 0)

    def cancel(self) -> None:
        self._stream.cancel()

    def close(self) -> None:
        self._stream.close()


class GunzipStream:
    """The content of a gzip file, kept in an unnamed temporary file, because a sample may be needed again.

    A file that was cut ends where its data ends, as a tar that was cut does.
    """

    def __init__(self, path: str, packed: Blocks) -> None:
        """path: for messages.  packed: the compressed bytes, which are closed together with this stream."""
        self._path, self._packed = path, packed
        self.size: int | None = None
        self._taken = 0  # compressed bytes that were read
        self._pending = b""  # those of them that were not unpacked yet
        self._decoder: Any = None  # None between two members of the gzip file
        self._written = 0
        try:
            self._spool = tempfile.TemporaryFile(prefix="curation-")  # noqa: SIM115  closed by close
        except OSError as error:
            raise self._no_room(error) from error

    def read_at(self, view: memoryview, start: int) -> int:
        while self.size is None and self._written < start + len(view):
            self._unpack()
        total = 0
        while total < len(view) and (count := os.preadv(self._spool.fileno(), [view[total:]], start + total)):
            total += count
        return total

    def _unpack(self) -> None:
        if not self._pending:
            packed = bytearray(_PIPE_BYTES)
            self._pending = bytes(packed[: self._packed.fill(memoryview(packed), self._taken)])
            self._taken += len(self._pending)
            if not self._pending:
                self.size = self._written
                return
        if self._decoder is None:
            self._pending = self._pending.lstrip(b"\0")  # gzip ignores such padding, and what follows the last member
            if self._pending and not self._pending.startswith(GZIP[: len(self._pending)]):
                self.size = self._written
            if not self._pending or self.size is not None:
                return
            self._decoder = zlib.decompressobj(_GZIP_ONLY)
        try:
            data = self._decoder.decompress(self._pending, _PIPE_BYTES)
        except zlib.error as error:
            raise ShardError(
                f"{self._path}: its gzip data is damaged before byte {self._taken:,} ({error}); copy or download it "
                "again",
                "damaged_gzip",
            ) from None
        self._pending = self._decoder.unused_data if self._decoder.eof else self._decoder.unconsumed_tail
        if self._decoder.eof:
            self._decoder = None
        self._keep(data)

    def _keep(self, data: bytes) -> None:
        at = 0
        try:
            while at < len(data):
                at += os.pwrite(self._spool.fileno(), data[at:], self._written + at)
        except OSError as error:
            raise self._no_room(error) from error
        self._written += len(data)
        if self._written > max(_ANY_RATIO_BYTES, _MAX_RATIO * self._taken):
            raise ShardError(
                f"{self._path}: {self._taken:,} bytes of gzip unpack to more than {self._written:,}, more than "
                f"{_MAX_RATIO} times as much, as no tar of pictures does; unpack it yourself if that is right",
                "gzip_too_large",
            )

    def _no_room(self, error: OSError) -> InfrastructureError:
        return InfrastructureError(
            f"{self._path} is unpacked in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a folder with room"
        )

    def cancel(self) -> None:
        self._packed.cancel()

    def close(self) -> None:
        self._packed.close()
        self._spool.close()


class PrefetchStream:
    """A remote file; a thread fetches a few megabytes ahead.  Bytes that are needed again are fetched again."""

    def __init__(self, file: Url) -> None:
        self._file, self._policy = file, remote_read.RETRIES
        self._server = server_of(file, self._policy)
        self._stop = threading.Event()
        self._source = ResumingReader(file, self._server, self._policy, self._stop)
        try:
            self._info = self._source.info
        except BaseException:
            self._server.close()
            raise
        self.size = self._info.size
        self._at = 0
        self._chunk = memoryview(b"")
        self._ended = False
        self._ahead: deque[bytes | Exception] = deque()
        self._held = 0  # bytes in the queue
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
        """Wait for bytes; returns whether there are any."""
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
        """Fetch bytes again that were read before, for a sample that is too large to stay in memory."""
        if self.size is not None:  # a server refuses to begin at the end
            view = view[: max(0, self.size - start)]
        if not view:
            return 0
        again = ResumingReader(
            self._file,
            self._server,
            self._policy,
            self._stop,
            start=start,
            end=start + len(view),
            info=self._info,
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
        """In a thread: fetch to the end, or until the stream is closed."""
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

    def cancel(self) -> None:
        with self._news:
            self._stop.set()
            self._news.notify_all()

    def close(self) -> None:
        """Close the stream.  The thread ends by itself, at the latest when its connection times out."""
        self.cancel()
        self._ahead.clear()


class CommandStream:
    """The output of a command, kept in an unnamed temporary file, because a sample may be needed again.

    Bash runs the command and fails if any part of a pipeline fails; the output is then not used.
    """

    def __init__(self, file: Url) -> None:
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
        """In a thread: copy the command's output to the file, and get its exit status at the end."""
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
            self.cancel()
        status = self._process.wait()
        self._listener.join()
        if status and error is None:
            error = ShardError(f"{self._file}: exit status {status}{self._last_words()}", "command_failed")
        with self._news:
            self._error = error
            self.size = self._written if error is None else None
            self._news.notify_all()

    def _last_words(self) -> str:
        return ": " + redact("; ".join(self._stderr)) if self._stderr else ", it said nothing on stderr"

    def _listen(self) -> None:
        """In a thread: keep the last lines of stderr, and read all of it so that the command never blocks."""
        assert self._process.stderr is not None
        while line := self._process.stderr.readline(4096):
            if text := line.decode("utf-8", "replace").strip():
                self._stderr.append(text[:300])

    def cancel(self) -> None:
        """End the command and the processes that it started, if they still run."""
        if self._process.poll() is None or self._pumper.is_alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.cancel()
        self._pumper.join()
        self._listener.join()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._spool.close()
