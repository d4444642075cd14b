"""Tables of URLs: found, checked once, and cut into shards, without ever holding a whole table.

A shard is a run of rows of one table.  Parquet is read where it lies, one row group at a time.  csv, tsv, jsonl and txt
cannot be read from the middle, so they are written once as parquet below ``_tables/`` of the output folder, where a
shard is a row group.  Only ``_Place`` opens files, because a table may lie in any store.

A csv has no types: its columns stay text, so that ``000123`` does not become a number.  In jsonl a column has the type
that all its values share; where they share none, it holds each value as JSON.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson
import xxhash

from curation.errors import InfrastructureError, SampleError, ShardError, UsageError
from curation.jsonio import clean_text, dump_json, parse_json_object, repeated
from curation.shards import MAX_SHARDS, Shard
from curation.storage.files import link_exclusively, make_folder, read_record, whole_file
from curation.storage.urls import HTTP, PIPE, Url, error_line, filesystem, is_remote, object_info, redact

SUFFIXES: Final = (
    ".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".txt", ".txt.gz",
)  # fmt: skip
TABLES_FOLDER: Final = "_tables"
_FOOTERS_AT_ONCE = 16
_BATCH_ROWS = 4096
_RULES = 1  # how a table is read: raised when the same table gives other shards
_USUAL_CAPTION_COLUMNS = ("caption", "text")
_USUAL_URL_COLUMNS = ("url", "image_url", "img_url", "image_link", "link", "src")
_MAX_LINE_BYTES: Final = 4 << 20
_TEXT_BATCH_ROWS: Final = 4096
_MAX_COLUMNS: Final = 10_000

_Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class UrlTable:
    """One table.

    Attributes:
        source: Its path or URL.
        mark: A digest that changes when the table does.
        rows: How many it has.
        file: Its name as parquet in ``_tables/``, "" where the table itself is read.
    """

    source: str
    mark: str
    rows: int
    file: str = ""


@dataclass(frozen=True, slots=True)
class NamedColumns:
    """The columns that the user named; None for the one that is usually called so, or for no hash."""

    url: str | None = None
    caption: str | None = None
    hash: str | None = None


class UrlTables:
    """URL tables, cut into shards.

    Args:
        source: A table, a folder of tables or a glob, on this machine or behind a URL.
        output: The stage's output folder.
        rows_per_shard: Rows of a full shard.
        columns: The columns that the user named.
        dry: Write nothing.

    Raises:
        UsageError: Something is not a table of URLs, or there are too many shards.
        InfrastructureError: A store cannot be asked.
    """

    def __init__(
        self, source: str, output: Path, rows_per_shard: int, columns: NamedColumns, *, dry: bool = False
    ) -> None:
        self._output = output
        self._rows = rows_per_shard
        self._columns = columns
        self._place = _Place(source)
        self.tables = self._dry_plan() if dry else self._plan()
        if not any(table.rows for table in self.tables):
            raise UsageError(f"{redact(source)}: no rows in {_named(self.tables)}")
        if sum(-(-table.rows // rows_per_shard) for table in self.tables) > MAX_SHARDS:
            raise UsageError(f"{redact(source)}: more than {MAX_SHARDS:,} shards of {rows_per_shard:,} rows")

    @property
    def is_local(self) -> bool:
        return self._place.is_local

    @cached_property
    def _starts(self) -> dict[str, tuple[UrlTable, int]]:
        """Shard id → its table and first row there."""
        found: dict[str, tuple[UrlTable, int]] = {}
        for table in self.tables:
            for first in range(0, table.rows, self._rows):
                found[f"{len(found):08d}"] = (table, first)
        return found

    def shards(self) -> list[Shard]:
        """The shards in the order of the tables' names, and then of the rows."""
        return [Shard(shard_id, Path(table.source)) for shard_id, (table, _) in self._starts.items()]

    def digest(self) -> str:
        """A text that changes when other rows make up a shard: it is made of the tables' names and numbers of rows."""
        tables = [[_plain(table.source).rpartition("/")[2], table.rows] for table in self.tables]
        return f"{len(tables)} tables, {sum(t.rows for t in self.tables)} rows, {_digest([tables, self._rows])[:12]}"

    def read(self, shard_id: str) -> Any:
        """The rows of a shard as a pyarrow Table.  Raises ShardError."""
        table, first = self._starts[shard_id]
        count = min(self._rows, table.rows - first)
        try:
            with self._open_parquet(table) as file:
                rows = _rows_of(file, first, count)
        except Exception as error:
            raise ShardError(f"{redact(table.source)}: cannot be read: {error_line(error)}", "bad_table") from error
        if rows.num_rows != count:
            why = f"{rows.num_rows:,} rows from {first:,} on, {count:,} expected"
            raise ShardError(f"{redact(table.source)}: {why}", "bad_table")
        return rows

    @contextlib.contextmanager
    def _open_parquet(self, table: UrlTable) -> Iterator[Any]:
        from pyarrow.parquet import ParquetFile

        if table.file:
            with ParquetFile(self._output / TABLES_FOLDER / table.file) as file:
                yield file
        else:
            with self._place.open(table.source) as raw, ParquetFile(raw) as file:
                yield file

    # ---- planning

    def _plan(self) -> list[UrlTable]:
        """What an earlier process recorded of the same tables; else each of them is inspected."""
        found = self._place.find()
        record = self._output / TABLES_FOLDER / f"{_digest([_RULES, found, self._rows, asdict(self._columns)])}.json"
        known = read_record(record)
        if known is not None:
            return [UrlTable(source, **table) for (source, _), table in zip(found, known["tables"], strict=True)]
        make_folder(record.parent)
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            tables = list(pool.map(lambda entry: self._inspect(*entry), found))
        entries = [{"mark": table.mark, "rows": table.rows, "file": table.file} for table in tables]
        link_exclusively(record, dump_json({"tables": entries}, indent=True))  # no names: a URL may hold a secret
        return tables

    def _dry_plan(self) -> list[UrlTable]:
        """The tables with their numbers of rows; nothing is written."""
        return [self._inspect(source, mark, write=False) for source, mark in self._place.find()]

    def _inspect(self, source: str, mark: str, *, write: bool = True) -> UrlTable:
        shown = redact(source)
        try:
            if _plain(source).endswith(".parquet"):
                from pyarrow.parquet import ParquetFile

                with self._place.open(source) as raw, ParquetFile(raw) as file:
                    self._check(shown, file.schema_arrow)
                    return UrlTable(source, mark, file.metadata.num_rows)
            with self._place.open_text(source) as text:
                schema = columns_of(shown, text)
            if schema is None:
                return UrlTable(source, mark, 0)
            self._check(shown, schema)
            if not write:
                with self._place.open_text(source) as text:
                    return UrlTable(source, mark, count_rows(shown, text))
            name = f"{_digest([_RULES, _plain(source), mark, self._rows])}.parquet"
            with whole_file(self._output / TABLES_FOLDER / name) as file, self._place.open_text(source) as text:
                rows = write_parquet(shown, text, schema, file, self._rows)
            return UrlTable(source, mark, rows, name)
        except InfrastructureError:
            raise
        except Exception as error:
            raise UsageError(f"{shown}: cannot be read as a table: {error_line(error)}") from error

    def _check(self, source: str, schema: Any) -> None:
        wanted = self._columns
        check_names(source, schema.names)
        if wanted.hash is not None:
            _column(source, schema.names, wanted.hash, "--verify_hash")
        caption_column_of(source, schema.names, wanted.caption)
        name = url_column_of(source, schema.names, wanted.url)
        kind = str(schema.field(name).type)
        if "string" not in kind and kind != "null":
            raise UsageError(f"{source}: the column {name!r} holds {kind}, not text; name another one with --url_col")


