"""A shard copied with some of its samples replaced: everything else stays, byte for byte, in its order.

What lies together and stays is written straight from the read buffer in one piece: header, data and padding.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, NoReturn

import xxhash

from curation.errors import ShardError
from curation.tar import Writable
from curation.tar_headers import RECORD, make_header, padding
from curation.tar_pass import IMAGE_SUFFIXES, Member, SampleSpan, TarPass

END_OF_ARCHIVE: Final = 2 * 512


@dataclass(frozen=True, slots=True)
class Edit:
    """What a sample is replaced with.  Its other members stay."""

    jpg: bytes | memoryview
    txt: bytes | memoryview
    json: bytes | memoryview

    def part(self, suffix: str) -> bytes | memoryview:
        return self.jpg if suffix == "jpg" else self.txt if suffix == "txt" else self.json


class Fate(Enum):
    """Of a sample that is not edited."""

    STAYS = "stays"
    LEFT_OUT = "left out"  # members that are no sample's, such as folders, stay all the same


Decide = Callable[[SampleSpan], Edit | Fate]
"""What becomes of a sample: the same answer each time it is asked."""


def splice(tar: TarPass, file: Writable, decide: Decide) -> Iterator[list[tuple[SampleSpan, Edit | Fate]]]:
    """Copy a shard to ``file``; yields what was decided, a few megabytes of samples at a time, once they are written.

    In an edited sample the jpg takes the place of the first image of any type, under the name ``<key>.jpg``, and
    further images go; what the source lacks comes behind its last member.  New members take the times of those they
    replace.  Spans without a key are not asked about.
    """
    size = 0

    def write(data: bytes | memoryview) -> None:
        nonlocal size
        size += len(data)
        file.write(data)

    def copy(start: int, end: int) -> None:
        for piece in tar.pieces(start, end):
            write(piece)

    for spans in tar.windows():
        decided: list[tuple[SampleSpan, Edit | Fate]] = []
        begun = done = 0  # a run of bytes that stay and are not written yet
        for span in spans:
            fate = decide(span) if span.key else Fate.STAYS
            if span.key:
                decided.append((span, fate))
            if fate is Fate.STAYS and not span.damages:
                if span.start != done:
                    copy(begun, done)
                    begun = span.start
                done = span.end
                continue
            copy(begun, done)
            begun = done = span.end
            if isinstance(fate, Edit):
                for part in _edited(span, fate):
                    if isinstance(part, Member):
                        copy(part.start, part.end)
                    else:
                        write(part)
            else:
                for member in _in_order(span) if fate is Fate.STAYS else span.foreign:
                    copy(member.start, member.end)
        copy(begun, done)
        yield decided
    file.write(bytes(END_OF_ARCHIVE + -(size + END_OF_ARCHIVE) % RECORD))


def verify_splice(source: Path, result: Path, decide: Decide) -> None:
    """Read both tars and raise ShardError unless ``result`` is ``source`` spliced as decided.

    Keys and their order, the bytes of what stays, the members of what is edited: by what the two files say, not by how
    one was made from the other.
    """
    _forget(result)
    old, new = TarPass(source), TarPass(result)
    theirs = (span for spans in new.windows() for span in spans)
    foreign_in, foreign_out = xxhash.xxh3_128(), xxhash.xxh3_128()

    def wrong(what: str) -> NoReturn:
        raise ShardError(f"{result}: not what {source.name} and its edits make: {what}")

    def next_with_key() -> SampleSpan | None:
        for span in theirs:
            _add(foreign_out, new, span.foreign)
            if span.key:
                return span
        return None

    for spans in old.windows():
        for span in spans:
            _add(foreign_in, old, span.foreign)
            fate = decide(span) if span.key else Fate.LEFT_OUT
            if fate is Fate.LEFT_OUT:
                continue
            found = next_with_key()
            if found is None or found.key != span.key:
                wrong(f"{span.key} should be there, found {found.key if found else 'the end'}")
            if fate is Fate.STAYS:
                if _digest(old, span.members) != _digest(new, found.members):
                    wrong(f"{span.key} should be as it was")
            elif (what := _differs(old, span, new, found, fate)) is not None:
                wrong(f"{span.key}: {what}")
    if (more := next_with_key()) is not None:
        wrong(f"{more.key} should not be there")
    if foreign_in.digest() != foreign_out.digest():
        wrong("members that belong to no sample should be as they were")
    if new.report.damages or new.report.missing_end or new.report.gaps:
        wrong("; ".join(new.report.warnings()))


def _forget(path: Path) -> None:
    """Have the kernel drop what it has of a file in memory, so that it is read from where it is stored."""
    with open(path, "rb") as file, contextlib.suppress(OSError):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _edited(span: SampleSpan, edit: Edit) -> Iterator[Member | bytes | memoryview]:
    """An edited sample in order: members that stay, and the bytes of new ones."""
    stem = span.key.encode("utf-8", "surrogateescape") + b"."
    missing = ["jpg", "txt", "json"]

    def new(suffix: str, mtime: int) -> Iterator[bytes | memoryview]:
        missing.remove(suffix)
        data = edit.part(suffix)
        yield make_header(stem + suffix.encode(), len(data), mtime)
        yield data
        yield padding(len(data))

    for member in _in_order(span):
        suffix = _replaced_by(member)
        if suffix is None:
            yield member
        elif suffix in missing:
            yield from new(suffix, member.mtime)
    for suffix in tuple(missing):
        yield from new(suffix, span.members[0].mtime)


def _replaced_by(member: Member) -> str | None:
    """The edit's member that takes a member's place; None for one that stays."""
    if member.suffix in IMAGE_SUFFIXES:
        return "jpg"
    return member.suffix if member.suffix in ("txt", "json") else None


def _in_order(span: SampleSpan) -> list[Member]:
    if not span.foreign:
        return span.members
    return sorted((*span.members, *span.foreign), key=lambda member: member.start)


def _differs(old: TarPass, span: SampleSpan, new: TarPass, found: SampleSpan, edit: Edit) -> str | None:
    """How an edited sample is not what it should be."""
    edited = [member for member in found.members if _replaced_by(member)]
    if sorted(member.suffix for member in edited) != ["jpg", "json", "txt"]:
        return f"its members are {', '.join(member.text_name for member in found.members)}"
    for member in edited:
        if member.text_name != f"{span.key}.{member.suffix}" or not member.regular:
            return f"{member.text_name} should be {span.key}.{member.suffix}"
        if new.read(member.data, member.size) != edit.part(member.suffix):
            return f"{member.text_name} is not the edit's"
    staying = [member for member in span.members if not _replaced_by(member)]
    stayed = [member for member in found.members if not _replaced_by(member)]
    if _digest(old, staying) != _digest(new, stayed):
        return "members that are not edited should be as they were"
    order = [kind for kind in dict.fromkeys(map(_replaced_by, span.members)) if kind]
    if [member.suffix for member in edited][: len(order)] != order:
        return "its members are in another order"
    return None


def _digest(tar: TarPass, members: list[Member]) -> bytes:
    digest = xxhash.xxh3_128()
    _add(digest, tar, members)
    return digest.digest()


def _add(digest: xxhash.xxh3_128, tar: TarPass, members: list[Member]) -> None:
    """Headers, data and padding; in as few pieces as they lie."""
    begun = done = 0
    for member in members:
        if member.start != done:
            for piece in tar.pieces(begun, done):
                digest.update(piece)
            begun = member.start
        done = member.end
    for piece in tar.pieces(begun, done):
        digest.update(piece)
