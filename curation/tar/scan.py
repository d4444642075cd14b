"""Scans a tar in one sequential pass, and finds its samples and its damage.

Blocks are read in order into fixed buffers, and headers are parsed in these buffers, without a copy.

A shard may come from any source and may be damaged.  Damage never ends a scan: it continues at the next valid header,
which is recognised by its magic and its checksum, at any offset.  Lost data is reported as a torn sample, so that it is
counted:

- A member that is cut off, that has lost bytes or into which bytes were inserted is **suspect**: it is not one of its
  sample's members, and the sample is torn.  A member that has lost bytes extends over the headers after it, so the
  next header is also searched inside the member before any damage and before zero blocks.  If the member has lost
  exactly as many bytes as whole members behind it have, no header is missing; so the magic of headers is looked for at
  the blocks of all members.  A tar that is stored as a member is no damage: its headers lead to its own end.
- A sample next to damage is torn if it lacks a kind of member that all complete samples around it have (where there is
  none: an image, a txt and a json), because its first or last members may be lost.
- Damage that no torn sample explains counts as a torn sample with the key ``@<offset>`` and without members.
- Zero blocks that are followed by members are skipped and belong to no sample.
- A member with an odd header (``headers``) is one that readers read otherwise or not at all.  It is a member of its
  sample if its header can be written again, and otherwise it is suspect; without a key it is left out.
- If the members of a sample come again directly after it, they are not among its members: the first of each counts.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, repeat
from typing import Final

from curation import PROGRAM
from curation.storage.urls import Source
from curation.tar.blocks import Block, Blocks, FileBlocks
from curation.tar.headers import (
    BLOCK,
    GLOBAL,
    MAX_NAME_BYTES,
    RECORD,
    REGULAR,
    ZERO_BLOCK,
    BadHeader,
    Member,
    find_header,
    parse_block,
    parse_member,
    parse_special,
    split_name,
)
from curation.tar.runs import Alike, End, Row, alike_of, run_of
from curation.tar.sources import open_blocks
from curation.tar.swallowed import HeaderSearch, has_magic, is_archive, marks
from curation.threads import BackgroundCall

# What to do if the members of one sample were found at two places.
TOGETHER: Final = f"if they are one whose members do not stand together: {PROGRAM} fsck TARS --repair DIR"
IMAGE_SUFFIXES: Final = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl", "jp2")
)


_NEIGHBOURS: Final = 64  # complete samples that tell which members a sample has: not all have the same
_FEW_NEIGHBOURS: Final = 8
_EXPECTED_KINDS = frozenset(("image", "txt", "json"))  # DataComp's, until the shard's own are known
_USUAL_END_BYTES = 64 << 10  # tar pads to 10 kB by default


_NONZERO = re.compile(rb"[^\0]")


_NO_HEADER = "no header where one is due: "
_NO_PREFIX = b"\0"  # no member's name begins with it
_FAR: Final = 1 << 63  # behind every mark


class SampleSpan:
    """The place of a sample, from byte ``start`` to byte ``end``.  Only damage and zero blocks are between two spans.

    Attributes:
        key: The sample's key; "" for members that come before any sample.
        members: Its undamaged members, in the shard's order.
        foreign: Members without a key between them, such as folders and global pax headers.
        torn: What happened to the sample; "" if it is complete.
        refused: Why no stage may keep it although it is complete, as (reason, detail): readers would stop at it.
        surplus: How many further copies of its members stood behind them; they are not among ``members``.
        verbatim: Whether its bytes from ``start`` to ``end`` are its members as readers read them, and nothing else.
        suspect: Whether a damaged member was removed from ``members``.
        repeated: Whether an earlier sample of the shard that is not torn has the same key.
        damages: The damage inside the sample and next to it.
        alike: What its members have in common with those of the sample before it; None if it was not parsed in a run
            (``runs``), or if it has other members after all.
    """

    __slots__ = (
        *("_members", "_row", "alike", "damages", "end", "foreign", "key", "refused", "repeated", "start"),
        *("surplus", "suspect", "torn", "verbatim"),
    )

    def __init__(self, key: str, start: int, end: int, members: list[Member] | None = None) -> None:
        self.key, self.start, self.end = key, start, end
        self._members: list[Member] | None = [] if members is None else members
        self.foreign: list[Member] = []
        self.torn = ""
        self.suspect = self.repeated = False
        self.refused: tuple[str, str] | None = None
        self.surplus = 0
        self.verbatim = True
        self.damages: list[Damage] = []
        self.alike: Alike | None = None
        self._row: tuple[Row, Alike] | None = None

    @classmethod
    def of_run(cls, key: str, row: Row, alike: Alike) -> SampleSpan:
        """A sample that was parsed in a run.  Its members are made when they are asked for: most samples only stay."""
        span = cls(key, row[1], row[2])
        span._members, span._row, span.alike = None, (row, alike), alike
        return span

    @property
    def members(self) -> list[Member]:
        if (members := self._members) is None:
            assert self._row is not None
            (key, start, _, places), alike = self._row
            members = self._members = alike.members(key, start, places)
        return members

    @members.setter
    def members(self, members: list[Member]) -> None:
        self._members, self.alike = members, None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Those of its members, in their order."""
        return self.alike.suffixes if self.alike is not None else tuple([member.suffix for member in self.members])

    def hit(self, damage: Damage) -> None:
        """Note damage inside the sample or next to it."""
        self.damages.append(damage)
        self.verbatim = False

    @property
    def own_extents(self) -> list[tuple[int, int]]:
        """The byte ranges of the members with its key.  Adjacent members share one range."""
        if self.verbatim and not self.foreign:
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


