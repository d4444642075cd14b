"""Outputs that appear whole or not at all, and the commit that only one attempt at a shard can win.

Every output is written under a temporary name in its own folder, hashed as it is written.  The commit is a hard link
that only one attempt of a generation can create, followed by renames that anyone can finish after a crash.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import orjson
import xxhash

from curation.errors import InfrastructureError, LostClaim

MAX_RECEIPT_BYTES = 256 << 20  # the `files` layout names every file of a shard
_BUFFER_BYTES = 1 << 20
_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the filesystem is read-only",
}


def fast_digest(path: Path, block_bytes: int = 4 << 20) -> str:
    """xxh3-128 of a file, hex."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(block_bytes)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def storage_error(path: Path, error: OSError) -> InfrastructureError:
    """What to tell the user when a folder or file cannot be written."""
    what = _CAUSES.get(error.errno or 0) or error.strerror or str(error)
    return InfrastructureError(f"{path}: cannot be written: {what}; mend it and start again, nothing published is lost")


class OutputFile:
    """A binary file under a temporary name, hashed as it is written; small writes are gathered, large ones go straight.

    Made by ``ShardWork.output``; the final name appears at the commit.
    """

    def __init__(self, final: Path, token: str) -> None:
        self.final = final
        self.temporary = final.with_name(f".{final.name}.{token}.tmp")
        self.size = 0
        self._digest = xxhash.xxh3_128()
        self._pending = bytearray()
        try:
            self._descriptor = _create(self.temporary)
        except OSError as error:
            raise storage_error(self.temporary, error) from error

    def write(self, data: bytes | bytearray | memoryview) -> int:
        if len(data) + len(self._pending) < _BUFFER_BYTES:
            self._pending += data
        else:
            self._drain()
            self._write(data)
        return len(data)

    def tell(self) -> int:
        return self.size + len(self._pending)

    def close(self) -> None:
        """Flush and make durable.  The digest and size are final after this."""
        if self._descriptor < 0:
            return
        try:
            self._drain()
            os.fsync(self._descriptor)
        except OSError as error:
            raise storage_error(self.temporary, error) from error
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Close without keeping anything."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self.discard()

    def _drain(self) -> None:
        if self._pending:
            self._write(self._pending)
            self._pending = bytearray()

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        self._digest.update(data)
        view = memoryview(data)
        self.size += len(view)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise storage_error(self.temporary, error) from error


@dataclass(frozen=True, slots=True)
class Published:
    """One output as a receipt names it: its path relative to the stage's output folder, size, digest.

    checked: whether readers may insist on the digest; a loose copy that a later stage replaces is not.
    """

    path: str
    temporary: str
    size: int
    digest: str
    checked: bool = True


class Commit:
    """The commit of one shard in the receipts folder of one stage.

    root: the stage's output folder, which every path in a receipt is relative to.  folder: the bucket of receipts.
    """

    def __init__(self, root: Path, folder: Path, shard_id: str) -> None:
        self._root = root
        self._folder = folder
        self._shard_id = shard_id
        self.receipt_path = folder / f"{shard_id}.json"

    def read_receipt(self) -> dict[str, Any] | None:
        """The shard's receipt, None where there is none (or one that is no receipt: the shard is then done again)."""
        return read_record(self.receipt_path)

    def write(self, receipt: dict[str, Any]) -> None:
        """Publish the outputs that ``receipt`` names, and the receipt last.  Its outputs are durable under their
        temporary names already.  Raises LostClaim when another attempt won."""
        token, generation = str(receipt["token"]), int(receipt["generation"])
        prepared = self._prepared(token)
        record = self._folder / f".{self._shard_id}.{generation}.commit"
        try:
            _write_durably(prepared, orjson.dumps(receipt, option=orjson.OPT_INDENT_2))
        except OSError as error:
            raise storage_error(prepared, error) from error
        try:
            os.link(prepared, record)
        except FileExistsError:
            winner = read_record(record)
            if winner is not None and winner.get("token") != token:
                self._finish(record, winner)
                prepared.unlink(missing_ok=True)
                raise LostClaim(f"shard {self._shard_id}: another attempt committed first") from None
        self._finish(record, receipt)
        final = self.read_receipt()
        if final is None or final.get("token") != token:
            prepared.unlink(missing_ok=True)
            raise LostClaim(f"shard {self._shard_id}: a later attempt committed first")

    def finish_pending(self, names: Iterable[str]) -> bool:
        """Finish commits that a dead process left, among ``names`` of the folder; whether there was any."""
        prefix, found = f".{self._shard_id}.", False
        for name in names:
            if name.startswith(prefix) and name.endswith(".commit") and name[len(prefix) : -7].isdigit():
                record = self._folder / name
                value = read_record(record)
                if value is not None:
                    self._finish(record, value)
                    found = True
        return found

    def _finish(self, record: Path, value: dict[str, Any]) -> None:
        """Steps that any process may take, in this order, at any time, any number of times."""
        current = self.read_receipt()  # after the record was read
        if current is not None and int(current.get("generation", 0)) >= int(value["generation"]):
            record.unlink(missing_ok=True)
            return
        outputs: Sequence[dict[str, Any]] = value.get("outputs", [])
        folders: set[Path] = set()
        for output in outputs:
            final = self._root / output["path"]
            with contextlib.suppress(FileNotFoundError):  # renamed already
                os.rename(final.with_name(output["temporary"]), final)
            folders.add(final.parent)
        for output in outputs:
            try:
                whole = os.stat(self._root / output["path"]).st_size == output["size"]
            except FileNotFoundError:
                whole = False
            if not whole:  # someone cleared the attempt's files away: it published nothing
                record.unlink(missing_ok=True)
                return
        for folder in folders:
            _fsync_folder(folder)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._prepared(str(value["token"])), self.receipt_path)
        _fsync_folder(self._folder)
        record.unlink(missing_ok=True)

    def _prepared(self, token: str) -> Path:
        return self._folder / f".{self._shard_id}.{token}.tmp"

    def clear(self, token: str, outputs: Iterable[Path]) -> None:
        """Remove what a dead attempt left behind.  Only after one's own commit: then its late commit is void."""
        for path in [*(o.with_name(f".{o.name}.{token}.tmp") for o in outputs), self._prepared(token)]:
            path.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object of the ledger's own, None where there is none or where it is not one."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_RECEIPT_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InfrastructureError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
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


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a filesystem that has no fsync of folders
            raise
    finally:
        os.close(descriptor)


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
