"""Tar header blocks: reading them from a buffer, and making them.

Formats read: v7, ustar, GNU (long names and links, base-256 numbers, old sparse files) and pax.  Written: ustar, with a
pax header in front where a name or a size does not fit.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from zlib import adler32

BLOCK: Final = 512


RECORD: Final = 20 * BLOCK  # tar pads an archive to whole records


MAX_EXTENSION_BYTES: Final = 1 << 20  # a long name or a pax header; real ones are a few hundred bytes


MAX_EXTENSIONS: Final = 16  # of one member; real ones have up to three


MAX_NAME_BYTES: Final = 4096  # PATH_MAX


ZERO_BLOCK: Final = bytes(BLOCK)

# A header's type flag, as the byte's value.
REGULAR: Final = frozenset(b"0\x007")


LONG_NAME, LONG_LINK, GNU_SPARSE = b"LKS"


EXTENSIONS: Final = frozenset(b"LKxX")  # of the member behind them; "X" is Solaris's "x".  "g" stands by itself


WITHOUT_DATA: Final = frozenset(b"123456")  # links, devices, folders, FIFOs: whatever their size field says

_unpack = struct.Struct("100s24x12s12s8sB100x6s82xB166x").unpack_from  # of the prefix one byte: it is rare


MAGIC: Final = b"ustar"


MAGIC_AT: Final = 257


_OCTAL = frozenset(b"01234567 \0")


_PREFIX = slice(345, 500)


_CHECKSUM = slice(148, 156)


_MODULUS = 65521  # of Adler-32


_SPACES_SUM = 8 * ord(" ")


_OWNER = b"0000644\x000000000\x000000000\x00"  # mode, user and group


_NO_LINK_AND_MAGIC = bytes(100) + b"ustar\x0000" + bytes(80)


_CONSTANT_SUM = sum(_OWNER) + sum(_NO_LINK_AND_MAGIC) + _SPACES_SUM


class BadHeader(ValueError):
    """A block where a header is due that is none, or one that makes no sense; the message says what "it" lacks."""


@dataclass(slots=True)
class Member:
    """A member and where it lies, all offsets in the file.

    suffix: after the first dot of the basename, lower case; "" where there is no key.  start: its first header block,
    with the long name or pax header before it.  data, size: as stored.  end: after the padding.
    regular: a plain file, not a link, a device or a sparse file.
    """

    name: bytes
    suffix: str
    start: int
    data: int
    size: int
    end: int
    regular: bool
    mtime_field: bytes

    @property
    def mtime(self) -> int:
        """Whole seconds since 1970; 0 where the field makes no sense."""
        try:
            return max(0, parse_number(self.mtime_field))
        except BadHeader:
            return 0

    @property
    def text_name(self) -> str:
        """The name as text; bytes that are not UTF-8 become lone surrogates, as in Python's tarfile."""
        return self.name.decode("utf-8", "surrogateescape")


def parse_header(buffer: bytearray | bytes, at: int) -> tuple[bytes, int, bytes, int]:
    """The header block at ``buffer[at:at + 512]`` as (name, size, mtime field, type flag).

    Raises BadHeader where the checksum does not fit.  This is the inner loop of every pass over a shard: the sum of the
    bytes comes from Adler-32, whose low half is 1 + their sum modulo 65521, computed in C.
    """
    name, size_field, mtime, checksum, kind, magic, has_prefix = _unpack(buffer, at)
    if adler32(buffer[at : at + BLOCK]) & 0xFFFF != _adler_low_half(checksum):
        stored = parse_number(checksum)
        if stored != _signed_sum(buffer, at):
            raise BadHeader("its checksum does not fit")
    try:
        size = int(size_field[:11], 8) if size_field[11] in b"\0 " else parse_number(size_field)
    except ValueError:
        size = parse_number(size_field)
    if size < 0:
        raise BadHeader(f"it has a size of {size}")
    end = name.find(0)
    if end >= 0:
        name = name[:end]
    if has_prefix and magic == b"ustar\0":  # GNU's "ustar " keeps times there
        name = bytes(buffer[at : at + BLOCK][_PREFIX]).partition(b"\0")[0] + b"/" + name
    return name, size, mtime, kind


