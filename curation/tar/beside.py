"""The table beside a shard, ``<shard>.parquet`` as img2dataset writes it: its columns that a sample's json lacks.

img2dataset writes the same fields into the json and the table.  Users add columns to the table later (scores, boxes),
where the json of a finished tar cannot be changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from curation.jsonio import MAX_SAMPLE_JSON_BYTES
from curation.storage.urls import Source, error_line
from curation.tar.samples import Sample, lenient_metadata

_NEEDED: Final = frozenset(("key", "url", "status"))  # by which a table of img2dataset or of stage 00 is recognised
_MADE_BY_A_STAGE: Final = b"curation"  # in the metadata of stage 06's tables
MOST_ROWS: Final = 1_000_000
MOST_BYTES: Final = 512 << 20


def table_beside(shard: Source) -> Path | None:
    """The table beside a shard on a filesystem; None if there is none, or it is not one of img2dataset's form."""
    if not isinstance(shard, Path):
        return None
    path = shard.with_suffix(".parquet") if shard.suffix == ".tar" else shard.with_name(f"{shard.name}.parquet")
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return None
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names, made_by = set(file.schema_arrow.names), file.schema_arrow.metadata or {}
            usable = names >= _NEEDED and _MADE_BY_A_STAGE not in made_by and file.metadata.num_rows <= MOST_ROWS
    except Exception:  # noqa: BLE001 - a table that is no parquet, or is cut off, says nothing of the samples
        return None
    return path if usable else None


def with_columns(samples: Iterable[Sample], shard: Source, warn: Callable[[str], None]) -> Iterator[Sample]:
    """The samples, with what the table beside the shard says and their json does not as part of their json.

    Args:
        samples: Of the shard, with their json.
        shard: The shard.
        warn: Is told, once, where the table cannot be read to its end.

    Yields:
        Each sample; its ``members`` may have another json.  Bytes in a column are left out.
    """
    path = table_beside(shard)
    if path is None:
        yield from samples
        return
    rows = _Columns(path, warn)
    for sample in samples:
        if sample.problem is None:
            rows.add_to(sample)
        yield sample


class _Columns:
    """The columns of a table, read when the first sample lacks one."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        from pyarrow import types
        from pyarrow.parquet import read_schema

        self._path, self._warn = path, warn
        schema = read_schema(path)
        bytes_of = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
        self._names = frozenset(field.name for field in schema if not any(is_of(field.type) for is_of in bytes_of))
        self._rows: dict[str, int] | None = None
        self._table: Any = None

    def add_to(self, sample: Sample) -> None:
        metadata = lenient_metadata(sample.members.get("json"))
        if self._names <= metadata.keys():
            return
        row = self._row(sample.key)
        more = {name: value for name, value in row.items() if name not in metadata}
        if not more:
            return
        with contextlib.suppress(orjson.JSONEncodeError):  # a value that no JSON can hold: the json stays as it is
            data = orjson.dumps({**metadata, **more}, default=str)
            if len(data) <= MAX_SAMPLE_JSON_BYTES:
                if "json" not in sample.members:
                    sample.suffixes = (*sample.suffixes, "json")
                sample.members["json"] = data

    def _row(self, key: str) -> Mapping[str, Any]:
        if self._rows is None:
            self._load()
        assert self._rows is not None
        number = self._rows.get(key)
        if number is None:
            return {}
        (row,) = self._table.slice(number, 1).to_pylist()
        return {str(name): value for name, value in row.items() if not isinstance(value, bytes)}

    def _load(self) -> None:
        from pyarrow.parquet import ParquetFile

        self._rows = {}
        try:
            with ParquetFile(self._path) as file:
                self._table = file.read(columns=sorted(self._names))
            keys = self._table["key"].to_pylist()
        except Exception as error:  # noqa: BLE001 - the samples are used as they are
            self._warn(f"{self._path}: cannot be read, so its columns are left out: {error_line(error)}")
            return
        self._rows = {key: number for number, key in enumerate(keys) if isinstance(key, str)}
