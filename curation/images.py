"""Decodes images from the open web, with a size limit and upright, and encodes JPEGs.

JPEGs are decoded by libjpeg-turbo (simplejpeg), at a reduced scale if the caller needs fewer pixels; all other formats
by Pillow.  Every defect of an image is raised as a SampleError with one of three reasons: ``empty_image``,
``image_too_large``, ``undecodable``.  Nothing is printed.  Colour profiles are not applied, because the original
pipeline does not apply them either.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from curation.errors import SampleError
from curation.image_files import check_chunks, check_scans, pixels_alone, unlike_baseline
from curation.jsonio import clean_text
from curation.libraries import PIL, ExifTags, Image, PngImagePlugin, features, np, simplejpeg

if TYPE_CHECKING:
    from numpy.typing import NDArray

Pixels: TypeAlias = "NDArray[np.uint8]"  # height × width × 3, RGB
Found = TypeVar("Found")

MAX_PIXELS = 100_000_000  # 300 MB as RGB; phone cameras have up to 200 MP, but images on the web are much smaller
MAX_XMP_BYTES = 65_502  # the space in one APP1 segment after its name (XMP part 3, 1.1.3)

# Formats that browsers show.  Pillow would open many more, some of them with other programs (EPS with Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "AVIF": "avif"}
_MAX_EXIF_TAGS, _MAX_EXIF_CHARACTERS = 200, 1000
_ORIENTATION = 0x0112  # the EXIF tag
_EXIF_NAME = b"Exif\x00\x00"
_XMP_NAME = b"http://ns.adobe.com/xap/1.0/\x00"

# libjpeg's warnings that mean lost pixels (jerror.h).  After its other warnings (extra bytes between segments, an odd
# JFIF revision, a bad ICC profile) the image is complete, and every viewer shows it.
_DAMAGE = re.compile(
    "premature end|bad huffman|bad arithmetic|resync|progression|unsupported marker|marker 0xd9 instead of RST",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")  # removed from error texts, because it differs from run to run


def image_size(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels, after EXIF orientation is applied.  Only the header is read."""
    return _with_pixels_alone(lambda data: _size(data, max_pixels), data)


def _size(data: bytes | memoryview, max_pixels: int) -> tuple[int, int]:
    with _opened(data, max_pixels) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def refused_by_devices(data: bytes, max_pixels: int) -> tuple[tuple[int, int], str | None]:
    """Whether a decoder on a GPU may have an image; only its segments are looked at.

    Args:
        data: The file.
        max_pixels: Most pixels that a device is given.

    Returns:
        (width, height) in pixels, upright; and None, or why the CPU decodes it: ``not_jpeg``, ``turned`` (by EXIF),
        ``large``, or a word of ``unlike_baseline``.

    Raises:
        SampleError: As ``image_size``.
    """
    with _opened(data, MAX_PIXELS) as image:
        width, height = image.size
        if image.format != "JPEG":
            refusal: str | None = "not_jpeg"
        elif _orientation(image) != 1:
            refusal = "turned"
        else:
            refusal = "large" if width * height > max_pixels else unlike_baseline(data)
        return ((height, width) if _orientation(image) >= 5 else (width, height)), refusal


def decode_rgb(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS, at_least: int | None = None, on_white: bool = True
) -> Pixels:
    """Decode an image upright to height × width × 3 uint8 RGB, contiguous; of an animation, the first frame.

    Transparency is blended with white (as img2dataset does); 16-bit samples keep their high byte; CMYK becomes RGB.
    ``at_least``: the image may be reduced, but its longest side keeps at least this many pixels: a JPEG more than
    twice as long is decoded at a reduced scale.  ``on_white``: False ignores transparency and shows the colours
    below it, as Pillow's ``convert("RGB")`` and so the tools of CLIP and DataComp do.  ``max_pixels`` is checked
    in the header, before decoding.

    An image is whole if all its pixels are there, whatever else the file holds or lacks: texts, profiles and other
    chunks beside the pixels may be large or broken, and a JPEG's end marker may be missing.

    Raises SampleError ``empty_image``, ``image_too_large`` or ``undecodable`` (a truncated image is undecodable, and
    so is one that is made to take minutes: a JPEG of a thousand scans).
    """
    return _with_pixels_alone(lambda data: _decode(data, max_pixels, at_least, on_white), data)


