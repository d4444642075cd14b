"""Scans a tar in one sequential pass, and finds its samples and its damage.

Blocks are read in order into fixed buffers, and headers are parsed in these buffers, without a copy.

A shard may come from any source and may be damaged.  Damage never ends a scan: it continues at the next valid header,
which is recognised by its magic and its checksum, at any offset.  Lost data is reported as a torn sample, so that it is
counted:

- A member that is cut off, that has lost bytes or into which bytes were inserted is **suspect**: it is not one of its
  sample's members, and the sample is torn.  A member that has lost bytes extends over the headers after it, so the
  next header is also searched inside the suspect member.
- A sample next to damage is torn if it lacks a kind of member that the last complete sample had (before the first
  complete sample: an image, a txt and a json), because its first or last members may be lost.
- Damage that no torn sample explains counts as a torn sample with the key ``@<offset>`` and without members.
- Zero blocks that are followed by members are skipped and belong to no sample.
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
from curation.tar.headers import (
    BLOCK,
    MAGIC,
    MAGIC_AT,
    RECORD,
    REGULAR,
    ZERO_BLOCK,
    BadHeader,
    Member,
    find_header,
    parse_header,
    parse_member,
    parse_special,
    split_name,
)
from curation.tar.sources import open_blocks
from curation.threads import BackgroundCall

# What to do if the members of one sample were found at two places.
TOGETHER: Final = "if they are one whose members do not stand together: python -m curation fsck TARS --repair DIR"
IMAGE_SUFFIXES: Final = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl", "jp2")
)


_EXPECTED_KINDS = frozenset(("image", "txt", "json"))  # DataComp's, until the shard's own are known
_USUAL_END_BYTES = 64 << 10  # tar pads to 10 kB by default


_NONZERO = re.compile(rb"[^\0]")


_NO_HEADER = "no header where one is due: "
_NO_PREFIX = b"\0"  # no member's name begins with it
_SEARCH_BYTES = 1 << 20  # bytes read at a time when a suspect member is searched for headers
_SEARCHES_PER_BYTE = 4  # a limit, because the members of a crafted tar may all extend over the same bytes


@dataclass(slots=True)
class SampleSpan:
    """The place of a sample, from byte ``start`` to byte ``end``.  Only damage and zero blocks are between two spans.

    Attributes:
        key: The sample's key; "" for members that come before any sample.
        members: Its undamaged members, in the shard's order.
        foreign: Members without a key between them, such as folders and global pax headers.
        torn: What happened to the sample; "" if it is complete.
        suspect: Whether a damaged member was removed from ``members``.
        repeated: Whether an earlier sample of the shard that is not torn has the same key.
        damages: The damage inside the sample and next to it.
    """

    key: str
    start: int
    end: int
    members: list[Member] = field(default_factory=list)
    foreign: list[Member] = field(default_factory=list)
    torn: str = ""
    suspect: bool = False
    repeated: bool = False
    damages: list[Damage] = field(default_factory=list)

    @property
    def own_extents(self) -> list[tuple[int, int]]:
        """The byte ranges of the members with its key.  Adjacent members share one range."""
        if not self.damages and not self.foreign:
            return [(self.start, self.end)]
        runs: list[tuple[int, int]] = []
        for member in self.members:
            begin = runs.pop()[0] if runs and runs[-1][1] == member.start else member.start
            runs.append((begin, member.end))
        return runs

    @property
    def in_order(self) -> list[Member]:
        """All members from the sample's first to its last, including those without a key, in the file's order."""
        if not self.foreign:
            return self.members
        return sorted((*self.members, *self.foreign), key=lambda member: member.start)

    @property
    def kinds(self) -> frozenset[str]:
        """The suffixes of its members, with "image" in place of an image's suffix."""
        return frozenset("image" if m.suffix in IMAGE_SUFFIXES else m.suffix for m in self.members)


@dataclass(slots=True)
class Damage:
    """Bytes that are not a valid member.  ``explained``: a torn sample accounts for them."""

    offset: int
    length: int
    detail: str
    explained: bool = False


