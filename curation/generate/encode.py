"""Encodes the pictures of one shard, has them judged and saves them, while the device makes the next ones."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from curation.check import Asked
from curation.errors import SampleError, Stopped
from curation.generate.batches import Batch
from curation.generate.judging import Judge, Prepared
from curation.generate.tries import Outcome, Rank, Try, of_picture, outcome_of, pack, unpack
from curation.images import Pixels, encode_jpeg
from curation.run import ShardContext

_ENDS_SOON_S = 20.0  # in this time the next shard's prompts are read, so that the device has work when this one ends


class Pictures(Protocol):
    """A batch's images, which the device may still be producing; ``image`` waits, and raises SampleError."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Pixels: ...


class Texts(Protocol):
    """Prompts that are encoded already, in the order of their jobs."""

    def part(self, start: int, count: int) -> Self: ...


AnyTexts = TypeVar("AnyTexts", bound=Texts)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How pictures become JPEGs.

    Attributes:
        encoders: Threads.
        quality: Of the JPEG.
        xmp: A packet that goes into each of them.
    """

    encoders: Executor
    quality: int
    xmp: bytes

    def encode(self, round_number: int, pictures: Pictures, index: int) -> Try:
        """One of a batch's pictures as a try that nobody has judged."""
        try:
            return of_picture(round_number, encode_jpeg(pictures.image(index), self.quality, self.xmp))
        except SampleError as error:
            return Try(round_number, refused=(error.reason, error.detail))


