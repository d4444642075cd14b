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

from curation.caption.schema import AnswerSchema
from curation.captioned.adopted import COLUMN_PREFIX
from curation.captioned.rows import parse_row
from curation.errors import InfrastructureError, SampleError, install
from curation.jsonio import MAX_SAMPLE_JSON_BYTES, BinaryWriter, dump_json, parse_json_object
from curation.options import items_in
from curation.run import ShardContext
from curation.run.ledger import Ledger
from curation.run.merge import merge_parquet
from curation.storage.files import AtomicFile
from curation.storage.urls import Source
from curation.tar.headers import Member
from curation.tar.samples import Parts, caption_of, read_samples
from curation.tar.scan import IMAGE_SUFFIXES, SampleSpan, TarScan, Window
from curation.tar.splice import Action, Edit, decided, splice

Row = dict[str, Any]
"""key, shard, url, uid, caption, original_caption, width, height, original_width, original_height, sha256,
image_sha256, image_size, model, revision, watermark_score, and ``extra``: every other field of the source's json.  With
a schema also ``answer``: the object of JSON that the model has written; with ``--check`` also ``checks``: what each has
measured, and ``tried``: ``round`` (``Answer.round``), failed_captions and failed_checks (of the other captions of the
image that failed: how many, and how many failed each check).

Where an image gets several captions, ``caption`` is the first of them that there is, and the row has more fields:
captioned_as (its name), captions (by name; null where there is none), captions_failed (by name, the reason or null),
captions_checks and captions_tried (by name, of those that were checked) and, of captions that another tool made,
captions_from (by name, model and revision).  Where the prompt has fields, ``asked`` has a digest of the filled prompt
by name."""

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
    answer: Mapping[str, Any] | None = None,
    checks: Mapping[str, Any] | None = None,
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
        answer: What the model has written, where that is JSON.
        checks: What checks have measured.
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
        **({} if answer is None else {"answer": answer}),
        **({} if checks is None else {"checks": checks}),
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
        yield parse_row(line, f"{path}, line {number}")


def jsonl_line(row: Row, schema: AnswerSchema | None = None) -> bytes:
    """A row's line of ``captions.jsonl``: datacomp-caption's eight keys, in its order, and the columns of a schema."""
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
    if schema is not None:
        line |= schema.cells(row.get("answer"))
    return dump_json(line | named_columns(row)) + b"\n"


def named_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of several captions: ``caption_<name>`` of each, ``captioned_as`` and ``captions_failed``.

    Empty for a row with one caption.
    """
    if "captions" not in row:
        return {}
    columns = {f"{COLUMN_PREFIX}{name}": text for name, text in row["captions"].items()}
    return {**columns, "captioned_as": row.get("captioned_as"), "captions_failed": row.get("captions_failed")}


def jsonl_lines(data: bytes, path: Path, schema: AnswerSchema | None = None) -> bytes:
    """The lines of ``captions.jsonl`` for a shard's file of rows."""
    return b"".join(jsonl_line(row, schema) for row in parse_rows(data, path))


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
WEB = "web"  # the name of the source's caption beside several others
CHECK_COLUMNS = {"caption": ("check_caption", "score"), "repeats": ("check_repeats", "share")}
_FROM_SOURCE = ("original_key", "md5", "tags", "merged_tags")
_ARROW_TYPES: Mapping[str, Callable[[Any], Any]] = {
    "string": lambda arrow: arrow.string(),
    "json": lambda arrow: arrow.string(),
    "integer": lambda arrow: arrow.int64(),
    "number": lambda arrow: arrow.float64(),
    "boolean": lambda arrow: arrow.bool_(),
}
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
    name: Format,
    output: Path,
    source: Source,
    shard_id: str,
    rows: Sequence[Row],
    work: ShardContext,
    *,
    schema: AnswerSchema | None = None,
    names: Sequence[str] = (),
    checks: Sequence[str] = (),
) -> None:
    """Write one format of a shard.

    Args:
        name: The format.  ``jsonl`` is merged from the rows of all shards and has no file for a shard.
        output: The output folder.
        source: The shard.
        shard_id: Its id.
        rows: Its rows.
        work: Opens the output files.
        schema: Of the answers.
        names: Of the captions, where an image gets several.
        checks: The names of those that captions were checked for.
    """
    if name == "parquet":
        with work.output(output / PARQUET_FOLDER / f"{shard_id}.parquet") as file:
            file.write(parquet_bytes(rows, schema, names, checks))
    elif name == "tar":
        with work.output(output / TAR_FOLDER / f"{shard_id}.tar") as file:
            if unreadable := write_tar(file, source, rows):
                work.warn(
                    f"{source}: the .json of {unreadable:,} samples cannot be read; in {TAR_FOLDER}/{shard_id}.tar it "
                    "holds the new caption alone"
                )
    elif name == "files":
        write_files(output / FILES_FOLDER / shard_id, source, rows, work.output, work.sample_parts)


