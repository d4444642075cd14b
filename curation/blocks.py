"""A file read once, in order, in large blocks, into fixed memory.

Reading ahead is done by a thread into a second buffer, so that a shared filesystem's latency hides behind the work on
the block before.  No mmap: on GPFS and Lustre it faults page by page.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Self

from curation.errors import ShardError

READ_BYTES: Final = 4 << 20
MAX_KEPT_BYTES: Final = 4 << 20  # of what began in the block before; where that is more, it is read again if needed
_REREAD_BYTES = 1 << 20


class FileBlocks:
    """The window ``buffer`` holds the file's bytes up to ``end``; byte ``n`` of the file is ``buffer[n - shift]``.

    ``size`` is the file's; it is corrected when the file proves shorter.  Raises ShardError when it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
        self.size = os.fstat(self._descriptor).st_size
        self.end = 0
        capacity = MAX_KEPT_BYTES + min(READ_BYTES, self.size)
        self.buffer, self._spare = bytearray(capacity), bytearray(capacity)  # memory only once it is touched
        self._view, self._spare_view = memoryview(self.buffer), memoryview(self._spare)
        self.shift = -MAX_KEPT_BYTES
        self._begin = 0
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: Future[int] | None = None
        self._ahead_at = -1
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def advance(self, kept_from: int, wanted: int) -> None:
        """Read the next block; the bytes from ``kept_from`` to the window's end stay where there is room for them.

        wanted: where parsing goes on; the bytes from there always stay, and blocks wholly before it are skipped.
        """
        skips = wanted >= self.end + READ_BYTES
        start = wanted if skips else self.end
        keep = kept_from if self.end - kept_from <= MAX_KEPT_BYTES and not skips else min(wanted, self.end)
        kept = self._view[keep - self.shift : self.end - self.shift]
        count = self._fill_spare(start)
        self._spare_view[MAX_KEPT_BYTES - len(kept) : MAX_KEPT_BYTES] = kept
        self.buffer, self._spare = self._spare, self.buffer
        self._view, self._spare_view = self._spare_view, self._view
        self.shift = start - MAX_KEPT_BYTES
        self._begin = start - len(kept)
        self.end = start + count
        if self.end < min(self.size, start + READ_BYTES):
            self.size = self.end  # it became shorter
        if self.end < self.size:
            self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
            self._ahead_at, started = self.end, threading.Event()
            self._ahead = self._reader.submit(self._fill_ahead, self._ahead_at, started)
            started.wait()  # else it might wait for the interpreter until this thread waits for it

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes from ``start`` to ``end``: a view of the window, or, where they are not in it, read again in
        pieces of which each is valid until the next.  Zeros beyond the end of the file."""
        if self._begin <= start and end <= self.end:
            yield self._view[start - self.shift : end - self.shift]
            return
        scratch = memoryview(bytearray(min(end - start, _REREAD_BYTES)))
        while start < end:
            piece = scratch[: end - start]
            count = self._fill(piece, start)
            piece[count:] = bytes(len(piece) - count)
            yield piece
            start += len(piece)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=True)
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _fill_spare(self, start: int) -> int:
        ahead, self._ahead = self._ahead, None
        count = ahead.result() if ahead is not None else 0
        return (
            count
            if ahead is not None and self._ahead_at == start
            else self._fill(self._spare_view[MAX_KEPT_BYTES:], start)
        )

    def _fill_ahead(self, start: int, started: threading.Event) -> int:
        started.set()
        return self._fill(self._spare_view[MAX_KEPT_BYTES:], start)

    def _fill(self, view: memoryview, start: int) -> int:
        """Fill ``view`` from the file, as far as it goes: a shared filesystem may return less than it was asked for."""
        total = 0
        try:
            while total < len(view) and (count := os.preadv(self._descriptor, [view[total:]], start + total)):
                total += count
        except OSError as error:  # a folder, a bad disk, a file that another node removed
            raise ShardError(f"{self._path}: cannot be read at byte {start + total:,} ({error.strerror})") from error
        return total