def _decode(data: bytes | memoryview, max_pixels: int, at_least: int | None, on_white: bool) -> Pixels:
    with _opened(data, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            check_scans(data, image.size[0] * image.size[1])
        orientation = _orientation(image)
        is_plain_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        pixels = _decode_jpeg(data, max_pixels, at_least) if is_plain_jpeg else None
        if pixels is None:
            if image.format in ("JPEG", "MPO") and image.mode == "CMYK":
                _check_cmyk(data)
            pixels = _decode_with_pillow(image, on_white)
    return _upright(pixels, orientation)


def encode_jpeg(rgb: Pixels, quality: int, xmp: bytes | None = None) -> bytes:
    """Encode pixels (height × width × 3 uint8) as JPEG with 4:2:0 chroma; the same input gives the same bytes.

    ``xmp``: an XMP packet, embedded as an APP1 segment directly after the JFIF header.
    Raises ValueError if it is too long for one segment.
    """
    if xmp is not None and len(xmp) > MAX_XMP_BYTES:
        raise ValueError(f"an XMP packet of {len(xmp):,} bytes; one JPEG segment holds {MAX_XMP_BYTES:,}")
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(rgb), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )
    if xmp is None:
        return data
    payload = _XMP_NAME + xmp
    # JFIF's APP0 must stay first (JFIF 1.02); libjpeg always writes it after the two bytes of SOI.
    end_of_jfif = 4 + int.from_bytes(data[4:6], "big")
    segment = b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload
    return data[:end_of_jfif] + segment + data[end_of_jfif:]


def written_format(data: bytes | memoryview) -> str:
    """The format of an image by its first bytes: ``jpg``, ``png`` or ``webp``; "" for any other."""
    head = bytes(data[:12])
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if head[:4] == b"RIFF" and head[8:] == b"WEBP" else ""


def encode_as(kind: str, image: bytes | memoryview | Pixels, quality: int) -> bytes:
    """Encode an image again with fixed settings; the same software gives the same bytes.

    Args:
        kind: ``jpg`` (4:2:0 chroma), ``png`` or ``webp``.
        image: An encoded image, or pixels (height × width × 3 uint8).  The image's XMP packet, EXIF and, if it is for
            the new channels, colour profile are kept.  Its orientation stays as it is; JPEG shows transparency on
            white.
        quality: 1 to 100, of JPEG and WebP.

    Raises:
        SampleError: The image cannot be decoded, or is too large for the format.
    """
    if isinstance(image, np.ndarray):
        return _saved(Image.fromarray(image), {}, kind, quality)
    return _with_pixels_alone(lambda data: _encode(kind, data, quality), image)


def _encode(kind: str, data: bytes | memoryview, quality: int) -> bytes:
    with _opened(data, MAX_PIXELS) as opened:
        if opened.format in ("JPEG", "MPO"):
            check_scans(data, opened.size[0] * opened.size[1])
        opened.load()
        picture = opened
        if opened.mode not in ("RGB", "RGBA", "L") or (kind == "jpg" and opened.mode == "RGBA"):
            picture = Image.fromarray(_decode_with_pillow(opened, on_white=True))
        kept = {name: opened.info[name] for name in ("icc_profile", "exif", "xmp") if opened.info.get(name)}
        # A profile is for the channels that it names (ICC.1, 7.2.6); WebP makes grey pixels RGB.
        channels = b"GRAY" if picture.mode == "L" and kind != "webp" else b"RGB "
        if kept.get("icc_profile", b"")[16:20] != channels:
            kept.pop("icc_profile", None)
        return _saved(picture, kept, kind, quality)


