"""Finds the rows of many tables that fulfil a condition in SQL.  DuckDB reads the tables, within limits.

The condition is one expression.  It can name columns and call functions; it can open no file but the tables, write
none, and change no setting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import orjson

from curation.commands.tables.missing import what_is_missing
from curation.errors import InfrastructureError, UsageError, install
from curation.extract.config import DATACOMP_NAMES
from curation.jsonio import clean_text

MAX_CONDITION_CHARS = 1 << 20
_ROWS = 1 << 16  # of a block of results
SPACE = (
    r"\t-\r\x1c-\x20\x85\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"  # as str.split has it
)


_TOP = re.compile(r"\btop\(\s*(?P<column>\"(?:[^\"]|\"\")+\"|\w+)\s*,\s*(?P<share>[0-9.eE-]+)\s*\)", re.I)
_NOT_FOUND = re.compile(r'column "?((?:[^"\s]|"")+)"? not found')
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")

TABLE, ROW = "curation_table", "curation_row"  # columns of a filter with positions
_POSITIONS = {"file_index": TABLE, "file_row_number": ROW}  # DuckDB's names of them


# Names under which conditions may ask for a column, beside its own: the first of the columns that is there.
_OTHER_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {**{name: (own,) for own, name in DATACOMP_NAMES.items()}, "text": ("caption",), "caption": ("text",)}
)


@dataclass(frozen=True, slots=True)
class Condition:
    """text: as it was given.  expression: what DuckDB gets, with every name resolved.  thresholds: the value of each
    ``top(column, share)``."""

    text: str
    expression: str
    thresholds: Mapping[str, float | None]


class SqlFilter:
    """The rows of the tables ``paths`` as one table.

    memory_mb: DuckDB's limit; what does not fit goes to the folder ``spill``.  positions: whether each row has the
    columns ``TABLE``, the number of its table among ``paths``, and ``ROW``, its number in the table, both from 0 on.
    """

    def __init__(
        self, paths: Sequence[Path], spill: Path, *, memory_mb: int, threads: int, positions: bool = False
    ) -> None:
        self._duckdb = import_duckdb()
        listed = f"[{', '.join(_text(str(path)) for path in paths)}]"
        self._connection = self._duckdb.connect(":memory:")
        try:
            for setting, value in (
                ("allowed_paths", listed),
                ("temp_directory", _text(str(spill))),
                ("memory_limit", f"'{memory_mb}MB'"),
                ("threads", str(threads)),
                ("preserve_insertion_order", "false"),
                ("enable_external_access", "false"),
                ("lock_configuration", "true"),
            ):
                self._connection.execute(f"SET {setting} = {value}")
            tables = f"read_parquet({listed}, union_by_name = true)"
            described = self._ask(f"DESCRIBE SELECT * FROM {tables}").fetchall()
            self.columns = tuple(row[0] for row in described)
            self._refuse_columns(_POSITIONS.items() if positions else ())
            placed = [f"{own} AS {name}" for own, name in _POSITIONS.items() if positions]
            self._ask(f"CREATE TEMP VIEW all_rows AS SELECT {', '.join(['*', *placed])} FROM {tables}")
            known = {name.lower() for name in self.columns}
            aliases = [f"{_name(own)} AS {_name(other)}" for other, own in self._aliases(known)]
            floats = [row[0] for row in described if row[1] in ("FLOAT", "DOUBLE")]
            # NaN would be above every number.  (NULLIF is not equal to this: filters pass it by on their way down.)
            nulled = [f"CASE WHEN isnan({c}) THEN NULL ELSE {c} END AS {c}" for c in map(_name, floats)]
            star = f"* REPLACE ({', '.join(nulled)})" if floats else "*"
            self._ask(f"CREATE TEMP VIEW no_nan AS SELECT {star} FROM all_rows")
            self._ask(f"CREATE TEMP VIEW samples AS SELECT {', '.join(['*', *aliases])} FROM no_nan")
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def _aliases(self, known: set[str]) -> Iterator[tuple[str, str]]:
        """(name, the column that it stands for): with underscores in place of dashes, and DataComp's names."""
        for own in self.columns:
            other = re.sub(r"\W", "_", own)
            if other.lower() not in known:
                known.add(other.lower())
                yield other, own
        for other, owns in _OTHER_NAMES.items():
            own = next((name for name in owns if name in self.columns), None)
            if own is not None and other.lower() not in known:
                known.add(other.lower())
                yield other, own

    def _refuse_columns(self, names: Iterable[tuple[str, str]]) -> None:
        """Raise UsageError if the tables have columns with names that are needed for something else."""
        taken = {name for pair in names for name in pair}
        for column in self.columns:
            if column.lower() in taken:
                raise UsageError(
                    f"the tables have a column {clean_text(column)!r}, a name that is needed here; rename it"
                )

    def count(self) -> int:
        return int(self._ask("SELECT count(*) FROM all_rows").fetchall()[0][0])

    def condition(self, text: str) -> Condition:
        """Returns the condition as DuckDB takes it.

        Raises:
            UsageError: It is not a condition, or names a column that is not there.
        """
        given = text
        if len(text) > MAX_CONDITION_CHARS:
            raise UsageError(f"the condition is longer than {MAX_CONDITION_CHARS:,} characters")
        text = self._quote_dashed(text)
        self._refuse_missing(text)
        thresholds: dict[str, float | None] = {}

        def expand(match: re.Match[str]) -> str:
            column = match["column"]
            threshold = self._threshold(column, match["share"])
            thresholds[f"{column} {match['share']}"] = threshold
            return "false" if threshold is None else f"({column}::double >= {threshold!r}::double)"

        text = _outside_quotes(text, lambda part: _TOP.sub(expand, part), keep_names=True)
        try:
            self._duckdb.SQLExpression(text)  # refuses a second statement, a second column, clauses behind
        except self._duckdb.Error as error:
            raise UsageError(f"--where: not one SQL condition: {_first_line(error)}") from None
        self._ask(f"EXPLAIN {_rows_where(text)}")
        return Condition(given, text, thresholds)

    def _refuse_missing(self, text: str) -> None:
        """Raise UsageError that names every column of the condition that is not there, and how each is made."""
        plain = _outside_quotes(text, lambda part: _TOP.sub(r"(\g<column>::double > 0)", part), keep_names=True)
        try:
            self._connection.execute(f"EXPLAIN {_rows_where(plain)}")
        except self._duckdb.BinderException as error:
            if (first := _NOT_FOUND.search(str(error))) is None:
                return
            there = {row[0].lower() for row in self._ask("DESCRIBE samples").fetchall()}
            named = dict.fromkeys([first[1], *self._named_columns(plain)])
            raise self._missing([name for name in named if name.lower() not in there]) from None
        except self._duckdb.Error:  # whatever else is wrong is told where the condition itself is looked at
            return

    def _named_columns(self, text: str) -> list[str]:
        """The columns that a condition names, in its order."""
        [row] = self._ask("SELECT json_serialize_sql(?::varchar)", _rows_where(text)).fetchall()
        found: list[str] = []

        def look(part: Any) -> None:
            if isinstance(part, dict):
                if part.get("class") == "COLUMN_REF":
                    found.append(part["column_names"][-1])
                for value in part.values():
                    look(value)
            elif isinstance(part, list):
                for value in part:
                    look(value)

        look(orjson.loads(row[0]))
        return found

    def rows(self, condition: Condition, columns: str, *, order: str) -> Iterator[Any]:
        """Yields Arrow record batches of the rows that fulfil it; columns and order are the caller's own SQL.  With no
        order the rows come as they are read."""
        query = f"SELECT {columns} FROM ({_rows_where(condition.expression)})"
        query += f" ORDER BY {order}" if order else ""
        with self._clear_errors():
            yield from self._connection.sql(query).to_arrow_reader(_ROWS)

    def _threshold(self, column: str, share: str) -> float | None:
        """The value that the share with the highest values has at least, as DataComp's baselines define it: that of
        the row behind int(rows × share) others.  None where no row has a value."""
        try:
            part = float(share)
        except ValueError:
            part = -1.0
        if not 0 <= part <= 1:
            raise UsageError(f"top({column}, {share}): the share is a number between 0 and 1")
        place = int(self.count() * part)
        values = f"SELECT {column}::double AS value FROM samples WHERE {column} IS NOT NULL"
        found = self._ask(f"SELECT value FROM ({values}) ORDER BY value DESC LIMIT 1 OFFSET {place}").fetchall()
        found = found or self._ask(f"SELECT min(value) FROM ({values})").fetchall()
        return None if found[0][0] is None else float(found[0][0])

    def _quote_dashed(self, text: str) -> str:
        """Quotes columns with dashes, so that they may be written as they are."""
        dashed = sorted((name for name in self.columns if not re.fullmatch(r"\w+", name)), key=len, reverse=True)
        if not dashed:
            return text
        pattern = re.compile(rf"(?<![\w\"-])(?:{'|'.join(map(re.escape, dashed))})(?![\w\"-])")
        return _outside_quotes(text, lambda part: pattern.sub(lambda match: _name(match[0]), part))

    def _ask(self, query: str, *values: str) -> Any:
        with self._clear_errors():
            return self._connection.execute(query, values)

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except self._duckdb.BinderException as error:
            raise self._binder_error(error) from None
        except self._duckdb.OutOfMemoryException as error:
            raise InfrastructureError(f"{_first_line(error)}; give more with --memory_mb") from None
        except (self._duckdb.Error, ArrowException) as error:
            raise UsageError(f"the tables cannot be queried: {_first_line(error)}") from None

    def _binder_error(self, error: Exception) -> UsageError:
        missing = _NOT_FOUND.search(str(error))
        return UsageError(f"--where: {_first_line(error)}") if missing is None else self._missing([missing[1]])

    def _missing(self, names: Sequence[str]) -> UsageError:
        return UsageError(what_is_missing("column", names, self.columns))


def import_duckdb() -> Any:
    try:
        import duckdb
    except ImportError:
        raise InfrastructureError(f"this needs the package duckdb: {install('duckdb')}") from None
    return duckdb


def _rows_where(expression: str) -> str:
    return f"SELECT * FROM samples WHERE (\n{expression}\n)"  # a comment at its end stays on its line


def _outside_quotes(text: str, change: Any, *, keep_names: bool = False) -> str:
    """``text`` with ``change`` made to what is neither a quoted text nor (unless keep_names) a quoted name."""
    pieces, kept = [], 0
    for match in _QUOTED.finditer(text):
        if keep_names and match[0].startswith('"'):
            continue
        pieces += [change(text[kept : match.start()]), match[0]]
        kept = match.end()
    return "".join([*pieces, change(text[kept:])])


def _name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _first_line(error: BaseException) -> str:
    return clean_text(str(error).strip().split("\n", 1)[0])[:300]
