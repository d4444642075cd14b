"""What stage 06 keeps of each batch, and the parquet and npz of a shard that are made of it, streamed.

The partial log is the spool: a batch's rows and features are written there once they are computed, survive a kill, and
are read back one batch at a time.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curation.errors import InfrastructureError, ShardError, install
from curation.extract.api import Kind
from curation.jsonio import MAX_DEPTH, dump_json, parse_json
from curation.libraries import np
from curation.run.checkpoints import MAX_PAYLOAD_BYTES, PartialLog
from curation.storage.files import AtomicFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

OWN_FIELDS = ("uid", "key", "tar")


STATUS = "status"


ROW_GROUP = 16_384  # rows that are in memory at a time


# Of img2dataset's and DataComp's json, so that every shard's parquet has one schema, whatever its values.
FIELD_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("uid", "url", "caption", "text", "key", "status", "error_message", "exif"), "string"),
    **dict.fromkeys(("sha256", "md5", "opt_out", "original_key", "original_caption"), "string"),
    **dict.fromkeys(("width", "height", "original_width", "original_height"), "int64"),
    **dict.fromkeys(("similarity", "hash", "punsafe", "pwatermark"), "float64"),
    "face_bboxes": "boxes",
}


INTEGER = "integer"


_MAX_INT64 = 1 << 63
_MAX_EXACT = 1 << 53  # the integers up to here are doubles too
_MAX_DOUBLE = sys.float_info.max


@dataclass(slots=True)
class MetadataRow:
    """One sample in the parquet.  fields: the carried ones; values: of the columns, and after them of what is only
    counted; both in their order.
    failed: why it counts as failed, None for a sample that is kept."""

    key: str
    uid: str | None
    fields: list[Any]
    values: list[Any]
    status: str
    failed: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class MetadataTable:
    """What the files of a shard look like.

    fields: the carried ones, name → type, None where the shard's values tell it.  columns: name → kind.
    features: name → width.  doubles: floats and boxes in 64 bits, as in DataComp.
    metadata: of the parquet's schema.
    """

    fields: Mapping[str, str | None]
    columns: Mapping[str, Kind]
    features: Mapping[str, int]
    feature_dtype: str = "float16"
    doubles: bool = False
    compress: bool = False
    metadata: Mapping[str, Any] | None = None

    def carried_name(self, field: str) -> str:
        """Of a carried field's column: another where one of this name is there already."""
        return f"source_{field}" if field in (*OWN_FIELDS, STATUS, *self.columns) else field