def _saved(image: Image.Image, kept: dict[str, Any], kind: str, quality: int) -> bytes:
    settings: dict[str, Any] = dict(kept)
    if kind == "png":
        xmp = settings.pop("xmp", None)
        if xmp is not None:
            settings["pnginfo"] = PngImagePlugin.PngInfo()
            settings["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode("utf-8", "replace"))
        settings |= {"compress_level": 6}
    elif kind == "webp":
        settings |= {"quality": quality, "method": 4}
    else:
        settings |= {"quality": quality, "subsampling": "4:2:0"}
        if "exif" in settings:  # a WebP may hold it without the name that a JPEG's segment begins with
            settings["exif"] = _EXIF_NAME + settings["exif"].removeprefix(_EXIF_NAME)
    buffer = io.BytesIO()
    try:
        image.save(buffer, {"jpg": "JPEG"}.get(kind, kind), **settings)
    except (OSError, ValueError) as error:  # WebP holds at most 16,383 pixels a side
        raise SampleError("not_encodable", f"as {kind}, {image.width:,} × {image.height:,} pixels: {error}") from None
    return buffer.getvalue()


def encoders() -> str:
    """The software that ``encode_as`` uses, on which its bytes depend."""
    libraries = ("libjpeg_turbo", "webp", "zlib")
    found = [f"{name} {features.version(name)}" for name in libraries if features.version(name)]
    return ", ".join([f"Pillow {PIL.__version__}", *found])


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """The content of an image's header.  suffix: the usual one for its format.  width, height: after orientation.
    exif: tag → text, with names such as ``Image Orientation`` and ``EXIF ExposureTime``."""

    suffix: str
    width: int
    height: int
    exif: dict[str, str]


def image_facts(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Read the facts from an image's header.  Raises SampleError like ``image_size``."""
    return _with_pixels_alone(lambda data: _facts(data, max_pixels), data)


def _facts(data: bytes | memoryview, max_pixels: int) -> ImageFacts:
    with _opened(data, max_pixels) as image:
        width, height = image.size
        if _orientation(image) >= 5:
            width, height = height, width
        return ImageFacts(_SUFFIXES[str(image.format)], width, height, _exif_of(image))


def _with_pixels_alone(read: Callable[[bytes | memoryview], Found], data: bytes | memoryview) -> Found:
    """What ``read`` makes of an image, or, where it finds damage, of the parts of the file that make up the pixels."""
    try:
        return read(data)
    except SampleError as error:
        alone = pixels_alone(bytes(data)) if error.reason == "undecodable" else None
        if alone is None:
            raise
        try:
            return read(alone)
        except SampleError:
            raise error from None


@contextlib.contextmanager
def _opened(data: bytes | memoryview, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image with Pillow and check its size; every error in the ``with`` block becomes a SampleError."""
    if len(data) == 0:
        raise SampleError("empty_image", "zero bytes")
    _silence_pillow()
    check_chunks(data)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_bound(*image.size, max_pixels)
            yield image
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - hostile bytes make Pillow's plugins raise anything
        raise _as_sample_error(error, max_pixels) from None


def _as_sample_error(error: Exception, max_pixels: int) -> SampleError:
    if isinstance(error, PIL.UnidentifiedImageError):  # its own text contains a memory address
        return SampleError("undecodable", f"none of {', '.join(_FORMATS)}")
    if isinstance(error, Image.DecompressionBombError):  # larger than Pillow's own limit
        found = re.search(r"\d+", str(error))
        size = f"{int(found[0]):,} pixels" if found else "too many pixels"
        return SampleError("image_too_large", f"{size}; the bound is {max_pixels:,}")
    return SampleError("undecodable", _ADDRESS.sub("0x…", f"{type(error).__name__}: {error}")[:300])


def _check_bound(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise SampleError("image_too_large", f"{width:,} × {height:,} pixels; the bound is {max_pixels:,}")
    if width < 1 or height < 1:
        raise SampleError("undecodable", f"{width} × {height} pixels")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8.  An image with broken EXIF counts as upright, as in viewers."""
    try:
        # The getexif of the base class, because PNG's own decodes all pixels to look for EXIF after them.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - struct.error, SyntaxError, KeyError, ValueError … by what is broken
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _exif_of(image: Image.Image) -> dict[str, str]:
    """The EXIF tags as text, limited in size; {} if there are none or they are broken."""
    try:
        exif = Image.Image.getexif(image)
        groups = (("Image", dict(exif)), ("EXIF", dict(exif.get_ifd(ExifTags.IFD.Exif)) if exif else {}))
        found = {
            f"{group} {ExifTags.TAGS.get(tag, f'{tag:#06x}')}": clean_text(str(value))
            for group, tags in groups
            for tag, value in islice(tags.items(), _MAX_EXIF_TAGS)
            if not isinstance(value, bytes | dict)
        }
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - as above
        return {}
    return {name: value for name, value in found.items() if len(value) <= _MAX_EXIF_CHARACTERS}


def _decode_jpeg(data: bytes | memoryview, max_pixels: int, at_least: int | None) -> Pixels | None:
    """Decode with libjpeg-turbo; None if it warns about the image and Pillow should be tried."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_bound(width, height, max_pixels)  # as the decoder sees it, because a file may have two frame headers
        if colorspace not in ("YCbCr", "Gray", "RGB"):
            return None
        scale: dict[str, float] = {}
        if at_least is not None and max(width, height) >= 2 * at_least:
            side = "min_width" if width >= height else "min_height"
            # For a factor below 2, libjpeg's reduced transforms are slower than the full one (measured: 8.4 ms instead
            # of 6.9 ms at 5/8 of 2000 × 1500, but 5.2 ms at 4/8).
            scale = {side: at_least, "min_factor": 2}
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", **scale)
    except ValueError as error:
        if _DAMAGE.search(str(error)):
            raise SampleError("undecodable", str(error)[:300]) from None
        return None
    return pixels


def _check_cmyk(data: bytes | memoryview) -> None:
    """Raise SampleError ``undecodable`` for lost pixels, in whose place Pillow shows grey without a word."""
    try:
        simplejpeg.decode_jpeg(data, "CMYK")
    except ValueError as error:
        if _DAMAGE.search(str(error)):
            raise SampleError("undecodable", str(error)[:300]) from None


def _decode_with_pillow(image: Image.Image, on_white: bool) -> Pixels:
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey: convert() would clip it to white
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if on_white and image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.asarray(image.convert("RGB"))


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation >= 5:  # 5 to 8 equal 1 to 4 with width and height exchanged
        pixels = pixels.transpose(1, 0, 2)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


@functools.cache
def _silence_pillow() -> None:
    """Suppress Pillow's warnings (corrupt EXIF, large images), because every defect that matters is raised.

    This is done once for the whole process, and only for Pillow's modules, because ``catch_warnings`` is not
    thread-safe.
    """
    warnings.filterwarnings("ignore", module=r"PIL\b")
