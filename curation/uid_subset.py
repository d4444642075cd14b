"""DataComp's subset files: the uids of samples as a sorted NumPy array of pairs of uint64.

A uid of 32 hexadecimal digits is the pair of its halves (``np.dtype("u8,u8")``).  A uid that stands there twice is
taken twice by DataComp's resharder.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from curation.storage.files import fsync_folder, make_folder, storage_error, temporary_name

UID_DTYPE = np.dtype("u8,u8")
_DIGITS = 32
_VALUES = np.full(256, 255, np.uint8)
for _digit in b"0123456789abcdefABCDEF":
    _VALUES[_digit] = int(chr(_digit), 16)

Uids = NDArray[Any]


def parse_uids(column: Any) -> tuple[Uids, NDArray[np.bool_]]:
    """The pairs of an Arrow string array, and which of them are none (null, or not 32 hexadecimal digits).

    An invalid one's pair is (0, 0).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = column.cast(pa.binary())
    right = pc.fill_null(pc.equal(pc.binary_length(column), _DIGITS), False)
    text = pc.if_else(right, column, b"x" * _DIGITS).cast(pa.binary(_DIGITS))
    digits = np.frombuffer(text.buffers()[1], np.uint8)[text.offset * _DIGITS : (text.offset + len(text)) * _DIGITS]
    values = _VALUES[digits.reshape(-1, _DIGITS)]
    bad: NDArray[np.bool_] = (values == 255).any(axis=1)
    values[bad] = 0
    octets = np.ascontiguousarray(values[:, 0::2] << 4 | values[:, 1::2])
    halves = octets.view(">u8").astype(np.uint64)
    return halves.reshape(-1).view(UID_DTYPE), bad


def sort_uids(uids: Uids) -> Uids:
    """In the order of NumPy's own sort of such pairs, which takes ten times as long."""
    return uids[np.lexsort((uids["f1"], uids["f0"]))]


def write_subset(path: Path, blocks: Iterable[Uids]) -> int:
    """The sorted blocks, one behind the other, as one ``.npy`` that appears whole; returns how many uids it has."""
    count = 0
    with whole_file(path) as file:
        file.write(_header(0))
        for block in blocks:
            file.write(np.ascontiguousarray(block, UID_DTYPE).data)
            count += len(block)
        file.seek(0)
        file.write(_header(count))
    return count


def _header(count: int) -> bytes:
    """NumPy's own, padded so that every count has as many bytes."""
    fields = f"{{'descr': [('f0', '<u8'), ('f1', '<u8')], 'fortran_order': False, 'shape': ({count},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name when the block ends without an exception, durable; else nothing is left."""
    temporary = path.with_name(temporary_name(path.name, secrets.token_hex(8)))
    make_folder(path.parent)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
