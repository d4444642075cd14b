"""The samples of a shard in memory, what their members say, and a writer of tars.

A sample is the run of members that share a key, by WebDataset's rule.  ``scan.py`` says how a tar is read and what
becomes of a damaged one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from curation.errors import SampleError, ShardError
from curation.jsonio import clean_text, parse_json_object
from curation.storage.urls import Source
from curation.tar.blocks import Block
from curation.tar.headers import MAX_NAME_BYTES, RECORD, BadHeader, Member, make_header, padding
from curation.tar.random_access import MAX_SAMPLE_BYTES, parse_span, place_of
from curation.tar.scan import IMAGE_SUFFIXES, SampleSpan, TarReport, TarScan, Window

MAX_MEMBER_BYTES: Final = 256 << 20  # what is loaded into memory; larger members are only copied


@dataclass(slots=True)
class Sample:
    """A sample in memory.

    Attributes:
        key: Its members' name up to the first dot of the basename, folder included.
        members: Suffix (after the first dot, lower case) → bytes of the members that were wanted, in the shard's order.
        mtimes: Suffix → seconds since 1970, of the same members.
        suffixes: Of all its members, wanted or not.
        problem: The reason and the detail why it must not be used; None for a sound sample.
    """

    key: str
    members: dict[str, bytes]
    mtimes: dict[str, int]
    suffixes: tuple[str, ...]
    problem: tuple[str, str] | None = None

    def check(self) -> None:
        """Raise SampleError with the problem, if there is one."""
        if self.problem is not None:
            raise SampleError(*self.problem)

    @property
    def image_suffix(self) -> str | None:
        """The suffix of its first image, wanted or not."""
        return next((suffix for suffix in self.suffixes if suffix in IMAGE_SUFFIXES), None)


def read_samples(
    path: str | Source,
    want: Collection[str] | Callable[[str], bool] | None = None,
    report: TarReport | None = None,
    max_member_bytes: int = MAX_MEMBER_BYTES,
) -> Iterator[Sample]:
    """The samples of a shard in order, those with a problem among them.

    A problem is ``damaged_tar`` (see ``TarScan``), ``duplicate_key``, ``duplicate_member``, ``not_a_file`` (a link, a
    device, a sparse file), ``unsafe_name`` or ``member_too_large`` (of a wanted member).

    Args:
        path: The shard: a path, or what ``curation.storage.urls`` can read.
        want: The suffixes (lower case) to load, or a test of one; all by default.  Other members are not copied.
        report: Filled with what else was found; complete after the last sample.
        max_member_bytes: Larger members are not loaded.

    Raises:
        ShardError: The file cannot be read.
    """
    wanted: Callable[[str], bool]
    if want is None or callable(want):
        wanted = want or (lambda suffix: True)
    else:
        wanted = frozenset(want).__contains__
    tar = TarScan(path, report)
    for window in tar.windows():
        for span in window.spans:
            if span.key:
                yield _load(window, span, wanted, max_member_bytes)


def open_sample(shard: Path, key: str) -> Sample:
    """One sample of a shard by its key, through the ``.idx`` beside it: one read, however large the shard.

    Raises:
        SampleError: ``no_such_key``, or ``sample_too_large``.
        ShardError: There is no index, or it is not this shard's.
    """
    place = place_of(shard, key)
    if place is None:
        raise SampleError("no_such_key", f"{shard.name} has no sample {key[:200]!r}")
    offset, length = place
    if length > MAX_SAMPLE_BYTES:
        raise SampleError("sample_too_large", f"{length:,} bytes, at most {MAX_SAMPLE_BYTES:,}")
    try:
        with open(shard, "rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise ShardError(f"{shard}: cannot be read ({error.strerror})") from error
    try:
        span = parse_span(data, 0, length if len(data) == length else -1)
    except BadHeader:
        span = None
    if span is None or span.key != key:
        raise ShardError(f"{shard}: its index says that {key[:200]!r} is at byte {offset:,}, and it is not there")
    window = Window([span], Block(None, bytearray(data), 0, 0, length))
    return _load(window, span, lambda suffix: True, MAX_MEMBER_BYTES)


def is_safe_name(name: str) -> bool:
    """Whether a file of this name lies below the folder that it is unpacked into."""
    parts = name.split("/")
    too_long = len(name) > MAX_NAME_BYTES or max(map(len, parts)) > 255
    return bool(parts[0]) and ".." not in parts and "\0" not in name and not too_long


class Writable(Protocol):
    def write(self, data: bytes | bytearray | memoryview, /) -> object: ...


class TarWriter:
    """Writes members of plain files: ustar, a pax header where a name or size needs one, no trace of the machine."""

    def __init__(self, file: Writable) -> None:
        self._file = file
        self.size = 0

    def add(self, name: str | bytes, data: bytes | memoryview, mtime: int = 0) -> None:
        """One member.  Raises ValueError for a name that is empty, holds a NUL, or is longer than a path may be."""
        self._write(make_header(name, len(data), mtime))
        self._write(data)
        self._write(padding(len(data)))

    def close(self) -> None:
        """The end-of-archive blocks, padded to whole records as GNU tar does.  The file stays open."""
        end = 2 * 512
        self._write(bytes(end + -(self.size + end) % RECORD))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.size += len(data)


def _load(window: Window, span: SampleSpan, wanted: Callable[[str], bool], max_member_bytes: int) -> Sample:
    members: dict[str, bytes] = {}
    mtimes: dict[str, int] = {}
    problem = problem_of(span)
    for member in span.members:
        if not wanted(member.suffix) or not member.regular or member.suffix in members:
            continue
        if member.size <= max_member_bytes:
            members[member.suffix] = window.read(member.data, member.size)
            mtimes[member.suffix] = member.mtime
        elif problem is None:
            problem = "member_too_large", f"{member.text_name}: {member.size:,} bytes, at most {max_member_bytes:,}"
    return Sample(span.key, members, mtimes, tuple([member.suffix for member in span.members]), problem)


def problem_of(span: SampleSpan) -> tuple[str, str] | None:
    """(reason, detail) why a sample must not be used, None for a sound one."""
    if span.torn:
        return "damaged_tar", span.torn
    if span.repeated:
        return "duplicate_key", "an earlier sample of the shard has the same key"
    suffixes = {member.suffix for member in span.members if member.regular}
    if len(suffixes) < len(span.members):
        return _odd_member(span.members)
    if not is_safe_name(span.key):
        return "unsafe_name", "as a path it could lead outside a folder"
    return None


def _odd_member(members: list[Member]) -> tuple[str, str]:
    for member in members:
        if not member.regular:
            return "not_a_file", f"{member.text_name} is a link, a device or a sparse file"
    doubles = Counter(member.suffix for member in members).most_common(1)
    return "duplicate_member", f"it has several members .{doubles[0][0]}"


MAX_CAPTION_CHARACTERS = 1 << 20


_LOOSE_SUFFIXES = (".json", ".jpg", ".txt")


def metadata_of(sample: Sample) -> dict[str, Any]:
    """The .json as an object; SampleError ``no_json``, ``bad_json`` and its kin."""
    data = sample.members.get("json")
    if data is None:
        raise SampleError("no_json", f"it has only {', '.join(sample.suffixes)}")
    return parse_json_object(data)


def image_of(sample: Sample) -> bytes:
    """The bytes of the image, of whatever format; SampleError ``no_image``."""
    for suffix, data in sample.members.items():
        if suffix in IMAGE_SUFFIXES:
            return data
    raise SampleError("no_image", f"it has only {', '.join(sample.suffixes)}")


def caption_of(metadata: Mapping[str, Any], txt: bytes | None) -> str:
    """The metadata's caption, else the .txt, as one clean line; SampleError ``no_caption`` or ``caption_too_long``."""
    caption = metadata.get("caption")
    if not isinstance(caption, str):
        if txt is None:
            raise SampleError("no_caption", "neither in the json nor as a txt")
        caption = txt[: 4 * MAX_CAPTION_CHARACTERS + 4].decode("utf-8", "replace")
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise SampleError("caption_too_long", f"more than {MAX_CAPTION_CHARACTERS:,} characters")
    return clean_text(caption)


def check_loose_name(key: str) -> None:
    """Raise SampleError ``unsafe_name`` for a key that cannot name loose files beside those of other samples.

    A folder that looks like a file (``000.json/001``) would stand in the way of the sample that has it as its file.
    """
    *folders, base = key.split("/")
    if any(name.endswith(_LOOSE_SUFFIXES) for name in folders) or len(os.fsencode(base)) > 255 - len(".json"):
        raise SampleError("unsafe_name", "no loose files can be named so; --edits_layout tar takes it")


def lenient_metadata(data: bytes | None) -> dict[str, Any]:
    """The .json of a sample, empty where there is none or it cannot be read: the image is captioned all the same."""
    if data is None:
        return {}
    try:
        return parse_json_object(data)
    except SampleError:
        return {}
