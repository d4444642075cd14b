"""How remote files are asked for: of web servers, and of buckets through fsspec.

One answer at a time; what becomes of one that breaks is in ``resumed.py``.

A remote file's bytes in order, over as many connections as it takes.

A connection that breaks is taken up again where it broke, within bounds, and only if it is still the same file.
"""

from __future__ import annotations

import contextlib
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from curation.errors import ShardError
from curation.storage.urls import HTTP, Url, error_line, filesystem, told_by

_HTTP_CHUNK: Final = 1 << 20


_RANGE_BYTES: Final = 8 << 20  # of a bucket: large enough that its latency does not count


_GONE: Final = frozenset((400, 401, 403, 404, 405, 407, 410, 411, 414, 451))


_EXPIRED: Final = frozenset(("FileExpired", "PreconditionFailed"))


@dataclass(frozen=True, slots=True)
class Patience:
    """tries: connections in a row that bring next to nothing.  Waits double from the first to the longest."""

    tries: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    connect_s: float = 15.0
    read_s: float = 60.0


PATIENCE = Patience()


class TransientError(Exception):
    """A connection that broke or was refused for now; ``wait_s`` is what the server asked for."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class Unavailable(ShardError):
    """The server says that the file is not there, or not for us: trying again would not help."""

    def __init__(self, file: Url, why: str) -> None:
        super().__init__(f"{file}: {why}", "not_available")
        self.why = why


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a server tells of a file: its size (None: not told), its etag and its time ("" where there is none)."""

    size: int | None
    etag: str = ""
    modified: str = ""

    def record(self) -> dict[str, Any]:
        """For receipts: what makes it another file when it differs."""
        mark = {"etag": self.etag} if self.etag else {"modified": self.modified} if self.modified else {}
        return {**({} if self.size is None else {"size": self.size}), **mark}

    def differs(self, other: ObjectInfo) -> bool:
        """Whether the two can not be of one version of a file."""
        if None not in (self.size, other.size) and self.size != other.size:
            return True
        if self.etag and other.etag:
            return self.etag != other.etag
        return bool(self.modified and other.modified and self.modified != other.modified)


class Connection(Protocol):
    """An open answer.  ``begins``: the first byte that it gives, which may lie before the one asked for."""

    facts: ObjectInfo
    begins: int

    def read(self) -> bytes:
        """The next bytes, b"" at the end.  Raises Interrupted."""

    def close(self) -> None: ...


class Server(Protocol):
    """Where one file comes from."""

    def connect(self, start: int, end: int | None) -> Connection:
        """Raises Interrupted, and Unavailable or another ShardError where trying again would not help."""

    def look(self) -> ObjectInfo:
        """Without reading it.  Raises the same."""

    def close(self) -> None: ...


def server_of(file: Url, patience: Patience) -> Server:
    return HttpServer(file, patience) if file.scheme in HTTP else BucketServer(file)


# ---- web servers


class HttpServer:
    """Through requests, so that proxies and .netrc of the environment count."""

    def __init__(self, file: Url, patience: Patience) -> None:
        import requests

        self._file = file
        self._session = requests.Session()
        self._timeout = (patience.connect_s, patience.read_s)

    def connect(self, start: int, end: int | None) -> Connection:
        ranged = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        return _HttpConnection(self._file, self._ask("GET", ranged))

    def look(self) -> ObjectInfo:
        """By HEAD, or, as a signed URL may be good for GET alone, by its first byte."""
        try:
            with contextlib.closing(self._ask("HEAD", {})) as response:
                facts = object_info_of(response)
                if facts.size is not None:
                    return facts
        except Unavailable as error:
            if not error.why.startswith(("400", "403", "405")):
                raise
        with contextlib.closing(self._ask("GET", {"Range": "bytes=0-0"})) as response:
            return object_info_of(response)

    def close(self) -> None:
        self._session.close()

    def _ask(self, method: str, headers: dict[str, str]) -> Any:
        import requests

        try:
            response = self._session.request(
                method,
                self._file.target,
                headers={**headers, "Accept-Encoding": "identity"},
                stream=True,
                timeout=self._timeout,
            )
        except (requests.exceptions.InvalidURL, requests.exceptions.TooManyRedirects) as error:
            raise Unavailable(self._file, error_line(error)) from None
        except requests.RequestException as error:
            raise TransientError(error_line(error)) from error
        if response.status_code in (200, 206):
            if response.headers.get("Content-Encoding", "identity") != "identity":
                response.close()
                raise Unavailable(self._file, "the server sends it compressed though it was asked not to")
            return response
        response.close()
        status = f"{response.status_code} {response.reason or ''}".strip()
        if response.status_code == 416:
            raise ShardError(f"{self._file}: it is shorter than its server said ({status})", "changed")
        if response.status_code in _GONE:
            raise Unavailable(self._file, status)
        wait = response.headers.get("Retry-After", "")
        raise TransientError(status, float(wait) if wait.isdigit() else 0.0)


class _HttpConnection:
    def __init__(self, file: Url, response: Any) -> None:
        self._file, self._response = file, response
        self.facts = object_info_of(response)
        self.begins = 0
        if response.status_code == 206:
            match = _content_range(response)
            if match is None:
                response.close()
                raise Unavailable(file, "the server's answer does not say which bytes it is")
            self.begins = int(match[1])

    def read(self) -> bytes:
        from urllib3.exceptions import HTTPError

        try:
            return bytes(self._response.raw.read1(_HTTP_CHUNK, decode_content=False))  # what is there, at most that
        except (HTTPError, OSError) as error:
            raise TransientError(error_line(error)) from error

    def close(self) -> None:
        self._response.close()


