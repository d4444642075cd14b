"""Tables of URLs: found, checked once, and cut into shards, without ever holding a whole table.

A shard is a run of rows of one table.  Parquet is read where it lies, one row group at a time.  csv, tsv, jsonl and txt
cannot be read from the middle, so they are written once as parquet below ``_tables/`` of the output folder, where a
shard is a row group.  Only ``_Place`` opens files, because a table may lie in any store.

A csv has no types: its columns stay text, so that ``000123`` does not become a number.  In jsonl a column has the type
that all its values share; where they share none, it holds each value as JSON.

Each table's columns are checked before anything is downloaded.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import xxhash

from curation.download.columns import NamedColumns, caption_column_of, check_columns, sound_table, url_column_of
from curation.download.text_tables import TextTable, TsvQuotes
from curation.errors import InfrastructureError, ShardError, UsageError
from curation.jsonio import dump_json
from curation.options import plain_source
from curation.shards import MAX_SHARDS, Shard
from curation.storage.files import existing_part, glob_paths, link_exclusively, make_folder, read_record, whole_file
from curation.storage.search import separate
from curation.storage.urls import HTTP, PIPE, Url, error_line, filesystem, is_remote, object_info, redact

SUFFIXES: Final = (
    ".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".txt", ".txt.gz",
)  # fmt: skip
TableKind = Literal[
    "parquet", "csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "jsonl.gz", "ndjson", "ndjson.gz", "txt", "txt.gz"
]
TABLES_FOLDER: Final = "_tables"
_OWN_FILES: Final = ("00000000.parquet", "full_metadata.parquet", "metadata.csv", f"{TABLES_FOLDER}/0.parquet")
_FOOTERS_AT_ONCE = 16
_BATCH_ROWS = 4096
MENDED: Final = "what is none is percent-encoded in URLs, and U+FFFD stands for it in other texts"
_RULES = 1  # how a table is read: raised when the same table gives other shards


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
class ShardRows:
    """The rows of one shard.

    Attributes:
        table: A pyarrow Table, whose texts are UTF-8.
        url: The column of URLs, which holds texts.
        caption: The column of captions, which holds texts; None where there is none.
        mended: How many values had to be changed, because they were no UTF-8.
        keys: The keys of the rows; empty where they follow from the shard's number and the row's.
    """

    table: Any
    url: str
    caption: str | None
    mended: int
    keys: Sequence[str] = ()


class UrlTables:
    """URL tables, cut into shards.

    Args:
        sources: Each a table, a folder of tables or a glob, on this machine or behind a URL.
        output: The stage's output folder.
        rows_per_shard: Rows of a full shard.
        columns: The columns that the user named.
        tsv_quotes: What quotation marks mean in a tsv.
        digits: Of a shard's number in its name.
        kind: How the names of tables end, such as ``csv.gz``; empty for all kinds.
        dry: Write nothing.

    Attributes:
        notes: What a user should know of the tables, each with how many tables it is true of and the first of them.

    Raises:
        UsageError: Something is not a table of URLs, or there are too many shards.
        InfrastructureError: A store cannot be asked.
    """

    def __init__(
        self,
        sources: str | Sequence[str],
        output: Path,
        rows_per_shard: int,
        columns: NamedColumns,
        *,
        tsv_quotes: TsvQuotes = "auto",
        digits: int = 8,
        kind: str = "",
        dry: bool = False,
    ) -> None:
        self._output = output
        self._rows = rows_per_shard
        self._columns = columns
        self._tsv_quotes: TsvQuotes = tsv_quotes
        self._digits, self._kind = digits, kind
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._notes: Counter[str] = Counter()
        self._noted_first: dict[str, str] = {}
        self._place = _Places((sources,) if isinstance(sources, str) else sources)
        self._place.refuse_own_files(output)
        self.tables = self._dry_plan() if dry else self._plan()
        if not any(table.rows for table in self.tables):
            raise UsageError(f"no rows in {_named(self.tables)}")
        if sum(-(-table.rows // rows_per_shard) for table in self.tables) > MAX_SHARDS:
            raise UsageError(f"{_named(self.tables)}: more than {MAX_SHARDS:,} shards of {rows_per_shard:,} rows")

    @property
    def notes(self) -> list[str]:
        return [
            f"{self._noted_first[note]}{f' and {count - 1:,} more tables' if count > 1 else ''}: {note}"
            for note, count in self._notes.items()
        ]

    @property
    def is_local(self) -> bool:
        return self._place.is_local

    @cached_property
    def _starts(self) -> dict[str, tuple[UrlTable, int]]:
        """Shard id → its table and first row there."""
        found: dict[str, tuple[UrlTable, int]] = {}
        for table in self.tables:
            for first in range(0, table.rows, self._rows):
                found[f"{len(found):0{self._digits}d}"] = (table, first)
        return found

    def shards(self) -> list[Shard]:
        """The shards in the order of the tables' names, and then of the rows."""
        return [Shard(shard_id, Path(table.source)) for shard_id, (table, _) in self._starts.items()]

    def digest(self) -> str:
        """A text that changes when other rows make up a shard: it is made of the tables' names and numbers of rows."""
        tables = [[_plain(table.source).rpartition("/")[2], table.rows] for table in self.tables]
        return f"{len(tables)} tables, {sum(t.rows for t in self.tables)} rows, {_digest([tables, self._rows])[:12]}"

    def read(self, shard_id: str) -> ShardRows:
        """Raises ShardError."""
        table, first = self._starts[shard_id]
        count = min(self._rows, table.rows - first)
        try:
            with self._open_parquet(table) as file:
                rows = _rows_of(file, first, count)
            url = url_column_of("", rows.column_names, self._columns.url)
            caption = caption_column_of("", rows.schema, self._columns)
            rows, mended = sound_table(rows, [url, *([caption] if caption else [])])
        except Exception as error:
            raise ShardError(f"{redact(table.source)}: cannot be read: {error_line(error)}", "bad_table") from error
        if rows.num_rows != count:
            why = f"{rows.num_rows:,} rows from {first:,} on, {count:,} expected"
            raise ShardError(f"{redact(table.source)}: {why}", "bad_table")
        return ShardRows(rows, url, caption, mended)

    @contextlib.contextmanager
    def _open_parquet(self, table: UrlTable) -> Iterator[Any]:
        from pyarrow.parquet import ParquetFile

        if table.file:
            path = self._output / TABLES_FOLDER / table.file
            self._write_again(table, path)
            with ParquetFile(path) as file:
                yield file
        else:
            with self._place.open(table.source) as raw, ParquetFile(raw) as file:
                yield file

    def _write_again(self, table: UrlTable, path: Path) -> None:
        """Write a table of text once more as parquet, where somebody has deleted the output folder meanwhile."""
        if path.is_file():
            return
        with self._writing:
            if path.is_file():  # another thread was faster
                return
            make_folder(path.parent)
            now = self._inspect(table.source, table.mark)
        if now.rows != table.rows:
            why = f"{now.rows:,} rows, {table.rows:,} when the run began"
            raise ShardError(f"{redact(table.source)}: {why}", "bad_table")

    # ---- planning

    def _plan(self) -> list[UrlTable]:
        """What an earlier process recorded of the same tables; else each of them is inspected."""
        found = self._found()
        columns = asdict(self._columns)
        kept = columns.pop("kept")
        younger = [columns.pop("caption_names"), self._tsv_quotes]  # without them, as versions before 0.3.0 name it
        key = [_RULES, found, self._rows, columns, *([] if younger == ["few", "csv"] else [younger])]
        key += [] if kept is None else [kept]
        record = self._output / TABLES_FOLDER / f"{_digest(key)}.json"
        known = read_record(record)
        if known is not None:
            return [UrlTable(source, **table) for (source, _), table in zip(found, known["tables"], strict=True)]
        make_folder(record.parent)
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            tables = list(pool.map(lambda entry: self._inspect(*entry), found))
        entries = [{"mark": table.mark, "rows": table.rows, "file": table.file} for table in tables]
        link_exclusively(record, dump_json({"tables": entries}, indent=True))  # no names: a URL may hold a secret
        return tables

    def _found(self) -> list[tuple[str, str]]:
        found = self._place.find()
        if self._kind:
            found = [(source, mark) for source, mark in found if _plain(source).endswith(f".{self._kind}")]
            if not found:
                raise UsageError(f"--input_format {self._kind}: no table of --input has a name that ends in it")
        self._place.refuse_own_files(self._output, [source for source, _ in found])
        return found

    def _dry_plan(self) -> list[UrlTable]:
        """The tables with their numbers of rows; nothing is written."""
        return [self._inspect(source, mark, write=False) for source, mark in self._found()]

    def _inspect(self, source: str, mark: str, *, write: bool = True) -> UrlTable:
        shown = redact(source)
        try:
            if _plain(source).endswith(".parquet"):
                from pyarrow.parquet import ParquetFile

                with self._place.open(source) as raw, ParquetFile(raw) as file:
                    self._check(shown, file.schema_arrow)
                    return UrlTable(source, mark, file.metadata.num_rows)
            with self._place.open_text(source) as text:
                schema = TextTable(shown, text, self._tsv_quotes).schema()
            if schema is None:
                return UrlTable(source, mark, 0)
            self._check(shown, schema)
            if not write:
                with self._place.open_text(source) as text:
                    return UrlTable(source, mark, sum(1 for _ in TextTable(shown, text, self._tsv_quotes).rows()))
            quotes = [self._tsv_quotes] if ".tsv" in _plain(source)[-7:] and self._tsv_quotes != "csv" else []
            name = f"{_digest([_RULES, _plain(source), mark, self._rows, *quotes])}.parquet"
            with whole_file(self._output / TABLES_FOLDER / name) as file, self._place.open_text(source) as text:
                rows = TextTable(shown, text, self._tsv_quotes)
                count = rows.write_parquet(schema, file, self._rows)
            if rows.not_utf8:
                self._note(shown, f"{rows.not_utf8:,} values are no UTF-8; {MENDED}")
            return UrlTable(source, mark, count, name)
        except InfrastructureError:
            raise
        except Exception as error:
            raise UsageError(f"{shown}: cannot be read as a table: {error_line(error)}") from error

    def _check(self, source: str, schema: Any) -> None:
        for note in check_columns(source, schema, self._columns):
            self._note(source, note)

    def _note(self, source: str, note: str) -> None:
        with self._lock:  # many tables are looked at at once
            self._notes[note] += 1
            self._noted_first.setdefault(note, source)


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


