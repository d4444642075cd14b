"""``hashes``: 64-bit perceptual hashes of a picture, pHash and dHash, as the package ImageHash computes them.

Copies of a picture differ in few bits.  pHash: the signs of the 8 × 8 lowest frequencies of a 32 × 32 picture against
their median (Zauner 2010); dHash: whether each of 8 × 8 places is brighter than the one to its left.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from curation.extract.api import Column, Directive, PreparedColumns
from curation.images import Pixels
from curation.libraries import Image, np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 8


_LARGE = 4 * SIDE


@dataclass(frozen=True, slots=True)
class Hashes:
    """A picture → its hashes as 16 hexadecimal digits each."""

    takes: ClassVar[Literal["image"]] = "image"

    def __call__(self, pixels: Pixels) -> dict[str, Any]:
        grey = Image.fromarray(pixels).convert("L")
        return {"phash": phash(grey), "dhash": dhash(grey)}


def phash(grey: Image.Image) -> str:
    """Of a picture in mode L."""
    cosines = _lowest_cosines()
    small = np.asarray(grey.resize((_LARGE, _LARGE), Image.Resampling.LANCZOS), np.float64)
    lowest = np.round(cosines @ small @ cosines.T, 6)  # what is zero but for the order of sums is zero
    return _hexadecimal(lowest > np.median(lowest))


def dhash(grey: Image.Image) -> str:
    """Of a picture in mode L."""
    small = np.asarray(grey.resize((SIDE + 1, SIDE), Image.Resampling.LANCZOS))
    return _hexadecimal(small[:, 1:] > small[:, :-1])


def _hexadecimal(bits: NDArray[np.bool_]) -> str:
    return np.packbits(bits).tobytes().hex()


@functools.cache
def _lowest_cosines() -> NDArray[np.float64]:
    """The first rows of the cosine transform (DCT-II) of 32 numbers."""
    place, frequency = np.arange(_LARGE), np.arange(SIDE)[:, None]
    return 2 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * _LARGE))


class Backend(PreparedColumns):
    """What the preparation found, as columns."""

    directives = (Directive("hashes", ("phash", "dhash")),)
    columns = (Column("phash", "hash"), Column("dhash", "hash"))
    preparation = Hashes()
