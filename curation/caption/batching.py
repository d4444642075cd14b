"""A shard's images through a captioner, a batch at a time, as many at once as fit on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from curation.caption.captioner import CaptionBackend, OutOfMemory, Prepared
from curation.caption.feed import MOST_WAITING_BYTES, CaptionBatch, CaptionLoader, CaptionSample, gathered_ahead
from curation.caption.rows import Row, sha256_of
from curation.errors import SampleError
from curation.images import decode_rgb
from curation.models.batch_size import LARGEST_BATCH, FittingBatchSize, agreed_batch_size, find_batch_size
from curation.run import ShardContext
from curation.run.checkpoints import PartialLog
from curation.storage.urls import Source
from curation.tar.samples import image_of, read_samples
from curation.tar.scan import IMAGE_SUFFIXES, TarReport


def caption_batch(
    backend: CaptionBackend, memory: FittingBatchSize, batch: Sequence[Prepared], seeds: Sequence[int]
) -> list[str | SampleError]:
    """Caption images of one shape, in as many calls of the device as its memory needs.

    Args:
        backend: The captioner.
        memory: Says how many fit, and remembers where memory runs out.
        batch: Images from ``backend.prepare``.
        seeds: One for each image.

    Returns:
        For each image its caption, or why there is none: ``out_of_memory`` for an image that does not fit alone,
        ``empty_caption`` for a caption without a word, or the backend's own reason.
    """
    shape = batch[0].shape
    message = ""

    def call(start: int, end: int) -> Sequence[str | SampleError] | None:
        nonlocal message
        try:
            return backend.caption(batch[start:end], seeds[start:end])
        except OutOfMemory as error:
            message = str(error)
            return None

    captions: list[str | SampleError] = []
    for _, _, found in memory.split(len(batch), shape, call):
        if found is None:
            captions.append(SampleError("out_of_memory", f"{'×'.join(map(str, shape))}: {message}"))
        else:
            captions += map(_checked, found)
    return captions


def _checked(caption: str | SampleError) -> str | SampleError:
    if isinstance(caption, SampleError):
        return caption
    return caption.strip() or SampleError("empty_caption", "the model said nothing")


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
    ) -> None:
        """
        Args:
            backend: The captioner.
            loader: Prepares images for it.
            batch_size: Images captioned at once; None: found by trying, once for all workers.
            seed_of: The seed of an image, from its key.
            sizes: The folder in which batch sizes are recorded.
            what: What a fitting batch size depends on: the kind of device, the model, the dtype and so on.
        """
        self._backend, self._loader, self._seed_of = backend, loader, seed_of
        self._batch_size, self._sizes, self._what = batch_size, sizes, what

    def batch_size(self, source: Source) -> int:
        """The batch size for a shard: the one that was given, or the one that all workers agreed on."""
        if self._batch_size is None:
            typical = self._first_prepared(source)
            if typical is None:
                return 1
            # More than so many could not be gathered.
            largest = min(LARGEST_BATCH, MOST_WAITING_BYTES // max(1, typical.nbytes))

            def fits(size: int) -> bool:
                try:
                    self._backend.caption([typical] * size, list(range(size)))
                except OutOfMemory:
                    return False
                return True

            self._batch_size = agreed_batch_size(self._sizes, self._what, lambda: find_batch_size(fits, largest))
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
        return samples

    def _caption(self, work: ShardContext, batch: CaptionBatch, log: PartialLog, memory: FittingBatchSize) -> None:
        """Caption and log a batch that is not in the log yet, and count its samples."""
        if not batch.done:
            images = [sample.prepared for sample in batch.samples]
            seeds = [self._seed_of(sample.key) for sample in batch.samples]
            with work.phase("infer"):
                captions = caption_batch(self._backend, memory, images, seeds)
            if (limit := memory.limit(*images[0].shape)) < len(images):
                work.note("batch_shrunk_to", limit)
            pairs = zip(batch.samples, captions, strict=True)
            log.append((s.key, s.digest, s.outcome(caption, batch.mark)) for s, caption in pairs)
        for sample in batch.samples:
            sample.release()
            if (failed := sample.record.get("failed")) is not None:
                work.fail(sample.key, *failed)
            else:
                work.keep()
        if not batch.done:
            work.check_stop()

    def _first_prepared(self, source: Source) -> Any | None:
        for sample in read_samples(source, IMAGE_SUFFIXES.__contains__):
            with contextlib.suppress(SampleError):
                sample.check()
                return self._backend.prepare(Image.fromarray(decode_rgb(image_of(sample))))
        return None


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
