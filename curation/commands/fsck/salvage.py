"""Every whole sample of a damaged tar, into a new one: its members byte for byte, with their headers and padding.

The pass that the stages make over a tar trusts a member's size.  Where bytes are missing from the middle of a member,
that size reaches over the headers of the members behind it, which are whole.  So here every header of the file is found
first, wherever it stands, by its magic and its checksum; then the file is walked, and a member whose end is not
followed by a header, by zeros or by the end of the file loses what it reached over.
"""

from __future__ import annotations

import bisect
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from curation.commands.fsck.samples import Kinds, sample_problems
from curation.errors import ShardError
from curation.jsonio import clean_text, dump_json
from curation.storage.files import AtomicFile, storage_error, write_whole
from curation.tar.headers import (
    BLOCK,
    EXTENSIONS,
    MAX_EXTENSION_BYTES,
    RECORD,
    REGULAR,
    ZERO_BLOCK,
    BadHeader,
    Member,
    parse_header,
    parse_special,
    split_name,
)
from curation.tar.scan import SampleSpan

_MAGIC, _MAGIC_AT = b"ustar", 257


_CHECKSUM_AT, _OCTAL = 148, b"01234567 \0"


_READ_BYTES: Final = 4 << 20


_SLACK_BYTES: Final = MAX_EXTENSION_BYTES + 64 * BLOCK  # the longest header, with its extensions


_MAX_LISTED = 10_000  # samples that the report names; the rest are counted


_MAX_PARTS: Final = 32  # of a run with doubles; real samples have three members


_NONZERO = re.compile(rb"[^\0]")


@dataclass(slots=True)
class _Left:
    counts: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, str]] = field(default_factory=list)

    def add(self, key: str, reason: str, detail: str) -> None:
        self.counts[reason] += 1
        if len(self.listed) < _MAX_LISTED:
            self.listed.append({"key": key, "reason": reason, "detail": clean_text(detail)[:400]})


def salvage(path: Path, shard_id: str, folder: Path, found: Mapping[str, int], *, images: bool) -> int:
    """Write ``<folder>/<shard>.tar``, headers and data as they are, and, last, ``<shard>.salvage.json``, which tells
    what was saved and what was not; returns how many samples were saved.

    found: what is wrong with the tar, for the report.  images: a picture that cannot be decoded is not saved.
    Raises InfrastructureError where the folder cannot be written, ShardError where the tar cannot be read.
    """
    began = time.time()
    left = _Left()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _Bytes(path) as source, AtomicFile(folder / f"{shard_id}.tar", secrets.token_hex(8)) as output:
            saved = 0
            for span in _whole_samples(source, left, images=images):
                for member in span.members:
                    end = member.data + member.size
                    for begin in range(member.start, end, _READ_BYTES):
                        output.write(source.read(begin, min(_READ_BYTES, end - begin)))
                    output.write(bytes(member.end - end))  # bytes that are none of its own may stand there
                saved += 1
            output.write(bytes(2 * BLOCK + -(output.tell() + 2 * BLOCK) % RECORD))
        output.move_into_place()
        report: dict[str, Any] = {
            "shard": shard_id,
            "source": str(path),
            "source_size": source.size,
            "outputs": [{"path": output.final.name, "size": output.size, "digest": output.digest}],
            "counts": {"in": saved + left.counts.total(), "kept": saved, "failed": dict(left.counts.most_common())},
            "left_out": left.listed,
            "found": dict(found),
            "finished": round(time.time(), 3),
            "seconds": round(time.time() - began, 3),
        }
        write_whole(folder / f"{shard_id}.salvage.json", dump_json(report, indent=True))
    except OSError as error:
        raise storage_error(folder, error) from error
    return saved


