"""curation.caption.batching."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from curation.caption.captioner import CaptionBackend, OutOfMemory, Prepared
from curation.errors import SampleError
from curation.models.batch_size import FittingBatchSize
from curation.storage.files import link_exclusively

MOST_WAITING = 512  # images that wait for others of their shape, over all shapes


MOST_WAITING_BYTES = 1 << 30  # of them as they lie in the shard and as the model takes them


LARGEST_BATCH = 1024


WORTH_DOUBLING = 1.05  # images a second, to those with half the batch

Item = TypeVar("Item")


class ShapeGroups(Generic[Item]):
    """Items of one shape together, ``size`` at a time, by the order in which they come and nothing else: the same
    shard gives the same batches, whoever works on it.

    Where more than ``most_bytes`` wait over all shapes, the row that holds the most bytes goes first, full or not;
    where more than ``most_waiting`` items wait, the longest row.
    """

    def __init__(self, size: int, most_waiting: int = MOST_WAITING, most_bytes: int = MOST_WAITING_BYTES) -> None:
        self._size = size
        self._most, self._most_bytes = max(size, most_waiting), most_bytes
        self._rows: dict[tuple[int, ...], list[Item]] = {}
        self._bytes: dict[tuple[int, ...], int] = {}
        self._waiting = 0
        self.bytes_waiting = 0

    def add(self, shape: tuple[int, ...], item: Item, nbytes: int = 0) -> list[Item]:
        """The batch that ``item`` completes or displaces; an empty list where all wait for others."""
        row = self._rows.setdefault(shape, [])
        row.append(item)
        self._bytes[shape] = self._bytes.get(shape, 0) + nbytes
        self._waiting += 1
        self.bytes_waiting += nbytes
        if len(row) == self._size:
            return self._take(shape)
        if self.bytes_waiting > self._most_bytes:  # one row is enough: the heaviest is no lighter than what was added
            return self._take(max(self._bytes, key=self._bytes.__getitem__))
        if self._waiting > self._most:
            return self._take(max(self._rows, key=lambda key: len(self._rows[key])))
        return []

    def rest(self) -> Iterator[list[Item]]:
        """What waits at the shard's end, by the first image of each shape."""
        while self._rows:
            yield self._take(next(iter(self._rows)))

    def _take(self, shape: tuple[int, ...]) -> list[Item]:
        row = self._rows.pop(shape)
        self._waiting -= len(row)
        self.bytes_waiting -= self._bytes.pop(shape)
        return row


def caption_batch(
    backend: CaptionBackend, memory: FittingBatchSize, batch: Sequence[Prepared], seeds: Sequence[int]
) -> list[str | SampleError]:
    """Captions of images of one shape, or why there is none, in order.

    Where memory runs out the batch is halved and the size that fits is remembered in ``memory``; an image that does
    not fit alone is ``out_of_memory``, and a caption without a word is ``empty_caption``: those rows and no others.
    """
    captions: list[str | SampleError] = []
    while len(captions) < len(batch):
        start = len(captions)
        shape = batch[start].shape
        end = min(start + memory.limit(*shape), len(batch))
        try:
            captions += map(_checked, backend.caption(batch[start:end], seeds[start:end]))
        except OutOfMemory as error:
            if end - start == 1:
                captions.append(SampleError("out_of_memory", f"{'×'.join(map(str, shape))}: {error}"))
            else:
                memory.shrink(*shape, tried=end - start)
    return captions


def _checked(caption: str | SampleError) -> str | SampleError:
    if isinstance(caption, SampleError):
        return caption
    return caption.strip() or SampleError("empty_caption", "the model said nothing")


def find_batch_size(backend: CaptionBackend, sample: Prepared, largest: int = LARGEST_BATCH) -> int:
    """The batch size of ``--batch_size auto``: doubled as long as it fits and makes captioning clearly faster.

    sample: a typical image.  Each size is tried once, with as many tokens as the model cares to write about it; none
    that could not be gathered.
    """
    best, best_rate, size = 1, 0.0, 1
    largest = min(largest, MOST_WAITING_BYTES // max(1, sample.nbytes))
    _fits(backend, sample, 1)  # the first call pays for kernels that are loaded and chosen
    while size <= largest:
        began = time.perf_counter()
        if not _fits(backend, sample, size):
            break
        rate = size / max(1e-9, time.perf_counter() - began)
        if rate < best_rate * WORTH_DOUBLING:
            break
        best, best_rate, size = size, rate, size * 2
    return best


def _fits(backend: CaptionBackend, sample: Prepared, size: int) -> bool:
    """Whether ``size`` copies of an image fit."""
    try:
        backend.caption([sample] * size, list(range(size)))
    except OutOfMemory:
        return False
    return True


def settled_batch_size(file: Path, find: Callable[[], int]) -> int:
    """The batch size that a run recorded in ``file``, or that ``find`` finds and the first worker to write records.

    It decides which images are computed together, and so the last bits: all workers, and every run that goes on with
    the work, take one and the same.
    """
    size = _recorded(file)
    if size is None:
        size = find()
        link_exclusively(file, f"{json.dumps({'batch_size': size})}\n".encode())
        size = _recorded(file) or size
    return size


def _recorded(file: Path) -> int | None:
    try:
        size = json.loads(file.read_bytes())["batch_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size > 0 else None
