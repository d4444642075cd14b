"""Folders made durable through descriptors that stay open, so that a shard's commit does not look them up again."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from pathlib import Path

_KEPT = 32  # descriptors: the buckets and output folders that a process publishes into by turns
_NO_FSYNC = (errno.EINVAL, errno.EBADF)  # a filesystem that has no fsync of folders


class _Open:
    """A descriptor that is closed with its last user: one thread may drop it while another is in its fsync."""

    def __init__(self, folder: Path) -> None:
        self.descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.descriptor)


_open: OrderedDict[Path, _Open] = OrderedDict()
_lock = threading.Lock()


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable.  Raises OSError."""
    with _lock:
        kept = _open.get(folder)
    try:
        if kept is not None:
            _fsync(kept)
    except OSError as error:
        if error.errno != errno.ESTALE:  # over NFS: it was replaced by another of its name
            raise
        kept = None
    if kept is None:
        try:
            kept = _Open(folder)
        except FileNotFoundError:
            return  # somebody removed it with all that was in it: readers will see that the outputs are not there
        _fsync(kept)
    with _lock:
        _open[folder] = kept
        _open.move_to_end(folder)
        if len(_open) > _KEPT:
            _open.popitem(last=False)


def forget_folder(folder: Path) -> None:
    """``folder`` was not there and is made anew: a descriptor of the one that was there before is of no use."""
    with _lock:
        _open.pop(folder, None)


def _fsync(kept: _Open) -> None:
    try:
        os.fsync(kept.descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
