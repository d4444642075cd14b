"""Reads tar header blocks from a buffer, and makes them.

It reads v7, ustar, GNU (long names and links, base-256 numbers, old sparse files) and pax.  It writes ustar, with a pax
header in front if a name or a size does not fit.

Programs do not agree on every header.  A header is **odd** if Python's tarfile, with which webdataset and Hugging Face
``datasets`` read, takes another name, size or place from it than this module does, or stops at it.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from zlib import adler32

BLOCK: Final = 512


RECORD: Final = 20 * BLOCK  # tar pads an archive to whole records


MAX_EXTENSION_BYTES: Final = 1 << 20  # a long name or a pax header; real ones are a few hundred bytes


MAX_EXTENSIONS: Final = 16  # per member; real members have up to three


MAX_NAME_BYTES: Final = 4096  # PATH_MAX


ZERO_BLOCK: Final = bytes(BLOCK)

# A header's type flag, as the byte's value.
REGULAR: Final = frozenset(b"0\x007")


LONG_NAME, LONG_LINK, GNU_SPARSE = b"LKS"


EXTENSIONS: Final = frozenset(b"LKxX")  # they describe the next member; "X" is Solaris's "x"
GLOBAL: Final = ord("g")  # a pax header for all members behind it
_HARD_KEYWORDS: Final = ("GNU.sparse.", "hdrcharset")  # of pax headers; tarfile itself is asked about these
WITHOUT_DATA: Final = frozenset(b"123456")  # links, devices, folders, FIFOs: their size field is ignored

_unpack = struct.Struct("100s24s12s12s8sB100s88s167s").unpack_from
_NO_LINK, _NO_PREFIX = bytes(100), bytes(167)
_OFTEN_CHANGED: Final = 157  # the bytes before the name of the link, which never sum up to Adler-32's modulus
_SPARSE_MAP_BYTES: Final = 8 << 10  # of a sparse file's data: its map must end within them


MAGIC: Final = b"ustar"


MAGIC_AT: Final = 257


_OCTAL = frozenset(b"01234567 \0")


_PREFIX_BYTES = 155
_NUMBER: Final = re.compile(rb" *[0-7]* *(?:\0.*)?|[\x80\xff].*", re.DOTALL)  # tarfile reads these as this module does


_CHECKSUM = slice(148, 156)


_SPACES_SUM = 8 * ord(" ")


_OWNER = b"0000644\x000000000\x000000000\x00"  # mode, user and group


_NO_LINK_AND_MAGIC = bytes(100) + b"ustar\x0000" + bytes(80)


_CONSTANT_SUM = sum(_OWNER) + sum(_NO_LINK_AND_MAGIC) + _SPACES_SUM


class BadHeader(ValueError):
    """A block that should be a header is not a valid one; the message describes the defect, with "it" as subject."""


@dataclass(slots=True)
class Member:
    """A member and its place; all offsets are those in the file.

    suffix: the part after the first dot of the basename, in lower case; "" without a key.  start: its first header
    block, including a long name or pax header.  data, size: as stored.  end: after the padding.
    regular: a plain file, not a link, a device or a sparse file.  odd: how Python's tarfile takes its header; "" if it
    takes it as this module does.
    """

    name: bytes
    suffix: str
    start: int
    data: int
    size: int
    end: int
    regular: bool
    mtime_field: bytes
    odd: str = ""

    @property
    def mtime(self) -> int:
        """The time in whole seconds since 1970; 0 if the field is invalid."""
        try:
            return max(0, parse_number(self.mtime_field))
        except BadHeader:
            return 0

    @property
    def text_name(self) -> str:
        """The name as text; bytes that are not UTF-8 become lone surrogates, as in Python's tarfile."""
        return self.name.decode("utf-8", "surrogateescape")


def parse_header(buffer: bytearray | bytes, at: int) -> tuple[bytes, int, bytes, int]:
    """Parse the header block at ``buffer[at:at + 512]`` into (name, size, mtime field, type flag).

    Raises BadHeader if the checksum does not fit.
    """
    return parse_block(buffer, at)[:4]


def parse_block(buffer: bytearray | bytes, at: int) -> tuple[bytes, int, bytes, int, str]:
    """Parse a header block, as ``parse_header``, into (name, size, mtime field, type flag, ``Member.odd``).

    This is the inner loop of every pass over a shard.  So the bytes are summed by Adler-32, which is computed in C: its
    low half is 1 + their sum.  The bytes that are the same in nearly all headers are summed only once.
    """
    name, owner, size_field, mtime, checksum, kind, link, rest, tail = _unpack(buffer, at)
    others = _sum_of_others(owner, mtime, rest) if link == _NO_LINK and tail == _NO_PREFIX else -1
    plain = others >= 0 and (adler32(buffer[at : at + _OFTEN_CHANGED]) & 0xFFFF) + others == _expected(checksum)
    if not plain and parse_number(checksum) not in _sums(buffer, at):
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
    if plain and size_field[0] < 0x81:
        return name, size, mtime, kind, ""
    if tail[0] and rest.startswith(b"ustar\0"):  # GNU's "ustar " has times in this field
        name = tail[:_PREFIX_BYTES].partition(b"\0")[0] + b"/" + name
    return name, size, mtime, kind, _oddity_of_block(bytes(buffer[at : at + BLOCK]), name, size)