@dataclass(slots=True)
class TarReport:
    """What a scan found besides samples.  It is complete when the scan has ended."""

    path: str = ""
    samples: int = 0
    repeated_keys: int = 0
    damages: list[Damage] = field(default_factory=list)
    missing_end: bool = False
    gaps: list[int] = field(default_factory=list)  # offsets of zero blocks that are followed by members
    end_bytes: int = 0  # the zeros that end the archive
    odd_texts: int = 0  # .txt members that were loaded and whose bytes are no UTF-8

    def warnings(self) -> list[str]:
        """One line for each irregularity."""
        lines = [f"{self.path}: damage at byte {d.offset:,} ({d.length:,} bytes): {d.detail}" for d in self.damages]
        if self.missing_end:
            lines.append(f"{self.path}: no end-of-archive blocks; read to its last whole member")
        lines += [f"{self.path}: an end of archive at byte {at:,} with members behind it; read on" for at in self.gaps]
        if self.end_bytes > _USUAL_END_BYTES:
            lines.append(f"{self.path}: ends in {self.end_bytes:,} zero bytes; were there members once?")
        if self.repeated_keys:
            lines.append(f"{self.path}: {self.repeated_keys:,} samples have the key of an earlier one; {TOGETHER}")
        if self.odd_texts:
            lines.append(
                f"{self.path}: {self.odd_texts:,} .txt members hold bytes that are no UTF-8 (another encoding without "
                "a byte order mark?); U+FFFD stands for those bytes"
            )
        return lines


class Window:
    """Adjacent samples, and the part of the file that contains them.

    ``view``, ``pieces`` and ``read`` return the bytes of its spans (see ``Block``).  The bytes of a very large sample
    are not in memory and are read again.  A window stays valid while the next one is used, and not longer.
    """

    __slots__ = ("pieces", "read", "spans", "view")

    def __init__(self, spans: list[SampleSpan], block: Block) -> None:
        self.spans = spans
        self.view, self.pieces, self.read = block.view, block.pieces, block.read


