"""Generates the images of one shard in batches, and encodes and saves them while the device makes the next ones."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from typing import Protocol, Self, TypeVar

import orjson

from curation.errors import SampleError, Stopped
from curation.generate.batches import Batch
from curation.images import Pixels, encode_jpeg
from curation.jsonio import dump_json
from curation.run import ShardContext

_PICTURE, _REFUSED = b"P", b"R"  # the first byte of a record
_SHA256_BYTES = 32
_IN_FLIGHT = 1  # batches that are encoded while the device works on another
_ENDS_SOON_S = 20.0  # in this time the next shard's prompts are read, so that the device has work when this one ends


class Pictures(Protocol):
    """A batch's images, which the device may still be producing; ``image`` waits, and raises SampleError."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Pixels: ...


class Texts(Protocol):
    """Prompts that are encoded already, in the order of their jobs."""

    def part(self, start: int, count: int) -> Self: ...


AnyTexts = TypeVar("AnyTexts", bound=Texts)


class EncodedLog:
    """The images of one shard, each with its sha256, in the shard's checkpoint.

    The records of a batch are appended in one write and are valid only together: the bytes of an image depend on the
    other images of its batch, so an incomplete batch is made again as a whole.  Each job is counted as kept or
    failed once its record is durable or was found.
    """

    def __init__(
        self,
        work: ShardContext,
        groups: Iterable[Sequence[Batch]],
        encoders: Executor,
        quality: int,
        xmp: bytes,
    ) -> None:
        """groups: Batches whose prompts are encoded together; the bytes of an image depend on the group too."""
        self._work, self._log = work, work.partial()
        self._encoders, self._quality, self._xmp = encoders, quality, xmp
        self._running: deque[tuple[Batch, list[Future[bytes]]]] = deque()
        self._digests: dict[str, str] = {}
        for group in groups:
            mark = hashlib.blake2b("".join(batch.digest for batch in group).encode(), digest_size=8).hexdigest()
            self._digests |= {job.key: batch.digest + mark for batch in group for job in batch.jobs}

    def has(self, batch: Batch) -> bool:
        """Whether an earlier attempt finished the batch; if so, its jobs are counted.  Call it once per batch."""
        records = [self._log.get(job.key, self._digests[job.key]) for job in batch.jobs]
        if not all(records):
            return False
        for job, record in zip(batch.jobs, records, strict=True):
            self._count(job.key, record or b"")
        return True

    def take(self, batch: Batch, pictures: Pictures) -> None:
        """Encode a batch in the background, and log the previous one."""
        tasks = [self._encoders.submit(self._encode, pictures, index) for index in range(len(pictures))]
        self._running.append((batch, tasks))
        while len(self._running) > _IN_FLIGHT:
            self._log_oldest()

    def finish(self) -> None:
        """Log the batches that are not logged yet."""
        while self._running:
            self._log_oldest()

    def picture(self, key: str) -> tuple[bytes, str] | None:
        """A job's JPEG and its sha256 (hex); None if the sample failed."""
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


def make_missing(
    work: ShardContext,
    groups: Sequence[Sequence[Batch]],
    log: EncodedLog,
    turn: AbstractContextManager[object],
    make: Callable[[Batch, AnyTexts | None], Pictures],
    encode_texts: Callable[[Sequence[str]], AnyTexts | None],
) -> None:
    """Generate every batch that is not in the log.  While the device works on one, the previous one is encoded.

    Args:
        work: The shard's context.
        groups: The shard's batches; batches of one group have their prompts encoded together.
        log: Receives the images.
        turn: Is held while the device works for this shard: of two shards, the one that began first is made first.
        make: Generates the images of a batch, from encoded prompts if there are any.
        encode_texts: Encodes all prompts of a group at once; None: they are encoded batch by batch.

    Raises:
        Stopped: A stop was requested; all images that were made are in the log.
    """
    try:
        with turn:
            work.check_stop()  # it may have been asked for while another shard had its turn
            _make_in_turn(work, groups, log, make, encode_texts)
    except Stopped:
        log.finish()
        raise
    log.finish()


def _make_in_turn(
    work: ShardContext,
    groups: Sequence[Sequence[Batch]],
    log: EncodedLog,
    make: Callable[[Batch, AnyTexts | None], Pictures],
    encode_texts: Callable[[Sequence[str]], AnyTexts | None],
) -> None:
    began, made, left = time.monotonic(), 0, sum(len(group) for group in groups)
    for group in groups:
        missing = [batch for batch in group if not log.has(batch)]
        texts = encode_texts([job.prompt for batch in group for job in batch.jobs]) if missing else None
        start = 0
        for batch in group:
            count, left = len(batch.jobs), left - 1
            if batch in missing:
                log.take(batch, make(batch, texts.part(start, count) if texts else None))
                work.check_stop()
                made += 1
                if left * (time.monotonic() - began) / made < _ENDS_SOON_S:
                    work.ends_soon()
            start += count
    work.ends_soon()
