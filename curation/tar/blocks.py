"""Reads a file once, in order, in large blocks, into memory of fixed size.

It does not use mmap, which reads page by page on GPFS and Lustre.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final, Self

from curation.errors import ShardError

READ_BYTES: Final = 2 << 20  # large enough for a shared filesystem, small enough for a core's own cache
MAX_KEPT_BYTES: Final = 4 << 20  # kept from the previous block; a larger part is read again if needed
_USUALLY_KEPT_BYTES: Final = 256 << 10  # a sample that is cut by the end of a block; there may be more room


_REREAD_BYTES = 1 << 20


class Block:
    """The part of a file that is in memory, from byte ``begin`` to ``end``: byte ``n`` is ``buffer[n - shift]``."""

    __slots__ = ("_file", "_view", "begin", "buffer", "end", "shift")

    def __init__(self, file: Blocks | None, buffer: bytearray, shift: int, begin: int, end: int) -> None:
        """file: the source of other bytes of the file; None if all of it is in memory."""
        self._file = file
        self._view = memoryview(buffer)
        self.buffer, self.shift, self.begin, self.end = buffer, shift, begin, end

    def view(self, start: int, end: int) -> memoryview | None:
        """The bytes from ``start`` to ``end`` without a copy; None if they are not all in memory."""
        inside = self.begin <= start and end <= self.end
        return self._view[start - self.shift : end - self.shift] if inside else None

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """Yield the bytes from ``start`` to ``end``, with zeros beyond the end of the file: one view, or, if they are
        not in memory, pieces that are read again and valid until the next one.  Raises ShardError."""
        if (view := self.view(start, end)) is not None:
            yield view
            return
        if self._file is None:
            raise ShardError(f"bytes {start:,} to {end:,} are not in memory; this is a bug")
        scratch = memoryview(bytearray(min(end - start, _REREAD_BYTES)))
        while start < end:
            piece = scratch[: end - start]
            count = self._file.fill(piece, start)
            piece[count:] = bytes(len(piece) - count)
            yield piece
            start += len(piece)

    def read(self, start: int, size: int) -> bytes:
        """A copy of ``size`` bytes at ``start``."""
        view = self.view(start, start + size)
        return bytes(view) if view is not None else b"".join(map(bytes, self.pieces(start, start + size)))


class Blocks:
    """One pass over a local or remote file.

    Attributes:
        size: The file's; it is corrected if the file is shorter.
        ahead: Whether a block stays valid while the next one is read, so that there are two buffers.  One buffer alone
            stays in a core's own cache.

    Raises ShardError if the file cannot be read.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.ahead = True
        self._read_bytes = min(READ_BYTES, size)
        self._room = min(_USUALLY_KEPT_BYTES, MAX_KEPT_BYTES)  # for what is kept, at the start of each buffer
        self._buffers = [bytearray(), bytearray()]
        self._turn = 0
        self.block = Block(self, self._buffers[0], 0, 0, 0)

    def advance(self, kept_from: int, wanted: int) -> Block:
        """Read the next block.

        Args:
            kept_from: The bytes from here to the end of the last block stay in memory if there is room for them.
            wanted: Where parsing continues.  The bytes from there always stay; bytes before it may be skipped.  If it
                is before the last block, the file is read again from there.
        """
        last = self.block
        skips = wanted >= last.end + READ_BYTES or wanted < last.begin  # a block or more of a large member
        start = wanted if skips else last.end
        keep = kept_from if last.end - kept_from <= MAX_KEPT_BYTES and not skips else min(wanted, last.end)
        kept = last.view(keep, last.end) or memoryview(b"")
        if self.ahead:
            self._turn = 1 - self._turn
        if len(kept) > self._room:
            self._make_room(len(kept))
        room, buffer = self._room, self._buffers[self._turn]
        if len(buffer) < room + self._read_bytes:
            buffer = self._buffers[self._turn] = bytearray(room + self._read_bytes)
        view = memoryview(buffer)
        view[room - len(kept) : room] = kept  # may be of the same buffer
        count = self.fill(view[room : room + self._read_bytes], start)
        if not count and last.end < start < self.size:  # it became shorter: where, only reading on tells
            start = last.end
            count = self.fill(view[room : room + self._read_bytes], start)
        end = start + count
        if end < min(self.size, start + self._read_bytes):
            self.size = end  # it became shorter
        self.block = Block(self, buffer, start - room, start - len(kept), end)
        return self.block

    def _make_room(self, size: int) -> None:
        """Make room for larger samples."""
        while self._room < size:
            self._room *= 2

    def fill(self, view: memoryview, start: int) -> int:
        """Fill ``view`` from the file, up to the file's end.  Two threads may call it at once."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Make a waiting ``fill`` stop, because its bytes are not needed any more."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
        del self.block  # it refers to this object: break the cycle to free megabytes at once


class FileBlocks(Blocks):
    """The blocks of a file on a filesystem."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
        super().__init__(os.fstat(self._descriptor).st_size)
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def fill(self, view: memoryview, start: int) -> int:
        """Fill ``view`` up to the file's end, with several reads if a shared filesystem returns too few bytes."""
        total = 0
        try:
            while total < len(view) and (count := os.preadv(self._descriptor, [view[total:]], start + total)):
                total += count
        except OSError as error:  # a folder, a bad disk, or a file that another node removed
            raise ShardError(f"{self._path}: cannot be read at byte {start + total:,} ({error.strerror})") from error
        return total

    def close(self) -> None:
        os.close(self._descriptor)
