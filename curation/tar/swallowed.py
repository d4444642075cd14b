"""Looks for headers inside members.

A member that has lost bytes **swallows** what comes behind it: as its header still tells the old size, it reaches over
the next members.  Their headers are then inside it, at the offset by which they were shifted.  A member may also hold
headers because it is an archive itself.  The two differ in where the headers lead: those of a stored archive lead to
that archive's own end inside the member, those of swallowed members lead out of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from curation.tar.blocks import Block, Blocks
from curation.tar.headers import (
    BLOCK,
    MAGIC,
    MAGIC_AT,
    MAX_EXTENSION_BYTES,
    ZERO_BLOCK,
    BadHeader,
    Member,
    find_header,
    parse_member,
)

_SEARCH_BYTES: Final = 1 << 20  # read at a time


_SEARCHES_PER_BYTE: Final = 4  # a limit, because the members of a crafted tar may all extend over the same bytes


_STEP_BYTES: Final = 4 << 10  # what following one header counts for that limit


_FIRST_OF_MAGIC = MAGIC[:1]


def is_archive(name: bytes) -> bool:
    """Whether a member's name says that it is an uncompressed tar."""
    return name.lower().endswith(b".tar")


def marks(block: Block, begin: int, end: int, at: int) -> Iterator[int]:
    """The offsets from ``begin`` to ``end``, in steps of a block from ``at``, at which there may be headers: the first
    byte of the magic is in its place.  It looks at one byte of each block that is in memory, so it costs little."""
    first = max(begin, block.begin)
    first += (at - first) % BLOCK
    stop = max(0, min(end + MAGIC_AT, block.end) - block.shift)
    column = block.buffer[first + MAGIC_AT - block.shift : stop : BLOCK]
    found = column.find(_FIRST_OF_MAGIC)
    while found >= 0:
        yield first + found * BLOCK
        found = column.find(_FIRST_OF_MAGIC, found + 1)


def has_magic(block: Block, offset: int) -> bool:
    """Whether there is a header's magic in its place; ``offset``: one of ``marks``."""
    return block.buffer.startswith(MAGIC, offset + MAGIC_AT - block.shift)


class HeaderSearch:
    """Looks for headers in a file of which one block is in memory; other bytes are read again.

    All methods return offsets in the file, or None.  None is also returned when so much was searched that the file must
    have been made to keep a search busy.
    """

    def __init__(self, file: Blocks) -> None:
        self._file = file
        self._searched = 0

    def find(self, start: int, end: int) -> int | None:
        """The first header that begins from ``start`` on and before ``end``, at any alignment."""
        end = min(end + BLOCK - 1, self._file.size)
        size = 8 * BLOCK  # search a small part first, because the header is often near
        while start + BLOCK <= end and self._may_search(end):
            stop = min(end, start + size)
            size = min(2 * size, _SEARCH_BYTES)
            self._searched += stop - start
            found = find_header(self._file.block.read(start, stop - start))
            if found >= 0:
                return start + found
            start = stop - BLOCK + 1
        return None

    def inside(self, member: Member, end: int) -> int | None:
        """The first header inside a member that is not one of an archive stored in it.

        end: The end of the member, or of what is there of it.
        """
        at, archive = member.data, is_archive(member.name)
        while (found := self.find(at, end)) is not None:
            if not archive and found != member.data:
                return found
            stored = self._end_of_archive(found, end)
            if stored is None:
                return None if archive else found
            at = stored
        return None

    def before_zeros(self, member: Member, at: int) -> int | None:
        """The first header that a member swallowed, if zero blocks come behind it.

        Zero blocks are where an archive ends, so that the member is probably undamaged.  A header inside it counts only
        if another member, or the archive's end, is where that header says.

        at: The end of the member.
        """
        if is_archive(member.name):
            return None
        begin = member.data
        while (found := self.find(begin, at)) is not None:
            links, behind, zeros, _ = self._follow(found, at)
            is_stored = zeros and found == member.data  # an archive that is the whole member
            if (links > 1 or zeros) and not is_stored:
                return found
            begin = max(behind, found + 1)
        return None

    def landing(self, member: Member) -> int | None:
        """The first header inside a member from which headers lead to the member's end: it has lost as many bytes as
        the members behind it have, so that the next header is where it should be.  It may have swallowed an extended
        header too, and end at the block that this one describes."""
        if is_archive(member.name):
            return None
        behind = 0
        for offset in self._marks(member.data, member.end):
            if offset >= behind and self._may_search(member.end):
                links, behind, zeros, data = self._follow(offset, member.end)
                if links and not zeros and behind >= member.end and (behind == member.end or data > member.end):
                    return offset
        return None

    def _may_search(self, end: int) -> bool:
        return self._searched <= _SEARCHES_PER_BYTE * (end + _SEARCH_BYTES)

    def _marks(self, begin: int, end: int) -> Iterator[int]:
        block = self._file.block
        if block.view(begin, end) is None:
            for start in range(begin, end, _SEARCH_BYTES):
                stop = min(start + _SEARCH_BYTES, end)
                part = Block(None, bytearray(block.read(start, stop - start)), start, start, stop)
                yield from (offset for offset in marks(part, start, end, start) if has_magic(part, offset))
        else:
            yield from (offset for offset in marks(block, begin, end, begin) if has_magic(block, offset))

    def shifted(self, member: Member) -> bool:
        """Whether bytes were inserted into a member whose padding is not of zeros, and behind which there is no header.

        Then its own last bytes and its padding stand before the next header.  If not, the damage began in the padding
        of an undamaged member.
        """
        zeros = member.end - member.data - member.size
        following = self.find(member.end, member.end + _SEARCH_BYTES)
        if following is None:
            return True
        tail = self._file.block.read(following - zeros - 1, zeros + 1)
        return tail[0] != 0 and not tail[1:].strip(b"\0")

    def _follow(self, at: int, end: int) -> tuple[int, int, bool, int]:
        """Go from header to header, up to ``end``.

        Returns:
            How many members there are, the offset behind the last one, whether zeros follow there up to ``end``, or for
            at least one block, and the offset of the last one's data.
        """
        links, data = 0, 0
        while at < end and self._may_search(end):
            member = self._member(at)
            if member is None:
                break
            links, at, data = links + 1, member.end, member.data
        zeros = at < end and not self._file.block.read(at, min(BLOCK, end - at)).strip(b"\0")
        return links, at, zeros, data

    def _member(self, at: int) -> Member | None:
        """The member whose header is at an offset; None without a valid header."""
        self._searched += _STEP_BYTES
        block = self._file.block
        for size in (_STEP_BYTES, MAX_EXTENSION_BYTES + 2 * _STEP_BYTES):
            size = min(size, self._file.size - at)
            try:
                member = parse_member(block.read(at, size), at, at + size, at) if size >= BLOCK else None
            except BadHeader:
                return None
            if member is not None:
                return member
        return None

    def _end_of_archive(self, at: int, end: int) -> int | None:
        """The offset behind the zeros that end the archive whose first header is at ``at``; None if it has no end."""
        while at < end and self._may_search(end):
            _, behind, zeros, _ = self._follow(at, end)
            if zeros:
                return self._behind_zeros(behind, end)
            if behind >= end:
                return None
            following = self.find(behind + 1, end)  # the archive is damaged itself
            if following is None:
                return end
            at = following
        return None

    def _behind_zeros(self, at: int, end: int) -> int:
        while at < end and self._file.block.read(at, min(BLOCK, end - at)) in (ZERO_BLOCK, bytes(end - at)):
            at += BLOCK
        return min(at, end)
