"""Pictures encoded and checkpointed while the device makes the next ones; what an earlier attempt logged is kept."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future
from typing import Protocol

import orjson

from curation.errors import SampleError
from curation.generate.batches import Batch
from curation.images import Pixels, encode_jpeg
from curation.jsonio import dump_json
from curation.run import ShardContext

_PICTURE, _REFUSED = b"P", b"R"  # the first byte of a record
_SHA256_BYTES = 32
_IN_FLIGHT = 1  # batches being encoded while the device works on another


class Pictures(Protocol):
    """A batch's pictures, perhaps still on their way from the device; ``image`` waits, and raises SampleError."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Pixels: ...


class EncodedLog:
    """The pictures of one shard's batches, each with its sha256, in the shard's checkpoint.

    A batch's records are appended in one write and count only together: its bytes depend on which pictures were made
    with it, so that a batch of which any is missing is made again whole.  Each job is counted as kept or failed once
    its record is durable or found.
    groups: the batches whose prompts are encoded together; a picture's bytes depend on those too.
    """

    def __init__(
        self,
        work: ShardContext,
        groups: Iterable[Sequence[Batch]],
        encoders: Executor,
        quality: int,
        xmp: bytes,
    ) -> None:
        self._work, self._log = work, work.partial()
        self._encoders, self._quality, self._xmp = encoders, quality, xmp
        self._running: deque[tuple[Batch, list[Future[bytes]]]] = deque()
        self._digests: dict[str, str] = {}
        for group in groups:
            mark = hashlib.blake2b("".join(batch.digest for batch in group).encode(), digest_size=8).hexdigest()
            self._digests |= {job.key: batch.digest + mark for batch in group for job in batch.jobs}

    def has(self, batch: Batch) -> bool:
        """Whether an earlier attempt finished the batch; its jobs are then counted.  Ask once."""
        records = [self._log.get(job.key, self._digests[job.key]) for job in batch.jobs]
        if not all(records):
            return False
        for job, record in zip(batch.jobs, records, strict=True):
            self._count(job.key, record or b"")
        return True

    def take(self, batch: Batch, pictures: Pictures) -> None:
        """Encode a batch in the background, and log the one before it."""
        tasks = [self._encoders.submit(self._encode, pictures, index) for index in range(len(pictures))]
        self._running.append((batch, tasks))
        while len(self._running) > _IN_FLIGHT:
            self._log_oldest()

    def finish(self) -> None:
        """Log whatever was taken."""
        while self._running:
            self._log_oldest()

    def picture(self, key: str) -> tuple[bytes, str] | None:
        """A job's JPEG and its sha256 (hex); None where the sample failed."""
        record = self._log.get(key, self._digests[key]) or b""
        if record[:1] != _PICTURE:
            return None
        return record[1 + _SHA256_BYTES :], record[1 : 1 + _SHA256_BYTES].hex()

    def _encode(self, pictures: Pictures, index: int) -> bytes:
        try:
            jpg = encode_jpeg(pictures.image(index), self._quality, self._xmp)
        except SampleError as error:
            return _REFUSED + dump_json([error.reason, error.detail])
        return _PICTURE + hashlib.sha256(jpg).digest() + jpg

    def _log_oldest(self) -> None:
        batch, tasks = self._running.popleft()
        with self._work.phase("encode"):
            records = [task.result() for task in tasks]
        with self._work.phase("write"):
            self._log.append(
                (job.key, self._digests[job.key], record) for job, record in zip(batch.jobs, records, strict=True)
            )
        for job, record in zip(batch.jobs, records, strict=True):
            self._count(job.key, record)

    def _count(self, key: str, record: bytes) -> None:
        if record[:1] == _PICTURE:
            self._work.keep()
        else:
            reason, detail = orjson.loads(record[1:])
            self._work.fail(key, reason, detail)
