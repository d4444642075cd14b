"""A file read once, in order, in large blocks, into fixed memory.

No mmap: on GPFS and Lustre it faults page by page.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final, Self

from curation.errors import ShardError

READ_BYTES: Final = 2 << 20  # large enough for a shared filesystem, small enough for a processor's cache


MAX_KEPT_BYTES: Final = 4 << 20  # of what began in the block before; where that is more, it is read again if needed


_REREAD_BYTES = 1 << 20


class Block:
    """What is in memory of a file, the bytes from ``begin`` to ``end``: byte ``n`` is ``buffer[n - shift]``."""

    __slots__ = ("_file", "_view", "begin", "buffer", "end", "shift")

    def __init__(self, file: Blocks | None, buffer: bytearray, shift: int, begin: int, end: int) -> None:
        """file: what else of it is read from; None where all of it is in memory."""
        self._file = file
        self._view = memoryview(buffer)
        self.buffer, self.shift, self.begin, self.end = buffer, shift, begin, end

    def view(self, start: int, end: int) -> memoryview | None:
        """The bytes from ``start`` to ``end`` without a copy, None where they are not all in memory."""
        inside = self.begin <= start and end <= self.end
        return self._view[start - self.shift : end - self.shift] if inside else None

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes from ``start`` to ``end``, zeros beyond the end of the file: a view, or, where they are not in
        memory, read again in pieces of which each is valid until the next.  Raises ShardError."""
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
    """One pass over a file, wherever it lies.  Two buffers take turns: a block stays as it is while the next is read.

    ``size`` is the file's; it is corrected when the file proves shorter.  Raises ShardError when it cannot be read.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        capacity = MAX_KEPT_BYTES + min(READ_BYTES, size)
        self._buffers = bytearray(capacity), bytearray(capacity)  # memory only where it is filled
        self._turn = 0
        self.block = Block(self, self._buffers[0], -MAX_KEPT_BYTES, 0, 0)

    def advance(self, kept_from: int, wanted: int) -> Block:
        """Read the next block.

        Args:
            kept_from: The bytes from here to the end of the last block stay in memory where there is room for them.
            wanted: Where parsing goes on.  The bytes from there always stay.  What lies wholly before it is skipped,
                and where it lies before the last block, the file is read again from there.
        """
        last = self.block
        skips = wanted >= last.end + READ_BYTES or wanted < last.begin
        start = wanted if skips else last.end
        keep = kept_from if last.end - kept_from <= MAX_KEPT_BYTES and not skips else min(wanted, last.end)
        kept = last.view(keep, last.end) or b""
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        count = self.fill(memoryview(buffer)[MAX_KEPT_BYTES:], start)
        buffer[MAX_KEPT_BYTES - len(kept) : MAX_KEPT_BYTES] = kept
        end = start + count
        if end < min(self.size, start + READ_BYTES):
            self.size = end  # it became shorter
        self.block = Block(self, buffer, start - MAX_KEPT_BYTES, start - len(kept), end)
        return self.block

    def fill(self, view: memoryview, start: int) -> int:
        """Fill ``view`` from the file, as far as it goes.  Two threads may ask at once."""
        raise NotImplementedError

    def cancel(self) -> None:
        """A ``fill`` that waits for bytes is not to wait any longer: they are not wanted any more."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
        del self.block  # it knows this file: else both, with their megabytes, wait for the collector of cycles


class FileBlocks(Blocks):
    """Of a file on a filesystem."""

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
        """Fill ``view`` from the file, as far as it goes: a shared filesystem may return less than it was asked for."""
        total = 0
        try:
            while total < len(view) and (count := os.preadv(self._descriptor, [view[total:]], start + total)):
                total += count
        except OSError as error:  # a folder, a bad disk, a file that another node removed
            raise ShardError(f"{self._path}: cannot be read at byte {start + total:,} ({error.strerror})") from error
        return total

    def close(self) -> None:
        os.close(self._descriptor)
