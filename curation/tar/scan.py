"""One sequential pass over a tar: where its samples lie, and what is damaged.

Blocks are read in order into fixed buffers, and headers are parsed where they lie.

A shard comes from anywhere and may be damaged.  Garbage is skipped up to the next valid header, a cut file is read to
its last whole member, and what was lost is handed out as a torn sample, so that it can be counted:

- a sample of which a member is cut is torn, and so is one beside the damage that lacks a kind of member that the last
  whole sample had (an image, a txt and a json before there was one);
- damage that no torn sample explains is a torn sample of its own, named ``@<offset>``, without members.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from curation.storage.urls import Source
from curation.tar.blocks import Block, Blocks
from curation.tar.headers import BLOCK, REGULAR, ZERO_BLOCK, BadHeader, Member, parse_header, parse_special, split_name
from curation.tar.sources import open_blocks
from curation.threads import BackgroundCall

IMAGE_SUFFIXES: Final = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl", "jp2")
)


_EXPECTED_KINDS = frozenset(("image", "txt", "json"))  # DataComp's, until the shard has shown its own


_USUAL_END_BYTES = 64 << 10  # tar pads to 10 kB unless told otherwise


_MAGIC, _MAGIC_AT = b"ustar", 257


_NONZERO = re.compile(rb"[^\0]")


_NO_HEADER = "no header where one is due: "


_NO_PREFIX = b"\0"  # no member's name begins so


@dataclass(slots=True)
class SampleSpan:
    """Where a sample lies: from ``start`` to ``end``.  Spans follow one another without a gap but for damage.

    key: "" for members before, or without, any sample.  foreign: members without a key (folders, global pax headers).
    torn: what happened to it, "" where it is whole.  repeated: an earlier sample of the shard has the same key.
    """

    key: str
    start: int
    end: int
    members: list[Member] = field(default_factory=list)
    foreign: list[Member] = field(default_factory=list)
    torn: str = ""
    repeated: bool = False
    damages: list[Damage] = field(default_factory=list)  # inside it and beside it

    @property
    def own_extents(self) -> list[tuple[int, int]]:
        """The byte ranges of its members that have its key, those that lie together as one."""
        if not self.damages and not self.foreign:
            return [(self.start, self.end)]
        runs: list[tuple[int, int]] = []
        for member in self.members:
            begin = runs.pop()[0] if runs and runs[-1][1] == member.start else member.start
            runs.append((begin, member.end))
        return runs

    @property
    def kinds(self) -> frozenset[str]:
        """The suffixes of its members, with "image" for those of images."""
        return frozenset("image" if m.suffix in IMAGE_SUFFIXES else m.suffix for m in self.members)


@dataclass(slots=True)
class Damage:
    """Bytes that are no members.  ``explained``: a torn sample stands for it."""

    offset: int
    length: int
    detail: str
    explained: bool = False


@dataclass(slots=True)
class TarReport:
    """What a pass found besides samples; complete when the pass is."""

    path: str = ""
    samples: int = 0
    repeated_keys: int = 0
    damages: list[Damage] = field(default_factory=list)
    missing_end: bool = False
    gaps: list[int] = field(default_factory=list)
    end_bytes: int = 0  # the zeros that end the archive

    def warnings(self) -> list[str]:
        """One line for everything that is not as it should be."""
        lines = [f"{self.path}: damage at byte {d.offset:,} ({d.length:,} bytes): {d.detail}" for d in self.damages]
        if self.missing_end:
            lines.append(f"{self.path}: no end-of-archive blocks; read to its last whole member")
        lines += [f"{self.path}: an end of archive at byte {at:,} with members behind it; read on" for at in self.gaps]
        if self.end_bytes > _USUAL_END_BYTES:
            lines.append(f"{self.path}: ends in {self.end_bytes:,} zero bytes; were there members once?")
        if self.repeated_keys:
            lines.append(f"{self.path}: {self.repeated_keys:,} samples have the key of an earlier one")
        return lines


class Window:
    """Samples that lie together, and the part of the file they lie in.  Gone with the next but one.

    ``view``, ``pieces`` and ``read`` give the bytes of its spans (see ``Block``).  Those of a very large sample are not
    in memory, but read again.
    """

    __slots__ = ("pieces", "read", "spans", "view")

    def __init__(self, spans: list[SampleSpan], block: Block) -> None:
        self.spans = spans
        self.view, self.pieces, self.read = block.view, block.pieces, block.read


class TarScan:
    """One pass: ``for window in tar.windows(): for span in window.spans: …``.

    A thread reads and parses one window ahead: a shared filesystem's latency hides behind the caller's work, and the
    parsing behind the caller's reads and writes.  Memory is fixed, whatever the file's size.
    """

    def __init__(self, source: str | Source, report: TarReport | None = None) -> None:
        self.path = str(source)
        self._source = source
        self.report = report if report is not None else TarReport()
        self.report.path = self.path
        self._file: Blocks
        self._block: Block
        self._next = 0  # where the next header is due
        self._open: SampleSpan | None = None
        self._prefix = _NO_PREFIX  # the open sample's key and the dot
        self._keys: set[int] = set()  # hashes: a shard may hold a million keys
        self._last_whole: SampleSpan | None = None
        self._lost: tuple[int, str] | None = None  # where damage began and how, while the next header is sought
        self._damage: Damage | None = None  # the last one, until the sample after it begins
        self._unresolved: list[Damage] = []
        self._zeros = (-1, -1)  # the last run of zero blocks
        self._done: list[SampleSpan] = []

    def windows(self) -> Iterator[Window]:
        """The samples in order, a few megabytes at a time.  Raises ShardError when the file cannot be read."""
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open_blocks(self._source))
            beside = stack.enter_context(contextlib.closing(BackgroundCall[Window]("read-ahead")))
            stack.callback(self._file.cancel)  # first, so that nobody waits for bytes that are not wanted
            self._block = self._file.block
            more = self._file.size > 0
            if more:
                beside.start(self._step)
            while more:
                window = beside.result()
                if more := self._next < self._file.size and self._block.end < self._file.size:
                    beside.start(self._step)
                yield window
            self._finish()
            yield self._take()

    def _step(self) -> Window:
        """Read and parse one block further."""
        self._block = self._file.advance(self._open.start if self._open else self._next, self._next)
        self._scan()
        return self._take()

    # ---- members and samples

    def _scan(self) -> None:
        """Every header in the window, up to one that is not wholly there.  Locals, for this is where a pass spends
        its time."""
        buffer, shift, limit, size = self._block.buffer, self._block.shift, self._block.end, self._file.size
        at = self._next if self._lost is None else self._resume(self._next)
        prefix, span = self._prefix, self._open
        while at + BLOCK <= limit:
            data = at + BLOCK
            try:
                name, length, mtime, kind = parse_header(buffer, at - shift)
                if kind not in REGULAR:
                    special = parse_special(buffer, at - shift, limit - shift)
                    if special is None and limit < size:
                        break  # it goes on in the next block: parsed again from its start
                    if special is None:
                        raise BadHeader("the file ends in it")
                    name, length, mtime, kind, header_bytes = special
                    data = at + header_bytes
            except BadHeader as error:
                at = self._not_a_header(at, str(error))
                prefix = self._prefix
                continue
            if data + length > size:
                at = self._cut(at, data, name, data + length - size)
                prefix = self._prefix
                continue
            suffix = _suffix_text(name[len(prefix) :]) if name.startswith(prefix) else None
            if suffix is None:
                suffix = self._enter(name, at)
                prefix, span = self._prefix, self._open
            assert span is not None
            end = span.end = data + length + -length % BLOCK
            member = Member(name, suffix or "", at, data, length, end, kind in REGULAR, mtime)
            (span.foreign if suffix is None else span.members).append(member)
            at = end
        self._next = at

    def _enter(self, name: bytes, at: int) -> str | None:
        """Opens the sample that a member belongs to, after closing another; its suffix, None where it has no key."""
        split = split_name(name)
        if split is None:
            if self._open is None:
                self._open = SampleSpan("", at, at)
            return None
        raw_key, raw_suffix = split
        key = raw_key.decode("utf-8", "surrogateescape")
        if self._open is None or key != self._open.key:
            self._close()
            self._open = span = SampleSpan(key, at, at)
            self.report.samples += 1
            mark = hash(key)
            if mark in self._keys:
                span.repeated = True
                self.report.repeated_keys += 1
            self._keys.add(mark)
            if self._damage:
                span.damages.append(self._damage)
        self._damage = None
        self._prefix = raw_key + b"."
        return _suffix_text(raw_suffix)

    def _close(self) -> None:
        """The open sample has ended: judge whether it is torn, and hand it out."""
        span, self._open, self._prefix = self._open, None, _NO_PREFIX
        if span is None:
            return
        if span.key and span.damages:
            usual = self._last_whole.kinds if self._last_whole else _EXPECTED_KINDS
            if not span.torn and not span.kinds >= usual:
                span.torn = span.damages[0].detail
            if span.torn:
                for damage in span.damages:
                    damage.explained = True
        elif span.key:
            self._last_whole = span
        self._done.append(span)
        if self._unresolved:
            self._resolve(self._damage)

    def _resolve(self, pending: Damage | None) -> None:
        """Damage between whole samples is a lost sample.  ``pending``: its neighbour behind is still to come."""
        for damage in self._unresolved:
            if damage is not pending and not damage.explained:
                damage.explained = True
                self.report.samples += 1
                self._done.append(SampleSpan(f"@{damage.offset}", damage.offset, damage.offset, torn=damage.detail))
        self._unresolved = [damage for damage in self._unresolved if not damage.explained]

    def _take(self) -> Window:
        done, self._done = self._done, []
        return Window(done, self._block)

    # ---- damage

    def _not_a_header(self, at: int, why: str) -> int:
        """What stands at ``at`` is the end of the archive, or damage: where to go on."""
        buffer, shift, limit = self._block.buffer, self._block.shift, self._block.end
        if buffer.startswith(ZERO_BLOCK, at - shift):
            nonzero = _NONZERO.search(buffer, at - shift, limit - shift)
            until = limit if nonzero is None else nonzero.start() + shift
            until -= (until - at) % BLOCK
            if self._zeros[1] != at:
                self._note_gap()
                self._zeros = (at, at)
            self._zeros = (self._zeros[0], until)
            return until
        self._lost = (at, _NO_HEADER + why)
        return self._resume(at + 1)

    def _cut(self, at: int, data: int, name: bytes, missing: int) -> int:
        """The member at ``at`` is not wholly there: the sample it belongs to is torn, whatever else it has."""
        why = _cut_text(name, missing)
        if self._enter(name, at) is not None and self._open is not None:
            self._open.torn = why
        self._lost = (at, why)
        return self._resume(data)

    def _take_back(self, span: SampleSpan) -> None:
        """The file ended in the last member, which nobody could know before: it is as if it had been cut."""
        members = max(span.members, span.foreign, key=lambda some: some[-1].start if some else -1)
        last = members[-1]
        missing = last.data + last.size - self._file.size
        if missing > 0:
            del members[-1]
            span.end = last.start
            why = _cut_text(last.name, missing)
            if members is span.members:
                span.torn = why
            self._lost = (last.start, why)

    def _resume(self, at: int) -> int:
        """The next valid header from ``at`` on, at any alignment; without one, where to seek in the next window."""
        buffer, shift, limit = self._block.buffer, self._block.shift, self._block.end
        while (found := buffer.find(_MAGIC, at - shift + _MAGIC_AT, limit - shift)) >= 0:
            at = found - _MAGIC_AT + shift
            if at + BLOCK > limit:
                break
            try:
                parse_header(buffer, at - shift)
            except BadHeader:
                at += 1
                continue
            self._lose(until=at)
            return at
        if limit >= self._file.size:
            return self._file.size
        return at if found >= 0 else max(at, limit - _MAGIC_AT - len(_MAGIC) + 1)

    def _lose(self, until: int) -> None:
        """What lies between the start of the damage and ``until`` is no members."""
        assert self._lost is not None
        offset, why = self._lost
        self._lost = None
        self._damage = Damage(offset, until - offset, why)
        self.report.damages.append(self._damage)
        self._unresolved.append(self._damage)
        if self._open is not None:
            self._open.damages.append(self._damage)
            self._prefix = _NO_PREFIX  # so that the next member is looked at by _enter

    def _note_gap(self) -> None:
        if self._zeros[0] >= 0:
            self.report.gaps.append(self._zeros[0])

    def _finish(self) -> None:
        """The end of the file: what was missing there, and the last sample."""
        size = self._file.size
        ended = self._zeros[0] >= 0
        if self._next > size and self._open is not None:
            self._take_back(self._open)
        if self._lost is None and self._next < size and any(self._block.read(self._next, size - self._next)):
            self._lost = (self._next, _NO_HEADER + "the file ends in it")
        if self._lost is not None and self._lost[0] == self._zeros[1]:
            behind = self._lost[0]
            self.report.damages.append(Damage(behind, size - behind, "behind the end of the archive, no members"))
        elif self._lost is not None:
            self._lose(until=size)
            ended = False
        elif ended and self._next > self._zeros[1]:
            self._note_gap()
            ended = False
        if ended:
            self.report.end_bytes = self._zeros[1] - self._zeros[0]
        else:
            self.report.missing_end = True
            if self._open is not None and self._open.key:
                self._open.damages.append(Damage(size, 0, "the file ends without an end of archive", explained=True))
        self._damage = None
        self._close()
        self._resolve(None)


def _cut_text(name: bytes, missing: int) -> str:
    return f"{name.decode('utf-8', 'replace')!r} is cut: {missing:,} of its bytes are missing"


@lru_cache(1024)
def _suffix_text(raw: bytes) -> str | None:
    return None if b"/" in raw else raw.decode("utf-8", "surrogateescape").lower()
