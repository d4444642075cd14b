"""Proves that a tar is a copy of another one with some samples replaced: it computes and compares every byte.

The expected bytes are computed here, independently of ``splice``, which wrote the tar.  Adjacent samples that stay are
compared in one piece of memory.  Then Python's tarfile, with which webdataset and Hugging Face ``datasets`` read, goes
through the result: it must find the same members.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import xxhash

from curation.errors import ShardError
from curation.tar.headers import MAX_EXTENSION_BYTES, RECORD, Member, make_header, padding, split_name
from curation.tar.scan import IMAGE_SUFFIXES, Run, SampleSpan, Window
from curation.tar.splice import Action, Copies, DecidedWindow, Decision, Edit, ends_in_global

READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ExpectedMember:
    """A member of the result: new bytes, followed by the source's bytes from ``start`` to ``end``.

    They include header and padding.  A member that stays has no new bytes; a member of an edit has only new bytes.
    size: that of a plain file's data; 0 for other members.
    """

    name: bytes
    size: int
    new: bytes
    start: int = 0
    end: int = 0


@dataclass(slots=True)
class Proof:
    """The result of one pass over the source and the tar.

    Attributes:
        equal: Whether every byte of the tar is as expected.
        differs_at: The offset of the first different byte in the tar; None if all are equal.
        key: The sample to which that byte belongs; "" if it belongs to none.
        sha256: The tar's, in hex; "" if no digests were requested, as is ``digest``.
        digest: The tar's xxh3-128, in hex.
        size: The tar's, in bytes.
        readers: How Python's tarfile reads the tar otherwise than expected; "" if it finds the expected members.
    """

    equal: bool = True
    differs_at: int | None = None
    key: str = ""
    sha256: str = ""
    digest: str = ""
    size: int = 0
    readers: str = ""


def prove_splice(windows: Iterable[DecidedWindow], result: Path, *, digests: bool = True) -> Proof:
    """Compare a tar with the tar that follows from the source's samples and the decisions about them.

    Args:
        windows: The source's samples, and the decision about each.
        result: The tar that should have been made from them.
        digests: Whether to compute the tar's digests in the same pass.

    Raises:
        ShardError: A file or an edit cannot be read.
    """
    proof, due = Proof(), _Listing()
    with _Stream(result, digests=digests) as stream:
        expected = _Comparison(stream, proof)
        for window, decisions in windows:
            expected.window = window
            for span, decision in decisions:
                if isinstance(span, Run):
                    expected.add(span.start, span.end)
                    for member in (member for sample in span.spans for member in sample.members):
                        due.add(member.name, member.size)
                elif decision is Action.KEEP and span.verbatim and not ends_in_global(span):
                    expected.add(span.start, span.end)
                    for member in span.in_order:
                        due.add(member.name, member.size if member.regular else 0)
                else:
                    members = expected_members(span, decision)
                    expected.add_members(span.key, members)
                    for one in members:
                        due.add(one.name, one.size)
            expected.compare()
        expected.finish()
        if digests:
            proof.sha256, proof.digest = stream.digests()
        proof.size = stream.size
    proof.readers = _read_as_others_do(result, due)
    return proof


def verify_splice(windows: Iterable[DecidedWindow], result: Path, source: str) -> None:
    """Read a tar from its filesystem and check that it is what ``splice`` should have made.

    Args:
        windows: The source's samples, and the decision about each.
        result: The tar.
        source: The name of the source in messages.

    Raises:
        ShardError: The tar differs, or a file cannot be read.
    """
    with open(result, "rb") as file, contextlib.suppress(OSError):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    proof = prove_splice(windows, result, digests=False)
    if proof.equal and proof.readers:
        raise ShardError(f"{result}: {proof.readers}")
    if not proof.equal:
        where = f"in sample {proof.key}" if proof.key else "outside of any sample"
        what = f"it differs at byte {proof.differs_at:,}, {where}"
        raise ShardError(f"{result}: not what {source} and its edits should give: {what}")


def expected_members(span: SampleSpan, decision: Decision) -> list[ExpectedMember]:
    """The expected members of a sample in the result, in order, including members without a key between them."""
    if decision is Action.KEEP:
        return _kept(span.in_order)
    if decision is Action.DROP:
        return _kept(span.foreign)
    if isinstance(decision, Copies):
        copies = [_edited(span.members, span.key, decision.edit, key) for key in decision.keys]
        return _kept(span.foreign) + [member for copy in copies for member in copy]
    assert isinstance(decision, Edit)
    return _edited(span.in_order, span.key, decision, span.key)


def _kept(members: Iterable[Member]) -> list[ExpectedMember]:
    return [_stays(member) for member in members]


def _stays(member: Member) -> ExpectedMember:
    size = member.size if member.regular else 0
    if not member.odd:
        return ExpectedMember(member.name, size, b"", member.start, member.end)
    header = make_header(member.name, member.size, member.mtime)
    return ExpectedMember(member.name, size, header, member.data, member.end)


def _edited(members: Sequence[Member], old_key: str, edit: Edit, key: str) -> list[ExpectedMember]:
    """The new image takes the place of the first image, or of the one that the edit names; the txt and the json take
    the places of the first txt and json.  A new member without a counterpart comes after the last member.  Members that
    the edit leaves out are not there."""
    stem, old_stem = (f"{one}.".encode("utf-8", "surrogateescape") for one in (key, old_key))
    expected: list[ExpectedMember] = []
    placed: set[str] = set()

    def add_new(part: str, mtime: int) -> None:
        name, data = stem + edit.suffix(part), edit.part(part) or b""
        placed.add(part)
        header = make_header(name, len(data), mtime)
        expected.append(ExpectedMember(name, len(data), b"".join((header, data, padding(len(data))))))

    for member in members:
        pictures = {edit.replaces} if edit.replaces else IMAGE_SUFFIXES
        part = "image" if member.suffix in pictures else member.suffix
        if member.suffix in edit.more and edit.more[member.suffix] is None:
            continue
        if part in edit.parts:
            if part not in placed:
                add_new(part, member.mtime)
        elif key == old_key:
            expected += _kept((member,))
        else:
            name = stem + member.name[len(old_stem) :]
            header = make_header(name, member.size, member.mtime)
            expected.append(ExpectedMember(name, member.size, header, member.data, member.end))
    first = next(member for member in members if member.name.startswith(old_stem))
    for part in edit.parts:
        if part not in placed:
            add_new(part, first.mtime)
    return expected


class _Listing:
    """The members of a tar, as a digest of their names and sizes, and the number of its samples."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()
        self._key = b""
        self.samples = 0

    def add(self, name: bytes, size: int) -> None:
        """name: b"" for a global header, which is no member.  size: that of a plain file; 0 for other members."""
        name = name.rstrip(b"/")  # as tarfile does
        if not name:
            return
        self._digest.update(b"%d %s\0" % (size, name))
        split = split_name(name)
        if split is not None and split[0] != self._key:
            self._key = split[0]
            self.samples += 1

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def _read_as_others_do(result: Path, due: _Listing) -> str:
    """``Proof.readers``: what Python's tarfile finds in a tar, and what it should find."""
    found, problem = _Listing(), ""
    try:
        with tarfile.open(result, "r|*") as stream:  # webdataset's mode, in which its first bytes tell how it is packed
            stream.next()
        with tarfile.open(result, "r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                size = member.size if member.isreg() and not member.issparse() else 0
                found.add(member.name.encode("utf-8", "surrogateescape"), size)
                tar.members.clear()  # type: ignore[attr-defined]  # as webdataset does: a shard may have a million
    except (tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError, LookupError) as error:
        problem = f", then stops: {error}"
    if not problem and found.digest == due.digest:
        return ""
    differs = "" if problem or found.samples != due.samples else ", some of them with other members"
    return f"Python's tarfile reads {found.samples:,} of its {due.samples:,} samples{differs}{problem}"


class _Comparison:
    """Compares the tar with the expected bytes: adjacent bytes of the source's window, and new ones."""

    window: Window

    def __init__(self, stream: _Stream, proof: Proof) -> None:
        self._stream, self._proof = stream, proof
        self._begin = self._end = 0
        self._size = 0  # expected size of the result
        self._held = b""  # global headers, which are there if a member comes behind them

    def add(self, start: int, end: int) -> None:
        """Expect the source's bytes from ``start`` to ``end`` next."""
        self._release()
        if start != self._end:
            self.compare()
            self._begin = start
        self._end = end

    def add_members(self, key: str, members: Iterable[ExpectedMember]) -> None:
        for member in members:
            if not member.name and len(self._held) < MAX_EXTENSION_BYTES:
                self._held += self.window.read(member.start, member.end - member.start)
                continue
            if member.new:
                self._release()
                self.compare()
                if not self._same(member.new):
                    self._proof.key = self._proof.key or key
            if member.start != member.end:
                self.add(member.start, member.end)

    def _release(self) -> None:
        if self._held:
            self.compare()
            held, self._held = self._held, b""
            self._same(held)

    def compare(self) -> None:
        """Compare the expected bytes; call it before the window becomes invalid."""
        start, end = self._begin, self._end
        self._begin = self._end
        if start != end:
            for piece in self.window.pieces(start, end):
                size = len(piece)
                before = self._size
                if not self._same(piece) and not self._proof.key:
                    self._proof.key = self._key_at(start + (self._proof.differs_at or 0) - before)
                start += size

    def finish(self) -> None:
        """Expect the end-of-archive blocks, padded to a record, and then the end of the file."""
        if self._same(bytes(1024 + -(self._size + 1024) % RECORD)) and not self._stream.at_end():
            self._proof.equal, self._proof.differs_at = False, self._size

    def _same(self, piece: bytes | memoryview) -> bool:
        """Whether ``piece`` comes next in the result; also True after a difference was found."""
        before, self._size = self._size, self._size + len(piece)
        if not self._proof.equal:
            return True
        same = self._stream.count_equal(piece)
        if same < len(piece):
            self._proof.equal, self._proof.differs_at = False, before + same
        return self._proof.equal

    def _key_at(self, offset: int) -> str:
        """The key of the sample to which a byte of the source belongs."""
        spans = self.window.spans
        number = bisect.bisect_right([span.start for span in spans], offset) - 1
        return spans[number].key if number >= 0 else ""


class _Stream:
    """A file that is read once, in order, and hashed at the same time.  Raises ShardError if it cannot be read."""

    def __init__(self, path: Path, *, digests: bool) -> None:
        self._path = path
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        self._at = self._end = 0
        self._sha256, self._xxh3, self._digests = hashlib.sha256(), xxhash.xxh3_128(), digests
        self.size = 0  # read so far
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def count_equal(self, piece: bytes | memoryview) -> int:
        """How many bytes of ``piece`` come next in the file.  If all do, the position advances by them."""
        at, view = 0, memoryview(piece)
        while at < len(view):
            if self._at == self._end and not self._fill():
                return at
            count = min(len(view) - at, self._end - self._at)
            wanted = view[at : at + count]
            if not self._buffer.startswith(wanted, self._at):  # a memcmp; == of views compares item by item
                return at + next(n for n, byte in enumerate(wanted) if byte != self._buffer[self._at + n])
            at += count
            self._at += count
        return at

    def at_end(self) -> bool:
        return self._at == self._end and not self._fill()

    def digests(self) -> tuple[str, str]:
        """SHA-256 and xxh3-128 of the whole file, in hex; it reads the rest of the file."""
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
        if self._digests:
            self._sha256.update(self._view[:count])
            self._xxh3.update(self._view[:count])
        return count > 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)
