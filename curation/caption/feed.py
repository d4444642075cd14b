"""The loader: it decodes and prepares the images of a shard ahead of the model and gathers them into batches.

Which images share a batch depends on the shard alone, and not on who works on it or how fast.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import xxhash
from PIL import Image

from curation.caption.captioner import CaptionBackend, Gather
from curation.caption.rows import Row, make_row, sha256_of
from curation.cluster import memory_share
from curation.errors import SampleError
from curation.images import Pixels, decode_rgb, image_size
from curation.jsonio import clean_text, dump_json
from curation.replies import Verdict
from curation.run import ShardContext
from curation.storage.urls import Source
from curation.tar.samples import Sample, image_of, lenient_metadata, read_samples
from curation.tar.scan import IMAGE_SUFFIXES, TarReport
from curation.threads import BackgroundCall, prefetch

MOST_WAITING = 512  # images that wait for others of their shape, over all shapes; or so many batches of them:
MOST_WAITING_BATCHES = 8
MOST_WAITING_BYTES = 1 << 30  # of them, as they are in the shard; with --gather tensors also as the model takes them
MOST_BATCH_BYTES = 2 << 30  # of the images of one batch, as the model takes them
SHARE_FOR_WAITING = 4  # one part in so many of a process's memory is for tensors of images that wait
MAX_BYTES_AHEAD = 256 << 20  # of images that are being prepared, as they are in the shard and as the model takes them
LARGE_PIXELS = 16_000_000  # such images are decoded one at a time: up to 700 MB each while Pillow works on them

_WANTED = frozenset(IMAGE_SUFFIXES) | {"txt", "json"}

Item = TypeVar("Item")


class ShapeGroups(Generic[Item]):
    """Gathers items of one shape, ``size`` at a time.  The batches depend on the order of the items and nothing else.

    Items of one shape wait in a row.  Where more than ``most_bytes`` wait over all shapes, the row with the most bytes
    becomes a batch before it is full; where more than ``most_waiting`` items wait, the longest row does.  So does a row
    whose items take ``most_together`` bytes as a batch.
    """

    def __init__(
        self,
        size: int,
        most_waiting: int = MOST_WAITING,
        most_bytes: int | None = None,
        most_together: int | None = None,
    ) -> None:
        self._size = size
        self._most, self._most_bytes, self._most_together = max(size, most_waiting), most_bytes, most_together
        self._rows: dict[tuple[int, ...], list[Item]] = {}
        self._bytes: dict[tuple[int, ...], int] = {}
        self._together: dict[tuple[int, ...], int] = {}
        self._waiting = 0
        self.bytes_waiting = 0

    def add(self, shape: tuple[int, ...], item: Item, nbytes: int = 0, together: int = 0) -> list[Item]:
        """Add an item.

        Args:
            shape: Of it.
            item: It.
            nbytes: That it takes while it waits.
            together: That it takes in a batch.

        Returns:
            The batch that is complete or has to make room, or an empty list.
        """
        row = self._rows.setdefault(shape, [])
        row.append(item)
        self._bytes[shape] = self._bytes.get(shape, 0) + nbytes
        self._together[shape] = self._together.get(shape, 0) + together
        self._waiting += 1
        self.bytes_waiting += nbytes
        if len(row) == self._size:
            return self._take(shape)
        if self._most_together is not None and self._together[shape] + together > self._most_together:
            return self._take(shape)  # one more like it would be too much
        if self._most_bytes is not None and self.bytes_waiting > self._most_bytes:
            # One row is enough: the heaviest has the new bytes at least.
            return self._take(max(self._bytes, key=self._bytes.__getitem__))
        if self._waiting > self._most:
            return self._take(max(self._rows, key=lambda key: len(self._rows[key])))
        return []

    def rest(self) -> Iterator[list[Item]]:
        """The batches that are left at the end of the shard, in the order of the first item of each shape."""
        while self._rows:
            yield self._take(next(iter(self._rows)))

    def _take(self, shape: tuple[int, ...]) -> list[Item]:
        row = self._rows.pop(shape)
        self._waiting -= len(row)
        self.bytes_waiting -= self._bytes.pop(shape)
        del self._together[shape]
        return row


@dataclass(slots=True)
class CaptionSample:
    """A sample with an image, from the shard to its caption.

    Attributes:
        metadata: Its json.
        image: The bytes of its image, until it is captioned.
        digest: Of the key and those bytes.
        size: Width and height of the image.
        score: How much it looks watermarked.
        shape: Of what the model takes; the samples of a batch have the same.
        nbytes: Memory that it takes until it is captioned: the image, and what the model takes.
        prepared: What the model takes, until it is captioned.
        caption: One that an earlier run made.
        record: What this run found out, perhaps in an earlier attempt.
    """

    key: str
    metadata: dict[str, Any]
    txt: bytes | None
    image: bytes
    digest: str
    size: tuple[int, int] = (0, 0)
    sha256: str = ""
    score: float | None = None
    shape: tuple[int, ...] = ()
    nbytes: int = 0
    prepared: Any = None
    caption: str | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def outcome(self, caption: Verdict | SampleError, mark: str) -> bytes:
        """Record its caption, or why there is none, and return the record as JSON.  mark: of the batch it was in."""
        record: dict[str, Any] = {
            "size": self.size, "sha256": self.sha256, "score": self.score, "shape": self.shape, "nbytes": self.nbytes,
            "mark": mark,
        }  # fmt: skip
        if isinstance(caption, SampleError):
            record["failed"] = [caption.reason, clean_text(caption.detail)]
        else:
            record["caption"] = caption.text
            if caption.cut:
                record["cut"] = True
        self.record = record
        return dump_json(record)

    def row(self, shard_id: str, model: Mapping[str, str]) -> Row | None:
        """Its row; None where it has no caption.  model: the row's ``model`` and ``revision``."""
        caption = self.caption if self.caption is not None else self.record.get("caption")
        if caption is None:
            return None
        return make_row(
            key=self.key,
            shard=shard_id,
            metadata=self.metadata,
            txt=self.txt,
            caption=caption,
            size=self.size,
            image_sha256=self.sha256,
            model=model,
            watermark_score=self.score,
        )

    def restore(self) -> None:
        """Take over from the record of an earlier attempt what is known of the image."""
        record = self.record
        self.size, self.sha256 = (record["size"][0], record["size"][1]), record["sha256"]
        self.score, self.shape, self.nbytes = record["score"], tuple(record["shape"]), record["nbytes"]

    def release(self) -> None:
        """Drop the bytes and tensors, because only a few images of a shard may be in memory at a time."""
        self.image, self.prepared = b"", None


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """Samples of one shape.

    Attributes:
        mark: A digest of all of them.
        done: An earlier attempt captioned all of them together.
    """

    samples: Sequence[CaptionSample]
    mark: str
    done: bool