def _whole_samples(source: _Bytes, left: _Left, *, images: bool) -> Iterator[SampleSpan]:
    """The samples without a fault, in order; the others are put on the list.

    Of several runs of members with one key the first whole one is taken, and where none is, what they have together.
    """
    runs = _runs(_members(source))
    kinds = Kinds()
    by_key: dict[str, list[SampleSpan]] = {}
    for run in runs:
        by_key.setdefault(run.key, []).append(run)
        if not run.torn:
            kinds.add(run.key, run.kinds)
    usual = kinds.usual()

    def fault(span: SampleSpan) -> tuple[str, str] | None:
        if lacking := usual - span.kinds:
            return "incomplete_sample", f"it has no {', '.join(sorted(lacking))}"
        problems = sample_problems(span, lambda m: source.read(m.data, m.size), images=images)
        return problems[0] if problems else None

    def whole(span: SampleSpan) -> SampleSpan | None:
        return None if span.torn else next((part for part in _parts(span) if fault(part) is None), None)

    taken: set[str] = set()
    for run in runs:
        if run.key in taken:
            continue
        others = by_key[run.key]
        found = whole(run)
        if found is None and others[-1] is not run:
            continue  # a later one may be
        if found is None and len(others) > 1 and fault(joined := _joined(others)) is None:
            found = joined
        taken.add(run.key)
        if found is not None:
            yield found
        elif torn := next((other.torn for other in others if other.torn), ""):
            left.add(run.key, "torn_sample", torn)
        else:
            left.add(run.key, *(fault(run) or ("incomplete_sample", "")))


def _runs(members: Iterator[tuple[Member, str]]) -> list[SampleSpan]:
    """Members that stand together and share a key; one that is torn by itself."""
    runs: list[SampleSpan] = []
    for member, torn in members:
        split = split_name(member.name)
        if split is None:
            continue
        key = split[0].decode("utf-8", "surrogateescape")
        if not runs or runs[-1].key != key or torn or runs[-1].torn:
            runs.append(SampleSpan(key, member.start, member.end, torn=torn))
        runs[-1].members.append(member)
    return runs


def _parts(span: SampleSpan) -> Iterator[SampleSpan]:
    """A run in which no suffix comes twice; of one in which one does, the longest such parts from each of its members
    on: copies of members may stand right before a sample."""
    suffixes = [member.suffix for member in span.members]
    if len(set(suffixes)) == len(suffixes):
        yield span
        return
    for begin in range(min(len(suffixes), _MAX_PARTS)):
        seen: set[str] = set()
        members: list[Member] = []
        for member in span.members[begin:]:
            if member.suffix in seen:
                break
            seen.add(member.suffix)
            members.append(member)
        yield SampleSpan(span.key, members[0].start, members[-1].end, members)


def _joined(runs: list[SampleSpan]) -> SampleSpan:
    """One sample of the members of runs that are whole; of members with one suffix the first."""
    members: dict[str, Member] = {}
    for run in runs:
        for member in run.members if not run.torn else ():
            members.setdefault(member.suffix, member)
    return SampleSpan(runs[0].key, runs[0].start, runs[-1].end, [*members.values()])


def _members(source: _Bytes) -> Iterator[tuple[Member, str]]:
    """Every member that has a header, in order, and why it is not whole, empty for one that may be."""
    headers = _all_headers(source)
    at = 0
    while at < source.size:
        member = source.member(at)
        if member is None:
            at = _next_place(source, headers, at)
            continue
        inner = bisect.bisect_left(headers, member.data)
        nested = headers[inner] if inner < len(headers) and headers[inner] < member.end else None
        torn = ""
        if member.data + member.size > source.size:
            torn = f"{member.text_name} is cut"
        elif not _goes_on(source, member.end):
            if nested is not None:
                torn = f"{member.text_name} reaches over the header of another member: bytes of it are missing"
            elif source.read(member.data + member.size, member.end - member.data - member.size).strip(b"\0"):
                torn = f"{member.text_name}: its bytes have been shifted"
        elif nested is not None and _chain_ends_at(source, nested, member.end):
            torn = f"{member.text_name} reaches over whole members: bytes of it are missing"
        yield member, torn
        at = nested if torn and nested is not None else member.end


