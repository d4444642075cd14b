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
HASHES: Final = ("md5", "sha512")  # that a row may hold beside the sha256, each in a column of its name
OPT_OUT: Final = "opt_out"  # the last column, where the wishes of sites are looked up
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
        digest: Another hash of the same bytes, one of ``HASHES``, where one is asked for.
        opt_out: The rules of the site that forbid the download, None for none.
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
    digest: str | None = None
    opt_out: str | None = None

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


def own_columns(*, exif: bool = True, digest: str | None = None, opt_out: bool = False) -> tuple[str, ...]:
    """The stage's own columns.

    exif: whether there is one for it.  digest: a further hash, one of ``HASHES``.  opt_out: whether the rules of sites
    are looked up, of which the last column tells.
    """
    found = (name for name in OWN_COLUMNS if exif or name != "exif")
    return (*found, *([digest] if digest else []), *([OPT_OUT] if opt_out else []))


def renamed_columns(names: Sequence[str], url: str, caption: str | None, own: Sequence[str] = OWN_COLUMNS) -> list[str]:
    """The names that the table's columns get.

    They are ``url``, ``caption``, and others as they are.  Where the stage has a column of that name, the table's
    becomes ``original_<name>``, or ``table_<name>`` where that is taken too.

    own: the stage's columns.
    """
    taken = {*own, "url", *(("caption",) if caption else ())}
    wanted = {url: "url", **({caption: "caption"} if caption else {})}
    taken |= {name for name in names if name not in wanted and name not in taken}
    found = []
    for name in names:
        target = wanted.get(name, name)
        if name not in wanted and (name in own or name in wanted.values()):
            target = f"original_{name}"
            while target in taken:
                target = f"table_{name}" if target == f"original_{name}" else f"table_{target}"
            taken.add(target)
        found.append(target)
    return found


def metadata_rows(
    table: Any, keys: Sequence[str], outcomes: Sequence[RowOutcome], own: Sequence[str] = OWN_COLUMNS
) -> Any:
    """The pyarrow Table of ``<shard>.parquet``.

    table: the shard's rows under the names that they get.
    own: the stage's columns.
    """
    import pyarrow

    if not table.num_rows == len(keys) == len(outcomes):
        raise AssertionError(f"{table.num_rows} rows, {len(keys)} keys, {len(outcomes)} outcomes")
    for name in own:
        field = "digest" if name in HASHES else name
        values = list(keys) if name == "key" else [getattr(outcome, field) for outcome in outcomes]
        kind = pyarrow.int32() if name in _NUMBERS else pyarrow.string()
        table = table.append_column(pyarrow.field(name, kind), pyarrow.array(values, kind))
    return table.replace_schema_metadata(None)


def parquet_of(table: Any) -> bytes:
    """The same bytes for the same rows and version of pyarrow."""
    from pyarrow.parquet import write_table

    buffer = io.BytesIO()
    write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_outcomes(data: bytes, own: Sequence[str] = OWN_COLUMNS) -> dict[str, RowOutcome]:
    """Key → outcome, from the bytes of a ``<shard>.parquet``, which does not hold the suffix."""
    from pyarrow.parquet import read_table

    return {row["key"]: outcome_of(row) for row in read_table(io.BytesIO(data), columns=list(own)).to_pylist()}


def outcome_of(row: Mapping[str, Any]) -> RowOutcome:
    """The outcome in a row of ``<shard>.parquet``, or in a sample's .json, which img2dataset may have written.

    Raises:
        TypeError: A value is of another type than the stage and img2dataset write.
    """
    found: dict[str, Any] = {name: row.get(name) for name in (*OWN_COLUMNS, OPT_OUT) if name != "key"}
    for name, value in found.items():
        if value is not None and type(value) is not (int if name in _NUMBERS else str):
            raise TypeError(f"{name} is {str(value)[:60]!r}")
    status = found.pop("status")
    if status is None:
        raise TypeError("status is missing")
    digest = next((row[name] for name in HASHES if isinstance(row.get(name), str)), None)
    return RowOutcome(status, **found, digest=digest)


def stats_of(outcomes: Iterable[RowOutcome], opt_outs: Mapping[str, int] | None = None) -> bytes:
    """img2dataset's ``<shard>_stats.json``, without its times: the same rows give the same bytes.

    opt_outs: Rows by the kind of the rule that forbids them, None where no rules are looked up.
    """
    found = list(outcomes)
    by_status = Counter(outcome.status for outcome in found)
    reasons = Counter(outcome.reason or SUCCESS for outcome in found)
    stats = {
        "count": len(found),
        "successes": by_status[SUCCESS],
        NOT_DOWNLOADED: by_status[NOT_DOWNLOADED],
        NOT_RESIZED: by_status[NOT_RESIZED],
        "status_dict": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        **({} if opt_outs is None else {OPT_OUT: dict(opt_outs)}),
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