def check_names(source: str, names: Iterable[str]) -> None:
    """Raise UsageError for a table with two columns of one name, of which nobody can say which one is meant."""
    if doubles := repeated(names):
        raise UsageError(f"{source}: two columns have the name {clean_text(doubles[0])[:60]!r}; rename one of them")


def caption_column_of(source: str, names: Sequence[str], wanted: str | None) -> str | None:
    """The column of captions, None for a table without one.  Raises UsageError where the named one is missing."""
    if wanted is not None:
        return _column(source, names, wanted, "--caption_col")
    return next((name for known in _USUAL_CAPTION_COLUMNS for name in names if name.lower() == known), None)


def url_column_of(source: str, names: Sequence[str], wanted: str | None) -> str:
    """The column of URLs.  Raises UsageError that lists the columns and names the nearest."""
    if wanted is None:
        found = (name for known in _USUAL_URL_COLUMNS for name in names if name.lower() == known)
        wanted = next(found, "url")
    return _column(source, names, wanted, "--url_col")


def _column(source: str, names: Sequence[str], wanted: str, flag: str) -> str:
    if wanted in names:
        return wanted
    near = difflib.get_close_matches(wanted.lower(), [name.lower() for name in names], 1, 0.5)
    nearest = next((name for name in names if near and name.lower() == near[0]), None)
    listed = ", ".join(clean_text(name)[:60] for name in names[:50]) or "none"
    hint = f"did you mean {flag} {nearest}?" if nearest else f"name it with {flag}"
    raise UsageError(f"{source}: no column {wanted!r} among {listed}; {hint}")


