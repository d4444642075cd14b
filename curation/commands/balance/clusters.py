"""Drops samples that mean the same, as SemDeDup does (Abbas et al. 2023, arXiv:2303.09540).

Features are put into clusters by k-means.  Within a cluster the samples are in an order: of ``hard`` the farthest from
the centroid comes first, of ``easy`` the nearest, of ``random`` that with the lowest hash.  A sample is dropped if its
cosine with any sample before it is above 1 − ε, also where that one is dropped itself.

The rows of a cluster are brought together in a scratch file, so that memory grows neither with the number of rows nor
with the size of a cluster but for 40 bytes a row of one cluster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.commands.balance.rows import Balanced, BalanceRows, Keep, KeptUids, hashes
from curation.commands.tables.similarity import TILE_ROWS, Rows, cosine_pairs, import_faiss, normalise
from curation.errors import InfrastructureError, UsageError
from curation.reshard.uids import Uids

_SAMPLES_PER_CLUSTER, _ITERATIONS = 40, 20
_LEAST_PER_CLUSTER, _LEAST_SAMPLES = 10, 10_000
_MAX_TRAINING_BYTES = 256 << 20
_GATHERED_ROWS = 16_384  # that are sorted and written at a time
_SLACK = 1e-5  # more than single precision errs by, in a dot product of unit vectors
_ROW = np.dtype([("cluster", "<i4"), ("similarity", "<f8"), ("hash", "<u8"), ("uid", "u8,u8")])


@dataclass(frozen=True, slots=True)
class SemanticSettings:
    """How samples are compared.

    Attributes:
        feature: The feature's name.
        epsilon: Samples with a cosine above 1 − ε are the same.
        clusters: How many there are; None: 2 √n, and at least 40 samples for each.
        keep: Which sample of those that are the same is kept.
        seed: Of k-means, and of ``random``.
        threads: Blocks of rows that are put into clusters at a time; the result does not depend on it.
    """

    feature: str
    epsilon: float
    clusters: int | None
    keep: Keep
    seed: int
    threads: int


def balance_clusters(
    rows: BalanceRows, features: Sequence[Path], settings: SemanticSettings, scratch: Path
) -> Balanced:
    """Chooses the rows that stay.

    Args:
        rows: The rows.
        features: The npz of each table.
        settings: How they are compared.
        scratch: A folder for the vectors (4 bytes a number).

    Returns:
        The uids that stay, and the size of each cluster before and after.
    """
    faiss = import_faiss("--balance clusters")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # sums in the same order everywhere
    try:
        centroids, count, without = _train(rows, features, settings, faiss)
        counted = dict(rows.counts)
        sizes = _assign(rows, features, settings, centroids, scratch, faiss)
    finally:
        faiss.omp_set_num_threads(before)
    _gather(rows, features, settings, sizes, scratch)
    rows.counts.update(counted)  # the rows were read three times
    kept = KeptUids(scratch / "kept.parquet")
    left = np.zeros(len(sizes), np.int64)
    try:
        for number, uids in _survivors(scratch, sizes, centroids.shape[1], settings):
            left[number] = len(uids)
            kept.add(uids)
    finally:
        kept.close()
    order = np.lexsort((np.arange(len(sizes)), -sizes))
    told = {
        "feature": settings.feature,
        "epsilon": settings.epsilon,
        "keep": settings.keep,
        "clusters": len(sizes),
        "samples": count,
        "without_feature": without,
        "dropped": count - kept.count,
    }
    return Balanced(kept.path, told, {"cluster": order, "before": sizes[order], "after": left[order]})


def _usable(rows: BalanceRows, features: Sequence[Path], feature: str) -> Iterator[tuple[Uids, Rows, int]]:
    """Yields blocks of uids and vectors of length one, of the rows that have a feature, and how many have none."""
    width = 0
    for uids, vectors in rows.with_features(features, feature):
        if width and len(vectors) and vectors.shape[1] != width:
            raise UsageError(f"{feature}: has {width:,} numbers in some tables and {vectors.shape[1]:,} in others")
        width = vectors.shape[1] if len(vectors) else width
        normal, valid = normalise(vectors) if len(vectors) else (vectors, np.zeros(0, bool))
        yield uids[valid], normal[valid], int((~valid).sum())


# ---- k-means


def _train(
    rows: BalanceRows, features: Sequence[Path], settings: SemanticSettings, faiss: Any
) -> tuple[Rows, int, int]:
    """Returns the centroids, how many rows have a feature, and how many have none.

    They are those of the samples with the lowest hashes, so that they do not depend on the order of the rows.
    """
    wanted = (settings.clusters or int(2 * rows.row_count() ** 0.5)) * _SAMPLES_PER_CLUSTER
    sample = _LowestHashes(max(wanted, _LEAST_SAMPLES))
    count = without = 0
    for uids, vectors, lacking in _usable(rows, features, settings.feature):
        count, without = count + len(uids), without + lacking
        if len(uids):
            sample.add(hashes(uids, settings.seed), uids, vectors)
    if not count:
        raise UsageError(f"no row that is looked at has the feature {settings.feature!r}")
    most = min(count // _SAMPLES_PER_CLUSTER, sample.most // _LEAST_PER_CLUSTER)
    lists = settings.clusters or max(1, min(int(2 * count**0.5), most))
    if lists > min(count, sample.most):
        raise UsageError(f"--clusters {lists:,}: there are {min(count, sample.most):,} samples to find them with")
    vectors = sample.take(max(lists * _SAMPLES_PER_CLUSTER, _LEAST_SAMPLES))
    means = faiss.Kmeans(
        vectors.shape[1], lists, niter=_ITERATIONS, spherical=True, seed=settings.seed & 0x7FFFFFFF, verbose=False,
        min_points_per_centroid=1, max_points_per_centroid=len(vectors),
    )  # fmt: skip
    means.train(vectors)
    return np.ascontiguousarray(means.centroids, np.float32), count, without


class _LowestHashes:
    """The vectors with the lowest hashes of all that are added, within a bound of bytes."""

    def __init__(self, wanted: int) -> None:
        self.most = wanted
        self._parts: list[tuple[NDArray[np.uint64], Uids, Rows]] = []
        self._rows = 0
        self._greatest = ~np.uint64(0)  # of those that are kept, once there are enough

    def add(self, numbers: NDArray[np.uint64], uids: Uids, vectors: Rows) -> None:
        self.most = min(self.most, max(1, _MAX_TRAINING_BYTES // (4 * vectors.shape[1])))
        low = numbers <= self._greatest
        self._parts.append((numbers[low], uids[low], vectors[low]))
        self._rows += int(low.sum())
        if self._rows >= self.most + self.most // 4 + TILE_ROWS:
            self._cut(self.most)
            self._greatest = self._parts[0][0][-1]

    def take(self, count: int) -> Rows:
        self._cut(min(count, self.most))
        return np.ascontiguousarray(self._parts[0][2])

    def _cut(self, count: int) -> None:
        numbers, uids, vectors = (np.concatenate([part[i] for part in self._parts]) for i in range(3))
        order = np.lexsort((uids["f1"], uids["f0"], numbers))[:count]
        self._parts = [(numbers[order], uids[order], vectors[order])]
        self._rows = len(order)


def _assign(
    rows: BalanceRows,
    features: Sequence[Path],
    settings: SemanticSettings,
    centroids: Rows,
    scratch: Path,
    faiss: Any,
) -> NDArray[np.int64]:
    """Spools the cluster of each row, and returns the size of each cluster."""
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    sizes = np.zeros(len(centroids), np.int64)

    def place(block: tuple[Uids, Rows, int]) -> NDArray[Any]:
        uids, vectors, _ = block
        found = np.empty(len(uids), _ROW)
        if len(uids):
            found["cluster"] = index.search(vectors, 1)[1][:, 0]
            found["similarity"] = cosine_pairs(vectors, centroids[found["cluster"]])
            found["hash"] = hashes(uids, settings.seed)
            found["uid"] = uids
        return found

    with (
        open(scratch / "rows.bin", "wb") as file,
        ThreadPoolExecutor(settings.threads, initializer=partial(faiss.omp_set_num_threads, 1)) as pool,
    ):
        for found in _in_order(pool, place, _usable(rows, features, settings.feature), 2 * settings.threads):
            file.write(found.tobytes())
            sizes += np.bincount(found["cluster"], minlength=len(sizes))
    return sizes


def _in_order(
    pool: ThreadPoolExecutor, call: Callable[[Any], NDArray[Any]], given: Iterator[Any], ahead: int
) -> Iterator[NDArray[Any]]:
    """As ``pool.map``, but with a bounded number of blocks in memory."""
    waiting: list[Any] = []
    for one in given:
        waiting.append(pool.submit(call, one))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    for one in waiting:
        yield one.result()


def _gather(
    rows: BalanceRows, features: Sequence[Path], settings: SemanticSettings, sizes: NDArray[np.int64], scratch: Path
) -> None:
    """Brings the vectors and the facts of each cluster together, in files of their own."""
    cursors = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    with (
        open(scratch / "rows.bin", "rb") as facts,
        open(scratch / "sorted.bin", "wb") as sorted_facts,
        open(scratch / "sorted.f32", "wb") as sorted_vectors,
    ):
        waiting: list[Rows] = []
        for _, vectors, _ in _usable(rows, features, settings.feature):
            waiting.append(vectors)
            if sum(map(len, waiting)) >= _GATHERED_ROWS:
                _put(waiting, facts, sorted_facts, sorted_vectors, cursors)
        _put(waiting, facts, sorted_facts, sorted_vectors, cursors)
    (scratch / "rows.bin").unlink()


def _put(waiting: list[Rows], facts: Any, sorted_facts: Any, sorted_vectors: Any, cursors: NDArray[np.int64]) -> None:
    """Writes the waiting rows to their places, those of a cluster at once."""
    if not (count := sum(map(len, waiting))):
        waiting.clear()
        return
    vectors = np.concatenate([part for part in waiting if len(part)])
    waiting.clear()
    found = np.frombuffer(facts.read(count * _ROW.itemsize), _ROW)
    if len(found) != count:
        raise InfrastructureError("the tables have changed while they were read; start again")
    order = np.argsort(found["cluster"], kind="stable")
    found, vectors = found[order], vectors[order]
    edges = np.concatenate([[0], np.flatnonzero(np.diff(found["cluster"])) + 1, [count]])
    size = 4 * vectors.shape[1]
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        place = int(cursors[found["cluster"][start]])
        os.pwrite(sorted_facts.fileno(), found[start:stop].tobytes(), place * _ROW.itemsize)
        os.pwrite(sorted_vectors.fileno(), vectors[start:stop].tobytes(), place * size)
        cursors[found["cluster"][start]] += stop - start


# ---- within a cluster


def _survivors(
    scratch: Path, sizes: NDArray[np.int64], width: int, settings: SemanticSettings
) -> Iterator[tuple[int, Uids]]:
    """Yields the number of each cluster, and the uids of its samples that stay."""
    place = 0
    for number, size in enumerate(sizes.tolist()):
        if size:
            facts = np.fromfile(scratch / "sorted.bin", _ROW, size, offset=place * _ROW.itemsize)
            vectors = np.memmap(scratch / "sorted.f32", np.float32, "r", 4 * width * place, (size, width))
            order = _order(facts, settings.keep)
            stays = ~repeated_rows(vectors, order, 1 - settings.epsilon)
            yield number, facts["uid"][order[stays]]
        place += size


def _order(facts: NDArray[Any], keep: Keep) -> NDArray[np.int64]:
    """The samples of a cluster, the one that is kept first; of equal ones that with the lowest uid."""
    first = {"hard": facts["similarity"], "easy": -facts["similarity"], "random": facts["hash"]}[keep]
    return np.lexsort((facts["uid"]["f1"], facts["uid"]["f0"], first))


def repeated_rows(vectors: Rows, order: NDArray[np.int64], threshold: float) -> NDArray[np.bool_]:
    """Which rows, in the order, have a cosine above ``threshold`` with a row before them; a tile at a time."""
    dropped = np.zeros(len(order), bool)
    for start in range(0, len(order), TILE_ROWS):
        tile = vectors[order[start : start + TILE_ROWS]]
        dropped[start : start + len(tile)] |= _any_above(tile, tile, threshold, same=True)
        for other in range(start + TILE_ROWS, len(order), TILE_ROWS):
            open_ = other + np.flatnonzero(~dropped[other : other + TILE_ROWS])
            if len(open_):
                dropped[open_] = _any_above(tile, vectors[order[open_]], threshold)
    return dropped


def _any_above(rows: Rows, others: Rows, threshold: float, *, same: bool = False) -> NDArray[np.bool_]:
    """Which of ``others`` have a cosine above the threshold with any row; same: with any row before them.

    What single precision cannot tell is decided in double precision, so that it depends on no library's order of sums.
    """
    cosines = rows @ others.T
    near = cosines >= threshold - _SLACK
    if same:
        near = np.triu(near, 1)
    found: NDArray[np.bool_] = np.zeros(len(others), bool)
    open_ = np.flatnonzero(near.any(axis=0))  # mostly few
    near, cosines = near[:, open_], cosines[:, open_]
    sure = (near & (cosines > threshold + _SLACK)).any(axis=0)
    found[open_[sure]] = True
    near[:, sure] = False
    while (columns := np.flatnonzero(near.any(axis=0))).size:
        first = near[:, columns].argmax(axis=0)
        above = cosine_pairs(rows[first], others[open_[columns]]) > threshold
        found[open_[columns[above]]] = True
        near[:, columns[above]] = False
        near[first, columns] = False
    return found