class Run:
    """Adjacent samples that were parsed in a run (``runs``).  They are complete and verbatim, there is nothing between
    them, and no sample before them has one of their keys.

    Attributes:
        keys: Theirs, in the shard's order; at least one.
    """

    __slots__ = ("_rows", "alike", "keys")

    def __init__(self, keys: list[str], rows: list[Row], alike: Alike) -> None:
        """rows: of each sample, as its key.  alike: what they have in common."""
        self.keys, self._rows, self.alike = keys, rows, alike

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def start(self) -> int:
        return self._rows[0][1]

    @property
    def end(self) -> int:
        return self._rows[-1][2]

    @property
    def places(self) -> list[tuple[str, int, int]]:
        """Of each sample the key, the start and the end."""
        return [(key, row[1], row[2]) for key, row in zip(self.keys, self._rows, strict=True)]

    @property
    def spans(self) -> list[SampleSpan]:
        """The samples, one by one."""
        return [SampleSpan.of_run(key, row, self.alike) for key, row in zip(self.keys, self._rows, strict=True)]

    def without(self, keys: Collection[str]) -> Iterator[Run | SampleSpan]:
        """Yield the samples in their order: those with one of ``keys`` alone, and the others in runs."""
        begin = 0
        for number in [number for number, key in enumerate(self.keys) if key in keys]:
            if begin < number:
                yield self._part(begin, number)
            yield SampleSpan.of_run(self.keys[number], self._rows[number], self.alike)
            begin = number + 1
        if begin == 0:
            yield self
        elif begin < len(self.keys):
            yield self._part(begin, len(self.keys))

    def _part(self, begin: int, end: int) -> Run:
        return Run(self.keys[begin:end], self._rows[begin:end], self.alike)


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
    doubled: int = 0  # samples that come several times in a row
    odd_headers: int = 0
    first_odd: str = ""  # what is known of the first odd header
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
                f"{self.path}: {self.odd_texts:,} .txt members contain bytes that are not UTF-8 (another encoding "
                "without a byte order mark?); U+FFFD stands for those bytes"
            )
        if self.doubled:
            lines.append(f"{self.path}: {self.doubled:,} samples come several times in a row; the first one counts")
        if self.odd_headers:
            lines.append(
                f"{self.path}: {self.odd_headers:,} headers that programs read in different ways: stage 04 "
                f"writes them again; the first one: {self.first_odd}"
            )
        return lines