@lru_cache(4096)
def _adler_low_half(checksum: bytes) -> int:
    """The low half of the header's Adler-32, as its checksum field foretells it: 1 + the sum of all bytes.

    The checksum counts its own field as eight spaces.
    """
    return (parse_number(checksum) + sum(checksum) - _SPACES_SUM + 1) % _MODULUS


def parse_special(buffer: bytearray | bytes, at: int, limit: int) -> tuple[bytes, int, bytes, int, int] | None:
    """A header that is not a plain file's, with the extensions in front of it.

    Returns (name, size as stored, mtime field, type flag, bytes from ``at`` to the data), None where ``limit`` comes
    first.  A type flag of a plain file whose data are not its contents (pax's sparse format) becomes GNU_SPARSE.
    Where extensions disagree the first holds, as in Python's tarfile.
    """
    start = at
    pax: dict[str, bytes] = {}
    for _ in range(MAX_EXTENSIONS):
        if at + BLOCK > limit:
            return None
        name, size, mtime, kind = parse_header(buffer, at)
        at += BLOCK
        if kind not in EXTENSIONS:
            break
        if size + at - start > MAX_EXTENSION_BYTES:
            raise BadHeader(f"it has an extended header of {size + at - start:,} bytes")
        if at + size > limit:
            return None
        body = bytes(buffer[at : at + size])
        if kind == LONG_NAME:
            pax.setdefault("path", body.partition(b"\0")[0])
        elif kind != LONG_LINK:
            pax = parse_pax(body) | pax
        at += padded(size)
    else:
        raise BadHeader(f"it has more than {MAX_EXTENSIONS} extended headers")
    if pax:
        name = pax.get("GNU.sparse.name") or pax.get("path") or name
        if pax.get("size", b"").isdigit():
            size = int(pax["size"][:20])
        if (seconds := pax.get("mtime", b"").partition(b".")[0]).isdigit():
            mtime = b"%o" % int(seconds[:20])
        if kind in REGULAR and any(keyword.startswith("GNU.sparse.") for keyword in pax):
            kind = GNU_SPARSE
    elif kind == GNU_SPARSE:
        more = buffer[at - BLOCK + 482]
        while more:  # blocks that go on with the map of holes
            if at + BLOCK > limit:
                return None
            if at - start > MAX_EXTENSION_BYTES:
                raise BadHeader("it has a map of too many holes")
            more = buffer[at + 504]
            at += BLOCK
    if name.startswith(b"\0"):
        raise BadHeader("its name begins with NUL")
    if kind in WITHOUT_DATA or (kind == 0 and name.endswith(b"/")):  # v7 marks a folder so
        size = 0
    return name, size, mtime, kind, at - start


def parse_member(buffer: bytearray | bytes, at: int, limit: int, shift: int = 0) -> Member | None:
    """The member whose header stands at the file's byte ``at``, which is ``buffer[at - shift]``.

    Returns:
        The member, with all offsets in the file; None where ``limit`` comes before the end of its headers.

    Raises:
        BadHeader: There is no header, or it makes no sense.
    """
    if at + BLOCK > limit:
        return None
    data = at + BLOCK
    name, size, mtime, kind = parse_header(buffer, at - shift)
    if kind not in REGULAR:
        special = parse_special(buffer, at - shift, limit - shift)
        if special is None:
            return None
        name, size, mtime, kind, header_bytes = special
        data = at + header_bytes
    split = split_name(name)
    suffix = "" if split is None else split[1].decode("utf-8", "surrogateescape").lower()
    return Member(name, suffix, at, data, size, data + padded(size), kind in REGULAR, mtime)


def find_header(buffer: bytearray | bytes, begin: int = 0, end: int | None = None) -> int:
    """Where the first header begins that lies wholly in ``buffer[begin:end]``, at any alignment; -1 without one.

    A header is known by its magic and a checksum that fits, so those of v7, which has no magic, are not found.
    """
    end = len(buffer) if end is None else end
    at = buffer.find(MAGIC, begin + MAGIC_AT, end)
    while 0 <= at <= end - BLOCK + MAGIC_AT:
        start = at - MAGIC_AT
        if buffer[start + _CHECKSUM.start] in _OCTAL:  # a cheap test, for bytes that are made to annoy
            with contextlib.suppress(BadHeader):
                parse_header(buffer, start)
                return start
        at = buffer.find(MAGIC, at + 1, end)
    return -1


