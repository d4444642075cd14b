"""``curation neardup FOLDER --feature …`` finds groups of near duplicates by the cosine of features.

It can also write which samples are left when each group keeps one.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from curation.commands.tables.results import ResultOptions, as_given, results_in_stores
from curation.commands.tables.similarity import (
    BLOCK_ROWS,
    EXACT_ROWS,
    TOLERANCE,
    Groups,
    Vectors,
    array_blocks,
    cell_pairs,
    cosine_pairs,
    exact_pairs,
    feature_blocks,
    nearest_of,
    normalise,
)
from curation.commands.tables.tables import FolderTables, ShardTable, check_columns, find_tables, with_features
from curation.errors import EXIT_OK, InfrastructureError, UsageError
from curation.options import POSITIONAL, URLS, exit_code, parse_arguments
from curation.reshard.uids import UID_DTYPE, Uids, parse_uids, sort_uids, write_subset
from curation.storage.files import make_folder, storage_errors, whole_file

_TEXTS = ("uid", "key", "tar")
_SIZES = (("original_width", "original_height"), ("width", "height"))


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    """Find near duplicates among the samples of a folder, or of an evaluation set among them."""

    folder: Annotated[Path, POSITIONAL]
    """Stage 06's output: tables and features."""
    feature: str
    """The feature of the npz files that is compared, such as dedup-isc-ft-v107-image."""
    threshold: float
    """Samples with at least this cosine are near duplicates."""
    out: Annotated[Path, URLS]
    """The parquet to write: one row for each sample in a group; with --against, for every sample.  It and --keep may be
    URLs such as s3://bucket/near.parquet with --work_dir."""
    keep: Annotated[Path | None, URLS] = None
    """The subset file (uids, as `select` writes them) to write: one sample of each group, and all samples in no
    group."""
    against: Path | None = None
    """A .npy of embeddings, one per row: compare the samples with these instead of with one another."""
    index: Literal["auto", "exact", "cells"] = "auto"
    """exact: every pair.  cells: only pairs that share a cell of an index, which finds most pairs.  auto: exact up to
    200,000."""
    scratch: Path | None = None
    """Folder for the vectors during the comparison (4 bytes per number, 8 with cells).  Default: beside --out."""
    json: bool = False
    """One JSON object on one line instead of text."""


@dataclass(frozen=True, slots=True)
class _LoadedFeatures:
    """The features of all tables.

    vectors: of the samples that have one.  rows: the number of each of those among all samples.  starts: the number of
    the first sample of each table, and last the number of all samples.
    """

    vectors: Vectors
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "neardup")
    if not -1 <= options.threshold <= 1:
        raise UsageError("--threshold is a cosine, between -1 and 1")
    began = time.monotonic()
    with results_in_stores(options, ("out", "keep")) as local:
        tables = find_tables(options.folder)
        for warning in tables.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        check_columns(tables.tables, "--keep" if options.keep is not None else "")
        scratch = local.scratch or local.out.parent
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".neardup.", dir=scratch) as folder:
            work = _within_the_dataset if local.against is None else _against
            result = work(local, tables, Path(folder))
    result = {"feature": options.feature, "threshold": options.threshold, **result, "warnings": list(tables.warnings)}
    result["seconds"] = round(time.monotonic() - began, 3)
    if options.json:
        print(orjson.dumps(result).decode())
    else:
        print(", ".join(f"{name} {value:,}" for name, value in result.items() if isinstance(value, int)))
        print(f"written: {', '.join(as_given(path) for path in (options.out, options.keep) if path is not None)}")
    return EXIT_OK


def _load(options: Options, tables: FolderTables, path: Path) -> _LoadedFeatures:
    """Writes the features of all tables, one after the other, to a scratch file."""
    vectors, starts, numbers = Vectors(path), [0], []
    for table, features in with_features(tables.tables, options.folder, options.feature):
        count = 0
        for block in feature_blocks(features, options.feature):
            normal, valid = normalise(block)
            vectors.append(normal[valid])
            numbers.append(np.flatnonzero(valid) + starts[-1] + count)
            count += len(block)
        if count != (there := _row_count(table)):
            raise InfrastructureError(
                f"{features}: {count:,} rows, {table.parquet.name} has {there:,}; run the stage again"
            )
        starts.append(starts[-1] + count)
    rows = np.concatenate([np.empty(0, np.int64), *numbers])
    return _LoadedFeatures(vectors, rows, np.array(starts, np.int64))


