"""The finished edits of a shard: a jpg, a txt and a json of the same key, together, in one tar or as loose files.

Anything less is no edit: stage 01 may have left a lone json, and a generator that was killed a jpg without its text.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, KeysView
from pathlib import Path
from struct import Struct
from typing import Protocol, Self

import xxhash

from curation.dictionaries import clean_text
from curation.edited import loose_path
from curation.errors import SampleError, ShardError
from curation.publish import fast_digest
from curation.splice import Edit
from curation.tar import MAX_MEMBER_BYTES, TarPass, TarReport, problem_of

_PARTS = ("jpg", "txt", "json")
_ROW = Struct("6q")


class Edits(Protocol):
    """The edits of one shard by key."""

    incomplete: int  # keys with a jpg, but not with all three

    def keys(self) -> KeysView[str]: ...

    def read(self, key: str) -> Edit:
        """Raises ShardError when it cannot be read, or is not what was published."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


class TarredEdits:
    """Edits in a tar, in any order: one pass finds where they lie, and each is read when it is asked for.

    digest: of the whole file, where it was published with one.
    Raises ShardError for another digest, a damaged tar, and two edits of one key: edits must not get lost unnoticed.
    """

    def __init__(self, path: Path, digest: str | None = None) -> None:
        self._path = path
        if digest is not None and fast_digest(path) != digest:
            raise ShardError(f"{path}: is not what its receipt says; generate this shard's images again")
        self.incomplete = 0
        self._rows: dict[str, int] = {}
        self._places = array("q")  # of each edit: offset and size of its jpg, txt and json: ten thousand take 1 MB
        report = TarReport()
        tar = TarPass(path, report)
        for window in tar.windows():
            for span in window.spans:
                if span.torn or span.repeated:
                    raise ShardError(f"{path}: {_short(span.key)}: {span.torn or 'two edits of one key'}")
                members = {member.suffix: member for member in span.members}
                if not members.keys() >= {*_PARTS}:
                    self.incomplete += "jpg" in members
                    continue
                if problem := problem_of(span):
                    raise ShardError(f"{path}: {_short(span.key)}: {problem[0]}: {problem[1]}")
                self._rows[span.key] = len(self._rows)
                if max(member.size for member in span.members) > MAX_MEMBER_BYTES:
                    raise ShardError(f"{path}: {_short(span.key)}: a member of more than {MAX_MEMBER_BYTES:,} bytes")
                for part in _PARTS:
                    self._places.append(members[part].data)
                    self._places.append(members[part].size)
        if report.damages or report.missing_end:
            raise ShardError("; ".join(report.warnings()))
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def keys(self) -> KeysView[str]:
        return self._rows.keys()

    def read(self, key: str) -> Edit:
        jpg, jpg_size, txt, txt_size, json, json_size = _ROW.unpack_from(self._places, _ROW.size * self._rows[key])
        begin = min(jpg, txt, json)
        size = max(jpg + jpg_size, txt + txt_size, json + json_size) - begin
        data = memoryview(os.pread(self._descriptor, size, begin))  # the three lie together
        if len(data) < size:
            raise ShardError(f"{self._path}: changed while it was read")
        return Edit(data[jpg - begin :][:jpg_size], data[txt - begin :][:txt_size], data[json - begin :][:json_size])

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class LooseEdits:
    """Edits as ``<key>.jpg``, ``<key>.txt`` and ``<key>.json`` below one folder, in subfolders where keys have them.

    published: the files that count, with size and digest; None: all that are there, made elsewhere.
    """

    def __init__(self, folder: Path, published: dict[str, tuple[int, str]] | None) -> None:
        self._folder = folder
        self._published = published
        found: dict[str, set[str]] = {}
        for name in published if published is not None else _files_below(folder):
            key, _, suffix = name.rpartition(".")
            if suffix in _PARTS:
                found.setdefault(key, set()).add(suffix)
        complete = sorted(key for key, parts in found.items() if len(parts) == len(_PARTS))
        self.incomplete = sum("jpg" in parts for parts in found.values()) - len(complete)
        self._keys = dict.fromkeys(complete)

    def keys(self) -> KeysView[str]:
        return self._keys.keys()

    def read(self, key: str) -> Edit:
        jpg, txt, json = (self._read(f"{key}.{part}") for part in _PARTS)
        return Edit(jpg, txt, json)

    def _read(self, name: str) -> bytes:
        try:
            path = loose_path(self._folder, name)
            with open(path, "rb") as file:
                data = file.read(MAX_MEMBER_BYTES + 1)
        except OSError as error:
            raise ShardError(f"{self._folder / name}: cannot be read ({error.strerror})") from error
        except SampleError as error:
            raise ShardError(f"{self._folder / name}: {error.detail}") from None
        if len(data) > MAX_MEMBER_BYTES:
            raise ShardError(f"{path}: more than {MAX_MEMBER_BYTES:,} bytes")
        if self._published is not None and self._published[name] != (len(data), xxhash.xxh3_128_hexdigest(data)):
            raise ShardError(f"{path}: is not what its receipt says; generate this shard's images again")
        return data

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


def _files_below(folder: Path) -> Iterator[str]:
    """Paths relative to ``folder``; one listing per folder, links to folders are not followed."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise ShardError(f"{folder}: cannot be listed ({error.strerror})") from error

    for place, _, names in os.walk(folder, onerror=fail):
        below = os.path.relpath(place, folder)
        yield from names if below == "." else (f"{below}/{name}" for name in names)


def _short(key: str) -> str:
    return clean_text(key)[:200]
