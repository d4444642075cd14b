"""What is stored of a downloaded image: its bytes as they came, or a JPEG of the size that the options ask for."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from curation.download.whole import is_whole
from curation.errors import SampleError
from curation.images import MAX_PIXELS, ImageFacts, Pixels, decode_rgb, encode_as, encode_jpeg, image_facts
from curation.libraries import Image, np

Encode = Literal["keep", "jpg", "png", "webp"]
Check = Literal["decode", "header"]
ResizeMode = Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]
ResizeFilter = Literal[
    "hamming", "bilinear", "bicubic", "lanczos", "box", "nearest", "area", "linear", "cubic", "lanczos4"
]
# img2dataset's names, which are OpenCV's.  Its area is the mean over each pixel's area, to which hamming is nearest.
FILTERS: Final[Mapping[ResizeFilter, ResizeFilter]] = {
    "area": "hamming",
    "linear": "bilinear",
    "cubic": "bicubic",
    "lanczos4": "lanczos",
}

_WHITE = 255
_SPARE = 2  # a JPEG that is reduced while it is decoded keeps so many times the pixels, for the filter to weigh
_ENOUGH_TO_CHECK = 8  # pixels of the longest side: all bits of a JPEG are read even so, at a fraction of the cost


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """What is stored of an image, and which images are refused.

    Attributes:
        encode: ``keep`` stores the bytes as they came; ``jpg``, ``png`` and ``webp`` store such an image, upright and
            resized.
        size: In pixels; the mode says of which side, as in img2dataset.
        mode: How the image is resized.
        only_if_bigger: Whether smaller images keep their size.
        quality: Of a JPEG or WebP; the compression of a PNG, from 0 to 9.
        min_size: Pixels that the shorter side of the downloaded image must have.
        max_aspect_ratio: Of the downloaded image.
        max_area: Of the downloaded image, in pixels.
        check: ``decode`` refuses an image that cannot be decoded to its end.  ``header`` decodes only where the
            structure of the file does not show that it is whole.
        max_pixels: Bound for decoding.
        filter: How an image is made smaller.  ``hamming`` comes closest to the mean over each pixel's area, as OpenCV's
            INTER_AREA and so img2dataset have it.  ``box`` gives the bytes of versions before 0.3.0.
        enlarge: The filter with which an image is made larger; img2dataset takes Lanczos too.
        skip_reencode: Store the bytes as they came where the image has the format already and is not resized.
    """

    encode: Encode = "keep"
    size: int = 0
    mode: ResizeMode = "no"
    only_if_bigger: bool = False
    quality: int = 95
    min_size: int = 0
    max_aspect_ratio: float = float("inf")
    check: Check = "decode"
    max_pixels: int = MAX_PIXELS
    filter: ResizeFilter = "hamming"
    enlarge: ResizeFilter = "lanczos"
    skip_reencode: bool = False
    max_area: float = float("inf")


@dataclass(frozen=True, slots=True)
class StoredImage:
    """The bytes to store, of ``width`` × ``height`` pixels; ``facts`` and ``sha256`` are of what was downloaded."""

    data: bytes
    suffix: str
    width: int
    height: int
    facts: ImageFacts
    sha256: str


def make_stored(data: bytes, policy: ImagePolicy) -> StoredImage:
    """Check, decode and encode an image.  Raises SampleError where it is damaged or the policy refuses it."""
    facts = image_facts(data, policy.max_pixels)
    shorter, longer = sorted((facts.width, facts.height))
    if shorter < policy.min_size:
        raise SampleError("image_too_small", f"{facts.width} × {facts.height} pixels")
    if longer > policy.max_aspect_ratio * shorter:
        raise SampleError("aspect_ratio", f"{facts.width} × {facts.height} pixels")
    if facts.width * facts.height > policy.max_area:
        raise SampleError("image_too_large", f"{facts.width} × {facts.height} pixels, more than --max_image_area")
    digest = hashlib.sha256(data).hexdigest()
    if policy.encode == "keep":
        if policy.check == "decode" or not is_whole(data, facts.suffix):
            decode_rgb(data, policy.max_pixels, at_least=_ENOUGH_TO_CHECK)
        return StoredImage(data, facts.suffix, facts.width, facts.height, facts, digest)
    pixels = decode_rgb(data, policy.max_pixels, at_least=_pixels_needed(shorter, longer, policy))
    resized = resize(pixels, (facts.width, facts.height), policy)
    if policy.skip_reencode and resized is pixels and facts.suffix == policy.encode:
        return StoredImage(data, facts.suffix, facts.width, facts.height, facts, digest)
    height, width = resized.shape[:2]
    return StoredImage(_encoded(resized, policy), policy.encode, width, height, facts, digest)


def _encoded(pixels: Pixels, policy: ImagePolicy) -> bytes:
    if policy.encode == "jpg":
        return encode_jpeg(pixels, policy.quality)
    if policy.encode == "webp":
        return encode_as("webp", pixels, policy.quality)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=policy.quality)
    return buffer.getvalue()


def _pixels_needed(shorter: int, longer: int, policy: ImagePolicy) -> int | None:
    """The pixels of the longest side that resizing needs for a good result; None for all."""
    if policy.mode == "no":
        return None
    whole = longer if policy.mode in ("keep_ratio_largest", "border") else shorter
    size = policy.size * (1 if policy.filter == "box" else _SPARE)
    return longer if whole <= size else -(-size * longer // whole)


def resize(pixels: Pixels, whole: tuple[int, int], policy: ImagePolicy) -> Pixels:
    """Resize by img2dataset's modes.

    ``keep_ratio`` and ``center_crop`` bring the shorter side to the size, ``border`` and ``keep_ratio_largest`` the
    longer one; ``border`` then fills up to a square with white.

    Args:
        pixels: The image, of shape (height, width, 3), perhaps decoded at a reduced scale.
        whole: Width and height of the whole image.
        policy: Mode and size.

    Raises:
        SampleError: The result would be too large.
    """
    if policy.mode == "no":
        return pixels
    width, height = whole
    side = min(height, width) if policy.mode in ("keep_ratio", "center_crop") else max(height, width)
    if policy.only_if_bigger and side <= policy.size:
        return pixels
    scale = policy.size / side
    target = (max(1, round(width * scale)), max(1, round(height * scale)))
    if target[0] * target[1] > policy.max_pixels:
        raise SampleError("image_too_large", f"{target[0]:,} × {target[1]:,} pixels after resizing")
    kernel = Image.Resampling[(policy.filter if scale < 1 else policy.enlarge).upper()]
    resized = np.asarray(Image.fromarray(pixels).resize(target, kernel)) if pixels.shape[1::-1] != target else pixels
    if policy.mode == "center_crop":
        top, left = ((have - policy.size) // 2 for have in resized.shape[:2])
        return resized[top : top + policy.size, left : left + policy.size]
    if policy.mode == "border":
        square = np.full((policy.size, policy.size, 3), _WHITE, np.uint8)
        top, left = ((policy.size - have) // 2 for have in resized.shape[:2])
        square[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
        return square
    return resized
