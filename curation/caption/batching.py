"""A shard's images through a captioner, a batch at a time, as many at once as fit on the device."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from curation.caption.asking import Asking, Places
from curation.caption.captioner import CaptionBackend, OutOfMemory, Prepared, Question
from curation.caption.checks import SEEN_BYTES, CaptionChecks, FailedCaption, Looked, Rejected
from curation.caption.earlier import RETRIES, Earlier, judge_earlier
from curation.caption.feed import CaptionBatch, CaptionLoader, CaptionSample, captions_of, gathered_ahead
from curation.caption.rows import sha256_of
from curation.caption.schema import AnswerSchema
from curation.captioned.adopted import ShardCaptions
from curation.errors import SampleError, ShardError
from curation.images import decode_rgb, image_size
from curation.jsonio import clean_text
from curation.libraries import Image
from curation.models.batch_size import LARGEST_BATCH, FittingBatchSize, Shortage, agreed_batch_size, find_batch_size
from curation.replies import CAPTION, FIRST, WHOLE, Answer, Attempt, Reply, Verdict, asks_for_structure, judge
from curation.run import ShardContext
from curation.run.checkpoints import PartialLog
from curation.storage.urls import Source
from curation.tar.samples import USUAL, Parts, image_of, read_samples
from curation.tar.scan import IMAGE_SUFFIXES, TarReport

Found = Verdict | Answer | SampleError
LOOKED_AT = 16  # images of a shard, for a typical one


def caption_batch(
    backend: CaptionBackend,
    memory: FittingBatchSize,
    batch: Sequence[Prepared],
    seeds: Sequence[int],
    *,
    may_be_longer: bool = True,
    schema: AnswerSchema | None = None,
    number: int = 0,
    checks: CaptionChecks | None = None,
    seen: Sequence[Any] = (),
    sources: Sequence[str] = (),
    failed: Sequence[FailedCaption | None] = (),
) -> list[Found]:
    """Caption images of one shape, in as many calls of the device as its memory needs.

    Images whose replies are no captions are captioned again: those of one batch together, so that what shares a call
    depends on the batch alone.

    Args:
        backend: The captioner.
        memory: Says how many fit, and remembers where memory runs out.
        batch: Images from ``backend.prepare``.
        seeds: One for each image.
        may_be_longer: A reply that is cut is asked for once more, with twice the tokens.
        schema: By which replies are judged, in place of the rules for texts.
        number: Of the question.
        checks: What captions are checked for.  One that fails is asked for again, from another seed.
        seen: Of each image, from ``checks.prepare``.
        sources: What the sample of each image has contributed to the question: words that stand in it are no sign of
            talk in the reply.
        failed: Of each image, the caption that is there already and fails a check; None where there is none.

    Returns:
        For each image its caption, or why there is none: ``out_of_memory`` for an image that does not fit alone,
        ``empty_caption`` for a caption without a word, a reason of the judge, or the backend's own; ``Rejected`` where
        every caption failed a check.
    """
    asked = backend.asked_of(number) if number else backend.asked
    form = replace(CAPTION, chats=backend.family.chats, structure=asks_for_structure(asked))
    retries = RETRIES if checks is None else checks.tries - 1
    images = []
    for place in range(len(batch)):
        source = sources[place] if sources else ""
        by_text = partial(judge, form=form, asked=asked, source=source)
        known = failed[place] if failed else None
        images.append(_Image(by_text if schema is None else schema.judge, may_be_longer, retries, known))
    while waiting := [place for place, image in enumerate(images) if image.attempt is not None]:
        for attempt in dict.fromkeys(images[place].attempt for place in waiting):
            assert attempt is not None
            places = [place for place in waiting if images[place].attempt == attempt]
            chosen, their_seeds = [batch[place] for place in places], attempt.seeds([seeds[place] for place in places])
            for place, said in zip(places, _call(backend, memory, chosen, their_seeds, attempt, number), strict=True):
                images[place].take(said)
            if checks is not None and (whole := [place for place in places if images[place].text is not None]):
                looked = checks.judge([seen[place] for place in whole], [images[place].text or "" for place in whole])
                for place, found in zip(whole, looked, strict=True):
                    images[place].look(found)
    return [image.result for image in images]


class _Image:
    """One image while its caption is asked for.

    Attributes:
        attempt: The next one; None where there is no further one.
        result: What is known so far.
    """

    def __init__(
        self,
        judges: Callable[[Reply], Verdict | Answer],
        may_be_longer: bool,
        retries: int,
        known: FailedCaption | None = None,
    ) -> None:
        self.result: Found = SampleError("empty_caption")
        self._judges, self._may_be_longer, self._retries = judges, may_be_longer, retries
        self._replies = 0
        self._known = known
        self._last = FIRST
        self._failed_captions = int(known is not None)
        self._failed_checks: Counter[str] = Counter(() if known is None else known.looked.failed)
        if known is not None:
            self.result = Rejected(known.looked, known.text, 1, dict(self._failed_checks))
        self.attempt: Attempt | None = FIRST if known is None or known.round else self._again(FIRST)

    @property
    def text(self) -> str | None:
        """Its caption, once that is whole and no check has looked at it."""
        if self.attempt is not None or isinstance(self.result, SampleError):
            return None
        return self.result.text

    def look(self, looked: Looked) -> None:
        """Take in what checks say of ``text``."""
        assert not isinstance(self.result, SampleError)
        self._failed_captions += bool(looked.failed)
        self._failed_checks.update(looked.failed)
        failed, by_check = self._failed_captions, dict(self._failed_checks)
        if not looked.failed:
            told = self.result if isinstance(self.result, Answer) else Answer(*self.result)
            number = self._last.warmer
            told = told._replace(checks=looked.scores, round=number, failed_captions=failed, failed_checks=by_check)
            self.result = told
            return
        self.result = Rejected(looked, self.result.text or "", failed, by_check)
        self.attempt = self._again(self._last)

    def take(self, said: Reply | str | SampleError) -> None:
        attempt, self.attempt = self.attempt, None
        assert attempt is not None
        self._last = attempt
        has_text = not isinstance(self.result, SampleError) or isinstance(self.result, Rejected)
        if isinstance(said, SampleError):
            self.result = self.result if has_text else said
            return
        self._replies += 1
        reply = Reply(said) if isinstance(said, str) else said
        verdict = self._judges(reply)
        if verdict.text is not None:
            self.result = verdict
        elif not has_text:
            self.result = self._failure(verdict, reply)
        if verdict.cut and self._may_be_longer and not attempt.longer:
            self.attempt = replace(attempt, longer=True)
        elif not verdict.cut and isinstance(self.result, SampleError):
            self.attempt = self._again(attempt)

    def _again(self, last: Attempt) -> Attempt | None:
        """The request after one that gave no caption to keep; None where there were enough.  The one whose caption is
        there already is not made again."""
        number = last.warmer + 1
        number += self._known is not None and number == self._known.round
        return replace(last, warmer=number) if number <= self._retries else None

    def _failure(self, verdict: Verdict | Answer, reply: Reply) -> SampleError:
        if verdict.reason == "reply_empty":
            return SampleError("empty_caption", "the model said nothing")
        ended = "" if reply.ended == WHOLE else f" (ended by {clean_text(reply.ended) or 'nothing'})"
        told = f"the last of {self._replies} replies{ended}: {clean_text(reply.text[:300])!r}"
        return SampleError(
            verdict.reason, f"{verdict.detail}; {told}" if isinstance(verdict, Answer) and verdict.detail else told
        )


def _call(
    backend: CaptionBackend,
    memory: FittingBatchSize,
    batch: Sequence[Prepared],
    seeds: Sequence[int],
    attempt: Attempt,
    number: int,
) -> list[Reply | str | SampleError]:
    """What the model writes for each image of a batch, in as many calls as its memory needs."""
    shape = batch[0].shape

    def call(start: int, end: int) -> Sequence[Reply | str | SampleError] | Shortage:
        try:
            asked = (attempt, number) if number else () if attempt == FIRST else (attempt,)
            return backend.caption(batch[start:end], seeds[start:end], *asked)
        except OutOfMemory as error:
            return Shortage(str(error), error.certain)

    replies: list[Reply | str | SampleError] = []
    # What fits with twice the tokens, or with those of another question, says nothing about the others.
    size = (*shape, *([-number] if number else []), *([2] if attempt.longer else []))
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
        questions: Sequence[Question] = (Question(),),
        first_tried: int = 1,
        patience_s: float = 120.0,
        parts: Parts = USUAL,
        schema: AnswerSchema | None = None,
        checks: CaptionChecks | None = None,
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
            questions: What is asked about each image.  A reply that is cut is asked for once more, with twice the
                tokens, unless the question bounds them.
            first_tried: The smallest batch size that is tried, if it fits.
            patience_s: How many seconds to wait for the answers of servers after a stop was requested.
            parts: Which member of a sample is its picture.
            schema: By which replies are judged, in place of the rules for texts.
            checks: What captions are checked for.
        """
        self._schema, self._checks = schema, checks
        self._backend, self._loader, self._seed_of, self._parts = backend, loader, seed_of, parts
        self._batch_size, self._sizes, self._what = batch_size, sizes, what
        self._questions, self._first_tried, self._patience_s = questions, first_tried, patience_s
        self._places = Places(batch_size) if backend.family.served and batch_size else None

    def close(self) -> None:
        """Ask servers nothing more."""
        if self._places is not None:
            self._places.close()

    def batch_size(self, source: Source) -> int:
        """The batch size for a shard: the one that was given, or the one that all workers agreed on."""
        if self._batch_size is None:
            found = self._heaviest(source)
            if found is None:
                return 1
            typical, number = found
            # More than so many could not be gathered.
            largest = min(LARGEST_BATCH, self._loader.most_bytes_together // max(1, typical.nbytes))

            @lru_cache(1)
            def batches(size: int) -> list[Sequence[Any]]:
                """One, and another that waits meanwhile as it does later."""
                return [self._loader.packed([typical] * size) for _ in range(2)]

            def fits(size: int) -> bool:
                try:
                    asked = (FIRST, number) if number else ()
                    self._backend.caption(batches(size)[0], list(range(size)), *asked)
                except OutOfMemory:
                    return False
                return True

            find = partial(find_batch_size, fits, largest, self._first_tried)
            self._batch_size = agreed_batch_size(self._sizes, self._what, find)
        return self._batch_size

    def caption(
        self,
        work: ShardContext,
        batch_size: int,
        earlier: Earlier,
        limit: int | None,
        adopted: ShardCaptions | None = None,
    ) -> list[CaptionSample]:
        """Caption the images of a shard.

        Args:
            work: The shard.  Every sample is counted; those that are captioned are logged, and an interrupted attempt
                goes on after them.
            batch_size: From ``batch_size``.
            earlier: Captions of an earlier run, which are taken over if they pass the checks.
            limit: Images to read at most; None: all.
            adopted: Captions of another tool, which are taken over too.

        Returns:
            The samples that were not dropped and could be read, in the order of the shard, once for each question;
            those without any caption failed.
        """
        memory = FittingBatchSize(batch_size, self._what, self._sizes)
        samples: list[CaptionSample] = []
        report = TarReport()
        log = work.partial()
        if self._checks is not None:
            earlier = judge_earlier(earlier, self._checks, work, log, self._loader.seen_by_checks, self._parts)
        restore = _restorer(log, earlier, adopted)
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
        _note(work, samples)
        if self._checks is not None:
            _note_checks(work, samples)
        return samples

    def _caption(self, work: ShardContext, batch: CaptionBatch, log: PartialLog, memory: FittingBatchSize) -> None:
        """Caption and log a batch that is not in the log yet, and count its samples."""
        if not batch.done:
            images = [sample.prepared for sample in batch.samples]
            seeds = [self._seed(sample) for sample in batch.samples]
            number = batch.samples[0].number
            with work.phase("infer"):
                captions = self._captions(memory, images, seeds, number, batch.samples)
            if (limit := memory.limit(*batch.samples[0].group)) < len(images):
                work.note("batch_shrunk_to", limit)
            pairs = zip(batch.samples, captions, strict=True)
            log.append((s.key, s.digest, s.outcome(caption, batch.mark)) for s, caption in pairs)
        for sample in batch.samples:
            _count(work, sample)
        if not batch.done:
            work.check_stop()

    def _captions(
        self,
        memory: FittingBatchSize,
        images: Sequence[Prepared],
        seeds: Sequence[int],
        number: int,
        samples: Sequence[CaptionSample],
    ) -> list[Found]:
        return caption_batch(
            self._backend,
            memory,
            images,
            seeds,
            may_be_longer=self._questions[number].max_tokens is None,
            schema=self._schema,
            number=number,
            checks=self._checks,
            seen=[sample.seen for sample in samples],
            sources=["" if sample.filled is None else sample.filled.values for sample in samples],
            failed=[sample.failed for sample in samples],
        )

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
                if not sample.asks:
                    sample.release()
                elif sample.record:
                    _count(work, sample)
                else:
                    yield sample, sample.nbytes + (SEEN_BYTES if sample.seen is not None else 0)

        def ask(sample: CaptionSample) -> Found:
            seed = self._seed(sample)
            return self._captions(memory, [sample.prepared], [seed], sample.number, [sample])[0]

        try:
            for came in Asking(places, ask).answers(unanswered(), work, self._patience_s):
                log.append((s.key, s.digest, s.outcome(caption, s.digest)) for s, caption in came)
                for sample, _ in came:
                    _count(work, sample)
        finally:
            work.add_seconds("wait", waited_s)
            work.add_seconds("infer", time.perf_counter() - began - waited_s)

    def _seed(self, sample: CaptionSample) -> int:
        return self._seed_of(f"{sample.key}\0{sample.name}" if sample.name else sample.key)

    def _heaviest(self, source: Source) -> tuple[Any, int] | None:
        """Of the first images of a shard the one that takes most memory when it is prepared, and the question with
        which it does; None where there is none.

        The very first may be much smaller than most others.  Long captions take memory too.
        """
        found: tuple[Any, int] | None = None
        most = (0, -1)
        wanted = IMAGE_SUFFIXES | {"txt", "json"} if any(q.varies for q in self._questions) else IMAGE_SUFFIXES
        for sample in islice(read_samples(source, wanted.__contains__, parts=self._parts), LOOKED_AT):
            with contextlib.suppress(SampleError):
                sample.check()
                picture = Image.fromarray(decode_rgb(image_of(sample)))
                for one in captions_of(sample, self._parts, self._questions, ""):
                    prepared = self._backend.prepare(picture, *(() if one.inquiry is None else (one.inquiry,)))
                    mark = (self._questions[one.number].max_tokens or 0, prepared.nbytes)
                    if mark > most:
                        found, most = (prepared, one.number), mark
        return found


def _note(work: ShardContext, samples: Sequence[CaptionSample]) -> None:
    """Count the samples that nothing was asked about, and note what is told of all of them."""
    images = [sample.together for sample in samples if sample.together[0] is sample]
    unasked = [together for together in images if not any(sample.asks for sample in together)]
    theirs = sum(any(sample.made_by for sample in together) for together in unasked)
    work.keep(len(unasked))
    cut = sum(sample.record.get("cut", False) for sample in samples)
    filled = [[sample.filled for sample in together if sample.filled is not None] for together in images]
    empty = Counter(name for fills in filled for name in {name for one in fills for name in one.empty})
    long = Counter(name for fills in filled for name in {name for one in fills for name in one.cut})
    for name, count in {
        "reused": len(unasked) - theirs,
        "adopted": theirs,
        "cut_to_whole_sentences": cut,
        "with_empty_fields": sum(any(one.empty for one in fills) for fills in filled),
        "with_cut_fields": sum(any(one.cut for one in fills) for fills in filled),
    }.items():
        if count:
            work.note(name, count)
    for told, by_field in (("empty_fields", empty), ("cut_fields", long)):
        if by_field:
            work.note(told, dict(sorted(by_field.items())))
    if any(sample.name for sample in samples):
        _note_names(work, images)


def _note_names(work: ShardContext, images: Sequence[Sequence[CaptionSample]]) -> None:
    """Note for each of several captions how many images have it, and why others have not; those of images that have
    none at all are counted here too."""
    by_name: dict[str, dict[str, Any]] = {}
    missing = 0
    for together in images:
        has_any = any(one.text is not None for one in together)
        for one in together:
            told = by_name.setdefault(one.name, {"made": 0, "reused": 0, "adopted": 0, "cut": 0, "failed": {}})
            if one.text is None:
                reason = one.failure[0]
                told["failed"][reason] = told["failed"].get(reason, 0) + 1
                missing += has_any
                continue
            told["adopted" if one.made_by else "made" if one.caption is None else "reused"] += 1
            told["cut"] += bool(one.record.get("cut"))
    work.note("captions", by_name)
    if missing:
        work.note("captions_missing", missing)


def check_each_caption(samples: Sequence[CaptionSample], samples_in: int, max_error_rate: float) -> None:
    """Raise ShardError if one of several captions failed for more images than may fail: nobody wants a column of nulls.

    What checks have rejected is no failure.

    Args:
        samples: From ``ShardCaptioner.caption``.
        samples_in: The samples of the shard.
        max_error_rate: The share that may fail.
    """
    reasons: dict[str, Counter[str]] = {}
    for sample in samples:
        if sample.name and sample.text is None and "rejected" not in sample.record:
            reasons.setdefault(sample.name, Counter())[sample.failure[0]] += 1
    for name, counts in reasons.items():
        if (failed := counts.total()) > max_error_rate * samples_in:
            told = ", ".join(f"{count} {reason}" for reason, count in counts.most_common(5))
            raise ShardError(
                f"the caption {name} of --prompt_file failed for {failed} of {samples_in} samples ({told}), more than "
                f"--max_error_rate {max_error_rate:g}; look at its prompt, or leave it out",
                "too_many_errors",
            )


def _note_checks(work: ShardContext, samples: Sequence[CaptionSample]) -> None:
    """Tell the receipt how many captions were made, also by earlier runs, and how many of them failed each check."""
    by_check: Counter[str] = Counter()
    kept = rejected = asked_again = failed_tries = 0
    for sample in samples:
        looked = sample.tried
        if looked is None:
            continue
        passed = "rejected" not in sample.record
        kept, rejected = kept + passed, rejected + (not passed)
        failed_tries += looked["failed_captions"]
        asked_again += passed and looked["failed_captions"] > 0
        by_check.update(looked["failed_checks"])
    counts = {"tries": kept + failed_tries, "kept": kept, "failed_tries": failed_tries, "rejected": rejected}
    work.note("checks", {**counts, "by_check": dict(sorted(by_check.items()))})
    for name, count in {"rejected_by_checks": rejected, "asked_again_by_checks": asked_again}.items():
        if count:
            work.note(name, count)


def _count(work: ShardContext, sample: CaptionSample) -> None:
    """Count a sample once none of its captions is asked for any more.  One without any caption fails."""
    sample.release()
    sample.settled = True
    if not all(one.settled for one in sample.together):
        return
    if any(one.text is not None for one in sample.together):
        work.keep()
        return
    if all("rejected" in one.record for one in sample.together):
        work.reject(sample.key, **sample.together[0].record["rejected"])
        return
    reason, detail = next(one for one in sample.together if "rejected" not in one.record).failure
    if len(sample.together) > 1:
        told = (f"{one.name}: {one.failure[0]} {one.failure[1][:100]}".strip() for one in sample.together)
        detail = "; ".join(told)
    work.fail(sample.key, reason, detail)


def _restorer(log: PartialLog, earlier: Earlier, adopted: ShardCaptions | None) -> Callable[[CaptionSample], None]:
    """Fills in what is known of a sample from an interrupted attempt of this run, from an earlier run's rows, or from
    another tool's."""

    def restore(sample: CaptionSample) -> None:
        asked = "" if sample.filled is None else sample.filled.digest
        row = earlier.get((sample.key, sha256_of(sample.image)), {}).get(sample.name) if earlier else None
        row = row if row is not None and row.asked == asked else None
        if row is not None and row.failed:
            sample.failed = row.as_failed()
        data = log.get(sample.key, sample.digest)
        if data is not None:
            sample.record = orjson.loads(data)
        elif row is not None and not row.failed:
            sample.caption, sample.size, sample.sha256 = row.text, row.image_size, row.image_sha256
            sample.score, sample.answer = row.watermark_score, row.answer
            sample.checks, sample.earlier_tries = row.checks, row.tried
        elif adopted is not None and (found := adopted.find(sample.key, sample.metadata)) is not None:
            text = found.of(sample.name, first=not sample.number)
            with contextlib.suppress(SampleError):  # an image that cannot be read fails as it does without the caption
                if text is not None:
                    sample.size = image_size(sample.image)
                    sample.sha256 = sha256_of(sample.image)
                    sample.caption, sample.made_by = text, {"model": found.model, "revision": found.revision}

    return restore
