"""Reads and writes DataComp's subset files: a sorted array of the uids of samples.

The ``.npy`` file has dtype ``u8,u8``: the high and the low half of the 128 bits that the metadata's ``uid`` writes as
32 hexadecimal digits.  A uid that occurs twice is taken twice by DataComp's resharder.  A file may name a billion
samples, so it is memory-mapped and searched without loading it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from curation import PROGRAM
from curation.errors import SampleError, UsageError
from curation.libraries import np
from curation.storage.files import make_folder, storage_errors, whole_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

UID_DTYPE: Final = "u8,u8"


_CHUNK = 4 << 20  # uids compared at a time


_LOW_HALF = (1 << 64) - 1

Halves = tuple[int, int]


def uid_of(metadata: Mapping[str, Any]) -> Halves:
    """The two halves of a sample's uid.  Raises SampleError ``no_uid`` if its metadata has none."""
    uid = metadata.get("uid")
    if isinstance(uid, str) and 0 < len(uid) <= 32 and uid.isascii() and uid.isalnum():
        try:
            value = int(uid, 16)
        except ValueError:
            value = -1
        if value >= 0:
            return value >> 64, value & _LOW_HALF
    raise SampleError("no_uid", f"its uid is {str(uid)[:60]!r}, not 32 hexadecimal digits")


class Subset:
    """Tells how often each sample is taken."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError for a file that is not such an array.  ``check_order`` is called once per run."""
        self.path = path
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise UsageError(f"--subset: {path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, EOFError):  # numpy would advise allow_pickle
            raise UsageError(
                f"--subset: {path}: not an array that numpy.save wrote, or damaged; `{PROGRAM} select` writes one"
            ) from None
        if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype != np.dtype(UID_DTYPE):
            found = f"{getattr(array, 'dtype', type(array).__name__)}, {getattr(array, 'ndim', 0)}-dimensional"
            raise UsageError(
                f"--subset: {path}: a sorted one-dimensional array of dtype u8,u8 is wanted (high and low half of each "
                f"uid), this one is {found}"
            )
        if not len(array):
            raise UsageError(f"--subset: {path} names no sample")
        self._halves: NDArray[np.uint64] = array.view(np.ndarray).view(np.uint64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._halves)

    def check_order(self) -> None:
        """Raise UsageError unless the array is sorted.  Reads all of it, once and in order."""
        for begin in range(0, len(self) - 1, _CHUNK):
            part = self._halves[begin : begin + _CHUNK + 1]
            high, low = part[:, 0], part[:, 1]
            falls = (high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))
            if falls.any():
                at = begin + int(falls.argmax())
                raise UsageError(
                    f"--subset: {self.path} is not sorted: entry {at + 1:,} is smaller than the one before it; sort it "
                    "with numpy.sort"
                )

    def counts(self, uids: Sequence[Halves]) -> list[int]:
        """How often each uid occurs in the array, by one binary search for all of them."""
        if not uids:
            return [0] * len(uids)
        wanted = np.array(uids, np.uint64)
        found: list[int] = (self._search(wanted, after=True) - self._search(wanted, after=False)).tolist()
        return found

    def has(self, uids: Uids) -> NDArray[np.bool_]:
        """Which of the uids are in the array."""
        wanted = np.ascontiguousarray(uids).view(np.uint64).reshape(-1, 2)
        there: NDArray[np.bool_] = self._search(wanted, after=True) > self._search(wanted, after=False)
        return there

    def _search(self, wanted: NDArray[np.uint64], *, after: bool) -> NDArray[np.int64]:
        """The index of each one's first occurrence, or after its last.  numpy.searchsorted would copy the columns."""
        high, low = wanted[:, 0], wanted[:, 1]
        begin = np.zeros(len(wanted), np.int64)
        end = np.full(len(wanted), len(self), np.int64)
        for _ in range(len(self).bit_length()):
            middle = (begin + end) >> 1
            open_ = begin < end
            there = self._halves[np.minimum(middle, len(self) - 1)]
            less = (there[:, 0] < high) | (
                (there[:, 0] == high) & ((there[:, 1] <= low) if after else (there[:, 1] < low))
            )
            begin = np.where(open_ & less, middle + 1, begin)
            end = np.where(open_ & ~less, middle, end)
        return begin


_DIGITS = 32


_VALUES: Final = bytes(int(chr(byte), 16) if chr(byte) in "0123456789abcdefABCDEF" else 255 for byte in range(256))

Uids: TypeAlias = "NDArray[Any]"


def parse_uids(column: Any) -> tuple[Uids, NDArray[np.bool_]]:
    """The pairs of an Arrow string array, and which texts are invalid (null, or not 32 hexadecimal digits).

    The pair of an invalid text is (0, 0).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = column.cast(pa.binary())
    right = pc.fill_null(pc.equal(pc.binary_length(column), _DIGITS), False)
    text = pc.if_else(right, column, b"x" * _DIGITS).cast(pa.binary(_DIGITS))
    digits = np.frombuffer(text.buffers()[1], np.uint8)[text.offset * _DIGITS : (text.offset + len(text)) * _DIGITS]
    values = np.frombuffer(_VALUES, np.uint8)[digits.reshape(-1, _DIGITS)]
    bad: NDArray[np.bool_] = (values == 255).any(axis=1)
    values[bad] = 0
    octets = np.ascontiguousarray(values[:, 0::2] << 4 | values[:, 1::2])
    halves = octets.view(">u8").astype(np.uint64)
    return halves.reshape(-1).view(UID_DTYPE), bad


def sort_uids(uids: Uids) -> Uids:
    """Sort in the order of NumPy's own sort of such pairs, which takes ten times as long."""
    return uids[np.lexsort((uids["f1"], uids["f0"]))]


def write_subset(path: Path, blocks: Iterable[Uids]) -> int:
    """Write the sorted blocks one after the other as one ``.npy``, atomically; returns the number of uids."""
    count = 0
    make_folder(path.parent)
    with storage_errors(path), whole_file(path) as file:
        file.write(_header(0))
        for block in blocks:
            file.write(np.ascontiguousarray(block, UID_DTYPE).data)
            count += len(block)
        file.seek(0)
        file.write(_header(count))
    return count


def _header(count: int) -> bytes:
    """NumPy's header, padded so that its length does not depend on the count."""
    fields = f"{{'descr': [('f0', '<u8'), ('f1', '<u8')], 'fortran_order': False, 'shape': ({count},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"
