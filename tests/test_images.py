"""Images of every kind come out upright, bounded and silent; broken ones end as a SampleError with its reason."""

from __future__ import annotations

import functools
import io
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from curation.errors import SampleError
from curation.images import MAX_PIXELS, MAX_XMP_BYTES, decode_rgb, encode_as, encode_jpeg, image_size
from tests import ROOT


def photo(width: int = 96, height: int = 64) -> np.ndarray:
    """A smooth picture without any symmetry, so that a wrong turn shows."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = [255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 17 + y / 29)]
    return np.stack(planes, axis=2).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(width: int = 96, height: int = 64, **options: object) -> bytes:
    return saved(Image.fromarray(photo(width, height)), "JPEG", quality=92, **options)


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def reason_of(data: bytes, call: Callable[..., object] = decode_rgb, **options: int) -> str:
    with pytest.raises(SampleError) as caught:
        call(data, **options)
    assert "0x" not in caught.value.detail.replace("0x…", ""), "an address in memory differs from run to run"
    return caught.value.reason


# ---- every kind of image


KINDS = {
    "jpeg": lambda image: saved(image, "JPEG", quality=95),
    "progressive jpeg": lambda image: saved(image, "JPEG", quality=95, progressive=True),
    "jpeg 4:4:4": lambda image: saved(image, "JPEG", quality=95, subsampling=0),
    "cmyk jpeg": lambda image: saved(image.convert("CMYK"), "JPEG", quality=95),
    "rgb jpeg": lambda image: saved(image, "JPEG", quality=95, keep_rgb=True),
    "png": lambda image: saved(image, "PNG"),
    "png with alpha": lambda image: saved(image.convert("RGBA"), "PNG"),
    "webp": lambda image: saved(image, "WEBP", quality=95),
    "lossless webp": lambda image: saved(image.convert("RGBA"), "WEBP", lossless=True),
    "bmp": lambda image: saved(image, "BMP"),
    "avif": lambda image: saved(image, "AVIF", quality=95),
}


@pytest.mark.parametrize("kind", KINDS)
def test_colour_images_come_out_as_they_are(kind: str) -> None:
    picture = photo()
    data = KINDS[kind](Image.fromarray(picture))
    pixels = decode_rgb(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert difference(pixels, picture) < 3
    assert image_size(data) == (96, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_grey_image_has_three_equal_planes(kind: str) -> None:
    grey = Image.fromarray(photo()).convert("L")
    pixels = decode_rgb(saved(grey, kind, quality=95))
    assert (pixels[..., 0] == pixels[..., 2]).all()
    assert difference(pixels[..., 0], np.asarray(grey)) < 3


def test_sixteen_bits_keep_the_high_byte() -> None:
    grey = photo()[..., 0]
    data = saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert (decode_rgb(data)[..., 1] == grey).all()
    colour = photo()
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).astype(">u2").tobytes() for row in colour)
    assert (decode_rgb(png(96, 64, 16, 2, rows)) == colour).all()


def test_black_and_white_and_palettes() -> None:
    image = Image.fromarray(photo())
    assert set(np.unique(decode_rgb(saved(image.convert("1"), "PNG")))) == {0, 255}
    assert difference(decode_rgb(saved(image.quantize(256), "PNG")), photo()) < 12
    assert difference(decode_rgb(saved(image.quantize(256), "GIF")), photo()) < 12


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(kind: str, mode: str) -> None:
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((40, 40, 40, 255), (0, 0, 10, 20))
    pixels = decode_rgb(saved(image.convert(mode), kind, lossless=True))
    assert (pixels[:, 12:] == 255).all()
    assert (abs(pixels[:, :8].astype(int) - 40) <= 1).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_laid_on_white(kind: str) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.paste(0, (0, 0, 10, 20))
    pixels = decode_rgb(saved(image, kind, transparency=0))
    assert (pixels[:, :10] == 255).all()
    assert tuple(pixels[5, 15]) == (200, 10, 10)


def test_or_left_away_as_pillow_does() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (9, 7, 4), np.uint8), "RGBA")
    buffer = io.BytesIO()
    image.save(buffer, "png")
    assert np.array_equal(decode_rgb(buffer.getvalue(), on_white=False), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_shows_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "green", "blue")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert tuple(decode_rgb(data)[12, 16]) == (255, 0, 0)
    assert image_size(data) == (32, 24)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


TURNS = {  # of an upright picture, into what a camera held so stores
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_exif_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    turn = TURNS[orientation]
    upright = Image.fromarray(photo())
    stored = upright if turn is None else upright.transpose(turn)
    data = saved(stored, kind, exif=exif(orientation), quality=95)
    assert difference(decode_rgb(data), photo()) < 3
    assert image_size(data) == (96, 64)


@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decoding_is_turned_upright_too(orientation: int) -> None:
    turn = TURNS[orientation]
    upright = Image.fromarray(photo(1600, 1200))
    data = saved(upright if turn is None else upright.transpose(turn), "JPEG", exif=exif(orientation), quality=95)
    pixels = decode_rgb(data, at_least=400)
    assert pixels.shape == (300, 400, 3)
    assert difference(pixels, np.asarray(upright.resize((400, 300), Image.Resampling.BOX))) < 3
    assert image_size(data) == (1600, 1200)


@pytest.mark.parametrize(
    ("width", "height", "at_least", "longest"),
    [
        (1600, 1200, 401, 600),
        (1600, 1200, 801, 1600),
        (1200, 1600, 400, 400),
        (200, 100, 640, 200),
        (1600, 8, 400, 400),
    ],
)
def test_scaled_decoding_never_goes_below_what_is_needed(width: int, height: int, at_least: int, longest: int) -> None:
    pixels = decode_rgb(jpeg(width, height), at_least=at_least)
    assert max(pixels.shape[:2]) == longest


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_leaves_the_picture_as_it_is_stored() -> None:
    for broken in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(6)[:14], exif(99)):
        data = jpeg(exif=broken)
        assert image_size(data) == (96, 64)
        assert difference(decode_rgb(data), photo()) < 3


def test_a_view_on_a_larger_buffer_is_decoded_like_bytes() -> None:
    data = jpeg()
    view = memoryview(b"\0" * 512 + data + b"\0" * 100)[512 : 512 + len(data)]
    assert (decode_rgb(view) == decode_rgb(data)).all()


def test_stray_bytes_that_every_viewer_forgives() -> None:
    data = jpeg()
    assert (decode_rgb(data + b"trailing") == decode_rgb(data)).all()
    end_of_jfif = 4 + int.from_bytes(data[4:6], "big")
    strayed = data[:end_of_jfif] + b"\0\0\0" + data[end_of_jfif:]
    assert difference(decode_rgb(strayed), photo()) < 3


# ---- bounds and broken images


def test_zero_bytes_and_garbage() -> None:
    for call in (decode_rgb, image_size):
        assert reason_of(b"", call) == "empty_image"
        assert reason_of(b"<html>404</html>", call) == "undecodable"
        assert reason_of(bytes(4096), call) == "undecodable"
        assert reason_of(b"\xff\xd8\xff", call) == "undecodable"


def test_formats_that_run_other_programs_are_not_images() -> None:
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n") == "undecodable"


def test_a_truncated_image_is_undecodable_wherever_it_ends() -> None:
    for whole in (jpeg(), jpeg(progressive=True), *(KINDS[k](Image.fromarray(photo())) for k in ("png", "webp"))):
        for end in (len(whole) - 1, len(whole) - 2, int(len(whole) * 0.9), len(whole) // 2, 200):
            if whole[:4] == b"\x89PNG" and end > len(whole) - 16:
                continue  # only the empty end chunk is missing: every pixel is there
            if whole[:2] == b"\xff\xd8" and end >= len(whole) - 2:
                continue  # only the end marker is missing
            assert reason_of(whole[:end]) == "undecodable", (whole[:12], end)


def test_a_cmyk_jpeg_is_as_strict() -> None:
    data = KINDS["cmyk jpeg"](Image.fromarray(photo()))
    assert reason_of(data[: len(data) // 2]) == "undecodable"


def test_a_jpeg_whose_rest_was_lost_is_not_grey_below() -> None:
    """Zeros where the second half was, as an interrupted download leaves them: Pillow alone would show grey."""
    data = jpeg(800, 600)
    assert reason_of(data[: len(data) // 2] + bytes(len(data) // 2)) == "undecodable"
    assert reason_of(data[: len(data) // 2] + b"\xff\xd9") == "undecodable"


@functools.cache
def huge_png() -> bytes:
    """30,000 × 30,000 black pixels, one bit each: 110 kB."""
    return png(30_000, 30_000, 1, 0, bytes(30_000 * 3751))


def test_thirty_thousand_squared_is_refused_before_it_is_decoded() -> None:
    data = huge_png()
    began = time.perf_counter()
    for call in (decode_rgb, image_size):
        with pytest.raises(SampleError) as caught:
            call(data)
        assert caught.value.reason == "image_too_large"
        assert caught.value.detail == "900,000,000 pixels; the bound is 100,000,000"
    assert time.perf_counter() - began < 0.5


def huge_jpeg() -> bytes:
    """A JPEG whose frame header says 30,000 × 30,000."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 30_000, 30_000)
    return bytes(data)


