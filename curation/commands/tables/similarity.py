"""Finds vectors that are close to each other: pairs by cosine, exactly or through cells, and the groups of them.

Rows lie in a scratch file and are compared in tiles, so that memory does not grow with their number but for a few
bytes a row.  A pair whose cosine in single precision is too near to the threshold to tell is decided in double
precision, so that groups depend neither on thread counts nor on the order of tiles.

Features of a stage's npz files, read in blocks: one row a sample, NaN where a sample has none.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from curation.commands.tables.missing import other_name, what_is_missing
from curation.errors import InfrastructureError, UsageError, install

BLOCK_ROWS = 2048
MAX_WIDTH = 1 << 16
MAX_COLUMNS_BYTES = 4 << 30  # of an array that is stored column by column
_HEADER_BYTES = 4096
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError)
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Rows = NDArray[np.float32]


def feature_blocks(path: Path, name: str, rows: int = BLOCK_ROWS) -> Iterator[Rows]:
    """The feature ``name`` of an npz as float32, ``rows`` samples at a time, whatever the size of the file.  It may
    have stage 06's own name or DataComp's, in ``name`` and in the file.

    Raises UsageError where the file has no such feature, InfrastructureError where it is damaged.
    """
    with _opened(path, name) as file:
        yield from _blocks(file, f"{path}: {name}", rows)


def feature_dtype(path: Path, name: str) -> tuple[np.dtype[Any], int]:
    """Of the feature ``name`` of an npz: in which type its numbers are stored, and how many a row has.

    Raises as ``feature_blocks``.
    """
    shape, dtype = _header_of(path, name)
    return dtype, int(shape[1])


def feature_shape(path: Path, name: str) -> tuple[int, int]:
    """Of the feature ``name`` of an npz: how many rows it has, and how many numbers a row has.

    Raises as ``feature_blocks``.
    """
    shape, _ = _header_of(path, name)
    return int(shape[0]), int(shape[1])


def _header_of(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and the type of a feature.  Raises as ``feature_blocks``."""
    with _opened(path, name) as file:
        shape, _, dtype = _array_header(file, f"{path}: {name}")
    return shape, dtype


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The array of a feature in an npz.  Raises as ``feature_blocks``, in the block too."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_member(archive, path, name)) as file:
            yield file
    except _DAMAGED as error:
        raise InfrastructureError(f"{path}: cannot be read: {error}; run the stage again for this shard") from None


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> str:
    names = [entry.removesuffix(".npy") for entry in archive.namelist()]
    found = next((one for one in (name, other_name(name)) if one in names), None)
    if found is None:
        raise UsageError(f"{path}: {what_is_missing('feature', [name], names)}")
    return f"{found}.npy"


def array_blocks(path: Path, rows: int = BLOCK_ROWS) -> Iterator[Rows]:
    """Yields the rows of a ``.npy`` of embeddings as float32."""
    try:
        with open(path, "rb") as file:
            yield from _blocks(file, str(path), rows)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no NumPy file of embeddings: {error}") from None


def _blocks(file: Any, what: str, rows: int) -> Iterator[Rows]:
    shape, fortran, dtype = _array_header(file, what)
    if fortran:
        yield from _blocks_of_columns(file, what, rows, shape, dtype)
        return
    left = shape[0]
    while left:
        count = min(rows, left)
        data = _read_fully(file, count * shape[1] * dtype.itemsize)
        yield np.frombuffer(data, dtype).reshape(count, shape[1]).astype(np.float32)
        left -= count


