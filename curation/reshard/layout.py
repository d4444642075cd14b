"""Assigns the samples of source shards to output shards of one size.

An index of each source shard lists the places of the chosen samples.  The layout depends only on the counts in these
indexes: the samples in the order of their shards, each with its copies, are shuffled block by block and cut into shards
of one size.  So any process can compute the content of any output shard alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from curation.errors import ShardError
from curation.shards import Shard

ROW: Final = np.dtype([("start", "<i8"), ("end", "<i8"), ("copies", "<i4"), ("bits", "<i4")])


"""A byte range of a sample, the number of its copies (0 in all of its ranges except the last), and its kind."""


IS_EDITED: Final = 1


Rows = NDArray[np.void]


Positions = NDArray[np.int64]


class IndexWriter:
    """Collects the chosen samples of a source shard, in its order."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int]] = []
        self.samples = 0  # including copies
        self.bytes = 0

    def add(self, extents: Sequence[tuple[int, int]], copies: int, bits: int) -> None:
        self._rows += [(start, end, 0, bits) for start, end in extents[:-1]]
        self._rows.append((*extents[-1], copies, bits))
        self.samples += copies
        self.bytes += copies * sum(end - start for start, end in extents)

    def dump(self) -> bytes:
        file = io.BytesIO()
        np.save(file, np.array(self._rows, ROW), allow_pickle=False)
        return file.getvalue()


@dataclass(frozen=True, slots=True)
class Placed:
    """The place of a sample: the ranges of its members; this is copy number ``copy`` of ``copies``."""

    extents: Sequence[tuple[int, int]]
    copy: int
    copies: int
    is_edited: bool


class IndexReader:
    """The chosen samples of a source shard by number.  Raises ShardError for a file that is not an index."""

    def __init__(self, path: Path) -> None:
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ShardError(f"{path}: not an index ({error}); start again with --rerun") from None
        if not isinstance(rows, np.ndarray) or rows.dtype != ROW or rows.ndim != 1:
            raise ShardError(f"{path}: not an index of samples; start again with --rerun")
        self._rows: Rows = rows
        self._ends: Positions = np.cumsum(rows["copies"], dtype=np.int64)

    def place(self, number: int) -> Placed:
        """The chosen sample with this number; copies have numbers of their own."""
        last = int(np.searchsorted(self._ends, number, side="right"))
        first = last
        while first > 0 and self._rows[first - 1]["copies"] == 0:
            first -= 1
        rows = [self._rows[at] for at in range(first, last + 1)]
        copies = int(rows[-1]["copies"])
        extents = [(int(row["start"]), int(row["end"])) for row in rows]
        copy = number - (int(self._ends[last]) - copies)
        return Placed(extents, copy, copies, bool(rows[-1]["bits"] & IS_EDITED))


@dataclass(frozen=True, slots=True)
class Draw:
    """The samples of one output shard in order: numbers of source shards, and numbers of samples in them."""

    sources: Positions
    samples: Positions

    @property
    def distinct(self) -> list[int]:
        found: list[int] = np.unique(self.sources).tolist()
        return found


class ShardLayout:
    """counts: number of chosen samples of each source shard, in order.  shuffle: samples in one shuffled block."""

    def __init__(self, shards: Sequence[Shard], counts: Iterable[int], size: int, shuffle: int, seed: int) -> None:
        self.sources = list(shards)
        self._size, self._shuffle, self._seed = size, shuffle, seed
        self._ends: Positions = np.cumsum(np.fromiter(counts, np.int64), dtype=np.int64)
        self.total = int(self._ends[-1]) if len(self._ends) else 0
        self.draw = lru_cache(8)(self._draw)

    def __len__(self) -> int:
        """The number of output shards."""
        return -(-self.total // self._size)

    @property
    def shards(self) -> list[Shard]:
        """The output shards; the path of each is that of its first source."""
        width = max(8, len(str(max(0, len(self) - 1))))
        return [Shard(f"{number:0{width}d}", self.sources[self._first(number)].path) for number in range(len(self))]

    @property
    def mark(self) -> str:
        """A text that identifies the layout: it changes if the number of chosen samples of any shard changes."""
        digest = xxhash.xxh3_64(self._ends.tobytes())
        for shard in self.sources:
            digest.update(f"{shard.id}\n".encode())
        return f"{self.total} samples of {len(self.sources)} shards, {digest.hexdigest()}"

    def _first(self, number: int) -> int:
        return int(np.searchsorted(self._ends, number * self._size, side="right"))

    def _draw(self, number: int) -> Draw:
        positions = np.arange(number * self._size, min(self.total, (number + 1) * self._size))
        if self._shuffle > 1:
            positions = self._shuffled(positions)
        sources = np.searchsorted(self._ends, positions, side="right")
        before = np.concatenate((np.zeros(1, np.int64), self._ends))[sources]
        return Draw(sources, positions - before)

    def _shuffled(self, positions: Positions) -> Positions:
        """The samples at these positions.  Each block of ``shuffle`` samples is permuted on its own, so that no sample
        moves further than that, and a block can be computed without the others."""
        first, last = int(positions[0]) // self._shuffle, int(positions[-1]) // self._shuffle
        blocks = []
        for block in range(first, last + 1):
            begin, end = block * self._shuffle, min(self.total, (block + 1) * self._shuffle)
            order = np.argsort(_scrambled(np.arange(begin, end, dtype=np.uint64), self._seed), kind="stable")
            blocks.append(begin + order.astype(np.int64))
        drawn: Positions = np.concatenate(blocks)[positions - first * self._shuffle]
        return drawn


def _scrambled(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Hash each number with the finaliser of SplitMix64 (Steele, Lea and Flood 2014), because NumPy's generators may
    change between versions."""
    start = xxhash.xxh3_64_intdigest(f"shuffle {seed}".encode())
    with np.errstate(over="ignore"):
        mixed = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        scrambled: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return scrambled