def object_info_of(response: Any) -> ObjectInfo:
    """Of an answer 200 or 206."""
    headers = response.headers
    if response.status_code == 206:
        match = _content_range(response)
        total = match[3] if match else "*"
    else:
        total = headers.get("Content-Length", "")
    size = int(total) if total.isascii() and total.isdigit() else None
    return ObjectInfo(size, headers.get("ETag", "")[:200], headers.get("Last-Modified", "")[:100])


def _content_range(response: Any) -> re.Match[str] | None:
    return re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", response.headers.get("Content-Range", "").strip())


# ---- buckets


class BucketServer:
    """s3://, gs:// and hf://, through fsspec with the credentials of the environment."""

    def __init__(self, file: Url) -> None:
        self._file = file
        self._store = filesystem(file.scheme)
        self._on_hub = file.scheme == "hf"  # it would list the folder to tell of a file

    def connect(self, start: int, end: int | None) -> Connection:
        facts = self.look()
        with self._translated():
            told: dict[str, Any] = {"size": facts.size} if self._on_hub else {}
            opened = self._store.open(self._file.target, "rb", cache_type="none", block_size=_RANGE_BYTES, **told)
            opened.seek(start)
        return _BucketConnection(self, opened, facts, start, end)

    def look(self) -> ObjectInfo:
        with self._translated():
            self._store.invalidate_cache()
            one: dict[str, Any] = {"expand_info": True} if self._on_hub else {}
            size, marks = told_by(self._store.info(self._file.target, **one))
        return ObjectInfo(size, **dict(marks))

    def close(self) -> None:
        pass

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """What its filesystem raises, which each has its own words for, as one of the three."""
        try:
            yield
        except (TransientError, ShardError):
            raise
        except (FileNotFoundError, IsADirectoryError):
            raise Unavailable(self._file, "404 Not Found") from None
        except PermissionError as error:
            raise Unavailable(self._file, f"403 Forbidden ({error_line(error)})") from None
        except Exception as error:
            if {type(error).__name__, type(error.__cause__).__name__} & _EXPIRED or getattr(error, "errno", 0) == 16:
                raise ShardError(f"{self._file}: it changed while it was read; start again", "changed") from error
            if "Credentials" in type(error).__name__:
                raise Unavailable(self._file, f"{error_line(error)} (credentials come from the environment)") from None
            raise TransientError(error_line(error)) from error


class _BucketConnection:
    """One range after the other; at the end it is asked whether it is still the same file."""

    def __init__(self, server: BucketServer, opened: Any, facts: ObjectInfo, start: int, end: int | None) -> None:
        self._server, self._opened = server, opened
        self.facts, self.begins = facts, start
        self._at, self._end = start, facts.size if end is None else end

    def read(self) -> bytes:
        wanted = _RANGE_BYTES if self._end is None else min(_RANGE_BYTES, self._end - self._at)
        with self._server._translated():
            data = bytes(self._opened.read(wanted)) if wanted > 0 else b""
        self._at += len(data)
        if self._at == self._end and data and self.facts.differs(self._server.look()):
            raise ShardError(f"{self._server._file}: it changed while it was read; start again", "changed")
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._opened.close()


_PROGRESS_BYTES: Final = 256 << 10  # what a connection must bring so that its break does not count against the file


class ResumingReader:
    """A file's bytes from ``start`` to ``end`` in order.  ``stop`` ends its waits.

    facts: of the version that has to be read; of the first answer where none are given.
    """

    def __init__(
        self,
        file: Url,
        server: Server,
        patience: Patience,
        stop: threading.Event,
        *,
        start: int = 0,
        end: int | None = None,
        facts: ObjectInfo | None = None,
    ) -> None:
        self._file, self._server, self._patience, self._stop = file, server, patience, stop
        self._at, self._end = start, end
        self._facts = facts
        self._connection: Connection | None = None
        self._failures, self._progress = 0, 0

    @property
    def facts(self) -> ObjectInfo:
        """Connects, where that has not been done."""
        while self._facts is None:
            try:
                self._connect()
            except TransientError as error:
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
                    raise TransientError("the answer ended early")
                if end is not None and self._at + len(data) > end:
                    data = data[: end - self._at]
            except TransientError as error:
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
                    raise TransientError("the answer ended early")
                skip -= len(data)
            if skip < 0:
                connection = _Rest(connection, data[skip:])
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _wait(self, error: TransientError) -> None:
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


def look_at(file: Url, patience: Patience | None = None) -> ObjectInfo:
    """What is known of a file without reading it.  Raises Unavailable, and ShardError where nobody can be asked."""
    patience = patience or PATIENCE
    server = server_of(file, patience)
    never = threading.Event()
    error: TransientError | None = None
    try:
        for number in range(patience.tries):
            if error is not None:
                pause = min(patience.longest_wait_s, patience.first_wait_s * 2 ** (number - 1))
                never.wait(max(pause * random.uniform(0.5, 1.0), min(error.wait_s, patience.longest_wait_s)))
            try:
                return server.look()
            except TransientError as why:
                error = why
    finally:
        server.close()
    raise ShardError(f"{file}: cannot be looked at, {patience.tries} times: {error}", "not_available")
