"""The rows of stage 05, one for each captioned image, and the formats that are written from them.

Each format depends on the rows of a shard and the shard alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from curation.errors import InfrastructureError, SampleError, ShardError, install
from curation.jsonio import MAX_SAMPLE_JSON_BYTES, BinaryWriter, dump_json, parse_json_object
from curation.options import items_in
from curation.run import ShardContext
from curation.run.ledger import Ledger
from curation.run.merge import merge_parquet
from curation.storage.files import AtomicFile
from curation.storage.urls import Source
from curation.tar.headers import Member
from curation.tar.samples import caption_of, read_samples
from curation.tar.scan import IMAGE_SUFFIXES, SampleSpan, TarScan, Window
from curation.tar.splice import Action, Edit, decided, splice

Row = dict[str, Any]
"""key, shard, url, uid, caption, original_caption, width, height, original_width, original_height, sha256,
image_sha256, image_size, model, revision, watermark_score, and ``extra``: every other field of the source's json."""

ROWS_FOLDER = "rows"
_OWN_FIELDS = ("caption", "url", "uid", "width", "height", "original_width", "original_height", "sha256")


def rows_name(shard_id: str) -> str:
    """The file with the rows of a shard, relative to the output folder.  It is written whatever the formats are."""
    return f"{ROWS_FOLDER}/{shard_id}.jsonl"


def rows_path(output: Path, shard_id: str) -> Path:
    return output / rows_name(shard_id)


def original_caption(metadata: Mapping[str, Any], txt: bytes | None) -> str:
    """The caption that the source has, or "" where it has none."""
    try:
        return caption_of(metadata, txt)
    except SampleError:
        return ""


def make_row(
    *,
    key: str,
    shard: str,
    metadata: Mapping[str, Any],
    txt: bytes | None,
    caption: str,
    size: tuple[int, int],
    image_sha256: str,
    model: Mapping[str, str],
    watermark_score: float | None,
) -> Row:
    """The row of one captioned image.

    Args:
        key, shard: Of the sample.
        metadata, txt: The sample's json and ``.txt``.
        caption: The new one.
        size: Width and height of the image, used where ``metadata`` does not have them.
        image_sha256: Of the image in the shard; the row's ``sha256`` is that of what was downloaded, from ``metadata``.
        model: The row's ``model`` and ``revision``.
        watermark_score: How much the image looks watermarked, where it was scored.
    """
    width, height = (_side(metadata.get(name)) for name in ("width", "height"))
    if width is None or height is None:
        width, height = size
    return {
        "key": key,
        "shard": shard,
        "url": metadata.get("url"),
        "uid": metadata.get("uid"),
        "caption": caption,
        "original_caption": original_caption(metadata, txt),
        "width": width,
        "height": height,
        "original_width": _side(metadata.get("original_width")),
        "original_height": _side(metadata.get("original_height")),
        "sha256": metadata.get("sha256") or image_sha256,
        "image_sha256": image_sha256,
        "image_size": size,
        **model,
        "watermark_score": watermark_score,
        "extra": {name: value for name, value in metadata.items() if name not in _OWN_FIELDS},
    }


def _side(value: object) -> int | None:
    """A number of pixels from the source; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31 else None


def write_rows(file: BinaryWriter, rows: Iterable[Row]) -> None:
    for row in rows:
        file.write(dump_json(row) + b"\n")


def parse_rows(data: bytes, path: Path) -> Iterator[Row]:
    """The rows of a file that ``write_rows`` wrote.  Raises ShardError, which names ``path``, for any other file."""
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = parse_json_object(line, keep_surrogates=True)
        except SampleError as error:
            raise ShardError(f"{path}, line {number}: not a row: {error}") from None
        yield row


def jsonl_line(row: Row) -> bytes:
    """A row's line of ``captions.jsonl``: datacomp-caption's eight keys, in its order."""
    line = {
        "key": row["key"],
        "caption": row["caption"],
        "original_caption": row["original_caption"],
        "tar_file": f"{row['shard']}.tar",
        "uid": row["uid"],
        "url": row["url"],
        "width": row["width"],
        "height": row["height"],
    }
    return dump_json(line) + b"\n"


def jsonl_lines(data: bytes, path: Path) -> bytes:
    """The lines of ``captions.jsonl`` for a shard's file of rows."""
    return b"".join(map(jsonl_line, parse_rows(data, path)))


