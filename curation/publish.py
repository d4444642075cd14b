"""Outputs that appear whole or not at all, and the commit that only one attempt at a shard can win.

Every output is written under a temporary name in its own folder, or as an upload that is not completed yet, and hashed
as it is written.  The commit is a hard link that only one attempt of a generation can create, followed by renames and
completions that anyone can finish after a crash.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from curation.errors import InfrastructureError, LostClaim, SampleError, ShardError
from curation.folders import forget_folder, fsync_folder
from curation.jsonio import dump_json, parse_json
from curation.outputs import Output, Published
from curation.storage import storage_error
from curation.uploads import complete_upload

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


class OutputFile(Output):
    """A binary file under a temporary name.  Made by ``ShardWork.output``; the final name appears at the commit."""

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
                self._hurry()
        except OSError as error:
            raise _own_file_error(self.temporary, error) from error

    def _hurry(self) -> None:
        """Have the kernel begin to write what it was given so far, so that the fsync at the end finds little left.

        Linux starts writing dirty pages back when they are declared not to be needed, and does not wait for them.
        """
        begun, self._hurried = self._hurried, self.size
        with contextlib.suppress(OSError):  # a filesystem that takes no advice
            os.posix_fadvise(self._descriptor, begun, self.size - begun, os.POSIX_FADV_DONTNEED)


class Commit:
    """The commit of one shard in the receipts folder of one stage.

    root: the stage's output folder, which every path in a receipt is relative to.  folder: the bucket of receipts.
    named: whether a valid record may name this attempt's temporary files, which must then stay for whoever finishes it.
    """

    def __init__(self, root: Path, folder: Path, shard_id: str) -> None:
        self._root = root
        self._folder = folder
        self._shard_id = shard_id
        self.receipt_path = folder / f"{shard_id}.json"
        self.named = False

    def read_receipt(self) -> dict[str, Any] | None:
        """The shard's receipt, None where there is none (or one that is no receipt: the shard is then done again)."""
        return read_record(self.receipt_path)

    def write(self, receipt: dict[str, Any]) -> None:
        """Publish the outputs that ``receipt`` names, and the receipt last.  Its outputs are durable under their
        temporary names already.  Raises LostClaim when another attempt won."""
        token, generation = str(receipt["token"]), int(receipt["generation"])
        prepared = self.prepared(token)
        try:
            _write_durably(prepared, dump_json(receipt, indent=True))
            winner = self._link(prepared, self.record(generation), receipt)
        except BaseException as error:
            if not self.named:
                with contextlib.suppress(OSError):
                    prepared.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _own_file_error(prepared, error) from error
            raise
        try:
            if self._finish(self.record(generation), winner) and winner.get("token") == token:
                return  # nobody else can have renamed our receipt: it stood there, whatever has followed it since
            final = self.read_receipt()
            if final is not None and final.get("token") == token:
                return
            self.named = False  # whoever won, a record of ours is void from here on
            prepared.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self.receipt_path, error) from error
        raise LostClaim(f"shard {self._shard_id}: another attempt committed first")

    def finish_pending(self, after_generation: int = 0, names: Iterable[str] | None = None) -> bool:
        """Finish a commit that a dead process left; whether there was any.

        A valid record has the generation that follows the receipt's: only that one is looked for, or those among
        ``names`` of the folder.
        """
        if names is None:
            records = [self.record(after_generation + 1)]
        else:
            prefix = f".{self._shard_id}."
            middles = [n[len(prefix) : -7] for n in names if n.startswith(prefix) and n.endswith(".commit")]
            records = [self.record(int(middle)) for middle in middles if middle.isdecimal()]
        found = False
        for record in records:
            value = read_record(record)
            if value is not None:
                found = True
                try:
                    self._finish(record, value)
                except OSError as error:
                    raise storage_error(self.receipt_path, error) from error
        return found

    def _link(self, prepared: Path, record: Path, receipt: dict[str, Any]) -> dict[str, Any]:
        """Step 2: the receipt of the attempt that holds the record, which is this one if it could be linked."""
        for _ in range(_TRIES):
            try:
                self.named = True
                os.link(prepared, record)
                return receipt
            except FileExistsError:
                self.named = False
                winner = read_record(record)
                if winner is not None:
                    self.named = winner.get("token") == receipt["token"]  # the answer to our link was lost on its way
                    return winner
                # Finished in between.  Going on without a record of our own would be unsafe: link it, and step 3
                # finds it void.
                time.sleep(0.001)
            except FileNotFoundError:
                self.named = False
                raise LostClaim(f"shard {self._shard_id}: its files were cleared; another attempt won") from None
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                    self.named = False
                    raise InfrastructureError(
                        f"{self._folder}: this filesystem has no hard links ({error.strerror}), and commits need them"
                    ) from error
                raise
        raise InfrastructureError(f"{record}: is no record of a commit; move it away and start again")

    def _finish(self, record: Path, value: dict[str, Any]) -> bool:
        """Steps 3 and 4, which any process may take, in this order, at any time, any number of times.

        Returns whether this call put the receipt in its place; False where another had, or the record was void.
        """
        current = self.read_receipt()  # after the record was read
        if current is not None and int(current.get("generation", 0)) >= int(value["generation"]):
            record.unlink(missing_ok=True)
            return False
        folders: set[Path] = set()
        for output in value.get("outputs", []):
            if "upload" in output:
                complete_upload(output)
                continue
            final = self._root / output["path"]
            with contextlib.suppress(FileNotFoundError):  # renamed already
                os.rename(final.with_name(output["temporary"]), final)
            folders.add(final.parent)
        for folder in folders:
            fsync_folder(folder)
        published = False
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.prepared(str(value["token"])), self.receipt_path)
            published = True
        fsync_folder(self._folder)
        record.unlink(missing_ok=True)
        return published

    def prepared(self, token: str) -> Path:
        """The receipt of an attempt before it is committed."""
        return self._folder / temporary_name(self._shard_id, token)

    def record(self, generation: int) -> Path:
        return self._folder / f".{self._shard_id}.{generation}.commit"


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