def _goes_on(source: _Bytes, at: int) -> bool:
    """Whether what may follow a member stands at ``at``: a header, zeros, or the end of the file."""
    if at >= source.size:
        return at == source.size
    return source.member(at) is not None or source.read(at, BLOCK) == ZERO_BLOCK


def _chain_ends_at(source: _Bytes, at: int, end: int) -> bool:
    """Whether members follow one another from ``at`` to exactly ``end``."""
    while at < end:
        member = source.member(at)
        if member is None:
            return False
        at = member.end
    return at == end


def _next_place(source: _Bytes, headers: list[int], at: int) -> int:
    """The next header behind what is none: zeros are passed over, else the list knows."""
    if source.read(at, BLOCK) == ZERO_BLOCK:
        return at + BLOCK if source.member(at + BLOCK) is not None else source.next_nonzero(at)
    following = bisect.bisect_right(headers, at)
    return headers[following] if following < len(headers) else source.size


def _all_headers(source: _Bytes) -> list[int]:
    """Where headers with the magic and a right checksum stand, at any alignment; those of a member's long name and its
    own count as one."""
    found: list[int] = []
    begin = 0
    while begin < source.size:
        data = source.read(begin, _READ_BYTES + BLOCK)
        at = data.find(_MAGIC, _MAGIC_AT)
        while 0 <= at < _READ_BYTES + _MAGIC_AT:
            start = at - _MAGIC_AT
            if start + BLOCK <= len(data) and data[start + _CHECKSUM_AT] in _OCTAL:  # cheap, for bytes made to annoy
                try:
                    parse_header(data, start)
                    found.append(begin + start)
                except BadHeader:
                    pass
            at = data.find(_MAGIC, at + 1)
        begin += _READ_BYTES
    return sorted(set(found))


class _Bytes:
    """A file read at any place, a block kept.  Raises ShardError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin, self._data = 0, b""
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
        self.size = os.fstat(self._descriptor).st_size

    def read(self, start: int, size: int) -> bytes:
        """As far as the file goes."""
        at = start - self._begin
        if at >= 0 and at + size <= len(self._data):
            return self._data[at : at + size]
        try:
            data = os.pread(self._descriptor, max(size, _READ_BYTES), start)
        except OSError as error:
            raise ShardError(f"{self._path}: cannot be read at byte {start:,} ({error.strerror})") from error
        self._begin, self._data = start, data
        return data[:size]

    def member(self, at: int) -> Member | None:
        """The member whose header stands at ``at``; None where none does."""
        block = self.read(at, BLOCK)
        if len(block) < BLOCK or block == ZERO_BLOCK:
            return None
        data = at + BLOCK
        try:
            name, size, mtime, kind = parse_header(block, 0)
            if kind not in REGULAR:
                long = kind in EXTENSIONS or kind == ord("S")
                header = self.read(at, _SLACK_BYTES) if long else block
                special = parse_special(header, 0, len(header))
                if special is None:
                    return None
                name, size, mtime, kind, header_bytes = special
                data = at + header_bytes
        except BadHeader:
            return None
        split = split_name(name)
        suffix = "" if split is None else split[1].decode("utf-8", "surrogateescape").lower()
        return Member(name, suffix, at, data, size, data + size + -size % BLOCK, kind in REGULAR, mtime)

    def next_nonzero(self, at: int) -> int:
        """The block that holds the next byte that is not zero, as seen from ``at``; the file's size where none is."""
        begin = at
        while begin < self.size:
            data = self.read(begin, _READ_BYTES)
            if (found := _NONZERO.search(data)) is not None:
                place = begin + found.start()
                return place - (place - at) % BLOCK
            begin += max(1, len(data))
        return self.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)