class CaptionLoader:
    """Prepares images in threads, on the host.  There is one for all shards of a process."""

    def __init__(
        self,
        backend: CaptionBackend,
        threads: int,
        score: Callable[[Pixels], float] | None = None,
        max_watermark: float | None = None,
        gather: Gather = "images",
        most_bytes: int = MOST_WAITING_BYTES,
        most_held: int | None = None,
    ) -> None:
        """
        Args:
            backend: The captioner, which turns an image into what its model takes.
            threads: Threads that decode and prepare.
            score: How much an image looks watermarked, from its pixels; None: no image is scored.
            max_watermark: Images with a higher score are dropped; None: no image is.
            gather: What waits for others of its shape: images as they are in the shard, of which as many keep what the
                model takes as the memory of this process allows; or, as until version 0.5.0, what the model takes.
            most_bytes: Of what waits.
            most_held: Bytes of what the model takes that are kept while images wait; None: by the memory.  It affects
                the speed and no batch, because the rest is prepared again for its batch.
        """
        self._backend, self._threads = backend, threads
        self._score, self._max_watermark = score, max_watermark
        self._gather, self._most_bytes = gather, most_bytes
        self._most_held = memory_share() // SHARE_FOR_WAITING if most_held is None else most_held
        self._held = 0
        self.most_bytes_together = most_bytes if gather == "tensors" else MOST_BATCH_BYTES
        self._pool = ThreadPoolExecutor(threads, "prepare")
        self._one_large_image = threading.Lock()
        self._heaviest = 0  # bytes of what an image has become, so far

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def samples(
        self,
        source: Source,
        work: ShardContext,
        report: TarReport,
        limit: int | None,
        restore: Callable[[CaptionSample], None],
        batch_size: int,
    ) -> Iterator[CaptionSample]:
        """Read the samples of a shard that have an image, in order.  The others are counted with their reasons.

        Args:
            source: The shard.
            work: Where samples are counted.
            report: Collects what is wrong with the tar.
            limit: Images to read at most.
            restore: Fills in the ``record`` or the ``caption`` of a sample that was captioned before.
            batch_size: More than so many images are prepared ahead; 0 for servers, which take one image at a time.

        Yields:
            Each sample, prepared unless it was captioned before.
        """

        def start(sample: CaptionSample) -> Future[None] | None:
            restore(sample)
            if sample.caption is not None:
                return None
            if sample.record:
                sample.restore()
                return None
            return self._pool.submit(self._prepare, sample)

        read = self._read(source, work, report, limit)
        ahead = batch_size + 2 * self._threads  # one batch works, one waits, one is prepared
        for sample, future in prefetch(read, start, self._expected_bytes, ahead, MAX_BYTES_AHEAD):
            try:
                if future is not None:
                    future.result()
            except SampleError as error:
                sample.release()
                work.fail(sample.key, error.reason, error.detail)
                continue
            if self._max_watermark is not None and sample.score is not None and sample.score > self._max_watermark:
                sample.release()
                work.drop(sample.key, "watermark")
                continue
            yield sample

    def _expected_bytes(self, sample: CaptionSample) -> int:
        """Of a sample that is about to be prepared.  How far ahead that happens affects memory and nothing else."""
        return len(sample.image) + self._heaviest

    def batches(
        self, samples: Iterable[CaptionSample], batch_size: int, seen: list[CaptionSample]
    ) -> Iterator[CaptionBatch]:
        """Gather samples into batches of one shape.

        Args:
            samples: From ``samples``.
            batch_size: Samples of a batch at most.
            seen: Is filled with all samples, in the order of the shard.
        """
        groups, self._held = self.groups(batch_size), 0
        for sample in samples:
            seen.append(sample)
            if sample.caption is not None:  # an earlier run's
                sample.release()
                continue
            prepared = sample.nbytes - len(sample.image)
            waits = len(sample.image) if self._gather == "images" else sample.nbytes
            self._hold(sample)
            if full := groups.add(sample.shape, sample, waits, prepared):
                yield self._batch(full)
        for rest in groups.rest():
            yield self._batch(rest)

    def packed(self, batch: Sequence[Any]) -> Sequence[Any]:
        """A batch of prepared images as the device takes it fastest: made while the device computes the one before."""
        pack: Callable[[Sequence[Any]], Sequence[Any]] | None = getattr(self._backend, "pack", None)
        return batch if pack is None else pack(batch)

    def groups(self, batch_size: int) -> ShapeGroups[CaptionSample]:
        """What decides which images share a batch."""
        if self._gather == "tensors":
            return ShapeGroups(batch_size, most_bytes=self._most_bytes)
        most_waiting = max(MOST_WAITING, MOST_WAITING_BATCHES * batch_size)
        return ShapeGroups(batch_size, most_waiting, self._most_bytes, self.most_bytes_together)

    def _hold(self, sample: CaptionSample) -> None:
        """Keep what the model takes while an image waits, or let it go and prepare it again for its batch."""
        if sample.prepared is not None and self._gather == "images":
            if self._held + sample.prepared.nbytes > self._most_held:
                sample.prepared = None
            else:
                self._held += sample.prepared.nbytes

    def _batch(self, samples: Sequence[CaptionSample]) -> CaptionBatch:
        """Where an earlier attempt did a part of a batch, all of the batch is prepared and captioned again, because the
        bytes of a caption depend on the images that were with it."""
        if self._gather == "images":
            self._held -= sum(sample.prepared.nbytes for sample in samples if sample.prepared is not None)
        mark = xxhash.xxh3_64_hexdigest("\0".join(sample.digest for sample in samples).encode())
        done = all(sample.record.get("mark") == mark for sample in samples)
        if not done:
            waiting = [self._pool.submit(self._prepare, sample) for sample in samples if sample.prepared is None]
            for future in waiting:
                future.result()  # it raises nothing: the image could be prepared before
            for sample, prepared in zip(samples, self.packed([s.prepared for s in samples]), strict=True):
                sample.prepared = prepared
        return CaptionBatch(samples, mark, done)

    def _read(
        self, source: Source, work: ShardContext, report: TarReport, limit: int | None
    ) -> Iterator[CaptionSample]:
        count = 0
        for sample in read_samples(source, _WANTED.__contains__, report):
            if limit is not None and count >= limit:
                return
            work.sample_in()
            try:
                sample.check()
                found = _sample_of(sample)
            except SampleError as error:
                work.fail(sample.key, error.reason, error.detail)
                continue
            count += 1
            yield found

    def _prepare(self, sample: CaptionSample) -> None:
        """In a thread: hash and decode the image, score it, and turn it into what the model takes."""
        try:
            self._decode(sample)
        except MemoryError:
            raise SampleError("out_of_memory", "decoding it, on the host") from None

    def _decode(self, sample: CaptionSample) -> None:
        width, height = image_size(sample.image)
        heavy = self._one_large_image if width * height > LARGE_PIXELS else contextlib.nullcontext()
        with heavy:
            pixels = decode_rgb(sample.image)
            if not sample.record and self._score is not None:
                sample.score = self._score(pixels)
            if self._max_watermark is None or sample.score is None or sample.score <= self._max_watermark:
                sample.prepared = self._backend.prepare(Image.fromarray(pixels))
                sample.shape = tuple(sample.prepared.shape)
                sample.nbytes = len(sample.image) + sample.prepared.nbytes
                self._heaviest = max(self._heaviest, sample.prepared.nbytes)
        sample.size, sample.sha256 = (width, height), sha256_of(sample.image)


def _sample_of(sample: Sample) -> CaptionSample:
    image = image_of(sample)
    txt, metadata = sample.members.get("txt"), lenient_metadata(sample.members.get("json"))
    digest = xxhash.xxh3_64(sample.key.encode("utf-8", "surrogatepass") + b"\0")
    digest.update(image)
    return CaptionSample(sample.key, metadata, txt, image, digest.hexdigest())


@contextlib.contextmanager
def gathered_ahead(batches: Iterator[CaptionBatch]) -> Iterator[Callable[[], CaptionBatch | None]]:
    """A function that returns one batch after the other, and None at the end.

    The next batch is gathered in a thread while the caller works on the last one.
    """
    following = partial(next, batches, None)
    gatherer: BackgroundCall[CaptionBatch | None] = BackgroundCall("batches")
    try:
        gatherer.start(following)

        def take() -> CaptionBatch | None:
            batch = gatherer.result()
            if batch is not None:
                gatherer.start(following)
            return batch

        yield take
    finally:
        gatherer.close()
        if (close := getattr(batches, "close", None)) is not None:
            close()
