"""A batch made ready on the device while the one before is computed: its arrays are copied there on a stream of their
own, and with ``--decode gpu`` its JPEGs are decoded and resized there.

On the CPU nothing is copied and there is one stream, and the rest is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from curation.extract.api import DevicePreparation, Preparation
from curation.extract.device_jpeg import DeviceDecoder
from curation.extract.feed import ExtractBatch, ExtractLoader
from curation.image_files import bare_jpeg
from curation.models.batch_size import free_memory, is_out_of_memory

MOST_DECODED_PIXELS = 1 << 27  # that lie on the device at a time: 400 MB


@dataclass(slots=True)
class Staged:
    """What lies on the device of a batch.

    tensors: by the number of the preparation.  decoded: the rows whose pictures were decoded there, which the arrays in
    memory lack.  brought_back: preparations whose rows were copied into memory after all.  done: recorded on the
    staging stream behind everything; None on the CPU.
    """

    tensors: dict[int, Any] = field(default_factory=dict)
    decoded: list[int] = field(default_factory=list)
    brought_back: set[int] = field(default_factory=set)
    done: Any = None


class Stager:
    """Stages the batches of one loader, in the loader's staging thread; the computing thread takes them."""

    def __init__(self, loader: ExtractLoader, device: str, decoder: DeviceDecoder | None) -> None:
        """
        Args:
            loader: Prepares the batches.
            device: torch's name of it.
            decoder: Of the JPEGs that the loader leaves to the device, if it leaves any.
        """
        import torch

        self._torch = torch
        self._loader = loader
        self._device = device
        self._decoder = decoder
        self._module: Any = None if device == "cpu" else torch.get_device_module(torch.device(device))
        self._stream: Any = None if self._module is None else self._module.Stream(device=device)
        self._wanted: set[int] = set()  # preparations that an extractor has asked for on the device
        pictures = enumerate(loader.preparations)
        self._pictures = [(n, p) for n, p in pictures if decoder is not None and isinstance(p, DevicePreparation)]

    def stage(self, batch: ExtractBatch) -> None:
        """Copy and decode the batch; where memory does not suffice, only what is needed on the CPU is done."""
        staged = self._staged(batch)
        if staged is None:
            free_memory(self._device)
            rows = [row for row, sample in enumerate(batch.samples) if sample.outcome.on_device]
            self._to_processes(batch, rows, "out_of_memory")
        batch.staged = staged or Staged()

    def _staged(self, batch: ExtractBatch) -> Staged | None:
        """None where memory did not suffice."""
        staged = Staged()
        try:
            with self._on_stream():
                for number in self._wanted | {number for number, _ in self._pictures}:
                    array = self._loader.array(batch, number)
                    if array is not None:
                        staged.tensors[number] = self._copied(array)
                self._decode(batch, staged)
                if self._stream is not None:
                    staged.done = self._stream.record_event()
                    staged.done.synchronize()  # of this thread: what it decoded from may go
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return staged

    def tensor(self, batch: ExtractBatch, number: int) -> Any:
        """The array of a preparation on the device; None where it was not staged."""
        self._wanted.add(number)
        if batch.staged is None or number not in batch.staged.tensors:
            return None
        tensor = batch.staged.tensors[number]
        if batch.staged.done is not None:
            current = self._module.current_stream(self._device)
            current.wait_event(batch.staged.done)
            tensor.record_stream(current)
        return tensor

    def bring_back(self, batch: ExtractBatch, number: int) -> None:
        """Fill the rows of the array in memory that were computed on the device, for an extractor that reads there."""
        staged: Staged | None = batch.staged
        if staged is None or number in staged.brought_back or number not in dict(self._pictures):
            return
        array = self._loader.array(batch, number)
        if array is not None and staged.decoded:
            array[staged.decoded] = staged.tensors[number][staged.decoded].cpu().numpy()
        staged.brought_back.add(number)

    # ---- in the staging thread

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._module.set_device(self._device)
        with self._module.stream(self._stream), self._torch.inference_mode():
            yield

    def _copied(self, array: Any) -> Any:
        return self._torch.from_numpy(array).to(self._device, non_blocking=True)

    def _decode(self, batch: ExtractBatch, staged: Staged) -> None:
        rows = [row for row, sample in enumerate(batch.samples) if sample.outcome.on_device]
        refused: list[int] = []
        for some in _within_pixels(batch, rows):
            refused += self._decode_some(batch, some, staged)
        if refused:
            self._to_processes(batch, refused, "decoder")
            where = self._torch.tensor(refused, device=self._device)
            for number, _ in self._pictures:
                array = self._loader.array(batch, number)
                if array is not None:
                    staged.tensors[number][where] = self._copied(array[refused])

    def _decode_some(self, batch: ExtractBatch, rows: Sequence[int], staged: Staged) -> list[int]:
        """Which of the rows the decoder refuses."""
        assert self._decoder is not None
        found = self._decoder([bare_jpeg(batch.samples[row].image or b"") for row in rows])
        pictures, decoded, refused = [], [], []
        for row, picture in zip(rows, found, strict=True):
            width, height = batch.samples[row].outcome.size or (0, 0)
            if picture is None or tuple(picture.shape) != (height, width, 3):
                refused.append(row)
            else:
                pictures.append(picture)
                decoded.append(row)
        if decoded:
            where = self._torch.tensor(decoded, device=self._device)
            for number, preparation in self._pictures:
                staged.tensors[number][where] = preparation.on_device(pictures)
            if self._stream is not None:
                self._stream.synchronize()  # before the pictures go, whoever owns their memory
        staged.decoded += decoded
        return refused

    def _to_processes(self, batch: ExtractBatch, rows: Sequence[int], why: str) -> None:
        for row in rows:
            batch.samples[row].outcome.off_device = why
        if rows:
            self._loader.prepare_here(batch, rows)


def without_device(preparations: Sequence[Preparation]) -> list[Preparation]:
    """The preparations of pictures that only the CPU computes."""
    return [p for p in preparations if p.takes == "image" and not isinstance(p, DevicePreparation)]


def _within_pixels(batch: ExtractBatch, rows: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive rows whose pictures have together not more than ``MOST_DECODED_PIXELS``."""
    some: list[int] = []
    total = 0
    for row in rows:
        width, height = batch.samples[row].outcome.size or (0, 0)
        if some and total + width * height > MOST_DECODED_PIXELS:
            yield some
            some, total = [], 0
        some.append(row)
        total += width * height
    if some:
        yield some
