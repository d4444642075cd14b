"""Images from the open web: their size and pixels, bounded before decoding, turned upright; and JPEG out.

JPEGs go through libjpeg-turbo (simplejpeg), at reduced scale where the caller needs fewer pixels; everything else
goes through Pillow.  Whatever is wrong with an image ends as a SampleError with one of three reasons:
``empty_image``, ``image_too_large``, ``undecodable``.  Nothing is ever printed.  Colour profiles are not applied, as
upstream does not apply them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from curation.errors import SampleError
from curation.jsonio import clean_text

Pixels = NDArray[np.uint8]  # height × width × 3, RGB

MAX_PIXELS = 100_000_000  # 300 MB as RGB; the largest phone cameras make 200 MP, the web serves a tenth of that
MAX_XMP_BYTES = 65_502  # what one APP1 segment holds after its name (XMP part 3, 1.1.3)

# What web pages show.  Pillow would open many more, some by starting other programs (EPS by Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "AVIF": "avif"}
_MAX_EXIF_TAGS, _MAX_EXIF_CHARACTERS = 200, 1000
_ORIENTATION = 0x0112  # the EXIF tag
_XMP_NAME = b"http://ns.adobe.com/xap/1.0/\x00"

# libjpeg's warnings that mean lost pixels (jerror.h).  Its other warnings (stray bytes between segments, an odd JFIF
# revision, an ICC profile in disorder) leave the picture whole, and every viewer shows it.
_DAMAGE = re.compile(r"premature end|bad huffman|bad arithmetic|resync|progression|unsupported marker", re.IGNORECASE)
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")  # in an error's text: would differ from run to run


def image_size(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels as a viewer shows it, after EXIF orientation; reads the header only."""
    with _opened(data, max_pixels) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def decode_rgb(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS, at_least: int | None = None, on_white: bool = True
) -> Pixels:
    """The picture upright as height × width × 3 uint8 RGB, contiguous; the first frame of an animation.

    Transparency is laid on white (as img2dataset does); 16-bit samples keep their high byte; CMYK becomes RGB.
    ``at_least``: the longest side may come out smaller than it is, but not below this many pixels: a JPEG more than
    twice that long is decoded at reduced scale.  ``on_white``: False leaves transparency away and shows the colours
    beneath it, as Pillow's ``convert("RGB")`` does, and with it CLIP's and DataComp's tools.  ``max_pixels`` is checked
    in the header, before anything is decoded.

    Raises SampleError ``empty_image``, ``image_too_large`` or ``undecodable`` (a truncated image is undecodable).
    """
    with _opened(data, max_pixels) as image:
        orientation = _orientation(image)
        is_plain_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        pixels = _decode_jpeg(data, max_pixels, at_least) if is_plain_jpeg else None
        if pixels is None:
            pixels = _decode_with_pillow(image, on_white)
    return _upright(pixels, orientation)


def encode_jpeg(rgb: Pixels, quality: int, xmp: bytes | None = None) -> bytes:
    """The pixels (height × width × 3 uint8) as JPEG with 4:2:0 chroma; the same input gives the same bytes.

    ``xmp``: an XMP packet, embedded as an APP1 segment right behind the JFIF header.
    Raises ValueError where it is longer than one segment holds.
    """
    if xmp is not None and len(xmp) > MAX_XMP_BYTES:
        raise ValueError(f"an XMP packet of {len(xmp):,} bytes; one JPEG segment holds {MAX_XMP_BYTES:,}")
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(rgb), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
    )
    if xmp is None:
        return data
    payload = _XMP_NAME + xmp
    # JFIF's APP0 has to stay first (JFIF 1.02); libjpeg always writes one behind the two bytes of SOI.
    end_of_jfif = 4 + int.from_bytes(data[4:6], "big")
    segment = b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload
    return data[:end_of_jfif] + segment + data[end_of_jfif:]


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image's header says.  suffix: how its file is usually named.  width, height: as a viewer shows it.
    exif: by tag, named as in ``Image Orientation`` and ``EXIF ExposureTime``."""

    suffix: str
    width: int
    height: int
    exif: dict[str, str]


def image_facts(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Raises SampleError like ``image_size``."""
    with _opened(data, max_pixels) as image:
        width, height = image.size
        if _orientation(image) >= 5:
            width, height = height, width
        return ImageFacts(_SUFFIXES[str(image.format)], width, height, _exif_of(image))


@contextlib.contextmanager
def _opened(data: bytes | memoryview, max_pixels: int) -> Iterator[Image.Image]:
    """The image opened by Pillow: header read, size within the bound; every error inside becomes a SampleError."""
    if len(data) == 0:
        raise SampleError("empty_image", "zero bytes")
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_bound(*image.size, max_pixels)
            yield image
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - hostile bytes make Pillow's plugins raise anything
        raise _as_sample_error(error, max_pixels) from None


def _as_sample_error(error: Exception, max_pixels: int) -> SampleError:
    if isinstance(error, UnidentifiedImageError):  # its own text holds an address in memory
        return SampleError("undecodable", f"none of {', '.join(_FORMATS)}")
    if isinstance(error, Image.DecompressionBombError):  # beyond what Pillow itself opens
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
    """EXIF orientation 1 to 8.  A picture whose EXIF is broken is shown as it is stored, as viewers do."""
    try:
        # The base class's getexif: PNG's own would decode all pixels to look for EXIF behind them.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - struct.error, SyntaxError, KeyError, ValueError … by what is broken
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _exif_of(image: Image.Image) -> dict[str, str]:
    """The tags as text, within bounds; {} where there are none or they are broken."""
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
    """Pixels by libjpeg-turbo, or None for an image that it warns about and Pillow would read without a warning."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_bound(width, height, max_pixels)  # by the decoder's own header: two frame headers could disagree
        if colorspace not in ("YCbCr", "Gray", "RGB"):
            return None
        scale: dict[str, float] = {}
        if at_least is not None and max(width, height) >= 2 * at_least:
            side = "min_width" if width >= height else "min_height"
            # Below a factor of 2 libjpeg's reduced transforms are slower than the full one (measured: 8.4 against
            # 6.9 ms at 5/8 of 2000 × 1500, and 5.2 ms at 4/8).
            scale = {side: at_least, "min_factor": 2}
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", **scale)
    except ValueError as error:
        if _DAMAGE.search(str(error)):
            raise SampleError("undecodable", str(error)[:300]) from None
        return None
    return pixels


def _decode_with_pillow(image: Image.Image, on_white: bool) -> Pixels:
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey, which convert() would clip to white
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if on_white and image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.asarray(image.convert("RGB"))


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation >= 5:  # 5 to 8 are 1 to 4 with the axes exchanged
        pixels = pixels.transpose(1, 0, 2)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


@functools.cache
def _silence_pillow() -> None:
    """Keep Pillow's warnings (corrupt EXIF, large images) off the terminal: what matters is raised.

    Once for the whole process, and only for Pillow's modules: ``catch_warnings`` is not safe among threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\b")