class TryLog:
    """The tries of one shard's samples, in the shard's checkpoint: pictures, and what the checks said of them.

    The records of a batch are appended in one write and are valid only together: the bytes of an image depend on the
    other images of its batch, so an incomplete batch is made again as a whole.  A sample is counted as kept once its
    record is durable or was found.  Where nothing is checked, one that failed is counted at once as well.

    A record of a try that failed has its picture only where it may still be kept, so that a checkpoint holds no more
    pictures than it must.  Memory holds one small entry for each try.
    """

    def __init__(
        self, work: ShardContext, encoding: Encoding, judge: Judge | None, asked: Mapping[str, Asked], *, keeps: bool
    ) -> None:
        """
        Args:
            work: The shard's context.
            encoding: How pictures become JPEGs.
            judge: What looks at the pictures; None: nothing is checked.
            asked: What each picture is to show, where there is a judge.
            keeps: Whether a picture may be kept that failed.
        """
        self._work, self._log = work, work.partial()
        self._encoding, self._judge, self._asked, self._keeps = encoding, judge, asked, keeps
        self._in_flight = 1 if judge is None else 2  # batches behind the device: one is encoded, one is judged
        self._running: deque[tuple[Batch, Future[list[Try]] | list[Future[Try]]]] = deque()
        self._rounds: list[dict[str, str]] = []  # of each round, key → the digest of its record
        self._earlier: dict[str, Try] = {}
        self._passed: set[str] = set()
        self._best: dict[str, tuple[Rank, int]] = {}  # of the samples that have only failed so far: the rank, -round

    @property
    def round(self) -> int:
        """The number of the round that has begun."""
        return len(self._rounds) - 1

    def begin_round(self, groups: Sequence[Sequence[Batch]]) -> None:
        """The batches of the next round.

        groups: Batches whose prompts are encoded together; the bytes of an image depend on the group too.
        """
        digests: dict[str, str] = {}
        for group in groups:
            mark = hashlib.blake2b("".join(batch.digest for batch in group).encode(), digest_size=8).hexdigest()
            digests |= {job.key: batch.digest + mark for batch in group for job in batch.jobs}
        self._rounds.append(digests)

    def has(self, batch: Batch) -> bool:
        """Whether an earlier attempt finished the batch; if so, its jobs are counted.  Call it once per batch."""
        records = [self._log.get(job.key, self._rounds[-1][job.key]) for job in batch.jobs]
        if not all(records):
            return False
        for job, record in zip(batch.jobs, records, strict=True):
            self._count(job.key, unpack(self.round, record or b""))
        return True

    def take(self, batch: Batch, pictures: Pictures) -> None:
        """Encode a batch in the background, have it judged, and log an earlier one."""
        submit, number, judge = self._encoding.encoders.submit, self.round, self._judge
        if judge is None:
            tasks = [submit(self._encoding.encode, number, pictures, index) for index in range(len(pictures))]
            self._running.append((batch, tasks))
        else:

            def prepared(index: int, judge: Judge = judge) -> Prepared:
                return judge.prepare(self._encoding.encode(number, pictures, index))

            ready = [submit(prepared, index) for index in range(len(pictures))]
            self._running.append((batch, judge.ask(ready, [self._asked[job.key] for job in batch.jobs])))
        while len(self._running) > self._in_flight:
            self._log_oldest()

    def finish(self) -> None:
        """Log the batches that are not logged yet."""
        while self._running:
            self._log_oldest()

    def _log_oldest(self) -> None:
        batch, running = self._running.popleft()
        with self._work.phase("encode" if isinstance(running, list) else "check"):
            tries = [task.result() for task in running] if isinstance(running, list) else running.result()
        keys = [job.key for job in batch.jobs]
        with self._work.phase("write"):
            self._log.append(
                (key, self._rounds[-1][key], self._packed(key, attempt))
                for key, attempt in zip(keys, tries, strict=True)
            )
        for key, attempt in zip(keys, tries, strict=True):
            self._count(key, attempt)

    def _packed(self, key: str, attempt: Try) -> bytes:
        beats_others = key not in self._best or (attempt.rank, -attempt.round) > self._best[key]
        may_be_kept = attempt.passed or (self._keeps and beats_others)
        return pack(attempt, judged=self._judge is not None, with_picture=may_be_kept)

    def _count(self, key: str, attempt: Try) -> None:
        if attempt.passed:
            self._passed.add(key)
            self._work.keep()
        elif self._judge is None:
            assert attempt.refused is not None
            self._work.fail(key, *attempt.refused)
        else:
            self._note_failure(key, attempt)
            self._work.progress()

    def _note_failure(self, key: str, attempt: Try) -> None:
        mine = (attempt.rank, -attempt.round)
        self._best[key] = max(mine, self._best.get(key, mine))

    # ---- pictures that an earlier run has left

    def judge_earlier(self, pictures: Mapping[str, tuple[int, bytes]]) -> dict[str, Try]:
        """What the checks say of pictures that are there already, without their pictures.

        What an interrupted attempt has judged is read from the log.  Pictures that cannot be decoded are left out.

        pictures: key → the round in which it was made, and the JPEG.

        Raises:
            Stopped: A stop was requested; the verdicts are in the log.
        """
        assert self._judge is not None
        tries = {key: of_picture(number, jpg) for key, (number, jpg) in pictures.items()}
        marks = {key: self._mark_of_earlier(key, one) for key, one in tries.items()}
        found: dict[str, Try] = {}
        for key, one in tries.items():
            if record := self._log.get(key, marks[key]):
                found[key] = unpack(one.round, record)
        new = [key for key in tries if key not in found]
        ready = [self._encoding.encoders.submit(self._judge.prepare, tries[key]) for key in new]
        with self._work.phase("check"):
            judged = self._judge.ask(ready, [self._asked[key] for key in new]).result()
        records = [
            (key, marks[key], pack(one, judged=True, with_picture=False)) for key, one in zip(new, judged, strict=True)
        ]
        if records:
            self._log.append(records)
        found |= {key: unpack(tries[key].round, record) for key, _, record in records}
        self._work.progress()
        self._work.check_stop()
        return {key: one for key, one in found.items() if one.refused is None}

    def _mark_of_earlier(self, key: str, attempt: Try) -> str:
        """What the verdict of a picture that is there depends on, besides the options."""
        group = (self._asked[key].group or "").encode("utf-8", "surrogatepass")
        return f"earlier-{attempt.sha256}-{hashlib.blake2b(group, digest_size=8).hexdigest()}"

    def knows(self, attempt: Try, key: str) -> None:
        """A picture that is there already and has failed takes the place of the try of its round."""
        self._earlier[key] = attempt
        self._note_failure(key, attempt)

    def is_known(self, key: str, round_number: int) -> bool:
        """Whether the picture of that round is there already."""
        return key in self._earlier and self._earlier[key].round == round_number

    def keeps_earlier(self) -> set[str]:
        """The samples whose picture that was there is kept although it failed, because no new one is better."""
        kept = self._earlier.items() if self._keeps else ()
        return {k for k, one in kept if k not in self._passed and self._best[k] == (one.rank, -one.round)}

    # ---- what came of it

    def passed(self, key: str) -> bool:
        """Whether a try of the sample has passed."""
        return key in self._passed

    def outcome(self, key: str) -> Outcome:
        """What came of all tries of a sample, with the picture that is kept if it is in the log."""
        tries = [self._earlier[key]] if key in self._earlier else []
        for number, digests in enumerate(self._rounds):
            if record := self._log.get(key, digests[key]) if key in digests else None:
                tries.append(unpack(number, record))
        return self._choose(tries)

    def settled(self, attempt: Try, others: Iterable[Try]) -> Outcome:
        """What comes of a sample whose picture that is there has failed, and that was tried often enough.

        others: What is told of its other tries.  Their pictures are gone, so that none of them can be kept.
        """
        if self._keeps:
            return Outcome(attempt, list(others))
        return Outcome(None, sorted([*others, attempt], key=lambda one: one.round))

    def _choose(self, tries: Iterable[Try]) -> Outcome:
        return outcome_of(sorted(tries, key=lambda one: one.round), keeps_failed=self._keeps)


def make_missing(
    work: ShardContext,
    groups: Sequence[Sequence[Batch]],
    log: TryLog,
    turn: AbstractContextManager[object],
    make: Callable[[Batch, AnyTexts | None], Pictures],
    encode_texts: Callable[[Sequence[str]], AnyTexts | None],
) -> None:
    """Generate every batch that is not in the log.  While the device works on one, earlier ones are encoded and judged.

    Args:
        work: The shard's context.
        groups: The batches of the round that the log has begun; those of one group have their prompts encoded together.
        log: Receives the images.
        turn: Is held while the device works for this shard, and not while the last pictures are judged: another shard
            may then use the device.  Of two shards that wait for their first round, the one that began first is first.
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
    log: TryLog,
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