class Window:
    """Adjacent samples, and the part of the file that contains them.

    ``view``, ``pieces`` and ``read`` return the bytes of its spans (see ``Block``).  The bytes of a very large sample
    are not in memory and are read again.  A window stays valid until the next one is asked for, and not longer.

    Attributes:
        parts: The samples, in the shard's order: in runs where they are alike, else one by one.
    """

    __slots__ = ("_spans", "parts", "pieces", "read", "view")

    def __init__(self, parts: Sequence[SampleSpan | Run], block: Block) -> None:
        self.parts = parts
        self._spans: list[SampleSpan] | None = None
        self.view, self.pieces, self.read = block.view, block.pieces, block.read

    @property
    def spans(self) -> list[SampleSpan]:
        """The samples, one by one."""
        if (spans := self._spans) is None:
            spans = self._spans = []
            for part in self.parts:
                if isinstance(part, Run):
                    spans += part.spans
                else:
                    spans.append(part)
        return spans


class TarScan:
    """One pass over a tar: ``for window in scan.windows(): for span in window.spans: …``.

    A thread reads and parses one window ahead, so that reading and parsing overlap with the caller's work.  The memory
    is fixed, whatever the size of the file.

    Args:
        source: A tar on a filesystem, a folder of loose files, or what ``curation.storage.urls`` can read.  The offsets
            in one that is compressed with gzip are those of the tar inside.
        report: Receives what is found besides samples; default: a new one.
        ahead: Whether a thread reads a local tar ahead.  Without it the kernel alone does so, as for ``cp``: this takes
            less CPU time, and is as fast where the caller only copies bytes.
    """

    def __init__(self, source: str | Source, report: TarReport | None = None, *, ahead: bool = True) -> None:
        self.path = str(source)
        self._source, self._ahead = source, ahead
        self.report = report if report is not None else TarReport()
        self.report.path = self.path
        self._file: Blocks
        self._block: Block
        self._next = 0  # where the next header should be
        self._open: SampleSpan | None = None
        self._prefix = _NO_PREFIX  # the current sample's key and the dot
        self._keys: set[int] = set()  # hashes: a shard may hold a million keys
        self._whole: deque[SampleSpan] = deque(maxlen=_NEIGHBOURS)  # the last complete samples
        self._lost: tuple[int, str] | None = None  # start and kind of the damage, while the next header is searched
        self._damage: Damage | None = None  # the last one, until the sample after it begins
        self._unresolved: list[Damage] = []
        self._suspects: dict[str, str] = {}  # of the current sample: suffix → what happened to the member
        self._search: HeaderSearch
        self._looked = 0  # headers' marks were looked for up to here
        self._zeros = (-1, -1)  # the last run of zero blocks
        self._archive = 0  # start of the current archive, if several were concatenated
        self._done: list[SampleSpan | Run] = []

    def windows(self) -> Iterator[Window]:
        """Yield the samples in the shard's order, a few megabytes at a time.

        Raises:
            ShardError: The file cannot be read, or it is no tar.
        """
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open_blocks(self._source))
            beside = self._file.ahead = self._ahead or not isinstance(self._file, FileBlocks)
            ahead = stack.enter_context(contextlib.closing(BackgroundCall[Window]("read-ahead", beside=beside)))
            stack.callback(self._file.cancel)  # runs first at the end, so that nobody waits for unneeded bytes
            self._block, self._search = self._file.block, HeaderSearch(self._file)
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
            assert member is not None
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
        at = self._look_back(self._next) if self._lost is None else self._resume(self._next)
        prefix, span = self._prefix, self._open
        found, mark, runs = self._marks(at), -1, True
        while at + BLOCK <= limit:
            data = at + BLOCK
            try:
                name, length, mtime, kind, odd = parse_block(buffer, at - shift)
                if kind not in REGULAR:
                    special = parse_special(buffer, at - shift, limit - shift)
                    if special is None and limit < size:
                        break  # it continues in the next block, and is parsed again from its start
                    if special is None:
                        raise BadHeader("the file ends in it")
                    name, length, mtime, kind, header_bytes, odd = special
                    data = at + header_bytes
            except BadHeader as error:
                at = self._not_a_header(at, str(error))
                prefix = self._prefix
                if at < self._block.begin:
                    break  # back to a header that is no longer in memory
                found, mark = self._marks(at), -1
                continue
            if data + length > size:
                at = self._cut(at, data, name, length, size)
                prefix = self._prefix
                if at < self._block.begin:
                    break
                found, mark = self._marks(at), -1
                continue
            suffix = _suffix_text(name[len(prefix) :]) if name.startswith(prefix) else None
            if suffix is None and runs and (run := self._run(at)) is not None:
                at, why = run
                if why is End.BLOCK and limit < size:
                    break  # the next sample may be one of the run, and be complete in the next block
                prefix, span, found, mark = self._prefix, self._open, self._marks(at), -1
                runs = why is not End.INSIDE  # else a crafted block could be parsed many times
                continue
            if suffix is None or kind == GLOBAL:
                name = name if kind != GLOBAL else b""  # its name is that of no file
                suffix = self._enter(name, at)
                prefix, span = self._prefix, self._open
            assert span is not None
            end = span.end = data + length + -length % BLOCK
            member = Member(name, suffix or "", at, data, length, end, kind in REGULAR, mtime, odd)
            at = end
            if odd and not self._may_be_written_anew(span, member):
                at = self._leave_out(span, member, suffix)
                prefix = self._prefix
                continue
            (span.foreign if suffix is None else span.members).append(member)
            span.alike = None
            while mark < data:
                mark = next(found, _FAR)
            if mark < end and (inside := self._swallowed(member, mark, found)) is not None:
                at = self._take_out(span, member, _swallows_text(name), end, inside)
                prefix = self._prefix
                if at < self._block.begin:
                    break
                found, mark = self._marks(at), -1
        self._next, self._looked = at, limit

    def _run(self, at: int) -> tuple[int, End] | None:
        """Take the samples from ``at`` on that are like the current one; it is complete if the first of them is.

        Returns:
            Where to continue, and why the run ended; None if there is none.
        """
        last = self._open
        if last is None or not last.key or last.damages or self._zeros[1] == at or self._lost or self._damage:
            return None
        if self._suspects or self._unresolved or (alike := last.alike or alike_of(last.members, last.key)) is None:
            return None
        rows, why = run_of(self._block, at, alike, last.key.encode("utf-8", "surrogateescape"))
        if not rows:
            return (at, why) if why is End.INSIDE else None
        self._close()
        self.report.samples += len(rows)
        keys = [row[0].decode("utf-8", "surrogateescape") for row in rows]
        self._prefix = rows[-1][0] + b"."
        self._open = span = SampleSpan.of_run(keys.pop(), rows.pop(), alike)  # its next member may come behind the run
        if rows:
            run = Run(keys, rows, alike)
            marks = set(map(hash, keys))
            if len(marks) == len(keys) and self._keys.isdisjoint(marks):
                self._keys |= marks
                self._done.append(run)
            else:
                self._done += map(self._begun, run.spans)
            one = SampleSpan.of_run(keys[-1], rows[-1], alike)
            self._whole.extend(repeat(one, min(len(rows), _NEIGHBOURS)))  # what counts of them is alike
        self._begun(span)
        return span.end, why

    def _begun(self, span: SampleSpan) -> SampleSpan:
        """Note whether an earlier sample has the key of one that begins.  Returns the sample."""
        mark = hash(span.key)
        if mark in self._keys:
            span.repeated = True
            self.report.repeated_keys += 1
        self._keys.add(mark)
        return span

    def _marks(self, at: int) -> Iterator[int]:
        """The offsets in the block, from a header on, at which there may be headers."""
        return marks(self._block, at, self._block.end, at)

    def _swallowed(self, member: Member, mark: int, more: Iterator[int]) -> int | None:
        """The offset of the first header that a member has swallowed.

        mark, more: the offsets at which there may be headers, the first of them inside the member.
        """
        while mark < member.end:
            if has_magic(self._block, mark):
                return self._search.landing(member)
            mark = next(more, _FAR)
        return None

    def _look_back(self, at: int) -> int:
        """Look for headers in the last member, if a part of it was not in memory before.  Returns where to continue."""
        looked = self._looked
        if at <= looked or at > self._file.size:
            return at
        span, member = self._open, self._member_before(at)
        if not span or not member:
            return at
        found = marks(self._block, max(member.data, looked - BLOCK), at, at)
        inside = self._swallowed(member, next(found, _FAR), found)
        if inside is None and looked < self._block.begin and not self._is_usual_at(at):
            inside = self._search.landing(member)
        return at if inside is None else self._take_out(span, member, _swallows_text(member.name), at, inside)

    def _member_before(self, at: int) -> Member | None:
        """The member that ends at ``at``."""
        member = _last_member(self._open) if self._open is not None else None
        return member if member is not None and member.end == at else None

    def _is_usual_at(self, at: int) -> bool:
        """Whether the member at ``at`` is the one that usually comes next.  A large member is not read in full to look
        for headers inside it, unless another one comes."""
        if self._open is None or not self._whole:
            return False
        try:
            following = parse_member(self._block.buffer, at, self._block.end, self._block.shift)
        except BadHeader:
            return True  # this is damage, after which the member is searched
        suffixes = [member.suffix for member in self._whole[-1].members]
        here = len(self._open.members)
        if following is None or [member.suffix for member in self._open.members] != suffixes[:here]:
            return False
        return here == len(suffixes) or following.suffix == suffixes[here]

    def _may_be_written_anew(self, span: SampleSpan, member: Member) -> bool:
        """Whether a member with an odd header remains a member, because its header can be replaced."""
        if not member.regular or len(member.name) > MAX_NAME_BYTES:
            return False
        span.verbatim = False
        self.report.odd_headers += 1
        where = f"at byte {member.start:,}, {_quoted(member.name)}: {member.odd}"
        self.report.first_odd = self.report.first_odd or where
        if b"\0" in member.name:
            span.refused = span.refused or ("unsafe_name", member.odd)
        return True

    def _leave_out(self, span: SampleSpan, member: Member, suffix: str | None) -> int:
        """Handle a member whose odd header cannot be written again.  Returns where to continue."""
        what = _quoted(member.name) if member.name else "a global header"
        why = f"{what} is not read in the same way by every program: {member.odd}"
        if suffix is not None:
            self._suspects.setdefault(suffix, why)
        if member.name and member.data > member.start + BLOCK:
            span.end = member.start
            self._lost = (member.start, why)
            return self._resume(member.start + BLOCK)  # without its extended header it may be sound
        damage = Damage(member.start, member.end - member.start, why, explained=True)
        self.report.damages.append(damage)
        span.hit(damage)
        return member.end

    def _enter(self, name: bytes, at: int) -> str | None:
        """Begin the sample to which a member belongs, and end the previous one.

        Returns:
            The member's suffix; None if it has no key, as a global pax header, which has no name.
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
        if self._open is not None and key != self._open.key:
            self._close()
        if self._open is None:
            self._open = span = SampleSpan(key, at, at)
            self.report.samples += 1
            self._begun(span)
            if self._damage:
                span.hit(self._damage)
        self._damage = None
        self._prefix = raw_key + b"."
        return _suffix_text(raw_suffix)

    def _close(self) -> None:
        """End the current sample: decide whether it is torn, and add it to the window."""
        span, self._open, self._prefix = self._open, None, _NO_PREFIX
        if span is None:
            return
        if self._suspects:
            sound = {member.suffix for member in span.members}  # if a suffix is here too, the damage was a stray header
            lost = [why for suffix, why in self._suspects.items() if suffix not in sound]
            span.torn, span.suspect = next(iter(lost), ""), bool(lost)
            self._suspects.clear()
            for damage in () if lost else span.damages:
                damage.explained = True
        if len(span.members) > len({member.suffix for member in span.members}):
            self._take_first_copy(span)
        if span.key and span.damages:
            if not span.torn and not span.kinds >= self._usual_kinds(span.end):
                span.torn = span.damages[0].detail
            if span.torn:
                for damage in span.damages:
                    damage.explained = True
                if not span.repeated:
                    self._keys.discard(hash(span.key))  # a later complete sample does not count as repeated
        elif span.key and not span.refused:
            self._whole.append(span)
        self._done.append(span)
        if self._unresolved:
            self._resolve(self._damage)

    def _usual_kinds(self, behind: int) -> frozenset[str]:
        """The kinds of members that complete samples of the shard have; without one, those of DataComp's samples."""
        whole = [*self._whole]
        if len(whole) < _FEW_NEIGHBOURS:
            whole += islice(self._samples_ahead(behind), _FEW_NEIGHBOURS)
        return frozenset.intersection(*(span.kinds for span in whole)) if whole else _EXPECTED_KINDS

    def _samples_ahead(self, at: int) -> Iterator[SampleSpan]:
        """The samples in memory from ``at`` on that have no member twice, and another one behind them."""
        block, span = self._block, SampleSpan("", at, at)
        with contextlib.suppress(BadHeader):
            while block.begin <= at and (member := parse_member(block.buffer, at, block.end, block.shift)) is not None:
                at = member.end
                if (split := split_name(member.name)) is None:
                    continue
                key = split[0].decode("utf-8", "surrogateescape")
                if key != span.key:
                    suffixes = {member.suffix for member in span.members}
                    if span.key and len(suffixes) == len(span.members):
                        yield span
                    span = SampleSpan(key, member.start, member.end)
                span.members.append(member)

    def _take_first_copy(self, span: SampleSpan) -> None:
        """Leave only the first of each member, if the further ones are copies that stand behind them."""
        whole = self._whole[-1] if self._whole else next(self._samples_ahead(span.end), None)
        usual = [member.suffix for member in whole.members] if whole else []
        first = first_copy(span.members, usual)
        if first is not None:
            span.surplus, span.members, span.verbatim = len(span.members) - len(first), first, False
            self.report.doubled += 1
            return
        ((suffix, count),) = Counter(member.suffix for member in span.members if member.regular).most_common(1) or [
            ("", 0)
        ]
        if count > 1:  # webdataset raises an error there, and reads no further
            span.refused = span.refused or ("duplicate_member", f"it has several members .{suffix}")

    def _resolve(self, pending: Damage | None) -> None:
        """Count damage between complete samples as a lost sample.

        Args:
            pending: Damage after which no sample was read yet.
        """
        for damage in self._unresolved:
            if damage is not pending and not damage.explained:
                damage.explained = True
                self.report.samples += 1
                lost = SampleSpan(f"@{damage.offset}", damage.offset, damage.offset)
                lost.torn = damage.detail
                self._done.append(lost)
        self._unresolved = [damage for damage in self._unresolved if not damage.explained]

    def _take(self) -> Window:
        done, self._done = self._done, []
        return Window(done, self._block)

    # ---- damage

    def _not_a_header(self, at: int, why: str) -> int:
        """Handle an offset without a header: the end of the archive, or damage.  Returns where to continue."""
        buffer, shift, limit = self._block.buffer, self._block.shift, self._block.end
        span = self._open
        member = self._member_before(at)
        if buffer.startswith(ZERO_BLOCK, at - shift):
            if span and member and (inside := self._search.before_zeros(member, at)) is not None:
                return self._take_out(span, member, _swallows_text(member.name), at, inside)
            nonzero = _NONZERO.search(buffer, at - shift, limit - shift)
            until = limit if nonzero is None else nonzero.start() + shift
            until -= (until - at) % BLOCK
            if self._zeros[1] != at:
                self._note_gap()
                self._zeros = (at, at)
            self._zeros = (self._zeros[0], until)
            self._prefix = _NO_PREFIX  # so that _enter is called for the member after the zeros
            return until
        if span and member:
            inside = self._search.inside(member, at)
            if inside is not None:
                return self._take_out(span, member, _swallows_text(member.name), at, inside)
            rest = self._block.read(member.data + member.size, at - member.data - member.size)
            if rest.strip(b"\0") and self._search.shifted(member):
                text = f"{_quoted(member.name)}: its bytes have been shifted"
                return self._take_out(span, member, text, at)
        self._lost = (at, _NO_HEADER + why)
        return self._resume(at + 1)

    def _cut(self, at: int, data: int, name: bytes, length: int, size: int) -> int:
        """Handle an incomplete member at ``at``: its sample is torn, whatever its other members are."""
        why = _cut_text(name, data + length - size)
        if (suffix := self._enter(name, at)) is not None:
            self._suspects[suffix] = why
        self._lost = (at, why)
        if not is_archive(name):
            return self._resume(at + BLOCK)  # the size may be that of an extended header, and the next one sound
        inside = self._search.inside(Member(name, "", at, data, length, data + length, True, b"0"), size)
        if inside is None:
            return size
        self._lose(until=inside)
        return inside

    def _take_out(self, span: SampleSpan, member: Member, why: str, behind: int, inside: int | None = None) -> int:
        """Treat the current sample's last member as suspect, as if its header were damage.  Returns where to continue.

        Args:
            behind: The end of the member according to its header.
            inside: The offset of a header inside the member, if one is known.
        """
        span.alike = None
        if span.members and span.members[-1] is member:
            del span.members[-1]
            self._suspects.setdefault(member.suffix, why)
        else:
            del span.foreign[-1]
        span.end = member.start
        self._lost = (member.start, why)
        if inside is None:
            inside = self._search.inside(member, behind)
        if inside is None:
            return self._resume(behind)
        self._lose(until=inside)
        return inside

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
            self._open.hit(self._damage)
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
            self._open.hit(self._damage)

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
                self._open.hit(Damage(size, 0, "the file ends without an end of archive", explained=True))
        self._damage = None
        self._close()
        self._resolve(None)


