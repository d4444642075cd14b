"""The rows of one shard that stage 05 wrote, found by key or uid.

A row is read from the file when its sample comes: memory holds sixteen bytes of it, so that a shard that is made from
a hundred others can look into the rows of all of them.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import xxhash

from curation.errors import SampleError, ShardError
from curation.jsonio import MAX_DEPTH, MAX_SAMPLE_JSON_BYTES, clean_text, parse_json_object
from curation.libraries import np
from curation.storage.files import fast_digest

MOST_CHARACTERS: Final = 1 << 16  # of a caption or a URL
SYNTHETIC: Final = "synthetic"  # the name of the caption of a run with a single prompt
# A row has all of a sample's json, one level deeper.  Where it cannot be UTF-8, each character is escaped.
MOST_LINE: Final = 8 * MAX_SAMPLE_JSON_BYTES
_BLOCK: Final = 8 << 10


@dataclass(frozen=True, slots=True)
class Captioned:
    """The captions of one picture.

    Attributes:
        texts: Name → caption, each one clean line that is not empty.
        sha256: What the sample's json said of its picture, or that of the picture itself; None if it is not known.
        image_sha256: That of the picture as it was in the shard; None if it is not known.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None
    image_sha256: str | None = None


class CaptionsOfShard(Protocol):
    """The captions of the samples of one shard."""

    @property
    def names(self) -> Collection[str]:
        """The names under which there are captions."""

    def find(self, key: str, metadata: Mapping[str, Any]) -> Captioned | None:
        """Those of a sample, by its key and its json; None if there are none.  Raises ShardError."""

    def close(self) -> None: ...


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """Read one row of stage 05's ``rows/``.

    where: The file and the place in it.

    Raises:
        ShardError: It is no row; the message begins with ``where``.
    """
    try:
        return parse_json_object(line, MOST_LINE, MAX_DEPTH + 1, keep_surrogates=True)
    except SampleError as error:
        raise ShardError(f"{where}: not a row: {error}") from None


class RowFile:
    """``rows/<shard>.jsonl`` of stage 05.

    Args:
        path: The file.
        wanted: The names of the captions that are looked for.
        digest: That of the whole file according to its receipt, if it is to be checked.

    Attributes:
        count: The number of rows.

    Raises:
        ShardError: The file has another digest, or holds something else than rows.
    """

    def __init__(self, path: Path, wanted: Collection[str], digest: str | None = None) -> None:
        if digest is not None and fast_digest(path) != digest:
            raise ShardError(f"{path}: is not what its receipt says; run stage 05 again for this shard")
        self._path, self._wanted = path, tuple(wanted)
        self.count = 0
        self._names: set[str] = set()
        marks, offsets = array("Q"), array("Q")
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            for offset, line in self._lines():
                self.count += 1
                row = parse_row(line, f"{path}, line {self.count}")
                self._names |= _told(row).keys()
                for kind in ("key", "uid"):
                    if _is_told(row.get(kind)):
                        marks.append(_mark(kind, row[kind]))
                        offsets.append(offset)
        except BaseException:
            self.close()
            raise
        order = np.argsort(np.asarray(marks), kind="stable")  # of rows with one key, the first counts
        self._marks, self._offsets = (array("Q", np.asarray(places)[order].tobytes()) for places in (marks, offsets))

    @property
    def names(self) -> Collection[str]:
        return self._names

    def find(self, key: str, metadata: Mapping[str, Any]) -> Captioned | None:
        """By key, where the row's uid is not another one's; else by uid."""
        uid = metadata.get("uid")
        for kind, value in (("key", key), ("uid", uid)):
            if isinstance(value, str) and value:
                for row in self._rows(_mark(kind, value)):
                    is_another = _is_told(uid) and _is_told(row.get("uid")) and row["uid"] != uid
                    if row.get(kind) == value and not is_another:
                        return _captioned(row, self._wanted)
        return None

    def close(self) -> None:
        os.close(self._descriptor)

    def _rows(self, mark: int) -> Iterator[Mapping[str, Any]]:
        at = bisect_left(self._marks, mark)
        while at < len(self._marks) and self._marks[at] == mark:
            yield parse_row(self._line_at(self._offsets[at]), f"{self._path}, byte {self._offsets[at]:,}")
            at += 1

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line with the place of its first byte."""
        with open(self._descriptor, "rb", closefd=False) as file:
            offset = 0
            while line := file.readline(MOST_LINE):
                yield offset, line
                offset += len(line)

    def _line_at(self, offset: int) -> bytes:
        data, size = b"", _BLOCK
        while b"\n" not in data and size <= 2 * MOST_LINE:
            try:
                data, before = os.pread(self._descriptor, size, offset), len(data)
            except OSError as error:
                raise ShardError(f"{self._path}: cannot be read ({error.strerror})") from error
            if len(data) == before:
                break
            size *= 8
        return data.partition(b"\n")[0]


def _is_told(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _mark(kind: str, value: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{kind}\0{value}".encode("utf-8", "surrogatepass"))


def _told(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name → caption.  Where an image got several, the first of them that there is serves as ``synthetic`` too."""
    several = row.get("captions")
    alone = {SYNTHETIC: row["caption"]} if "caption" in row else {}
    return alone | several if isinstance(several, dict) else alone


def _captioned(row: Mapping[str, Any], wanted: Collection[str]) -> Captioned:
    found, texts = _told(row), {}
    for name in wanted:
        told = found.get(name)
        if isinstance(told, str) and (text := clean_text(told[:MOST_CHARACTERS])):
            texts[name] = text
    sha256, image = (row.get(name) if _is_told(row.get(name)) else None for name in ("sha256", "image_sha256"))
    return Captioned(texts, sha256, image)