def reusable_captions(output: Path, receipt: Mapping[str, Any] | None, recipe: str) -> dict[tuple[str, str], Row]:
    """The rows of an earlier run, so that a new format or new samples in a shard make no caption twice.

    Args:
        output: The output folder.
        receipt: Of the earlier run over the shard; None: there was none.
        recipe: A digest of everything that decides a caption.

    Returns:
        The rows by key and ``image_sha256``.  Empty where the earlier run had another recipe, or where the file of rows
        is not the one that the receipt names.
    """
    if receipt is None or receipt.get("status") != "done" or receipt.get("notes", {}).get("recipe") != recipe:
        return {}
    path = rows_path(output, str(receipt["shard"]))
    try:
        data = path.read_bytes()
        rows = [orjson.loads(line) for line in data.splitlines()]
    except (OSError, ValueError):
        return {}
    named = {out["path"]: out["size"] for out in receipt.get("outputs", [])}
    if named.get(rows_name(str(receipt["shard"]))) != len(data):
        return {}
    return {(row["key"], row["image_sha256"]): row for row in rows}


def sha256_of(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


Format = Literal["jsonl", "parquet", "files", "tar"]
FORMATS: tuple[Format, ...] = get_args(Format)
ALL_PARQUET = "all_captions.parquet"
PARQUET_FOLDER, TAR_FOLDER, FILES_FOLDER = "parquet", "shards", "files"

# ContraStyles' columns, in its order.  Some of them come from the source's json, by name.
PARQUET_COLUMNS = (
    "key", "original_key", "url", "original_caption", "vlm_caption", "width", "height", "original_width",
    "original_height", "sha256", "md5", "tags", "merged_tags",
)  # fmt: skip
# They follow, so that nothing of the source is lost: ``extra`` is its other fields as JSON.
MORE_COLUMNS = ("uid", "model", "revision", "watermark_score", "extra")
_FROM_SOURCE = ("original_key", "md5", "tags", "merged_tags")
_NUMBERS = ("width", "height", "original_width", "original_height")

_Output = Callable[[Path], AbstractContextManager[AtomicFile]]


def parse_formats(text: str) -> tuple[Format, ...]:
    """Read a list such as ``jsonl,tar``; ``all`` means every format.

    Returns:
        The formats, in their fixed order.

    Raises:
        ValueError: A word is no format.
    """
    words = {*items_in(text)}
    if words == {"all"}:
        return FORMATS
    if not words or words - {*FORMATS}:
        raise ValueError(f"{text!r}: formats are {', '.join(FORMATS)}, several with commas between them, or all")
    return tuple(name for name in FORMATS if name in words)


def write_format(
    name: Format, output: Path, source: Source, shard_id: str, rows: Sequence[Row], work: ShardContext
) -> None:
    """Write one format of a shard.

    Args:
        name: The format.  ``jsonl`` is merged from the rows of all shards and has no file for a shard.
        output: The output folder.
        source: The shard.
        shard_id: Its id.
        rows: Its rows.
        work: Opens the output files.
    """
    if name == "parquet":
        with work.output(output / PARQUET_FOLDER / f"{shard_id}.parquet") as file:
            file.write(parquet_bytes(rows))
    elif name == "tar":
        with work.output(output / TAR_FOLDER / f"{shard_id}.tar") as file:
            if unreadable := write_tar(file, source, rows):
                work.warn(
                    f"{source}: the .json of {unreadable:,} samples cannot be read; in {TAR_FOLDER}/{shard_id}.tar it "
                    "holds the new caption alone"
                )
    elif name == "files":
        write_files(output / FILES_FOLDER / shard_id, source, rows, work.output)


# ---- parquet


def parquet_bytes(rows: Sequence[Row]) -> bytes:
    """A parquet file of the rows; the same bytes for the same rows and version of pyarrow."""
    arrow, parquet = import_arrow()
    columns = {name: [_cell(row, name) for row in rows] for name in (*PARQUET_COLUMNS, *MORE_COLUMNS)}
    buffer = io.BytesIO()
    table = arrow.table({name: arrow.array(values, _type(arrow, name)) for name, values in columns.items()})
    parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def import_arrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet.  Raises InfrastructureError where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InfrastructureError(f"--format parquet needs pyarrow ({error}): {install('pyarrow')}") from None
    return pyarrow, pyarrow.parquet


def _cell(row: Row, name: str) -> Any:
    extra: Mapping[str, Any] = row["extra"]
    if name in _FROM_SOURCE:
        return _text(extra.get(name))
    if name == "extra":
        return _text({key: value for key, value in extra.items() if key not in _FROM_SOURCE})
    value = row["caption" if name == "vlm_caption" else name]
    return value if name in _NUMBERS or name == "watermark_score" else _text(value)


def _text(value: Any) -> str | None:
    """A cell of text.  Other values are written as JSON, and lone surrogates are replaced, as parquet has none."""
    if value is None:
        return None
    text = value if isinstance(value, str) else dump_json(value).decode()
    return text.encode("utf-8", "replace").decode()


def _type(arrow: Any, name: str) -> Any:
    if name in _NUMBERS:
        return arrow.int64()
    return arrow.float64() if name == "watermark_score" else arrow.string()


def finish_parquet(ledger: Ledger) -> bool:
    """Merge the parts into ``all_captions.parquet`` once no shard is pending.  Returns whether it is there."""
    import_arrow()
    return merge_parquet(ledger, lambda shard_id: f"{PARQUET_FOLDER}/{shard_id}.parquet", ALL_PARQUET)


# ---- files


def write_files(folder: Path, source: Source, rows: Sequence[Row], output: _Output) -> None:
    """Write each image unchanged as ``<hash>.<suffix>`` and both captions as ``<hash>.json``.

    The hash is the image's sha256.  Where a shard has the same image twice, the second is ``<hash>_1`` and so on.
    """
    by_key = {row["key"]: row for row in rows}
    counts: dict[str, int] = {}
    for sample in read_samples(source, IMAGE_SUFFIXES.__contains__):
        row = by_key.pop(sample.key, None)
        if row is None:
            continue
        suffix, image = next(iter(sample.members.items()))
        digest = row["image_sha256"]
        number = counts[digest] = counts.get(digest, -1) + 1
        name = f"{digest}_{number}" if number else digest
        with output(folder / f"{name}.{suffix}") as file:
            file.write(image)
        captions = {"original": row["original_caption"], "predicted": row["caption"]}
        names = ("key", "shard", "url", "uid", "width", "height", "model", "revision", "watermark_score")
        with output(folder / f"{name}.json") as file:
            file.write(dump_json({**captions, **{field: row[field] for field in names}}, indent=True) + b"\n")


# ---- tar


def write_tar(file: AtomicFile, source: Source, rows: Sequence[Row]) -> int:
    """Copy the source with the new captions as ``.txt`` and as ``caption`` of the ``.json``, where there is one.

    Images and other members stay byte for byte.  A sample without a new caption is left out, because its old caption
    would be taken for a new one.

    Returns:
        How many samples have a ``.json`` that cannot be read, which is replaced by one with the new caption alone.
    """
    by_key = {row["key"]: row for row in rows}
    captioned = _Captions(source, by_key)
    splice(decided(captioned, captioned.decide), file)
    return captioned.unreadable


class _Captions(TarScan):
    """A scan that decides on each sample while the window with the sample's json is in memory."""

    def __init__(self, source: Source, rows: dict[str, Row]) -> None:
        super().__init__(source)
        self._rows = rows
        self._window: Window | None = None
        self.unreadable = 0

    def windows(self) -> Iterator[Window]:
        for self._window in super().windows():
            yield self._window

    def decide(self, span: SampleSpan) -> Edit | Action:
        row = self._rows.get(span.key)
        if row is None or span.torn or span.repeated:
            return Action.DROP
        assert self._window is not None
        member = next((member for member in span.members if member.suffix == "json"), None)
        return Edit(None, row["caption"].encode("utf-8", "replace"), self._json(self._window, member, row))

    def _json(self, window: Window, member: Member | None, row: Row) -> bytes | None:
        """The metadata with the new caption; None where the sample has no json.

        The old bytes of a json that cannot be read are not kept, because the old caption may stand in them.
        """
        if member is None or not member.regular:
            return None
        try:
            if member.size > MAX_SAMPLE_JSON_BYTES:
                raise SampleError("json_too_large")
            metadata = parse_json_object(window.read(member.data, member.size))
        except SampleError:
            metadata = {}
            self.unreadable += 1
        record: dict[str, Any] = {"original_caption": row["original_caption"]}
        record |= {"recaptioned_by": {"name": row["model"], "revision": row["revision"]}}
        if metadata.get("curation") is not None:
            record["previous"] = metadata["curation"]
        return dump_json({**metadata, "caption": row["caption"], "curation": record}, indent=True)
