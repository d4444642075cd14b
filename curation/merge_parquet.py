"""One parquet file out of those of all shards, in their order, once none is pending."""

from __future__ import annotations

import csv
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from curation.jsonio import dump_json
from curation.ledger import Ledger
from curation.plan import planned

logger = logging.getLogger("curation")

_MARK = b"parts"
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for a formula (OWASP, CSV injection)


def merge_parquet(
    ledger: Ledger, part_of: Callable[[str], str], name: str, beside: Callable[[Path], None] | None = None
) -> bool:
    """``name`` in the stage's output folder, out of each shard's ``part_of(shard id)``; whether it is there.

    Whoever comes last makes it, and it appears whole; where it is there already, of the same parts, it is left alone.
    A column that is not of one type in all parts becomes text.
    beside: makes what else is to be made of the file, before it appears.
    """
    import pyarrow
    from pyarrow import parquet

    ledger.load_epochs()
    parts = []
    for shard_id in sorted(planned(ledger.root, ledger.stage)):
        receipt = ledger.receipt(shard_id)
        current = receipt is not None and receipt.get("epoch") == ledger.governing(shard_id).number
        if receipt is None or not current or receipt.get("status") not in ("done", "failed"):
            return False
        part = part_of(shard_id)
        parts += [(part, out["digest"]) for out in receipt.get("outputs", []) if out["path"] == part]
    if not parts:
        return False
    mark = xxhash.xxh3_128_hexdigest(dump_json(parts)).encode()
    target = ledger.root / name
    if target.is_file() and (parquet.read_schema(target).metadata or {}).get(_MARK) == mark:
        return True
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    paths = [ledger.root / part for part, _ in parts]
    try:
        schema = _common_schema([parquet.read_schema(path) for path in paths]).with_metadata({_MARK: mark})
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for path in paths:
                writer.write_table(_aligned(parquet.read_table(path, partitioning=None), schema))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if beside is not None:
            beside(temporary)
        os.replace(temporary, target)
    except (OSError, pyarrow.ArrowException) as error:  # a shard is being done again: whoever does it comes here too
        logger.warning(f"{target}: not written: {error}")
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def write_csv(source: Path, target: Path, columns: Sequence[str], keep: Callable[[dict[str, Any]], bool]) -> None:
    """Some columns of a parquet file, of the rows that ``keep`` wants, as a csv that no spreadsheet runs."""
    from pyarrow.parquet import ParquetFile

    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with ParquetFile(source) as file, open(temporary, "w", encoding="utf-8", newline="") as text:
            writer = csv.writer(text)
            there = [name for name in columns if name in file.schema_arrow.names]
            writer.writerow(there)
            for batch in file.iter_batches(4096):
                writer.writerows([_cell(row[name]) for name in there] for row in batch.to_pylist() if keep(row))
            text.flush()
            os.fsync(text.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        value = value.replace("\0", "")
        return f"'{value}" if value.startswith(_FORMULA_STARTS) else value
    return "" if value is None else value


def _common_schema(schemas: Sequence[Any]) -> Any:
    import pyarrow

    names = dict.fromkeys(name for schema in schemas for name in schema.names)
    fields = []
    for name in names:
        kinds = {schema.field(name).type for schema in schemas if name in schema.names}
        try:
            alone = [pyarrow.schema([(name, kind)]) for kind in sorted(kinds, key=str)]
            kind = pyarrow.unify_schemas(alone, promote_options="permissive").field(name).type
        except pyarrow.ArrowException:
            kind = pyarrow.string()
        fields.append((name, kind))
    return pyarrow.schema(fields)


def _aligned(table: Any, schema: Any) -> Any:
    import pyarrow

    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pyarrow.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        if column.type != field.type:
            try:
                column = column.cast(field.type)
            except pyarrow.ArrowException:
                values = [None if value is None else str(value) for value in column.to_pylist()]
                column = pyarrow.array(values, pyarrow.string())
        columns.append(column)
    return pyarrow.Table.from_arrays(columns, schema=schema)
