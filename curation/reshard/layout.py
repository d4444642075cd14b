"""Assigns the samples of source shards to output shards of one size.

An index of each source shard lists the places of the chosen samples.  The layout depends only on the counts in these
indexes: the samples in the order of their shards, each with its copies, are shuffled block by block and cut into shards
of one size.  So any process can compute the content of any output shard alone.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import xxhash

from curation.errors import ShardError
from curation.libraries import np
from curation.shards import Shard

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROW: Final = [("start", "<i8"), ("end", "<i8"), ("copies", "<i4"), ("bits", "<i4")]


"""A byte range of a sample, the number of its copies (0 in all of its ranges except the last), and its kind."""


IS_EDITED: Final = 1


Rows: TypeAlias = "NDArray[np.void]"


Positions: TypeAlias = "NDArray[np.int64]"


class IndexWriter:
    """Collects the chosen samples of a source shard, in its order."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int]] = []
        self._copies: Counter[int] = Counter()
        self.samples = 0  # including copies
        self.bytes = 0

    def add(self, extents: Sequence[tuple[int, int]], copies: int, bits: int) -> None:
        self._rows += [(start, end, 0, bits) for start, end in extents[:-1]]
        self._rows.append((*extents[-1], copies, bits))
        self.samples += copies
        self._copies[copies] += 1
        self.bytes += copies * sum(end - start for start, end in extents)

    @property
    def with_copy(self) -> list[int]:
        """How many samples have a first copy, a second one, and so on."""
        most = max(self._copies, default=0)
        return [sum(n for copies, n in self._copies.items() if copies > copy) for copy in range(most)]

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
        if not isinstance(rows, np.ndarray) or rows.dtype != np.dtype(ROW) or rows.ndim != 1:
            raise ShardError(f"{path}: not an index of samples; start again with --rerun")
        self._rows: Rows = rows
        self._ends: Positions = np.cumsum(rows["copies"], dtype=np.int64)
        self._with_copy: dict[int, Positions] = {}

    def place(self, number: int) -> Placed:
        """The chosen sample with this number; copies have numbers of their own."""
        last = int(np.searchsorted(self._ends, number, side="right"))
        return self._at(last, number - (int(self._ends[last]) - int(self._rows[last]["copies"])))

    def place_of_copy(self, copy: int, number: int) -> Placed:
        """This copy of the chosen sample with this number among those that have it."""
        if copy not in self._with_copy:
            self._with_copy[copy] = np.flatnonzero(self._rows["copies"] > copy)
        return self._at(int(self._with_copy[copy][number]), copy)

    def _at(self, last: int, copy: int) -> Placed:
        first = last
        while first > 0 and self._rows[first - 1]["copies"] == 0:
            first -= 1
        rows = [self._rows[at] for at in range(first, last + 1)]
        copies = int(rows[-1]["copies"])
        extents = [(int(row["start"]), int(row["end"])) for row in rows]
        return Placed(extents, copy, copies, bool(rows[-1]["bits"] & IS_EDITED))


@dataclass(frozen=True, slots=True)
class Draw:
    """The samples of one output shard in order: numbers of source shards, and numbers of samples in them."""

    sources: Positions
    samples: Positions
    copies: Positions | None = None  # spread copies: which copy of each sample; ``samples`` then counts those with it

    @property
    def distinct(self) -> list[int]:
        found: list[int] = np.unique(self.sources).tolist()
        return found


class ShardLayout:
    """The samples of all sources in the order in which they are cut into shards.

    It is a list of runs, each of which is a source, or one copy of the samples of a source that have it.  Spread copies
    lie evenly over the whole: of n copies, the next one comes about an n-th of all samples later.

    Args:
        shards: The source shards.
        counts: How many samples of each were chosen, copies included.
        size, shuffle, seed: Samples of an output shard, those of one shuffled block, and the seed of the shuffling.
        spread: To spread the copies: for each source, how many samples have a first copy, a second one, and so on.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        counts: Iterable[int],
        size: int,
        shuffle: int,
        seed: int,
        spread: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.sources = list(shards)
        self._size, self._shuffle, self._seed = size, shuffle, seed
        self._runs: tuple[Positions, Positions] | None = None  # source and copy of each run
        if spread is not None:
            self._runs, counts = _spread(spread)
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
        return [
            Shard(f"{number:0{width}d}", self.sources[self._source_of(self._first(number))].path)
            for number in range(len(self))
        ]

    @property
    def mark(self) -> str:
        """A text that identifies the layout: it changes if the number of chosen samples of any shard changes."""
        digest = xxhash.xxh3_64(self._ends.tobytes())
        for shard in self.sources:
            digest.update(f"{shard.id}\n".encode())
        return f"{self.total} samples of {len(self.sources)} shards, {digest.hexdigest()}"

    def _source_of(self, run: int) -> int:
        return run if self._runs is None else int(self._runs[0][run])

    def _first(self, number: int) -> int:
        return int(np.searchsorted(self._ends, number * self._size, side="right"))

    def _draw(self, number: int) -> Draw:
        positions = np.arange(number * self._size, min(self.total, (number + 1) * self._size))
        if self._shuffle > 1:
            positions = self._shuffled(positions)
        sources = np.searchsorted(self._ends, positions, side="right")
        before = np.concatenate((np.zeros(1, np.int64), self._ends))[sources]
        if self._runs is not None:
            return Draw(self._runs[0][sources], positions - before, self._runs[1][sources])
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


def _spread(with_copy: Sequence[Sequence[int]]) -> tuple[tuple[Positions, Positions], list[int]]:
    """The runs of spread copies in order: (source and copy of each), and its number of samples.

    A step takes one run of each copy: of the first copy that of the step's source, and of every further copy that of a
    source which is so much further on that the copies of one sample are evenly spaced, around the end too.
    """
    sources, most = len(with_copy), max(map(len, with_copy), default=0)
    found = []
    for copy in range(most):
        shift = copy * sources // most
        found += [((n - shift) % sources, copy, n, c[copy]) for n, c in enumerate(with_copy) if copy < len(c)]
    found.sort()
    runs = np.array([(source, copy) for _, copy, source, _ in found], np.int64).reshape(-1, 2)
    return (runs[:, 0], runs[:, 1]), [count for *_, count in found]


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
