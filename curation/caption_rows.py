"""The rows of stage 05: one for each captioned image, kept per shard; the eight keys of the ordered JSONL."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from curation.errors import SampleError, ShardError
from curation.jsonio import dump_json, parse_json_object
from curation.tar.samples import caption_of

Row = dict[str, Any]


"""key, shard, url, uid, caption, original_caption, width, height, original_width, original_height, sha256,
image_sha256, image_size, model, revision, watermark_score, and ``extra``: every other field of the source's json."""

ROWS_FOLDER = "rows"


_OWN_FIELDS = ("caption", "url", "uid", "width", "height", "original_width", "original_height", "sha256")


def rows_name(shard_id: str) -> str:
    """Where the rows of a shard are below the output folder, whatever formats are asked for."""
    return f"{ROWS_FOLDER}/{shard_id}.jsonl"


def rows_path(output: Path, shard_id: str) -> Path:
    return output / rows_name(shard_id)


def original_caption(metadata: Mapping[str, Any], txt: bytes | None) -> str:
    """The caption that the source has, "" where it has none."""
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
    """size: of the image that was read, which stands for a width and height that the source does not tell.

    ``sha256`` is the source's (of what was downloaded), ``image_sha256`` of the image as it lies in the shard.
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
    """A number of pixels from the source, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31 else None


def write_rows(file: BinaryIO, rows: Iterable[Row]) -> None:
    for row in rows:
        file.write(dump_json(row) + b"\n")


def parse_rows(data: bytes, path: Path) -> Iterator[Row]:
    """The rows of a file that ``write_rows`` wrote.  ShardError that names ``path`` where it is something else."""
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = parse_json_object(line)
        except SampleError as error:
            raise ShardError(f"{path}, line {number}: not a row: {error}") from None
        yield row


def jsonl_line(row: Row) -> bytes:
    """A line of the ordered JSONL: datacomp-caption's eight keys in its order."""
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
    """What a shard's rows are in the ordered JSONL."""
    return b"".join(map(jsonl_line, parse_rows(data, path)))


def reusable_captions(output: Path, receipt: Mapping[str, Any] | None, recipe: str) -> dict[tuple[str, str], Row]:
    """(key, image_sha256) → row of an earlier run over the shard with the same recipe: a new format, or a shard to
    which samples were added, costs no caption twice.  Empty where the rows are not those that the receipt names."""
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
