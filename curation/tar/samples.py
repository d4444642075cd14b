"""Reads the samples of a shard into memory, interprets their members, and writes tars.

A sample is a run of members with the same key, by WebDataset's rule.  ``scan.py`` describes how a tar is read and how
damage is handled.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from curation.errors import SampleError, ShardError
from curation.jsonio import clean_text, decode_text, parse_json_object
from curation.storage.urls import Source
from curation.tar.blocks import Block
from curation.tar.headers import MAX_NAME_BYTES, RECORD, BadHeader, Member, make_header, padding
from curation.tar.random_access import MAX_SAMPLE_BYTES, parse_span, place_of
from curation.tar.scan import IMAGE_SUFFIXES, TOGETHER, SampleSpan, TarReport, TarScan, Window

AUTO: Final = "auto"
PLAIN: Final = "plain"
CAPTION: Final = "caption"
MAX_MEMBER_BYTES: Final = 256 << 20  # larger members are not loaded into memory, only copied


@dataclass(frozen=True, slots=True)
class Parts:
    """Which member of a sample is its picture, and what its caption is.

    Attributes:
        image: ``auto``: the first picture that is called after its key alone (``key.jpg``), else the first of any name
            (``key.0.jpg``).  ``plain``: the former alone.  Otherwise a name, with or without its format: ``0``,
            ``0.jpg``.
        caption: ``auto``: the field ``caption`` of the json, or ``text`` where that is absent; then the member ``txt``
            or ``txt.gz``.  ``caption``: the field ``caption``, then ``txt``.  Otherwise the name of a field.
    """

    image: str = AUTO
    caption: str = AUTO

    def picture(self, suffixes: Sequence[str]) -> str | None:
        """The suffix of the picture among those of a sample."""
        if self.image in (AUTO, PLAIN):
            plain = next((suffix for suffix in suffixes if suffix in IMAGE_SUFFIXES), None)
            if plain is not None or self.image == PLAIN:
                return plain
            return next((suffix for suffix in suffixes if _is_picture(suffix)), None)
        wanted = self.image.lower()
        named = (suffix for suffix in suffixes if wanted in (suffix, suffix.rpartition(".")[0]) and _is_picture(suffix))
        return next(named, None)

    def names(self, suffixes: Sequence[str]) -> dict[str, str] | None:
        """Suffix → what it is called here, without pictures that are not chosen; None where nothing changes."""
        chosen = self.picture(suffixes)
        packed = "txt.gz" in suffixes and "txt" not in suffixes and self.caption != CAPTION
        if not packed and self.image in (AUTO, PLAIN) and (chosen is None or "." not in chosen):
            return None
        is_named = self.image not in (AUTO, PLAIN)
        names = {suffix: suffix for suffix in suffixes if not (is_named and _is_picture(suffix))}
        if chosen is not None:
            names[chosen] = chosen.rpartition(".")[2]
        if packed:
            names["txt.gz"] = "txt"
        return names

    def told(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The metadata with the caption under ``caption``."""
        if self.caption == AUTO:
            is_there = metadata.get("caption") is not None or not isinstance(metadata.get("text"), str)
            return metadata if is_there else {**metadata, "caption": metadata["text"]}
        return metadata if self.caption == CAPTION else {**metadata, "caption": metadata.get(self.caption)}


USUAL: Final = Parts()


