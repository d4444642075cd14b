"""How pictures are prepared for CLIP: equal to OpenAI's preprocessing to the last bit, or cheaper.

OpenAI resizes the short side to n with Pillow's bicubic filter, crops the centre, makes it RGB, divides by 255 and
normalises.  The first three steps give bytes and run in worker processes; the rest runs on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from curation.extract.resample import BICUBIC, BILINEAR, Window, resized
from curation.images import Pixels
from curation.libraries import Image, np

if TYPE_CHECKING:
    from numpy.typing import NDArray

OPENAI_SIDE = 224


OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)


OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


# Of a picture that would have more, only the part that the crop shows is resized: 1 × 20,000,000 pixels would become
# 224 × 4,480,000,000.
MAX_RESIZED_PIXELS = 1 << 25


@dataclass(frozen=True, slots=True)
class CentreCrop:
    """side × side × 3 bytes: the short side is resized to ``side``, and the centre is cut out.

    It does what torchvision's Resize and CenterCrop do on a Pillow image: the long side is truncated to a whole number,
    and the crop's offset is rounded half to even.
    """

    takes: ClassVar[Literal["image"]] = "image"
    side: int = OPENAI_SIDE
    resample: int = BICUBIC

    def __call__(self, pixels: Pixels) -> Pixels:
        return self.of(Image.fromarray(pixels))

    def of(self, image: Image.Image) -> Pixels:
        """The crop of a Pillow image of any mode, resized in its own mode and then made RGB, as OpenAI does it."""
        resized, first = _resized_side(image.size, self.side)
        if self.side * resized > MAX_RESIZED_PIXELS:
            return _middle_of_a_strip(image.convert("RGB"), self.side, self.resample)
        wide = image.width >= image.height
        image = image.resize((resized, self.side) if wide else (self.side, resized), self.resample)
        left, top = (first, 0) if wide else (0, first)
        return np.asarray(image.crop((left, top, left + self.side, top + self.side)).convert("RGB"))

    def fits_device(self, width: int, height: int) -> bool:
        return self.side * _resized_side((width, height), self.side)[0] <= MAX_RESIZED_PIXELS

    def on_device(self, pictures: Sequence[Any]) -> Any:
        return resized(pictures, [self._window(*picture.shape[:2]) for picture in pictures], self.side, self.resample)

    def _window(self, height: int, width: int) -> Window:
        long, first = _resized_side((width, height), self.side)
        return Window(long, self.side, left=first) if width >= height else Window(self.side, long, top=first)


@dataclass(frozen=True, slots=True)
class FastCentreCrop:
    """The same crop, cheaper and not equal to the last bit.

    A JPEG is decoded at a reduced scale, with no fewer than ``side`` pixels on the short side (twice that where
    ``margin`` is 2), and only what the crop shows is resized.
    """

    takes: ClassVar[Literal["image"]] = "image"
    side: int = OPENAI_SIDE
    resample: int = BICUBIC
    margin: int = 1

    @property
    def min_short_side(self) -> int:
        """Pixels that the short side of the decoded picture needs; more are not used."""
        return self.side * self.margin

    def __call__(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        resized, first = _resized_side((width, height), self.side)
        start, end = (at * max(width, height) / resized for at in (first, first + self.side))
        box = (start, 0, end, height) if width >= height else (0, start, width, end)
        image = Image.fromarray(pixels)
        return np.asarray(image.resize((self.side, self.side), self.resample, box=box, reducing_gap=2.0))


@dataclass(frozen=True, slots=True)
class Squeeze:
    """A picture of any shape squeezed into side × side × 3 bytes, as SigLIP and the copy detector see it."""

    takes: ClassVar[Literal["image"]] = "image"
    side: int
    resample: int = BILINEAR

    def __call__(self, pixels: Pixels) -> Pixels:
        return np.asarray(Image.fromarray(pixels).resize((self.side, self.side), self.resample))

    def fits_device(self, width: int, height: int) -> bool:
        return True

    def on_device(self, pictures: Sequence[Any]) -> Any:
        return resized(pictures, [Window(self.side, self.side)] * len(pictures), self.side, self.resample)


@dataclass(frozen=True, slots=True)
class Patches:
    """A picture of any shape as ``most`` patches, most × (side · side · 3) bytes, zeros behind them: SigLIP 2's NaFlex.

    It is resized, with nearly its own shape, to the largest whole number of patches that are not more than ``most``.
    """

    takes: ClassVar[Literal["image"]] = "image"
    side: int
    most: int
    resample: int = BILINEAR

    def __call__(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        rows, columns = patch_grid(height, width, self.side, self.most)
        image = Image.fromarray(pixels).resize((columns * self.side, rows * self.side), self.resample)
        parts = np.asarray(image).reshape(rows, self.side, columns, self.side, 3).transpose(0, 2, 1, 3, 4)
        patches = np.zeros((self.most, self.side * self.side * 3), np.uint8)
        patches[: rows * columns] = parts.reshape(rows * columns, -1)
        return patches


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """How many rows and columns of patches ``Patches`` makes of a picture: two int32."""

    takes: ClassVar[Literal["image"]] = "image"
    side: int
    most: int

    def __call__(self, pixels: Pixels) -> NDArray[np.int32]:
        height, width = pixels.shape[:2]
        return np.array(patch_grid(height, width, self.side, self.most), np.int32)


def patch_grid(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """Rows and columns of patches: both sides times the largest number for which, rounded up to whole patches, they are
    not more than ``most``; found by halving between nothing and 100 until 1e-5 is left, as SigLIP 2's authors do."""

    def at(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / side)), max(1, math.ceil(width * scale / side))

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        low, high = (scale, high) if math.prod(at(scale)) <= most else (low, scale)
    return at(low)


