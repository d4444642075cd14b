"""Images of a shard decoded and prepared ahead of the model, and gathered into batches that only the shard decides."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import orjson
import xxhash
from PIL import Image

from curation.caption.batching import MOST_WAITING_BYTES, ShapeGroups, find_batch_size, settled_batch_size
from curation.caption.captioner import CaptionBackend
from curation.caption.rows import Row, make_row, sha256_of
from curation.errors import SampleError
from curation.images import Pixels, decode_rgb, image_size
from curation.jsonio import clean_text, dump_json
from curation.run.checkpoints import PartialLog
from curation.storage.urls import Source
from curation.tar.samples import Sample, image_of, lenient_metadata, read_samples
from curation.tar.scan import IMAGE_SUFFIXES, TarReport
from curation.threads import BackgroundCall, prefetch

MAX_BYTES_AHEAD = 256 << 20  # of images that are being prepared, as they lie in the shard and as they become


LARGE_PIXELS = 16_000_000  # such images are decoded one at a time: up to 700 MB each while Pillow works on them


_WANTED = frozenset(IMAGE_SUFFIXES) | {"txt", "json"}


class Work(Protocol):
    """What is needed of a shard's work."""

    def sample_in(self, count: int = 1) -> None: ...

    def keep(self, count: int = 1) -> None: ...

    def drop(self, key: str, reason: str) -> None: ...

    def fail(self, key: str, reason: str, detail: str = "") -> None: ...

    def add_seconds(self, name: str, seconds: float) -> None: ...


@dataclass(slots=True)
class Picture:
    """A sample with an image on its way to its caption.

    image: its bytes, until it is captioned.  digest: of the key and those bytes.  size: width, height.
    nbytes: what it weighs until it is captioned: the image, and what the model takes.
    caption: of an earlier run.  record: what this run found out, perhaps in an earlier attempt.
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

    def outcome(self, caption: str | SampleError, mark: str) -> bytes:
        """The record of a caption, or of why there is none, as a member of the batch ``mark``."""
        record: dict[str, Any] = {
            "size": self.size, "sha256": self.sha256, "score": self.score, "shape": self.shape, "nbytes": self.nbytes,
            "mark": mark,
        }  # fmt: skip
        if isinstance(caption, SampleError):
            record["failed"] = [caption.reason, clean_text(caption.detail)]
        else:
            record["caption"] = clean_text(caption)
        self.record = record
        return dump_json(record)

    def recall(self) -> None:
        """Take over what the record says but for the caption."""
        record = self.record
        self.size, self.sha256 = (record["size"][0], record["size"][1]), record["sha256"]
        self.score, self.shape, self.nbytes = record["score"], tuple(record["shape"]), record["nbytes"]

    def cancel(self) -> None:
        """The bytes and tensors: of a shard's pictures only a few are in memory at a time."""
        self.image, self.prepared = b"", None


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures of one shape.  done: an earlier attempt captioned all of them together."""

    pictures: Sequence[Picture]
    mark: str
    done: bool


class CaptionLoader:
    """Prepares pictures in threads, on the host; one for all shards of a process.

    score: how much an image looks watermarked, from its pixels; None where nobody asks.
    max_watermark: the score above which a picture is dropped; None: never.
    most_bytes: of pictures that wait for others of their shape.
    """

    def __init__(
        self,
        backend: CaptionBackend,
        threads: int,
        score: Callable[[Pixels], float] | None = None,
        max_watermark: float | None = None,
        most_bytes: int = MOST_WAITING_BYTES,
    ) -> None:
        self._backend, self._threads = backend, threads
        self._score, self._max_watermark = score, max_watermark
        self._most_bytes = most_bytes
        self._pool = ThreadPoolExecutor(threads, "prepare")
        self._one_large_image = threading.Lock()
        self._found: int | None = None  # the batch size
        self._heaviest = 0  # bytes of what an image became, so far

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pictures(
        self,
        source: Source,
        work: Work,
        report: TarReport,
        limit: int | None,
        begin: Callable[[Picture], None],
        batch_size: int,
    ) -> Iterator[Picture]:
        """The pictures of a shard in its order, prepared or recalled; the others are counted with their reasons.

        limit: pictures to read at most.  begin: fills in the ``record`` or the caption of those captioned before.
        """

        def start(picture: Picture) -> Future[None] | None:
            begin(picture)
            if picture.caption is not None:
                return None
            if picture.record:
                picture.recall()
                return None
            return self._pool.submit(self._prepare, picture)

        samples = self._samples(source, work, report, limit)
        ahead = batch_size + 2 * self._threads  # one batch works, one waits, one is prepared
        for picture, future in prefetch(samples, start, self._expected_bytes, ahead, MAX_BYTES_AHEAD):
            try:
                if future is not None:
                    future.result()
            except SampleError as error:
                picture.cancel()
                work.fail(picture.key, error.reason, error.detail)
                continue
            if self._max_watermark is not None and picture.score is not None and picture.score > self._max_watermark:
                picture.cancel()
                work.drop(picture.key, "watermark")
                continue
            yield picture

    def _expected_bytes(self, picture: Picture) -> int:
        """Of a picture that is about to be prepared.  How far ahead that happens decides nothing but memory."""
        return len(picture.image) + self._heaviest

    def found_batch_size(self, folder: Path, device: str, source: Source) -> int:
        """Found by trying, once per kind of device and model over all workers, with the first image of a shard that
        can be prepared; ``folder`` keeps it.  1 where the shard has none."""
        if self._found is None:
            file = folder / f"auto-{xxhash.xxh3_64_hexdigest(device.encode())}.json"
            typical = self._first_prepared(source)
            if typical is None:
                return 1
            self._found = settled_batch_size(file, lambda: find_batch_size(self._backend, typical))
        return self._found

    def _first_prepared(self, source: Source) -> Any | None:
        for sample in read_samples(source, IMAGE_SUFFIXES.__contains__):
            with contextlib.suppress(SampleError):
                sample.check()
                return self._backend.prepare(Image.fromarray(decode_rgb(image_of(sample))))
        return None

    def batches(self, pictures: Iterable[Picture], batch_size: int, seen: list[Picture]) -> Iterator[Batch]:
        """Batches of one shape; ``seen`` is filled with the pictures in the shard's order."""
        groups: ShapeGroups[Picture] = ShapeGroups(batch_size, most_bytes=self._most_bytes)
        for picture in pictures:
            seen.append(picture)
            if picture.caption is not None:  # an earlier run's
                picture.cancel()
            elif full := groups.add(picture.shape, picture, picture.nbytes):
                yield self._batch(full)
        for rest in groups.rest():
            yield self._batch(rest)

    def _batch(self, pictures: Sequence[Picture]) -> Batch:
        """What an earlier attempt left unfinished of a batch is prepared and done again with all of it: a caption's
        bytes depend on which images were with it."""
        mark = xxhash.xxh3_64_hexdigest("\0".join(picture.digest for picture in pictures).encode())
        done = all(picture.record.get("mark") == mark for picture in pictures)
        if not done:
            waiting = [self._pool.submit(self._prepare, p) for p in pictures if p.prepared is None]
            for future in waiting:
                future.result()  # it could be prepared before
        return Batch(pictures, mark, done)

    def _samples(self, source: Source, work: Work, report: TarReport, limit: int | None) -> Iterator[Picture]:
        count = 0
        for sample in read_samples(source, _WANTED.__contains__, report):
            if limit is not None and count >= limit:
                return
            work.sample_in()
            try:
                sample.check()
                picture = self._picture(sample)
            except SampleError as error:
                work.fail(sample.key, error.reason, error.detail)
                continue
            count += 1
            yield picture

    def _picture(self, sample: Sample) -> Picture:
        image = image_of(sample)
        txt, metadata = sample.members.get("txt"), lenient_metadata(sample.members.get("json"))
        digest = xxhash.xxh3_64(sample.key.encode("utf-8", "surrogatepass") + b"\0")
        digest.update(image)
        return Picture(sample.key, metadata, txt, image, digest.hexdigest())

    def _prepare(self, picture: Picture) -> None:
        """In a thread: hash, decode, score, and turn into what the model takes."""
        try:
            self._decode(picture)
        except MemoryError:
            raise SampleError("out_of_memory", "decoding it, on the host") from None

    def _decode(self, picture: Picture) -> None:
        width, height = image_size(picture.image)
        heavy = self._one_large_image if width * height > LARGE_PIXELS else contextlib.nullcontext()
        with heavy:
            pixels = decode_rgb(picture.image)
            if not picture.record and self._score is not None:
                picture.score = self._score(pixels)
            if self._max_watermark is None or picture.score is None or picture.score <= self._max_watermark:
                picture.prepared = self._backend.prepare(Image.fromarray(pixels))
                picture.shape = tuple(picture.prepared.shape)
                picture.nbytes = len(picture.image) + picture.prepared.nbytes
                self._heaviest = max(self._heaviest, picture.prepared.nbytes)
        picture.size, picture.sha256 = (width, height), sha256_of(picture.image)


