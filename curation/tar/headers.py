"""Reads tar header blocks from a buffer, and makes them.

It reads v7, ustar, GNU (long names and links, base-256 numbers, old sparse files) and pax.  It writes ustar, with a pax
header in front if a name or a size does not fit.

Programs do not agree on every header.  A header is **odd** if Python's tarfile, with which webdataset and Hugging Face
``datasets`` read, takes another name, size or place from it than this module does, or if it or GNU tar stops at it.
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
PAX: Final = ord("x")
GLOBAL: Final = ord("g")  # a pax header for all members behind it
_HARD_KEYWORDS: Final = ("GNU.sparse.", "hdrcharset")  # of pax headers; tarfile itself is asked about these
WITHOUT_DATA: Final = frozenset(b"123456")  # links, devices, folders, FIFOs: their size field is ignored

_unpack = struct.Struct("100s24s11sB12s8sB355s").unpack_from
_OFTEN_CHANGED: Final = 157  # the bytes before the name of the link, which never sum up to Adler-32's modulus
_NO_LINK: Final = bytes(100)
_SIMILAR_HEADERS: Final = 256  # kinds of headers, and texts of pax headers, whose judgement is kept
_SPARSE_MAP_BYTES: Final = 8 << 10  # of a sparse file's data: its map must end within them


MAGIC: Final = b"ustar"


MAGIC_AT: Final = 257


_OCTAL = frozenset(b"01234567 \0")


_PREFIX_BYTES = 155
# The forms of numeric fields that GNU tar, Python's tarfile and this module all take for the same number.  Blanks
# alone, a sign and a user of -1 are errors for GNU tar.  It does not look at the numbers of devices.
_OCTAL_OR_NONE: Final = rb" *[0-7]+ *(?:\0.*)?|\0.*|"
_FIELDS: Final = tuple(
    (what, slice(*place), re.compile(form, re.DOTALL))
    for what, place, form in (
        ("mode", (100, 108), _OCTAL_OR_NONE + rb"[\x80\xff].*"),
        ("user", (108, 116), _OCTAL_OR_NONE + rb"\x80\0\0\0.*"),
        ("group", (116, 124), _OCTAL_OR_NONE + rb"\x80\0\0\0.*"),
        ("size", (124, 136), rb" *[0-7]+ *(?:\0.*)?|\0+|\x80.*"),
        ("time", (136, 148), _OCTAL_OR_NONE + rb"\x80\0\0\0[\0-\x7f].*|\xff\xff\xff\xff[\x80-\xff].*"),
        ("checksum", (148, 156), rb"[^\x80-\xff].*"),
        ("device", (329, 337), rb" *[0-7]* *(?:\0.*)?|[\x80\xff].*"),
        ("device", (337, 345), rb" *[0-7]* *(?:\0.*)?|[\x80\xff].*"),
    )
)
_SIZE_FORM, _TIME_FORM = _FIELDS[3][2], _FIELDS[4][2]
# The same of pax headers.
_PAX_TIME: Final = re.compile(rb"-?[0-9]{1,18}(?:\.[0-9]*)?")
_PAX_NUMBERS: Final = {
    "size": re.compile(rb"[0-9]{1,19}"),
    "uid": re.compile(rb"[0-9]{1,9}|[1-3][0-9]{9}|4[01][0-9]{8}"),
    "gid": re.compile(rb"[0-9]{1,9}|[1-3][0-9]{9}|4[01][0-9]{8}"),
    "mtime": _PAX_TIME,
    "atime": _PAX_TIME,
    "ctime": _PAX_TIME,
}


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
        return _seconds(self.mtime_field)

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
    low half is 1 + their sum.  The bytes that are the same in nearly all headers are judged and summed only once.
    """
    name, owner, digits, size_end, mtime, checksum, kind, tail = _unpack(buffer, at)
    similar_owner, similar_tail, others, prefix = _similar.get(kind, _NOTHING_SIMILAR)
    if owner != similar_owner or tail != similar_tail:
        others, prefix = _judge(owner, tail, kind in REGULAR)
        _similar[kind] = owner, tail, others, prefix
    plain = (
        others >= 0
        and (adler32(buffer[at : at + _OFTEN_CHANGED]) & 0xFFFF) + others == _expected_sum(checksum)
        and is_plain_time(mtime)
    )
    if not plain and parse_number(checksum) not in _sums(buffer, at):
        raise BadHeader("its checksum does not fit")
    if digits.isdigit() and size_end in b"\0 ":
        try:
            size = int(digits, 8)
        except ValueError:
            raise BadHeader("a field of it is no number") from None
    else:
        size_field = bytes((*digits, size_end))
        size = _size_of(size_field)
        plain = plain and _SIZE_FORM.fullmatch(size_field) is not None
    if (end := name.find(0)) >= 0:
        name = name[:end]
    if plain and (kind or not name.endswith(b"/")):  # v7 marks folders in this way
        return prefix + name, size, mtime, kind, ""
    name = _prefix_of(tail) + name
    return name, size, mtime, kind, _oddity_of_block(bytes(buffer[at : at + BLOCK]), name, size)


