"""The rows of stage 00: the table's own columns, and for each row what happened to its URL.

Every row of a table is one row of ``<shard>.parquet``, in the table's order, whether or not an image came of it.
"""

from __future__ import annotations

import base64
import io
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final

import orjson

from curation.jsonio import dump_json

SUCCESS, NOT_DOWNLOADED, NOT_RESIZED = "success", "failed_to_download", "failed_to_resize"


# img2dataset's names, behind the table's own columns.
OWN_COLUMNS: Final = (
    "key", "status", "error_message", "width", "height", "original_width", "original_height", "exif", "sha256",
)  # fmt: skip
_NUMBERS: Final = ("width", "height", "original_width", "original_height")
_LENGTH: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What happened to one row's URL.

    Attributes:
        status: SUCCESS, NOT_DOWNLOADED or NOT_RESIZED.
        error_message: ``reason: detail``, None for a success.
        suffix: Of the stored image.
        width, height: Of the stored image as a viewer shows it, in pixels.
        original_width, original_height: Of the image that was downloaded.
        exif: As JSON.
        sha256: Of the bytes that were downloaded, before any resizing.
    """

    status: str
    error_message: str | None = None
    suffix: str = ""
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    exif: str | None = None
    sha256: str | None = None

    @property
    def reason(self) -> str:
        return (self.error_message or "").partition(":")[0]

    @property
    def detail(self) -> str:
        return (self.error_message or "").partition(": ")[2]


def pack(outcome: RowOutcome, image: bytes = b"") -> bytes:
    """A record for the shard's checkpoint: the outcome and the image to store."""
    head = dump_json(asdict(outcome))
    return b"".join((_LENGTH.pack(len(head)), head, image))


def unpack(record: bytes) -> tuple[RowOutcome, memoryview]:
    (length,) = _LENGTH.unpack_from(record)
    view = memoryview(record)
    start = _LENGTH.size + length
    return RowOutcome(**orjson.loads(view[_LENGTH.size : start])), view[start:]


def key_of(shard_id: str, row: int, rows_per_shard: int) -> str:
    """img2dataset's key: the shard's number, and the row's in as many digits as a full shard needs."""
    digits = max(1, math.ceil(math.log10(rows_per_shard))) if rows_per_shard > 1 else 1
    return f"{shard_id}{row:0{digits}d}"


def renamed_columns(names: Sequence[str], url: str, caption: str | None) -> list[str]:
    """The names that the table's columns get.

    They are ``url``, ``caption``, and others as they are.  Where the stage has a column of that name, the table's
    becomes ``original_<name>``, or ``table_<name>`` where that is taken too.
    """
    taken = {*OWN_COLUMNS, "url", *(("caption",) if caption else ())}
    wanted = {url: "url", **({caption: "caption"} if caption else {})}
    taken |= {name for name in names if name not in wanted and name not in taken}
    found = []
    for name in names:
        target = wanted.get(name, name)
        if name not in wanted and (name in OWN_COLUMNS or name in wanted.values()):
            target = f"original_{name}"
            while target in taken:
                target = f"table_{name}" if target == f"original_{name}" else f"table_{target}"
            taken.add(target)
        found.append(target)
    return found


def metadata_rows(table: Any, keys: Sequence[str], outcomes: Sequence[RowOutcome]) -> Any:
    """The pyarrow Table of ``<shard>.parquet``.  table: the shard's rows under the names that they get."""
    import pyarrow

    if not table.num_rows == len(keys) == len(outcomes):
        raise AssertionError(f"{table.num_rows} rows, {len(keys)} keys, {len(outcomes)} outcomes")
    for name in OWN_COLUMNS:
        values = list(keys) if name == "key" else [getattr(outcome, name) for outcome in outcomes]
        kind = pyarrow.int32() if name in _NUMBERS else pyarrow.string()
        table = table.append_column(pyarrow.field(name, kind), pyarrow.array(values, kind))
    return table.replace_schema_metadata(None)


def parquet_of(table: Any) -> bytes:
    """The same bytes for the same rows and version of pyarrow."""
    from pyarrow.parquet import write_table

    buffer = io.BytesIO()
    write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_outcomes(data: bytes) -> dict[str, RowOutcome]:
    """Key → outcome, from the bytes of a ``<shard>.parquet``, which does not hold the suffix."""
    from pyarrow.parquet import read_table

    names = [name for name in OWN_COLUMNS if name != "key"]
    rows = read_table(io.BytesIO(data), columns=list(OWN_COLUMNS)).to_pylist()
    return {row["key"]: RowOutcome(**{name: row[name] for name in names}) for row in rows}


def stats_of(outcomes: Iterable[RowOutcome]) -> bytes:
    """img2dataset's ``<shard>_stats.json``, without its times: the same rows give the same bytes."""
    found = list(outcomes)
    by_status = Counter(outcome.status for outcome in found)
    reasons = Counter(outcome.reason or SUCCESS for outcome in found)
    stats = {
        "count": len(found),
        "successes": by_status[SUCCESS],
        NOT_DOWNLOADED: by_status[NOT_DOWNLOADED],
        NOT_RESIZED: by_status[NOT_RESIZED],
        "status_dict": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
    }
    return dump_json(stats, indent=True) + b"\n"


def json_of(row: Mapping[str, Any]) -> bytes:
    """A sample's .json: every column of its row."""
    return dump_json({name: _plain(value) for name, value in row.items()}, indent=True)


def _plain(value: Any) -> Any:
    """A table's value as JSON has it: bytes as base64, times as ISO 8601, no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value) if isinstance(value, Decimal) else repr(value)