@contextlib.contextmanager
def beside(batches: Iterator[Batch]) -> Iterator[Callable[[], Batch | None]]:
    """A function that gives one batch after the other, None at the end; the next is gathered while the caller works."""
    following = partial(next, batches, None)
    reader: BackgroundCall[Batch | None] = BackgroundCall("batches")
    try:
        reader.start(following)

        def take() -> Batch | None:
            batch = reader.result()
            if batch is not None:
                reader.start(following)
            return batch

        yield take
    finally:
        reader.close()
        if (close := getattr(batches, "close", None)) is not None:
            close()


def recalling(log: PartialLog, earlier: Mapping[tuple[str, str], Row]) -> Callable[[Picture], None]:
    """Fills in what is known of a picture: by an interrupted attempt of this run, or by an earlier run's rows."""

    def begin(picture: Picture) -> None:
        data = log.get(picture.key, picture.digest)
        if data is not None:
            picture.record = orjson.loads(data)
        elif earlier and (row := earlier.get((picture.key, sha256_of(picture.image)))) is not None:
            width, height = row["image_size"]
            picture.caption, picture.size, picture.sha256 = row["caption"], (width, height), row["image_sha256"]
            picture.score = row["watermark_score"]

    return begin


def row_of(picture: Picture, shard_id: str, model: Mapping[str, str]) -> Row | None:
    """The row of a picture; None for one that has no caption."""
    caption = picture.caption if picture.caption is not None else picture.record.get("caption")
    if caption is None:
        return None
    return make_row(
        key=picture.key,
        shard=shard_id,
        metadata=picture.metadata,
        txt=picture.txt,
        caption=caption,
        size=picture.size,
        image_sha256=picture.sha256,
        model=model,
        watermark_score=picture.score,
    )
