"""The fast proof of one hybrid shard: every byte is foretold from the source and the edits, and compared.

What is foretold is worked out here and not by the code that wrote the shard.  Samples that lie together and stay are
compared in one piece of memory; the hybrid's headers are not even parsed.  Where a byte differs no more can be said
from here: ``explain.py`` reads both files by their samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import xxhash

from curation.errors import ShardError
from curation.jsonio import MAX_SAMPLE_JSON_BYTES
from curation.tar.headers import RECORD, Member, make_header, padding
from curation.tar.scan import IMAGE_SUFFIXES, SampleSpan, TarScan, Window
from curation.tar.splice import Edit

READ_BYTES: Final = 1 << 20


_EDITED = ("jpg", "txt", "json")

Expect = Callable[[SampleSpan], "Edit | bool"]


"""What should have become of a source sample: its edit, True where it should be as it was, False where it is gone."""


@dataclass(frozen=True, slots=True)
class NewMember:
    """A member that the source has not: header, data and padding."""

    name: bytes
    raw: bytes


Piece = NewMember | Member  # a member of an edited sample, new or the source's


class Stream:
    """A file read once, in order, and hashed as it is read.  Raises ShardError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        self._at = self._end = 0
        self._sha256, self._xxh3 = hashlib.sha256(), xxhash.xxh3_128()
        self.size = 0  # read so far
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def goes_on_with(self, piece: bytes | memoryview) -> bool:
        """Whether ``piece`` comes next; it is passed over."""
        at, view = 0, memoryview(piece)
        while at < len(view):
            if self._at == self._end and not self._fill():
                return False
            count = min(len(view) - at, self._end - self._at)
            if not self._buffer.startswith(view[at : at + count], self._at):  # a memcmp: == of views goes by items
                return False
            at += count
            self._at += count
        return True

    def at_end(self) -> bool:
        return self._at == self._end and not self._fill()

    def digests(self) -> tuple[str, str]:
        """SHA-256 and xxh3-128 of the whole file, hex; reads what is left of it."""
        while self._fill():
            pass
        return self._sha256.hexdigest(), self._xxh3.hexdigest()

    def _fill(self) -> bool:
        try:
            count = os.preadv(self._descriptor, [self._view], self.size)
        except OSError as error:
            raise ShardError(f"{self._path}: cannot be read at byte {self.size:,} ({error.strerror})") from error
        self._at, self._end = 0, count
        self.size += count
        self._sha256.update(self._view[:count])
        self._xxh3.update(self._view[:count])
        return count > 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)


@dataclass(slots=True)
class Proof:
    """What one pass over both files gave.  equal: the hybrid is, byte for byte, what it should be.

    keys: of the source's samples in order.  kept: samples that should be in the hybrid.  edited: keys of those that
    should have been replaced.  left_out: keys of those that should be gone.  sha256, digest (xxh3-128), size: of the
    hybrid.
    """

    equal: bool = True
    kept: int = 0
    keys: list[str] = field(default_factory=list)
    edited: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    sha256: str = ""
    digest: str = ""
    size: int = 0


OnEdit = Callable[[SampleSpan, Edit, bytes | None], None]


"""Called for each edited sample, with the source's json where it has one."""


def prove(source: Path, hybrid: Path, expect: Expect, on_edit: OnEdit) -> Proof:
    """Compare a hybrid shard with what it should be.  Raises ShardError when a file or an edit cannot be read."""
    proof = Proof()
    size = 0  # of the hybrid, as foretold
    with Stream(hybrid) as stream:
        for window in TarScan(source).windows():
            runs = _Runs(window, stream, proof)
            for span in window.spans:
                expected: Edit | bool = True
                if span.key:
                    expected = expect(span)
                    proof.keys.append(span.key)
                    if expected is False:
                        proof.left_out.append(span.key)
                    else:
                        proof.kept += 1
                if isinstance(expected, Edit):
                    proof.edited.append(span.key)
                    on_edit(span, expected, _source_json(window, span))
                    runs.add_pieces(edited_pieces(span, expected))
                elif not expected:
                    runs.add_members(span.foreign)
                elif span.damages:
                    runs.add_members(in_order(span))
                else:
                    runs.add(span.start, span.end)
            runs.compare()
            size += runs.size
        if proof.equal:
            end = bytes(1024 + -(size + 1024) % RECORD)
            proof.equal = stream.goes_on_with(end) and stream.at_end()
        proof.sha256, proof.digest = stream.digests()
        proof.size = stream.size
    return proof


def edited_pieces(span: SampleSpan, edit: Edit) -> list[Piece]:
    """An edited sample as it should be: new members whole, with header and padding, and those that stay, in order.

    The new jpg stands where the first image stood, the txt and the json where the first of theirs stood, and what there
    was none of behind the last member.
    """
    stem = span.key.encode("utf-8", "surrogateescape") + b"."
    pieces: list[Piece] = []
    placed: set[str] = set()

    def new(part: str, mtime: int) -> NewMember:
        name, data = stem + part.encode(), edit.part(part) or b""
        placed.add(part)
        return NewMember(name, b"".join((make_header(name, len(data), mtime), data, padding(len(data)))))

    for member in in_order(span):
        part = "jpg" if member.suffix in IMAGE_SUFFIXES else member.suffix
        if part not in _EDITED:
            pieces.append(member)
        elif part not in placed:
            pieces.append(new(part, member.mtime))
    pieces += [new(part, span.members[0].mtime) for part in _EDITED if part not in placed]
    return pieces


def in_order(span: SampleSpan) -> Sequence[Member]:
    """All members between a sample's first and last byte, those without a key among them."""
    return sorted((*span.members, *span.foreign), key=lambda member: member.start) if span.foreign else span.members


def _source_json(window: Window, span: SampleSpan) -> bytes | None:
    for member in span.members:
        if member.suffix == "json" and member.regular and member.size <= MAX_SAMPLE_JSON_BYTES:
            return window.read(member.data, member.size)
    return None


class _Runs:
    """What is due next in the hybrid: bytes of the source's window that lie together, and new ones."""

    def __init__(self, window: Window, stream: Stream, proof: Proof) -> None:
        self._window, self._stream, self._proof = window, stream, proof
        self._begin = self._end = 0
        self.size = 0

    def add(self, start: int, end: int) -> None:
        if start != self._end:
            self.compare()
            self._begin = start
        self._end = end

    def add_members(self, members: Sequence[Member]) -> None:
        for member in members:
            self.add(member.start, member.end)

    def add_pieces(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, NewMember):
                self.compare()
                self._compare(piece.raw)
            else:
                self.add(piece.start, piece.end)

    def compare(self) -> None:
        start, end = self._begin, self._end
        self._begin = self._end
        if start != end:
            for piece in self._window.pieces(start, end):
                self._compare(piece)

    def _compare(self, piece: bytes | memoryview) -> None:
        self.size += len(piece)
        if self._proof.equal:
            self._proof.equal = self._stream.goes_on_with(piece)