# ---- within the dataset


def _within_the_dataset(options: Options, tables: FolderTables, scratch: Path) -> dict[str, Any]:
    loaded = _load(options, tables, scratch / "rows.f32")
    vectors, total = loaded.vectors, int(loaded.starts[-1])
    exact = options.index == "exact" or (options.index == "auto" and len(vectors) <= EXACT_ROWS)
    threshold = options.threshold
    groups = Groups(len(vectors))
    for pairs in exact_pairs(vectors, threshold) if exact else cell_pairs(vectors, threshold, scratch):
        groups.connect(pairs)
    roots = groups.roots()
    sizes = np.bincount(roots, minlength=len(roots))
    members = np.flatnonzero(sizes[roots] > 1)
    facts = _facts(tables, loaded.starts, loaded.rows[members])
    chosen = _choose(roots[members], facts)
    _write_groups(options, vectors, members, roots[members], chosen, facts)
    left = np.zeros(total, bool)
    left[loaded.rows] = True
    left[loaded.rows[members[~chosen]]] = False
    if options.keep is not None:
        _write_keep(options.keep, tables, loaded.starts, left)
    vectors.close()
    return {
        "index": "exact" if exact else "cells",
        "samples": total,
        "without_feature": total - len(vectors),
        "groups": int((sizes > 1).sum()),
        "in_groups": len(members),
        "left": int(left.sum()),
    }


def _facts(tables: FolderTables, starts: NDArray[np.int64], rows: NDArray[np.int64]) -> Any:
    """Returns uid, key, tar and the number of pixels (0: unknown) of the samples ``rows``, as an Arrow table."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = []
    for number, table in enumerate(tables.tables):
        begin, end = np.searchsorted(rows, starts[number : number + 2])
        if begin == end:
            continue
        names = _columns(table)
        sizes = next((pair for pair in _SIZES if set(pair) <= names), ())
        part = _read(table, sizes).take(pa.array(rows[begin:end] - starts[number]))
        pixels = pa.array(np.zeros(len(part)), pa.float64())
        if sizes:
            pixels = pc.fill_null(pc.multiply(part[sizes[0]], part[sizes[1]]), 0.0)
        texts = [part[name] for name in _TEXTS]
        found.append(pa.table([*texts, pixels], [*_TEXTS, "pixels"]))
    fields = [*((name, pa.string()) for name in _TEXTS), ("pixels", pa.float64())]
    return pa.concat_tables(found) if found else pa.schema(fields).empty_table()


def _choose(groups: NDArray[np.int64], facts: Any) -> NDArray[np.bool_]:
    """Returns which samples are kept: of each group the one with most pixels, then the lowest uid, then the first."""
    uids, bad = parse_uids(facts["uid"].combine_chunks())
    pixels = facts["pixels"].to_numpy()
    order = np.lexsort((uids["f1"], uids["f0"], bad, -pixels, groups))
    chosen = np.zeros(len(groups), bool)
    if len(order):
        chosen[order[np.flatnonzero(np.diff(groups[order], prepend=-1))]] = True
    return chosen


def _write_groups(
    options: Options,
    vectors: Vectors,
    members: NDArray[np.int64],
    roots: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    facts: Any,
) -> None:
    """Writes a row for each member, group by group; the one that is kept comes first."""
    import pyarrow as pa

    keeper = np.full(int(roots.max()) + 1 if len(roots) else 0, -1, np.int64)
    keeper[roots[chosen]] = members[chosen]
    order = np.lexsort((members, ~chosen, roots))
    numbers = np.cumsum(np.diff(roots[order], prepend=-1) > 0) - 1
    blocks = []
    for start in range(0, len(order), BLOCK_ROWS):
        part = order[start : start + BLOCK_ROWS]
        with_kept = cosine_pairs(vectors.take(members[part]), vectors.take(keeper[roots[part]]))
        taken = facts.take(pa.array(part))
        blocks.append(
            pa.table(
                {
                    "group": pa.array(numbers[start : start + BLOCK_ROWS], pa.int64()),
                    **{name: taken[name] for name in _TEXTS},
                    "keep": pa.array(chosen[part]),
                    "cosine": pa.array(with_kept.astype(np.float32)),
                }
            )
        )
    texts = [(name, pa.string()) for name in _TEXTS]
    schema = pa.schema([("group", pa.int64()), *texts, ("keep", pa.bool_()), ("cosine", pa.float32())])
    _write_parquet(options, schema, iter(blocks))


# ---- against embeddings


def _against(options: Options, tables: FolderTables, scratch: Path) -> dict[str, Any]:
    import pyarrow as pa

    assert options.against is not None
    others = Vectors(scratch / "others.f32")
    for block in array_blocks(options.against):
        normal, valid = normalise(block)
        if not valid.all():
            raise UsageError(f"{options.against}: has a row that is all zeros or not finite; leave it out")
        others.append(normal)
    if not len(others):
        raise UsageError(f"{options.against}: has no rows")
    counts = {"samples": 0, "without_feature": 0, "near": 0}
    starts, left = [0], []

    def blocks() -> Iterator[Any]:
        for table, features in with_features(tables.tables, options.folder, options.feature):
            facts, begin = _read(table), 0
            for block in feature_blocks(features, options.feature):
                normal, valid = normalise(block)
                if normal.shape[1] != others.width:
                    raise UsageError(
                        f"{options.against}: has {others.width} numbers per row, the feature {block.shape[1]}"
                    )
                best, places = nearest_of(normal, others)
                near = valid & (best >= options.threshold - TOLERANCE)
                left.append(valid & ~near)
                counts["samples"] += len(block)
                counts["without_feature"] += int((~valid).sum())
                counts["near"] += int(near.sum())
                columns = {name: facts[name].slice(begin, len(block)) for name in facts.column_names}
                begin += len(block)
                yield pa.table(
                    {**columns, "cosine": pa.array(best, mask=~valid), "nearest": pa.array(places, mask=~valid)}
                )
            if begin != len(facts):
                raise InfrastructureError(f"{features}: {begin:,} rows, {table.parquet.name} has {len(facts):,}")
            starts.append(starts[-1] + begin)

    texts = [(name, pa.string()) for name in _TEXTS]
    _write_parquet(options, pa.schema([*texts, ("cosine", pa.float32()), ("nearest", pa.int64())]), blocks())
    if options.keep is not None:
        _write_keep(options.keep, tables, np.array(starts), np.concatenate(left))
    others.close()
    return {**counts, "embeddings": len(others), "left": counts["samples"] - counts["near"] - counts["without_feature"]}


# ---- tables


def _read(table: ShardTable, numbers: Sequence[str] = ()) -> Any:
    """Returns uid, key and tar as texts (null where the table has no such column), and ``numbers`` as doubles."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = _columns(table)
    try:
        found = pq.read_table(table.parquet, columns=[n for n in (*_TEXTS, *numbers) if n in names], partitioning=None)
        empty = pa.nulls(_row_count(table), pa.string())
        texts = [found[name].cast(pa.string()) if name in names else empty for name in _TEXTS]
        return pa.table([*texts, *(found[name].cast(pa.float64()) for name in numbers)], [*_TEXTS, *numbers])
    except (OSError, pa.ArrowException) as error:
        raise InfrastructureError(f"{table.parquet}: cannot be read: {error}") from None


