"""Samples of a shard prepared ahead of the models by worker processes, in batches that only the shard decides.

A process that dies or hangs on an image is replaced; its samples are tried again one by one, and the one that does it
again is the only one lost.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from curation.errors import SampleError
from curation.extract.api import Preparation
from curation.extract.plugins import Plugin
from curation.extract.worker import (
    Errand,
    Lost,
    PreparationJob,
    PreparationOutcome,
    SlotLayout,
    Slots,
    WorkerProcess,
)
from curation.jsonio import decode_text
from curation.libraries import np
from curation.tar.samples import MAX_CAPTION_CHARACTERS, USUAL, Parts, Sample, caption_of, image_of, lenient_metadata
from curation.tar.scan import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger("curation")

WANTED = frozenset(IMAGE_SUFFIXES) | {"txt", "json"}


CHUNK = 16  # samples that a process is given at once


MAX_BYTES_AHEAD = 192 << 20  # of images as they lie in the shard


SHARED_BYTES = 1 << 30  # of prepared batches, unless two need more


MAX_SLOTS = 4


# Images that are kept for a decoder on the device: none that is larger, and of a batch not more than these.
MAX_DEVICE_BYTES, MAX_DEVICE_BATCH_BYTES = 4 << 20, 256 << 20


_POLL_S = 0.1


@dataclass(slots=True)
class ExtractSample:
    """A sample of the shard.  image: its bytes, until they are prepared or, on a device, decoded.  caption: as it lies
    in the shard, None where there is none.  clean_caption: as the other stages work on it.  outcome: what happened to
    it in the worker process, or why it was not sent there."""

    key: str
    metadata: dict[str, Any]
    caption: str | None
    image: bytes | None
    clean_caption: str | None = None
    outcome: PreparationOutcome = field(default_factory=PreparationOutcome)


@dataclass(slots=True, eq=False)
class ExtractBatch:
    """The samples of the shard from number × batch size on.  done: an earlier attempt finished it, and nothing is
    prepared.  seconds_read: from the shard, by one thread.  waiting: each gives the seconds of a process; with the
    bytes of images that it holds.  kept_bytes: of images for the device.  staged: what lies on the device already."""

    number: int
    done: bool
    slot: int | None = None
    samples: list[ExtractSample] = field(default_factory=list)
    seconds_read: float = 0.0
    waiting: list[tuple[Future[float], int]] = field(default_factory=list)
    kept_bytes: int = 0
    staged: Any = None


def extract_sample(sample: Sample, parts: Parts = USUAL) -> ExtractSample:
    """What the models are given of a sample: the .txt as it is (as dataset2metadata gives it), else the json's caption;
    and the clean caption that the other stages work on."""
    data = sample.members.get("json")
    metadata = lenient_metadata(data)
    told = parts.told(metadata)
    found = ExtractSample(sample.key, metadata, _caption(sample, told), None, _clean_caption(sample, told))
    if sample.problem is not None:
        found.outcome.broken = sample.problem
        return found
    try:
        found.image = image_of(sample)
    except SampleError as error:
        found.outcome.unreadable = error.reason, error.detail
    return found


def _caption(sample: Sample, metadata: Mapping[str, Any]) -> str | None:
    txt = sample.members.get("txt")
    told = metadata.get("caption")
    found = None if txt is None else decode_text(txt[: 4 * MAX_CAPTION_CHARACTERS + 4])[:MAX_CAPTION_CHARACTERS]
    if isinstance(told, str) and not (found and found.strip()):
        return told[:MAX_CAPTION_CHARACTERS].encode("utf-8", "replace").decode()
    return found


def _clean_caption(sample: Sample, metadata: Mapping[str, Any]) -> str | None:
    try:
        return caption_of(metadata, sample.members.get("txt"))
    except SampleError:
        return None


class _ShardStream:
    """One shard on its way through the feed.  begun: batches that were given a slot."""

    def __init__(self, samples: Iterator[ExtractSample], is_done: Callable[[int], bool], ticket: int) -> None:
        self.samples, self.is_done, self.ticket = samples, is_done, ticket
        self.ready: queue.Queue[ExtractBatch | None] = queue.Queue(2 * MAX_SLOTS)
        self.begun: list[ExtractBatch] = []
        self.stop = threading.Event()

    def put(self, item: ExtractBatch | None) -> bool:
        """Whether it could be put before somebody stopped."""
        while not self.stop.is_set():
            with contextlib.suppress(queue.Full):
                self.ready.put(item, timeout=_POLL_S)
                return True
        return False

    def take(self) -> ExtractBatch | None:
        """The next batch; None at the end, or where somebody stopped."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self.ready.get(timeout=_POLL_S)
            if self.stop.is_set():
                return None


