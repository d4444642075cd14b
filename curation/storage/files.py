"""Files that appear whole or not at all, folders made durable, and what to say when neither can be written.

There are three ways to write a file.  ``AtomicFile`` is one output of a shard: its bytes are hashed and lie under a
temporary name until the shard's commit renames it.  ``whole_file`` (or ``write_whole``, for bytes) is any other
file: it gets its name when its block ends.  ``link_exclusively`` creates a file that one process of several creates.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Self

import xxhash

from curation.cluster import host_identity, process_is_gone, process_start
from curation.errors import InfrastructureError, LostClaim, SampleError, ShardError, UsageError
from curation.jsonio import parse_json

_LEFTOVER = re.compile(r"\..+\.([0-9a-f]{8})([0-9a-f]{8})([0-9a-f]{16})[0-9a-f]{8}\.tmp")
_LEFTOVER_S = 24 * 3600.0
MAX_RECEIPT_BYTES = 256 << 20  # the `files` layout names every file of a shard
_BUFFER_BYTES = 256 << 10
_WRITEBACK_BYTES = 8 << 20  # after so many more bytes the kernel is asked to begin writing them back
_MAX_PIECES = 1024  # of one writev, on Linux
_MAX_NAME_BYTES = 255  # of one path component, on every filesystem that clusters use
_MAX_OPEN_FOLDERS = 32  # the receipt buckets and output folders that a process publishes into by turns
_TRIES = 20
_NO_FSYNC = (errno.EINVAL, errno.EBADF)  # a filesystem that has no fsync of folders
_GONE = (errno.ENOENT, errno.ESTALE)  # of the process's own file: another worker cleared it away
_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the filesystem is read-only",
}
_NO_LINK = {  # what filesystems answer that have no hard links, or not between these names
    errno.EPERM: "this filesystem has no hard links",
    errno.ENOTSUP: "this filesystem has no hard links",
    errno.EOPNOTSUPP: "this filesystem has no hard links",
    errno.ENOSYS: "this filesystem has no hard links",
    errno.EXDEV: "no hard link can be made here, because two filesystems are mounted in this folder",
    errno.EMLINK: "this filesystem allows no second hard link to a file",
}
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


@dataclass(frozen=True, slots=True)
class Published:
    """One output as a receipt names it.

    Attributes:
        path: Relative to the stage's output folder.
        temporary: The file's name until the commit.
        size: In bytes.
        digest: xxh3-128, hex.
        checked: Whether readers may rely on the digest.  They may not for a loose copy that a later stage replaces.
    """

    path: str
    temporary: str
    size: int
    digest: str
    checked: bool = True

    def record(self) -> dict[str, Any]:
        record = {"path": self.path, "temporary": self.temporary, "size": self.size, "digest": self.digest}
        return {**record, "checked": self.checked}


class _OpenFolder:
    """A descriptor that is closed with its last user, because one thread may drop it while another calls fsync."""

    def __init__(self, folder: Path) -> None:
        self.descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.descriptor)


_open: OrderedDict[Path, _OpenFolder] = OrderedDict()  # so that a commit need not look up its folders again
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
            kept = _OpenFolder(folder)
        except FileNotFoundError:
            return  # somebody removed it with its contents: readers will see that the outputs are missing
        _fsync(kept)
    with _lock:
        _open[folder] = kept
        _open.move_to_end(folder)
        if len(_open) > _MAX_OPEN_FOLDERS:
            _open.popitem(last=False)


def forget_folder(folder: Path) -> None:
    """Drop the open descriptor of a folder that was removed: it does not belong to the new folder of that name."""
    with _lock:
        _open.pop(folder, None)


def _fsync(kept: _OpenFolder) -> None:
    try:
        os.fsync(kept.descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def storage_error(path: Path, error: OSError) -> InfrastructureError:
    """The error that tells the user why a folder or file cannot be written."""
    what = _CAUSES.get(error.errno or 0) or error.strerror or str(error)
    if error.errno == errno.ENOSPC and _inodes_are_used_up(path):
        what = "no inodes are left (too many files and folders)"
    return InfrastructureError(
        f"{path}: cannot be written: {what}; fix this and start again, nothing published is lost"
    )


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into the InfrastructureError that says why ``path`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def _inodes_are_used_up(path: Path) -> bool:
    """Whether a filesystem with bytes to spare has no room for one more file."""
    try:
        return (found := os.statvfs(path.parent)).f_files > 0 and found.f_favail == 0
    except OSError:
        return False


def is_storage_trouble(error: OSError) -> bool:
    """Whether the filesystem refuses every write, so that the next shard would fail as well."""
    return error.errno in _CAUSES


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


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = True, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that gets its name when the block ends without an exception; otherwise nothing is left.

    Args:
        path: The final name, in a folder that exists.
        durable: Whether the file survives a crash of the machine.  Not needed for what is written every few seconds.
        replace: Whether a file that is there already is replaced.

    Raises:
        FileExistsError: The file is there and ``replace`` is off.
        OSError: The file cannot be written.
    """
    temporary = path.with_name(temporary_name(path.name, _writer_token()))
    try:
        with open(temporary, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            make_link(temporary, path)
        if durable:
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _writer_token() -> str:
    """A token that tells which process writes: a digest of its machine, its pid, its start time, and chance."""
    pid = os.getpid()
    return f"{_machine()}{pid:08x}{int(process_start(pid) or 0):016x}{secrets.token_hex(4)}"


@lru_cache(maxsize=1)
def _machine() -> str:
    return xxhash.xxh32_hexdigest("\0".join(host_identity()).encode())


def clear_leftovers(folder: Path, now: float) -> None:
    """Remove the temporary files of ``whole_file`` in a folder whose writers were killed.

    On this machine the process tells whether it lives.  Of other machines, a file goes that is a day old.

    Args:
        folder: The folder, whose subfolders are not looked into.
        now: The modification time of a file that was written a moment ago on the same filesystem, whose clock may
            differ from this machine's.
    """
    for name in names_in(folder):
        if not (found := _LEFTOVER.fullmatch(name)):
            continue
        path, (machine, pid, start) = folder / name, found.groups()
        with contextlib.suppress(OSError):
            if machine == _machine() and int(start, 16):
                gone = process_is_gone(int(pid, 16), str(int(start, 16)))
            else:
                gone = now - path.stat().st_mtime > _LEFTOVER_S
            if gone:
                path.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file that appears whole or not at all, like ``whole_file``.  Raises OSError."""
    with whole_file(path, durable=durable) as file:
        file.write(data)


def make_link(source: Path, name: Path) -> None:
    """Give a file a second name, which one of several processes can do; the proof of who came first rests on it.

    Raises:
        InfrastructureError: The filesystem has no hard links.
        OSError: Any other trouble; FileExistsError where the name is taken.
    """
    try:
        os.link(source, name)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        raise InfrastructureError(
            f"{name.parent}: {_NO_LINK[error.errno]} ({error.strerror}), and without them two workers could both "
            "publish a shard; choose an output folder on another filesystem (ext4, XFS, Lustre, GPFS or NFS have "
            "hard links; FAT, exFAT and buckets that are mounted as a folder have none)"
        ) from error


def link_exclusively(path: Path, data: bytes) -> bool:
    """Create a whole, durable file; returns False where there is one already.  Raises InfrastructureError."""
    make_folder(path.parent)
    with storage_errors(path), contextlib.suppress(FileExistsError):
        with whole_file(path, replace=False) as file:
            file.write(data)
        return True
    return False


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
    """The hidden name under which an attempt writes a file (``tmp``) or puts an earlier one aside (``old``)."""
    if len(os.fsencode(name)) + len(token) + 6 > _MAX_NAME_BYTES:
        name = "~" + xxhash.xxh3_128_hexdigest(os.fsencode(name))
    return f".{name}.{token}.{end}"


def names_in(folder: Path) -> list[str]:
    """The names of what lies in a folder; none where it does not exist.

    Raises:
        InfrastructureError: It cannot be read.
    """
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InfrastructureError(f"{folder}: cannot be read ({error.strerror})") from error


def glob_paths(pattern: str, *, recursive: bool = False) -> list[str]:
    """The paths that a pattern matches, in order.  recursive: ``**`` stands for any number of folders.

    As much of its beginning as exists is read as it stands: ``data [v2]/*.tar`` looks into the folder ``data [v2]``.
    """
    there, rest = existing_part(pattern)
    return sorted(glob.glob(os.path.join(glob.escape(there), rest) if there else rest, recursive=recursive))


def is_pattern(path: str) -> bool:
    """Whether a path has characters of a pattern (also braces) in a part that does not exist as it stands."""
    return any(c in existing_part(path)[1] for c in "*?[{")


def existing_part(pattern: str) -> tuple[str, str]:
    """As much of the beginning of a path as exists, and the rest."""
    parts = Path(pattern).parts
    count = 0
    while count < len(parts) and os.path.lexists(os.path.join(*parts[: count + 1])):
        count += 1
    return os.path.join("", *parts[:count]), os.path.join("", *parts[count:])


def make_folder(folder: Path) -> None:
    """Make a folder and those above it unless they exist.  Raises InfrastructureError."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


class AtomicFile:
    """An output of a shard, whose bytes are hashed as they are written.  Nobody sees them before the commit gives the
    file its final name.  ``ShardContext.output`` makes it.

    Attributes:
        size: In bytes; final after ``close``.
    """

    def __init__(self, final: Path, token: str) -> None:
        self.final = final
        self.size = 0
        self._digest = xxhash.xxh3_128()
        self._pending = bytearray()  # small pieces that are not written yet
        if len(os.fsencode(final.name)) > _MAX_NAME_BYTES:  # a rename to it could never be finished
            raise ShardError(f"{final.parent}: no file can have the name {final.name[:60]!r}..., it is too long")
        self.temporary = final.with_name(temporary_name(final.name, token))
        self._writeback_from = 0  # up to here the kernel was asked to write back
        with storage_errors(self.temporary):
            self._descriptor = _create(self.temporary)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        if len(self._pending) + len(data) < _BUFFER_BYTES:
            self._pending += data
        else:
            self.write_pieces((data,))
        return len(data)

    def write_pieces(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        """Write several pieces by one system call; they are not copied.  The caller may change them afterwards.

        Raises InfrastructureError or LostClaim.
        """
        if self._pending:
            self._put((self._pending,))
            self._pending = bytearray()
        self._put(pieces)

    def tell(self) -> int:
        return self.size + len(self._pending)

    @property
    def digest(self) -> str:
        """xxh3-128, hex; final after ``close``."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Write what waits and make the file durable.  Raises InfrastructureError or LostClaim."""
        if self._descriptor < 0:
            return
        try:
            try:
                self.write_pieces(())
                os.fsync(self._descriptor)
            finally:
                descriptor, self._descriptor = self._descriptor, -1
                os.close(descriptor)  # NFS reports a full disk here
        except OSError as error:
            raise _own_file_error(self.temporary, error) from error

    def discard(self) -> None:
        """Close the file and keep nothing of it."""
        with contextlib.suppress(OSError):
            if self._descriptor >= 0:
                descriptor, self._descriptor = self._descriptor, -1
                os.close(descriptor)
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    def move_into_place(self) -> None:
        """Give the closed file its final name at once.  For files outside of a shard's commit.  Raises OSError."""
        os.replace(self.temporary, self.final)
        fsync_folder(self.final.parent)

    def published(self, root: Path, *, checked: bool) -> Published:
        """What the receipt says of this output.  Called after ``close``; ``root`` is the stage's output folder."""
        path = os.path.normpath(f"{_relative(self.final.parent, root)}/{self.final.name}")
        return Published(path, self.temporary.name, self.size, self.digest, checked)

    def _put(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        """Hash bytes, write them and count them in ``size``."""
        for piece in pieces:
            self._digest.update(piece)
        try:
            for first in range(0, len(pieces), _MAX_PIECES):
                left = pieces[first : first + _MAX_PIECES]
                missing = sum(map(len, left))
                while missing:
                    count = os.writev(self._descriptor, left)
                    self.size += count
                    missing -= count
                    if missing:  # a filesystem may take less than it is given, as at the end of a quota
                        left = [memoryview(b"".join(left))[count:]]
            if self.size - self._writeback_from >= _WRITEBACK_BYTES:
                self._start_writeback()
        except OSError as error:
            raise _own_file_error(self.temporary, error) from error

    def _start_writeback(self) -> None:
        """Let the kernel begin to write what it was given so far, so that the fsync at the end finds little left.

        Linux begins to write dirty pages back when a program says that it does not need them, and does not wait.
        """
        begun, self._writeback_from = self._writeback_from, self.size
        with contextlib.suppress(OSError):  # a filesystem that takes no advice
            os.posix_fadvise(self._descriptor, begun, self.size - begun, os.POSIX_FADV_DONTNEED)

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


def read_given(where: str, path: Path, max_bytes: int) -> bytes:
    """The bytes of a file that the user gives.  where: what messages call it, as a rule its flag and its path.

    Raises:
        UsageError: It cannot be read, or it is larger than ``max_bytes``.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UsageError(f"{where}: cannot be read ({error.strerror})") from None
    if len(data) > max_bytes:
        raise UsageError(f"{where}: has more than {max_bytes:,} bytes")
    return data


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file that this package wrote; None where there is no file or it holds something else."""
    data = read_whole(path)
    return None if data is None else parse_record(data)


def parse_record(data: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(data, MAX_RECEIPT_BYTES)
    except SampleError:
        return None
    return value if isinstance(value, dict) else None


def read_whole(path: Path) -> bytes | None:
    """The bytes of a file that this package wrote, None where there is none."""
    tries = _TRIES
    while True:
        tries -= 1
        try:
            with open(path, "rb") as file:
                return file.read(MAX_RECEIPT_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE or tries == 0:  # else it was replaced while it was read: read it again
                raise InfrastructureError(f"{path}: cannot be read ({error.strerror})") from error


@lru_cache(maxsize=1024)
def _relative(folder: Path, root: Path) -> str:
    """An output folder relative to the stage's; cached, because outputs lie in few folders."""
    return os.path.relpath(os.path.realpath(folder), os.path.realpath(root))


def _create(path: Path) -> int:
    """A descriptor of a new file, whose folder is made where it is missing."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        forget_folder(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


def write_durably(path: Path, data: bytes) -> None:
    """Create a file under exactly this name, for the commit, and make its bytes durable.  Raises OSError."""
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
