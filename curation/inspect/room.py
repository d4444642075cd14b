"""How much room is left where a dataset is written: bytes and inodes, of the filesystem and of the user's quota."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PATIENCE_S = 10.0
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Room:
    """What may still be written.  None: no limit, or none that can be read."""

    what: str
    bytes_left: int | None
    files_left: int | None


def rooms(folder: Path) -> list[Room]:
    """The filesystem's own room, then the quotas that ``lfs`` and ``quota`` tell of, where they are installed."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    found = []
    try:
        system = os.statvfs(there)
    except OSError:
        return []
    files_left = system.f_favail if system.f_files else None  # filesystems that make inodes as they go say 0
    found.append(Room("the filesystem", system.f_bavail * system.f_frsize, files_left))
    if (text := _answer("lfs", "quota", "-q", "-u", str(os.getuid()), str(there))) is not None:
        found += read_lustre(text, "your quota on Lustre")
    if (text := _answer("lfs", "quota", "-q", "-g", str(os.getgid()), str(there))) is not None:
        found += read_lustre(text, "your group's quota on Lustre")
    if (text := _answer("quota", "-w", "-p", "-f", str(_mount_of(there)))) is not None:
        found += read_quota(text)
    return found


def read_lustre(text: str, what: str) -> Iterator[Room]:
    """``lfs quota -q``: path, kilobytes, soft and hard limit, grace, files, soft and hard limit, grace; a number that
    is over its limit has a star, and 0 is no limit."""
    words = text.split()
    if len(words) < 8:
        return
    numbers = [int(word.rstrip("*")) if re.fullmatch(r"\d+\*?", word) else None for word in words]
    used, limit, files, files_limit = numbers[1], numbers[3], numbers[5], numbers[7]
    yield Room(what, _left(used, limit, _KIB), _left(files, files_limit, 1))


def read_quota(text: str) -> Iterator[Room]:
    """``quota -w -p``: two heading lines, then filesystem, KiB, soft and hard limit, grace, files, and theirs."""
    for line in text.splitlines():
        words = line.split()
        if len(words) < 9 or not re.fullmatch(r"\d+\*?", words[1]):
            continue
        numbers = [int(word.rstrip("*")) if re.fullmatch(r"\d+\*?", word) else None for word in words]
        yield Room("your quota", _left(numbers[1], numbers[3], _KIB), _left(numbers[5], numbers[7], 1))


def _left(used: int | None, limit: int | None, unit: int) -> int | None:
    return None if used is None or not limit else max(0, limit - used) * unit


def _answer(*command: str) -> str | None:
    """Of a program that may not be there, or may not know this filesystem."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout or None


def _mount_of(folder: Path) -> Path:
    real = folder.resolve()
    return next((parent for parent in (real, *real.parents) if parent.is_mount()), real)
