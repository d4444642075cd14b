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

from curation.caption.captioner import CaptionBackend, Gather, Inquiry, Question
from curation.caption.checks import SEEN_BYTES, CaptionChecks, FailedCaption, Rejected
from curation.caption.rows import Row, make_row, sha256_of
from curation.caption.templates import Filled, Values
from curation.cluster import memory_share
from curation.errors import SampleError
from curation.images import Pixels, decode_rgb, image_size
from curation.jsonio import clean_text, dump_json
from curation.libraries import Image
from curation.replies import Answer, Verdict
from curation.run import ShardContext
from curation.storage.urls import Source
from curation.tar.beside import with_columns
from curation.tar.samples import Parts, Sample, image_of, lenient_metadata, read_samples
from curation.tar.scan import IMAGE_SUFFIXES, TarReport
from curation.threads import BackgroundCall, prefetch

MOST_WAITING = 512  # images that wait for others of their shape, over all shapes; or so many batches of them:
MOST_WAITING_BATCHES = 8
MOST_WAITING_BYTES = 1 << 30  # of them, as they are in the shard; with --gather tensors also as the model takes them
MOST_BATCH_BYTES = 2 << 30  # of the images of one batch, as the model takes them
SHARE_FOR_WAITING = 4  # one part in so many of a process's memory is for tensors of images that wait
MAX_BYTES_AHEAD = 256 << 20  # of images that are being prepared, as they are in the shard and as the model takes them
MAX_REJECTED = 1000  # characters of a rejected caption in the list of rejects
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


