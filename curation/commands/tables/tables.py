"""Finds the tables in a folder: those of a stage's finished shards, or tables that were made elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.commands.tables.missing import what_is_missing
from curation.errors import InfrastructureError, UsageError
from curation.jsonio import clean_text, repeated
from curation.run.ledger import done_receipts
from curation.run.records import place_of

_READING_THREADS = 16  # a shared filesystem answers them at once
_SUFFIX, _FEATURES = ".parquet", ".npz"


@dataclass(frozen=True, slots=True)
class ShardTable:
    """A shard's table, and its features where the stage wrote any."""

    shard_id: str
    parquet: Path
    features: Path | None = None


@dataclass(frozen=True, slots=True)
class FolderTables:
    """tables: in the order of the shards.  warnings: what was left out, in whole sentences.  stage: whose receipts name
    the tables; "" where they were made elsewhere."""

    tables: tuple[ShardTable, ...]
    warnings: tuple[str, ...] = ()
    stage: str = ""


def find_tables(folder: Path) -> FolderTables:
    """Returns the tables in ``folder``.

    Where a stage has its receipts there, they are the tables that its done receipts name.  Otherwise (the tables were
    made elsewhere, such as DataComp's) they are every ``*.parquet`` in it.

    Raises:
        UsageError: There are no tables.
        InfrastructureError: A table does not have the size that its receipt says.
    """
    if folder.is_file():
        raise UsageError(f"{folder}: a file; give its folder, whose tables are read")
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    stages = _stages(folder)
    found = [_of_stage(folder, stage) for stage in stages]
    found = [tables for tables in found if tables.tables]
    if len(found) > 1:
        raise UsageError(f"{folder}: several stages wrote tables here ({', '.join(stages)}); give a folder of one")
    if stages and not found:
        raise UsageError(f"{folder}: no shard with a table is done here (stages: {', '.join(stages)})")
    tables = found[0] if found else _made_elsewhere(folder)
    if not tables.tables:
        raise UsageError(f"{folder}: there is no *{_SUFFIX} in it, and no receipt of a stage that writes some")
    return tables


def _stages(folder: Path) -> list[str]:
    """Returns the stages whose receipts are in the folder itself."""
    try:
        entries = sorted(entry.name for entry in os.scandir(folder / "_receipts") if entry.is_dir())
    except FileNotFoundError:
        return []
    return [name for name in entries if not (folder / "_receipts" / name / "_home.json").exists()]


def _of_stage(folder: Path, stage: str) -> FolderTables:
    tables, named, not_done = [], set(), 0
    for receipt in done_receipts(folder, stage):
        if receipt.get("status") != "done":
            not_done += 1
            continue
        outputs = {str(output["path"]): output for output in receipt.get("outputs", [])}
        for path in sorted(outputs):
            if path.endswith(_SUFFIX) and not path.startswith("_"):
                features = path.removesuffix(_SUFFIX) + _FEATURES
                table = ShardTable(
                    str(receipt["shard"]),
                    _whole(folder, stage, receipt, outputs[path]),
                    _whole(folder, stage, receipt, outputs[features]) if features in outputs else None,
                )
                tables.append(table)
                named.add(table.parquet)
    warnings = [f"{not_done:,} shards are not done: they failed or will be retried"] if not_done else []
    strays = sorted(path for parent in {path.parent for path in named} for path in _parquets(parent) - named)
    if strays:
        first = clean_text(str(strays[0]))
        warnings.append(f"ignored {len(strays):,} tables that no done receipt names (the first: {first})")
    in_order = sorted(tables, key=lambda table: (table.shard_id, table.parquet))
    return FolderTables(tuple(in_order), tuple(warnings), stage)


def _whole(folder: Path, stage: str, receipt: dict[str, Any], output: dict[str, Any]) -> Path:
    path = folder / str(output["path"])
    try:
        size = path.stat().st_size
    except OSError as error:
        if (there := place_of(folder, stage, receipt, output)) is not None:
            raise InfrastructureError(
                f"{path}: it was removed after its upload; copy the tables back from {there} and its like"
            ) from None
        raise InfrastructureError(f"{path}: {error.strerror}, but its receipt is there; run the stage again") from None
    if size != output["size"]:
        raise InfrastructureError(
            f"{path}: has {size:,} bytes, its receipt says {output['size']:,}; run the stage again for this shard"
        )
    return path


def _made_elsewhere(folder: Path) -> FolderTables:
    tables = []
    for path in sorted(_parquets(folder)):
        features = path.with_suffix(_FEATURES)
        tables.append(ShardTable(path.stem, path, features if features.is_file() else None))
    return FolderTables(tuple(tables))


def _parquets(folder: Path) -> set[Path]:
    with os.scandir(folder) as entries:
        return {folder / e.name for e in entries if e.name.endswith(_SUFFIX) and e.name[0] not in "._" and e.is_file()}


def check_columns(tables: Sequence[ShardTable], needs_uid: str = "") -> None:
    """Look at the columns of all tables before anything is computed or written.

    Args:
        tables: The tables.
        needs_uid: What needs a column ``uid``, for the message; "" if nothing does.

    Raises:
        UsageError: A table has two columns of one name, or no column ``uid``.
        InfrastructureError: A table cannot be read.
    """
    with ThreadPoolExecutor(_READING_THREADS) as threads:
        for table, names in zip(tables, threads.map(_column_names, tables), strict=True):
            if doubles := repeated(names):
                raise UsageError(f"{table.parquet}: two columns have the name {clean_text(doubles[0])!r}; rename one")
            if needs_uid and "uid" not in names:
                raise UsageError(f"{table.parquet}: has no column uid, which {needs_uid} needs")


def _column_names(table: ShardTable) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(table.parquet).names)
    except (OSError, pa.ArrowException) as error:
        raise InfrastructureError(f"{table.parquet}: cannot be read: {error}") from None


def with_features(tables: Sequence[ShardTable], folder: Path, feature: str) -> Iterator[tuple[ShardTable, Path]]:
    """Yields each table with the file of its features, of which ``feature`` is wanted.

    Raises:
        InfrastructureError: A table has none.
    """
    for table in tables:
        if table.features is None:
            lack = what_is_missing("feature", [feature], [])
            raise InfrastructureError(f"{folder}: shard {table.shard_id} has no {table.parquet.stem}.npz: {lack}")
        yield table, table.features
