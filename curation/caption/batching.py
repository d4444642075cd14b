"""A shard's images through a captioner, a batch at a time, as many at once as fit on the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from curation.caption.asking import Asking, Places
from curation.caption.captioner import FIRST, Attempt, CaptionBackend, OutOfMemory, Prepared
from curation.caption.feed import CaptionBatch, CaptionLoader, CaptionSample, gathered_ahead
from curation.caption.rows import Row, sha256_of
from curation.errors import SampleError
from curation.images import decode_rgb
from curation.jsonio import clean_text
from curation.models.batch_size import LARGEST_BATCH, FittingBatchSize, Shortage, agreed_batch_size, find_batch_size
from curation.replies import CAPTION, WHOLE, Form, Reply, Verdict, asks_for_structure, judge
from curation.run import ShardContext
from curation.run.checkpoints import PartialLog
from curation.storage.urls import Source
from curation.tar.samples import image_of, read_samples
from curation.tar.scan import IMAGE_SUFFIXES, TarReport

RETRIES = 2  # of an image whose reply is no caption
LOOKED_AT = 16  # images of a shard, for a typical one


def caption_batch(
    backend: CaptionBackend,
    memory: FittingBatchSize,
    batch: Sequence[Prepared],
    seeds: Sequence[int],
    *,
    may_be_longer: bool = True,
) -> list[Verdict | SampleError]:
    """Caption images of one shape, in as many calls of the device as its memory needs.

    Images whose replies are no captions are captioned again: those of one batch together, so that what shares a call
    depends on the batch alone.

    Args:
        backend: The captioner.
        memory: Says how many fit, and remembers where memory runs out.
        batch: Images from ``backend.prepare``.
        seeds: One for each image.
        may_be_longer: A reply that is cut is asked for once more, with twice the tokens.

    Returns:
        For each image its caption, or why there is none: ``out_of_memory`` for an image that does not fit alone,
        ``empty_caption`` for a caption without a word, a reason of the judge, or the backend's own.
    """
    form = replace(CAPTION, chats=backend.family.chats, structure=asks_for_structure(backend.asked))
    images = [_Image(form, backend.asked, may_be_longer) for _ in batch]
    while waiting := [place for place, image in enumerate(images) if image.attempt is not None]:
        for attempt in dict.fromkeys(images[place].attempt for place in waiting):
            assert attempt is not None
            places = [place for place in waiting if images[place].attempt == attempt]
            chosen, their_seeds = [batch[place] for place in places], attempt.seeds([seeds[place] for place in places])
            for place, said in zip(places, _call(backend, memory, chosen, their_seeds, attempt), strict=True):
                images[place].take(said)
    return [image.result for image in images]


class _Image:
    """One image while its caption is asked for.

    Attributes:
        attempt: The next one; None where there is no further one.
        result: What is known so far.
    """

    def __init__(self, form: Form, asked: str, may_be_longer: bool) -> None:
        self.attempt: Attempt | None = FIRST
        self.result: Verdict | SampleError = SampleError("empty_caption")
        self._form, self._asked, self._may_be_longer = form, asked, may_be_longer
        self._replies = 0

    def take(self, said: Reply | str | SampleError) -> None:
        attempt, self.attempt = self.attempt, None
        assert attempt is not None
        has_text = isinstance(self.result, Verdict)
        if isinstance(said, SampleError):
            self.result = self.result if has_text else said
            return
        self._replies += 1
        reply = Reply(said) if isinstance(said, str) else said
        verdict = judge(reply, self._form, asked=self._asked)
        if verdict.text is not None:
            self.result = verdict
        elif not has_text:
            self.result = self._failure(verdict, reply)
        if verdict.cut and self._may_be_longer and not attempt.longer:
            self.attempt = replace(attempt, longer=True)
        elif not verdict.cut and not isinstance(self.result, Verdict) and attempt.warmer < RETRIES:
            self.attempt = replace(attempt, warmer=attempt.warmer + 1)

    def _failure(self, verdict: Verdict, reply: Reply) -> SampleError:
        if verdict.reason == "reply_empty":
            return SampleError("empty_caption", "the model said nothing")
        ended = "" if reply.ended == WHOLE else f" (ended by {clean_text(reply.ended) or 'nothing'})"
        told = f"the last of {self._replies} replies{ended}: {clean_text(reply.text[:300])!r}"
        return SampleError(verdict.reason, told)


def _call(
    backend: CaptionBackend,
    memory: FittingBatchSize,
    batch: Sequence[Prepared],
    seeds: Sequence[int],
    attempt: Attempt,
) -> list[Reply | str | SampleError]:
    """What the model writes for each image of a batch, in as many calls as its memory needs."""
    shape = batch[0].shape

    def call(start: int, end: int) -> Sequence[Reply | str | SampleError] | Shortage:
        try:
            if attempt == FIRST:
                return backend.caption(batch[start:end], seeds[start:end])
            return backend.caption(batch[start:end], seeds[start:end], attempt)
        except OutOfMemory as error:
            return Shortage(str(error), error.certain)

    replies: list[Reply | str | SampleError] = []
    size = (*shape, 2) if attempt.longer else shape  # what fits with twice the tokens says nothing about the others
    for _, _, found in memory.split(len(batch), size, call):
        if isinstance(found, Shortage):
            replies.append(SampleError("out_of_memory", f"{'×'.join(map(str, shape))}: {found.text}"))
        else:
            replies += found
    return replies


class ShardCaptioner:
    """Captions the shards of one process."""

    def __init__(
        self,
        backend: CaptionBackend,
        loader: CaptionLoader,
        *,
        batch_size: int | None,
        seed_of: Callable[[str], int],
        sizes: Path,
        what: str,
        may_be_longer: bool = True,
        first_tried: int = 1,
        patience_s: float = 120.0,
    ) -> None:
        """
        Args:
            backend: The captioner.
            loader: Prepares images for it.
            batch_size: Images captioned at once, of all shards if servers do it; None: found by trying, once for all
                workers.
            seed_of: The seed of an image, from its key.
            sizes: The folder in which batch sizes are recorded.
            what: What a fitting batch size depends on: the kind of device, the model, the dtype and so on.
            may_be_longer: A reply that is cut is asked for once more, with twice the tokens.
            first_tried: The smallest batch size that is tried, if it fits.
            patience_s: How many seconds to wait for the answers of servers after a stop was requested.
        """
        self._backend, self._loader, self._seed_of = backend, loader, seed_of
        self._batch_size, self._sizes, self._what = batch_size, sizes, what
        self._may_be_longer, self._first_tried, self._patience_s = may_be_longer, first_tried, patience_s
        self._places = Places(batch_size) if backend.family.served and batch_size else None

    def close(self) -> None:
        """Ask servers nothing more."""
        if self._places is not None:
            self._places.close()

    def batch_size(self, source: Source) -> int:
        """The batch size for a shard: the one that was given, or the one that all workers agreed on."""
        if self._batch_size is None:
            typical = self._heaviest(source)
            if typical is None:
                return 1
            # More than so many could not be gathered.
            largest = min(LARGEST_BATCH, self._loader.most_bytes_together // max(1, typical.nbytes))

            @lru_cache(1)
            def batches(size: int) -> list[Sequence[Any]]:
                """One, and another that waits meanwhile as it does later."""
                return [self._loader.packed([typical] * size) for _ in range(2)]

            def fits(size: int) -> bool:
                try:
                    self._backend.caption(batches(size)[0], list(range(size)))
                except OutOfMemory:
                    return False
                return True

            find = partial(find_batch_size, fits, largest, self._first_tried)
            self._batch_size = agreed_batch_size(self._sizes, self._what, find)
        return self._batch_size

    def caption(
        self, work: ShardContext, batch_size: int, earlier: Mapping[tuple[str, str], Row], limit: int | None
    ) -> list[CaptionSample]:
        """Caption the images of a shard.

        Args:
            work: The shard.  Every sample is counted; those that are captioned are logged, and an interrupted attempt
                goes on after them.
            batch_size: From ``batch_size``.
            earlier: Rows of an earlier run by key and sha256 of the image, whose captions are taken over.
            limit: Images to read at most; None: all.

        Returns:
            The samples that were not dropped and could be read, in the order of the shard; those without a caption
            failed.
        """
        memory = FittingBatchSize(batch_size, self._what, self._sizes)
        samples: list[CaptionSample] = []
        report = TarReport()
        log = work.partial()
        restore = _restorer(log, earlier)
        if self._places is not None:
            read = self._loader.samples(work.shard.path, work, report, limit, restore, 0)
            self._ask_each(work, read, log, memory, self._places, samples)
        else:
            read = self._loader.samples(work.shard.path, work, report, limit, restore, batch_size)
            with gathered_ahead(self._loader.batches(read, batch_size, samples)) as take:
                while True:
                    with work.phase("wait"):
                        batch = take()
                    if batch is None:
                        break
                    self._caption(work, batch, log, memory)
        for line in report.warnings():
            work.warn(line)
        reused = sum(sample.caption is not None for sample in samples)
        work.keep(reused)
        if reused:
            work.note("reused", reused)
        if cut := sum(sample.record.get("cut", False) for sample in samples):
            work.note("cut_to_whole_sentences", cut)
        return samples

    def _caption(self, work: ShardContext, batch: CaptionBatch, log: PartialLog, memory: FittingBatchSize) -> None:
        """Caption and log a batch that is not in the log yet, and count its samples."""
        if not batch.done:
            images = [sample.prepared for sample in batch.samples]
            seeds = [self._seed_of(sample.key) for sample in batch.samples]
            with work.phase("infer"):
                captions = caption_batch(self._backend, memory, images, seeds, may_be_longer=self._may_be_longer)
            if (limit := memory.limit(*images[0].shape)) < len(images):
                work.note("batch_shrunk_to", limit)
            pairs = zip(batch.samples, captions, strict=True)
            log.append((s.key, s.digest, s.outcome(caption, batch.mark)) for s, caption in pairs)
        for sample in batch.samples:
            _count(work, sample)
        if not batch.done:
            work.check_stop()

    def _ask_each(
        self,
        work: ShardContext,
        read: Iterator[CaptionSample],
        log: PartialLog,
        memory: FittingBatchSize,
        places: Places,
        seen: list[CaptionSample],
    ) -> None:
        """Ask servers for the caption of each image that has none yet; log the answers as they come, and count them.

        What an earlier attempt logged is kept, because a server's answer depends on the image alone.
        """
        began, waited_s = time.perf_counter(), 0.0

        def unanswered() -> Iterator[tuple[CaptionSample, int]]:
            nonlocal waited_s
            while True:
                since = time.perf_counter()
                sample = next(read, None)
                waited_s += time.perf_counter() - since
                if sample is None:
                    return
                seen.append(sample)
                if sample.caption is not None:  # an earlier run's
                    sample.release()
                elif sample.record:
                    _count(work, sample)
                else:
                    yield sample, sample.nbytes

        def ask(sample: CaptionSample) -> Verdict | SampleError:
            image, seed = [sample.prepared], [self._seed_of(sample.key)]
            return caption_batch(self._backend, memory, image, seed, may_be_longer=self._may_be_longer)[0]

        try:
            for came in Asking(places, ask).answers(unanswered(), work, self._patience_s):
                log.append((s.key, s.digest, s.outcome(caption, s.digest)) for s, caption in came)
                for sample, _ in came:
                    _count(work, sample)
        finally:
            work.add_seconds("wait", waited_s)
            work.add_seconds("infer", time.perf_counter() - began - waited_s)

    def _heaviest(self, source: Source) -> Any | None:
        """Of the first images of a shard the one that takes most memory when it is prepared; None where there is none.

        The very first may be much smaller than most others.
        """
        found: Any | None = None
        for sample in islice(read_samples(source, IMAGE_SUFFIXES.__contains__), LOOKED_AT):
            with contextlib.suppress(SampleError):
                sample.check()
                prepared = self._backend.prepare(Image.fromarray(decode_rgb(image_of(sample))))
                found = prepared if found is None or prepared.nbytes > found.nbytes else found
        return found


def _count(work: ShardContext, sample: CaptionSample) -> None:
    """Count a sample whose caption is asked for no more."""
    sample.release()
    if (failed := sample.record.get("failed")) is not None:
        work.fail(sample.key, *failed)
    else:
        work.keep()


def _restorer(log: PartialLog, earlier: Mapping[tuple[str, str], Row]) -> Callable[[CaptionSample], None]:
    """Fills in what is known of a sample from an interrupted attempt of this run, or from an earlier run's rows."""

    def restore(sample: CaptionSample) -> None:
        data = log.get(sample.key, sample.digest)
        if data is not None:
            sample.record = orjson.loads(data)
        elif earlier and (row := earlier.get((sample.key, sha256_of(sample.image)))) is not None:
            width, height = row["image_size"]
            sample.caption, sample.size, sample.sha256 = row["caption"], (width, height), row["image_sha256"]
            sample.score = row["watermark_score"]

    return restore