@dataclass(slots=True, eq=False)
class CaptionSample:
    """A sample with an image, from the shard to one of its captions.

    Where an image gets several captions, there is one of these for each, and they share what is known of the image.

    Attributes:
        metadata: Its json.
        image: The bytes of its image, until it is captioned.
        digest: Of the key, those bytes, and what is asked, where that is not the same for all images.
        size: Width and height of the image.
        score: How much it looks watermarked.
        shape: Of what the model takes; the samples of a batch have the same.
        nbytes: Memory that it takes until it is captioned: the image, and what the model takes.
        prepared: What the model takes, until it is captioned.
        seen: What the checks take of the image, as long.
        caption: One that an earlier run made, or another tool.
        answer: The object of JSON that this caption is a part of.
        checks: What checks have measured of this caption.
        earlier_tries: What is known of the tries for it, where an earlier run made it and it was checked.
        failed: One that an earlier run made and that fails the checks.
        made_by: ``model`` and ``revision`` of a caption that another tool made; empty for the stage's own.
        record: What this run found out, perhaps in an earlier attempt.
        name: Of the caption; "" where an image gets only one.
        inquiry: What is asked; None: the only question, with the same text for all images.
        together: The captions of the image, this one included, in the order of the questions.
        problem: Why it cannot be asked.
        settled: It is asked for no more.
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
    seen: Any = None
    caption: str | None = None
    answer: Mapping[str, Any] | None = None
    checks: Mapping[str, Any] | None = None
    earlier_tries: Mapping[str, Any] | None = None
    failed: FailedCaption | None = None
    made_by: Mapping[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    inquiry: Inquiry | None = None
    together: list[CaptionSample] = field(default_factory=list)
    problem: SampleError | None = None
    settled: bool = False

    def __post_init__(self) -> None:
        self.together = self.together or [self]

    @property
    def number(self) -> int:
        """Of the question."""
        return self.inquiry.number if self.inquiry is not None else 0

    @property
    def filled(self) -> Filled | None:
        """The question about this image, where it is not the same for all."""
        return self.inquiry.filled if self.inquiry is not None else None

    @property
    def group(self) -> tuple[int, ...]:
        """What samples of one batch have in common."""
        return (*self.shape, -self.number) if self.number else self.shape

    @property
    def text(self) -> str | None:
        """The caption, as far as it is known."""
        return self.caption if self.caption is not None else self.record.get("caption")

    @property
    def failure(self) -> tuple[str, str]:
        """The reason why there is no caption, and more about it; empty where there is one."""
        if self.problem is not None:
            return self.problem.reason, clean_text(self.problem.detail)
        if (rejected := self.record.get("rejected")) is not None:
            return str(rejected["reason"]), f"the last of {rejected['tries']} captions: {rejected['caption']}"
        reason, detail = self.record.get("failed") or ("", "")
        return str(reason), str(detail)

    @property
    def scores(self) -> Mapping[str, Any] | None:
        """What checks have measured of the caption; None where it was not checked."""
        return self.checks if self.caption is not None else self.record.get("checks")

    @property
    def tried(self) -> Mapping[str, Any] | None:
        """What is told of the tries for the caption (see ``Row``); None where it was not checked."""
        return self.earlier_tries if self.caption is not None else self.record.get("looked")

    @property
    def asks(self) -> bool:
        """Whether the model is to be asked."""
        return self.caption is None and self.problem is None

    def outcome(self, caption: Verdict | Answer | SampleError, mark: str) -> bytes:
        """Record its caption, or why there is none, and return the record as JSON.  mark: of the batch it was in."""
        record: dict[str, Any] = {
            "size": self.size, "sha256": self.sha256, "score": self.score, "shape": self.shape, "nbytes": self.nbytes,
            "mark": mark,
        }  # fmt: skip
        if isinstance(caption, Rejected):
            told = {"caption": clean_text(caption.text[:MAX_REJECTED]), "checks": caption.scores}
            record["rejected"] = {"reason": caption.reason, **told, "tries": caption.failed_captions}
        elif isinstance(caption, SampleError):
            record["failed"] = [caption.reason, clean_text(caption.detail)]
        else:
            record["caption"] = caption.text
            if caption.cut:
                record["cut"] = True
            if isinstance(caption, Answer) and caption.json is not None:
                record["answer"] = caption.json
            if isinstance(caption, Answer) and caption.checks is not None:
                record["checks"] = caption.checks
        if isinstance(caption, Rejected) or (isinstance(caption, Answer) and caption.checks is not None):
            first = {} if isinstance(caption, Rejected) else {"round": caption.round}
            others = {"failed_captions": caption.failed_captions, "failed_checks": caption.failed_checks}
            record["looked"] = first | others
        self.record = record
        return dump_json(record)

    def row(self, shard_id: str, model: Mapping[str, str]) -> Row | None:
        """The row of all captions of the image; None where it has none.  model: its ``model`` and ``revision``."""
        first = next((one for one in self.together if one.text is not None), None)
        if first is None:
            return None
        row = make_row(
            key=self.key,
            shard=shard_id,
            metadata=self.metadata,
            txt=self.txt,
            caption=first.text or "",
            size=self.size,
            image_sha256=self.sha256,
            model=first.made_by or model,
            watermark_score=self.score,
            answer=first.answer if first.caption is not None else first.record.get("answer"),
            checks=first.scores,
        )
        if first.tried is not None:
            row["tried"] = first.tried
        if self.name:
            row["captioned_as"] = first.name
            row["captions"] = {one.name: one.text for one in self.together}
            row["captions_failed"] = {one.name: one.failure[0] or None for one in self.together}
            if scores := {one.name: one.scores for one in self.together if one.scores is not None}:
                row["captions_checks"] = scores
            if tried := {one.name: one.tried for one in self.together if one.text is not None and one.tried}:
                row["captions_tried"] = tried
            if theirs := {one.name: one.made_by for one in self.together if one.made_by}:
                row["captions_from"] = theirs
        if asked := {one.name: one.filled.digest for one in self.together if one.filled is not None}:
            row["asked"] = asked
        return row

    def restore(self) -> None:
        """Take over from the record of an earlier attempt what is known of the image."""
        record = self.record
        self.size, self.sha256 = (record["size"][0], record["size"][1]), record["sha256"]
        self.score, self.shape, self.nbytes = record["score"], tuple(record["shape"]), record["nbytes"]

    def release(self) -> None:
        """Drop the bytes, tensors and texts, because only a few images of a shard may be in memory at a time."""
        self.image, self.prepared, self.seen = b"", None, None
        if self.inquiry is not None and self.inquiry.filled is not None:
            self.inquiry = Inquiry(self.inquiry.number, self.inquiry.filled.without_text())


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
        *,
        table_columns: bool = False,
        questions: Sequence[Question] = (Question(),),
        checks: CaptionChecks | None = None,
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
            table_columns: Whether the columns of the table beside a shard count as part of each sample's json.
            questions: What is asked about each image.
            checks: What captions are checked for.
        """
        self._questions, self._checks = questions, checks
        self._table_columns = table_columns
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
            Each sample, once for each question, prepared unless it was captioned before or cannot be asked.
        """

        def start(together: Sequence[CaptionSample]) -> Future[None] | None:
            new = []
            for sample in together:
                restore(sample)
                if sample.caption is None and sample.record:
                    sample.restore()
                elif sample.caption is None:
                    new.append(sample)
            return self._pool.submit(self._prepare, new) if new else None

        read = self._read(source, work, report, limit)
        ahead = batch_size + 2 * self._threads  # one batch works, one waits, one is prepared
        for together, future in prefetch(read, start, self._expected_bytes, ahead, MAX_BYTES_AHEAD):
            try:
                if future is not None:
                    future.result()
                if all(sample.problem is not None for sample in together):
                    raise together[0].problem or SampleError("processor_refused")
            except SampleError as error:
                for sample in together:
                    sample.release()
                work.fail(together[0].key, error.reason, error.detail)
                continue
            scores = [sample.score for sample in together if sample.score is not None]
            if self._max_watermark is not None and scores and max(scores) > self._max_watermark:
                for sample in together:
                    sample.release()
                work.drop(together[0].key, "watermark")
                continue
            for sample in together:  # before any of them is captioned
                sample.settled = not sample.asks
            yield from together

    def _expected_bytes(self, together: Sequence[CaptionSample]) -> int:
        """Of an image that is about to be prepared.  How far ahead that happens affects memory and nothing else."""
        return len(together[0].image) + self._heaviest * len(together)

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
            if not sample.asks:
                sample.release()
                continue
            prepared = sample.nbytes - len(sample.image)
            # The captions of an image share its bytes.
            waits = len(sample.image) // len(sample.together) if self._gather == "images" else sample.nbytes
            self._hold(sample)
            if full := groups.add(sample.group, sample, waits, prepared):
                yield self._batch(full)
        for rest in groups.rest():
            yield self._batch(rest)

    def seen_by_checks(self, pictures: Iterable[tuple[Item, bytes]]) -> Iterator[tuple[Item, Any]]:
        """Make of pictures what the checks take.  Those that cannot be decoded are left out.

        pictures: Each with something that says which it is.
        """

        def begin(picture: tuple[Item, bytes]) -> Future[Any]:
            return self._pool.submit(self._seen_by_checks, picture[1])

        for (item, _), future in prefetch(
            pictures, begin, lambda one: len(one[1]) + SEEN_BYTES, 2 * self._threads, MAX_BYTES_AHEAD
        ):
            assert future is not None
            try:
                seen = future.result()
            except (SampleError, MemoryError):
                continue
            yield item, seen

    def _seen_by_checks(self, image: bytes) -> Any:
        assert self._checks is not None
        with self._alone_if_large(*image_size(image)):
            return self._checks.prepare(decode_rgb(image))

    def _alone_if_large(self, width: int, height: int) -> contextlib.AbstractContextManager[object]:
        return self._one_large_image if width * height > LARGE_PIXELS else contextlib.nullcontext()

    def packed(self, batch: Sequence[Any]) -> Sequence[Any]:
        """A batch of prepared images as the device takes it fastest: made while the device computes the one before."""
        pack: Callable[[Sequence[Any]], Sequence[Any]] | None = getattr(self._backend, "pack", None)
        return batch if pack is None else pack(batch)

    def groups(self, batch_size: int) -> ShapeGroups[CaptionSample]:
        """What decides which images share a batch."""
        if self._gather == "tensors":
            return ShapeGroups(batch_size, most_bytes=self._most_bytes)
        most_waiting = max(MOST_WAITING, MOST_WAITING_BATCHES * batch_size) * len(self._questions)
        return ShapeGroups(batch_size, most_waiting, self._most_bytes, self.most_bytes_together)

    def _hold(self, sample: CaptionSample) -> None:
        """Keep what the model takes while an image waits, or let it go and prepare it again for its batch."""
        if sample.prepared is not None and self._gather == "images":
            if self._held + self._kept_bytes(sample) > self._most_held:
                sample.prepared = sample.seen = None
            else:
                self._held += self._kept_bytes(sample)

    def _kept_bytes(self, sample: CaptionSample) -> int:
        """What a prepared sample keeps in memory beside its image."""
        return int(sample.prepared.nbytes) + (SEEN_BYTES if sample.seen is not None else 0)

    def _batch(self, samples: Sequence[CaptionSample]) -> CaptionBatch:
        """Where an earlier attempt did a part of a batch, all of the batch is prepared and captioned again, because the
        bytes of a caption depend on the images that were with it."""
        if self._gather == "images":
            self._held -= sum(self._kept_bytes(sample) for sample in samples if sample.prepared is not None)
        mark = xxhash.xxh3_64_hexdigest("\0".join(sample.digest for sample in samples).encode())
        done = all(sample.record.get("mark") == mark for sample in samples)
        if not done:
            waiting = [self._pool.submit(self._prepare, [sample]) for sample in samples if sample.prepared is None]
            for future in waiting:
                future.result()  # it raises nothing: the image could be prepared before
            for sample, prepared in zip(samples, self.packed([s.prepared for s in samples]), strict=True):
                sample.prepared = prepared
        return CaptionBatch(samples, mark, done)

    def _read(
        self, source: Source, work: ShardContext, report: TarReport, limit: int | None
    ) -> Iterator[list[CaptionSample]]:
        count, shard = 0, work.shard.id if any(question.varies for question in self._questions) else ""
        read = read_samples(source, _WANTED.__contains__, report, parts=work.sample_parts)
        for sample in with_columns(read, source, work.warn) if self._table_columns else read:
            if limit is not None and count >= limit:
                return
            work.sample_in()
            try:
                sample.check()
                found = captions_of(sample, work.sample_parts, self._questions, shard)
            except SampleError as error:
                work.fail(sample.key, error.reason, error.detail)
                continue
            count += 1
            yield found

    def _prepare(self, samples: Sequence[CaptionSample]) -> None:
        """In a thread: hash and decode the image of some samples, which all have the same, score it, and turn it into
        what the model takes for each of them."""
        try:
            self._decode(samples)
        except MemoryError:
            raise SampleError("out_of_memory", "decoding it, on the host") from None

    def _decode(self, samples: Sequence[CaptionSample]) -> None:
        image = samples[0].image
        width, height = image_size(image)
        with self._alone_if_large(width, height):
            pixels = decode_rgb(image)
            if self._score is not None and (new := [sample for sample in samples if not sample.record]):
                score = self._score(pixels)
                for sample in new:
                    sample.score = score
            picture = Image.fromarray(pixels)
            for sample in samples:
                if self._max_watermark is None or sample.score is None or sample.score <= self._max_watermark:
                    self._prepare_one(sample, picture)
            self._prepare_for_checks(samples, pixels)
        sha256 = sha256_of(image)
        for sample in samples:
            sample.size, sample.sha256 = (width, height), sha256

    def _prepare_one(self, sample: CaptionSample, picture: Any) -> None:
        try:
            asked = () if sample.inquiry is None else (sample.inquiry,)
            sample.prepared = self._backend.prepare(picture, *asked)
        except SampleError as error:
            sample.problem = error
            return
        sample.shape = tuple(sample.prepared.shape)
        sample.nbytes = len(sample.image) + sample.prepared.nbytes
        self._heaviest = max(self._heaviest, sample.prepared.nbytes)

    def _prepare_for_checks(self, samples: Sequence[CaptionSample], pixels: Pixels) -> None:
        if self._checks is not None and (ready := [sample for sample in samples if sample.prepared is not None]):
            seen = self._checks.prepare(pixels)
            for sample in ready:
                sample.seen = seen


def captions_of(sample: Sample, parts: Parts, questions: Sequence[Question], shard: str) -> list[CaptionSample]:
    """A sample of a shard as one that waits for its captions: one for each question."""
    image = image_of(sample)
    txt, metadata = sample.members.get("txt"), parts.told(lenient_metadata(sample.members.get("json")))
    digest = xxhash.xxh3_64(sample.key.encode("utf-8", "surrogatepass") + b"\0")
    digest.update(image)
    values = Values(sample.key, shard, metadata, txt)
    together: list[CaptionSample] = []
    for number, question in enumerate(questions):
        filled = question.fill(values)
        own = digest
        if question.name or filled is not None:
            own = digest.copy()
            own.update(f"\0{question.name}\0{filled.digest if filled else ''}".encode())
        inquiry = Inquiry(number, filled) if number or filled is not None else None
        one = CaptionSample(sample.key, metadata, txt, image, own.hexdigest(), name=question.name, inquiry=inquiry)
        together.append(one)
    for one in together:
        one.together = together
    return together


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