@lru_cache(4096)
def _sum_of_others(owner: bytes, mtime: bytes, rest: bytes) -> int:
    """The sum of the bytes of ``rest``; -1 if a field that this module does not need is no number: tarfile stops there.

    owner: mode, user and group.  rest: from the magic to the device's numbers.
    """
    fields = (owner[:8], owner[8:16], owner[16:], mtime, rest[72:80], rest[80:])
    return sum(rest) if all(map(_NUMBER.fullmatch, fields)) else -1


def _oddity_of_block(block: bytes, name: bytes, size: int) -> str:
    """``Member.odd`` of a single block, by what tarfile itself reads."""
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"Python's tarfile stops at its header ({error})"
    return _difference(found, name, size)


def _difference(found: tarfile.TarInfo, name: bytes, size: int) -> str:
    theirs = found.name.encode("utf-8", "surrogateescape")
    if theirs.rstrip(b"/") != name.rstrip(b"/"):
        return f"Python's tarfile reads its name as {theirs[:200].decode('utf-8', 'replace')!r}"
    if found.size != size:
        return f"Python's tarfile reads its size as {found.size:,}, not {size:,}"
    return ""


@lru_cache(4096)
def _expected(checksum: bytes) -> int:
    """1 + the sum of a header's bytes as it follows from its checksum field, which counts itself as eight spaces; -1 if
    the field has a form that tarfile does not read."""
    return parse_number(checksum) + sum(checksum) - _SPACES_SUM + 1 if checksum[0] <= 0x80 else -1


def parse_special(buffer: bytearray | bytes, at: int, limit: int) -> tuple[bytes, int, bytes, int, int, str] | None:
    """Parse a header that is not a plain file's, with the extensions in front of it.

    Returns (name, size as stored, mtime field, type flag, bytes from ``at`` to the data, ``Member.odd``), or None if
    ``limit`` comes first.  The type flag becomes GNU_SPARSE for a plain file whose data are not its content (pax's
    sparse format).  If extensions disagree, the first one counts, as in Python's tarfile; but not on the name.
    """
    start, alike, oddity = at, True, ""
    pax: dict[str, bytes] = {}
    for _ in range(MAX_EXTENSIONS):
        if at + BLOCK > limit:
            return None
        name, size, mtime, kind, odd = parse_block(buffer, at)
        oddity = oddity or odd
        at += BLOCK
        if kind not in EXTENSIONS and kind != GLOBAL:
            break
        if size + at - start > MAX_EXTENSION_BYTES:
            raise BadHeader(f"it has an extended header of {size + at - start:,} bytes")
        if at + size > limit:
            return None
        body = bytes(buffer[at : at + size])
        if kind == GLOBAL:
            return name, size, mtime, kind, at - start, oddity or _oddity_of_global(body)
        if kind == LONG_NAME:
            alike &= b"\0" in body and body[0] != 0
            records = {"path": body.partition(b"\0")[0]}
        elif kind != LONG_LINK:
            records = parse_pax(body)
            alike &= _are_plain(records)
        else:
            records = {}
        if "path" in pax and records.get("path", pax["path"]) != pax["path"]:
            raise BadHeader("its extended headers give it two names")  # the member of the first one is lost
        pax = records | pax
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
        while more:  # further blocks with the map of holes
            if at + BLOCK > limit:
                return None
            if at - start > MAX_EXTENSION_BYTES:
                raise BadHeader("it has a map of too many holes")
            more = buffer[at + 504]
            at += BLOCK
    if name.startswith(b"\0"):
        raise BadHeader("its name begins with NUL")
    if kind in WITHOUT_DATA or (kind == 0 and name.endswith(b"/")):  # v7 marks folders in this way
        size = 0
    if alike and (kind in REGULAR or kind in WITHOUT_DATA):
        return name, size, mtime, kind, at - start, oddity
    known = min(size, _SPARSE_MAP_BYTES) if kind == GNU_SPARSE else 0
    if at + known > limit:
        return None
    oddity = oddity or _oddity(bytes(buffer[start : at + known]), at - start, name, size, regular=kind in REGULAR)
    return name, size, mtime, kind, at - start, oddity


def _are_plain(records: dict[str, bytes]) -> bool:
    """Whether tarfile takes from a pax header what this module takes from it, as nearly all of them are."""
    size, path = records.get("size", b"0"), records.get("path", b"name")
    plain = size.isdigit() and len(size) < 20 and path != b"" and b"\0" not in path and not path.endswith(b"/")
    return plain and not any(keyword.startswith(_HARD_KEYWORDS) for keyword in records)


