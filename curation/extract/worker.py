"""A process that decodes images and runs preparations, and the memory that it shares with the process that started it.

It holds no model, sees no GPU and is expendable: whatever a hostile image does to a decoder happens here.  It is
started as ``python -c``, so that it imports neither the stage's script nor torch, and ends when its parent does.

One worker process of stage 06 as its parent sees it: started, asked, found dead or hung, replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from curation.errors import InfrastructureError, SampleError, lack_of
from curation.extract.api import Preparation, SampleFacts
from curation.extract.plugins import Plugin
from curation.images import Pixels, decode_rgb, image_size, refused_by_devices
from curation.libraries import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGE_PIXELS = 16_000_000  # such images are decoded by one process at a time: up to 700 MB each


_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class PreparationJob:
    """One sample to prepare, and the row of the slot that it goes to.  image: None where it has none.  for_device:
    whether its pixels may be left to the device."""

    slot: int
    row: int
    key: str
    image: bytes | None
    caption: str | None
    metadata: Mapping[str, Any]
    clean_caption: str | None = None
    for_device: bool = False


@dataclass(slots=True)
class PreparationOutcome:
    """What happened to one sample.  unreadable: why its image has no pixels.  broken: why it has nothing at all.

    values: the dicts, by the number of their preparation.  on_device: whether its pixels are left to the device;
    off_device: why not, where the job asked for it.
    """

    size: tuple[int, int] | None = None
    unreadable: tuple[str, str] | None = None
    broken: tuple[str, str] | None = None
    values: dict[int, dict[str, Any]] = field(default_factory=dict)
    on_device: bool = False
    off_device: str | None = None


@dataclass(frozen=True, slots=True)
class Errand:
    """A call that a worker process does beside the preparing."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Where the arrays of a batch lie in a slot: (offset, shape of a row, dtype) for each preparation, None for one
    that gives a dict."""

    rows: int
    slots: int
    slot_bytes: int
    places: tuple[tuple[int, tuple[int, ...], str] | None, ...]

    @staticmethod
    def of(preparations: Sequence[Preparation], rows: int) -> SlotLayout:
        """As a trial of each preparation shows; ``slots`` is 1."""
        offset = 0
        places: list[tuple[int, tuple[int, ...], str] | None] = []
        for preparation in preparations:
            try:
                given = preparation(trial_of(preparation))
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise InfrastructureError(f"the preparation {preparation!r} fails on a trial: {what}") from error
            if isinstance(given, dict):
                places.append(None)
                continue
            places.append((offset, given.shape, given.dtype.str))
            offset += -(-rows * given.nbytes // _ALIGNMENT) * _ALIGNMENT
        return SlotLayout(rows, 1, offset, tuple(places))


def trial_of(preparation: Preparation) -> Any:
    """Something for a preparation to show the shape of its results with."""
    if preparation.takes == "image":
        return np.full((64, 64, 3), 128, np.uint8)
    return "" if preparation.takes == "text" else SampleFacts("", {}, None, b"", None)


class Slots:
    """The arrays of several batches in memory that processes share; anonymous, so that nothing stays of it."""

    def __init__(self, layout: SlotLayout, descriptor: int | None = None) -> None:
        self.layout = layout
        size = max(_ALIGNMENT, layout.slots * layout.slot_bytes)
        if descriptor is None:
            descriptor = _anonymous_file()
            os.ftruncate(descriptor, size)
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, size)
        self._arrays = [
            [place and self._array(slot * layout.slot_bytes, place) for place in layout.places]
            for slot in range(layout.slots)
        ]

    def _array(self, start: int, place: tuple[int, tuple[int, ...], str]) -> NDArray[Any]:
        offset, shape, dtype = place
        count = self.layout.rows * int(np.prod(shape, dtype=np.int64))
        flat = np.frombuffer(self._map, np.dtype(dtype), count, start + offset)
        return flat.reshape(self.layout.rows, *shape)

    def array(self, slot: int, number: int) -> NDArray[Any] | None:
        """rows × shape of the preparation of that number; None for one that gives dicts."""
        return self._arrays[slot][number]

    @property
    def memory(self) -> NDArray[np.uint8]:
        """All of it, in one piece."""
        return np.frombuffer(self._map, np.uint8)

    def clear(self, slot: int, row: int) -> None:
        """Zeros: nothing of an earlier batch is seen."""
        for array in self._arrays[slot]:
            if array is not None:
                array[row] = 0

    def close(self) -> None:
        """The descriptor; the memory goes with the last array that somebody holds."""
        self._arrays = []
        os.close(self.descriptor)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("curation-batches")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# ---- in the process


def main(connection_descriptor: int, memory_descriptor: int) -> None:
    """Answer lists of jobs with lists of outcomes, and errands with their results, and the seconds that they took,
    until the other side is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the parent, which finishes its batch first
    connection = Connection(connection_descriptor)
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            plugin = connection.recv()
            if plugin is not None:
                plugin.load()  # its classes are among the preparations
            preparations, layout = connection.recv()
        except (ImportError, AttributeError, InfrastructureError) as error:
            connection.send(str(lack_of(error) or f"{type(error).__name__}: {error}"))
            return
        connection.send(None)
        preparer = _Preparer(preparations, Slots(layout, memory_descriptor))
        while True:
            asked = connection.recv()
            began = time.perf_counter()
            if isinstance(asked, Errand):
                found = asked.function(*asked.arguments)
            else:
                found = [preparer.prepare(job) for job in asked]
            connection.send((found, time.perf_counter() - began))


