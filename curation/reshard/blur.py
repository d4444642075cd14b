"""Blurs faces as DataComp does: a Gaussian blur with a soft mask around each face box."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from curation.edits import json_of
from curation.errors import SampleError, require
from curation.faces import RECORDED_FIELD, FaceDetector, clipped, has_area, recorded_boxes, without_area
from curation.images import Pixels, decode_rgb
from curation.jsonio import parse_json_object
from curation.libraries import np
from curation.reshard.fitting import QUALITY, Fitting
from curation.tar.samples import MAX_MEMBER_BYTES
from curation.tar.scan import IMAGE_SUFFIXES, SampleSpan, Window
from curation.tar.splice import Edit

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GROWTH = 0.1  # a box grows on each side by this share of its longer side
_SIGMA = 0.1  # as a share of the largest box's longer side
_REACH = 4  # the kernel's radius in standard deviations

# OpenCV's work and memory grow with the kernel, whose size follows from the longer side of a box: a picture of
# 60,000 x 2 pixels with one face would take 34 GB, one of 2 x 60,000 minutes.  Beyond these bounds the picture is
# blurred at a reduced scale.
_MAX_STEPS: Final = 10**11  # multiplications: about 20 s
_MAX_BUFFER_BYTES: Final = 512 << 20  # rows that OpenCV holds at a time, as many as the kernel is high
_MAX_SLENDERNESS: Final = 8  # the kernel's size as a multiple of the picture's shorter side
_REDUCED_SIGMA: Final = 32.0  # pixels; a Gaussian this wide is the same at either scale

Box = Sequence[float]  # x0, y0, x1, y1 as shares of width and height


class Blur:
    """Blurs the faces of a sample's image, if it has any."""

    def __init__(self, detector: FaceDetector | None, fitting: Fitting) -> None:
        """detector: finds the faces; None: use the boxes that the metadata records.  fitting: encodes the images."""
        require("cv2")
        import cv2

        cv2.setNumThreads(1)
        self._cv2 = cv2
        self._detector, self._fitting = detector, fitting
        self.blurred = 0  # number of images
        self.faces = 0  # that were blurred in them
        self.without_area = 0  # recorded boxes that were ignored
        self.not_looked_at = 0  # samples with further pictures, of which only the one that is read is blurred
        self.unknown = 0  # samples whose metadata does not say whether there are faces

    def edit(self, window: Window, span: SampleSpan) -> Edit | None:
        """The sample's new image and json; None if there is nothing to blur.

        Raises SampleError if the image or the boxes cannot be read, or if it cannot be blurred: such a sample must not
        be kept unblurred.
        """
        try:
            return self._edit(window, span)
        except (MemoryError, self._cv2.error) as error:  # of this picture's shape alone
            raise SampleError("blur_failed", f"{type(error).__name__}: {error}") from None

    def _edit(self, window: Window, span: SampleSpan) -> Edit | None:
        picture = self._fitting.picture(span)
        image = _read(window, span, frozenset((picture,)) if picture else IMAGE_SUFFIXES)
        self.not_looked_at += sum(suffix.rpartition(".")[2] in IMAGE_SUFFIXES for suffix in span.suffixes) > 1
        json = _read(window, span, frozenset(("json",)))
        metadata = parse_json_object(json) if json is not None else {}
        if image is None:
            return None
        pixels: Pixels | None = None
        boxes: Sequence[Box] | None
        if self._detector is None:
            boxes = recorded_boxes(metadata)
            self.unknown += boxes is None
            self.without_area += without_area(metadata)
        else:
            pixels = decode_rgb(image)
            found = ([round(float(value), 6) for value in box] for box in self._detector.detect(pixels))
            boxes = [box for box in found if has_area(box)]
        if not boxes:
            return None
        pixels = decode_rgb(image) if pixels is None else pixels
        new, suffix = self._fitting.encode(span, self._blurred(pixels, boxes))
        self.blurred += 1
        self.faces += len(boxes)
        return Edit(
            new, None, self._json(metadata, new, pixels, boxes) if json is not None else None, suffix, replaces=picture
        )

    def _blurred(self, pixels: Pixels, boxes: Sequence[Box]) -> Pixels:
        height, width = pixels.shape[:2]
        mask = np.zeros((height, width, 1), np.float32)
        largest = 0
        for box in boxes:
            x0, y0, x1, y1 = (int(share * side) for share, side in zip(clipped(box), (width, height) * 2, strict=True))
            longer = max(x1 - x0, y1 - y0)
            largest = max(largest, longer)
            grown = (x0 - _GROWTH * longer, y0 - _GROWTH * longer, x1 + _GROWTH * longer, y1 + _GROWTH * longer)
            left, top, right, bottom = (max(0, int(value)) for value in grown)  # negative indices count from the end
            left, top = min(left, width - 1), min(top, height - 1)
            mask[top : max(bottom, top + 1), left : max(right, left + 1)] = 1  # at least the pixel that it lies in
        sigma = max(_SIGMA * largest, 0.5)
        image = pixels.astype(np.float32)
        soft = self._smooth(mask, sigma)[:, :, None]
        result: Pixels = np.clip(image + (self._smooth(image, sigma) - image) * soft, 0, 255).astype(np.uint8)
        return result

    def _smooth(self, image: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
        """Blur all of an image with a Gaussian of ``sigma`` pixels; very large ones at a reduced scale."""
        height, width = image.shape[:2]
        size = _kernel(sigma)
        smooth: NDArray[np.float32]
        within = 6 * size * width * height <= _MAX_STEPS and 12 * size * width <= _MAX_BUFFER_BYTES
        if within and size <= _MAX_SLENDERNESS * min(width, height):
            smooth = self._cv2.GaussianBlur(image, (size, size), sigma)
            return smooth
        # Each axis has its own scale, because a thin picture cannot be made thinner than a pixel.
        scale = min(1.0, _REDUCED_SIGMA / sigma)
        reduced = max(1, round(width * scale)), max(1, round(height * scale))
        small = self._cv2.resize(image, reduced, interpolation=self._cv2.INTER_AREA)
        sigma *= scale
        small = self._cv2.GaussianBlur(small, (_kernel(sigma), _kernel(sigma)), sigma)
        smooth = self._cv2.resize(small, (width, height), interpolation=self._cv2.INTER_LINEAR)
        return smooth

    def _json(self, metadata: Mapping[str, Any], image: bytes, pixels: Pixels, boxes: Sequence[Box]) -> bytes:
        """The metadata with the boxes, the new image's facts, and a description of the blur in ``curation.blur``."""
        if self._detector is None:
            by: dict[str, Any] = {"boxes": "recorded"}
        else:
            by = {"boxes": self._detector.name, "revision": self._detector.revision}
        story: dict[str, Any] = {
            **by,
            "kernel": "gaussian",
            "sigma": f"{_SIGMA} of the largest box",
            "quality": QUALITY,
        }
        story |= {f"original_{name}": metadata[name] for name in ("sha256", RECORDED_FIELD) if name in metadata}
        height, width = pixels.shape[:2]
        changed = {"sha256": hashlib.sha256(image).hexdigest(), "width": width, "height": height}
        changed |= {RECORDED_FIELD: [list(box[:4]) for box in boxes]}
        curation = metadata.get("curation")
        earlier = curation if isinstance(curation, dict) else {}
        return json_of({**metadata, **changed, "curation": {**earlier, "blur": story}})


def _kernel(sigma: float) -> int:
    return 2 * math.ceil(_REACH * sigma) + 1


def _read(window: Window, span: SampleSpan, suffixes: frozenset[str]) -> bytes | None:
    member = next((member for member in span.members if member.suffix in suffixes), None)
    if member is None:
        return None
    if not member.regular or member.size > MAX_MEMBER_BYTES:
        raise SampleError("not_a_file" if not member.regular else "member_too_large", member.text_name)
    return window.read(member.data, member.size)