def _array_header(file: Any, what: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is stored column by column, and type."""
    reader = _READERS.get(np.lib.format.read_magic(file))
    if reader is None:
        raise ValueError(f"{what} has an unknown NumPy format")
    shape, fortran, dtype = reader(file, max_header_size=_HEADER_BYTES)
    if len(shape) != 2 or dtype.kind != "f" or not 0 < shape[1] <= MAX_WIDTH:
        raise ValueError(f"{what} is no table of numbers, one row a sample (shape {shape}, {dtype})")
    return shape, fortran, dtype


def _blocks_of_columns(file: Any, what: str, rows: int, shape: tuple[int, ...], dtype: Any) -> Iterator[Rows]:
    """Of an array stored column by column (a pandas frame's values, a transposed tensor), which is read as a whole."""
    size = shape[0] * shape[1] * dtype.itemsize
    if size > MAX_COLUMNS_BYTES:
        raise ValueError(
            f"{what} is stored column by column, and with {size:,} bytes it is too large to be turned in memory; save "
            "numpy.ascontiguousarray of it"
        )
    whole = np.frombuffer(_read_fully(file, size), dtype).reshape(shape, order="F")
    for start in range(0, shape[0], rows):
        yield np.ascontiguousarray(whole[start : start + rows], np.float32)


def _read_fully(file: Any, size: int) -> bytes:
    pieces = []
    while size:
        piece = file.read(size)
        if not piece:
            raise EOFError("it ends early")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def normalise(rows: Rows) -> tuple[Rows, NDArray[np.bool_]]:
    """Returns the rows scaled to length 1, and which of them have a length; the others (NaN, zeros) become zeros."""
    with np.errstate(all="ignore"):
        lengths = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
        valid = np.isfinite(lengths) & (lengths > 0)
        normal = np.where(valid[:, None], rows / np.where(valid, lengths, 1)[:, None], 0)
    return normal.astype(np.float32), valid


class Vectors:
    """Rows of one width in a scratch file: they are appended, and then read by range or by number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.width = 0
        self._count = 0
        self._file = open(path, "w+b")  # noqa: SIM115 - closed by `close`

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Rows) -> None:
        if self.width not in (0, rows.shape[1]):
            raise InfrastructureError(f"features of {self.width} and of {rows.shape[1]} numbers cannot be compared")
        self.width = rows.shape[1]
        self._count += len(rows)
        self._file.write(np.ascontiguousarray(rows, np.float32).data)

    def read(self, start: int, stop: int) -> Rows:
        self._file.flush()
        stop = min(stop, self._count)
        size = 4 * self.width
        data = os.pread(self._file.fileno(), (stop - start) * size, start * size)
        return np.frombuffer(data, np.float32).reshape(stop - start, self.width)

    def take(self, places: NDArray[np.int64]) -> Rows:
        """Returns the rows at ``places``.  The mapping ends with the call, so that its pages do not stay in memory."""
        self._file.flush()
        if not len(places):
            return np.empty((0, self.width), np.float32)
        mapped = np.memmap(self.path, np.float32, "r", shape=(self._count, self.width))
        return np.array(mapped[places])

    def mapped(self) -> Rows:
        """Returns all rows; the system reads them when they are looked at, and may forget them again."""
        self._file.flush()
        return np.memmap(self.path, np.float32, "r", shape=(self._count, self.width))

    def close(self) -> None:
        self._file.close()


TILE_ROWS = 2048
EXACT_ROWS = 200_000  # up to here every pair is compared unless asked otherwise
TOLERANCE = 1e-6  # of a cosine: identical vectors have one of 1 within this
_SLACK = 1e-5  # more than single precision errs by, in a dot product of unit vectors
_SEED = 7
_SAMPLES_PER_CELL, _ITERATIONS = 40, 10
_PROBES = 8

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


class Groups:
    """Connected components of rows that pairs connect; the smallest row of a component stands for it."""

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count, dtype=np.int64)

    def connect(self, pairs: Pairs) -> None:
        first, second = pairs
        while len(first):
            first, second = self._roots(first), self._roots(second)
            apart = first != second
            first, second = first[apart], second[apart]
            low, high = np.minimum(first, second), np.maximum(first, second)
            np.minimum.at(self._parents, high, low)

    def _roots(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        start = rows
        while True:
            above = self._parents[rows]
            if np.array_equal(above, rows):
                self._parents[start] = np.minimum(self._parents[start], rows)
                return rows
            rows = above

    def roots(self) -> NDArray[np.int64]:
        """Returns for every row the smallest row of its group."""
        while True:
            above = self._parents[self._parents]
            if np.array_equal(above, self._parents):
                return above
            self._parents = above


def exact_pairs(vectors: Vectors, threshold: float) -> Iterator[Pairs]:
    """Yields all pairs of rows with a cosine of at least ``threshold``, a tile at a time."""
    for start in range(0, len(vectors), TILE_ROWS):
        rows = vectors.read(start, start + TILE_ROWS)
        yield _close(rows, rows, threshold, start, start, same=True)
        for other in range(start + TILE_ROWS, len(vectors), TILE_ROWS):
            yield _close(rows, vectors.read(other, other + TILE_ROWS), threshold, start, other)


def cell_pairs(vectors: Vectors, threshold: float, scratch: Path, probes: int = _PROBES) -> Iterator[Pairs]:
    """Pairs of rows with a cosine of at least ``threshold``, of which one lies in one of the other's ``probes`` cells
    that are nearest to it.  Most of all pairs, in a time that grows with the number of rows to the power of 1.5.

    The cells are k-means centroids of a sample, found with a fixed seed on one thread.
    """
    faiss = import_faiss("--index cells")
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # sums in the same order everywhere
    try:
        nearest, cells = _assign(vectors, probes, faiss)
    finally:
        faiss.omp_set_num_threads(threads)
    order = np.argsort(nearest[:, 0], kind="stable")
    sorted_rows = Vectors(scratch / "cells.f32")
    try:
        for start in range(0, len(order), TILE_ROWS):
            sorted_rows.append(vectors.take(order[start : start + TILE_ROWS]))
        starts = np.searchsorted(nearest[order, 0], np.arange(cells + 1))
        for rank in range(nearest.shape[1]):
            visits = order if rank == 0 else np.argsort(nearest[:, rank], kind="stable")
            begins = np.searchsorted(nearest[visits, rank], np.arange(cells + 1))
            for cell in range(cells):
                visitors = visits[begins[cell] : begins[cell + 1]]
                yield from _within(vectors, sorted_rows, visitors, order, starts[cell : cell + 2], threshold)
    finally:
        sorted_rows.close()


def _within(
    vectors: Vectors,
    sorted_rows: Vectors,
    visitors: NDArray[np.int64],
    order: NDArray[np.int64],
    span: NDArray[np.int64],
    threshold: float,
) -> Iterator[Pairs]:
    """Pairs of visitors of a cell with its own rows, which lie in ``span`` of ``sorted_rows``."""
    for start in range(0, len(visitors), TILE_ROWS):
        numbers = visitors[start : start + TILE_ROWS]
        rows = vectors.take(numbers)
        for other in range(int(span[0]), int(span[1]), TILE_ROWS):
            stop = min(other + TILE_ROWS, int(span[1]))
            first, second = _close(rows, sorted_rows.read(other, stop), threshold, 0, 0)
            first, second = numbers[first], order[other:stop][second]
            apart = first != second
            yield first[apart], second[apart]


def _assign(vectors: Vectors, probes: int, faiss: Any) -> tuple[NDArray[np.int32], int]:
    """Returns the nearest cells of each row, the nearest first, and how many cells there are."""
    count = len(vectors)
    cells = max(1, min(int(2 * count**0.5), count // _SAMPLES_PER_CELL))
    sample = np.random.default_rng(_SEED).permutation(count)[: cells * _SAMPLES_PER_CELL]
    means = faiss.Kmeans(vectors.width, cells, niter=_ITERATIONS, spherical=True, seed=_SEED, verbose=False)
    means.train(_sampled(vectors, np.sort(sample)))
    index = faiss.IndexFlatIP(vectors.width)
    index.add(means.centroids)
    nearest = np.empty((count, min(probes, cells)), np.int32)
    for start in range(0, count, TILE_ROWS):
        _, found = index.search(vectors.read(start, start + TILE_ROWS), nearest.shape[1])
        nearest[start : start + len(found)] = found
    return nearest, cells


def _sampled(vectors: Vectors, places: NDArray[np.int64]) -> Rows:
    """Returns the rows at the sorted ``places``, read in order: at once they would bring the whole file into memory."""
    starts = range(0, len(vectors), TILE_ROWS)
    parts = np.split(places, np.searchsorted(places, np.array(starts[1:], np.int64)))
    read = [vectors.read(start, start + TILE_ROWS)[part - start] for start, part in zip(starts, parts, strict=True)]
    return np.concatenate(read)


def _close(rows: Rows, others: Rows, threshold: float, start: int, other: int, *, same: bool = False) -> Pairs:
    """The pairs of a tile, numbered from ``start`` and ``other`` on.  same: each pair once, no row with itself."""
    threshold -= TOLERANCE
    cosines = rows @ others.T
    near = cosines >= threshold - _SLACK
    if same:
        near = np.triu(near, 1)
    first, second = np.nonzero(near)
    unsure = np.flatnonzero(cosines[first, second] < threshold + _SLACK)
    if len(unsure):
        kept = np.ones(len(first), bool)
        kept[unsure] = cosine_pairs(rows[first[unsure]], others[second[unsure]]) >= threshold
        first, second = first[kept], second[kept]
    return first.astype(np.int64) + start, second.astype(np.int64) + other


def cosine_pairs(rows: Rows, others: Rows) -> NDArray[np.float64]:
    """Returns the cosine of each row with the other's row at the same place, in double precision."""
    cosines: NDArray[np.float64] = (rows.astype(np.float64) * others).sum(axis=1)
    return cosines


def nearest_of(rows: Rows, others: Vectors) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns for each row the greatest cosine with any of ``others``, and the first row that has it."""
    best = np.full(len(rows), -np.inf, np.float32)
    places = np.full(len(rows), -1, np.int64)
    for start in range(0, len(others), TILE_ROWS):
        cosines = rows @ others.read(start, start + TILE_ROWS).T
        found = cosines.argmax(axis=1)
        values = cosines[np.arange(len(rows)), found]
        better = values > best
        best[better], places[better] = values[better], found[better] + start
    return best, places


def import_faiss(what: str) -> Any:
    """Returns the module.  what: needs it, for the InfrastructureError that is raised where it is not installed."""
    try:
        import faiss
    except ImportError:
        instead = ", or --index exact" if what == "--index cells" else ""
        raise InfrastructureError(f"{what} needs the package faiss: {install('faiss')}{instead}") from None
    return faiss
