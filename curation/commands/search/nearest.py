"""Finds the rows of an index that are nearest to a query.

Faiss gives candidates; their cosines are computed again from the vectors as stage 06 wrote them, in double precision.
So the score of a hit does not depend on the kind of the index; only whether a sample is found at all does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.commands.search.stored import (
    FLAT,
    LISTS,
    SAMPLES,
    VECTORS,
    IndexRecord,
    StoredSamples,
    StoredVectors,
    read_lists,
)
from curation.commands.tables.similarity import import_faiss
from curation.errors import InfrastructureError

_LEAST_PROBES = 32  # lists that are looked into
_ROWS_PER_HIT = 4  # in those lists
_LEAST_CANDIDATES, _CANDIDATES_PER_HIT = 200, 10
_BLOCK_ROWS = 8192

Query = NDArray[np.float64]


def open_index(folder: Path) -> OpenIndex:
    """Opens an index, which another process may replace by a newer one meanwhile.

    Raises:
        UsageError: There is none.
        InfrastructureError: Its files are damaged.
    """
    build = IndexRecord.read(folder).build
    try:
        return OpenIndex(folder)
    except InfrastructureError:
        if IndexRecord.read(folder).build == build:
            raise
    return OpenIndex(folder)


class OpenIndex:
    """An index that can be searched.  Its files are mapped: opening it reads almost nothing."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError where there is no index, InfrastructureError where its files are damaged."""
        self.record = IndexRecord.read(folder)
        self._faiss = import_faiss("an index")
        build = folder / self.record.build
        self.vectors, self.samples = StoredVectors(build / VECTORS), StoredSamples(build / SAMPLES)
        is_exact = self.record.kind == "exact"
        path = build / (FLAT if is_exact else LISTS)
        try:
            if is_exact:
                self._index = self._faiss.read_index(str(path), self._faiss.IO_FLAG_MMAP_IFC)
            else:
                self._index = read_lists(path, self._faiss)
        except (RuntimeError, OSError) as error:
            line = str(error).rpartition(": ")[2]
            raise InfrastructureError(f"{path}: cannot be read: {line}; make the index again") from None
        there = (self._index.ntotal, len(self.vectors), self.vectors.width)
        if there != (self.record.rows, self.record.rows, self.record.width):
            raise InfrastructureError(f"{build}: its files do not belong together; make the index again")

    def use_threads(self, threads: int) -> None:
        """Let a search take this many threads; results do not depend on it."""
        self._faiss.omp_set_num_threads(threads)

    def nearest(
        self, query: Query, count: int, *, probes: int | None = None, without: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Returns the nearest rows, the nearest first, with their cosines; of equal ones the first row comes first.

        Args:
            query: ``width`` numbers.
            count: How many rows are wanted; there may be fewer.
            probes: How many lists of an ``ivfpq`` index are looked into; None: 32, and more for a large ``count``.
            without: A row that is left out.
        """
        length = np.sqrt(np.square(query).sum())
        unit = query / length
        if probes is None:
            probes = max(_LEAST_PROBES, -(-_ROWS_PER_HIT * count * self.record.lists // len(self.vectors)))
        wanted = min(len(self.vectors), max(_LEAST_CANDIDATES, count * _CANDIDATES_PER_HIT))
        rows = self._candidates(unit, wanted, probes)
        if without is not None:
            rows = rows[rows != without]
        parts = [rows[start : start + _BLOCK_ROWS] for start in range(0, len(rows), _BLOCK_ROWS)]
        scores = np.concatenate([np.empty(0), *((self.vectors.take(part) * unit).sum(axis=1) for part in parts)])
        order = np.lexsort((rows, -scores))[:count]
        return rows[order], scores[order]

    def _candidates(self, unit: Query, wanted: int, probes: int) -> NDArray[np.int64]:
        parameters: Any = None
        width = self._index.d  # of ivfpq: filled up to a multiple of what a code stands for
        given = np.zeros((1, width), np.float32)
        given[0, : len(unit)] = unit
        if self.record.kind != "exact":
            parameters = self._faiss.SearchParametersIVF(nprobe=min(probes, self.record.lists))
        _, found = self._index.search(given, wanted, params=parameters)
        rows: NDArray[np.int64] = found[0][found[0] >= 0]
        return rows