# ---- parquet


def parquet_bytes(
    rows: Sequence[Row], schema: AnswerSchema | None = None, several: Sequence[str] = (), checks: Sequence[str] = ()
) -> bytes:
    """A parquet file of the rows; the same bytes for the same rows and version of pyarrow.

    The scores of checks follow the usual columns, then the columns of a schema; their types are those of the schema,
    whatever the answers hold.  So do those of several captions, whose names are ``several``.
    """
    arrow, parquet = import_arrow()
    names = (*PARQUET_COLUMNS, *MORE_COLUMNS)
    columns = {name: arrow.array([_cell(row, name) for row in rows], _type(arrow, name)) for name in names}
    for check in checks:
        name, score = CHECK_COLUMNS[check]
        of_names = {f"{name}_{one}": [row.get("captions_checks", {}).get(one) for row in rows] for one in several}
        for column_name, told in {name: [row.get("checks") for row in rows], **of_names}.items():
            scores = [(of_caption or {}).get(check, {}).get(score) for of_caption in told]
            columns[column_name] = arrow.array(scores, arrow.float64())
    for column in schema.columns if schema is not None else ():
        kind = _ARROW_TYPES[column.kind](arrow)
        values = [column.cell(row.get("answer")) for row in rows]
        columns[column.name] = arrow.array(values, arrow.list_(kind) if column.many else kind)
    if several:
        more = [named_columns(row) for row in rows]
        for name in (*(f"{COLUMN_PREFIX}{name}" for name in several), "captioned_as", "captions_failed"):
            columns[name] = arrow.array([_text(told.get(name)) for told in more], arrow.string())
    buffer = io.BytesIO()
    table = arrow.table(columns)
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
    return merge_parquet(ledger, lambda shard_id: f"{PARQUET_FOLDER}/{shard_id}.parquet", ALL_PARQUET)


# ---- files


def write_files(folder: Path, source: Source, rows: Sequence[Row], output: _Output, parts: Parts) -> None:
    """Write each image unchanged as ``<hash>.<suffix>`` and both captions as ``<hash>.json``.

    The hash is the image's sha256.  Where a shard has the same image twice, the second is ``<hash>_1`` and so on.
    """
    by_key = {row["key"]: row for row in rows}
    counts: dict[str, int] = {}
    for sample in read_samples(source, IMAGE_SUFFIXES.__contains__, parts=parts):
        row = None if sample.problem else by_key.pop(sample.key, None)  # a damaged one may have the key of a whole one
        if row is None:
            continue
        suffix, image = next(iter(sample.members.items()))
        digest = row["image_sha256"]
        number = counts[digest] = counts.get(digest, -1) + 1
        name = f"{digest}_{number}" if number else digest
        with output(folder / f"{name}.{suffix}") as file:
            file.write(image)
        captions = {"original": row["original_caption"], "predicted": row["caption"], **named_columns(row)}
        names = ("key", "shard", "url", "uid", "width", "height", "model", "revision", "watermark_score")
        captions |= {"answer": row["answer"]} if "answer" in row else {}
        with output(folder / f"{name}.json") as file:
            file.write(dump_json({**captions, **{field: row[field] for field in names}}, indent=True) + b"\n")


# ---- tar


def write_tar(file: AtomicFile, source: Source, rows: Sequence[Row]) -> int:
    """Copy the source with the new captions as ``.txt`` and as ``caption`` of the ``.json``, where there is one.

    Images and other members stay byte for byte.  A sample without a new caption is left out, because its old caption
    would be taken for a new one.  Where an image gets several captions, each has a member ``<key>.<name>.txt`` too, and
    the source's caption has ``<key>.web.txt``; one that is missing is an empty text there and in the ``.json``, because
    ``datasets`` needs the same members and types in every sample.

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
        new = self._json(self._window, member, row)
        return Edit(None, row["caption"].encode("utf-8", "replace"), new, more=_more_texts(row))

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
        if "answer" in row:
            record["answer"] = row["answer"]
        if metadata.get("curation") is not None:
            record["previous"] = metadata["curation"]
        if "captions" in row:
            failed: Mapping[str, str | None] = row.get("captions_failed") or {}
            record |= {"captioned_as": row.get("captioned_as"), "captions_failed": _told(failed)}
            if "captions" in metadata:
                record["original_captions"] = metadata["captions"]
            metadata["captions"] = _told(row["captions"])
        return dump_json({**metadata, "caption": row["caption"], "curation": record}, indent=True)


def _more_texts(row: Row) -> dict[str, bytes | None]:
    """The members of several captions by suffix."""
    if "captions" not in row:
        return {}
    texts = _told({**row["captions"], WEB: row["original_caption"]})
    return {f"{name}.txt": text.encode("utf-8", "replace") for name, text in texts.items()}


def _told(texts: Mapping[str, str | None]) -> dict[str, str]:
    return {name: text or "" for name, text in texts.items()}
