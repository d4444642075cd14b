"""Images that a model wants squeezed into one rectangle: resized on the host, made numbers on the device.

A processor of transformers does all of it on the host: three times the time, and four times the bytes to move.  The
numbers are the same to the last bit in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class SquareImages:
    """The part of an image processor that is left on the host, and the part that is not."""

    def __init__(self, processor: Any) -> None:
        import torch

        size = processor.size
        self._size = (int(size["width"]), int(size["height"]))
        self._resample = int(processor.resample)
        values = np.arange(256, dtype=np.float64)
        if processor.do_rescale:
            values = values * processor.rescale_factor
        table = np.repeat(values.astype(np.float32)[None], 3, 0)  # what each byte becomes, by channel
        if processor.do_normalize:
            mean, deviation = (np.array(v, np.float32)[:, None] for v in (processor.image_mean, processor.image_std))
            table = (table - mean) / deviation
        self._table = torch.from_numpy(table)

    @classmethod
    def of(cls, processor: Any) -> SquareImages | None:
        """None where the processor does more than resize to one size, rescale and normalise."""
        size = getattr(processor, "size", None) or {}
        has_size = all(name in size and size[name] for name in ("height", "width"))
        more = ("do_center_crop", "do_pad", "do_pan_and_scan")
        if not (has_size and processor.do_resize) or any(getattr(processor, name, False) for name in more):
            return None
        return cls(processor)

    def bytes_of(self, image: Any) -> Any:
        """1 × 3 × height × width, uint8.  By numpy: torch would begin a team of threads for each that prepares."""
        import torch

        pixels = np.asarray(image.resize(self._size, self._resample))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None])

    def numbers_of(self, pixels: Any, dtype: Any) -> Any:
        """Those bytes as the model takes them, on whatever device they are."""
        import torch

        table = self._table.to(pixels.device, dtype)
        numbers = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
        for channel in range(3):
            found = table[channel].index_select(0, pixels[:, channel].reshape(-1).int())
            numbers[:, channel] = found.view(numbers[:, channel].shape)
        return numbers
