"""A remote file's bytes in order, over as many connections as it takes.

A connection that breaks is taken up again where it broke, within the bounds of a ``RetryPolicy``, and only if it is
still the same file.  Web servers are asked through requests, buckets through fsspec.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from curation import __version__
from curation.errors import ShardError
from curation.storage.retry import RetryPolicy, TransientError, retry_after_s, with_retries
from curation.storage.urls import HTTP, ObjectInfo, Source, Url, compressions_in, error_line, filesystem, object_info

RETRIES = RetryPolicy()
_HTTP_CHUNK: Final = 1 << 20
_MAX_REDIRECTS: Final = 10
_RANGE_BYTES: Final = 8 << 20  # of a bucket: large enough that its latency does not count
_PROGRESS_BYTES: Final = 256 << 10  # what a connection must bring so that its break does not count against the file
_GONE: Final = frozenset((400, 401, 403, 404, 405, 407, 410, 411, 414, 451))
_EXPIRED: Final = frozenset(("FileExpired", "PreconditionFailed"))


class Unavailable(ShardError):
    """The server says that the file is not there, or not for us: trying again would not help."""

    def __init__(self, file: Url, why: str) -> None:
        super().__init__(f"{file}: {why}", "not_available")
        self.why = why


class Connection(Protocol):
    """An open answer.  ``begins`` is the first byte that it gives, which may lie before the one asked for."""

    info: ObjectInfo
    begins: int

    def read(self) -> bytes:
        """The next bytes, b"" at the end.  Raises TransientError."""

    def close(self) -> None: ...


class Server(Protocol):
    """Where one file comes from."""

    def connect(self, start: int, end: int | None) -> Connection:
        """Raises TransientError, and Unavailable or another ShardError where trying again would not help."""

    def info(self) -> ObjectInfo:
        """What is known of the file without reading it.  Raises the same."""

    def close(self) -> None: ...


def server_of(file: Url, policy: RetryPolicy) -> Server:
    return HttpServer(file, policy) if file.scheme in HTTP else BucketServer(file)


# ---- web servers


class HttpServer:
    """One file of a web server, through requests: proxies, certificates and .netrc come from the environment."""

    def __init__(self, file: Url, policy: RetryPolicy) -> None:
        import requests

        self._file = file
        self._session = requests.Session()
        self._session.max_redirects = _MAX_REDIRECTS
        self._session.headers.update({"User-Agent": f"curation/{__version__}", "Accept-Encoding": "identity"})
        self._timeout = (policy.connect_s, policy.read_s)

    def connect(self, start: int, end: int | None) -> Connection:
        ranged = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        return _HttpConnection(self._file, self._ask("GET", ranged))

    def info(self) -> ObjectInfo:
        """By HEAD; or by the first byte, because a signed URL may be good for GET alone."""
        try:
            with contextlib.closing(self._ask("HEAD", {})) as response:
                info = object_info_of(response)
                if info.size is not None:
                    return info
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
            url = self._file.target
            response = self._session.request(method, url, headers=headers, stream=True, timeout=self._timeout)
        except (requests.exceptions.InvalidURL, requests.exceptions.TooManyRedirects) as error:
            raise Unavailable(self._file, error_line(error)) from None
        except requests.RequestException as error:
            raise TransientError(error_line(error)) from error
        if response.status_code in (200, 206):
            if compressions_in(response.headers.get("Content-Encoding", "")):
                response.close()
                raise Unavailable(self._file, "the server sends it compressed, although the request forbids this")
            return response
        response.close()
        status = f"{response.status_code} {response.reason or ''}".strip()
        if response.status_code == 416:
            raise ShardError(f"{self._file}: it is shorter than its server announced ({status})", "changed")
        if response.status_code in _GONE:
            raise Unavailable(self._file, status)
        raise TransientError(status, retry_after_s(response.headers.get("Retry-After")) or 0.0)


class _HttpConnection:
    def __init__(self, file: Url, response: Any) -> None:
        self._file, self._response = file, response
        self.info = object_info_of(response)
        self.begins = 0
        if response.status_code == 206:
            match = _content_range(response)
            if match is None:
                response.close()
                raise Unavailable(file, "the server's answer does not say which bytes it contains")
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
    """What an answer with status 200 or 206 says of its file."""
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
        self._on_hub = file.scheme == "hf"  # which would list the folder to say something of one file

    def connect(self, start: int, end: int | None) -> Connection:
        info = self.info()
        with self._translated():
            known: dict[str, Any] = {"size": info.size} if self._on_hub else {}
            opened = self._store.open(self._file.target, "rb", cache_type="none", block_size=_RANGE_BYTES, **known)
            opened.seek(start)
        return _BucketConnection(self, opened, info, start, end)

    def info(self) -> ObjectInfo:
        with self._translated():
            self._store.invalidate_cache()
            one: dict[str, Any] = {"expand_info": True} if self._on_hub else {}
            return object_info(self._store.info(self._file.target, **one))

    def close(self) -> None:
        pass

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what the filesystem raises, each of which has errors of its own, into one of the three of ``Server``."""
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
            if (refusal := _refusal_of_google(error)) is not None:
                raise Unavailable(self._file, f"{refusal} ({error_line(error)})") from None
            if "Credentials" in type(error).__name__:
                raise Unavailable(self._file, f"{error_line(error)} (credentials come from the environment)") from None
            raise TransientError(error_line(error)) from error


