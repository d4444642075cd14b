"""Batches through the extractors: one transfer to the device for all of them, halved where memory runs out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.errors import ShardError
from curation.extract.api import Column, Extractor, Feature, Preparation, dependents
from curation.extract.feed import ExtractLoader, FeedBatch
from curation.models.batch_size import FittingBatchSize, is_out_of_memory


@dataclass(frozen=True, slots=True)
class Computed:
    """One value per sample of a batch for each column and feature that was asked for.

    statuses: ``ok``, or why a sample lacks values; failed: the same with a detail, where it counts as failed.
    """

    columns: Mapping[str, list[Any]]
    features: Mapping[str, NDArray[Any]]
    statuses: Sequence[str]
    failed: Sequence[tuple[str, str] | None]


class Computer:
    """The extractors of a process, in their order, with the feed that prepares for them.

    columns, features: those that are asked for.  device: torch's name.
    """

    def __init__(
        self,
        extractors: Sequence[Extractor],
        feed: ExtractLoader,
        columns: Sequence[Column],
        features: Sequence[Feature],
        feature_dtype: str,
        device: str,
    ) -> None:
        self._extractors = extractors
        self._feed = feed
        self._columns, self._features = columns, features
        self._feature_dtype = np.dtype(feature_dtype)
        self._device = device
        self._need_image, self._need_text = dependents(extractors, "image"), dependents(extractors, "text")
        if device.startswith("cuda"):
            _pin(feed.shared_memory)

    def compute(self, batch: FeedBatch, memory: FittingBatchSize) -> Computed:
        """All of a batch.  What does not fit on the device alone is ``out_of_memory``."""
        count = len(batch.samples)
        columns: dict[str, list[Any]] = {column.name: [] for column in self._columns}
        features = {f.name: np.empty((count, f.width), self._feature_dtype) for f in self._features}
        lost: dict[int, tuple[str, str]] = {}
        start = 0
        while start < count:
            end = min(start + memory.limit(0), count)
            try:
                outputs = self._run(batch, start, end)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                problem = str(error).partition("\n")[0]
                outputs = None
            if outputs is None:  # outside of the handler, whose error holds the tensors
                if "torch" in sys.modules and self._device.startswith("cuda"):
                    sys.modules["torch"].cuda.empty_cache()
                if end - start > 1:
                    memory.shrink(0, tried=end - start)
                    continue
                lost[start] = "out_of_memory", problem
                outputs = {name: [None] for name in columns} | dict.fromkeys(features, math.nan)
            for name, cells in columns.items():
                cells += outputs[name]
            for name, array in features.items():
                array[start:end] = outputs[name]
            start = end
        return self._judge(batch, columns, features, lost)

    def _run(self, batch: FeedBatch, start: int, end: int) -> dict[str, Any]:
        """The columns as lists and the features as arrays in memory, of a part of a batch."""
        view = _View(self._feed, batch, start, end, self._device)
        outputs: dict[str, Any] = {}
        for extractor in self._extractors:
            found = extractor.compute(view)
            named: list[Column | Feature] = [*extractor.columns, *extractor.features]
            for output in named:
                if output.name not in found or len(found[output.name]) != end - start:
                    raise ShardError(f"{extractor.name}: it gives no {output.name!r} for each of {end - start} samples")
                outputs[output.name] = found[output.name]
            view.features.update({feature.name: found[feature.name] for feature in extractor.features})
        cells = {column.name: _cells(outputs[column.name]) for column in self._columns}
        features = {feature.name: _array(outputs[feature.name], feature) for feature in self._features}
        if self._device.startswith("cuda"):  # nothing reads the shared memory any more, asked for or not
            sys.modules["torch"].cuda.synchronize(self._device)
        return cells | features

    def _judge(
        self,
        batch: FeedBatch,
        columns: dict[str, list[Any]],
        features: dict[str, NDArray[Any]],
        lost: Mapping[int, tuple[str, str]],
    ) -> Computed:
        """Nothing stays where a sample had nothing to compute it from."""
        statuses: list[str] = []
        failed: list[tuple[str, str] | None] = []
        names = {*columns, *features}
        for row, sample in enumerate(batch.samples):
            outcome = sample.outcome
            empty: set[str] = set()
            problem = outcome.broken or lost.get(row)
            if problem is not None:
                empty = names
            else:
                problem = outcome.unreadable
                empty |= names & self._need_image if problem is not None else set()
                empty |= names & self._need_text if sample.caption is None else set()
            for name in empty:
                if name in columns:
                    columns[name][row] = None
                else:
                    features[name][row] = np.nan
            no_caption = sample.caption is None and bool(self._need_text)
            statuses.append(problem[0] if problem is not None else "no_caption" if no_caption else "ok")
            failed.append(problem)
        return Computed(columns, features, statuses, failed)


class _View:
    """A part of a batch, as extractors see it."""

    def __init__(self, feed: ExtractLoader, batch: FeedBatch, start: int, end: int, device: str) -> None:
        self._feed, self._batch, self._device = feed, batch, device
        self._start, self._end = start, end
        self._tensors: dict[Preparation, Any] = {}
        self.features: dict[str, Any] = {}
        outcomes = [sample.outcome for sample in batch.samples[start:end]]
        self.readable = np.array([o.unreadable is None and o.broken is None for o in outcomes], np.bool_)

    def __len__(self) -> int:
        return self._end - self._start

    def prepared(self, preparation: Preparation) -> Any:
        number = self._feed.preparations.index(preparation)
        array = self._feed.array(self._batch, number)
        if array is not None:
            return array[self._start : self._end]
        samples = self._batch.samples[self._start : self._end]
        return [sample.outcome.values.get(number, {}) for sample in samples]

    def device_tensor(self, preparation: Preparation) -> Any:
        if preparation not in self._tensors:
            import torch

            host = torch.from_numpy(self.prepared(preparation))
            self._tensors[preparation] = host.to(self._device, non_blocking=True)
        return self._tensors[preparation]


def distinct(extractors: Sequence[Extractor]) -> tuple[Preparation, ...]:
    """The preparations of all, equal ones once."""
    return tuple(dict.fromkeys(preparation for extractor in extractors for preparation in extractor.preparations))


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or ("torch" in sys.modules and is_out_of_memory(error))


def _cells(values: Any) -> list[Any]:
    """Plain values, None for NaN and infinity, which JSON has not."""
    if callable(getattr(values, "detach", None)):
        values = values.detach().float().cpu()
    found = values.tolist() if callable(getattr(values, "tolist", None)) else list(values)
    return [None if isinstance(cell, float) and not math.isfinite(cell) else _plain(cell) for cell in found]


def _plain(cell: Any) -> Any:
    if isinstance(cell, np.generic | np.ndarray):
        return cell.tolist()
    return cell


def _array(values: Any, feature: Feature) -> NDArray[Any]:
    if callable(getattr(values, "detach", None)):
        values = values.detach().float().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] != feature.width:
        raise ShardError(f"feature {feature.name!r}: {array.shape} where rows of {feature.width} are due")
    return array


def _pin(arrays: Sequence[NDArray[Any]]) -> None:
    """Memory that the device reads by itself; where that is refused, transfers are slower."""
    import torch

    register: Callable[..., Any] = torch.cuda.cudart().cudaHostRegister
    for array in arrays:
        register(array.ctypes.data, array.nbytes, 0)
