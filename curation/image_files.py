"""The segments of JPEG and the chunks of PNG files: how much work an image is made to be, and its pixels alone."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from curation.errors import SampleError
from curation.libraries import simplejpeg

# libjpeg's progressive files have 10 scans, and the most elaborate optimisers write a few dozen.
MAX_SCANS: Final = 100
MAX_SCANNED_PIXELS: Final = 2_500_000_000  # scans × pixels: some seconds
MAX_CHUNKS: Final = 200_000  # of a PNG: one of 1 GB has about so many

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_MARKER = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")  # in compressed data: no stuffed byte and no restart
_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_SCAN, _END, _COMMENT, _ADOBE = 0xDA, 0xD9, 0xFE, 0xEE
_SAMPLING = (0x11, 0x21, 0x12, 0x22, 0x41)  # of brightness, over colours of 0x11: 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1
# What tells how to show the pixels: marker → (the shortest body that libjpeg takes, its begin)
_READ_METADATA = {0xE0: (14, b"JFIF\0"), 0xE1: (14, b"Exif\0\0"), 0xEE: (12, b"Adobe")}

_PNG = b"\x89PNG\r\n\x1a\n"
_TRANSPARENCY = {0: 2, 2: 6}  # PNG's colour type → bytes of tRNS
_XMP = b"XML:com.adobe.xmp\0\0"  # an iTXt that is not compressed
_MAX_KEPT_BYTES = 1 << 20  # of EXIF and XMP, which may say how to turn the image


def check_scans(data: bytes | memoryview, pixels: int) -> None:
    """Refuse a JPEG with so many scans that it would be decoded for minutes.

    Args:
        data: The file.
        pixels: Its width × height.

    Raises:
        SampleError: ``undecodable``.
    """
    data = bytes(data)
    allowed = min(MAX_SCANS, max(10, MAX_SCANNED_PIXELS // max(1, pixels)))
    if data.count(b"\xff\xda") <= allowed:  # no marker comes more often; a preview in the metadata has some too
        return
    scans = 0
    for segment in _segments(data):
        scans += segment.marker == _SCAN
        if scans > allowed:
            raise SampleError("undecodable", f"a JPEG of more than {allowed} scans of {pixels:,} pixels")


def unlike_baseline(data: bytes) -> str | None:
    """What keeps a JPEG from being an everyday one, which every decoder of a GPU reads and shows alike.

    Such a one is whole, baseline, of 8 bits, grey or YCbCr with ordinary sampling, in one scan.

    Returns:
        None; or ``progressive``, ``cmyk``, ``12_bit``, ``rgb``, ``cut`` (no end marker) or ``unusual``.
    """
    frames, scans, colours, ended = [], 0, 1, False
    for segment in _segments(data):
        if segment.marker in _FRAMES:
            frames.append(segment)
        elif segment.marker == _ADOBE and segment.body.startswith(b"Adobe") and len(segment.body) >= 12:
            colours = segment.body[11]
        scans += segment.marker == _SCAN
        ended = segment.marker == _END
    if not ended:
        return "cut"
    if len(frames) != 1 or len(body := frames[0].body) < 9 or len(body) != 6 + 3 * body[5]:
        return "unusual"
    if frames[0].marker in _PROGRESSIVE:
        return "progressive"
    if body[5] == 4:
        return "cmyk"
    if body[0] != 8:
        return "12_bit"
    names, sampling = tuple(body[6::3]), tuple(body[7::3])
    if body[5] == 3 and (colours != 1 or names == tuple(b"RGB")):
        return "rgb"
    usual = sampling[0] in _SAMPLING and set(sampling[1:]) <= {0x11} and names in ((1,), (1, 2, 3), (0, 1, 2))
    return None if usual and frames[0].marker in (0xC0, 0xC1) and scans == 1 else "unusual"


def bare_jpeg(data: bytes) -> bytes:
    """The JPEG without what is no part of its pixels, such as EXIF, so that all decoders show it alike."""
    kept, at = [_SOI], len(_SOI)
    for segment in _segments(data):
        if not (0xE1 <= segment.marker <= 0xEF and segment.marker != _ADOBE) and segment.marker != _COMMENT:
            kept.append(data[at : segment.end])
        at = segment.end
        if segment.marker == _SCAN:
            return b"".join((*kept, data[at:]))
    return data


def check_chunks(data: bytes | memoryview) -> None:
    """Refuse a PNG with so many chunks that to read their headers takes minutes.

    Raises:
        SampleError: ``undecodable``.
    """
    if bytes(data[:8]) == _PNG and len(data) > 12 * MAX_CHUNKS:
        for number, _ in enumerate(_chunks(bytes(data))):
            if number > MAX_CHUNKS:
                raise SampleError("undecodable", f"a PNG of more than {MAX_CHUNKS:,} chunks")


def pixels_alone(data: bytes) -> bytes | None:
    """The file with what makes up its pixels, and what turns them upright, for one that could not be decoded.

    Returns:
        A file without damage beside the pixels; None if there is nothing to leave out or to complete, or if the
        pixels are not all there.
    """
    if data.startswith(_PNG):
        alone = _png_alone(data)
        return alone if alone != data else None
    if data.startswith(_SOI):
        alone = _jpeg_alone(data)
        return _completed_jpeg(alone) or (alone if alone != data else None)
    return None


# ---- PNG


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, begin, end) of each chunk, from its length to its checksum; the last may be cut."""
    at = len(_PNG)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, end
        at = end