class _Preparer:
    def __init__(self, preparations: Sequence[Preparation], slots: Slots) -> None:
        self._preparations = preparations
        self._slots = slots
        self._pictures: list[Any] = [preparation for preparation in preparations if preparation.takes == "image"]
        self._wants_pixels = bool(self._pictures)
        # Where none of them minds a picture that is decoded at a reduced scale.
        sides = [int(getattr(preparation, "min_short_side", 0)) for preparation in self._pictures]
        self._min_short_side = max(sides, default=0) if all(sides) else 0

    def prepare(self, job: PreparationJob) -> PreparationOutcome:
        outcome = PreparationOutcome()
        self._slots.clear(job.slot, job.row)
        pixels = None if self._left_to_device(job, outcome) else self._decode(job, outcome)
        facts = SampleFacts(job.key, job.metadata, job.clean_caption, job.image or b"", outcome.size)
        for number, preparation in enumerate(self._preparations):
            given: Any = {"image": pixels, "text": job.caption or "", "sample": facts}[preparation.takes]
            if given is None:
                continue
            try:
                self._place(job, number, preparation(given), outcome)
            except SampleError as error:
                problem = error.reason, error.detail
            except MemoryError:
                problem = "out_of_memory", "preparing it, on the host"
            except Exception as error:  # noqa: BLE001 - a preparation meets whatever the web has
                problem = "preparation_failed", f"{type(preparation).__name__}: {type(error).__name__}: {error}"[:300]
            else:
                continue
            if preparation.takes == "image":
                outcome.unreadable = outcome.unreadable or problem
            else:
                outcome.broken = outcome.broken or problem
        return outcome

    def _left_to_device(self, job: PreparationJob, outcome: PreparationOutcome) -> bool:
        if not job.for_device or job.image is None or not self._wants_pixels:
            return False
        try:
            size, outcome.off_device = refused_by_devices(job.image, LARGE_PIXELS)
        except (SampleError, MemoryError):
            outcome.off_device = "unreadable"  # the CPU says why, and looks closer
            return False
        if outcome.off_device is None and not all(p.fits_device(*size) for p in self._pictures):
            outcome.off_device = "large"
        outcome.on_device = outcome.off_device is None
        outcome.size = size if outcome.on_device else None
        return outcome.on_device

    def _decode(self, job: PreparationJob, outcome: PreparationOutcome) -> Pixels | None:
        if job.image is None:
            return None
        try:
            size = image_size(job.image)
            pixels = None
            if self._wants_pixels:
                with self._alone() if size[0] * size[1] > LARGE_PIXELS else contextlib.nullcontext():
                    pixels = decode_rgb(job.image, at_least=self._at_least(*size), on_white=False)
            outcome.size = size
            return pixels
        except SampleError as error:
            outcome.unreadable = error.reason, error.detail
        except MemoryError:
            outcome.unreadable = "out_of_memory", "decoding it, on the host"
        return None

    def _at_least(self, width: int, height: int) -> int | None:
        """Pixels of the long side that are needed."""
        if not self._min_short_side:
            return None
        return -(-self._min_short_side * max(width, height) // min(width, height))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of all processes that share the memory; a lock that ends with its process."""
        fcntl.lockf(self._slots.descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._slots.descriptor, fcntl.LOCK_UN)

    def _place(self, job: PreparationJob, number: int, made: Any, outcome: PreparationOutcome) -> None:
        array = self._slots.array(job.slot, number)
        if array is None:
            outcome.values[number] = dict(made)
        elif made.shape != array.shape[1:] or made.dtype != array.dtype:
            raise ValueError(f"{made.dtype} {made.shape} where {array.dtype} {array.shape[1:]} is due")
        else:
            array[job.row] = made


REPLY_S = 120.0  # for what it is given at once: then it has hung


_CHILD = "from curation.extract.worker import main; main({}, {})"


class Lost(Exception):
    """The process died or hung over what it was given.  problem: how, as a reason and a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.problem = reason, detail


class WorkerProcess:
    """One worker process, started when it is first needed and again after a death."""

    def __init__(self, preparations: tuple[Preparation, ...], slots: Slots, plugin: Plugin | None) -> None:
        self._preparations = preparations
        self._slots = slots
        self._plugin = plugin
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def ask(self, jobs: tuple[PreparationJob, ...]) -> tuple[list[PreparationOutcome], float]:
        """The outcomes of the jobs, and the seconds that they took.  Raises Lost, after which it may be asked again."""
        found: tuple[list[PreparationOutcome], float] = self._answer(jobs)
        return found

    def run(self, errand: Errand) -> Any:
        """What the errand's function returns.  Raises Lost."""
        return self._answer(errand)[0]

    def _answer(self, asked: tuple[PreparationJob, ...] | Errand) -> Any:
        connection = self._connection or self._start()
        try:
            connection.send(asked)
            if connection.poll(REPLY_S):
                return connection.recv()
            self._kill()
            raise Lost("decode_timeout", f"the process that prepared it did not end within {REPLY_S:g} s")
        except (EOFError, OSError):
            code = self._kill()
            raise Lost("worker_died", f"the process that prepared it died ({_cause(code)})") from None

    def end(self) -> None:
        """Have it end, which it does when nobody is at the other side."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                self._kill()

    def _kill(self) -> int:
        assert self._process is not None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that died of itself tells why
            return self._process.wait(0.5)
        self._process.kill()
        return self._process.wait()

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        descriptors = theirs.fileno(), self._slots.descriptor
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with ours, theirs:
            command = [sys.executable, "-P", "-c", _CHILD.format(*descriptors)]
            self._process = subprocess.Popen(command, pass_fds=descriptors, env=environment, stdin=subprocess.DEVNULL)
            self._connection = connection = Connection(ours.detach())
        try:
            connection.send(self._plugin)
            connection.send((self._preparations, self._slots.layout))
            problem = connection.recv()
        except (EOFError, OSError):
            cause = _cause(self._kill())
            raise InfrastructureError(f"a process that decodes images ended at its start ({cause})") from None
        if problem is not None:
            raise InfrastructureError(f"a process that decodes images cannot start: {problem}")
        return connection


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
