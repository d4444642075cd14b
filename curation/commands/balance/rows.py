"""``select --balance``: of the rows of the tables, fewer of what is frequent, by concepts or by clusters.

Every choice derives from the seed and the uid of a row, so that it depends neither on the order of the rows nor on how
they are spread over shards.  Rows are read in blocks; what has to be kept of each row lies in a scratch folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from curation.commands.tables.similarity import BLOCK_ROWS, Rows, feature_blocks
from curation.commands.tables.tables import ShardTable
from curation.errors import InfrastructureError, UsageError
from curation.jsonio import clean_text
from curation.reshard.uids import Subset, Uids, parse_uids

Keep = Literal["hard", "easy", "random"]
LARGEST = 20  # entries or clusters that are told of
_TEXTS = ("caption", "text")


@dataclass(frozen=True, slots=True)
class BalanceRows:
    """The rows that are balanced.

    Attributes:
        tables: Where they are.
        within: Only rows with these uids; None for all.
        skip_bad_uids: Whether rows without a uid are left out; otherwise one is an error.
        counts: ``rows`` of all tables, ``bad_uids``, and ``balanced``: the rows that are looked at.
    """

    tables: Sequence[ShardTable]
    within: Subset | None
    skip_bad_uids: bool
    counts: dict[str, int] = field(default_factory=lambda: {"rows": 0, "bad_uids": 0, "balanced": 0})

    def row_count(self) -> int:
        """How many rows the tables have."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        count = 0
        for table in self.tables:
            try:
                count += pq.read_metadata(table.parquet).num_rows
            except (OSError, pa.ArrowException) as error:
                raise InfrastructureError(f"{table.parquet}: cannot be read: {error}") from None
        return count

    def with_captions(self) -> Iterator[tuple[Uids, list[str | None]]]:
        """Yields blocks of uids with the captions of the same rows."""
        for table in self.tables:
            for batch, uids, wanted in self._blocks(table, _TEXTS):
                name = next((name for name in _TEXTS if name in batch.schema.names), None)
                if name is None:
                    raise UsageError(
                        f"{table.parquet}: has no column caption or text, which --balance concepts needs; stage 06 "
                        "makes it with --additional_fields uid,caption"
                    )
                captions: list[str | None] = batch.column(name).to_pylist()
                yield uids[wanted], [text for text, is_wanted in zip(captions, wanted, strict=True) if is_wanted]

    def with_features(self, features: Sequence[Path], feature: str) -> Iterator[tuple[Uids, Rows]]:
        """Yields blocks of uids with the features of the same rows.  features: the npz of each table."""
        for table, path in zip(self.tables, features, strict=True):
            given = feature_blocks(path, feature)
            vectors = np.empty((0, 0), np.float32)
            for _, uids, wanted in self._blocks(table, ()):
                while len(vectors) < len(uids) and (block := next(given, None)) is not None:
                    vectors = np.concatenate([vectors, block]) if len(vectors) else block
                if len(vectors) < len(uids):
                    raise InfrastructureError(f"{path}: has fewer rows than {table.parquet.name}; run the stage again")
                yield uids[wanted], vectors[: len(uids)][wanted]
                vectors = vectors[len(uids) :]
            if len(vectors) or next(given, None) is not None:
                raise InfrastructureError(f"{path}: has more rows than {table.parquet.name}; run the stage again")

    def _blocks(self, table: ShardTable, texts: Sequence[str]) -> Iterator[tuple[Any, Uids, NDArray[np.bool_]]]:
        """Yields record batches with their uids, and which rows are wanted."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(table.parquet)
            there = [name for name in ("uid", *texts) if name in file.schema_arrow.names]
            if "uid" not in there:
                raise UsageError(f"{table.parquet}: has no column uid, which --balance needs")
            for batch in file.iter_batches(BLOCK_ROWS, columns=there):
                uids, bad = parse_uids(batch.column("uid").cast(pa.string()))
                self._look_at(table, batch, bad)
                wanted = ~bad
                if self.within is not None:
                    wanted &= self.within.has(uids)
                self.counts["rows"] += len(uids)
                self.counts["balanced"] += int(wanted.sum())
                yield batch, uids, wanted
        except (OSError, pa.ArrowException) as error:
            raise InfrastructureError(f"{table.parquet}: cannot be read: {error}") from None

    def _look_at(self, table: ShardTable, batch: Any, bad: NDArray[np.bool_]) -> None:
        self.counts["bad_uids"] += int(bad.sum())
        if bad.any() and not self.skip_bad_uids:
            shown = clean_text(str(batch.column("uid")[int(bad.argmax())].as_py()))[:60]
            raise InfrastructureError(
                f"{table.parquet}: rows without a uid of 32 hexadecimal digits, such as {shown!r}; --skip_bad_uids "
                "leaves them out"
            )


def hashes(uids: Uids, seed: int) -> NDArray[np.uint64]:
    """A number for each uid that depends on nothing but it and the seed: xxh3-64 of its 16 bytes, in little endian."""
    data = np.ascontiguousarray(uids).view(np.uint64).astype("<u8").tobytes()
    digest, start = xxhash.xxh3_64_intdigest, seed & ((1 << 64) - 1)
    found = [digest(data[place : place + 16], start) for place in range(0, len(data), 16)]
    return np.array(found, np.uint64)


def draws(uids: Uids, seed: int) -> NDArray[np.float64]:
    """The hashes as numbers from 0 to 1, without 1."""
    return (hashes(uids, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class KeptUids:
    """Writes the uids that stay, block by block, to a table in the scratch folder that the query then sorts."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        self.count = 0
        self._schema = pa.schema([("uid", pa.string())])
        self._writer = pq.ParquetWriter(path, self._schema)

    def add(self, uids: Uids) -> None:
        import pyarrow as pa

        if len(uids):
            digits = np.ascontiguousarray(uids).view(np.uint64).astype(">u8").tobytes().hex()
            texts = [digits[place : place + 32] for place in range(0, len(digits), 32)]
            self._writer.write_table(pa.table([pa.array(texts, pa.string())], schema=self._schema))
            self.count += len(uids)

    def close(self) -> None:
        self._writer.close()


@dataclass(frozen=True, slots=True)
class Balanced:
    """What came of it.

    Attributes:
        kept: The table of the uids that stay.
        told: Counts, for the user.
        report: A column for each fact about each entry or cluster, the largest first.
    """

    kept: Path
    told: Mapping[str, Any]
    report: Mapping[str, Any]

    def largest(self) -> list[dict[str, Any]]:
        """The first rows of the report."""
        names = [*self.report]
        rows = zip(*(self.report[name][:LARGEST] for name in names), strict=True)
        return [dict(zip(names, (_plain(cell) for cell in row), strict=True)) for row in rows]

    def write_report(self, path: Path) -> None:
        """Writes the report as a parquet table, whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from curation.storage.files import make_folder, storage_errors, whole_file

        make_folder(path.parent)
        with storage_errors(path), whole_file(path) as file:
            pq.write_table(pa.table(dict(self.report)), file, compression="zstd")


def _plain(cell: Any) -> Any:
    return cell.item() if isinstance(cell, np.generic) else cell
