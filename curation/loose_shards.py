"""A shard of loose files, as img2dataset's ``files`` layout leaves it: a folder read as if it were a tar of its files.

Samples come in the order of their keys.  The table ``<folder>.parquet`` beside it fills in a json that is missing.
"""

from __future__ import annotations

import bisect
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from curation.errors import InfrastructureError, ShardError
from curation.tar_headers import RECORD, ZERO_BLOCK, make_header, padded, padding, split_name

MAX_FILES: Final = 10_000_000
_JSON = "json"


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size: int
    mtime: int

    def header(self) -> bytes:
        return make_header(os.fsencode(self.name), self.size, self.mtime)


class LooseStream:
    """The tar that a folder would make, made while it is read: each file is looked at once.

    A file costs an open, a look and a read; nothing is written.  ``size`` is None until the end was read.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.size: int | None = None
        self._names = _sorted_names(folder)
        self._rows = _Rows(folder)
        self._next = 0  # of the names
        self._starts: list[int] = []  # where each part begins
        self._parts: list[_File | bytes] = []
        self._end = 0
        self._open: tuple[str, int] | None = None  # name and descriptor

    def read_at(self, view: memoryview, start: int) -> int:
        total = 0
        while total < len(view):
            if start + total < self._end:
                total += self._copy(view[total:], start + total)
            elif self.size is None:
                self._extend()
            else:
                break
        return total

    def let_go(self) -> None:
        pass

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    # ---- what the tar is made of

    def _extend(self) -> None:
        """One file further, or the end."""
        if self._next == len(self._names):
            end = 2 * len(ZERO_BLOCK)
            self._add(bytes(end + -(self._end + end) % RECORD))
            self.size = self._end
            return
        name = self._names[self._next]
        self._next += 1
        descriptor = self._descriptor(name)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return
        self._add(_File(name, found.st_size, int(found.st_mtime)))
        key = _key(name)
        following = self._names[self._next] if self._next < len(self._names) else ""
        if _key(following) != key and key and f"{key}.{_JSON}" not in self._nearby(key):
            self._fill_in(key, int(found.st_mtime))

    def _nearby(self, key: str) -> set[str]:
        """The names of the sample that ends before the next one."""
        at = self._next - 1
        names = set()
        while at >= 0 and _key(self._names[at]) == key:
            names.add(self._names[at])
            at -= 1
        return names

    def _fill_in(self, key: str, mtime: int) -> None:
        row = self._rows.find(key)
        if row is not None:
            data = orjson.dumps(row, default=str)
            self._add(make_header(os.fsencode(f"{key}.{_JSON}"), len(data), mtime) + data + padding(len(data)))

    def _add(self, part: _File | bytes) -> None:
        self._starts.append(self._end)
        self._parts.append(part)
        self._end += len(part) if isinstance(part, bytes) else len(part.header()) + padded(part.size)

    # ---- its bytes

    def _copy(self, view: memoryview, at: int) -> int:
        """Bytes of one part from ``at`` on."""
        number = bisect.bisect_right(self._starts, at) - 1
        part = self._parts[number]
        inside = at - self._starts[number]
        header, name, size = (part, "", 0) if isinstance(part, bytes) else (part.header(), part.name, part.size)
        if inside < len(header):
            piece = header[inside : inside + len(view)]
            view[: len(piece)] = piece
            return len(piece)
        inside -= len(header)
        if inside >= size:  # padding
            count = min(len(view), padded(size) - inside)
            view[:count] = bytes(count)
            return count
        wanted = min(len(view), size - inside)
        count = os.preadv(self._descriptor(name), [view[:wanted]], inside)
        if count == 0:
            raise ShardError(f"{self._folder}/{name}: it became shorter while it was read; start again", "changed")
        return count

    def _descriptor(self, name: str) -> int:
        if self._open is None or self._open[0] != name:
            self.close()
            path = f"{self._folder}/{name}"
            try:
                self._open = name, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
        return self._open[1]


def table_of(folder: Path) -> Path:
    """Where img2dataset puts a folder's table."""
    return folder.with_name(f"{folder.name}.parquet")


class _Rows:
    """The table beside a folder, read when a row is first wanted."""

    def __init__(self, folder: str) -> None:
        self._path = table_of(Path(folder))
        self._there = self._path.is_file()
        self._rows: dict[str, int] | None = None
        self._table: Any = None

    def find(self, key: str) -> Mapping[str, Any] | None:
        if not self._there:
            return None
        if self._rows is None:
            self._load()
        assert self._rows is not None
        number = self._rows.get(key)
        if number is None:
            return None
        (row,) = self._table.slice(number, 1).to_pylist()
        return {str(name): value for name, value in row.items() if not isinstance(value, bytes)}

    def _load(self) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise InfrastructureError(f"{self._path}: needs pyarrow ({error}): pip install pyarrow") from None
        try:
            self._table = pyarrow.parquet.ParquetFile(self._path).read()
            keys = self._table["key"].to_pylist() if "key" in self._table.column_names else []
        except (OSError, pyarrow.ArrowException) as error:
            raise ShardError(f"{self._path}: cannot be read as a table ({error})") from error
        self._rows = {str(key): number for number, key in enumerate(keys) if key is not None}


def _sorted_names(folder: str) -> list[str]:
    """Its files by key and then suffix, so that a sample's lie together; hidden ones are left out."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and not entry.is_dir()]
    except OSError as error:
        raise ShardError(f"{folder}: cannot be listed ({error.strerror})") from error
    if len(names) > MAX_FILES:
        raise ShardError(f"{folder}: more than {MAX_FILES:,} files")
    return sorted(names, key=lambda name: (_key(name) or "", name))


def _key(name: str) -> str | None:
    split = split_name(os.fsencode(name))
    return None if split is None else os.fsdecode(split[0])
