"""Checkpoints inside a shard: an append-only log of finished samples that outlives the worker that wrote it.

A file has one writer ever.  A successor reads its predecessors' files up to their first bad record and writes its own.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import xxhash

from curation.errors import InfrastructureError, LostClaim

_HEADER = struct.Struct("<4sIIQQ")  # magic, length of key, of digest, of payload; xxh3-64 of all three
_MAGIC = b"cpr1"
FSYNC_EVERY_S = 30.0
MAX_PAYLOAD_BYTES = 256 << 20


class PartialLog:
    """The finished samples of one shard under one fingerprint: key → (digest of the sample's input, payload).

    The payloads stay on disk; memory holds one small entry a record.
    """

    def __init__(self, folder: Path, shard_id: str, fingerprint: str, token: str) -> None:
        self._prefix = f"{shard_id}.{fingerprint}."
        self._folder = folder
        self._path = folder / f"{self._prefix}{token}"
        self._records: dict[str, tuple[str, BinaryIO, int, int]] = {}  # key → digest, file, offset, length
        self._readers: list[BinaryIO] = []
        self._writer: BinaryIO | None = None
        self._last_fsync = time.monotonic()
        for path in self._predecessors():
            self._load(path)
        self.recovered = len(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str, input_digest: str) -> bytes | None:
        """The payload recorded for ``key``, None where there is none or it was made from another input."""
        record = self._records.get(key)
        if record is None or record[0] != input_digest:
            return None
        _, file, offset, length = record
        try:
            return os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise LostClaim(f"{self._path}: {error.strerror}") from error

    def append(self, records: Iterable[tuple[str, str, bytes]]) -> None:
        """Add (key, input digest, payload) records in one write, so that a batch is durable together.

        Raises LostClaim when the file is gone: another worker has finished the shard.
        """
        writer = self._writer or self._create()
        block = bytearray()
        start = writer.tell()
        added = []
        for key, digest, payload in records:
            name, mark = key.encode("utf-8", "surrogatepass"), digest.encode("ascii")
            checksum = xxhash.xxh3_64_intdigest(name + mark + payload)
            block += _HEADER.pack(_MAGIC, len(name), len(mark), len(payload), checksum) + name + mark
            added.append((key, (digest, writer, start + len(block), len(payload))))
            block += payload
        try:
            if not os.path.exists(self._path):
                raise LostClaim(f"{self._path}: gone; another worker has finished the shard")
            writer.write(block)
            if time.monotonic() - self._last_fsync > FSYNC_EVERY_S:
                self.flush()
        except OSError as error:
            if error.errno in (116, 2):  # ESTALE, ENOENT: removed by another node
                raise LostClaim(f"{self._path}: {error.strerror}") from error
            raise InfrastructureError(f"{self._path}: cannot be written ({error.strerror})") from error
        self._records.update(added)

    def flush(self) -> None:
        """Make every record durable."""
        if self._writer is not None:
            os.fsync(self._writer.fileno())
            self._last_fsync = time.monotonic()

    def close(self) -> None:
        for file in [*self._readers, *([self._writer] if self._writer else [])]:
            file.close()
        self._readers, self._writer = [], None

    def remove(self) -> None:
        """Delete this shard's files: its receipt is written."""
        self.close()
        for path in [*self._predecessors(), self._path]:
            path.unlink(missing_ok=True)

    def _create(self) -> BinaryIO:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = open(self._path, "x+b", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise InfrastructureError(f"{self._path}: cannot be created ({error.strerror})") from error
        return self._writer

    def _predecessors(self) -> list[Path]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        mine = self._path.name
        return [self._folder / name for name in sorted(names) if name.startswith(self._prefix) and name != mine]

    def _load(self, path: Path) -> None:
        """Index a predecessor's records; of two records of one key that of the lowest token counts."""
        try:
            file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except FileNotFoundError:
            return
        self._readers.append(file)
        found: dict[str, tuple[str, BinaryIO, int, int]] = {}
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            magic, key_length, digest_length, length, checksum = _HEADER.unpack(header)
            if magic != _MAGIC or length > MAX_PAYLOAD_BYTES or key_length + digest_length > 1 << 20:
                break
            names = file.read(key_length + digest_length)
            offset = file.tell()
            payload = file.read(length)
            if len(payload) < length or xxhash.xxh3_64_intdigest(names + payload) != checksum:
                break  # the write that a kill cut short
            key = names[:key_length].decode("utf-8", "surrogatepass")
            found[key] = (names[key_length:].decode("ascii"), file, offset, length)
        for key, record in found.items():
            self._records.setdefault(key, record)
