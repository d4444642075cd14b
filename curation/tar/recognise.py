"""Tells what a file is that should be a tar and is none: an error page, a pointer of Git LFS, another archive, text."""

from __future__ import annotations

import re
import struct
from typing import Final

from curation.jsonio import clean_text
from curation.tar.headers import BLOCK, BadHeader, parse_header

HEAD_BYTES: Final = BLOCK

LOOK_BYTES: Final = 4 << 20  # in which the header of a further member is looked for

_MAGIC, _MAGIC_AT = b"ustar", 257

GZIP: Final = b"\x1f\x8b"

_GET_ANEW = "download it again"
_UNPACK = "unpack it first"

# Signature at the first byte → what the file is, and what to do.  gzip stands apart, because the stages read it.
_SIGNATURES: Final = (
    (b"PK\x03\x04", "a zip archive", "make a tar of its content"),
    (b"PK\x05\x06", "an empty zip archive", _GET_ANEW),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", f"{_UNPACK}: zstd -d"),
    (b"\xfd7zXZ\x00", "compressed with xz", f"{_UNPACK}: xz -d"),
    (b"BZh", "compressed with bzip2", f"{_UNPACK}: bzip2 -d"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", f"{_UNPACK}: lz4 -d"),
    (b"LZIP", "compressed with lzip", f"{_UNPACK}: lzip -d"),
    (b"\x1f\x9d", "compressed with compress", f"{_UNPACK}: gzip -d"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "make a tar of its content"),
    (b"Rar!\x1a\x07", "a rar archive", "make a tar of its content"),
    (b"PAR1", "a parquet table", "stage 00 takes tables"),
    (b"ARROW1", "an Arrow table", "stage 00 takes tables"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "make a tar of its content"),
    (b"\xff\xd8\xff", "a JPEG", "put it into a tar"),
    (b"\x89PNG\r\n\x1a\n", "a PNG", "put it into a tar"),
)
_HTML = re.compile(rb"<(!doctype\s+html|html|head|body|title|meta|script)\b", re.IGNORECASE)
_CODE = re.compile(rb"<Code>([A-Za-z]{1,60})</Code>")
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1f]")
_QUOTED_CHARACTERS = 60


def not_a_tar(head: bytes) -> str:
    """What a file is instead of a tar, and what the user can do, for a message; "" if it may be a tar.

    A tar with damage in its first header may be a tar: the scan searches for its members.

    Args:
        head: The file's first ``HEAD_BYTES`` bytes; fewer if it is shorter.
    """
    if not head:
        return f"zero bytes; {_GET_ANEW}"
    if _is_header(head):
        return ""
    if head.startswith(GZIP):
        return f"compressed with gzip; {_UNPACK}: gzip -d"
    for signature, what, remedy in _SIGNATURES:
        if head.startswith(signature):
            return f"{what}, not a tar; {remedy}"
    return _text_of(head.removeprefix(b"\xef\xbb\xbf").lstrip())


def holds_headers(data: bytes | bytearray) -> bool:
    """Whether there is a tar header among these bytes: the file is then a tar that has lost its first header."""
    at = data.find(_MAGIC)
    while at >= 0:
        try:
            if at >= _MAGIC_AT:
                parse_header(data, at - _MAGIC_AT)
                return True
        except (BadHeader, struct.error):
            pass
        at = data.find(_MAGIC, at + 1)
    return False


def _is_header(head: bytes) -> bool:
    try:
        parse_header(head.ljust(BLOCK, b"\0"), 0)
    except BadHeader:
        return not head.strip(b"\0")  # an end of archive: a tar without members
    return len(head) >= BLOCK


def _text_of(text: bytes) -> str:
    if text.startswith(b"version https://git-lfs.github.com/"):
        return "a Git LFS pointer, not the tar itself; run `git lfs pull` in the clone that it comes from"
    if text.startswith((b"/annex/objects/", b"../.git/annex/", b".git/annex/")):
        return "a pointer of git-annex, not the tar itself; run `git annex get` in the clone that it comes from"
    if _HTML.match(text):
        return f"an HTML page, not a tar (a web server's error page or login page?); {_GET_ANEW}"
    if text.startswith((b"<?xml", b"<Error>")):
        code = _CODE.search(text)
        why = f" with the error {code[1].decode('ascii')}" if code else ""
        return f"an XML document{why}, not a tar (a store's error message?); {_GET_ANEW}"
    if not text or _BINARY.search(text):
        return ""
    try:
        words = clean_text(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        if error.end < len(text) - 4:
            return ""  # binary, or in another encoding
        words = clean_text(text[: error.start].decode("utf-8"))
    if not words:
        return ""
    kind = "JSON" if text.startswith((b"{", b"[")) else "text"
    return f"{kind}, not a tar (it begins with {words[:_QUOTED_CHARACTERS]!r}); {_GET_ANEW}"