def _cut_text(name: bytes, missing: int) -> str:
    return f"{_quoted(name)} is cut: {missing:,} of its bytes are missing"


def _swallows_text(name: bytes) -> str:
    return f"{_quoted(name)} reaches over the header of another member: bytes of it are missing"


def _quoted(name: bytes) -> str:
    return repr(name.decode("utf-8", "replace"))


def _last_member(span: SampleSpan) -> Member | None:
    """The member that begins last, among the sample's own and the foreign ones."""
    return max((*span.members[-1:], *span.foreign[-1:]), key=lambda member: member.start, default=None)


def first_copy(members: list[Member], usual: list[str]) -> list[Member] | None:
    """The members of a sample of which some come again under the same name; None if it is not clear which count.

    It is clear if all members come again and again in one order, so that the first of each count; or if they stand in a
    row in the order that the samples of the shard usually have.

    usual: The suffixes of the last complete sample, in its order.
    """
    suffixes = [member.suffix for member in members]
    count = len(set(suffixes))
    if len({member.name for member in members}) != count:
        return None  # a.jpg and a.JPG
    for begin in range(len(members) - count + 1):
        if suffixes[begin : begin + count] == usual:
            return members[begin : begin + count]
    rounds, rest = divmod(len(members), count)
    return members[:count] if rest == 0 and suffixes == suffixes[:count] * rounds else None


@lru_cache(1024)
def _suffix_text(raw: bytes) -> str | None:
    return None if b"/" in raw else raw.decode("utf-8", "surrogateescape").lower()
