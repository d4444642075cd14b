"""The batch size that fits: found by running out of memory once, and recorded for the next process.

There is one file per kind of device, model and size of input, below the output folder, so that a run over many GPUs
runs out of memory once and not once per process.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import xxhash

from curation.errors import InfrastructureError
from curation.storage.files import write_whole

_ALLOCATION_FAILURES = (  # what libraries below torch say instead of raising torch.OutOfMemoryError
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # torch's CPU allocator
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a failed call would succeed with a smaller batch."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, UnboundLocalError):  # SanaSprintPipeline swallows the error of its VAE and then misses `image`
        return "image" in str(error)
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILURES)


def use_device(device: str) -> str:
    """Make ``cpu`` or ``cuda:<n>`` this thread's device.

    Returns:
        The kind of device, on which memory and rounding depend: its name and its memory, or ``cpu``.

    Raises:
        InfrastructureError: torch cannot use the device.
    """
    if not device.startswith("cuda"):
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise InfrastructureError(
            f"{device} was given but this torch cannot use it: install a CUDA build of torch, "
            "or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    try:
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError) as error:
        raise InfrastructureError(f"{device} cannot be used: {str(error).splitlines()[0]}") from error
    return f"{properties.name} {properties.total_memory >> 30} GiB"


class FittingBatchSize:
    """The largest batch that fits, for each size of input; ``planned`` until memory ran out once.

    A size is ``width, height``, or any other row of numbers that says how large one sample is on the device.

    Args:
        planned: The batch size to begin with.
        what: Everything else that the limit depends on (kind of device, its memory, model, dtype).
        folder: Where it is recorded for other processes; None for this process only.
    """

    def __init__(self, planned: int, what: str, folder: Path | None = None) -> None:
        self.planned = planned
        self._what = what
        self._folder = folder
        self._limits: dict[tuple[int, ...], int] = {}

    def limit(self, *size: int) -> int:
        """How many samples of this size to compute at once."""
        if size not in self._limits:
            self._limits[size] = self._read(size) or self.planned
        return min(self.planned, self._limits[size])

    def shrink(self, *size: int, tried: int) -> int:
        """Record that ``tried`` samples were too many, and return half of it.  At 1 the caller decides what to do."""
        limit = max(1, tried // 2)
        self._limits[size] = limit
        self._write(size, limit)
        return limit

    def _path(self, size: tuple[int, ...]) -> Path | None:
        if self._folder is None:
            return None
        mark = f"{self._what}\0{'x'.join(map(str, size))}"
        return self._folder / f"{xxhash.xxh3_64_hexdigest(mark.encode())}.json"

    def _read(self, size: tuple[int, ...]) -> int | None:
        path = self._path(size)
        if path is None:
            return None
        try:
            found = json.loads(path.read_bytes())["batch_size"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if isinstance(found, int) and found > 0 else None

    def _write(self, size: tuple[int, ...], limit: int) -> None:
        """Record a limit.  That it cannot be written is not an error: another process then finds it out again."""
        path = self._path(size)
        if path is None:
            return
        record = {"batch_size": limit, "what": self._what, "size": list(size)}
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, f"{json.dumps(record, indent=2)}\n".encode())