_Similar = tuple[bytes, bytes, int, bytes]
"""A header's owner and tail, and what ``_judge`` says of them."""


def similar_blocks(kind: int) -> _Similar:
    """What ``parse_block`` keeps of the last header with a type flag; the sum is -1 where nothing is kept."""
    return _similar.get(kind, _NOTHING_SIMILAR)


_NOTHING_SIMILAR: Final[_Similar] = (b"", b"", -1, b"")
_similar: dict[int, _Similar] = {}  # by type flag


@lru_cache(_SIMILAR_HEADERS)
def _judge(owner: bytes, tail: bytes, regular: bool) -> tuple[int, bytes]:
    """What follows from the bytes of a header that are the same in nearly all of them.

    Args:
        owner: Mode, user and group.
        tail: From the name of the link to the block's end.
        regular: Whether it is a plain file's header.

    Returns:
        The sum of ``tail``, and what stands before the name.  The sum is -1 if programs may read such a header in
        different ways: ``_oddity_of_block`` says whether they do.
    """
    block = bytes(100) + owner + bytes(33) + tail
    if not all(form.fullmatch(block[place]) for _, place, form in _FIELDS) or not tail.startswith(_NO_LINK):
        return -1, b""
    prefix = _prefix_of(tail)
    has_prefix = block[345] != 0
    return (-1, b"") if has_prefix and not (prefix and regular) else (sum(tail), prefix)


def _prefix_of(tail: bytes) -> bytes:
    """What stands before the name, with a slash.  In this field GNU's "ustar " has times."""
    if tail[188] and tail.startswith(b"ustar\0", 100):
        return tail[188 : 188 + _PREFIX_BYTES].partition(b"\0")[0] + b"/"
    return b""


@lru_cache(4096)
def is_plain_time(field: bytes) -> bool:
    """Whether all programs take a header's time field for the same number."""
    return _TIME_FORM.fullmatch(field) is not None


def _size_of(field: bytes) -> int:
    """The size that a field in an unusual form gives.  tarfile takes a sign and an underscore too."""
    try:
        size = int(field[:11], 8) if field[11] in b"\0 " else parse_number(field)
    except ValueError:
        size = parse_number(field)
    if size < 0:
        raise BadHeader(f"it has a size of {size}")
    return size


def _oddity_of_block(block: bytes, name: bytes, size: int) -> str:
    """``Member.odd`` of a single block, by what tarfile itself reads and what GNU tar takes for numbers."""
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"Python's tarfile stops at its header ({error})"
    if found.isdir() and size and block[156] == 0:
        return "Python's tarfile reads it as a folder, which has no data"
    for what, place, form in _FIELDS:
        if not form.fullmatch(block[place]):
            return f"GNU tar does not read the {what} in its header ({block[place]!r})"
    return _difference(found, name, size)


def _difference(found: tarfile.TarInfo, name: bytes, size: int) -> str:
    theirs = found.name.encode("utf-8", "surrogateescape")
    if theirs.rstrip(b"/") != name.rstrip(b"/"):
        return f"Python's tarfile reads its name as {theirs[:200].decode('utf-8', 'replace')!r}"
    if found.size != size:
        return f"Python's tarfile reads its size as {found.size:,}, not {size:,}"
    return ""


