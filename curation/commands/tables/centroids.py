"""``curation centroids FOLDER`` clusters image features, for ``select --baseline image_based --centroids FILE``.

It is DataComp's ``baselines/image_based_clustering.py``: k-means of faiss on the features of the rows that pass the
caption filter, in single precision, by Euclidean distance.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from curation.commands.tables import captions
from curation.commands.tables.baselines import Baseline, BaselineOptions, open_tests
from curation.commands.tables.clusters import FEATURE
from curation.commands.tables.missing import what_is_missing
from curation.commands.tables.similarity import BLOCK_ROWS, Rows, Vectors, feature_blocks, feature_shape
from curation.commands.tables.tables import FolderTables, ShardTable, check_columns, find_tables, with_features
from curation.errors import EXIT_OK, InfrastructureError, UsageError, install
from curation.options import POSITIONAL, at_least, between, exit_code, parse_arguments
from curation.storage.files import make_folder, storage_errors, whole_file

_MIN_CHARACTERS = 6
_MAX_POINTS = 10_000_000  # of a cluster: faiss leaves out none below that, as DataComp has it


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make the centroids of the clusters of a folder's image features."""

    folder: Annotated[Path, POSITIONAL]
    """The folder of tables and features: stage 06's output, or DataComp's own parquet and npz files."""
    out: Path
    """The .npy to write: one centroid a row, float32."""
    clusters: Annotated[int, at_least(1)] = 100_000
    """How many; DataComp has 100,000 for every pool."""
    rounds: Annotated[int, at_least(1)] = 20
    """Rounds of k-means."""
    sample: Annotated[float, between(0, 1)] = 1.0
    """The share of the rows that is clustered, by a hash of seed and uid.  DataComp: 0.3 for large, 0.03 for xlarge."""
    seed: int = 0
    """Of the first centroids and of the sample."""
    feature: str = FEATURE
    """The feature of the npz files."""
    caption_filter: bool = True
    """Only rows whose caption passes as in image_based: English, more than one token, more than 5 characters."""
    lid_model: str | None = None
    """fastText's language model, as in `select`."""
    json: bool = False
    """One JSON object on one line instead of text."""


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(Options, argv, "centroids")
    if options.lid_model is not None and not options.caption_filter:
        raise UsageError("--lid_model goes with the caption filter only")
    began = time.monotonic()
    tables = find_tables(options.folder)
    for warning in tables.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    check_columns(tables.tables, "--sample" if options.sample < 1 else "")
    result = _cluster(options, tables)
    result["seconds"] = round(time.monotonic() - began, 3)
    if options.json:
        print(orjson.dumps(result).decode())
    else:
        print(f"{result['out']}: {result['clusters']:,} centroids of {result['rows']:,} rows")
    return EXIT_OK


def _cluster(options: Options, tables: FolderTables) -> dict[str, Any]:
    faiss = _import_faiss()
    tests = _text_tests(options)
    make_folder(options.out.parent)
    with tempfile.TemporaryDirectory(prefix=f".{options.out.name}.", dir=options.out.parent) as scratch:
        vectors = Vectors(Path(scratch) / "rows.f32")
        try:
            for table, features in with_features(tables.tables, options.folder, options.feature):
                for rows in _chosen(table, features, options, tests):
                    vectors.append(rows)
            if len(vectors) < options.clusters:
                raise UsageError(
                    f"--clusters {options.clusters:,}: only {len(vectors):,} rows pass and have features; choose fewer"
                )
            centroids = _means(vectors, options, faiss)
        finally:
            vectors.close()
        count = len(vectors)
    content = io.BytesIO()
    np.save(content, centroids)
    with storage_errors(options.out), whole_file(options.out) as file:
        file.write(content.getvalue())
    return {"out": str(options.out), "clusters": len(centroids), "rows": count, "warnings": list(tables.warnings)}


def _text_tests(options: Options) -> list[captions.TextTest]:
    """The caption filter of image_based; none without ``caption_filter``."""
    if not options.caption_filter:
        return []
    asked = BaselineOptions(baseline="basic", lid_model=options.lid_model)
    tests = open_tests(Baseline("true", ("english", "tokens")), asked)
    for note in tests.notes:
        print(f"note: {note}", file=sys.stderr)
    return [_long_enough, *tests.texts]


def _long_enough(captions: Sequence[str]) -> NDArray[np.bool_]:
    return np.array([len(caption) >= _MIN_CHARACTERS for caption in captions], bool)


def _chosen(table: ShardTable, features: Path, options: Options, tests: Sequence[captions.TextTest]) -> Iterator[Rows]:
    """Yields the features of a table's rows that are to be clustered, in the table's order."""
    count = _count(table)
    if feature_shape(features, options.feature)[0] != count:
        raise InfrastructureError(
            f"{features}: has not as many rows as {table.parquet.name}: they do not belong together"
        )
    uids = _column(table, ("uid",)) if options.sample < 1 else None
    texts = _column(table, ("text", "caption")) if tests else None
    for block in feature_blocks(features, options.feature):
        places = np.flatnonzero(np.isfinite(block).all(axis=1))
        if uids is not None:
            drawn = np.array([_is_drawn(uid, options) for uid in islice(uids, len(block))], bool)
            places = places[drawn[places]]
        if texts is not None:
            read = list(islice(texts, len(block)))
            places = np.array([place for place in places if read[place] is not None], np.int64)
            for test in tests:
                places = places[test([read[place] for place in places])] if len(places) else places
        if len(places):
            yield block[places]


def _is_drawn(uid: Any, options: Options) -> bool:
    return xxhash.xxh3_64_intdigest(f"{options.seed} {uid}".encode()) < options.sample * 2**64


def _count(table: ShardTable) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(table.parquet).num_rows)


def _column(table: ShardTable, names: Sequence[str]) -> Iterator[Any]:
    """The values of the first of the columns ``names`` that a table has, a block in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(table.parquet) as file:
            name = next((name for name in names if name in file.schema_arrow.names), None)
            if name is None:
                raise UsageError(f"{table.parquet}: {what_is_missing('column', names[:1], file.schema_arrow.names)}")
            for batch in file.iter_batches(BLOCK_ROWS, columns=[name]):
                yield from batch.column(0).cast(pa.string()).to_pylist()
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InfrastructureError(f"{table.parquet}: cannot be read: {error}") from None


def _means(vectors: Vectors, options: Options, faiss: Any) -> Rows:
    clustering = faiss.Clustering(vectors.width, options.clusters)
    clustering.niter, clustering.seed = options.rounds, options.seed
    clustering.max_points_per_centroid = _MAX_POINTS
    clustering.min_points_per_centroid = 1  # it would warn below 39
    index = faiss.IndexFlatL2(vectors.width)
    if getattr(faiss, "get_num_gpus", int)():
        index = faiss.index_cpu_to_all_gpus(index)
    clustering.train(vectors.mapped(), index)
    centroids = faiss.vector_float_to_array(clustering.centroids).reshape(options.clusters, vectors.width)
    return np.asarray(centroids, np.float32)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise InfrastructureError(f"this needs the package faiss: {install('faiss')}") from None
    return faiss
