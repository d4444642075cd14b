"""Tables as text: csv, tsv, jsonl and txt, read in a stream and written as parquet.

A csv has no types: its columns stay text, so that ``000123`` does not become a number.  In jsonl a column has the type
that all its values share; where they share none it holds each as JSON.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from curation.errors import SampleError, UsageError
from curation.jsonio import parse_json_object

_MAX_LINE_BYTES: Final = 4 << 20
_BATCH_ROWS: Final = 4096
_MAX_COLUMNS: Final = 10_000
_Row = Mapping[str, Any]


def columns_of(source: str, file: BinaryIO) -> Any:
    """The pyarrow schema; None for a table without rows.  Raises UsageError that names the line."""
    import pyarrow

    if not _is_jsonl(source):
        rows = _rows(source, file)
        first = next(rows, None)
        return None if first is None else pyarrow.schema([(name, pyarrow.string()) for name in first])
    types: dict[str, Any] = {}
    for batch in _batches(_rows(source, file)):
        for name in {name: None for row in batch for name in row}:
            types[name] = _common(types.get(name), [row.get(name) for row in batch])
        if len(types) > _MAX_COLUMNS:
            raise UsageError(f"{source}: more than {_MAX_COLUMNS:,} different keys")
    return pyarrow.schema(list(types.items())) if types else None


def count_rows(source: str, file: BinaryIO) -> int:
    return sum(1 for _ in _rows(source, file))


def write_parquet(source: str, file: BinaryIO, schema: Any, path: Path, rows_per_group: int) -> int:
    """The table as parquet with groups of so many rows; returns how many rows."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    count = 0
    with ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in _batches(_rows(source, file), rows_per_group):
            columns = [_array(field.type, [row.get(field.name) for row in batch]) for field in schema]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema), row_group_size=rows_per_group)
            count += len(batch)
    return count


def _rows(source: str, file: BinaryIO) -> Iterator[_Row]:
    if _is_jsonl(source):
        yield from _json_rows(source, file)
    elif _plain(source).endswith(".txt"):
        yield from ({"url": line.decode("utf-8", "replace")} for _, line in _lines(source, file))
    else:
        yield from _csv_rows(source, file)


def _is_jsonl(source: str) -> bool:
    return _plain(source).endswith((".jsonl", ".ndjson"))


def _plain(source: str) -> str:
    return source.removesuffix("?…").removesuffix(".gz")


def _lines(source: str, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The numbered lines that hold something."""
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
            raise UsageError(f"{source}, line {number}: longer than {_MAX_LINE_BYTES:,} bytes")
        if line := line.strip().removeprefix(b"\xef\xbb\xbf"):
            yield number, line


def _json_rows(source: str, file: BinaryIO) -> Iterator[_Row]:
    for number, line in _lines(source, file):
        try:
            yield parse_json_object(line)
        except SampleError as error:
            raise UsageError(f"{source}, line {number}: {error}") from None


def _csv_rows(source: str, file: BinaryIO) -> Iterator[_Row]:
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    tabs = _plain(source).endswith(".tsv")
    reader = csv.reader(text, delimiter="\t" if tabs else ",", strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise UsageError(f"{source}: two columns have one name: {', '.join(names)[:500]}")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(names):
                raise UsageError(
                    f"{source}, line {reader.line_num}: {len(fields)} fields, but the first line names {len(names)}"
                )
            yield dict(zip(names, fields, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{source}, line {reader.line_num}: {error}") from None


def _batches(rows: Iterator[_Row], size: int = _BATCH_ROWS) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _common(known: Any, values: list[Any]) -> Any:
    """The type that holds these values and those of the type that is known already; text where there is none."""
    import pyarrow

    try:
        here = pyarrow.array(values).type
        if known is None:
            return here
        fields = [pyarrow.schema([("x", kind)]) for kind in (known, here)]
        return pyarrow.unify_schemas(fields, promote_options="permissive").field("x").type
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        return pyarrow.string()


def _array(kind: Any, values: list[Any]) -> Any:
    import pyarrow

    if pyarrow.types.is_string(kind):
        values = [value if value is None or isinstance(value, str) else _as_json(value) for value in values]
        values = [None if value is None else value.encode("utf-8", "replace").decode() for value in values]
    return pyarrow.array(values, kind)


def _as_json(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # an integer beyond 64 bits
        return str(value)