class Spool:
    """The batches of a shard that are computed, on disk."""

    def __init__(self, log: PartialLog, features: Sequence[str]) -> None:
        self._log = log
        self._features = {name: str(number) for number, name in enumerate(features)}

    def has(self, number: int) -> bool:
        """Whether the batch of that number is there, of this attempt or of one before."""
        return bool(self._log.get(str(number), "rows"))

    def put(
        self, number: int, rows: Sequence[MetadataRow], missing: Counter[str], features: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write a batch in one go.  missing: how many samples lack a carried field."""
        told = {"missing": missing, "rows": [[*_slots_of(row)] for row in rows]}
        parts = [(str(number), mark, features[name].tobytes()) for name, mark in self._features.items()]
        self._log.append([*parts, (str(number), "rows", dump_json(told))])  # last: where it is, the others are

    def forget(self, batches: int) -> None:
        """Have the first batches computed again by the next attempt.  Recorded answers of model servers stay."""
        self._log.append((str(number), "rows", b"") for number in range(batches))

    def rows(self, number: int) -> tuple[list[MetadataRow], Counter[str]]:
        told = parse_json(self._read(number, "rows"), MAX_PAYLOAD_BYTES, MAX_DEPTH + 4, keep_surrogates=True)
        return [MetadataRow(*row) for row in told["rows"]], Counter(told["missing"])

    def feature(self, number: int, name: str) -> bytes:
        return self._read(number, self._features[name])

    def _read(self, number: int, mark: str) -> bytes:
        data = self._log.get(str(number), mark)
        if data is None:
            raise ShardError(f"batch {number}: its checkpoint is gone; this is a bug")
        return data


def _slots_of(row: MetadataRow) -> Iterator[Any]:
    return (getattr(row, name) for name in MetadataRow.__slots__)


class _Sink:
    """An output file as pyarrow and zipfile want to write it: bytes in order, no seeking."""

    closed = False

    def __init__(self, file: AtomicFile) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


# ---- parquet


def import_arrow() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet); InfrastructureError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InfrastructureError(
            f"stage 06 writes parquet and needs pyarrow ({error}): {install('pyarrow')}"
        ) from None
    return pyarrow, pyarrow.parquet


def write_parquet(file: AtomicFile, spool: Spool, batches: int, tar: str, table: MetadataTable) -> Counter[str]:
    """The rows of a shard; the same bytes for the same rows and version of pyarrow.

    Returns how many values of each carried field were of another type than their column, and are null there.
    """
    arrow, parquet = import_arrow()
    types = _field_types(spool, batches, table)
    columns = {table.carried_name(name): kind for name, kind in types.items()}
    columns |= {name: _doubled(kind) if table.doubles else kind for name, kind in table.columns.items()}
    kinds = {**dict.fromkeys(OWN_FIELDS, "string"), **columns, STATUS: "string"}
    schema = arrow.schema([(name, _arrow_type(arrow, kind)) for name, kind in kinds.items()])
    schema = schema.with_metadata({"curation": dump_json(table.metadata or {})})
    mistyped: Counter[str] = Counter()
    with parquet.ParquetWriter(arrow.PythonFile(_Sink(file), mode="w"), schema, compression="zstd") as writer:
        for group in _groups(spool, batches):
            cells: list[list[Any]] = [[row.uid for row in group], [row.key for row in group], [tar] * len(group)]
            for number, (name, kind) in enumerate(types.items()):
                cells.append([_carried(row.fields[number], kind, name, mistyped) for row in group])
            cells += [[row.values[number] for row in group] for number in range(len(table.columns))]
            cells.append([row.status for row in group])
            writer.write_table(_arrow_table(arrow, schema, cells), row_group_size=ROW_GROUP)
    return mistyped


def _groups(spool: Spool, batches: int) -> Iterator[list[MetadataRow]]:
    waiting: list[MetadataRow] = []
    for number in range(batches):
        waiting += spool.rows(number)[0]
        while len(waiting) >= ROW_GROUP:
            yield waiting[:ROW_GROUP]
            del waiting[:ROW_GROUP]
    if waiting:
        yield waiting


def _arrow_table(arrow: Any, schema: Any, cells: Sequence[Sequence[Any]]) -> Any:
    arrays = []
    for field, values in zip(schema, cells, strict=True):
        if field.type == arrow.string():
            values = [_text(value) for value in values]
        try:
            arrays.append(arrow.array(values, field.type))
        except (arrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ShardError(f"column {field.name!r}: a value that is no {field.type}: {error}") from None
    return arrow.Table.from_arrays(arrays, schema=schema)


def _arrow_type(arrow: Any, kind: str) -> Any:
    if kind in ("boxes", "boxes64"):
        return arrow.list_(arrow.list_(arrow.float64() if kind == "boxes64" else arrow.float32()))
    if kind in ("string", "hash", "json"):
        return arrow.string()
    return {"float32": arrow.float32, "float64": arrow.float64, "int64": arrow.int64, "bool": arrow.bool_}[kind]()


def _doubled(kind: str) -> str:
    return {"float32": "float64", "boxes": "boxes64"}.get(kind, kind)


def _text(value: Any) -> str | None:
    """No lone surrogates, which parquet cannot hold; anything that is no text as JSON."""
    if value is None:
        return None
    text = value if isinstance(value, str) else dump_json(value).decode()
    return text.encode("utf-8", "replace").decode()


# ---- carried fields


def _field_types(spool: Spool, batches: int, table: MetadataTable) -> dict[str, str]:
    """The type of each carried field's column: as given, as known, or the narrowest that holds the shard's values.

    An ``integer`` is int64, and text where a value has more bits, so that every digit is kept.
    """
    types = {name: kind or FIELD_TYPES.get(name) for name, kind in table.fields.items()}
    seen: dict[str, set[str]] = {name: set() for name, kind in types.items() if kind in (None, INTEGER)}
    for number in range(batches) if seen else ():
        for row in spool.rows(number)[0]:
            for name, value in zip(types, row.fields, strict=True):
                if name in seen and value is not None:
                    seen[name].add(_type_of(value))
    found = {name: _narrowest(seen[name]) if kind is None else kind for name, kind in types.items()}
    found |= {n: "json" if "digits" in seen[n] else "int64" for n, kind in types.items() if kind == INTEGER}
    return {name: "boxes64" if kind == "boxes" else kind for name, kind in found.items()}


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if not -_MAX_INT64 <= value < _MAX_INT64:
            return "digits"
        return "int64" if -_MAX_EXACT <= value <= _MAX_EXACT else "long"
    return {float: "float64", str: "string"}.get(type(value), "json")


def _narrowest(seen: set[str]) -> str:
    if seen and seen <= {"int64", "long"}:
        return "int64"
    if "digits" in seen or "long" in seen:
        return "json"  # text, which keeps every digit
    if seen == {"int64", "float64"}:
        return "float64"
    return seen.pop() if len(seen) == 1 else "json" if seen else "string"


def _carried(value: Any, kind: str, name: str, mistyped: Counter[str]) -> Any:
    """The cell; None where the value is of another type."""
    if value is None or kind in ("string", "json"):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "boxes64":
        fits = isinstance(value, list) and all(isinstance(box, list) and _are_numbers(box) for box in value)
    elif kind == "bool":
        fits = isinstance(value, bool)
    elif kind == "int64":
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        fits = isinstance(value, int) and not isinstance(value, bool) and -_MAX_INT64 <= value < _MAX_INT64
    else:
        fits = is_number and -_MAX_DOUBLE <= value <= _MAX_DOUBLE
        value = float(value) if fits else value
    mistyped[name] += not fits
    return value if fits else None


def _are_numbers(values: list[Any]) -> bool:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return len(numbers) == len(values) and all(-_MAX_DOUBLE <= v <= _MAX_DOUBLE for v in numbers)


# ---- npz


def write_npz(file: AtomicFile, spool: Spool, batches: int, rows: int, table: MetadataTable) -> None:
    """The features of a shard, as ``numpy.savez`` arranges them; streamed, and the same bytes for the same features.

    Stored unless ``compress``: numbers of this kind hardly shrink, and a stored array can be mapped into memory.
    """
    dtype = np.dtype(table.feature_dtype).newbyteorder("<")
    method = zipfile.ZIP_DEFLATED if table.compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(_Sink(file), "w", method) as archive:
        for name, width in table.features.items():
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            info.compress_type, info.external_attr = method, 0o644 << 16
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header, {"descr": dtype.str, "fortran_order": False, "shape": (rows, width)}
            )
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(header.getvalue())
                for number in range(batches):
                    member.write(spool.feature(number, name))