def _row_count(table: ShardTable) -> int:
    return int(_metadata(table).num_rows)


def _columns(table: ShardTable) -> set[str]:
    return set(_metadata(table).schema.to_arrow_schema().names)


def _metadata(table: ShardTable) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(table.parquet)
    except (OSError, pa.ArrowException) as error:
        raise InfrastructureError(f"{table.parquet}: cannot be read: {error}") from None


def _write_parquet(options: Options, schema: Any, blocks: Iterator[Any]) -> None:
    """Writes the parquet, with feature and threshold in the schema's metadata."""
    import pyarrow.parquet as pq

    schema = schema.with_metadata({"feature": options.feature, "threshold": repr(options.threshold)})
    make_folder(options.out.parent)
    with (
        storage_errors(options.out),
        whole_file(options.out) as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for block in blocks:
            writer.write_table(block.cast(schema))


def _write_keep(path: Path, tables: FolderTables, starts: NDArray[np.int64], left: NDArray[np.bool_]) -> None:
    kept: list[Uids] = [np.empty(0, UID_DTYPE)]
    for number, table in enumerate(tables.tables):
        uids, bad = parse_uids(_read(table)["uid"].combine_chunks())
        wanted = left[starts[number] : starts[number + 1]]
        if (bad & wanted).any():
            raise InfrastructureError(f"{table.parquet}: rows without a uid of 32 hexadecimal digits; leave --keep out")
        kept.append(uids[wanted])
    write_subset(path, [sort_uids(np.concatenate(kept))])