class _Ahead:
    """Takes the next batch and stages it, in a thread, when one is handed out."""

    def __init__(
        self, take: Callable[[], tuple[ExtractBatch, float] | None], stage: Callable[[ExtractBatch], None]
    ) -> None:
        self._take, self._stage = take, stage
        self._thread = ThreadPoolExecutor(1, "stage")
        self._next: Future[tuple[ExtractBatch, float] | None] | None = None

    def __call__(self) -> tuple[ExtractBatch, float] | None:
        found = (self._next or self._thread.submit(self._staged)).result()
        self._next = None if found is None else self._thread.submit(self._staged)
        return found

    def _staged(self) -> tuple[ExtractBatch, float] | None:
        found = self._take()
        if found is not None and not found[0].done:
            self._stage(found[0])
        return found

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class ExtractLoader:
    """Prepares the samples of one shard after the other; one for all shards of a process.

    Shards in flight are read, and taken from, in the order in which they came: the next is read ahead once the one
    before is read to its end, and computed once that one is computed, so that no shard's beginning leaves a model idle.

    preparations: different ones, in the order of their numbers.  plugin: the file that some of them come from.
    least_slots: batches that lie in memory at least.  for_device: images that a device's decoder can read are left to
    it and kept.
    """

    def __init__(
        self,
        preparations: Sequence[Preparation],
        batch_size: int,
        processes: int,
        plugin: Plugin | None = None,
        *,
        least_slots: int = 2,
        for_device: bool = False,
    ) -> None:
        self.preparations = tuple(preparations)
        self.for_device = for_device
        self._batch_size = batch_size
        layout = SlotLayout.of(self.preparations, batch_size)
        count = min(MAX_SLOTS, max(least_slots, SHARED_BYTES // max(1, layout.slot_bytes)))
        layout = SlotLayout(batch_size, count, layout.slot_bytes, layout.places)
        self._slots = Slots(layout)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(count):
            self._free.put(slot)
        self._tickets = itertools.count()
        self._reading, self._taking = TicketOrder(), TicketOrder()
        self._bytes = _Budget(MAX_BYTES_AHEAD)
        self._chunk = max(1, min(_most_at_once(self.preparations), -(-batch_size // (2 * processes))))
        self._needs_facts = any(preparation.takes == "sample" for preparation in self.preparations)
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._processes = [WorkerProcess(self.preparations, self._slots, plugin) for _ in range(processes)]
        for process in self._processes:
            self._idle.put(process)
        self._couriers = ThreadPoolExecutor(processes, "prepare")

    def close(self) -> None:
        self._couriers.shutdown(cancel_futures=True)
        for process in self._processes:
            process.end()
        self._slots.close()

    def array(self, batch: ExtractBatch, number: int) -> NDArray[Any] | None:
        """One row per sample, of the preparation of that number, until the batch is released; None for dicts."""
        assert batch.slot is not None
        array = self._slots.array(batch.slot, number)
        return None if array is None else array[: len(batch.samples)]

    @property
    def shared_memory(self) -> NDArray[np.uint8]:
        """All memory that batches may lie in."""
        return self._slots.memory

    def release(self, batch: ExtractBatch) -> None:
        """Its arrays may be used for another batch."""
        batch.staged = None
        for sample in batch.samples:
            sample.image = None
        if batch.slot is not None:
            slot, batch.slot = batch.slot, None
            self._free.put(slot)

    def beside(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """What a function returns that a worker process calls; this process does where the other dies."""
        return self._couriers.submit(self._run, Errand(function, arguments))

    def prepare_here(self, batch: ExtractBatch, rows: Sequence[int]) -> None:
        """Have the processes prepare images that were left to the device."""
        samples = [(row, batch.samples[row]) for row in rows]
        for row, sample in samples:
            job = self._job(batch, row, sample)
            self._bytes.wait(len(sample.image or b""), threading.Event())
            self._submit(batch, [replace(job, for_device=False)])
        for future, _ in batch.waiting[-len(rows) :]:
            future.result()

    @contextlib.contextmanager
    def batches(
        self,
        samples: Iterable[ExtractSample],
        is_done: Callable[[int], bool],
        stage: Callable[[ExtractBatch], None] | None = None,
    ) -> Iterator[Callable[[], tuple[ExtractBatch, float] | None]]:
        """A function that gives one batch after the other with the seconds that its preparation took in all
        processes; None at the end.  The next ones are read and prepared meanwhile.

        is_done: whether an earlier attempt finished the batch of that number, so that its images are not needed.
        stage: called with each batch that is not done, in a thread of its own, while the one before is computed.
        """
        stream = _ShardStream(iter(samples), is_done, next(self._tickets))
        reader = ThreadPoolExecutor(1, "read")
        reading = reader.submit(self._read, stream)

        def take() -> tuple[ExtractBatch, float] | None:
            batch = stream.take()
            if batch is None:
                reading.result()  # raises what went wrong there
                return None
            return batch, sum(future.result() for future, _ in batch.waiting)

        ahead = None if stage is None else _Ahead(take, stage)
        try:
            self._taking.wait(stream.ticket, stream.stop)
            yield take if ahead is None else ahead
        finally:
            stream.stop.set()
            if ahead is not None:
                ahead.close()
            reader.shutdown(wait=True)
            for batch in stream.begun:
                self._abandon(batch)
            self._taking.pass_on(stream.ticket)

    def _abandon(self, batch: ExtractBatch) -> None:
        """Of a shard that is given up: its slot, once nobody writes there any more.  Released batches have none."""
        if batch.slot is None:
            return
        for future, size in batch.waiting:
            if future.cancel():
                self._bytes.give_back(size)
            else:
                future.exception()
        self.release(batch)

    # ---- the reading thread

    def _read(self, stream: _ShardStream) -> None:
        try:
            self._reading.wait(stream.ticket, stream.stop)
            for number in itertools.count():
                began = time.perf_counter()
                first = next(stream.samples, None)
                if first is None or stream.stop.is_set():
                    return
                batch = ExtractBatch(number, stream.is_done(number), seconds_read=time.perf_counter() - began)
                if not batch.done and not self._take_slot(batch, stream):
                    return
                self._fill(batch, first, stream)
                if not stream.put(batch):
                    return
        finally:
            self._reading.pass_on(stream.ticket)
            stream.put(None)

    def _take_slot(self, batch: ExtractBatch, stream: _ShardStream) -> bool:
        while not stream.stop.is_set():
            with contextlib.suppress(queue.Empty):
                batch.slot = self._free.get(timeout=_POLL_S)
                stream.begun.append(batch)
                return True
        return False

    def _fill(self, batch: ExtractBatch, first: ExtractSample, stream: _ShardStream) -> None:
        """Read the batch's samples and hand them on as they come, so that few of its images are in memory."""
        jobs: list[PreparationJob] = []
        sample: ExtractSample | None = first
        try:
            while sample is not None and not stream.stop.is_set():
                if batch.slot is None or not self._hand_on(batch, sample, jobs, stream.stop):
                    sample.image = None
                batch.samples.append(sample)
                if len(jobs) == self._chunk:
                    self._submit(batch, jobs)
                if len(batch.samples) == self._batch_size:
                    break
                began = time.perf_counter()
                sample = next(stream.samples, None)
                batch.seconds_read += time.perf_counter() - began
        finally:
            self._submit(batch, jobs)

    def _hand_on(
        self, batch: ExtractBatch, sample: ExtractSample, jobs: list[PreparationJob], stop: threading.Event
    ) -> bool:
        """Whether its image is kept, because the device may decode it."""
        assert batch.slot is not None
        row = len(batch.samples)
        if sample.outcome.broken is not None:
            self._slots.clear(batch.slot, row)
            return False
        size = len(sample.image or b"")
        if not self._bytes.take(size):
            self._submit(batch, jobs)
            self._bytes.wait(size, stop)
        job = self._job(batch, row, sample)
        if self.for_device and 0 < size <= MAX_DEVICE_BYTES and batch.kept_bytes + size <= MAX_DEVICE_BATCH_BYTES:
            batch.kept_bytes += size
            job = replace(job, for_device=True)
        jobs.append(job)
        return job.for_device

    def _job(self, batch: ExtractBatch, row: int, sample: ExtractSample) -> PreparationJob:
        assert batch.slot is not None
        metadata = sample.metadata if self._needs_facts else {}
        return PreparationJob(batch.slot, row, sample.key, sample.image, sample.caption, metadata, sample.clean_caption)

    def _submit(self, batch: ExtractBatch, jobs: list[PreparationJob]) -> None:
        if jobs:
            size = sum(len(job.image or b"") for job in jobs)
            batch.waiting.append((self._couriers.submit(self._prepare, batch, tuple(jobs)), size))
            jobs.clear()

    # ---- a thread for each process

    def _prepare(self, batch: ExtractBatch, jobs: tuple[PreparationJob, ...]) -> float:
        """Have a process prepare the jobs; the seconds that it took there."""
        process = self._idle.get()
        try:
            outcomes, seconds = self._ask(process, jobs)
        finally:
            self._idle.put(process)
            self._bytes.give_back(sum(len(job.image or b"") for job in jobs))
        for job, outcome in zip(jobs, outcomes, strict=True):
            sample = batch.samples[job.row]
            outcome.unreadable = sample.outcome.unreadable or outcome.unreadable
            outcome.off_device = sample.outcome.off_device or outcome.off_device
            sample.outcome = outcome
            if self.for_device and not outcome.on_device:
                sample.image = None
        return seconds

    def _run(self, errand: Errand) -> Any:
        process = self._idle.get()
        try:
            return process.run(errand)
        except Lost:
            return errand.function(*errand.arguments)
        finally:
            self._idle.put(process)

    def _ask(self, process: WorkerProcess, jobs: tuple[PreparationJob, ...]) -> tuple[list[PreparationOutcome], float]:
        try:
            return process.ask(jobs)
        except Lost:
            pass
        outcomes, seconds = [], 0.0
        for job in jobs:
            try:
                (outcome,), took = process.ask((job,))
                seconds += took
            except Lost as error:
                self._slots.clear(job.slot, job.row)
                outcome = PreparationOutcome(broken=error.problem)
                logger.warning(f"{job.key}: {error.problem[1]}; its row says so")
            outcomes.append(outcome)
        return outcomes, seconds


def _most_at_once(preparations: Sequence[Preparation]) -> int:
    """Samples that a process is given at once: fewer where one of them takes seconds, because of ``REPLY_S``."""
    return min((int(getattr(preparation, "at_once", CHUNK)) for preparation in preparations), default=CHUNK)


class _Budget:
    """Bytes that may be held at a time; one thing that is larger than all of them goes alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._changed = threading.Condition()

    def take(self, size: int) -> bool:
        with self._changed:
            if self._held and self._held + size > self._most:
                return False
            self._held += size
            return True

    def wait(self, size: int, stop: threading.Event) -> None:
        """Until it can be taken, or somebody stops."""
        while not self.take(size) and not stop.is_set():
            with self._changed:
                self._changed.wait(_POLL_S)

    def give_back(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()


class TicketOrder:
    """Who comes first by a ticket goes first, whoever else waits."""

    def __init__(self) -> None:
        self._now = 0
        self._passed: set[int] = set()
        self._changed = threading.Condition()

    def wait(self, ticket: int, stop: threading.Event) -> None:
        """Until it is the ticket's turn, or somebody stops."""
        with self._changed:
            while self._now != ticket and not stop.is_set():
                self._changed.wait(_POLL_S)

    def pass_on(self, ticket: int) -> None:
        """The ticket needs its turn no more, whether it had it or not."""
        with self._changed:
            self._passed.add(ticket)
            while self._now in self._passed:
                self._passed.remove(self._now)
                self._now += 1
            self._changed.notify_all()
