"""img2dataset: folders that it has made, and its command line.

What is whole in a folder of img2dataset is kept, and the rest is asked for again.  A shard's rows are in its
``<shard>.parquet``.  A shard that img2dataset had not finished when it was killed has no such table, or one that is cut
off; its rows are then in ``_tmp/<number>.feather``, which img2dataset removes when it has finished the shard, or in the
tables that it was started with.  What is in a tar that is cut off says itself, by each sample's .json, to which row it
belongs.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal

import orjson

from curation.download.columns import sound_table
from curation.download.rows import HASHES, SUCCESS, RowOutcome, key_of, outcome_of, own_columns
from curation.download.shard import OutputFormat, PreviousShard, StoredFiles
from curation.download.tables import ShardRows, UrlTables
from curation.errors import SampleError, ShardError, UsageError
from curation.jsonio import clean_text, parse_json_object, some
from curation.options import RunOptions, unwrapped
from curation.run.inputs import Input
from curation.shards import Shard
from curation.storage.files import names_in
from curation.storage.urls import error_line
from curation.tar.samples import Sample
from curation.tar.scan import IMAGE_SUFFIXES

_SHARD: Final = re.compile(r"([0-9]{1,18})(\.tar|\.parquet|_stats\.json|)")
_ROWS: Final = re.compile(r"([0-9]{1,18})\.feather")
_KEY: Final = re.compile(r"[0-9]{1,40}")
_USUAL_DIGITS: Final = 5
_ROWS_AT_ONCE: Final = 64  # of a table with images, in memory
_TABLE: Final = "a folder of img2dataset"
_HELP: Final = "give the tables that img2dataset was started with as --input, and --retry_failed"


class AdoptedFolder:
    """The shards of a folder of img2dataset, in the place of URL tables (``UrlTables``).

    Args:
        folder: The folder.
        rows_per_shard: Rows of a full shard, for keys of which the folder has no example.
        tables: The tables that the folder was made from; None to take the rows from the folder.

    Attributes:
        digits: Of a shard's number.
        layout: How the samples are stored, and how they are written where they are in tables.
        image_column: Which column of the tables holds the images; empty where they are in files.
        notes: What a user should know.

    Raises:
        UsageError: It is no such folder, or its samples are stored in a form that cannot be taken over.
    """

    is_local = True

    def __init__(self, folder: Path, rows_per_shard: int) -> None:
        self.folder, self._rows_per_shard = folder, rows_per_shard
        self._tables: UrlTables | None = None
        if not folder.is_dir():
            raise UsageError(f"--adopt {folder}: there is no such folder; give the output folder of img2dataset")
        names = names_in(folder)
        self._names = frozenset(names)
        ids = {match[1] for name in names if (match := _SHARD.fullmatch(name))}
        self.digits = min(map(len, ids), default=_USUAL_DIGITS)
        self._unfinished = {
            f"{int(match[1]):0{self.digits}d}": name
            for name in names_in(folder / "_tmp")
            if (match := _ROWS.fullmatch(name))
        }
        self._ids = sorted(ids | set(self._unfinished), key=int)
        if not self._ids:
            raise UsageError(f"--adopt {folder}: no shards such as 00000.tar and 00000.parquet are in it")
        if records := [name for name in names if name.endswith(".tfrecord")]:
            raise UsageError(f"--adopt {folder}: {some(records)}: tfrecord files cannot be taken over")
        tars = any(name.endswith(".tar") for name in names)
        loose = any(name in ids and (folder / name).is_dir() for name in names)
        if loose and not tars:
            _check_samples(folder, sorted(name for name in names if name in ids and (folder / name).is_dir()))
        self.image_column = "" if tars or loose else self._image_column()
        self.layout: OutputFormat = "webdataset" if tars or not loose else "files"
        self.notes: list[str] = []

    def use(self, tables: UrlTables) -> None:
        """Take the rows from the tables that the folder was made from.

        Raises:
            UsageError: The folder has more shards than these tables.
        """
        more = set(self._ids) - {shard.id for shard in tables.shards()}
        if more:
            raise UsageError(
                f"--adopt {self.folder}: the tables of --input have no shard {some(more)}: give those, and the "
                "--number_sample_per_shard, that the folder was made with"
            )
        self._tables = tables
        self.notes = tables.notes

    @cached_property
    def digest_name(self) -> str | None:
        """The further hash that the folder's rows have (``rows.HASHES``)."""
        names = next((schema.names for _, schema in self._schemas()), ())
        return None if "sha256" in names else next((name for name in HASHES if name in names), None)

    def digest(self) -> str:
        return _TABLE

    def shards(self) -> list[Shard]:
        """The shards by their number."""
        if self._tables is not None:
            return self._tables.shards()
        return [Shard(shard_id, self.folder / f"{shard_id}.parquet") for shard_id in self._ids]

    def inputs(self, shard_id: str) -> list[Input]:
        """The files that a shard is made from, where it is written to another folder."""
        names = (f"{shard_id}.tar", f"{shard_id}.parquet")
        return [Input(self.folder / name, optional=True) for name in names]

    def has_tar(self, shard_id: str) -> bool:
        return f"{shard_id}.tar" in self._names

    def read(self, shard_id: str) -> ShardRows:
        """The rows of a shard, in the order of their keys.

        Raises:
            ShardError: They are in no file that can be read.
        """
        if self._tables is not None:
            return self._tables.read(shard_id)
        if shard_id in self._unfinished:
            table = self._feather(self.folder / "_tmp" / self._unfinished[shard_id], shard_id)
            keys = [f"{shard_id}{row:0{self._row_digits}d}" for row in range(table.num_rows)]
        else:
            table = self._parquet(shard_id).sort_by("key")
            keys = [str(key) for key in table.column("key").to_pylist()]
        if len(set(keys)) < len(keys) or not all(_KEY.fullmatch(key) and key.startswith(shard_id) for key in keys):
            raise ShardError(f"{self.folder}: the keys of shard {shard_id} are not those of img2dataset", "bad_table")
        own = {*own_columns(digest=self.digest_name, opt_out=True)}  # the stage itself may have been here before
        table = table.select([name for name in table.column_names if name not in own])
        caption = "caption" if "caption" in table.column_names else None
        rows, mended = sound_table(table, ["url", *([caption] if caption else [])])
        return ShardRows(rows, "url", caption, mended, keys)

    def earlier(self, shard_id: str) -> AdoptedShard:
        """What img2dataset has stored of a shard."""
        stored: StoredFiles
        if self.image_column:
            stored = _StoredTable(self.folder, self.folder / f"{shard_id}.parquet", column=self.image_column)
        elif f"{shard_id}.tar" in self._names:
            stored = StoredFiles(self.folder, self.folder / f"{shard_id}.tar")
        else:
            names = names_in(self.folder / shard_id) if shard_id in self._names else []
            stored = StoredFiles(self.folder, None, [f"{shard_id}/{name}" for name in sorted(names) if _is_part(name)])
        try:
            rows = self._parquet(shard_id).to_pylist()
        except ShardError:
            rows = []  # the samples tell which rows they are of
        return AdoptedShard(stored, rows)

    def lacking(self, shard_id: str, count: int) -> str:
        """What to say where img2dataset has counted more rows than its files hold; "" where it has not."""
        try:
            stats = parse_json_object((self.folder / f"{shard_id}_stats.json").read_bytes())
        except (OSError, SampleError):
            return ""
        counted = stats.get("count")
        if not isinstance(counted, int) or counted <= count:
            return ""
        return f"{counted - count:,} rows that img2dataset counted are not in its table; with --input they are added"

    # ---- tables

    def _parquet(self, shard_id: str) -> Any:
        from pyarrow.parquet import read_schema, read_table

        path = self.folder / f"{shard_id}.parquet"
        try:
            names = (
                [name for name in read_schema(path).names if name != self.image_column] if self.image_column else None
            )
            table = read_table(path, columns=names)
        except Exception as error:
            why = "does not exist" if isinstance(error, FileNotFoundError) else error_line(error)
            raise ShardError(f"{path}: {why}. Its rows are needed: {_HELP}", "bad_table") from error
        if not {"url", "key", "status"} <= set(table.column_names):
            raise ShardError(f"{path}: not a table of img2dataset: it has no url, key and status", "bad_table")
        return table

    def _feather(self, path: Path, shard_id: str) -> Any:
        from pyarrow import ipc

        try:
            with ipc.open_file(os.fspath(path)) as file:
                table = file.read_all()
        except Exception as error:
            raise ShardError(f"{path}: {error_line(error)}. Its rows are needed: {_HELP}", "bad_table") from error
        if "url" not in table.column_names:
            raise ShardError(f"{path}: no column url, so it holds no rows of shard {shard_id}", "bad_table")
        return table

    @cached_property
    def _row_digits(self) -> int:
        """Digits of a row's number in a key, by any key of the folder."""
        for shard_id, _ in self._schemas():
            for key in self._parquet(shard_id).column("key").to_pylist()[:1]:
                return max(1, len(str(key)) - len(shard_id))
        return len(key_of("", 0, self._rows_per_shard))

    def _schemas(self) -> list[tuple[str, Any]]:
        """The first shard whose table can be read, with the schema of this."""
        from pyarrow.parquet import read_schema

        for shard_id in self._ids:
            try:
                return [(shard_id, read_schema(self.folder / f"{shard_id}.parquet"))]
            except Exception:  # noqa: BLE001, S112 - a torn table; its own shard tells of it
                continue
        return []

    def _image_column(self) -> str:
        for _, schema in self._schemas():
            return next((name for name in ("jpg", "png", "webp") if name in schema.names), "")
        return ""

    def resized(self) -> list[str]:
        """A line where the folder's images were resized, so that new ones can be made alike."""
        for shard_id, schema in self._schemas():
            names = ("status", "width", "height", "original_width", "original_height")
            if not set(names) <= set(schema.names):
                continue
            rows = self._parquet(shard_id).select(names).to_pylist()
            sizes = Counter((r["width"], r["height"]) for r in rows if r["status"] == SUCCESS and r["width"])
            if any(r["width"] != r["original_width"] or r["height"] != r["original_height"] for r in rows):
                width, height = max(sizes, key=lambda size: (sizes[size], size))
                return [
                    f"the images of {self.folder} were resized, for instance to {width} × {height} pixels: for images "
                    "like these, give the --image_size, --resize_mode and --encode_quality that it was made with"
                ]
        return []


