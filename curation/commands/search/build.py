"""Makes the files of an index, in steps that are kept: a build that was interrupted continues at the same step.

Memory does not grow with the number of rows: vectors and texts are copied in blocks, faiss is trained on a bounded
sample, and the blocks of vectors are encoded into files of their own, which faiss merges on disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from curation import __version__
from curation.commands.search.source import FeatureModel, SourceState
from curation.commands.search.stored import (
    BATCH_ROWS,
    BUILD,
    FLAT,
    LISTS,
    LISTS_DATA,
    SAMPLES,
    TEXTS,
    VECTORS,
    IndexRecord,
    StoredVectors,
    read_lists,
    silence,
)
from curation.commands.tables.similarity import BLOCK_ROWS, feature_blocks, feature_dtype, import_faiss, normalise
from curation.commands.tables.tables import FolderTables, ShardTable, with_features
from curation.errors import InfrastructureError, UsageError
from curation.storage.files import storage_errors, temporary_name, whole_file

EXACT_ROWS = 100_000  # up to here a search compares the query with every vector
LEAST_ROWS = 2560  # of ivfpq, whose codes have 256 values each
_NUMBERS_PER_CODE = 8
_SAMPLES_PER_LIST, _ITERATIONS = 40, 10
_MAX_TRAINING_BYTES = 512 << 20
_ENCODED_ROWS = 1 << 18  # of a file of codes
_TRAINED, _LEFT_OUT = "trained.faiss", "without_feature"
FINISHED = frozenset((VECTORS, SAMPLES, FLAT, LISTS, LISTS_DATA))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be built.  name: a digest of all that decides the files."""

    name: str
    feature: str
    kind: str
    seed: int
    model: FeatureModel | None
    source: SourceState


def build(plan: Plan, tables: FolderTables, folder: Path, threads: int, say: Callable[[str], None]) -> IndexRecord:
    """Makes the index, or finishes it, and replaces the one before.

    Args:
        plan: What is to be built.
        tables: Where the features are.
        folder: Of the index.
        threads: Blocks of vectors that are encoded at a time.  The files do not depend on it.
        say: Is told of each step.

    Raises:
        UsageError: The features are of different widths or types, there are none, or too many or too few for the kind.
        InfrastructureError: A table is damaged, or the folder cannot be written.
    """
    faiss = import_faiss("an index")
    into = folder / plan.name
    with storage_errors(into):
        into.mkdir(parents=True, exist_ok=True)
        if not all((into / name).exists() for name in (VECTORS, SAMPLES, _LEFT_OUT)):
            say("copying vectors and texts")
            _copy(plan, tables, Path(plan.source.folder), into)
        vectors = StoredVectors(into / VECTORS)
        rows, width = len(vectors), vectors.width
        kind = plan.kind if plan.kind != "auto" else "exact" if rows <= EXACT_ROWS else "ivfpq"
        _check(kind, rows, width)
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # sums in the same order everywhere
        try:
            lists = _flat(vectors, into, faiss) if kind == "exact" else _lists(vectors, into, plan, threads, faiss, say)
        finally:
            faiss.omp_set_num_threads(before)
        left_out = int((into / _LEFT_OUT).read_text("ascii"))
        record = IndexRecord(
            plan.name, plan.feature, kind, rows, width, left_out, lists, "l2", plan.seed, plan.model, plan.source,
            __version__,
        )  # fmt: skip
        record.write(folder)
        for path in into.iterdir():  # what the steps needed, and what a killed process left
            if path.name not in FINISHED:
                path.unlink(missing_ok=True)
    return record


def _check(kind: str, rows: int, width: int) -> None:
    if kind == "exact" and rows * width * 4 > _MAX_TRAINING_BYTES * 4:
        raise UsageError(f"--kind exact: {rows:,} vectors of {width:,} numbers are too many; use --kind ivfpq")
    if kind == "ivfpq" and rows < LEAST_ROWS:
        raise UsageError(f"--kind ivfpq: it is trained on at least {LEAST_ROWS:,} vectors, and there are {rows:,}")


# ---- vectors and texts


