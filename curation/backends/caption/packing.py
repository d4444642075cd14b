"""The tensors of a batch in one piece of memory, made while the device computes the batch before.

The device copies memory that the operating system cannot move (pinned) without the help of a processor.  torch keeps
such memory for the next batches, and gives out a piece again only when the copies from it have ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any


@dataclass(frozen=True, slots=True)
class Inputs:
    """One image as the model takes it: tensors on the host, which a batch joins along their first dimension.

    Attributes:
        packed: The batch in which the tensors lie already, and the place of the image in it.
    """

    tensors: dict[str, Any]
    shape: tuple[int, ...]
    packed: tuple[Packed, int] | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Packed:
    """The tensors of a batch, joined.

    Attributes:
        tensors: On the host; or on the device, on their way there.
        starts: For each tensor the first row of each image, and the end of the last.
        ready: A CUDA event after the copies, None where there are none.
    """

    tensors: Mapping[str, Any]
    starts: Mapping[str, Sequence[int]]
    ready: Any = None

    def take(self, places: Sequence[int]) -> dict[str, Any]:
        """The joined tensors of some of the images, in this order; the current stream waits for the copies."""
        import torch

        if self.ready is not None:
            stream = torch.cuda.current_stream(next(iter(self.tensors.values())).device)
            stream.wait_event(self.ready)
            for tensor in self.tensors.values():
                tensor.record_stream(stream)
        consecutive = list(places) == [*range(places[0], places[0] + len(places))]
        taken = {}
        for name, tensor in self.tensors.items():
            starts = self.starts[name]
            if consecutive:
                taken[name] = tensor[starts[places[0]] : starts[places[-1] + 1]]
            else:
                taken[name] = torch.cat([tensor[starts[place] : starts[place + 1]] for place in places])
        return taken


class Packer:
    """Packs batches for one device.  Any thread may call it."""

    def __init__(self, device: str) -> None:
        """device: ``cpu``, for which nothing is pinned or copied further, or ``cuda:<n>``."""
        import torch

        self._device = device
        self._copies = torch.cuda.Stream(device) if device.startswith("cuda") else None

    def pack(self, batch: Sequence[Inputs]) -> list[Inputs]:
        """The same images, with their tensors in one piece of memory, and on their way to the device if it has room.

        Args:
            batch: Images of one shape.
        """
        import torch

        host = {name: self._join([inputs.tensors[name] for inputs in batch]) for name in batch[0].tensors}
        starts = {name: [0, *accumulate(len(inputs.tensors[name]) for inputs in batch)] for name in host}
        packed = Packed(host, starts)
        if self._copies is not None:
            with contextlib.suppress(torch.OutOfMemoryError):  # copied later, when the batch before has left the device
                packed = self._copied(packed)
        return [Inputs(Packed(host, starts).take([n]), one.shape, (packed, n)) for n, one in enumerate(batch)]

    def _join(self, parts: Sequence[Any]) -> Any:
        """numpy copies, because torch would start a team of threads for the thread that packs."""
        import torch

        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        joined = torch.empty(shape, dtype=parts[0].dtype, pin_memory=self._copies is not None)
        target, start = _bytes_of(joined), 0
        for part in parts:
            source = _bytes_of(part)
            target[start : start + len(source)] = source
            start += len(source)
        return joined

    def _copied(self, packed: Packed) -> Packed:
        import torch

        with torch.cuda.device(self._device), torch.cuda.stream(self._copies):
            there = {name: tensor.to(self._device, non_blocking=True) for name, tensor in packed.tensors.items()}
            ready = torch.cuda.Event()
            ready.record()
        return Packed(there, packed.starts, ready)


def together(rows: Sequence[Inputs]) -> dict[str, Any] | None:
    """The joined tensors of images that were packed together; None where they were not."""
    batches = [row.packed[0] for row in rows if row.packed is not None]
    if len(batches) < len(rows) or any(batch is not batches[0] for batch in batches):
        return None
    return batches[0].take([row.packed[1] for row in rows if row.packed is not None])


def _bytes_of(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