class Normalise:
    """Bytes on a device → what the network takes: samples × 3 × side × side, (x / 255 − mean) / deviation.

    It computes in float32 with true divisions, so that the numbers are torchvision's to the last bit on every device.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        deviation: tuple[float, ...],
        device: str,
        dtype: Any,
        *,
        channels_last: bool = False,
    ) -> None:
        """channels_last: keep the channels of a pixel side by side, for a convolutional network that wants them so."""
        import torch

        self._format = torch.channels_last if channels_last else torch.contiguous_format

        # Tensors on the device: a division by a Python number becomes a multiplication on a GPU.
        self._range = torch.tensor(255.0, device=device)
        self._mean = torch.tensor(mean, device=device)
        self._deviation = torch.tensor(deviation, device=device)
        self._dtype = dtype

    def __call__(self, crops: Any) -> Any:
        numbers = (crops.float() / self._range - self._mean) / self._deviation
        return numbers.permute(0, 3, 1, 2).to(self._dtype).contiguous(memory_format=self._format)


class NormalisePatches(Normalise):
    """The same of patches: samples × patches × (side · side · 3), which stay in their order."""

    def __call__(self, patches: Any) -> Any:
        colours = patches.unflatten(2, (-1, 3))
        return ((colours.float() / self._range - self._mean) / self._deviation).flatten(2).to(self._dtype)


def _middle_of_a_strip(image: Image.Image, side: int, resample: int) -> Pixels:
    """The centre crop of a picture with an extreme shape, without the rest of the resized picture.

    Pillow weighs the same pixels as for the whole picture, with weights that differ by rounding: on noise one value in
    2,000 is another one, by one level or two.
    """
    width, height = image.size
    resized, first = _resized_side(image.size, side)
    scale = max(image.size) / resized
    reach = math.ceil(4 * max(scale, 1))  # pixels beyond the crop that the filter sees
    begin = max(0, int(first * scale) - reach)
    end = min(max(image.size), math.ceil((first + side) * scale) + reach)
    start, stop = first * scale - begin, (first + side) * scale - begin  # small numbers, because Pillow takes floats
    # Pillow rounds to bytes between the two directions, so that their order matters: rows first, but for a tall picture
    # that shrinks.
    if width >= height:
        few = image.crop((begin, 0, end, height)).resize((side, height), resample, box=(start, 0, stop, height))
    elif resized < height:
        few = image.crop((0, begin, width, end)).resize((width, side), resample, box=(0, start, width, stop))
    else:
        few = image.crop((0, begin, width, end)).resize((side, end - begin), resample)
        return np.asarray(few.resize((side, side), resample, box=(0, start, side, stop)))
    return np.asarray(few.resize((side, side), resample))


def _resized_side(size: tuple[int, int], side: int) -> tuple[int, int]:
    """What the long side becomes where the short one becomes ``side``, and where the centre crop begins on it."""
    short, long = sorted(size)
    resized = int(side * long / short)
    return resized, round((resized - side) / 2)