class _Places:
    """Where tables lie: one place for each source.  A table that two sources name counts once."""

    def __init__(self, sources: Sequence[str]) -> None:
        words = [word for source in sources for word in separate(source)]
        self._places = [_Place(plain_source("--input", word)) for word in words]
        self._of: dict[str, _Place] = {}
        self.is_local = all(place.is_local for place in self._places)

    def refuse_own_files(self, output: Path, tables: Sequence[str] = ()) -> None:
        for place in self._places:
            place.refuse_own_files(output, [table for table in tables if self._of[table] is place])

    def find(self) -> list[tuple[str, str]]:
        """The path and the mark of every table, ordered by name."""
        marks: dict[str, str] = {}
        files: set[str] = set()
        for place in self._places:
            for table, mark in place.find():
                file = os.path.realpath(table) if place.is_local else table
                if file not in files:
                    files.add(file)
                    self._of[table], marks[table] = place, mark
        return sorted(marks.items())

    def open(self, path: str) -> BinaryIO:
        return self._of[path].open(path)

    def open_text(self, path: str) -> BinaryIO:
        return self._of[path].open_text(path)


class _Place:
    """Where the tables of one source lie and how they are opened.  Nothing else here knows of stores."""

    def __init__(self, source: str) -> None:
        self.is_local = not is_remote(source)
        self._source = source
        if source.startswith(PIPE):
            raise UsageError(f"{source}: a table is read more than once, and a command's output cannot be")
        self._files = filesystem("file" if self.is_local else Url(source).scheme)

    def refuse_own_files(self, output: Path, tables: Sequence[str] = ()) -> None:
        """Raise UsageError where the next start would take files of the output folder for tables.

        An output folder inside the input folder is refused before it is begun; one that was begun goes on.
        """
        if not self.is_local:
            return
        home, source = os.path.realpath(output), self._source
        own = [os.path.join(home, name) for name in _OWN_FILES]
        if os.path.isdir(source):
            folder = os.path.realpath(source)
            begun = (output / "_receipts").is_dir()
            clash = home == folder or (home.startswith(os.path.join(folder, "")) and not begun)
        elif os.path.exists(source):
            clash = False
        else:
            clash = any(map(_matcher(source), own))
        found = map(os.path.realpath, tables)
        if clash or any(os.path.dirname(path) == home and _is_own_file(path) for path in found):
            raise UsageError(
                f"--output {output} is where --input {source} searches for tables: the next run would read "
                "this run's files as tables. Use an output folder outside the input folder"
            )

    def find(self) -> list[tuple[str, str]]:
        """The path and the mark of every table, ordered by name."""
        source, shown = self._source, redact(self._source)
        try:
            if self.is_local:
                names = _local_names(source)
            elif any(c in _plain(source) for c in "*?[") and not self._files.exists(source):
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
            raise UsageError(f"{shown!r} does not exist: give a table, a folder of tables or a glob")
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


