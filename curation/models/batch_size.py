"""The batch size that fits a device: found by doubling, halved where memory runs out, and kept for other processes.

Both results are files below the output folder, so that a run over many GPUs finds out once and not once a process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

from curation.cluster import CPU_ON_PURPOSE, let_segments_grow
from curation.errors import DeviceError, InfrastructureError, memory_shortage
from curation.models.builds import why_torch_sees_no_gpu
from curation.options import logger
from curation.storage.files import link_exclusively, write_whole

LARGEST_BATCH = 1024
WORTH_DOUBLING = 1.05  # samples a second, compared with the best smaller batch
CALLS = 3  # of each size, after one that is not measured
ENOUGH_S = 10.0  # after which the last of them is left out
GAINLESS_SIZES = 2  # so many in a row end the search
# A batch size that another kind of search found is not taken over: before 2, one slow first call decided for ever.
SEARCH = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shortage:
    """A call for which memory did not suffice, in place of its result.

    Attributes:
        text: What the library said, in one line.
        certain: It said that memory ran out.  Otherwise it said what is mostly said then, but by a broken device too.
    """

    text: str
    certain: bool = True


def shortage_of(error: BaseException) -> Shortage | None:
    """What a failed call says of memory; None if a smaller batch would fail in the same way."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, UnboundLocalError):  # SanaSprintPipeline swallows the error of its VAE and then misses `image`
        return Shortage(text) if "image" in text else None
    origin, kind = type(error).__module__.partition(".")[0], type(error).__name__
    if isinstance(error, MemoryError) or (origin == "torch" and kind == "OutOfMemoryError"):
        return Shortage(text)
    if isinstance(error, RuntimeError) or origin == "onnxruntime":
        found = memory_shortage(str(error))
        return Shortage(text, found == "certain") if found else None
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a failed call may succeed with a smaller batch."""
    return shortage_of(error) is not None


def free_memory(device: str) -> None:
    """Give back what a failed call has left on a device.  Call it outside the handler, whose traceback has tensors."""
    gc.collect()
    if device != "cpu" and "torch" in sys.modules:
        with contextlib.suppress(RuntimeError):  # where the device is broken, the next call says so
            sys.modules["torch"].get_device_module(device).empty_cache()


def use_device(device: str) -> str:
    """Make a device the one that this thread computes on.

    Args:
        device: ``cpu``, ``cuda:<n>`` (NVIDIA's, and AMD's with ROCm) or ``xpu:<n>`` (Intel's).

    Returns:
        The kind of the device, on which memory and rounding depend: ``cpu``, or the GPU's name and its memory in GiB.

    Raises:
        InfrastructureError: This torch is built for no such device.
        DeviceError: The device, or its driver on this node, does not work.
    """
    if device == "cpu":
        return "cpu"
    let_segments_grow()
    import torch

    module = torch.get_device_module(device)
    if not module.is_available():
        # A torch for the CPU can use a device on no node, any other torch perhaps on the next.
        versions = ("xpu",) if device.startswith("xpu") else ("cuda", "hip")
        built = any(getattr(torch.version, name, None) for name in versions)
        why = f"{device} was given but cannot be used: {why_torch_sees_no_gpu()}; {CPU_ON_PURPOSE}"
        raise DeviceError(why) if built else InfrastructureError(why)
    try:
        module.set_device(device)
        properties = module.get_device_properties(device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"{device} cannot be used: {str(error).splitlines()[0]}") from error
    return f"{properties.name} {properties.total_memory >> 30} GiB"


class FittingBatchSize:
    """The largest batch that is known to fit, for each size of input.  It is the planned one until memory runs out.

    A size of input is ``width, height``, or any other row of numbers that says how large one sample is on the device.
    """

    def __init__(self, planned: int, what: str, folder: Path | None = None) -> None:
        """
        Args:
            planned: The batch size to begin with; it is never exceeded.
            what: Everything else that the limit depends on: the kind of device, its memory, the model, the dtype.
            folder: Where other processes find what this one learns; None: nowhere.
        """
        self.planned = planned
        self._what = what
        self._folder = folder
        self._limits: dict[tuple[int, ...], int] = {}

    def limit(self, *size: int) -> int:
        """How many samples of this size to compute at once."""
        if size not in self._limits:
            path = self._path(size)
            self._limits[size] = (_recorded(path) if path is not None else None) or self.planned
        return min(self.planned, self._limits[size])

    def shrink(self, *size: int, tried: int) -> int:
        """Remember that ``tried`` samples were too many, and return half of it.

        A single sample that does not fit is for the caller to handle.
        """
        limit = max(1, tried // 2)
        self._limits[size] = limit
        path = self._path(size)
        if path is not None:
            record = {"batch_size": limit, "what": self._what, "size": list(size)}
            with contextlib.suppress(OSError):  # a record that is lost costs one more failure, nothing else
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, json.dumps(record, indent=2).encode() + b"\n")
        return limit

    def split(
        self, count: int, size: tuple[int, ...], call: Callable[[int, int], T | Shortage], *, padded: bool = False
    ) -> Iterator[tuple[int, int, T | Shortage]]:
        """Compute ``count`` samples of one size in parts that fit.

        A part that fails in a way that may mean too little memory is tried once more, with half as many samples.

        Args:
            count: Number of samples.
            size: Of each of them.
            call: Computes the samples from a start to an end; returns a Shortage where memory did not suffice.
            padded: ``call`` fills up each part to the limit.

        Yields:
            Start and end of each part, and what ``call`` returned: a Shortage for one sample that does not fit alone.

        Raises:
            DeviceError: A part failed twice in such a way.
        """
        start = doubted = 0
        while start < count:
            limit = self.limit(*size)
            end = min(start + limit, count)
            tried = limit if padded else end - start
            result = call(start, end)
            if isinstance(result, Shortage) and not result.certain:
                if doubted:
                    raise DeviceError(f"{result.text}; it was tried twice, the second time with {tried}")
                doubted = tried
                if tried > 1:  # not recorded for others before it is seen to help
                    self._limits[size] = tried // 2
                continue
            if isinstance(result, Shortage) and tried > 1:
                doubted = 0
                self.shrink(*size, tried=tried)
                continue
            if doubted > 1:
                self.shrink(*size, tried=doubted)
            doubted = 0
            yield start, end, result
            start = end

    def _path(self, size: tuple[int, ...]) -> Path | None:
        if self._folder is None:
            return None
        mark = f"{self._what}\0{'x'.join(map(str, size))}"
        return self._folder / f"{xxhash.xxh3_64_hexdigest(mark.encode())}.json"


def find_batch_size(fits: Callable[[int], bool], largest: int = LARGEST_BATCH, first: int = 1) -> int:
    """The batch size that is doubled as long as it fits and makes the work clearly faster.

    The first call of a size is not measured: it also pays for memory, for the choice of kernels and, with
    ``--compile``, for the compilation.  The fastest of the next calls counts.  A size that brings nothing is measured
    again, and the search ends at the second one in a row, so that no single slow call decides.  The log says what was
    found.

    Args:
        fits: Computes a batch of so many samples; whether it fits into memory.
        largest: Nothing larger is tried.
        first: Nothing smaller is tried, as long as this fits.
    """
    rates: dict[int, float] = {}
    size = max(1, min(first, largest))
    while size > 1 and not fits(size):
        size //= 2
    best, without_gain, fitted = size, 0, True
    while size <= largest and without_gain < GAINLESS_SIZES:
        fitted = fits(size)
        rate = _rate(fits, size) if fitted else 0.0
        wanted = rates.get(best, 0.0) * WORTH_DOUBLING
        if 0.0 < rate < wanted:
            rate = max(rate, _rate(fits, size))
        fitted = rate > 0.0
        if not fitted:
            break
        rates[size] = rate
        best, without_gain = (size, 0) if rate >= wanted else (best, without_gain + 1)
        size *= 2
    tried = ", ".join(f"{size}: {rate:.3g}" for size, rate in rates.items())
    more = "" if fitted else f"; {size} does not fit into memory"
    logger.info(f"--batch_size auto: {best}, of these sizes and their images a second: {tried or 'none'}{more}")
    return best


def _rate(fits: Callable[[int], bool], size: int) -> float:
    """Samples a second by the fastest of several calls; 0 where memory ran out after all."""
    fastest = spent = 0.0
    for call in range(CALLS):
        if call > 1 and spent > ENOUGH_S:
            break
        began = time.perf_counter()
        if not fits(size):
            return 0.0
        seconds = max(1e-9, time.perf_counter() - began)
        spent += seconds
        fastest = min(fastest or seconds, seconds)
    return size / fastest


def agreed_batch_size(folder: Path, what: str, find: Callable[[], int]) -> int:
    """The batch size that all workers use, now and in every run that continues the work.

    It decides which samples are computed together, and so the last bits of their results: the first worker that
    records one decides for all.

    Args:
        folder: Where it is recorded.
        what: What it depends on: the kind of device, the model, the dtype and so on.
        find: Called where nothing is recorded yet, or only what an earlier kind of search found.

    Raises:
        InfrastructureError: It cannot be recorded.
    """
    file = folder / f"auto-{SEARCH}-{xxhash.xxh3_64_hexdigest(what.encode())}.json"
    size = _recorded(file)
    if size is None:
        size = find()
        link_exclusively(file, json.dumps({"batch_size": size, "search": SEARCH}).encode() + b"\n")
        agreed = _recorded(file) or size
        if agreed != size:
            logger.info(f"--batch_size auto: {agreed} instead, which another worker found first")
        size = agreed
    return size


def _recorded(file: Path) -> int | None:
    try:
        size = json.loads(file.read_bytes())["batch_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size > 0 else None