def test_the_bound_holds_for_every_format() -> None:
    assert reason_of(huge_jpeg()) == "image_too_large"
    assert reason_of(huge_jpeg(), at_least=64) == "image_too_large"
    for kind in KINDS:
        data = KINDS[kind](Image.fromarray(photo()))
        assert reason_of(data, max_pixels=96 * 64 - 1) == "image_too_large"
        assert reason_of(data, image_size, max_pixels=96 * 64 - 1) == "image_too_large"
        assert decode_rgb(data, max_pixels=96 * 64).shape == (64, 96, 3)


def test_two_frame_headers_do_not_get_past_the_bound() -> None:
    """Pillow goes by one frame header and libjpeg by the other, or refuses: neither may allocate the larger one."""
    small, large = jpeg(), huge_jpeg()
    frame = small.index(b"\xff\xc0")
    length = 2 + int.from_bytes(small[frame + 2 : frame + 4], "big")
    for first, second in ((small, large), (large, small)):
        both = first[: frame + length] + second[frame : frame + length] + small[frame + length :]
        assert reason_of(both) in ("image_too_large", "undecodable")


def test_the_bound_is_below_what_pillow_itself_refuses() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_PIXELS <= 2 * Image.MAX_IMAGE_PIXELS


DAMAGED = [jpeg(), jpeg(progressive=True), *(make(Image.fromarray(photo())) for make in KINDS.values())]