def _is_picture(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


@dataclass(slots=True)
class Sample:
    """A sample in memory, with the names that ``Parts`` gives to its picture and its caption.

    Attributes:
        key: The members' name up to the first dot of the basename, including the folder.
        members: Suffix (after the first dot, in lower case) → bytes of the requested members, in the shard's order.
        mtimes: Suffix → seconds since 1970, of the same members.
        suffixes: The suffixes of all members, requested or not.
        problem: Why the sample must not be used, as (reason, detail); None for a good sample.
    """

    key: str
    members: dict[str, bytes]
    mtimes: dict[str, int]
    suffixes: tuple[str, ...]
    problem: tuple[str, str] | None = None

    def check(self) -> None:
        """Raise SampleError if the sample has a problem."""
        if self.problem is not None:
            raise SampleError(*self.problem)

    @property
    def image_suffix(self) -> str | None:
        """The suffix of the first image, requested or not."""
        return next((suffix for suffix in self.suffixes if suffix in IMAGE_SUFFIXES), None)


def read_samples(
    path: str | Source,
    want: Collection[str] | Callable[[str], bool] | None = None,
    report: TarReport | None = None,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    parts: Parts | None = None,
) -> Iterator[Sample]:
    """Yield the samples of a shard in order, including those with a problem.

    A problem is ``damaged_tar`` (see ``TarScan``), ``duplicate_key``, ``duplicate_member``, ``not_a_file`` (a link, a
    device, a sparse file), ``unsafe_name`` or ``member_too_large`` (of a wanted member).

    Args:
        path: The shard: a path, or what ``curation.storage.urls`` can read.
        want: The suffixes (lower case) to load, or a function that tests one; default: all.  Others are not copied.
        report: Receives what else was found; it is complete after the last sample.
        max_member_bytes: Larger members are not loaded.
        parts: Which member is the picture, and which the caption; default: ``USUAL``, where ``want`` is given.

    Raises:
        ShardError: The file cannot be read.
    """
    wanted: Callable[[str], bool]
    if want is None or callable(want):
        wanted = want or (lambda suffix: True)
    else:
        wanted = frozenset(want).__contains__
    parts = USUAL if parts is None and want is not None else parts
    tar = TarScan(path, report)
    for window in tar.windows():
        for span in window.spans:
            if span.key:
                sample = _load(window, span, wanted, max_member_bytes, parts)
                tar.report.odd_texts += _is_odd_text(sample.members.get("txt"))
                yield sample


def _is_odd_text(txt: bytes | None) -> bool:
    try:
        if txt is not None and not txt.isascii():
            decode_text(txt, "strict")
    except UnicodeDecodeError:
        return True
    return False


def open_sample(shard: Path, key: str) -> Sample:
    """Read one sample of a shard by its key, with the ``.idx`` next to the shard, so that one read is enough.

    Raises:
        SampleError: ``no_such_key``, or ``sample_too_large``.
        ShardError: There is no index, or it belongs to another shard.
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
    """Whether a file with this name stays inside the folder in which it is unpacked."""
    parts = name.split("/")
    too_long = len(name) > MAX_NAME_BYTES or max(map(len, parts)) > 255
    return bool(parts[0]) and ".." not in parts and "\0" not in name and not too_long


class Writable(Protocol):
    def write(self, data: bytes | bytearray | memoryview, /) -> object: ...


class TarWriter:
    """Writes plain files as ustar, with a pax header if a name or size needs one, and the same bytes on any machine."""

    def __init__(self, file: Writable) -> None:
        self._file = file
        self.size = 0

    def add(self, name: str | bytes, data: bytes | memoryview, mtime: int = 0) -> None:
        """Write one member.  Raises ValueError for a name that is empty, contains a NUL, or is too long for a path."""
        self._write(make_header(name, len(data), mtime))
        self._write(data)
        self._write(padding(len(data)))

    def close(self) -> None:
        """Write the end-of-archive blocks, padded to whole records as GNU tar does.  The file stays open."""
        end = 2 * 512
        self._write(bytes(end + -(self.size + end) % RECORD))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.size += len(data)


def load_sample(
    window: Window, span: SampleSpan, want: Collection[str], max_member_bytes: int = MAX_MEMBER_BYTES
) -> Sample:
    """One sample of a window, with the members of these suffixes as all stages call them (``USUAL``)."""
    return _load(window, span, want.__contains__, max_member_bytes, USUAL)


def _load(
    window: Window,
    span: SampleSpan,
    wanted: Callable[[str], bool],
    max_member_bytes: int,
    parts: Parts | None = None,
) -> Sample:
    suffixes = tuple([member.suffix for member in span.members])
    names = parts.names(suffixes) if parts is not None else None
    members: dict[str, bytes] = {}
    mtimes: dict[str, int] = {}
    problem = problem_of(span)
    for member in span.members:
        name = member.suffix if names is None else names.get(member.suffix, "")
        if not wanted(name) or not member.regular or name in members:
            continue
        if member.size <= max_member_bytes:
            members[name] = window.read(member.data, member.size)
            mtimes[name] = member.mtime
        elif problem is None:
            problem = "member_too_large", f"{member.text_name}: {member.size:,} bytes, at most {max_member_bytes:,}"
    if names is not None and names.get("txt.gz") == "txt" and "txt" in members:
        try:
            members["txt"] = zlib.decompressobj(_GZIP_ONLY).decompress(members["txt"], _MAX_TXT_BYTES)
        except zlib.error as error:
            del members["txt"]
            problem = problem or ("damaged_gzip", f"its .txt.gz cannot be unpacked ({error})")
    return Sample(span.key, members, mtimes, suffixes, problem)


def problem_of(span: SampleSpan) -> tuple[str, str] | None:
    """Why a sample must not be used, as (reason, detail); None for a good one."""
    if span.torn:
        return "damaged_tar", span.torn
    if span.repeated:
        return "duplicate_key", f"an earlier sample of the shard has the same key; {TOGETHER}"
    if span.refused:
        return span.refused
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


_MAX_TXT_BYTES = 4 * MAX_CAPTION_CHARACTERS + 8
_GZIP_ONLY = 31  # zlib's window bits for gzip with a header


_EMPTY_CHARACTERS = 1000  # a caption whose first characters are all invisible is looked at together with the .txt


_LOOSE_SUFFIXES = (".json", ".jpg", ".txt")


def metadata_of(sample: Sample) -> dict[str, Any]:
    """The .json as an object.  Raises SampleError: ``no_json``, or those of ``parse_json_object``."""
    data = sample.members.get("json")
    if data is None:
        raise SampleError("no_json", f"it has only {', '.join(sample.suffixes)}")
    return parse_json_object(data)


def image_of(sample: Sample) -> bytes:
    """The bytes of the image in any format.  Raises SampleError ``no_image``."""
    for suffix, data in sample.members.items():
        if suffix in IMAGE_SUFFIXES:
            return data
    raise SampleError("no_image", f"it has only {', '.join(sample.suffixes)}")


def caption_of(metadata: Mapping[str, Any], txt: bytes | None) -> str:
    """The caption in the metadata, or the .txt where that one is missing or empty, as one clean line.

    Raises SampleError ``no_caption`` or ``caption_too_long``."""
    told = metadata.get("caption")
    captions = [told] if isinstance(told, str) else []
    if txt is not None and not (captions and clean_text(captions[0][:_EMPTY_CHARACTERS])):
        captions.append(decode_text(txt[: 4 * MAX_CAPTION_CHARACTERS + 8]))
    if not captions:
        raise SampleError("no_caption", "neither in the json nor as a txt")
    for caption in captions:
        if len(caption) > MAX_CAPTION_CHARACTERS:
            raise SampleError("caption_too_long", f"more than {MAX_CAPTION_CHARACTERS:,} characters")
    return next(filter(None, map(clean_text, captions)), "")


def check_loose_name(key: str) -> None:
    """Raise SampleError ``unsafe_name`` for a key that cannot name loose files beside those of other samples.

    A folder that looks like a file (``000.json/001``) would conflict with the file of that name of another sample.
    """
    *folders, base = key.split("/")
    if any(name.endswith(_LOOSE_SUFFIXES) for name in folders) or len(os.fsencode(base)) > 255 - len(".json"):
        raise SampleError("unsafe_name", "no loose files can be named so; --edits_layout tar takes it")


def lenient_metadata(data: bytes | None) -> dict[str, Any]:
    """The .json of a sample; empty if it is missing or cannot be read, because the image is captioned nevertheless."""
    if data is None:
        return {}
    try:
        return parse_json_object(data)
    except SampleError:
        return {}
