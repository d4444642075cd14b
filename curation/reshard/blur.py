"""Blurs faces as DataComp does: a Gaussian blur with a soft mask around each face box."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from curation.edits import json_of
from curation.errors import InfrastructureError, SampleError
from curation.faces import RECORDED_FIELD, FaceDetector, recorded_boxes
from curation.images import Pixels, decode_rgb
from curation.jsonio import parse_json_object
from curation.reshard.fitting import QUALITY, Fitting
from curation.tar.samples import MAX_MEMBER_BYTES
from curation.tar.scan import IMAGE_SUFFIXES, SampleSpan, Window
from curation.tar.splice import Edit

_GROWTH = 0.1  # a box grows on each side by this share of its longer side
_SIGMA = 0.1  # as a share of the largest box's longer side
_REACH = 4  # the kernel's radius in standard deviations

Box = Sequence[float]  # x0, y0, x1, y1 as shares of width and height


class Blur:
    """Blurs the faces of a sample's image, if it has any."""

    def __init__(self, detector: FaceDetector | None, fitting: Fitting) -> None:
        """detector: finds the faces; None: use the boxes that the metadata records.  fitting: encodes the images."""
        try:
            import cv2
        except ImportError as error:
            raise InfrastructureError(
                f"--blur_faces needs OpenCV ({error}): pip install opencv-python-headless"
            ) from None
        cv2.setNumThreads(1)
        self._cv2 = cv2
        self._detector, self._fitting = detector, fitting
        self.blurred = 0  # number of images
        self.unknown = 0  # samples whose metadata does not say whether there are faces

    def edit(self, window: Window, span: SampleSpan) -> Edit | None:
        """The sample's new image and json; None if there is nothing to blur.

        Raises SampleError if the image or the boxes cannot be read: such a sample must not be kept unblurred.
        """
        image = _read(window, span, IMAGE_SUFFIXES)
        json = _read(window, span, frozenset(("json",)))
        metadata = parse_json_object(json) if json is not None else {}
        if image is None:
            return None
        pixels: Pixels | None = None
        boxes: Sequence[Box] | None
        if self._detector is None:
            boxes = recorded_boxes(metadata)
            self.unknown += boxes is None
        else:
            pixels = decode_rgb(image)
            boxes = [[round(float(value), 6) for value in box] for box in self._detector.detect(pixels)]
        if not boxes:
            return None
        pixels = decode_rgb(image) if pixels is None else pixels
        new, suffix = self._fitting.encode(span, self._blurred(pixels, boxes))
        self.blurred += 1
        return Edit(new, None, self._json(metadata, new, pixels, boxes) if json is not None else None, suffix)

    def _blurred(self, pixels: Pixels, boxes: Sequence[Box]) -> Pixels:
        height, width = pixels.shape[:2]
        mask = np.zeros((height, width, 1), np.float32)
        largest = 0
        for box in boxes:
            shares = [min(max(share, 0.0), 1.0) for share in box[:4]]
            x0, y0, x1, y1 = (int(share * side) for share, side in zip(shares, (width, height) * 2, strict=True))
            longer = max(x1 - x0, y1 - y0)
            largest = max(largest, longer)
            grown = (x0 - _GROWTH * longer, y0 - _GROWTH * longer, x1 + _GROWTH * longer, y1 + _GROWTH * longer)
            left, top, right, bottom = (max(0, int(value)) for value in grown)  # negative indices count from the end
            mask[top:bottom, left:right] = 1
        sigma = max(_SIGMA * largest, 0.5)
        size = 2 * math.ceil(_REACH * sigma) + 1
        image = pixels.astype(np.float32)
        soft = self._cv2.GaussianBlur(mask, (size, size), sigma)[:, :, None]
        smooth = self._cv2.GaussianBlur(image, (size, size), sigma)
        result: Pixels = np.clip(image + (smooth - image) * soft, 0, 255).astype(np.uint8)
        return result

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


def _read(window: Window, span: SampleSpan, suffixes: frozenset[str]) -> bytes | None:
    member = next((member for member in span.members if member.suffix in suffixes), None)
    if member is None:
        return None
    if not member.regular or member.size > MAX_MEMBER_BYTES:
        raise SampleError("not_a_file" if not member.regular else "member_too_large", member.text_name)
    return window.read(member.data, member.size)
