"""What is wrong when a folder or a file cannot be written, in words that tell the user what to mend."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from curation.errors import InfrastructureError

_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the filesystem is read-only",
}


def storage_error(path: Path, error: OSError) -> InfrastructureError:
    """What to tell the user when a folder or file cannot be written."""
    what = _CAUSES.get(error.errno or 0) or error.strerror or str(error)
    if error.errno == errno.ENOSPC and _inodes_are_used_up(path):
        what = "no inodes are left (too many files and folders)"
    return InfrastructureError(f"{path}: cannot be written: {what}; mend it and start again, nothing published is lost")


def _inodes_are_used_up(path: Path) -> bool:
    """Where a filesystem with bytes to spare has no room for one more file."""
    try:
        return (found := os.statvfs(path.parent)).f_files > 0 and found.f_favail == 0
    except OSError:
        return False


def is_storage_trouble(error: OSError) -> bool:
    """Whether the filesystem refuses everybody, so that the next shard would fare no better."""
    return error.errno in _CAUSES