@dataclass(frozen=True, slots=True)
class _StoredTable(StoredFiles):
    """A shard that img2dataset has stored with ``--output_format parquet``: a column of its table holds the images.

    Attributes:
        column: Its name, which is the images' suffix.
    """

    column: str = ""

    def samples(self) -> Iterator[Sample]:
        """The rows with an image, as img2dataset would have stored them in a tar."""
        import json

        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(self.tar) as file:
                for batch in file.iter_batches(_ROWS_AT_ONCE):
                    for row in batch.to_pylist():
                        image = row.pop(self.column)
                        if not isinstance(image, bytes) or not isinstance(row.get("key"), str):
                            continue
                        members = {self.column: image, "json": json.dumps(row, indent=4, default=str).encode()}
                        if row.get("caption") is not None:
                            members["txt"] = str(row["caption"]).encode("utf-8", "replace")
                        yield Sample(row["key"], members, {}, tuple(members))
        except (OSError, pa.ArrowException):
            return  # the samples behind are not there, and are asked for again


class AdoptedShard(PreviousShard):
    """What img2dataset has stored of a shard, in the order in which its downloads came."""

    def __init__(self, stored: StoredFiles, rows: Sequence[Mapping[str, Any]]) -> None:
        outcomes: dict[str, RowOutcome] = {}
        super().__init__(stored, outcomes, decode=True, in_order=False)
        for row in rows:
            self._learn(row)

    def _learn(self, row: Mapping[str, Any]) -> None:
        try:
            outcome = outcome_of(row)
        except TypeError:
            return  # without an outcome its row is asked for
        key, url = row.get("key"), row.get("url")
        if isinstance(key, str) and isinstance(url, str):
            self.outcomes[key], self.urls[key] = outcome, url

    def _outcome_of(self, sample: Sample) -> RowOutcome | None:
        if sample.key not in self.outcomes and "json" in sample.members:
            try:
                row = parse_json_object(sample.members["json"])
            except SampleError:
                return None
            if row.get("key") == sample.key:
                self._learn(row)
        return self.outcomes.get(sample.key)


