"""Checkpoints inside a shard: an append-only log of finished samples that remains when its worker ends.

Only one process ever writes a file.  A successor reads the files of its predecessors up to their first bad record and
writes its own file.  ``Checkpoints`` writes such a log in batches, and stops only where no work is lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import xxhash

from curation.cluster import CheckStop, note_progress
from curation.errors import LostClaim, Stopped
from curation.shards import bucket_of, id_of_record, record_name
from curation.storage.files import names_in, storage_error

_HEADER = struct.Struct("<4sIIQQ")  # magic; lengths of key, digest and payload; xxh3-64 of all three
_MAGIC = b"cpr1"
FSYNC_EVERY_S = 30.0
LIST_EVERY_S = 60.0
MAX_PAYLOAD_BYTES = 256 << 20
_GONE = (errno.ENOENT, errno.ESTALE)  # removed here, or from another node
_Key = tuple[str, str]  # a sample's key, and the digest of its input


class PartialLog:
    """The finished samples of one shard under one fingerprint: key → (digest of the sample's input, payload).

    The payloads stay on disk; memory holds one small entry for each record.
    names: files of the folder, including those of the predecessors; None: list the folder.
    """

    def __init__(
        self, folder: Path, shard_id: str, fingerprint: str, token: str, names: Iterable[str] | None = None
    ) -> None:
        self._prefix = f"{record_name(shard_id)}.{fingerprint}."
        self._folder = folder
        self._path = folder / f"{self._prefix}{token}"
        self._records: dict[_Key, tuple[BinaryIO, int, int]] = {}  # → file, offset, length
        self._readers: list[BinaryIO] = []
        self._writer: BinaryIO | None = None
        self._last_fsync = time.monotonic()
        self._lock = threading.Lock()
        for name in sorted(set(names_in(folder) if names is None else names)):
            if name.startswith(self._prefix) and name != self._path.name:
                self._load(folder / name)
        self.recovered = len(self._records)

    @property
    def name(self) -> str | None:
        """The name of this attempt's own file; None if it has written nothing."""
        return self._path.name if self._writer is not None else None

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str, input_digest: str) -> bytes | None:
        """The payload recorded for ``key``; None if there is none or it was made from another input."""
        record = self._records.get((key, input_digest))
        if record is None:
            return None
        file, offset, length = record
        try:
            payload = os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise LostClaim(f"{file.name}: {error.strerror}") from error
        if len(payload) < length:
            raise LostClaim(f"{file.name}: was shortened while it was in use")
        return payload

    def append(self, records: Iterable[tuple[str, str, bytes]]) -> None:
        """Add (key, input digest, payload) records in one write, so that a batch is durable together.

        Thread-safe.  Raises LostClaim when the file is gone: another worker has finished the shard.
        """
        block = bytearray()
        added: list[tuple[_Key, int, int]] = []
        for key, digest, payload in records:
            if len(payload) > MAX_PAYLOAD_BYTES:
                raise ValueError(f"a checkpoint of {len(payload):,} bytes, the bound is {MAX_PAYLOAD_BYTES:,}")
            name, mark = key.encode("utf-8", "surrogatepass"), digest.encode("ascii")
            checksum = xxhash.xxh3_64_intdigest(name + mark + payload)
            block += _HEADER.pack(_MAGIC, len(name), len(mark), len(payload), checksum) + name + mark
            added.append(((key, digest), len(block), len(payload)))
            block += payload
        with self._lock:
            writer = self._writer or self._create()
            try:
                start = writer.tell()
                if not os.path.exists(self._path):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                view = memoryview(block)
                while view:
                    view = view[writer.write(view) :]
                note_progress()
                if time.monotonic() - self._last_fsync > FSYNC_EVERY_S:
                    self._fsync()
            except OSError as error:
                raise self._error(error) from error
            for key_and_digest, offset, length in added:
                self._records[key_and_digest] = (writer, start + offset, length)

    def flush(self) -> None:
        """Make every record durable."""
        with self._lock:
            try:
                self._fsync()
            except OSError as error:
                raise self._error(error) from error

    def _fsync(self) -> None:
        if self._writer is not None:
            os.fsync(self._writer.fileno())
            self._last_fsync = time.monotonic()

    def _error(self, error: OSError) -> Exception:
        if error.errno in _GONE:
            return LostClaim(f"{self._path}: gone; another worker has finished the shard")
        return storage_error(self._path, error)

    def close(self) -> None:
        for file in [*self._readers, *([self._writer] if self._writer else [])]:
            with contextlib.suppress(OSError):
                file.close()
        self._readers, self._writer = [], None
        self._records.clear()

    def _create(self) -> BinaryIO:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = open(self._path, "x+b", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise storage_error(self._path, error) from error
        return self._writer

    def _load(self, path: Path) -> None:
        """Index a predecessor's records; if two files have the same sample, the file with the lower token counts."""
        try:
            file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except OSError:  # it was removed meanwhile; its samples are done again
            return
        self._readers.append(file)
        found: dict[_Key, tuple[BinaryIO, int, int]] = {}
        with contextlib.suppress(OSError):
            self._index(file, found)
        for key, record in found.items():
            self._records.setdefault(key, record)

    @staticmethod
    def _index(file: BinaryIO, found: dict[_Key, tuple[BinaryIO, int, int]]) -> None:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            magic, key_length, digest_length, length, checksum = _HEADER.unpack(header)
            if magic != _MAGIC or length > MAX_PAYLOAD_BYTES or key_length + digest_length > 1 << 20:
                break
            names = file.read(key_length + digest_length)
            offset = file.tell()
            payload = file.read(length)
            if len(payload) < length or xxhash.xxh3_64_intdigest(names + payload) != checksum:
                break  # a kill cut this write short
            key = names[:key_length].decode("utf-8", "surrogatepass")
            found[(key, names[key_length:].decode("ascii"))] = (file, offset, length)


def tokens_with_checkpoints(folder: Path, shard_id: str) -> set[str]:
    """The tokens of attempts at a shard that finished at least one sample, under any options."""
    found = set()
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if _shard_of(entry.name) == shard_id and entry.stat().st_size:
                    found.add(entry.name.rpartition(".")[2])
    return found


class Partials:
    """The checkpoints that other attempts of one stage left.

    An attempt that dies leaves its token in its claim, so the name of its file is known.  An attempt that is asked to
    end leaves only the file, which must be found by listing the folder: freshly for a stage that resumes from
    checkpoints, otherwise at most once a minute for each bucket.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listings: dict[str, tuple[float, dict[str, list[str]]]] = {}  # bucket → when, shard → names
        self._lock = threading.Lock()

    def folder(self, shard_id: str) -> Path:
        return self._folder / bucket_of(shard_id)

    def names(self, shard_id: str, *, fresh: bool = False) -> list[str]:
        """The names of a shard's files, of all options and attempts.  fresh: list the folder again."""
        bucket = bucket_of(shard_id)
        with self._lock:
            listed, found = self._listings.get(bucket, (-float("inf"), {}))
            if fresh or time.monotonic() - listed > LIST_EVERY_S:
                listed, found = time.monotonic(), {}
                for name in names_in(self._folder / bucket):
                    found.setdefault(_shard_of(name), []).append(name)
                self._listings[bucket] = listed, found
            return list(found.get(shard_id, ()))

    def remove(self, shard_id: str, own: Iterable[str] = (), *, fresh: bool = False) -> None:
        """Delete a shard's checkpoints of all options and attempts, after its receipt is written.

        own: names to delete even if no listing shows them.  A live attempt finds its file gone and ends.
        """
        for name in {*own, *self.names(shard_id, fresh=fresh)}:
            (self.folder(shard_id) / name).unlink(missing_ok=True)
        with self._lock:
            self._listings[bucket_of(shard_id)][1].pop(shard_id, None)


def _shard_of(name: str) -> str:
    return id_of_record(name.rsplit(".", 2)[0])  # <shard>.<fingerprint>.<token>


class Checkpoints:
    """Results of single samples, saved in batches of ``every`` and found again after an interruption.

    open_log: returns the log when it is first needed, so that a shard without checkpoints touches no file.
    check_stop: ``ShardContext.check_stop``.
    """

    def __init__(self, open_log: Callable[[], PartialLog], check_stop: CheckStop, every: int) -> None:
        self._open_log = open_log
        self._check_stop = check_stop
        self._every = every
        self._log: PartialLog | None = None
        self._batch: list[tuple[str, str, bytes]] = []

    def find(self, key: str, input_digest: str) -> bytes | None:
        """The result that an earlier attempt saved for the same input, or None."""
        if self._log is None:
            self._log = self._open_log()
        return self._log.get(key, input_digest)

    def add(self, key: str, input_digest: str, payload: bytes) -> None:
        """Add a result that ``find`` did not have.  A full batch is saved, after which Stopped may be raised."""
        self._batch.append((key, input_digest, payload))
        if len(self._batch) >= self._every:
            self.save()
            self._check_stop()

    def check_urgent(self) -> None:
        """Between two samples, save and raise Stopped if there is not even time to finish the batch."""
        try:
            self._check_stop(urgent_only=True)
        except Stopped:
            self.save()
            raise

    def save(self) -> None:
        """Write the results that are not saved yet."""
        if self._batch:
            if self._log is None:
                self._log = self._open_log()
            self._log.append(self._batch)
            self._batch = []
