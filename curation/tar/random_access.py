"""Reads samples by their offset in a tar: single ones, or samples of several shards as if they were one pass.

The index ``<shard>.idx`` next to a finished shard has a line for each sample in the shard's order: the key as a JSON
string, the offset and the length in bytes, separated by tabs.  ``wids.json`` lists all shards for ``wids``.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import orjson

from curation.errors import ShardError
from curation.jsonio import dump_json
from curation.storage.files import storage_errors, write_whole
from curation.tar.blocks import Block, Blocks
from curation.tar.headers import BLOCK, BadHeader, parse_member, split_name
from curation.tar.scan import SampleSpan, Window
from curation.tar.sources import open_blocks
from curation.threads import BackgroundCall

GATHERED_BYTES: Final = 8 << 20  # size of a window of gathered samples


MAX_SAMPLE_BYTES: Final = 1 << 30


_OPEN_FILES = 64


_RANGE_BYTES = 4 << 20


def parse_span(buffer: bytearray | bytes, at: int, limit: int) -> SampleSpan:
    """Parse the sample in ``buffer[at:limit]``.  Raises BadHeader if these are not the members of one sample."""
    span = SampleSpan("", at, limit)
    key: bytes | None = None
    while at < limit:
        member = parse_member(buffer, at, limit)
        if member is None:
            raise BadHeader("it ends in a header")
        split = split_name(member.name)
        if member.end > limit or (split is not None and key not in (None, split[0])):
            raise BadHeader("it holds other members")
        if split is not None:
            key = split[0]
        (span.foreign if split is None else span.members).append(member)
        span.verbatim = span.verbatim and not member.odd
        at = member.end
    if key is None:
        raise BadHeader("it holds no member with a key")
    span.key = key.decode("utf-8", "surrogateescape")
    return span


class RangeReader:
    """Reads byte ranges of a shard in any order, and caches the block around the last range."""

    def __init__(self, path: Path) -> None:
        """Raises ShardError if the file cannot be opened."""
        self._begin, self._data = 0, b""
        self._file = open_blocks(path)
        self.size = path.stat().st_size

    def read(self, start: int, size: int) -> bytes:
        """Read ``size`` bytes at ``start``, or fewer at the file's end.  Raises ShardError."""
        at = start - self._begin
        if at < 0 or at + size > len(self._data):
            data = bytearray(max(size, _RANGE_BYTES))
            self._data = bytes(memoryview(data)[: self._file.fill(memoryview(data), start)])
            self._begin, at = start, 0
        return self._data[at : at + size]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class Piece:
    """One sample: the number of its shard, and the byte ranges of its members."""

    source: int
    extents: Sequence[tuple[int, int]]

    @property
    def size(self) -> int:
        return sum(end - start for start, end in self.extents)


class GatheredScan:
    """Samples from several shards in a given order, with the interface of a pass over one shard.  See ``TarScan``.

    A thread reads one window ahead.  Within a window, samples are read in the order of their offsets, whatever their
    order in the result.
    """

    def __init__(self, path: str, pieces: Sequence[Piece], open_source: Callable[[int], Blocks]) -> None:
        """path: for messages.  open_source: opens a shard by its number."""
        self.path = path
        self._pieces = pieces
        self._open_source = open_source
        self._sources: OrderedDict[int, Blocks] = OrderedDict()
        self._next = 0

    def windows(self) -> Iterator[Window]:
        """Yield the windows.  Raises ShardError if a shard cannot be read, or has changed since it was indexed."""
        self._next = 0
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            beside = stack.enter_context(contextlib.closing(BackgroundCall[Window]("read-ahead")))
            stack.callback(self._let_go)
            more = bool(self._pieces)
            if more:
                beside.start(self._step)
            while more:
                window = beside.result()
                if more := self._next < len(self._pieces):
                    beside.start(self._step)
                yield window

    def _step(self) -> Window:
        begin, size = self._next, 0
        while self._next < len(self._pieces) and (size < GATHERED_BYTES or self._next == begin):
            size += self._pieces[self._next].size
            self._next += 1
        if size > MAX_SAMPLE_BYTES + GATHERED_BYTES:
            raise ShardError(f"{self.path}: a sample of {size:,} bytes; at most {MAX_SAMPLE_BYTES:,} are regrouped")
        pieces = self._pieces[begin : self._next]
        buffer = bytearray(size)
        reads: list[tuple[int, int, int, int]] = []  # source, start, end, place in the buffer
        bounds: list[tuple[int, int]] = []
        at = 0
        for piece in pieces:
            bounds.append((at, at + piece.size))
            for start, end in piece.extents:
                reads.append((piece.source, start, end, at))
                at += end - start
        self._read(buffer, sorted(reads))
        spans = []
        for piece, (start, end) in zip(pieces, bounds, strict=True):
            try:
                spans.append(parse_span(buffer, start, end))
            except BadHeader as error:
                raise self._changed(piece.source, f"byte {piece.extents[0][0]:,}: {error}") from None
        return Window(spans, Block(None, buffer, 0, 0, size))

    def _read(self, buffer: bytearray, reads: Sequence[tuple[int, int, int, int]]) -> None:
        """Read the ranges; ranges that are adjacent in the file and in the buffer are read at once."""
        view = memoryview(buffer)
        number = 0
        while number < len(reads):
            source, start, end, at = reads[number]
            number += 1
            while number < len(reads) and reads[number][:2] == (source, end) and reads[number][3] == at + end - start:
                end = reads[number][2]
                number += 1
            missing = end - start - self._source(source).fill(view[at : at + end - start], start)
            if missing >= BLOCK:  # fewer may be the padding of the last member of a shard that was cut
                raise self._changed(source, f"it ends before byte {end:,}")

    def _source(self, number: int) -> Blocks:
        found = self._sources.get(number)
        if found is None:
            found = self._sources[number] = self._open_source(number)
            if len(self._sources) > _OPEN_FILES:
                self._sources.popitem(last=False)[1].close()
        self._sources.move_to_end(number)
        return found

    def _changed(self, source: int, what: str) -> ShardError:
        return ShardError(f"{self.path}: a shard changed since it was indexed ({what}); start again", "changed")

    def _let_go(self) -> None:
        for source in list(self._sources.values()):
            source.cancel()

    def _close(self) -> None:
        while self._sources:
            self._sources.popitem()[1].close()