def _check_samples(folder: Path, names: Sequence[str]) -> None:
    """Raise UsageError where the folders that seem to hold a shard's samples hold shards themselves."""
    if names and any(name.endswith((".tar", ".parquet")) for name in names_in(folder / names[0])):
        raise UsageError(
            f"--adopt {folder}: no shards are in it, but in the folders below it: give one of them, such as "
            f"{folder / names[0]}"
        )


def _is_part(name: str) -> bool:
    """Whether a file is one of a sample that img2dataset has stored as loose files."""
    key, dot, suffix = name.partition(".")
    return bool(dot and _KEY.fullmatch(key) and suffix in {*IMAGE_SUFFIXES, "txt", "json"} and clean_text(name) == name)


# ---- its command line


_WITHOUT_EFFECT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "distributor": "--workers starts several processes on this machine, and any number of machines share the work",
        "subjob_size": "the shards are shared by claims and not by jobs",
        "enable_wandb": "nothing is sent anywhere; the receipts hold the counts and times",
        "wandb_project": "nothing is sent anywhere; the receipts hold the counts and times",
        "max_shard_retry": "start the same command again with --retry_failed",
    }
)


@dataclass(frozen=True, kw_only=True)
class Img2datasetOptions(RunOptions):
    """Options of img2dataset that are taken so that its command lines run as they are."""

    help_group: ClassVar[str] = "img2dataset's"

    disable_all_reencoding: bool = False
    """The same as --encode keep --image_check header; --image_size and --resize_mode then have no effect."""
    incremental_mode: Literal["incremental", "overwrite", "extend"] = "incremental"
    """overwrite: the same as --rerun.  incremental: what every run does.  extend: refused."""
    distributor: str | None = None
    """Accepted and without effect: use --workers, and several machines."""
    subjob_size: int | None = None
    """Accepted and without effect."""
    enable_wandb: bool = False
    """Accepted and without effect: nothing is sent anywhere."""
    wandb_project: str | None = None
    """Accepted and without effect."""
    max_shard_retry: int | None = None
    """Accepted and without effect: use --retry_failed."""

    def check(self) -> None:
        super().check()
        if self.incremental_mode == "extend":
            raise UsageError("--incremental_mode extend: name all tables with one --input, or use another --output")

    @property
    def without_effect(self) -> list[str]:
        """A line for each option that was given and has no effect."""
        given = (name for name in _WITHOUT_EFFECT if getattr(self, name) not in (None, False))
        return [f"--{name} has no effect here: {_WITHOUT_EFFECT[name]}" for name in given]


def listed(text: str) -> list[str]:
    """The items of a list: ``a,b``, or as img2dataset has it, ``["a","b"]`` and ``[a,b]``; ``[]`` has none."""
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        found = None
    if isinstance(found, list) and all(isinstance(item, str) for item in found):
        return found
    items = text.strip().removeprefix("[").removesuffix("]").split(",")
    return [item for item in map(unwrapped, items) if item]


def named_hash(text: str | None) -> tuple[str, str] | None:
    """(hash, column) of ``sha256``, ``md5=column`` or img2dataset's ``["column","md5"]``."""
    if not text:
        return None
    if text.lstrip()[:1] in "[(" and len(both := listed(text)) == 2:
        return both[1], both[0]
    name, _, column = text.partition("=")
    return name, column or name