@settings(max_examples=150)
@given(st.sampled_from(DAMAGED), st.integers(0, 2**31), st.integers(1, 40), st.booleans())
def test_damage_anywhere_ends_in_pixels_or_in_a_sample_error(data: bytes, seed: int, hits: int, cut: bool) -> None:
    random = np.random.default_rng(seed)
    broken = bytearray(data)
    for at in random.integers(0, len(broken), hits):
        broken[at] = random.integers(256)
    if cut:
        del broken[random.integers(len(broken)) :]
    try:
        pixels = decode_rgb(bytes(broken), max_pixels=1_000_000)
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert pixels.size <= 3_000_000
    except SampleError as error:
        assert error.reason in ("undecodable", "image_too_large", "empty_image")


def test_nothing_is_printed_even_with_warnings_on(tmp_path: Path) -> None:
    """In a process of its own with every warning shown: corrupt EXIF, an image near the bound, broken ones."""
    samples = [
        jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        png(9_500, 9_500, 1, 0, bytes(9_500 * 1_189)),  # 90 MP: Pillow warns of a bomb, and it is within the bound
        huge_png(),
        jpeg()[:500],
        saved(Image.new("P", (8, 8)), "PNG", transparency=b"\0\1\2"),
        *DAMAGED,
    ]
    for i, data in enumerate(samples):
        (tmp_path / f"{i}").write_bytes(data)
    program = (
        "import sys, pathlib\n"
        "from curation.errors import SampleError\n"
        "from curation.images import decode_rgb, image_size\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    for call in (image_size, decode_rgb):\n"
        "        for data in (path.read_bytes(), path.read_bytes()[:-30]):\n"
        "            try: call(data)\n"
        "            except SampleError: pass\n"
    )
    command = [sys.executable, "-W", "always", "-c", program, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == result.stderr == ""


# ---- encoding


def test_encoding_repeats_byte_for_byte_and_keeps_the_picture() -> None:
    data = encode_jpeg(photo(), 95)
    assert data == encode_jpeg(photo(), 95)
    assert difference(decode_rgb(data), photo()) < 2
    assert len(encode_jpeg(photo(640, 480), 60)) < len(encode_jpeg(photo(640, 480), 95))
    turned = np.rot90(photo())
    assert not turned.flags.c_contiguous
    assert difference(decode_rgb(encode_jpeg(turned, 95)), turned) < 2


def test_xmp_stands_behind_the_jfif_header_and_is_read_by_others() -> None:
    packet = b'<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/"></x:xmpmeta><?xpacket end="w"?>'
    plain, marked = encode_jpeg(photo(), 90), encode_jpeg(photo(), 90, xmp=packet)
    assert Image.open(io.BytesIO(marked)).info["xmp"] == packet
    assert marked[:4] == plain[:4] == b"\xff\xd8\xff\xe0"
    assert marked[6:10] == b"JFIF"
    assert (decode_rgb(marked) == decode_rgb(plain)).all()
    assert marked == encode_jpeg(photo(), 90, xmp=packet)
    assert encode_jpeg(photo(), 90, xmp=b"x" * MAX_XMP_BYTES)
    with pytest.raises(ValueError, match="65,503"):
        encode_jpeg(photo(), 90, xmp=b"x" * (MAX_XMP_BYTES + 1))


# ---- real photos


def test_photos_of_the_examples_decode_alike_by_both_decoders() -> None:
    import tarfile

    with tarfile.open(ROOT / "examples" / "shards" / "00000003.tar") as tar:
        members = [member for member in tar if member.name.endswith((".jpg", ".webp", ".png"))][:12]
        images = [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    for data in images:
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image.convert("RGB"))
        assert difference(decode_rgb(data), expected) < 1
        assert image_size(data) == (expected.shape[1], expected.shape[0])


# ---- encoding anew


def profile(channels: bytes) -> bytes:
    """A colour profile for these channels, as far as its header says."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data[:16] + channels + data[20:]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("mode", "channels", "stays"),
    [
        ("RGB", b"RGB ", {"jpg", "png", "webp"}),
        ("L", b"GRAY", {"jpg", "png"}),  # WebP has no grey pixels
        ("CMYK", b"CMYK", set()),
    ],
)
def test_a_profile_is_kept_only_if_it_is_for_the_new_channels(
    mode: str, channels: bytes, stays: set[str], kind: str
) -> None:
    image = saved(Image.fromarray(photo()).convert(mode), "JPEG", quality=92, icc_profile=profile(channels))
    encoded = Image.open(io.BytesIO(encode_as(kind, image, 95)))
    assert (encoded.info.get("icc_profile", b"")[16:20] or None) == (channels if kind in stays else None)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("source", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_is_encoded_anew_stays_upright(source: str, kind: str) -> None:
    """A WebP holds its EXIF without the name that it has in a JPEG."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = saved(Image.fromarray(photo()), source, exif=exif)
    assert image_size(encode_as(kind, image, 95)) == (64, 96)
    assert difference(decode_rgb(encode_as(kind, image, 95)), decode_rgb(image)) < 6


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_whole_image_is_encoded_anew_whatever_its_file_lacks(kind: str) -> None:
    assert encode_as(kind, jpeg()[:-2], 95) == encode_as(kind, jpeg(), 95), "the end marker"
    with pytest.raises(SampleError, match="undecodable"):
        encode_as(kind, jpeg()[:-400], 95)