def _png_alone(data: bytes) -> bytes:
    kept, colour = [_PNG], -1
    for number, (kind, begin, end) in enumerate(_chunks(data)):
        if number > MAX_CHUNKS:
            return data
        body = data[begin + 8 : min(end - 4, begin + 8 + _MAX_KEPT_BYTES)]
        if kind == b"IHDR":
            colour = body[9] if len(body) > 9 else -1
        if kind == b"tRNS":
            keep = len(body) == _TRANSPARENCY[colour] if colour in _TRANSPARENCY else colour == 3 and len(body) <= 256
        elif kind == b"eXIf":
            keep = end - begin <= _MAX_KEPT_BYTES
        elif kind == b"iTXt":
            keep = end - begin <= _MAX_KEPT_BYTES and body.startswith(_XMP)
        else:
            keep = not kind[0] & 0x20  # a capital: needed for the pixels
        whole = kind[0] & 0x20 == 0 or zlib.crc32(kind + body) == int.from_bytes(data[end - 4 : end], "big")
        if keep and whole:
            kept.append(data[begin:end])
    return b"".join(kept)


# ---- JPEG


@dataclass(frozen=True, slots=True)
class _Segment:
    marker: int
    body: bytes
    end: int = 0  # where the next one begins


def _segments(data: bytes) -> Iterator[_Segment]:
    """The segments of a JPEG up to its end marker; the compressed data behind a scan's header is skipped."""
    at = len(_SOI)
    while (found := _MARKER.search(data, at)) is not None:
        marker, at = data[found.end() - 1], found.end()
        if marker in (_END, 0xD8, 0x01):
            yield _Segment(marker, b"")
            if marker == _END:
                return
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2 or at + length > len(data):
            return
        yield _Segment(marker, data[at + 2 : at + length], at + length)
        at += length


def _jpeg_alone(data: bytes) -> bytes:
    """The JPEG without the segments before its first scan that libjpeg does not need, and Pillow may stumble over."""
    kept, at = [_SOI], len(_SOI)
    for segment in _segments(data):
        if segment.end == 0:  # an end, or a second start: not the usual form of a file
            return data
        metadata = 0xE0 <= segment.marker <= 0xEF or segment.marker == _COMMENT
        shortest, name = _READ_METADATA.get(segment.marker, (0, b""))
        if not metadata or (name and len(segment.body) >= shortest and segment.body.startswith(name)):
            kept.append(data[at : segment.end])
        at = segment.end
        if segment.marker == _SCAN:
            return b"".join((*kept, data[at:]))
    return data


def _completed_jpeg(data: bytes) -> bytes | None:
    """The JPEG with an end marker, if that alone is missing: every scan and every bit of the last one is there."""
    body = data[:-1] if data.endswith(b"\xff") else data
    scans, components, progressive = [], 0, False
    for segment in _segments(body):
        if segment.marker == _END:
            return None
        if segment.marker in _FRAMES and len(segment.body) > 5:
            components, progressive = segment.body[5], segment.marker in _PROGRESSIVE
        if segment.marker == _SCAN:
            scans.append(segment.body)
    if not scans or not _all_there(scans, components, progressive=progressive):
        return None
    whole = body + _EOI
    try:
        _, _, colourspace, _ = simplejpeg.decode_jpeg_header(whole)
        # It raises for every warning of libjpeg, such as that of a last scan that ends early.
        simplejpeg.decode_jpeg(whole, "CMYK" if colourspace in ("CMYK", "YCCK") else "RGB")
    except ValueError:
        return None
    return whole


def _all_there(scans: list[bytes], components: int, *, progressive: bool) -> bool:
    """Whether every component has a scan, and in a progressive JPEG every coefficient its last bit (T.81, annex G)."""
    last: dict[int, list[int]] = {}
    for scan in scans:
        count = scan[0] if scan else 0
        if len(scan) != 4 + 2 * count:
            return False
        first, final, low = scan[-3], min(scan[-2], 63), scan[-1] & 15
        for component in scan[1 : 1 + 2 * count : 2]:
            bits = last.setdefault(component, [99] * 64)
            bits[first : final + 1] = [low] * (final + 1 - first)
    return len(last) == components and (not progressive or not any(bit for bits in last.values() for bit in bits))
