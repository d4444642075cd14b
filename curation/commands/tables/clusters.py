"""Clusters of image features: which centroid is nearest to an image, and which centroids ImageNet's images hit.

As in DataComp's ``baselines/apply_filter.py``, nearest is the greatest inner product in single precision, of several
the first, and the features are taken as they are, without scaling.  DataComp's files were written by ``torch.save``;
they are read as numbers only, so that such a file cannot run code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.commands.tables.saved import saved_blocks
from curation.commands.tables.similarity import Rows, array_blocks, feature_blocks, feature_shape
from curation.commands.tables.tables import ShardTable, find_tables, with_features
from curation.errors import DeviceError, InfrastructureError, UsageError, device_failure, install

FEATURE = "l14_img"  # DataComp's name for what stage 06 calls oai-clip-vit-l14-image
_ROWS, _CENTROIDS = 1024, 8192  # compared at a time: 32 MB
_MAX_CENTROIDS_BYTES = 16 << 30


class Clusters:
    """centroids: one a row.  device: ``cpu``, or ``cuda`` to compare on a GPU with torch; ``auto`` takes a GPU where
    there is one."""

    def __init__(self, centroids: Rows, device: str = "cpu") -> None:
        self.centroids = centroids
        self._nearest: Callable[[Rows], NDArray[np.int64]] = self._on_cpu
        self.device = "cpu"
        if device != "cpu" and (torch := _torch_with_gpu(required=device != "auto")) is not None:
            self._nearest = self._on_gpu(torch)
            self.device = "cuda"

    def nearest(self, rows: Rows) -> NDArray[np.int64]:
        """Returns for each row the number of the centroid with the greatest inner product; -1 for a row that is not
        finite.

        Raises:
            UsageError: The rows have another width than the centroids.
        """
        if rows.shape[1] != self.centroids.shape[1]:
            raise UsageError(
                f"--centroids: they have {self.centroids.shape[1]} numbers each, the features have {rows.shape[1]}; "
                "centroids are made of the same kind of features"
            )
        found = np.full(len(rows), -1, np.int64)
        finite = np.isfinite(rows).all(axis=1)
        found[finite] = np.concatenate(
            [self._nearest(part) for part in _parts(rows[finite])] or [np.empty(0, np.int64)]
        )
        return found

    def hit_by(self, blocks: Iterator[Rows]) -> NDArray[np.bool_]:
        """Returns of each centroid whether it is the nearest to any of the rows."""
        hit = np.zeros(len(self.centroids), bool)
        for block in blocks:
            places = self.nearest(block)
            hit[places[places >= 0]] = True
        return hit

    def _on_cpu(self, rows: Rows) -> NDArray[np.int64]:
        best = np.full(len(rows), -np.inf, np.float32)
        places = np.zeros(len(rows), np.int64)
        for start in range(0, len(self.centroids), _CENTROIDS):
            products = rows @ self.centroids[start : start + _CENTROIDS].T
            found = products.argmax(axis=1)
            values = products[np.arange(len(rows)), found]
            better = values > best
            best[better], places[better] = values[better], found[better] + start
        return places

    def _on_gpu(self, torch: Any) -> Callable[[Rows], NDArray[np.int64]]:
        try:
            centroids = torch.from_numpy(self.centroids).to("cuda").T
        except RuntimeError as error:
            raise device_failure(error) or InfrastructureError(f"--device cuda: {error}") from error

        def nearest(rows: Rows) -> NDArray[np.int64]:
            try:
                with torch.inference_mode():
                    places = (torch.from_numpy(rows).to("cuda") @ centroids).argmax(dim=1).cpu().numpy()
            except RuntimeError as error:
                failed: DeviceError | None = device_failure(error)
                raise failed or InfrastructureError(f"--device cuda: {error}; or --device cpu") from error
            return np.asarray(places, np.int64)

        return nearest


def _torch_with_gpu(*, required: bool) -> Any:
    try:
        import torch
    except ImportError:
        if required:
            raise InfrastructureError(f"--device cuda needs the package torch: {install('torch')}") from None
        return None
    if torch.cuda.is_available():
        return torch
    if required:
        raise InfrastructureError("--device cuda: torch sees no GPU on this machine")
    return None


def _parts(rows: Rows) -> Iterator[Rows]:
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]


# ---- files of centroids and of features


def read_centroids(path: Path) -> Rows:
    """Reads centroids, one a row: a ``.npy``, or a file of ``torch.save`` such as DataComp's.

    Raises:
        UsageError: It is no such file, or a number in it is not finite.
    """
    rows = np.concatenate(list(_blocks(path, "--centroids", _MAX_CENTROIDS_BYTES)) or [np.empty((0, 1), np.float32)])
    if not len(rows) or not np.isfinite(rows).all():
        raise UsageError(
            f"--centroids {path}: {'a number in it is not finite' if len(rows) else 'there are none in it'}"
        )
    return np.ascontiguousarray(rows)


def target_blocks(paths: Sequence[Path]) -> Iterator[Rows]:
    """Yields the features that ``paths`` hold, a block at a time.

    Args:
        paths: Files of ``torch.save`` such as DataComp's of ImageNet, ``.npy``, ``.npz``, or folders of stage 06.
    """
    for path in paths:
        if path.is_dir():
            for _, features in with_features(find_tables(path).tables, path, FEATURE):
                yield from feature_blocks(features, FEATURE)
        else:
            yield from _blocks(path, "--targets", None)


def _blocks(path: Path, flag: str, max_bytes: int | None) -> Iterator[Rows]:
    if not path.is_file():
        pools = "; DataComp's pools are small, medium, large, xlarge" if flag == "--centroids" else ""
        raise UsageError(f"{flag} {path}: no such file{pools}")
    if max_bytes is not None and path.stat().st_size > max_bytes:
        raise UsageError(f"{flag} {path}: larger than {max_bytes:,} bytes")
    if path.suffix == ".npz":
        yield from feature_blocks(path, FEATURE)
    elif path.suffix == ".npy":
        yield from array_blocks(path)
    else:
        yield from saved_blocks(path, flag)


# ---- the features of a table's rows


class FeatureRows:
    """Features of chosen rows of several tables, read in order: a block at a time and each file once."""

    def __init__(self, tables: Sequence[ShardTable], folder: Path) -> None:
        self._tables, self._folder = tables, folder
        self._table = -1
        self._blocks: Iterator[Rows] = iter(())
        self._block: Rows = np.empty((0, 0), np.float32)
        self._start = 0

    def take(self, table: int, rows: NDArray[np.int64]) -> Rows:
        """Returns the features of ``rows`` of the table with this number.

        Args:
            table: Its number; never less than in an earlier call.
            rows: Rising numbers of rows; above those of an earlier call for the same table.

        Raises:
            InfrastructureError: The features do not belong to the table, or cannot be read.
        """
        if table != self._table:
            self._open(table)
        taken = []
        while len(rows):
            end = self._start + len(self._block)
            count = int(np.searchsorted(rows, end))
            if count:
                taken.append(self._block[rows[:count] - self._start])
                rows = rows[count:]
            else:
                self._start = end
                self._block = next(self._blocks)
        return np.concatenate(taken)

    def _open(self, table: int) -> None:
        import pyarrow.parquet as pq

        [(found, features)] = with_features(self._tables[table : table + 1], self._folder, FEATURE)
        count = pq.read_metadata(found.parquet).num_rows
        shape = feature_shape(features, FEATURE)
        if shape[0] != count:
            raise InfrastructureError(
                f"{features}: has {shape[0]:,} rows of {FEATURE}, {found.parquet.name} has {count:,}: they do not "
                "belong together"
            )
        self._table, self._blocks = table, feature_blocks(features, FEATURE)
        self._block, self._start = np.empty((0, math.prod(shape[1:])), np.float32), 0
