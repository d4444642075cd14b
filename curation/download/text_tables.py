"""Tables of text (csv, tsv, jsonl, txt): their rows, and how they are written once as parquet.

No line and no field is longer than a bound, so that an open quotation mark cannot swallow the file.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, BinaryIO, Final, Literal, TextIO

import orjson

from curation.download.columns import sound_text
from curation.errors import SampleError, UsageError
from curation.jsonio import parse_json_object

TsvQuotes = Literal["auto", "none", "csv"]
_MAX_LINE: Final = 32 << 20  # characters of a line, or of a field of a csv, which may go over many lines
_READ_BYTES: Final = 1 << 20
_BATCH_ROWS: Final = 4096
_MAX_COLUMNS: Final = 10_000
_MARKS: Final = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))

_Row = Mapping[str, Any]


class _Rejoined(io.RawIOBase):
    """A file of which the start has been read; not every store can go back to it."""

    def __init__(self, start: bytes, rest: BinaryIO) -> None:
        self._start, self._rest = start, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._start or self._rest.read(len(buffer))
        self._start = b""
        buffer[: len(data)] = data
        return len(data)


class TextTable:
    """The rows of one opened file.

    Args:
        source: The file's name, by whose end its format is known, and for messages.
        file: From its first byte on.
        tsv_quotes: ``auto`` takes quotation marks off a field of a tsv that they enclose, ``none`` never does, and
            ``csv`` reads a tsv by the rules of csv.

    Attributes:
        not_utf8: Values so far that were no UTF-8.
    """

    def __init__(self, source: str, file: BinaryIO, tsv_quotes: TsvQuotes = "auto") -> None:
        self._source, self._file, self._tsv_quotes = source, file, tsv_quotes
        self._name = source.removesuffix("?…").removesuffix(".gz")
        self.not_utf8 = 0

    def rows(self) -> Iterator[_Row]:
        """Raises UsageError that names the line."""
        if self._is_jsonl:
            yield from self._json_rows()
        elif self._name.endswith(".txt"):
            yield from ({"url": self._sound(url)} for _, line in self._lines() if (url := line.strip()))
        elif self._name.endswith(".tsv") and self._tsv_quotes != "csv":
            yield from self._tsv_rows()
        else:
            yield from self._csv_rows()

    def schema(self) -> Any:
        """The columns as a pyarrow schema, None where there are no rows.  Reads all of a jsonl."""
        import pyarrow

        if not self._is_jsonl:
            first = next(self.rows(), None)
            return None if first is None else pyarrow.schema([(name, pyarrow.string()) for name in first])
        types: dict[str, Any] = {}
        rows = self.rows()
        while batch := list(islice(rows, _BATCH_ROWS)):
            for name in {name: None for row in batch for name in row}:
                types[name] = _common(types.get(name), [row.get(name) for row in batch])
            if len(types) > _MAX_COLUMNS:
                raise UsageError(f"{self._source}: more than {_MAX_COLUMNS:,} different keys")
        return pyarrow.schema(list(types.items())) if types else None

    def write_parquet(self, schema: Any, file: BinaryIO, rows_per_group: int) -> int:
        """Write the rows as parquet with row groups of that size; returns the number of rows."""
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        count, rows = 0, self.rows()
        with ParquetWriter(file, schema, compression="zstd") as writer:
            while batch := list(islice(rows, rows_per_group)):
                columns = [_array(field.type, [row.get(field.name) for row in batch]) for field in schema]
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema), row_group_size=rows_per_group)
                count += len(batch)
        return count

    # ---- formats

    @property
    def _is_jsonl(self) -> bool:
        return self._name.endswith((".jsonl", ".ndjson"))

    def _json_rows(self) -> Iterator[_Row]:
        number = 0
        while line := self._file.readline(_MAX_LINE + 1):
            number += 1
            self._check_length(number, line)
            if line := line.strip().removeprefix(codecs.BOM_UTF8):
                try:
                    yield parse_json_object(line)
                except SampleError as error:
                    raise UsageError(f"{self._source}, line {number}: {error}") from None

    def _tsv_rows(self) -> Iterator[_Row]:
        names: list[str] | None = None
        for number, line in self._lines():
            fields = [self._sound(field) for field in line.split("\t")]
            if self._tsv_quotes == "auto":
                fields = [_without_quotes(field) for field in fields]
            if names is None:
                names = self._checked(fields)
            else:
                yield self._row(names, fields, number, "; --tsv_quotes csv reads fields that go over several lines")

    def _csv_rows(self) -> Iterator[_Row]:
        csv.field_size_limit(_MAX_LINE)
        reader = csv.reader(self._text(""), delimiter="\t" if self._name.endswith(".tsv") else ",", strict=True)
        try:
            names = self._checked([self._sound(field) for field in next(reader, [])])
            for fields in reader:
                if len(fields) > len(names):
                    fields = _with_whole_data_urls(fields)
                if fields:
                    yield self._row(names, [self._sound(field) for field in fields], reader.line_num)
        except csv.Error as error:
            raise UsageError(f"{self._source}, line {reader.line_num}: {error}") from None

    def _checked(self, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise UsageError(f"{self._source}: two columns have one name: {', '.join(names)[:500]}")
        return names

    def _row(self, names: list[str], fields: list[str], number: int, hint: str = "") -> _Row:
        if len(fields) != len(names):
            raise UsageError(
                f"{self._source}, line {number}: {len(fields)} fields, but the first line names {len(names)}{hint}"
            )
        return dict(zip(names, fields, strict=True))

    # ---- text

    def _text(self, newline: str) -> TextIO:
        """By the mark at its start UTF-16, else UTF-8, in which other bytes are kept as surrogates."""
        start = self._file.read(4)
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
        errors = "replace" if encoding == "utf-16" else "surrogateescape"
        whole = io.BufferedReader(_Rejoined(start, self._file), _READ_BYTES)
        return io.TextIOWrapper(whole, encoding, errors, newline=newline)

    def _lines(self) -> Iterator[tuple[int, str]]:
        """The lines that are not empty, with their numbers and without their ends."""
        text, number = self._text("\n"), 0
        while line := text.readline(_MAX_LINE + 1):
            number += 1
            self._check_length(number, line)
            if line := line.rstrip("\r\n"):
                yield number, line

    def _check_length(self, number: int, line: str | bytes) -> None:
        if len(line) > _MAX_LINE:
            raise UsageError(f"{self._source}, line {number}: longer than {_MAX_LINE:,} characters")

    def _sound(self, text: str) -> str:
        if text.isascii():
            return text
        try:
            text.encode()
        except UnicodeEncodeError:
            self.not_utf8 += 1
            return sound_text(text.encode("utf-8", "surrogateescape"))
        return text


def _with_whole_data_urls(fields: list[str]) -> list[str]:
    """A ``data:`` URL has a comma of its own, and many programs write it into a csv without quotation marks."""
    found: list[str] = []
    for field in fields:
        if found and found[-1].startswith("data:") and "," not in found[-1]:
            found[-1] += f",{field}"
        else:
            found.append(field)
    return found


def _without_quotes(field: str) -> str:
    """A field without the quotation marks that enclose it; in any other place they are characters of the text."""
    inner = field[1:-1]
    if len(field) < 2 or field[0] != '"' or field[-1] != '"' or '"' in inner.replace('""', ""):
        return field
    return inner.replace('""', '"')


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
        values = [None if value is None else _whole_text(value) for value in values]
    return pyarrow.array(values, kind)


def _as_json(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # an integer beyond 64 bits
        return str(value)


def _whole_text(text: str) -> str:
    """A lone surrogate, which json can hold and UTF-8 cannot, becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