SUFFIX: Final = ".idx"


MAX_INDEX_BYTES: Final = 1 << 30


WIDS: Final = "wids.json"
SIZES: Final = "sizes.json"

Entry = tuple[str, int, int]  # key, offset, length


def dump_index(entries: Sequence[Entry]) -> bytes:
    return b"".join(b"%s\t%d\t%d\n" % (_quoted(key), offset, length) for key, offset, length in entries)


def place_of(shard: Path, key: str) -> tuple[int, int] | None:
    """(offset, length) of a sample; None if the shard lacks the key.  Raises ShardError if there is no index."""
    path = shard.with_suffix(SUFFIX)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_INDEX_BYTES)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}); stage 04 writes it with --index") from error
    wanted = _quoted(key) + b"\t"
    begin = 0 if data.startswith(wanted) else data.find(b"\n" + wanted) + 1
    if begin == 0 and not data.startswith(wanted):
        return None
    fields = data[begin + len(wanted) : data.find(b"\n", begin)].split(b"\t")
    if len(fields) != 2 or not all(field.isdigit() and len(field) < 20 for field in fields):
        raise ShardError(f"{path}: damaged at byte {begin:,}; run stage 04 with --index again")
    return int(fields[0]), int(fields[1])


def write_wids(folder: Path, receipts: Iterable[Mapping[str, Any]]) -> Path:
    """Write ``wids.json`` for ``wids.ShardListDataset``, with each tar that receipts name, and ``sizes.json``.  Equal
    receipts give equal bytes, so any process may write them, and the last ones stay."""
    listed = []
    for receipt in receipts:
        tar = f"{receipt['shard']}.tar".rpartition("/")[2]
        output = next(output for output in receipt["outputs"] if output["path"].rpartition("/")[2] == tar)
        listed.append({"url": output["path"], "nsamples": receipt["notes"]["samples_out"], "filesize": output["size"]})
    record = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed}
    path = folder / WIDS
    with storage_errors(path):
        write_whole(path, orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")
    write_sizes(folder, {entry["url"]: entry["nsamples"] for entry in listed if "://" not in entry["url"]})
    return path


def write_sizes(folder: Path, counts: Mapping[str, int]) -> None:
    """Write ``sizes.json`` for open_clip, in each folder of shards: the name of each tar → how many samples it has.

    open_clip's ``get_dataset_size`` looks for it beside the first shard, and in it for the name of each.

    Args:
        folder: The output folder.
        counts: The path of each tar below it, and its samples.
    """
    folders: dict[str, dict[str, int]] = {}
    for path, count in sorted(counts.items()):
        above, _, name = path.rpartition("/")
        folders.setdefault(above, {})[name] = count
    for above, sizes in folders.items():
        file = folder / above / SIZES
        with storage_errors(file):
            write_whole(file, orjson.dumps(sizes, option=orjson.OPT_INDENT_2) + b"\n")


def _quoted(key: str) -> bytes:
    """The key as a JSON string; bytes that are not UTF-8 are written as escapes."""
    return dump_json(key)