class TarScan:
    """One pass over a tar: ``for window in scan.windows(): for span in window.spans: …``.

    A thread reads and parses one window ahead, so that reading and parsing overlap with the caller's work.  The memory
    is fixed, whatever the size of the file.

    Args:
        source: A tar on a filesystem, a folder of loose files, or what ``curation.storage.urls`` can read.
        report: Receives what is found besides samples; default: a new one.
        unpack: Whether a shard may be compressed with gzip; the offsets of its spans are those of the tar inside.
    """

    def __init__(self, source: str | Source, report: TarReport | None = None, *, unpack: bool = True) -> None:
        self.path = str(source)
        self._source, self._unpack = source, unpack
        self.report = report if report is not None else TarReport()
        self.report.path = self.path
        self._file: Blocks
        self._block: Block
        self._next = 0  # where the next header should be
        self._open: SampleSpan | None = None
        self._prefix = _NO_PREFIX  # the current sample's key and the dot
        self._keys: set[int] = set()  # hashes: a shard may hold a million keys
        self._last_whole: SampleSpan | None = None
        self._usual_count = 0  # number of members of the last complete sample
        self._lost: tuple[int, str] | None = None  # start and kind of the damage, while the next header is searched
        self._damage: Damage | None = None  # the last one, until the sample after it begins
        self._unresolved: list[Damage] = []
        self._suspects: dict[str, str] = {}  # of the current sample: suffix → what happened to the member
        self._searched = 0  # bytes of suspect members that were searched for headers
        self._zeros = (-1, -1)  # the last run of zero blocks
        self._archive = 0  # start of the current archive, if several were concatenated
        self._done: list[SampleSpan] = []

    def windows(self) -> Iterator[Window]:
        """Yield the samples in the shard's order, a few megabytes at a time.

        Raises:
            ShardError: The file cannot be read, or it is no tar.
        """
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open_blocks(self._source, unpack=self._unpack))
            ahead = stack.enter_context(contextlib.closing(BackgroundCall[Window]("read-ahead")))
            stack.callback(self._file.cancel)  # runs first at the end, so that nobody waits for unneeded bytes
            self._block = self._file.block
            more = self._file.size > 0
            if more:
                ahead.start(self._step)
            while more:
                window = ahead.result()
                behind_it, size = self._next < self._block.begin, self._file.size
                if more := self._next < size and (self._block.end < size or behind_it):
                    ahead.start(self._step)
                yield window
            self._finish()
            yield self._take()

    def _step(self) -> Window:
        """Read and parse the next block."""
        self._block = self._file.advance(self._open.start if self._open else self._next, self._next)
        self._scan()
        while self._next > self._file.size and self._open is not None:
            member = _last_member(self._open)  # the end of a stream is known only when it is reached
            cut = _cut_text(member.name, member.data + member.size - self._file.size)
            if member.data + member.size <= self._file.size:
                break  # only padding is missing
            self._next = self._take_out(self._open, member, cut, self._file.size)
            if self._next >= self._block.begin:
                self._scan()
        return self._take()

    # ---- members and samples

    def _scan(self) -> None:
        """Parse every header in the block, up to one that is incomplete.  The function uses local variables because a
        scan spends most of its time here."""
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
                        break  # it continues in the next block, and is parsed again from its start
                    if special is None:
                        raise BadHeader("the file ends in it")
                    name, length, mtime, kind, header_bytes = special
                    data = at + header_bytes
            except BadHeader as error:
                at = self._not_a_header(at, str(error))
                prefix = self._prefix
                if at < self._block.begin:
                    break  # back to a header that is no longer in memory
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
        """Begin the sample to which a member belongs, and end the previous one.

        Returns:
            The member's suffix; None if it has no key.
        """
        split = split_name(name)
        if split is None:
            if self._open is None:
                self._open = SampleSpan("", at, at)
            elif self._zeros[1] == at:
                self._pass_gap(inside=True)
            return None
        raw_key, raw_suffix = split
        key = raw_key.decode("utf-8", "surrogateescape")
        if self._zeros[1] == at:
            self._pass_gap(inside=self._open is not None and self._open.key == key)
        while self._open is not None and key != self._open.key:
            self._close(raw_key)
        if self._open is None:
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

    def _close(self, following: bytes | None = None) -> None:
        """End the current sample: decide whether it is torn, and add it to the window.

        Args:
            following: The key of the member after it.
        """
        span, self._open, self._prefix = self._open, None, _NO_PREFIX
        if span is None:
            return
        if self._suspects:
            sound = {member.suffix for member in span.members}  # if a suffix is here too, the damage was a stray header
            lost = [why for suffix, why in self._suspects.items() if suffix not in sound]
            span.torn, span.suspect = next(iter(lost), ""), bool(lost)
            self._suspects.clear()
        swallowed = self._free_swallowed(span, following) if len(span.members) < self._usual_count else ()
        if span.key and span.damages:
            usual = self._last_whole.kinds if self._last_whole else _EXPECTED_KINDS
            if not span.torn and not span.kinds >= usual:
                span.torn = span.damages[0].detail
            if span.torn:
                for damage in span.damages:
                    damage.explained = True
                if not span.repeated:
                    self._keys.discard(hash(span.key))  # a later complete sample does not count as repeated
        elif span.key:
            self._last_whole, self._usual_count = span, len(span.members)
        self._done.append(span)
        if self._unresolved:
            self._resolve(self._damage)
        for member in swallowed:
            self._enter(member.name, member.start)
            assert self._open is not None
            self._open.members.append(member)
            self._open.end = member.end

    def _resolve(self, pending: Damage | None) -> None:
        """Count damage between complete samples as a lost sample.

        Args:
            pending: Damage after which no sample was read yet.
        """
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
        """Handle an offset without a header: the end of the archive, or damage.  Returns where to continue."""
        buffer, shift, limit = self._block.buffer, self._block.shift, self._block.end
        if buffer.startswith(ZERO_BLOCK, at - shift):
            nonzero = _NONZERO.search(buffer, at - shift, limit - shift)
            until = limit if nonzero is None else nonzero.start() + shift
            until -= (until - at) % BLOCK
            if self._zeros[1] != at:
                self._note_gap()
                self._zeros = (at, at)
            self._zeros = (self._zeros[0], until)
            self._prefix = _NO_PREFIX  # so that _enter is called for the member after the zeros
            return until
        span = self._open
        if span is not None and span.end == at and (span.members or span.foreign):
            member = _last_member(span)
            inside = self._header_inside(member.data, at)
            if inside is not None:
                return self._take_out(span, member, _swallows_text(member.name), at, inside)
            if self._block.read(member.data + member.size, at - member.data - member.size).strip(b"\0"):
                text = f"{_quoted(member.name)}: its bytes have been shifted"
                return self._take_out(span, member, text, at)
        self._lost = (at, _NO_HEADER + why)
        return self._resume(at + 1)

    def _cut(self, at: int, data: int, name: bytes, missing: int) -> int:
        """Handle an incomplete member at ``at``: its sample is torn, whatever its other members are."""
        why = _cut_text(name, missing)
        if (suffix := self._enter(name, at)) is not None:
            self._suspects[suffix] = why
        self._lost = (at, why)
        return self._resume(data)

    def _take_out(self, span: SampleSpan, member: Member, why: str, behind: int, inside: int | None = None) -> int:
        """Treat the current sample's last member as suspect, as if its header were damage.  Returns where to continue.

        Args:
            behind: The end of the member according to its header.
            inside: The offset of a header inside the member, if one is known.
        """
        if span.members and span.members[-1] is member:
            del span.members[-1]
            self._suspects.setdefault(member.suffix, why)
        else:
            del span.foreign[-1]
        span.end = member.start
        self._lost = (member.start, why)
        if inside is None:
            inside = self._header_inside(member.data, behind)
        if inside is None:
            return self._resume(behind)
        self._lose(until=inside)
        return inside

    def _header_inside(self, start: int, end: int) -> int | None:
        """The offset of the first header between two offsets, which need not be in memory."""
        end = min(end + BLOCK - 1, self._file.size)
        size = 8 * BLOCK  # search a small part first, because the header is often near
        while start + BLOCK <= end and self._searched <= _SEARCHES_PER_BYTE * (end + _SEARCH_BYTES):
            stop = min(end, start + size)
            size = min(2 * size, _SEARCH_BYTES)
            self._searched += stop - start
            found = find_header(self._block.read(start, stop - start))
            if found >= 0:
                return start + found
            start = stop - BLOCK + 1
        return None

    def _free_swallowed(self, span: SampleSpan, following: bytes | None) -> list[Member]:
        """Find members of the next sample that a member of this one contains, up to its last byte.

        Such a member has lost exactly as many bytes as the members after it have, so that the next header is at the
        expected place.  The member is suspect.  Only samples with fewer members than the last complete one are checked.
        """
        own = span.key.encode("utf-8", "surrogateescape")
        for member in span.members:
            view = self._block.view(member.data, member.end)
            marks = bytes(view[MAGIC_AT::BLOCK]) if view is not None else b""
            if (block := marks.find(MAGIC[:1])) < 0:
                continue
            chain = self._chain(member.data + block * BLOCK, member.end)
            keys = {split[0] for one in chain if (split := split_name(one.name))}
            if not chain or not keys & {own, following}:
                continue
            why = _swallows_text(member.name)
            damage = Damage(member.start, chain[0].start - member.start, why, explained=True)
            self.report.damages.append(damage)
            span.torn, span.suspect = span.torn or why, True
            span.damages.append(damage)
            mine = [one for one in chain if (split := split_name(one.name)) and split[0] == own]
            span.members = sorted(
                (*mine, *(one for one in span.members if one is not member)), key=lambda one: one.start
            )
            return [one for one in chain if (split := split_name(one.name)) and split[0] != own]
        return []

    def _chain(self, at: int, end: int) -> list[Member]:
        """The consecutive members from ``at`` to ``end``, or to zeros that extend to ``end``."""
        chain: list[Member] = []
        try:
            while at < end and (member := parse_member(self._block.buffer, at, end, self._block.shift)) is not None:
                if member.end > end:
                    return []
                chain.append(member)
                at = member.end
        except BadHeader:
            pass
        return chain if not self._block.read(at, end - at).strip(b"\0") else []

    def _resume(self, at: int) -> int:
        """The offset of the next valid header at any alignment; without one, where to search in the next block."""
        shift, limit = self._block.shift, self._block.end
        if (found := find_header(self._block.buffer, at - shift, limit - shift)) >= 0:
            self._lose(until=found + shift)
            return found + shift
        return self._file.size if limit >= self._file.size else max(at, limit - BLOCK + 1)

    def _lose(self, until: int) -> None:
        """Record the bytes from the start of the damage to ``until`` as lost."""
        assert self._lost is not None
        offset, why = self._lost
        self._lost = None
        self._damage = Damage(offset, until - offset, why)
        self.report.damages.append(self._damage)
        self._unresolved.append(self._damage)
        if self._open is not None:
            self._open.damages.append(self._damage)
            self._prefix = _NO_PREFIX  # so that _enter is called for the next member

    def _pass_gap(self, *, inside: bool) -> None:
        """Handle zero blocks that are followed by members.

        Zeros that fill the record are the end of an archive to which another one was appended.  Others may have
        replaced members, so they count as damage.

        Args:
            inside: Whether the zeros are inside the current sample.
        """
        begin, end = self._zeros
        ends_archive = end - begin >= 2 * BLOCK and (end - self._archive) % RECORD == 0
        self._archive = end
        if ends_archive and not inside:
            return
        self._damage = Damage(begin, end - begin, "zero blocks where members should be", explained=True)
        if self._open is not None:
            self._open.damages.append(self._damage)

    def _note_gap(self) -> None:
        if self._zeros[0] >= 0:
            self.report.gaps.append(self._zeros[0])

    def _finish(self) -> None:
        """At the end of the file, record what is missing and end the last sample."""
        size = self._file.size
        ended = self._zeros[0] >= 0
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
        while self._open is not None:
            self._close()
        self._resolve(None)


def _cut_text(name: bytes, missing: int) -> str:
    return f"{_quoted(name)} is cut: {missing:,} of its bytes are missing"


def _swallows_text(name: bytes) -> str:
    return f"{_quoted(name)} reaches over the header of another member: bytes of it are missing"


def _quoted(name: bytes) -> str:
    return repr(name.decode("utf-8", "replace"))


def _last_member(span: SampleSpan) -> Member:
    """The member that begins last, among the sample's own and the foreign ones."""
    return max((*span.members[-1:], *span.foreign[-1:]), key=lambda member: member.start)


@lru_cache(1024)
def _suffix_text(raw: bytes) -> str | None:
    return None if b"/" in raw else raw.decode("utf-8", "surrogateescape").lower()
