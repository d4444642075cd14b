"""Features of a stage's npz files, read in blocks: one row a sample, NaN where a sample has none."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.errors import InfrastructureError, UsageError
from curation.jsonio import clean_text

BLOCK_ROWS = 2048
MAX_WIDTH = 1 << 16
_HEADER_BYTES = 4096
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

Rows = NDArray[np.float32]


def feature_blocks(path: Path, name: str, rows: int = BLOCK_ROWS) -> Iterator[Rows]:
    """The feature ``name`` of an npz as float32, ``rows`` samples at a time, whatever the size of the file.

    Raises UsageError where the file has no such feature, InfrastructureError where it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry.removesuffix(".npy") for entry in archive.namelist()]
            if name not in names:
                known = ", ".join(clean_text(known) for known in names[:20])
                raise UsageError(f"{path}: has no feature {name!r}; there are: {known or 'none'}")
            with archive.open(f"{name}.npy") as file:
                yield from _blocks(file, f"{path}: {name}", rows)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise InfrastructureError(f"{path}: cannot be read: {error}; run the stage again for this shard") from None


def array_blocks(path: Path, rows: int = BLOCK_ROWS) -> Iterator[Rows]:
    """The rows of a ``.npy`` of embeddings as float32."""
    try:
        with open(path, "rb") as file:
            yield from _blocks(file, str(path), rows)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no NumPy file of embeddings: {error}") from None


def _blocks(file: Any, what: str, rows: int) -> Iterator[Rows]:
    reader = _READERS.get(np.lib.format.read_magic(file))
    if reader is None:
        raise ValueError(f"{what} has an unknown NumPy format")
    shape, fortran, dtype = reader(file, max_header_size=_HEADER_BYTES)
    if len(shape) != 2 or fortran or dtype.kind != "f" or not 0 < shape[1] <= MAX_WIDTH:
        raise ValueError(f"{what} is no table of numbers, one row a sample (shape {shape}, {dtype})")
    left = shape[0]
    while left:
        count = min(rows, left)
        data = _read_fully(file, count * shape[1] * dtype.itemsize)
        yield np.frombuffer(data, dtype).reshape(count, shape[1]).astype(np.float32)
        left -= count


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
    """The rows with length 1, and which of them have one (not NaN, infinite or all zeros); the others are zeros."""
    with np.errstate(all="ignore"):
        lengths = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
        valid = np.isfinite(lengths) & (lengths > 0)
        normal = np.where(valid[:, None], rows / np.where(valid, lengths, 1)[:, None], 0)
    return normal.astype(np.float32), valid


class Vectors:
    """Rows of one width in a scratch file: appended, then read by range or by number."""

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
        """The rows at ``places``.  The mapping ends with the call, so that its pages are nobody's memory."""
        self._file.flush()
        if not len(places):
            return np.empty((0, self.width), np.float32)
        mapped = np.memmap(self.path, np.float32, "r", shape=(self._count, self.width))
        return np.array(mapped[places])

    def close(self) -> None:
        self._file.close()
