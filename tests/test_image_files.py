"""Whole pictures are decoded whatever stands beside their pixels, cut ones are not, and none is decoded for minutes."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from curation.errors import SampleError
from curation.image_files import MAX_CHUNKS
from curation.images import decode_rgb, image_facts, image_size

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))


def encoded(format: str, image: Image.Image = PICTURE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


PNG = encoded("PNG")
ZTXT = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a prompt " * 400_000))
BESIDE: dict[str, bytes] = {
    "a long text": ZTXT,
    "a long text in Unicode": chunk(b"iTXt", b"p\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)),
    "eighty texts": chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 1_000_000)) * 80,
    "a large profile": chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(5_000_000))),
    "a wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"\0",
    **{
        f"a {kind} of one byte": chunk(kind.encode(), b"a") for kind in ("gAMA", "pHYs", "tRNS", "acTL", "cHRM", "eXIf")
    },
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "behind the pixels"])
def test_a_whole_png_is_decoded_whatever_its_other_chunks_hold(name: str, place: int) -> None:
    data = PNG[:place] + BESIDE[name] + PNG[place:]
    assert np.array_equal(decode_rgb(data), np.asarray(PICTURE))
    assert image_size(memoryview(data)) == (96, 64)
    assert image_facts(data).width == 96
    with pytest.raises(SampleError, match="undecodable"):
        decode_rgb(data[: data.index(b"IDAT") + 1000])


def test_a_png_whose_text_is_left_out_keeps_its_orientation_and_transparency() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a prompt " * 400_000, zip=True)
    plain = encoded("PNG", exif=exif, transparency=(0, 0, 0))
    data = encoded("PNG", exif=exif, transparency=(0, 0, 0), pnginfo=info)
    assert image_size(data) == (64, 96)
    assert np.array_equal(decode_rgb(data), decode_rgb(plain))


JPEGS: dict[str, Callable[[], bytes]] = {
    "baseline": lambda: encoded("JPEG"),
    "progressive": lambda: encoded("JPEG", progressive=True),
    "grey": lambda: encoded("JPEG", PICTURE.convert("L")),
    "cmyk": lambda: encoded("JPEG", PICTURE.convert("CMYK")),
    "restarts": lambda: encoded("JPEG", restart_marker_blocks=2),
}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_without_its_end_marker_is_whole_and_one_that_was_cut_is_not(name: str) -> None:
    data = JPEGS[name]()
    for missing in (1, 2):
        assert np.array_equal(decode_rgb(data[:-missing]), decode_rgb(data))
    for cut in range(20, len(data) - 5, 1 if name == "progressive" else 13):
        with pytest.raises(SampleError, match="undecodable"):
            decode_rgb(data[:cut])


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "beside",
    [segment(0xEE, b"Adobe"), segment(0xE0, b"JFIF\0"), segment(0xEE, b"Adobe") + segment(0xFE, b"\xff\xda" * 500)],
)
def test_a_jpeg_with_broken_segments_beside_its_pixels_is_decoded_upright(mode: str, beside: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded("JPEG", PICTURE.convert(mode), exif=exif)
    odd = plain[:2] + beside + plain[2:]
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(io.BytesIO(odd))
    assert image_size(odd) == image_size(plain) == (64, 96)
    assert np.array_equal(decode_rgb(odd), decode_rgb(plain))
    assert np.array_equal(decode_rgb(odd[:-2]), decode_rgb(plain))
    with pytest.raises(SampleError, match="undecodable"):
        decode_rgb(odd[:-200])


@pytest.mark.parametrize(
    "picture", [encoded("JPEG", PICTURE.convert("CMYK")), encoded("JPEG", restart_marker_blocks=2)], ids=["CMYK", "RST"]
)
def test_a_jpeg_that_was_cut_and_then_ended_is_not_whole(picture: bytes) -> None:
    decode_rgb(picture)
    begin = picture.index(b"\xff\xda") + 20
    for at in range(begin, len(picture) - 10, 7):
        with pytest.raises(SampleError, match="undecodable"):
            decode_rgb(picture[:at] + b"\xff\xd9")
    for restart in range(8):
        if (at := picture.find(bytes((0xFF, 0xD0 + restart)), begin)) > 0:
            with pytest.raises(SampleError, match="undecodable"):
                decode_rgb(picture[:at] + b"\xff\xd9")


def scans_of(count: int, side: int) -> bytes:
    """A progressive JPEG with its last scan repeated, which costs a few bytes and a pass over all pixels each."""
    data = encoded("JPEG", Image.new("RGB", (side, side)), progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


@pytest.mark.parametrize(("count", "side"), [(1000, 8000), (100, 8000), (1000, 64), (100_000, 16)])
def test_a_jpeg_of_many_scans_is_refused_at_once(count: int, side: int) -> None:
    data = scans_of(count, side)
    began = time.monotonic()
    with pytest.raises(SampleError, match=r"a JPEG of more than \d+ scans"):
        decode_rgb(data)
    assert time.monotonic() - began < 2


def test_scans_of_a_preview_do_not_count() -> None:
    preview = b"\xff\xe2" + struct.pack(">H", 2 + 3000) + b"\xff\xda" * 1500
    data = encoded("JPEG", progressive=True)
    assert decode_rgb(data[:2] + preview + data[2:]).shape == (64, 96, 3)


def test_a_png_of_very_many_chunks_is_refused_at_once() -> None:
    data = PNG[:33] + chunk(b"tEXt", b"a\0b") * (MAX_CHUNKS + 10) + PNG[33:]
    began = time.monotonic()
    with pytest.raises(SampleError, match="a PNG of more than 200,000 chunks"):
        decode_rgb(data)
    assert time.monotonic() - began < 3


def test_of_an_animation_the_first_frame_is_decoded() -> None:
    others = [Image.new("RGB", PICTURE.size)] * 3
    for format in ("PNG", "GIF", "WEBP"):
        lossless = {"lossless": True} if format == "WEBP" else {}
        data = encoded(format, save_all=True, append_images=others, **lossless)
        assert np.array_equal(decode_rgb(data), decode_rgb(encoded(format, **lossless))), format
    animated = encoded("PNG", save_all=True, append_images=others)
    assert np.array_equal(decode_rgb(animated[:33] + ZTXT + animated[33:]), np.asarray(PICTURE))
