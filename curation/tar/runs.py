"""Parses runs of samples that are alike, with less work for each than ``scan`` needs.

Nearly all samples of a shard have the same kinds of members, in the same order, with the same owner and form of header.
Such samples are **alike**.  All is checked that ``scan`` checks: the checksum of each header, its form and its name,
and that no other header is where a member has its data.  Where a sample is different, the run ends before it, and
``scan`` parses that one with all its rules.

A member may have a pax header that holds its time and nothing else, as webdataset's ``TarWriter`` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from struct import Struct
from typing import Final
from zlib import adler32

from curation.tar.blocks import Block
from curation.tar.headers import (
    BLOCK,
    MAGIC,
    MAGIC_AT,
    Member,
    is_plain_time,
    octal_time,
    pax_bytes,
    similar_blocks,
)

_NAME_BYTES: Final = 100
_REGULAR: Final = ord("0")
_SIZE_AT: Final = 124
_SLASH: Final = ord("/")
_BLANKS: Final = 8 * ord(" ") - 1  # what a checksum counts for itself; Adler-32 begins with 1
# The digits of the size; the byte behind them with the time.
_size_and_time = Struct("11s13s").unpack_from
_MAX_MEMBERS: Final = 64  # of one sample; more are parsed one by one
_FIRST_OF_MAGIC: Final = MAGIC[0]
_PAX: Final = 2 * BLOCK  # a pax header in front of a member's own one: the block that announces it, and its text
_TIME_ALONE: Final = re.compile(rb"(([1-9][0-9]) mtime=([0-9]{1,18})(?:\.[0-9]*)?\n)\0*")


class Alike:
    """What the samples of a run have in common.

    Args:
        members: The members of the sample before the run, in its order.
        key: The bytes of its key.
    """

    __slots__ = ("_kept", "_raw", "fronts", "suffixes")

    def __init__(self, members: Sequence[Member], key: bytes) -> None:
        self._raw = [member.name[len(key) :] for member in members]  # with the dot
        self._kept: dict[tuple[int, bytes], list[tuple[int, bytes]]] = {}
        self.fronts = [member.data - member.start - BLOCK for member in members]  # bytes before their own headers
        self.suffixes = tuple([member.suffix for member in members])

    def fields(self, key_bytes: int, owner: bytes) -> list[tuple[int, bytes]]:
        """For each member the bytes before its own header, and what is in this one between a key of this length and
        the size; empty if a name does not fit there."""
        found = self._kept.get((key_bytes, owner))
        if found is None:
            room = _NAME_BYTES - key_bytes
            fits = all(len(raw) <= room for raw in self._raw)
            fields = [raw.ljust(room, b"\0") + owner for raw in self._raw] if fits else []
            found = self._kept[key_bytes, owner] = list(zip(self.fronts, fields, strict=False))
        return found

    def members(self, key: bytes, start: int, places: Sequence[tuple[int, bytes]]) -> list[Member]:
        """The members of a sample of the run, of which ``places`` is what a ``Row`` has of them."""
        members = []
        for raw, suffix, front, (size, time) in zip(self._raw, self.suffixes, self.fronts, places, strict=True):
            data = start + front + BLOCK
            end = data + size + -size % BLOCK
            field = (octal_time(time) or b"") if front else time[1:]
            members.append(Member(key + raw, suffix, start, data, size, end, True, field))
            start = end
        return members


Row = tuple[bytes, int, int, list[tuple[int, bytes]]]
"""A sample of a run: its key, start and end; of each member the size, and the time field with the byte before it, or
the whole seconds that its pax header gives."""


def alike_of(members: Sequence[Member], key: str) -> Alike | None:
    """What the samples behind this one may have in common with it; None if its members are none of a run."""
    raw = key.encode("utf-8", "surrogateescape")
    stem = raw + b"."
    plain = all(
        member.regular
        and not member.odd
        and member.data - member.start in (BLOCK, BLOCK + _PAX)
        and member.name.startswith(stem)
        for member in members
    )
    distinct = len({member.suffix for member in members}) == len(members)
    return Alike(members, raw) if plain and distinct and 0 < len(members) <= _MAX_MEMBERS else None


class End(Enum):
    """Why a run ended."""

    BLOCK = "the block ends in the next sample"
    SAMPLE = "the next sample is not alike"
    INSIDE = "a member of the next sample has a header in its data"


def run_of(block: Block, at: int, alike: Alike, before: bytes) -> tuple[list[Row], End]:
    """The samples from ``at`` on that are alike and completely in the block, and why no further one is among them.

    Args:
        block: The part of the file that is in memory.
        at: Where the first header should be.
        alike: What the samples should have in common.
        before: The key of the sample before them: a further one of this key belongs to that sample.
    """
    owner, tail, others, prefix = similar_blocks(_REGULAR)
    if others < 0 or prefix:
        return [], End.SAMPLE
    similar = owner, b"0" + tail, others + _REGULAR + _BLANKS
    rows, heads, end = _parse(block, at - block.shift, alike, before, similar)
    if rows and (inside := _other_header(block, heads, rows[0][1], rows[-1][2])) >= 0:
        rows, end = [row for row in rows if row[2] <= inside], End.INSIDE
    return rows, end


def _parse(
    block: Block, at: int, alike: Alike, before: bytes, similar: tuple[bytes, bytes, int]
) -> tuple[list[Row], list[int], End]:
    """``run_of``, but for what is between the headers, whose offsets in the buffer are returned too.

    The function has everything in it because every header of a shard passes here.  It reads only the size and the time
    of each, makes the header that a member of this name would have, and compares the two.

    at: The first header's offset in the buffer, as all offsets here.
    similar: The owner's fields, the bytes from the type flag on, and the sum of these with the checksum's own blanks.
    """
    owner, tail, others = similar
    buffer, shift, limit = block.buffer, block.shift, block.end - block.shift
    rows: list[Row] = []
    heads: list[int] = []
    fitted, fields = -1, list[tuple[int, bytes]]()
    known_time, announced, record_bytes, pax_time = b"", b"\0", -1, b""
    last, first_front = limit - BLOCK, alike.fronts[0]
    while at <= last - first_front:
        start, places = at, []
        own = at + first_front
        dot = buffer.find(b".", own, own + _NAME_BYTES) - own
        key = bytes(buffer[own : own + dot]) if dot > 0 else b""
        if not key or key == before or 0 in key or key[-1] == _SLASH:  # the dot would be the first byte of a name
            return rows, heads, End.SAMPLE
        if dot != fitted:
            fitted, fields = dot, alike.fields(dot, owner)
        if not fields:
            return rows, heads, End.SAMPLE
        for front, field in fields:
            if at + front > last:
                return rows, heads, End.BLOCK
            if front:
                if not buffer.startswith(announced, at):
                    announced = bytes(buffer[at : at + BLOCK])
                    record_bytes = pax_bytes(announced)
                record = _TIME_ALONE.fullmatch(buffer, at + BLOCK, at + front)
                if record is None or not int(record[2]) == len(record[1]) == record_bytes:
                    return rows, heads, End.SAMPLE
                pax_time = record[3]
                heads.append(at)
                at += front
            digits, time = _size_and_time(buffer, at + _SIZE_AT)
            front_of_header = b"".join((key, field, digits, time))
            checksum = _checksum((adler32(front_of_header) & 0xFFFF) + others)
            if not digits.isdigit() or not buffer.startswith(b"".join((front_of_header, checksum, tail)), at):
                return rows, heads, End.SAMPLE
            if time != known_time:
                if time[0] not in b"\0 " or not is_plain_time(time[1:]):
                    return rows, heads, End.SAMPLE
                known_time = time
            try:
                size = int(digits, 8)
            except ValueError:
                return rows, heads, End.SAMPLE
            heads.append(at)
            at += BLOCK + size + (-size & 511)
            places.append((size, pax_time if front else time))
        if at > limit:
            break
        rows.append((key, start + shift, at + shift, places))
        before = key
    return rows, heads, End.BLOCK


@lru_cache(4096)
def _checksum(number: int) -> bytes:
    """A checksum's field, in the form in which nearly all programs write it."""
    return b"%06o\0 " % number


def _other_header(block: Block, heads: Sequence[int], begin: int, end: int) -> int:
    """The offset of the first header's magic in its place from ``begin`` to ``end``; -1 without one.  One byte of each
    block is looked at, and those of the run's own headers are left out.

    heads: The offsets of these in the buffer; some may lie behind ``end``.
    """
    buffer, shift = block.buffer, block.shift
    begin -= shift
    column = buffer[begin + MAGIC_AT : end - shift : BLOCK]
    blocks = len(column)
    for at in heads:
        if (number := (at - begin) >> 9) < blocks:
            column[number] = 0
    found = column.find(_FIRST_OF_MAGIC)
    while found >= 0:
        at = begin + (found << 9)
        if buffer.startswith(MAGIC, at + MAGIC_AT):
            return at + shift
        found = column.find(_FIRST_OF_MAGIC, found + 1)
    return -1