def _refusal_of_google(error: Exception) -> str | None:
    """What gcsfs says with errors of its own where trying again would not help: a 403 is an OSError with that word
    alone, any other status its HttpError's ``code``.  None for everything else."""
    if type(error) is OSError and str(error).startswith("Forbidden"):
        return "403 Forbidden"
    code = getattr(error, "code", None) if type(error).__name__ == "HttpError" else None
    return str(code) if str(code) in map(str, _GONE) else None


class _BucketConnection:
    """Reads one range after the other, and asks at the end whether it is still the same file."""

    def __init__(self, server: BucketServer, opened: Any, info: ObjectInfo, start: int, end: int | None) -> None:
        self._server, self._opened = server, opened
        self.info, self.begins = info, start
        self._at, self._end = start, info.size if end is None else end

    def read(self) -> bytes:
        wanted = _RANGE_BYTES if self._end is None else min(_RANGE_BYTES, self._end - self._at)
        with self._server._translated():
            data = bytes(self._opened.read(wanted)) if wanted > 0 else b""
        self._at += len(data)
        if self._at == self._end and data and self.info.differs(self._server.info()):
            raise ShardError(f"{self._server._file}: it changed while it was read; start again", "changed")
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._opened.close()


class ResumingReader:
    """A remote file's bytes in order, read over as many connections as it takes.

    Args:
        file: For messages.
        server: Where the bytes come from.
        policy: How many connections in a row may bring next to nothing, and the waits between them.
        stop: An event that ends the waits.
        start: The first byte to read.
        end: The byte after the last one; None for all.
        info: The version of the file that must be read; None for the one that the first answer is of.
    """

    def __init__(
        self,
        file: Url,
        server: Server,
        policy: RetryPolicy,
        stop: threading.Event,
        *,
        start: int = 0,
        end: int | None = None,
        info: ObjectInfo | None = None,
    ) -> None:
        self._file, self._server, self._policy, self._stop = file, server, policy, stop
        self._at, self._end = start, end
        self._info = info
        self._connection: Connection | None = None
        self._rest = b""  # read from the connection already
        self._failures, self._progress = 0, 0

    @property
    def info(self) -> ObjectInfo:
        """What the server says of the file.  Connects unless that has been done."""
        while self._info is None:
            try:
                self._connect()
            except TransientError as error:
                self._wait(error)
        return self._info

    def read(self) -> bytes:
        """The next bytes, b"" at the end.  Raises ShardError, also after ``stop``."""
        while True:
            try:
                connection = self._connection or self._connect()
                data, self._rest = self._rest or connection.read(), b""
                end = self._end if self._end is not None else self.info.size
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
            if self._info is None:
                self._info = connection.info
            elif self._info.differs(connection.info):
                raise ShardError(f"{self._file}: it changed while it was read; start again", "changed")
            if connection.info.size is not None and self._at > connection.info.size:
                raise ShardError(
                    f"{self._file}: it is shorter than the part that was read ({self._at:,} bytes)", "changed"
                )
            skip = self._at - connection.begins
            while skip > 0:  # a server without ranges begins again
                data = connection.read()
                if not data:
                    raise TransientError("the answer ended early")
                skip -= len(data)
            if skip < 0:
                self._rest = data[skip:]
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _wait(self, error: TransientError) -> None:
        self.close()
        self._failures = 1 if self._progress >= _PROGRESS_BYTES else self._failures + 1
        self._progress = 0
        tries = self._policy.tries
        if self._failures >= tries:
            size = self._info.size if self._info else None
            of = f" of {size:,}" if size is not None else ""
            where = f"broke off at byte {self._at:,}{of}" if self._info else "cannot be read"
            raise ShardError(f"{self._file}: {where}, {tries} times: {error}", "broke_off") from error
        if self._stop.wait(self._policy.wait_s(self._failures, error.wait_s)):
            raise ShardError(f"{self._file}: no longer wanted") from error

    def close(self) -> None:
        self._rest = b""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()


@contextlib.contextmanager
def open_remote(file: Url, policy: RetryPolicy | None = None, *, start: int = 0) -> Iterator[ResumingReader]:
    """Open a remote file to read it from byte ``start`` to its end.  The block may raise ShardError."""
    policy = policy or RETRIES
    server = server_of(file, policy)
    reader = ResumingReader(file, server, policy, threading.Event(), start=start)
    try:
        yield reader
    finally:
        reader.close()
        server.close()


def read_source(source: Source) -> bytes:
    """All bytes of a file, which must be small, from a disk or from a server.  Raises OSError or ShardError."""
    if isinstance(source, Path):
        return source.read_bytes()
    with open_remote(source) as reader:
        return b"".join(iter(reader.read, b""))


def fetch_info(file: Url, policy: RetryPolicy | None = None) -> ObjectInfo:
    """What is known of a remote file without reading it.

    Raises:
        Unavailable: The server says that the file is not there, or not for this user.
        ShardError: The server does not answer.
    """
    policy = policy or RETRIES
    server = server_of(file, policy)
    try:
        return with_retries(server.info, policy)
    except TransientError as error:
        raise ShardError(f"{file}: no answer, {policy.tries} times: {error}", "not_available") from error
    finally:
        server.close()