def _copy(plan: Plan, tables: FolderTables, folder: Path, into: Path) -> None:
    """Writes the vectors of all samples that have one, and their texts, in the order of the tables."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.string()) for name in TEXTS])
    count, left_out, dtype, width = 0, 0, None, 0
    with whole_file(into / VECTORS) as file, whole_file(into / SAMPLES) as texts, pa.ipc.new_file(texts, schema) as out:
        batches = _Batches(out)
        for table, features in with_features(tables.tables, folder, plan.feature):
            found, there = feature_dtype(features, plan.feature)
            if dtype is None:
                dtype, width = found, there
                file.write(_header(dtype, 0, width))
            if (found, there) != (dtype, width):
                raise UsageError(
                    f"{features}: {plan.feature} has {there:,} numbers of {found}, and in the tables before {width:,} "
                    f"of {dtype}; run stage 06 on all shards with the same options"
                )
            for block, part in _blocks(table, features, plan.feature, schema):
                valid = normalise(block)[1]
                file.write(block[valid].astype(dtype).data)
                batches.add(part.filter(pa.array(valid)))
                count += int(valid.sum())
                left_out += int((~valid).sum())
        if dtype is None or not count:
            raise UsageError(f"{folder}: no sample has the feature {plan.feature!r}")
        batches.finish()
        file.seek(0)
        file.write(_header(dtype, count, width))
    with whole_file(into / _LEFT_OUT) as told:
        told.write(str(left_out).encode())


def _header(dtype: np.dtype[Any], rows: int, width: int) -> bytes:
    """NumPy's header, which has room for a larger number of rows."""
    header = BytesIO()
    told = {"descr": dtype.str, "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(header, told)
    return header.getvalue()


def _blocks(table: ShardTable, features: Path, feature: str, schema: Any) -> Iterator[tuple[NDArray[np.float32], Any]]:
    """Yields the vectors of a table block by block, with the texts of the same rows."""
    texts, count = _Texts(table, schema), 0
    for block in feature_blocks(features, feature):
        part = texts.take(len(block))
        count += len(block)
        if part.num_rows != len(block):
            break
        yield block, part
    if count != texts.rows:
        raise InfrastructureError(
            f"{features}: has {'at least ' * (count > texts.rows)}{count:,} rows, {table.parquet.name} has "
            f"{texts.rows:,}; run the stage again for this shard"
        )


class _Texts:
    """The texts of a table, read in order, a block at a time."""

    def __init__(self, table: ShardTable, schema: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa, self._schema, self._table = pa, schema, table
        try:
            file = pq.ParquetFile(table.parquet)
        except (OSError, pa.ArrowException) as error:
            raise InfrastructureError(f"{table.parquet}: cannot be read: {error}") from None
        self.rows: int = file.metadata.num_rows
        there = set(file.schema_arrow.names)
        self._columns = {name: name for name in TEXTS if name in there and name != "shard"}
        if "caption" not in there and "text" in there:
            self._columns["caption"] = "text"
        self._batches = file.iter_batches(BLOCK_ROWS, columns=sorted(set(self._columns.values())))
        self._waiting: Any = schema.empty_table()

    def take(self, count: int) -> Any:
        """Returns the next rows as a table; fewer at the end."""
        pa = self._pa
        try:
            while len(self._waiting) < count and (batch := next(self._batches, None)) is not None:
                self._waiting = pa.concat_tables([self._waiting, self._typed(batch)])
        except (OSError, pa.ArrowException) as error:
            raise InfrastructureError(f"{self._table.parquet}: cannot be read: {error}") from None
        taken, self._waiting = self._waiting.slice(0, count), self._waiting.slice(count)
        return taken

    def _typed(self, batch: Any) -> Any:
        pa, rows = self._pa, batch.num_rows
        columns = {name: batch.column(own).cast(pa.string()) for name, own in self._columns.items()}
        columns["shard"] = pa.array([self._table.shard_id] * rows, pa.string())
        return pa.table([columns.get(name, pa.nulls(rows, pa.string())) for name in TEXTS], schema=self._schema)


class _Batches:
    """Writes record batches of ``BATCH_ROWS``, so that a row's number tells its batch."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._waiting: list[Any] = []
        self._rows = 0

    def add(self, part: Any) -> None:
        self._waiting.append(part)
        self._rows += len(part)
        while self._rows >= BATCH_ROWS:
            self._write(BATCH_ROWS)

    def finish(self) -> None:
        if self._rows:
            self._write(self._rows)

    def _write(self, rows: int) -> None:
        import pyarrow as pa

        whole = pa.concat_tables(self._waiting)
        self._out.write_table(whole.slice(0, rows).combine_chunks())
        self._waiting = [whole.slice(rows)]
        self._rows -= rows


# ---- faiss


def _flat(vectors: StoredVectors, into: Path, faiss: Any) -> int:
    """Writes an index that compares with every vector.  Returns the number of lists, of which it has none."""
    if not (into / FLAT).exists():
        index = faiss.IndexFlatIP(vectors.width)
        for start in range(0, len(vectors), BLOCK_ROWS):
            index.add(vectors.read(start, start + BLOCK_ROWS))
        _write(index, into / FLAT, faiss)
    return 0


def _lists(vectors: StoredVectors, into: Path, plan: Plan, threads: int, faiss: Any, say: Callable[[str], None]) -> int:
    """Writes an index with lists on disk.  Returns how many lists it has."""
    if not (into / LISTS).exists():
        if not (into / _TRAINED).exists():
            say("training")
            _write(_trained(vectors, plan.seed, faiss), into / _TRAINED, faiss)
        starts = range(0, len(vectors), _ENCODED_ROWS)
        say(f"encoding {len(vectors):,} vectors")
        encode = partial(_encode, vectors, into, faiss)
        with ThreadPoolExecutor(threads, initializer=partial(faiss.omp_set_num_threads, 1)) as pool:
            parts = list(pool.map(encode, starts))
        say("merging")
        _merge(parts, into, faiss)
    return int(read_lists(into / LISTS, faiss).nlist)


def _trained(vectors: StoredVectors, seed: int, faiss: Any) -> Any:
    """The lists' centroids and the codes' values, from a sample of the vectors."""
    count = len(vectors)
    most = _MAX_TRAINING_BYTES // (4 * vectors.width)
    lists = max(1, min(int(2 * count**0.5), min(count, most) // _SAMPLES_PER_LIST))
    wanted = min(count, most, max(lists * _SAMPLES_PER_LIST, 256 * _SAMPLES_PER_LIST))
    width = -(-vectors.width // _NUMBERS_PER_CODE) * _NUMBERS_PER_CODE
    coarse = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFPQ(coarse, width, lists, width // _NUMBERS_PER_CODE, 8, faiss.METRIC_INNER_PRODUCT)
    coarse.this.disown()
    index.own_fields = True
    for settings in (index.cp, index.pq.cp):
        settings.seed, settings.niter = seed, _ITERATIONS
        settings.min_points_per_centroid, settings.max_points_per_centroid = 1, 1 << 20
    index.cp.spherical = True
    index.train(_wide(_sample(vectors, wanted, seed), width))
    return index


def _sample(vectors: StoredVectors, wanted: int, seed: int) -> NDArray[np.float32]:
    """Some rows, the same ones each time: one of each of ``wanted`` parts of equal length, read in order."""
    edges = np.linspace(0, len(vectors), wanted + 1).astype(np.int64)
    chance = np.random.default_rng(seed).random(wanted)
    places = edges[:-1] + (chance * (edges[1:] - edges[:-1])).astype(np.int64)
    parts = []
    for start in range(0, len(vectors), BLOCK_ROWS):
        begin, end = np.searchsorted(places, (start, start + BLOCK_ROWS))
        if begin < end:
            parts.append(vectors.read(start, start + BLOCK_ROWS)[places[begin:end] - start])
    return np.concatenate(parts)


def _encode(vectors: StoredVectors, into: Path, faiss: Any, start: int) -> Path:
    """Writes the codes of a block of vectors."""
    path = into / f"codes-{start // _ENCODED_ROWS:06d}.faiss"
    if not path.exists():
        index = faiss.read_index(str(into / _TRAINED))
        for begin in range(start, min(start + _ENCODED_ROWS, len(vectors)), BLOCK_ROWS):
            rows = vectors.read(begin, min(begin + BLOCK_ROWS, start + _ENCODED_ROWS))
            index.add_with_ids(_wide(rows, index.d), np.arange(begin, begin + len(rows), dtype=np.int64))
        _write(index, path, faiss)
    return path


def _merge(parts: list[Path], into: Path, faiss: Any) -> None:
    from faiss.contrib.ondisk import merge_ondisk

    index = faiss.read_index(str(into / _TRAINED))
    with silence():
        merge_ondisk(index, [str(path) for path in parts], str(into / LISTS_DATA))
    with open(into / LISTS_DATA, "rb") as file:
        os.fsync(file.fileno())
    faiss.downcast_InvertedLists(index.invlists).filename = LISTS_DATA  # beside it, wherever the folder is moved
    _write(index, into / LISTS, faiss)


def _wide(rows: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """The rows with zeros behind them, which change no inner product."""
    if rows.shape[1] == width:
        return np.ascontiguousarray(rows)
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def _write(index: Any, path: Path, faiss: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(temporary_name(path.name, f"{os.getpid():08x}"))
    try:
        faiss.write_index(index, str(temporary))
    except RuntimeError as error:
        temporary.unlink(missing_ok=True)
        raise InfrastructureError(f"{path}: cannot be written: {str(error).rpartition(': ')[2]}") from None
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    file: BinaryIO
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def remove_other_builds(folder: Path, kept: str) -> None:
    """Removes what earlier builds have left.  A search that has one open can still use it."""
    for path in folder.iterdir():
        if path.name != kept and BUILD.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            names = {one.name for one in path.iterdir()} - FINISHED - {_TRAINED, _LEFT_OUT}
            if all(name.startswith((".", "codes-")) for name in names):
                shutil.rmtree(path, ignore_errors=True)