def _oddity_of_global(body: bytes) -> str:
    """A global pax header changes every header behind it for tarfile; here it is a member without a key."""
    try:
        records = parse_pax(body)
    except BadHeader as error:
        return f"{error}"
    for keyword in records:
        if keyword in ("path", "linkpath", "size") or keyword.startswith(_HARD_KEYWORDS):
            return f"it gives all members behind it one {keyword[:100]!r}"
    return ""


def _oddity(blocks: bytes, data: int, name: bytes, size: int, *, regular: bool) -> str:
    """``Member.odd`` of a header with extensions, by what tarfile itself reads.

    Args:
        blocks: The header blocks, and the data's first bytes where tarfile looks into them.
        data: The size of the header blocks.
        name, size, regular: What this module reads.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(blocks), mode="r:", encoding="utf-8") as tar:
            found, behind = tar.next(), tar.offset
    except tarfile.TarError as error:
        return f"Python's tarfile stops at its header ({error})"
    except (ValueError, ArithmeticError, LookupError, RecursionError) as error:
        return f"Python's tarfile fails at its header ({error})"
    if found is None:
        return "Python's tarfile stops at its header"
    if b"\0" in name:
        return "its name holds a NUL, at which some programs end it"
    if behind != data + padded(size):
        return f"Python's tarfile expects the next header {behind:,} bytes behind it, not {data + padded(size):,}"
    if (found.isreg() and not found.issparse()) != regular:
        return f"Python's tarfile reads it as {'a special' if regular else 'a plain'} file"
    return _difference(found, name, size if regular else found.size)


def parse_member(buffer: bytearray | bytes, at: int, limit: int, shift: int = 0) -> Member | None:
    """Parse the member whose header is at the file's byte ``at``, which is ``buffer[at - shift]``.

    Returns:
        The member, with all offsets in the file; None if ``limit`` comes before the end of its headers.

    Raises:
        BadHeader: There is no valid header.
    """
    if at + BLOCK > limit:
        return None
    data = at + BLOCK
    name, size, mtime, kind, odd = parse_block(buffer, at - shift)
    if kind not in REGULAR:
        special = parse_special(buffer, at - shift, limit - shift)
        if special is None:
            return None
        name, size, mtime, kind, header_bytes, odd = special
        data = at + header_bytes
        name = b"" if kind == GLOBAL else name  # its name is that of no file
    split = split_name(name)
    suffix = "" if split is None else split[1].decode("utf-8", "surrogateescape").lower()
    return Member(name, suffix, at, data, size, data + padded(size), kind in REGULAR, mtime, odd)


def find_header(buffer: bytearray | bytes, begin: int = 0, end: int | None = None) -> int:
    """The offset of the first header that is completely in ``buffer[begin:end]``, at any alignment; -1 without one.

    A header is recognised by its magic and a correct checksum, so headers of v7, which has no magic, are not found.
    """
    end = len(buffer) if end is None else end
    at = buffer.find(MAGIC, begin + MAGIC_AT, end)
    while 0 <= at <= end - BLOCK + MAGIC_AT:
        start = at - MAGIC_AT
        if buffer[start + _CHECKSUM.start] in _OCTAL:  # a cheap test: crafted data could make the search slow
            with contextlib.suppress(BadHeader):
                parse_header(buffer, start)
                return start
        at = buffer.find(MAGIC, at + 1, end)
    return -1


def parse_number(field: bytes) -> int:
    """Parse a numeric field: octal digits among spaces and NULs, or base-256 if the first bit is set."""
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
    """Parse the records ``"<length> <keyword>=<value>\\n"`` of a pax header.  Raises BadHeader if one is malformed."""
    records: dict[str, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 10)
        if space < 0 or not data[at:space].isdigit():
            raise BadHeader("its pax header is malformed")
        end = at + int(data[at:space])
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or end <= space + 1 or not equals or not keyword or data[end - 1] != 0x0A:
            raise BadHeader("its pax header is malformed")
        records[keyword.decode("utf-8", "surrogateescape")] = value
        at = end
    return records


def make_header(name: str | bytes, size: int, mtime: int = 0) -> bytes:
    """Make the header blocks of a regular file: mode 0644, owner 0, so that they are the same on every machine.

    A name beyond ustar's 100 bytes (or 155 + 100 at a slash) or a size of 8 GiB or more gets a pax header in front.
    Raises ValueError for a name that is empty, too long, or contains a NUL.
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
    """(key, suffix) by WebDataset's rule: the name is split at the first dot of the basename; the key has the folder.

    None for a name without a key: a folder, or a basename without a dot or with nothing before it.
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
    """ustar's (prefix, name); the name is empty if it does not fit."""
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


def _sums(buffer: bytearray | bytes, at: int) -> tuple[int, int]:
    """The checksum, and that of some old tars, which sum signed bytes."""
    block = bytearray(buffer[at : at + BLOCK])
    block[_CHECKSUM] = b" " * 8
    unsigned = sum(block)
    return unsigned, unsigned - 256 * sum(byte > 127 for byte in block)
