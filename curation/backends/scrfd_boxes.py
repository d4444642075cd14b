"""What SCRFD is shown of a picture, as DataComp shows it, and the boxes that its answers mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curation.faces import non_maximum_suppression
from curation.images import Pixels

ANCHORS = 2  # a cell
LEAST_SCORE = 0.3
LARGEST_OVERLAP = 0.45  # upstream suppresses more than insightface, which has 0.4
# A picture with a longer side is made smaller before it is padded: its square would not fit into memory.
MAX_SQUARE_SIDE = 4096


@dataclass(frozen=True, slots=True)
class WhiteSquare:
    """A picture in the middle of a white square, resized to side × side × 3 bytes with Pillow's bicubic filter."""

    takes: ClassVar[Literal["image"]] = "image"
    side: int

    def __call__(self, pixels: Pixels) -> Pixels:
        image = Image.fromarray(pixels)
        if max(image.size) > MAX_SQUARE_SIDE:
            shrink = MAX_SQUARE_SIDE / max(image.size)
            size = [max(1, round(n * shrink)) for n in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        longest = max(image.size)
        square = Image.new("RGB", (longest, longest), (255, 255, 255))
        square.paste(image, _offset(*image.size))
        return np.asarray(square.resize((self.side, self.side), Image.Resampling.BICUBIC))


@dataclass(frozen=True, slots=True)
class PictureSize:
    """(width, height) of the picture that was decoded: where in its square it lies."""

    takes: ClassVar[Literal["image"]] = "image"

    def __call__(self, pixels: Pixels) -> NDArray[np.int32]:
        return np.array([pixels.shape[1], pixels.shape[0]], np.int32)


def _offset(width: int, height: int) -> tuple[int, int]:
    """Of the picture's corner in its square; half a pixel goes to the other side."""
    longest = max(width, height)
    return (longest - width) // 2, (longest - height) // 2


def boxes_in_square(
    scores: Sequence[NDArray[Any]], distances: Sequence[NDArray[Any]], side: int
) -> NDArray[np.float32]:
    """n × 5, best first: corners in pixels of the square and score, of one picture.

    scores, distances: for each stride side/8, side/16, side/32 the anchors' scores and their four distances in steps of
    the stride, row by row, the two anchors of a cell side by side.
    """
    found = []
    for stride, score, reach in zip((8, 16, 32), scores, distances, strict=True):
        cells = -(-side // stride)
        y, x = np.divmod(np.arange(cells * cells * ANCHORS) // ANCHORS, cells)
        centre = np.stack([x, y, x, y], 1) * stride
        good = score.reshape(-1) > LEAST_SCORE
        steps = reach.reshape(-1, 4)[good] * np.array([-stride, -stride, stride, stride])
        corners = (centre[good] + steps).clip(0, side)
        found.append(np.concatenate([corners, score.reshape(-1, 1)[good]], 1))
    boxes = np.concatenate(found).astype(np.float32)
    return boxes[non_maximum_suppression(boxes, LARGEST_OVERLAP)]


def boxes_in_picture(boxes: NDArray[np.float32], side: int, width: int, height: int) -> list[list[float]]:
    """[x0, y0, x1, y1] for each, as shares of the picture's width and height, clipped to it."""
    longest = max(width, height)
    left, top = _offset(width, height)
    in_pixels = boxes[:, :4].astype(np.float64) * (longest / side) - [left, top, left, top]
    shares = (in_pixels / [width, height, width, height]).clip(0, 1)
    return [[float(value) for value in box] for box in shares.astype(np.float32)]
