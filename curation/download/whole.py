"""Whether an image file is whole, as far as its structure shows, at a small part of the cost of decoding it.

A download that was cut leaves a file whose header is valid.  Each format says where it ends: by a marker, a last chunk
or a length.  Damage in the middle of the pixels is not seen here; only decoding shows that.
"""

from __future__ import annotations

from typing import Final

_JPEG_END: Final = b"\xff\xd9"
_PNG_SIGNATURE: Final = 8
_TRAILING_BYTES: Final = 64  # that some servers and programs add behind a JPEG
_MAX_CHUNKS: Final = 100_000


def is_whole(data: bytes, suffix: str) -> bool:
    """Whether the end of the file is there; False also where that cannot be told without decoding.

    suffix: the usual one of the file's format, without a dot.
    """
    if (
        suffix == "jpg"
    ):  # what a camera or a program put behind the end is decoded; in entropy-coded data no FFD9 occurs
        scan = _first_scan(data)
        return scan is not None and _JPEG_END in data[max(scan, len(data) - _TRAILING_BYTES) :]
    if suffix == "png":
        return _ends_with_chunk(data, _PNG_SIGNATURE)
    if suffix == "gif":
        return _gif_ends(data)
    if suffix == "webp":
        return len(data) >= 12 and int.from_bytes(data[4:8], "little") + 8 <= len(data)
    return False  # BMP and AVIF are decoded


def _first_scan(data: bytes) -> int | None:
    """Where a JPEG's pixels begin, because an end marker before them is that of a thumbnail."""
    at = 2
    for _ in range(_MAX_CHUNKS):
        if at + 4 > len(data) or data[at] != 0xFF:
            return None
        if data[at + 1] == 0xFF:  # fill
            at += 1
            continue
        if data[at + 1] == 0xDA:
            return at
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def _gif_ends(data: bytes) -> bool:
    """Whether the blocks of a GIF follow each other to its trailer."""
    try:
        at = 13 + _colours(data[10])
        for _ in range(_MAX_CHUNKS):
            if data[at] == 0x3B:
                return True
            if data[at] == 0x2C:  # an image: its place, its colours, the size of its codes
                at += 11 + _colours(data[at + 9])
            elif data[at] == 0x21:  # an extension
                at += 2
            else:
                return False
            while size := data[at]:
                at += 1 + size
            at += 1
    except IndexError:
        pass
    return False


def _colours(flags: int) -> int:
    """Bytes of a colour table."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _ends_with_chunk(data: bytes, at: int) -> bool:
    """Whether the chunks of a PNG follow each other to the last one, IEND."""
    for _ in range(_MAX_CHUNKS):
        if at + 12 > len(data):
            return False
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + int.from_bytes(data[at : at + 4])
    return False
