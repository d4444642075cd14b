"""What every output does while it is written: small writes are gathered, everything is hashed on its way.

Folders made durable through descriptors that stay open, so that a shard's commit does not look them up again.

What is wrong when a folder or a file cannot be written, in words that tell the user what to mend.

A list of digests as coreutils' ``sha256sum -c`` reads it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Self

import xxhash

from curation.errors import InfrastructureError, LostClaim, SampleError, ShardError
from curation.jsonio import parse_json

_BUFFER_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Published:
    """One output as a receipt names it: its path relative to the stage's output folder, or its URL; size, digest.

    temporary: the file's name until the commit.  checked: whether readers may insist on the digest; a loose copy that a
    later stage replaces is not.  upload: what completes an object's upload.
    """

    path: str
    temporary: str
    size: int
    digest: str
    checked: bool = True
    upload: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        said = {"path": self.path, "temporary": self.temporary, "size": self.size, "digest": self.digest}
        return {**said, "checked": self.checked, **({"upload": self.upload} if self.upload else {})}


class AtomicWriter(ABC):
    """Bytes that nobody sees before the commit."""

    def __init__(self) -> None:
        self.size = 0
        self._digest = xxhash.xxh3_128()
        self._pending = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        if len(data) + len(self._pending) < _BUFFER_BYTES:
            self._pending += data
        else:
            self._drain()
            self._write(data)
        return len(data)

    def write_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        """``write`` of each, in one go."""
        self._drain()
        for piece in pieces:
            self._digest.update(piece)
        self._put(pieces)

    def tell(self) -> int:
        return self.size + len(self._pending)

    @property
    def digest(self) -> str:
        """xxh3-128, hex."""
        return self._digest.hexdigest()

    @abstractmethod
    def close(self) -> None:
        """Flush and make durable.  The digest and size are final after this."""

    @abstractmethod
    def discard(self) -> None:
        """Close without keeping anything."""

    @abstractmethod
    def published(self, root: Path, *, checked: bool) -> Published:
        """For the receipt, after ``close``.  root: the stage's output folder."""

    @abstractmethod
    def _put(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        """Take bytes that are hashed already, and count them in ``size``; they are the caller's again afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: object) -> None:
        try:
            if exc_type is None:
                self.close()
        except BaseException:
            self.discard()
            raise
        if exc_type is not None:
            self.discard()

    def _drain(self) -> None:
        if self._pending:
            self._write(self._pending)
            self._pending = bytearray()

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        self._digest.update(data)
        self._put([data])


_KEPT = 32  # descriptors: the buckets and output folders that a process publishes into by turns


_NO_FSYNC = (errno.EINVAL, errno.EBADF)  # a filesystem that has no fsync of folders


class _Open:
    """A descriptor that is closed with its last user: one thread may drop it while another is in its fsync."""

    def __init__(self, folder: Path) -> None:
        self.descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.descriptor)


_open: OrderedDict[Path, _Open] = OrderedDict()


_lock = threading.Lock()


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable.  Raises OSError."""
    with _lock:
        kept = _open.get(folder)
    try:
        if kept is not None:
            _fsync(kept)
    except OSError as error:
        if error.errno != errno.ESTALE:  # over NFS: it was replaced by another of its name
            raise
        kept = None
    if kept is None:
        try:
            kept = _Open(folder)
        except FileNotFoundError:
            return  # somebody removed it with all that was in it: readers will see that the outputs are not there
        _fsync(kept)
    with _lock:
        _open[folder] = kept
        _open.move_to_end(folder)
        if len(_open) > _KEPT:
            _open.popitem(last=False)


def forget_folder(folder: Path) -> None:
    """``folder`` was not there and is made anew: a descriptor of the one that was there before is of no use."""
    with _lock:
        _open.pop(folder, None)


def _fsync(kept: _Open) -> None:
    try:
        os.fsync(kept.descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the filesystem is read-only",
}


def storage_error(path: Path, error: OSError) -> InfrastructureError:
    """What to tell the user when a folder or file cannot be written."""
    what = _CAUSES.get(error.errno or 0) or error.strerror or str(error)
    if error.errno == errno.ENOSPC and _inodes_are_used_up(path):
        what = "no inodes are left (too many files and folders)"
    return InfrastructureError(f"{path}: cannot be written: {what}; mend it and start again, nothing published is lost")


def _inodes_are_used_up(path: Path) -> bool:
    """Where a filesystem with bytes to spare has no room for one more file."""
    try:
        return (found := os.statvfs(path.parent)).f_files > 0 and found.f_favail == 0
    except OSError:
        return False


def is_storage_trouble(error: OSError) -> bool:
    """Whether the filesystem refuses everybody, so that the next shard would fare no better."""
    return error.errno in _CAUSES


_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def manifest_line(name: str, sha256: str) -> bytes:
    """``<digest>  <name>``; a name with a backslash or a line break is escaped, and the line says so by a backslash."""
    escaped = "".join(_ESCAPES.get(char, char) for char in name)
    return os.fsencode(f"{chr(92) if escaped != name else ''}{sha256}  {escaped}\n")


def write_manifest(path: Path, rows: Iterable[tuple[Path, str]]) -> None:
    """Write (file, SHA-256) rows, the files named from the manifest's own folder: ``sha256sum -c`` is run there.

    The file appears whole or not at all.  Raises OSError.
    """
    folder = path.parent.resolve()
    lines = [manifest_line(os.path.relpath(file.resolve(), folder), sha256) for file, sha256 in rows]
    write_whole(path, b"".join(lines))


def write_whole(path: Path, data: bytes) -> None:
    """A file that appears whole or not at all.  Raises OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


MAX_RECEIPT_BYTES = 256 << 20  # the `files` layout names every file of a shard


_HURRY_BYTES = 8 << 20


_MAX_PIECES = 1024  # of one writev, on Linux


_MAX_NAME_BYTES = 255  # of one path component, on every filesystem that clusters use


_TRIES = 20


_GONE = (errno.ENOENT, errno.ESTALE)  # of one's own file: another worker cleared it away


def fast_digest(path: Path, block_bytes: int = 4 << 20) -> str:
    """xxh3-128 of a file, hex."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(block_bytes)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def temporary_name(name: str, token: str, end: str = "tmp") -> str:
    """The name that an attempt writes a file under, or, with ``old``, puts one aside: hidden, its own, not too long."""
    if len(os.fsencode(name)) + len(token) + 6 > _MAX_NAME_BYTES:
        name = "~" + xxhash.xxh3_128_hexdigest(os.fsencode(name))
    return f".{name}.{token}.{end}"


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error


class AtomicFile(AtomicWriter):
    """A binary file under a temporary name.  Made by ``ShardContext.output``; the final name appears at the commit."""

    def __init__(self, final: Path, token: str) -> None:
        super().__init__()
        self.final = final
        if len(os.fsencode(final.name)) > _MAX_NAME_BYTES:  # a rename to it could never be finished
            raise ShardError(f"{final.parent}: no file can have the name {final.name[:60]!r}..., it is too long")
        self.temporary = final.with_name(temporary_name(final.name, token))
        self._hurried = 0  # up to here the kernel was asked to write back
        try:
            self._descriptor = _create(self.temporary)
        except OSError as error:
            raise storage_error(self.temporary, error) from error

    def close(self) -> None:
        if self._descriptor < 0:
            return
        try:
            try:
                self._drain()
                os.fsync(self._descriptor)
            finally:
                descriptor, self._descriptor = self._descriptor, -1
                os.close(descriptor)  # NFS reports a full disk here
        except OSError as error:
            raise _own_file_error(self.temporary, error) from error

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            if self._descriptor >= 0:
                descriptor, self._descriptor = self._descriptor, -1
                os.close(descriptor)
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    def published(self, root: Path, *, checked: bool) -> Published:
        path = os.path.normpath(f"{_relative(self.final.parent, root)}/{self.final.name}")
        return Published(path, self.temporary.name, self.size, self.digest, checked)

    def _put(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        views = deque(memoryview(piece) for piece in pieces)
        try:
            while views:
                count = os.writev(self._descriptor, list(islice(views, _MAX_PIECES)))
                self.size += count
                while views and count >= len(views[0]):
                    count -= len(views.popleft())
                if count:
                    views[0] = views[0][count:]
            if self.size - self._hurried >= _HURRY_BYTES:
                self._start_writeback()
        except OSError as error:
            raise _own_file_error(self.temporary, error) from error

    def _start_writeback(self) -> None:
        """Have the kernel begin to write what it was given so far, so that the fsync at the end finds little left.

        Linux starts writing dirty pages back when they are declared not to be needed, and does not wait for them.
        """
        begun, self._hurried = self._hurried, self.size
        with contextlib.suppress(OSError):  # a filesystem that takes no advice
            os.posix_fadvise(self._descriptor, begun, self.size - begun, os.POSIX_FADV_DONTNEED)


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object of the ledger's own, None where there is none or where it is not one."""
    data = read_whole(path)
    return None if data is None else parse_record(data)


def parse_record(data: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(data, MAX_RECEIPT_BYTES)
    except SampleError:
        return None
    return value if isinstance(value, dict) else None


def read_whole(path: Path) -> bytes | None:
    """The bytes of a file of the ledger's own, None where there is none."""
    tries = _TRIES
    while True:
        tries -= 1
        try:
            with open(path, "rb") as file:
                return file.read(MAX_RECEIPT_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE or tries == 0:  # replaced while it was read: look again
                raise InfrastructureError(f"{path}: cannot be read ({error.strerror})") from error


@lru_cache(maxsize=1024)
def _relative(folder: Path, root: Path) -> str:
    """An output folder as seen from the stage's: looked up once, because outputs lie in few folders."""
    return os.path.relpath(os.path.realpath(folder), os.path.realpath(root))


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        forget_folder(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


def _write_durably(path: Path, data: bytes) -> None:
    descriptor = _create(path)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_file_error(path: Path, error: OSError) -> Exception:
    if error.errno in _GONE:
        return LostClaim(f"{path}: gone; another worker has taken the shard")
    return storage_error(path, error)


def link_exclusively(path: Path, data: bytes, token: str) -> bool:
    """Create ``path`` with ``data``, durable and never seen half-written; False when it is there already."""
    temporary = path.with_name(f".{path.name}.{token}.tmp")
    try:
        _write_durably(temporary, data)
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