@lru_cache(4096)
def _expected_sum(checksum: bytes) -> int:
    """1 + the sum of a header's bytes as it follows from its checksum field, which counts itself as eight spaces; -1 if
    the field has a form that tarfile does not read."""
    return parse_number(checksum) + sum(checksum) - _SPACES_SUM + 1 if checksum[0] < 0x80 else -1


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
            if not body.strip(b"\0"):
                raise BadHeader("its long name is empty")
            alike &= b"\0" in body and body[0] != 0
            records = {"path": body.partition(b"\0")[0]}
        elif kind != LONG_LINK:
            records, plain, odd = _judge_pax(body)
            alike &= plain
            oddity = oddity or odd
        else:
            records = {}
        if "path" in pax and records.get("path", pax["path"]) != pax["path"]:
            raise BadHeader("its extended headers give it two names")  # the member of the first one is lost
        pax = records | pax if pax else records
        at += padded(size)
    else:
        raise BadHeader(f"it has more than {MAX_EXTENSIONS} extended headers")
    if pax:
        name = pax.get("GNU.sparse.name") or pax.get("path") or name
        if pax.get("size", b"").isdigit():
            size = int(pax["size"][:20])
        mtime = octal_time(pax.get("mtime", b"")) or mtime
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


@lru_cache(_SIMILAR_HEADERS)
def _judge_pax(body: bytes) -> tuple[dict[str, bytes], bool, str]:
    """The records of a pax header, whether tarfile takes from them what this module takes, as from nearly all of them,
    and ``_odd_number``.  The members of a sample often have the same ones."""
    records = parse_pax(body)
    path = records.get("path", b"name")
    plain = path != b"" and b"\0" not in path and not path.endswith(b"/") and len(records.get("size", b"")) < 20
    return records, plain and not any(key.startswith(_HARD_KEYWORDS) for key in records), _odd_number(records)


@lru_cache(_SIMILAR_HEADERS)
def pax_bytes(block: bytes) -> int:
    """The size of the pax header that a block announces for the member behind it; -1 if it announces none, or if a
    program may read the block in another way."""
    try:
        _, size, _, kind, odd = parse_block(block, 0)
    except BadHeader:
        return -1
    return size if kind == PAX and not odd else -1


@lru_cache(_SIMILAR_HEADERS)
def octal_time(text: bytes) -> bytes | None:
    """The mtime field for a pax header's time; None if that one is no number."""
    seconds = text.partition(b".")[0]
    return b"%o" % int(seconds[:20]) if seconds.isdigit() else None


def _oddity_of_global(body: bytes) -> str:
    """A global pax header changes every header behind it for tarfile; here it is a member without a key."""
    try:
        records = parse_pax(body)
    except BadHeader as error:
        return f"{error}"
    for keyword in records:
        if keyword in ("path", "linkpath", "size") or keyword.startswith(_HARD_KEYWORDS):
            return f"it gives all members behind it one {keyword[:100]!r}"
    return _odd_number(records)


def _odd_number(records: dict[str, bytes]) -> str:
    """``Member.odd`` of a pax header with a number that not every program reads: GNU tar ends with an error there, and
    Python's tarfile often takes it for 0."""
    for keyword, form in _PAX_NUMBERS.items():
        if keyword in records and not form.fullmatch(records[keyword]):
            value = records[keyword][:100].decode("utf-8", "replace")
            return f"GNU tar does not read the {keyword} in its pax header ({value!r})"
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


@lru_cache(64)
def _seconds(field: bytes) -> int:
    """``Member.mtime``; most members of a shard have few times."""
    try:
        return max(0, parse_number(field))
    except BadHeader:
        return 0


def parse_pax(data: bytes) -> dict[str, bytes]:
    """Parse the records ``"<length> <keyword>=<value>\\n"`` of a pax header.  Raises BadHeader if one is malformed."""
    records: dict[str, bytes] = {}
    at = 0
    if data.startswith(b"\0"):
        raise BadHeader("zeros stand in its pax header")
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
