"""What CLIP is shown of a picture, equal to OpenAI's preprocessing to the last bit, and cheaper kinds of it.

OpenAI's is: resize the short side to n with Pillow's bicubic filter, crop the centre, make it RGB, then /255 and
normalise.  The first three give bytes and run here, in worker processes; the rest runs on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curation.images import Pixels

OPENAI_SIDE = 224


OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)


OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


BICUBIC = int(Image.Resampling.BICUBIC)


# Beyond, only the part of the resized picture that is looked at is computed: 1 × 100,000,000 pixels would become
# 224 × 22,400,000,000.
MAX_RESIZED_PIXELS = 1 << 25

_PRECISION_BITS = 22  # of Pillow's coefficients for 8-bit samples (Resample.c)


@dataclass(frozen=True, slots=True)
class CentreCrop:
    """side × side × 3 bytes: the short side resized to ``side``, the centre cut out.

    As torchvision's Resize and CenterCrop do it on a Pillow image: the long side truncated, the offset rounded half to
    even.
    """

    takes: ClassVar[Literal["image"]] = "image"
    side: int = OPENAI_SIDE
    resample: int = BICUBIC

    def __call__(self, pixels: Pixels) -> Pixels:
        return self.of(Image.fromarray(pixels))

    def of(self, image: Image.Image) -> Pixels:
        """Of a Pillow image of any mode, which is resized in its own mode and made RGB at the end, as OpenAI does."""
        width, height = image.size
        short, long = sorted((width, height))
        resized = int(self.side * long / short)
        first = round((resized - self.side) / 2)
        if self.side * resized > MAX_RESIZED_PIXELS:
            return _far_too_long(np.asarray(image.convert("RGB")), self.side, resized, first)
        wide = width >= height
        image = image.resize((resized, self.side) if wide else (self.side, resized), self.resample)
        left, top = (first, 0) if wide else (0, first)
        return np.asarray(image.crop((left, top, left + self.side, top + self.side)).convert("RGB"))


@dataclass(frozen=True, slots=True)
class FastCentreCrop:
    """The same crop, cheaper and not to the last bit: a JPEG is decoded at a reduced scale, of no fewer than ``side``
    pixels on the short side (twice that where ``margin`` is 2), and only what the crop shows is resized."""

    takes: ClassVar[Literal["image"]] = "image"
    side: int = OPENAI_SIDE
    resample: int = BICUBIC
    margin: int = 1

    @property
    def min_short_side(self) -> int:
        """The short side of the decoded picture need not have more pixels."""
        return self.side * self.margin

    def __call__(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        short, long = sorted((width, height))
        resized = int(self.side * long / short)
        first = round((resized - self.side) / 2)
        start, end = (at * long / resized for at in (first, first + self.side))
        box = (start, 0, end, height) if width >= height else (0, start, width, end)
        image = Image.fromarray(pixels)
        return np.asarray(image.resize((self.side, self.side), self.resample, box=box, reducing_gap=2.0))


@dataclass(frozen=True, slots=True)
class Squeeze:
    """width × height of whatever shape squeezed into side × side × 3 bytes: SigLIP's, the copy detector's."""

    takes: ClassVar[Literal["image"]] = "image"
    side: int
    resample: int = int(Image.Resampling.BILINEAR)

    def __call__(self, pixels: Pixels) -> Pixels:
        return np.asarray(Image.fromarray(pixels).resize((self.side, self.side), self.resample))


class Normalise:
    """Bytes on a device → what the network takes: samples × 3 × side × side, (x / 255 − mean) / deviation.

    In float32 with true divisions, so that the numbers are torchvision's to the last bit on every device.
    """

    def __init__(self, mean: tuple[float, ...], deviation: tuple[float, ...], device: str, dtype: Any) -> None:
        import torch

        # Tensors on the device: a division by a Python number becomes a multiplication on a GPU.
        self._range = torch.tensor(255.0, device=device)
        self._mean = torch.tensor(mean, device=device)
        self._deviation = torch.tensor(deviation, device=device)
        self._dtype = dtype

    def __call__(self, crops: Any) -> Any:
        numbers = (crops.float() / self._range - self._mean) / self._deviation
        return numbers.permute(0, 3, 1, 2).to(self._dtype).contiguous()


def _far_too_long(pixels: Pixels, side: int, resized: int, first: int) -> Pixels:
    """The crop of a picture with an extreme shape: the long side's pixels that it shows, and no others."""
    upright = pixels.shape[0] > pixels.shape[1]
    rows = pixels if upright else pixels.transpose(1, 0, 2)  # the long side goes down
    spans = [_coefficients(len(rows), resized, at) for at in range(first, first + side)]
    begin, end = min(start for start, _ in spans), max(start + len(k) for start, k in spans)
    few = np.ascontiguousarray(rows[begin:end])
    # Pillow rounds to bytes between the two directions, so their order matters: rows first, but for a tall picture
    # that shrinks.
    if upright and resized >= len(rows):
        few = np.asarray(Image.fromarray(few).resize((side, len(few)), Image.Resampling.BICUBIC))
        return _weighted(few.astype(np.int64), spans, begin)
    long = Image.fromarray(_weighted(few.astype(np.int64), spans, begin))
    crop = np.asarray(long.resize((side, side), Image.Resampling.BICUBIC))
    return crop if upright else np.ascontiguousarray(crop.transpose(1, 0, 2))


def _weighted(rows: NDArray[np.int64], spans: list[tuple[int, NDArray[np.int64]]], begin: int) -> Pixels:
    half = 1 << (_PRECISION_BITS - 1)
    sums = [np.tensordot(k, rows[s - begin : s - begin + len(k)], axes=1) + half for s, k in spans]
    return (np.stack(sums) >> _PRECISION_BITS).clip(0, 255).astype(np.uint8)


def _cubic(distance: float) -> float:
    """Keys' bicubic kernel with a = −0.5, as Pillow's."""
    x = abs(distance)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2.0 else 0.0


def _coefficients(size: int, resized: int, at: int) -> tuple[int, NDArray[np.int64]]:
    """The first input pixel of output pixel ``at`` and the fixed-point weights of it and those behind it."""
    scale = size / resized
    stretch = max(scale, 1.0)
    centre = (at + 0.5) * scale
    first = max(int(centre - 2.0 * stretch + 0.5), 0)
    last = min(int(centre + 2.0 * stretch + 0.5), size)
    weights = [_cubic((x - centre + 0.5) * (1.0 / stretch)) for x in range(first, last)]
    total = sum(weights)
    fixed = [math.trunc(w / total * (1 << _PRECISION_BITS) + (0.5 if w >= 0 else -0.5)) for w in weights]
    return first, np.array(fixed, np.int64)