def _is_own_file(path: str) -> bool:
    """Whether the stage writes a file of that name for a shard or for all of them."""
    name = os.path.basename(path)
    return name in _OWN_FILES or re.fullmatch(r"\d+\.parquet", name) is not None


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a real path is one that the pattern names, or will name once it is there."""
    from fsspec.utils import glob_translate

    place, base = os.path.split(os.path.abspath(pattern))
    folders = {os.path.realpath(folder) for folder in glob_paths(place, recursive=True)}
    there, rest = existing_part(os.path.abspath(pattern))
    later = re.compile(glob_translate(os.path.join(glob.escape(os.path.realpath(there)), rest)))
    return lambda path: (
        later.match(path) is not None
        or (os.path.dirname(path) in folders and fnmatch.fnmatch(os.path.basename(path), base))
    )


def _local_names(source: str) -> list[str]:
    if os.path.isdir(source):
        return [os.path.join(os.path.abspath(source), name) for name in os.listdir(source)]
    if os.path.exists(source):
        return [source]
    return [os.path.abspath(path) for path in glob_paths(source, recursive=True)]


def _plain(source: str) -> str:
    """A URL without its query, because a signature changes every day.  A local path may hold a question mark."""
    return source.partition("?")[0] if source.startswith(("http://", "https://")) else source


def _is_table(path: str) -> bool:
    return _plain(path).endswith(SUFFIXES) and not path.rpartition("/")[2].startswith(".")


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(dump_json(value))


def _named(tables: Sequence[UrlTable]) -> str:
    return ", ".join(redact(table.source) for table in tables[:5]) + (" …" if len(tables) > 5 else "")
