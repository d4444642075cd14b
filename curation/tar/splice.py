"""Copies a shard with some of its samples replaced; everything else stays, byte for byte, in its order.

Adjacent bytes that stay (header, data and padding) are written from the read buffer in one piece.  A global pax header
is written when a member comes behind it, and not at the end of the tar, where Python's tarfile stops with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal, Protocol

from curation.tar.headers import MAX_EXTENSION_BYTES, RECORD, Member, make_header, padding
from curation.tar.scan import IMAGE_SUFFIXES, Run, SampleSpan, Window

END_OF_ARCHIVE: Final = 2 * 512


@dataclass(frozen=True, slots=True)
class Edit:
    """The new members of a sample.  Its other members stay, as do those for which there is None here.

    image_suffix, txt_suffix, json_suffix: what a new member is called behind the key and a dot (``webp``, ``JPG``).
    replaces: the suffix, in lower case, of the one picture whose place the new image takes, where the sample's other
    pictures stay (``0.jpg``); empty: the new image stands for all pictures that are called after the key alone.
    more: further new members, by suffix in lower case; None: a member of this name is left out.
    """

    image: bytes | memoryview | None
    txt: bytes | memoryview | None
    json: bytes | memoryview | None
    image_suffix: bytes = b"jpg"
    txt_suffix: bytes = b"txt"
    json_suffix: bytes = b"json"
    replaces: str = ""
    more: Mapping[str, bytes | None] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """Which members are new: image, txt, json, and the suffixes of further ones."""
        return [part for part in ("image", "txt", "json", *self.more) if self.part(part) is not None]

    def part(self, part: str) -> bytes | memoryview | None:
        if part in self.more:
            return self.more[part]
        return self.image if part == "image" else self.txt if part == "txt" else self.json

    def suffix(self, part: str) -> bytes:
        """What the new member is called behind the key and a dot."""
        if part in self.more:
            return part.encode()
        return self.image_suffix if part == "image" else self.txt_suffix if part == "txt" else self.json_suffix


UNCHANGED: Final = Edit(None, None, None)


@dataclass(frozen=True, slots=True)
class Copies:
    """A sample that is written under other keys, once for each of them, edited or not.

    Its members are plain files; members between them that belong to no sample are written once.
    """

    keys: Sequence[str]
    edit: Edit = UNCHANGED


class Action(Enum):
    """What to do with a sample that is not edited."""

    KEEP = "stays"
    DROP = "left out"  # members that belong to no sample, such as folders, stay nevertheless


Decision = Edit | Copies | Action


Decide = Callable[[SampleSpan], Decision]


Decided = tuple[SampleSpan, Decision] | tuple[Run, Literal[Action.KEEP]]
"""A sample and the decision about it; a run of samples always stays.  Spans without a key are always kept."""


DecidedWindow = tuple[Window, Sequence[Decided]]
"""A window, and the decisions about its samples."""


class Windows(Protocol):
    """A source of samples, such as ``TarScan``."""

    path: str

    def windows(self) -> Iterator[Window]: ...


class Target(Protocol):
    """The file to which a shard is written, such as ``AtomicFile``."""

    def write_pieces(self, pieces: Sequence[bytes | memoryview], /) -> object: ...


class Neighbours:
    """Finds samples that would follow another one of their key, as those between them are left out: readers
    would merge the two into one."""

    def __init__(self) -> None:
        self._key, self._start = "", -1

    def meet(self, span: SampleSpan) -> bool:
        """Whether a sample that is kept has the key of the one that was kept before it.

        Call it once for each sample that is kept, in the shard's order; further passes may follow.
        """
        before = self._key if self._start < span.start else ""
        self._key, self._start = span.key, span.start
        return before == span.key


def decided(tar: Windows, decide: Decide) -> Iterator[DecidedWindow]:
    """Yield the windows of a scan with the decision about each sample."""
    for window in tar.windows():
        yield window, [(span, decide(span) if span.key else Action.KEEP) for span in window.spans]


def splice(windows: Iterable[DecidedWindow], file: Target, index: list[tuple[str, int, int]] | None = None) -> None:
    """Write a tar from the samples of ``windows`` and the decisions about them.

    In an edited sample the new image takes the place of the first image of any type, under its own suffix, and
    further images are removed; or it takes the place of the one that ``Edit.replaces`` names, and the others stay.
    Members that the source lacks come after its last member.  New members have the times of those that they replace.

    Args:
        windows: The samples.  Each window is written before the next one is read.
        file: The file to write.
        index: Receives the key, offset and length in bytes of each sample in the result.
    """
    out = _Out(file)
    for window, decisions in windows:
        out.window = window
        for span, decision in decisions:
            if isinstance(span, Run):
                out.release()
                if index is not None:
                    moved = out.position - span.start
                    index += [(key, start + moved, end - start) for key, start, end in span.places]
                out.copy(span.start, span.end)
                continue
            if span.key and decision is not Action.DROP:
                out.release()
            begin = 0 if index is None else out.position
            if isinstance(decision, Edit):
                out.add_edited(span, decision)
            elif isinstance(decision, Copies):
                out.copy_members(span.foreign)
                out.release()
                for key in decision.keys:
                    begin = out.position
                    out.add_edited(span, decision.edit, key)
                    if index is not None:
                        index.append((key, begin, out.position - begin))
                continue
            elif decision is Action.DROP:
                out.copy_members(span.foreign)
                continue
            elif span.verbatim and not ends_in_global(span):
                out.release()
                out.copy(span.start, span.end)
            else:
                out.copy_members(span.in_order)
            if index is not None and span.key:
                index.append((span.key, begin, out.position - begin))
        out.flush()
    out.end()


def ends_in_global(span: SampleSpan) -> bool:
    """Whether the last member of a span is a global pax header."""
    return bool(span.foreign) and not span.foreign[-1].name and span.foreign[-1].end == span.end


class _Out:
    """Writes to the target.  Bytes of the source are collected as views, and adjacent bytes as one view."""

    window: Window

    def __init__(self, file: Target) -> None:
        self._file = file
        self._pieces: list[bytes | memoryview] = []
        self._begun = self._done = 0  # a range of source bytes that is not in the pieces yet
        self._size = 0
        self._held: list[bytes] = []  # global headers behind which no member was written yet

    @property
    def position(self) -> int:
        """The size of the result so far, in bytes."""
        return self._size + self._done - self._begun

    def copy(self, start: int, end: int) -> None:
        """Copy the source's bytes from ``start`` to ``end``."""
        if start != self._done:
            self._end_run()
            self._begun = start
        self._done = end

    def copy_members(self, members: Iterable[Member]) -> None:
        for member in members:
            self._keep(member, None)

    def release(self) -> None:
        """Write the global headers that were held back, as a member comes behind them."""
        if self._held:
            self._end_run()
            self._pieces.append(b"".join(self._held))
            self._size += len(self._pieces[-1])
            self._held.clear()

    def add_edited(self, span: SampleSpan, edit: Edit, key: str | None = None) -> None:
        """Write the members that stay and the new ones in place of others, under another key if one is given."""
        stem = (span.key if key is None else key).encode("utf-8", "surrogateescape") + b"."
        suffix_at = len(span.key.encode("utf-8", "surrogateescape")) + 1
        missing = edit.parts
        parts = frozenset((*missing, *edit.more))
        new: list[bytes | memoryview] = []

        def replace(part: str, mtime: int) -> None:
            missing.remove(part)
            data = edit.part(part) or b""
            new.extend((make_header(stem + edit.suffix(part), len(data), mtime), data, padding(len(data))))

        for member in span.in_order if key is None else span.members:
            part = member.suffix if member.suffix in edit.more else _replaced_by(member, edit.replaces)
            if part not in parts:
                self._add(new)
                self._keep(member, None if key is None else stem + member.name[suffix_at:])
            elif part is not None and part in missing:
                replace(part, member.mtime)
        for part in tuple(missing):
            replace(part, span.members[0].mtime)
        self._add(new)
        if self._begun == self._done:  # the next range may begin directly after removed members
            self._begun = self._done = span.end

    def flush(self) -> None:
        """Write the collected pieces; call it before the window becomes invalid."""
        self._end_run()
        self._file.write_pieces(self._pieces)
        self._pieces.clear()

    def end(self) -> None:
        """Write the end-of-archive blocks, padded to a record as GNU tar does."""
        self._file.write_pieces([bytes(END_OF_ARCHIVE + -(self._size + END_OF_ARCHIVE) % RECORD)])

    def _keep(self, member: Member, name: bytes | None) -> None:
        """Copy a member.  It gets a new header if it is odd, or if it gets another name.  A global header waits."""
        if not member.name and sum(map(len, self._held)) < MAX_EXTENSION_BYTES:
            self._held.append(self.window.read(member.start, member.end - member.start))
            return
        self.release()
        if member.odd or name is not None:
            self._add([make_header(name or member.name, member.size, member.mtime)])
            self.copy(member.data, member.end)
        else:
            self.copy(member.start, member.end)

    def _add(self, new: list[bytes | memoryview]) -> None:
        if new:
            self.release()
            self._end_run()
            self._pieces += new
            self._size += sum(map(len, new))
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
        for piece in self.window.pieces(start, end):  # several pieces for a very large sample
            self._file.write_pieces([piece])


def _replaced_by(member: Member, picture: str) -> str | None:
    """The part of an edit that replaces this member; None if the member stays.  picture: ``Edit.replaces``."""
    if member.suffix == picture if picture else member.suffix in IMAGE_SUFFIXES:
        return "image"
    return member.suffix if member.suffix in ("txt", "json") else None
