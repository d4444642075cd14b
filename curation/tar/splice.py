"""A shard copied with some of its samples replaced: everything else stays, byte for byte, in its order.

What lies together and stays is written straight from the read buffer in one piece: header, data and padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from curation.tar.headers import RECORD, Member, make_header, padding
from curation.tar.scan import IMAGE_SUFFIXES, SampleSpan, Window

END_OF_ARCHIVE: Final = 2 * 512


@dataclass(frozen=True, slots=True)
class Edit:
    """What a sample is replaced with.  Its other members stay, and so do those for which there is None here."""

    jpg: bytes | memoryview | None
    txt: bytes | memoryview | None
    json: bytes | memoryview | None

    @property
    def parts(self) -> list[str]:
        """The suffixes of what is new."""
        return [suffix for suffix in ("jpg", "txt", "json") if self.part(suffix) is not None]

    def part(self, suffix: str) -> bytes | memoryview | None:
        return self.jpg if suffix == "jpg" else self.txt if suffix == "txt" else self.json


UNCHANGED: Final = Edit(None, None, None)


@dataclass(frozen=True, slots=True)
class Copies:
    """A sample that goes into the shard under other keys, once for each of them, edited or not.

    Its members are plain files; those that belong to no sample but lie between them stay once.
    """

    keys: Sequence[str]
    edit: Edit = UNCHANGED


class Action(Enum):
    """Of a sample that is not edited."""

    KEEP = "stays"
    DROP = "left out"  # members that are no sample's, such as folders, stay all the same


Decision = Edit | Copies | Action


Decide = Callable[[SampleSpan], Decision]


DecidedWindow = tuple[Window, Sequence[tuple[SampleSpan, Decision]]]
"""A window, and the decision about each of its spans.  Spans without a key are always kept."""


class Windows(Protocol):
    """Where the samples come from: see ``TarScan``."""

    path: str

    def windows(self) -> Iterator[Window]: ...


class Target(Protocol):
    """Where a spliced shard goes: see ``AtomicFile``."""

    def write_pieces(self, pieces: Sequence[bytes | memoryview], /) -> object: ...


def decided(tar: Windows, decide: Decide) -> Iterator[DecidedWindow]:
    """The windows of a scan with the decision about each sample."""
    for window in tar.windows():
        yield window, [(span, decide(span) if span.key else Action.KEEP) for span in window.spans]


def splice(windows: Iterable[DecidedWindow], file: Target, index: list[tuple[str, int, int]] | None = None) -> None:
    """Write a tar of the samples of ``windows``, as it was decided about them.

    In an edited sample the jpg takes the place of the first image of any type, under the name ``<key>.jpg``, and
    further images go; what the source lacks comes behind its last member.  New members take the times of those they
    replace.

    Args:
        windows: The samples.  Each window is written before the next is taken.
        file: Where the tar goes.
        index: Gains the key, offset and length in bytes of each sample in the result.
    """
    out = _Out(file)
    for window, decisions in windows:
        out.window = window
        for span, decision in decisions:
            begin = 0 if index is None else out.position
            if isinstance(decision, Edit):
                out.add_edited(span, decision)
            elif isinstance(decision, Copies):
                out.copy_members(span.foreign)
                for key in decision.keys:
                    begin = out.position
                    out.add_edited(span, decision.edit, key)
                    if index is not None:
                        index.append((key, begin, out.position - begin))
                continue
            elif decision is Action.DROP:
                out.copy_members(span.foreign)
                continue
            elif span.damages:
                out.copy_members(span.in_order)
            else:
                out.copy(span.start, span.end)
            if index is not None and span.key:
                index.append((span.key, begin, out.position - begin))
        out.flush()
    out.end()


class _Out:
    """What goes to the target.  Bytes of the source are gathered as views, and those that lie together as one."""

    window: Window

    def __init__(self, file: Target) -> None:
        self._file = file
        self._pieces: list[bytes | memoryview] = []
        self._begun = self._done = 0  # a run of source bytes that is not among the pieces yet
        self._size = 0

    @property
    def position(self) -> int:
        """Bytes of the result so far."""
        return self._size + self._done - self._begun

    def copy(self, start: int, end: int) -> None:
        """The source's bytes from ``start`` to ``end``."""
        if start != self._done:
            self._end_run()
            self._begun = start
        self._done = end

    def copy_members(self, members: Iterable[Member]) -> None:
        for member in members:
            self.copy(member.start, member.end)

    def add_edited(self, span: SampleSpan, edit: Edit, key: str | None = None) -> None:
        """Members that stay, and new ones in the place of others; under another key if one is given."""
        stem = (span.key if key is None else key).encode("utf-8", "surrogateescape") + b"."
        suffix_at = len(span.key.encode("utf-8", "surrogateescape")) + 1
        missing = edit.parts
        parts = frozenset(missing)
        new: list[bytes | memoryview] = []

        def replace(suffix: str, mtime: int) -> None:
            missing.remove(suffix)
            data = edit.part(suffix) or b""
            new.extend((make_header(stem + suffix.encode(), len(data), mtime), data, padding(len(data))))

        for member in span.in_order if key is None else span.members:
            suffix = _replaced_by(member)
            if suffix not in parts:
                if key is not None:
                    new.append(make_header(stem + member.name[suffix_at:], member.size, member.mtime))
                self._add(new)
                self.copy(member.start if key is None else member.data, member.end)
            elif suffix is not None and suffix in missing:
                replace(suffix, member.mtime)
        for suffix in tuple(missing):
            replace(suffix, span.members[0].mtime)
        self._add(new)
        if self._begun == self._done:  # the next run may begin right behind the members that went
            self._begun = self._done = span.end

    def flush(self) -> None:
        """Write what was gathered, before the window moves on."""
        self._end_run()
        self._file.write_pieces(self._pieces)
        self._pieces.clear()

    def end(self) -> None:
        """The end-of-archive blocks, padded to a record as GNU tar does."""
        self._file.write_pieces([bytes(END_OF_ARCHIVE + -(self._size + END_OF_ARCHIVE) % RECORD)])

    def _add(self, new: list[bytes | memoryview]) -> None:
        if new:
            self._end_run()
            self._pieces.append(b"".join(new))
            self._size += len(self._pieces[-1])
            new.clear()

    def _end_run(self) -> None:
        start, end = self._begun, self._done
        self._begun = self._done
        if start == end:
            return
        self._size += end - start
        if (view := self.window.view(start, end)) is not None:
            self._pieces.append(view)
            return
        self._file.write_pieces(self._pieces)
        self._pieces.clear()
        for piece in self.window.pieces(start, end):  # of a very large sample
            self._file.write_pieces([piece])


def _replaced_by(member: Member) -> str | None:
    """The edit's member that takes a member's place; None for one that stays."""
    if member.suffix in IMAGE_SUFFIXES:
        return "jpg"
    return member.suffix if member.suffix in ("txt", "json") else None