def _rows_of(file: Any, first: int, count: int) -> Any:
    """Rows of a ParquetFile, decoded batch by batch from the row groups that hold them."""
    import pyarrow

    groups, start, at = [], None, 0
    for number in range(file.num_row_groups):
        size = file.metadata.row_group(number).num_rows
        if at < first + count and at + size > first:
            groups.append(number)
            start = at if start is None else start
        at += size
    skip, batches = first - (start or 0), []
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups):
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        batches.append(batch.slice(skip, count))
        skip, count = 0, count - batches[-1].num_rows
        if count <= 0:
            break
    return pyarrow.Table.from_batches(batches, file.schema_arrow)


class _Place:
    """Where tables lie and how they are opened.  Nothing else here knows of stores."""

    def __init__(self, source: str) -> None:
        self.is_local = not is_remote(source)
        self._source = source
        if source.startswith(PIPE):
            raise UsageError(f"{source}: a table is read more than once, and a command's output cannot be")
        self._files = filesystem("file" if self.is_local else Url(source).scheme)

    def find(self) -> list[tuple[str, str]]:
        """The path and the mark of every table, ordered by name."""
        source, shown = self._source, redact(self._source)
        try:
            if any(c in _plain(source) for c in "*?["):
                names = self._files.glob(source)
            elif Url(source).scheme not in HTTP and self._files.isdir(source):
                names = self._files.ls(source, detail=False)
            else:
                names = [source] if self._files.exists(source) else []
            tables = sorted(str(name) for name in names if _is_table(str(name)))
            marks = [self._mark(name) for name in tables]
        except Exception as error:
            raise InfrastructureError(f"{shown}: cannot be listed or read: {error_line(error)}") from error
        if not tables and names:
            raise UsageError(f"{shown}: no tables; they end in {', '.join(SUFFIXES)}")
        if not tables:
            raise UsageError(f"{shown!r} is not there: give a table, a folder of tables or a glob")
        return list(zip(tables, marks, strict=True))

    def open(self, path: str) -> BinaryIO:
        return self._files.open(path, "rb")  # type: ignore[no-any-return]

    def open_text(self, path: str) -> BinaryIO:
        """The bytes, inflated where the name ends in .gz."""
        packed = "gzip" if _plain(path).endswith(".gz") else None
        return self._files.open(path, "rb", compression=packed)  # type: ignore[no-any-return]

    def _mark(self, path: str) -> str:
        info = object_info(self._files.info(path))
        return _digest([info.size, list(info.mark().items())])


def _plain(source: str) -> str:
    """A URL without its query, because a signature changes every day.  A local path may hold a question mark."""
    return source.partition("?")[0] if source.startswith(("http://", "https://")) else source


def _is_table(path: str) -> bool:
    return _plain(path).endswith(SUFFIXES) and not path.rpartition("/")[2].startswith(".")


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(dump_json(value))


def _named(tables: Sequence[UrlTable]) -> str:
    return ", ".join(redact(table.source) for table in tables[:5]) + (" …" if len(tables) > 5 else "")


def columns_of(source: str, file: BinaryIO) -> Any:
    """The pyarrow schema of a table of text, None where it has no rows.  Raises UsageError that names the line."""
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


def write_parquet(source: str, text: BinaryIO, schema: Any, file: BinaryIO, rows_per_group: int) -> int:
    """Write a table of text as parquet with row groups of that size; returns the number of rows."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    count = 0
    with ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in _batches(_rows(source, text), rows_per_group):
            columns = [_array(field.type, [row.get(field.name) for row in batch]) for field in schema]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema), row_group_size=rows_per_group)
            count += len(batch)
    return count


def _rows(source: str, file: BinaryIO) -> Iterator[_Row]:
    if _is_jsonl(source):
        yield from _json_rows(source, file)
    elif _without_packing(source).endswith(".txt"):
        yield from ({"url": line.decode("utf-8", "replace")} for _, line in _lines(source, file))
    else:
        yield from _csv_rows(source, file)


def _is_jsonl(source: str) -> bool:
    return _without_packing(source).endswith((".jsonl", ".ndjson"))


def _without_packing(source: str) -> str:
    return source.removesuffix("?…").removesuffix(".gz")


def _lines(source: str, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers."""
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
    tabs = _without_packing(source).endswith(".tsv")
    reader = csv.reader(text, delimiter="\t" if tabs else ",", strict=True)
    try:
        names = next(reader, [])
        check_names(source, names)
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


def _batches(rows: Iterator[_Row], size: int = _TEXT_BATCH_ROWS) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _common(known: Any, values: list[Any]) -> Any:
    """The type that holds these values and those of the known type; text where there is none."""
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