def parse_number(field: bytes) -> int:
    """A numeric field: octal digits among spaces and NULs, or base-256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big", signed=True) if field[0] & 0x40 else _unsigned_base256(field)
    text = field.partition(b"\0")[0].strip(b" ")
    if not text:
        return 0
    if not text.isdigit():
        raise BadHeader("a field of it is no number")
    try:
        return int(text, 8)
    except ValueError:
        raise BadHeader("a field of it is no number") from None


def parse_pax(data: bytes) -> dict[str, bytes]:
    """The records ``"<length> <keyword>=<value>\\n"`` of a pax header.  Raises BadHeader where they are malformed."""
    records: dict[str, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 10)
        if space < 0 or not data[at:space].isdigit():
            raise BadHeader("its pax header is malformed")
        end = at + int(data[at:space])
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or end <= space + 1 or not equals or data[end - 1] != 0x0A:
            raise BadHeader("its pax header is malformed")
        records[keyword.decode("utf-8", "surrogateescape")] = value
        at = end
    return records


def make_header(name: str | bytes, size: int, mtime: int = 0) -> bytes:
    """The header blocks of a regular file: mode 0644, owner 0, nothing of the machine, so that bytes repeat.

    A name beyond ustar's 100 bytes (or 155 + 100 at a slash) or a size of 8 GiB and more gets a pax header in front.
    Raises ValueError for a name that is empty, too long, or holds a NUL.
    """
    raw = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    if not raw or len(raw) > MAX_NAME_BYTES or b"\0" in raw:
        raise ValueError(f"not a name for a tar member: {raw[:100]!r}")
    records = b""
    prefix, base = _split_name(raw)
    if not base:
        records += _pax_record(b"path", raw)
        base = raw[-100:]
    if size >= 8 << 30:
        records += _pax_record(b"size", b"%d" % size)
    mtime = min(max(mtime, 0), 0o77777777777)
    header = _ustar(prefix, base, size if size < 8 << 30 else 0, mtime, b"0")
    if not records:
        return header
    return _ustar(b"", b"PaxHeader/" + base[-80:], len(records), mtime, b"x") + records + padding(len(records)) + header


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """(key, suffix) by WebDataset's rule: split at the first dot of the basename, the folder belongs to the key.

    None for a name without a key: a folder, or a basename that has no dot or nothing before it.
    """
    base = name.rfind(b"/") + 1
    dot = name.find(b".", base)
    return (name[:dot], name[dot + 1 :]) if dot > base else None


def padding(size: int) -> bytes:
    """The zeros that fill the last block of ``size`` bytes of data."""
    return ZERO_BLOCK[: -size % BLOCK]


def padded(size: int) -> int:
    """``size`` rounded up to whole blocks."""
    return size + -size % BLOCK


def _ustar(prefix: bytes, name: bytes, size: int, mtime: int, kind: bytes) -> bytes:
    numbers = b"%011o\0%011o\0" % (size, mtime)
    checksum = _CONSTANT_SUM + sum(name) + sum(prefix) + sum(numbers) + kind[0]
    return b"".join(
        (
            name.ljust(100, b"\0"),
            _OWNER,
            numbers,
            b"%06o\0 " % checksum,
            kind,
            _NO_LINK_AND_MAGIC,
            prefix.ljust(167, b"\0"),
        )
    )


def _split_name(raw: bytes) -> tuple[bytes, bytes]:
    """ustar's (prefix, name); an empty name where it does not fit."""
    if len(raw) <= 100:
        return b"", raw
    slash = raw.find(b"/", len(raw) - 101)
    if 0 < slash <= 155 and slash + 1 < len(raw):
        return raw[:slash], raw[slash + 1 :]
    return b"", b""


def _pax_record(keyword: bytes, value: bytes) -> bytes:
    length = len(keyword) + len(value) + 3  # a space, an equals sign, a newline, and the length's own digits
    digits = len(str(length))
    while len(str(length + digits)) != digits:
        digits += 1
    return b"%d %s=%s\n" % (length + digits, keyword, value)


def _unsigned_base256(field: bytes) -> int:
    return int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big")


def _signed_sum(buffer: bytearray | bytes, at: int) -> int:
    """Some old tars summed signed bytes."""
    block = bytearray(buffer[at : at + BLOCK])
    block[_CHECKSUM] = b" " * 8
    return sum(block) - 256 * sum(byte > 127 for byte in block)
