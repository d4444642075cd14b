"""Classes of transformers that need torchvision, on machines without it.

Some image processors and processors of transformers exist for torchvision alone.  All that they want of it are
resizing, padding and normalising of tensors, which torchvision leaves to torch.  ``find_class`` imports such a class
with these few operations in torchvision's place; where torchvision is installed, it is used.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

_MODULES = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


class InterpolationMode(enum.Enum):
    """torchvision's names of the ways to resize, with the names that torch gives those that it has."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


_SMOOTH = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
_BY_PILLOW = {  # Pillow's numbers of the same
    0: InterpolationMode.NEAREST_EXACT,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
    4: InterpolationMode.BOX,
    5: InterpolationMode.HAMMING,
}


def resize(
    image: Any,
    size: Sequence[int],
    interpolation: InterpolationMode | int = InterpolationMode.BILINEAR,
    antialias: bool | None = True,
    **_: Any,
) -> Any:
    """Resize … × height × width to ``size`` (height, width), as torchvision's function of this name does.

    Raises:
        ValueError: torch cannot resize in this way.
    """
    import torch

    if not isinstance(interpolation, InterpolationMode):
        interpolation = _BY_PILLOW[int(interpolation)]
    if interpolation not in (InterpolationMode.NEAREST, InterpolationMode.NEAREST_EXACT, *_SMOOTH):
        raise ValueError(f"its images are resized by {interpolation.value}, which needs torchvision")
    smooth = interpolation in _SMOOTH
    given = image.reshape(-1, *image.shape[-3:])
    whole = image.dtype == torch.uint8
    resized = torch.nn.functional.interpolate(
        given.float() if whole else given,
        size=[int(side) for side in size],
        mode=interpolation.value,
        align_corners=False if smooth else None,
        antialias=bool(antialias) and smooth,
    )
    if whole:
        resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    return resized.reshape(*image.shape[:-2], *resized.shape[-2:])


def pad(image: Any, padding: Sequence[int], fill: Any = 0, padding_mode: str = "constant") -> Any:
    """Add ``padding`` (left, top, right, bottom) to … × channels × height × width.

    fill: one value, or one for each channel.
    """
    import torch

    left, top, right, bottom = padding
    values = fill if isinstance(fill, Sequence) else [fill or 0]
    if padding_mode != "constant" or len(set(values)) == 1:
        more = {"value": values[0]} if padding_mode == "constant" else {}
        return torch.nn.functional.pad(image, (left, right, top, bottom), mode=padding_mode, **more)
    channels = image.unbind(-3)
    padded = [
        torch.nn.functional.pad(channel, (left, right, top, bottom), value=value)
        for channel, value in zip(channels, values, strict=True)
    ]
    return torch.stack(padded, -3)


def normalize(image: Any, mean: Any, std: Any, inplace: bool = False) -> Any:
    """(image - mean) / std for each channel of … × channels × height × width."""
    import torch

    middle, spread = (torch.as_tensor(v, dtype=image.dtype, device=image.device).view(-1, 1, 1) for v in (mean, std))
    return image.sub_(middle).div_(spread) if inplace else image.sub(middle).div_(spread)


def crop(image: Any, top: int, left: int, height: int, width: int) -> Any:
    """A rectangle of an image."""
    return image[..., top : top + height, left : left + width]


def pil_to_tensor(image: Any) -> Any:
    """A Pillow image as channels × height × width, uint8."""
    import numpy as np
    import torch

    pixels = np.array(image, copy=True)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def grayscale_to_rgb(image: Any) -> Any:
    """Three equal channels in the place of one; any other image as it is."""
    return image.expand(*image.shape[:-3], 3, *image.shape[-2:]) if image.shape[-3] == 1 else image


def find_class(name: str) -> Any:
    """A class of transformers by its name, whether or not torchvision is installed.

    Raises:
        ImportError: There is no such class, or it needs another package that is missing.
    """
    import transformers

    place = transformers._class_to_module.get(name)
    if place is None:
        raise ImportError(f"transformers has no class {name}; a newer version may have it")
    if not has_torchvision():
        with _in_its_place():
            module = importlib.import_module(f"transformers.{place}")
    else:
        module = importlib.import_module(f"transformers.{place}")
    return getattr(module, name)


def has_torchvision() -> bool:
    from transformers.utils.import_utils import is_torchvision_available

    return bool(is_torchvision_available())


@contextlib.contextmanager
def _in_its_place() -> Iterator[None]:
    """Let modules of transformers import the functions above as torchvision's during the block."""
    from transformers import image_processing_backends as base
    from transformers.image_utils import PILImageResampling

    made = [ModuleType(name) for name in _MODULES]
    for upper, lower in itertools.pairwise(made):
        setattr(upper, lower.__name__.rpartition(".")[2], lower)
    for part in (InterpolationMode, resize, pad, normalize, crop, pil_to_tensor, grayscale_to_rgb):
        setattr(made[-1], part.__name__, part)
    # The class that all these image processors derive from was imported without torchvision.
    base.tvF = made[-1]
    base.pil_torch_interpolation_mapping = {PILImageResampling(number): mode for number, mode in _BY_PILLOW.items()}
    sys.modules.update({module.__name__: module for module in made})
    try:
        yield
    finally:
        for module in made:
            sys.modules.pop(module.__name__, None)
