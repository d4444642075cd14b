"""Pillow's resizing on a device: pictures of different sizes in one go, with the same numbers as on the CPU.

Pillow resizes bytes in two passes, over the columns of each row and then over the rows, with weights that it rounds to
whole numbers of 2⁻²², and rounds to bytes after each pass (Pillow's ``Resample.c``).  Here the same whole numbers are
summed, so that a result differs only where the weights, which are computed in float64, are rounded otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from curation.libraries import Image, np

BILINEAR, BICUBIC = 2, 3  # Pillow's numbers

_SUPPORT = {BILINEAR: 1.0, BICUBIC: 2.0}
_BITS = 22  # behind the point, of a weight
_MOST_SUMS = 1 << 26  # numbers that are summed at once: some 1.5 GB on the device


@dataclass(frozen=True, slots=True)
class Window:
    """What becomes of a picture: it is resized to ``width`` × ``height``, and ``side`` × ``side`` of it are kept, from
    ``left`` and ``top`` on."""

    width: int
    height: int
    left: int = 0
    top: int = 0

    @property
    def turned(self) -> Window:
        """Of the picture with rows and columns exchanged."""
        return Window(self.height, self.width, self.top, self.left)


def resized(pictures: Sequence[Any], windows: Sequence[Window], side: int, resample: int) -> Any:
    """Resize pictures and cut a square out of each.

    Args:
        pictures: Tensors of height × width × 3, uint8, on one device; sizes may differ.
        windows: One for each picture.
        side: Pixels of the square's sides.
        resample: BILINEAR or BICUBIC.

    Returns:
        pictures × side × side × 3, uint8, on the same device.
    """
    import torch

    found = torch.empty((len(pictures), side, side, 3), dtype=torch.uint8, device=pictures[0].device)
    for is_turned in (False, True):
        # Pictures that need about as many weights a pixel go together: a group is computed with those of its largest.
        chosen = [i for i in range(len(pictures)) if _rows_first(pictures[i], windows[i]) == is_turned]
        chosen.sort(key=lambda i: pictures[i].shape[0] * pictures[i].shape[1])
        for group in _groups(chosen, [picture.shape[int(is_turned)] * side * 3 for picture in pictures]):
            own, shown = [pictures[i] for i in group], [windows[i] for i in group]
            if is_turned:
                own, shown = [picture.transpose(0, 1) for picture in own], [w.turned for w in shown]
            squares = _group(own, shown, side, resample)
            found[torch.tensor(group, device=found.device)] = squares.transpose(1, 2) if is_turned else squares
    return found


def _groups(chosen: Sequence[int], sums: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive ones that are small enough together; a larger one goes alone."""
    group: list[int] = []
    total = 0
    for number in chosen:
        if group and total + sums[number] > _MOST_SUMS:
            yield group
            group, total = [], 0
        group.append(number)
        total += sums[number]
    if group:
        yield group


def _rows_first(picture: Any, window: Window) -> bool:
    """Whether the first pass shrinks the columns' length, so that there are fewer rows, as newer Pillows do where the
    height loses more than twice the pixels that the width loses.  The order matters, for there are bytes in between."""
    height, width = picture.shape[:2]
    if window.width == width:
        return False
    return _knows_tall() and height - window.height > 2 * max(0, width - window.width)


@functools.cache
def _knows_tall() -> bool:
    """Whether this Pillow resizes tall pictures in the other order; it is tried on one."""
    pixels = (np.arange(40 * 4 * 3).reshape(40, 4, 3) * 89 % 256).astype(np.uint8)
    image = Image.fromarray(pixels)
    at_once, in_steps = image.resize((3, 9), BICUBIC), image.resize((4, 9), BICUBIC).resize((3, 9), BICUBIC)
    return at_once.tobytes() == in_steps.tobytes()


def _group(pictures: Sequence[Any], windows: Sequence[Window], side: int, resample: int) -> Any:
    """As ``resized``, in one go: the columns first."""
    import torch

    device = pictures[0].device

    def numbers(values: Sequence[int]) -> Any:
        return torch.tensor(values, dtype=torch.int64, device=device)

    heights, widths = (numbers([picture.shape[axis] for picture in pictures]) for axis in (0, 1))
    pixels = torch.cat([picture.reshape(-1, 3) for picture in pictures])
    every = torch.arange(len(pictures), device=device)
    above = heights.cumsum(0) - heights  # rows of the pictures before, which lie one below the other in ``narrow``
    of_row = torch.repeat_interleave(every, heights)
    # Columns: each row of each picture becomes a row of ``side`` pixels.
    becomes, left = numbers([w.width for w in windows]), numbers([w.left for w in windows])
    first, weights = _weights(widths, becomes, left, side, resample)
    begin = (heights * widths).cumsum(0) - heights * widths  # of the picture in ``pixels``
    row = begin[of_row] + (torch.arange(len(of_row), device=device) - above[of_row]) * widths[of_row]
    narrow = _summed(pixels, row[:, None] + first[of_row], weights, of_row)
    # Rows: each picture becomes ``side`` rows.
    becomes, top = numbers([w.height for w in windows]), numbers([w.top for w in windows])
    first, weights = _weights(heights, becomes, top, side, resample)
    return _summed(narrow, above[:, None] + first, weights, every)


def _summed(source: Any, places: Any, weights: Any, of_row: Any) -> Any:
    """The weighted sums of neighbours of ``source``, as bytes.

    source: numbers × (…) × 3.  places: rows × side, the first neighbour of each.  weights: pictures × side × taps.
    of_row: the picture of each row.
    """
    import torch

    last = len(source) - 1
    total: Any = None
    for tap in range(weights.shape[2]):
        weight = weights[of_row, :, tap]
        seen = source[(places + tap).clamp_(max=last)].to(torch.int32)
        seen *= weight.reshape(*weight.shape, *([1] * (seen.ndim - 2)))
        total = seen.add_(1 << (_BITS - 1)) if total is None else total.add_(seen)
    return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


def _weights(sizes: Any, becomes: Any, first: Any, side: int, resample: int) -> tuple[Any, Any]:
    """(pictures × side: the first pixel that an output sees, pictures × side × taps: how much of each, in 2⁻²²)."""
    import torch

    scale = (sizes.double() / becomes.double())[:, None]
    wider = scale.clamp(min=1.0)
    support = _SUPPORT[resample] * wider
    centre = (first[:, None] + torch.arange(side, device=sizes.device) + 0.5) * scale
    begin = (centre - support + 0.5).long().clamp_(min=0)
    end = torch.minimum((centre + support + 0.5).long(), sizes[:, None])
    taps = torch.arange(int((end - begin).max()), device=sizes.device)
    at = (taps + begin[:, :, None] - centre[:, :, None] + 0.5) * (1.0 / wider)[:, :, None]
    weight = _kernel(at.abs(), resample) * (taps < (end - begin)[:, :, None])
    weight = weight / weight.sum(2, keepdim=True)
    return begin, (weight * (1 << _BITS) + torch.copysign(torch.full_like(weight, 0.5), weight)).to(torch.int32)


def _kernel(x: Any, resample: int) -> Any:
    """Of a distance of at least 0: a triangle, or Keys' cubic with a = −1/2."""
    import torch

    if resample == BILINEAR:
        return (1 - x).clamp(min=0)
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
