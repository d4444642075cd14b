"""Captions that another tool has made: finished outputs of datacomp-caption and ContraStyles, taken as done work.

Their rows may be hundreds of millions, and a shard needs those of its own samples only.  So all rows are written once
into an index, a SQLite file in the output folder, which every worker reads.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import xxhash

from curation.captioned.rows import MOST_CHARACTERS, MOST_LINE, parse_row
from curation.errors import InfrastructureError, ShardError, UsageError
from curation.jsonio import clean_text, dump_json, parse_json_object
from curation.storage.files import glob_paths, make_folder

FOLDER: Final = "_adopted"
_SUFFIXES: Final = (".jsonl", ".parquet")
_CAPTIONS: Final = ("vlm_caption", "caption")  # ContraStyles' and datacomp-caption's
_WANTED: Final = "a vlm_caption, or a caption beside an original_caption, and a key, uid or url"
_MORE: Final = ("original_caption", "key", "tar_file", "uid", "url", "model", "revision", "sha256", "image_sha256")
_BATCH: Final = 20_000
_LAYOUT: Final = 2  # of the index: one of another layout is made again
COLUMN_PREFIX: Final = "caption_"  # of the columns of several captions of an image; the rest is the caption's name
_MOST_NAMES: Final = 64  # captions of one image
_IDENTITIES: Final = ("uid", "place", "key", "url")


@dataclass(frozen=True, slots=True)
class AdoptedCaption:
    """A caption of another tool.

    Attributes:
        text: The caption.
        model: What made it, as far as its row says; the file's name otherwise.
        revision: Likewise.
        named: Further captions of the image by name, where the row has several (columns ``caption_<name>``).
        sha256, image_sha256: Of the picture, where the row has them (``Captioned``).
    """

    text: str
    model: str
    revision: str
    named: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None
    image_sha256: str | None = None

    def of(self, name: str, *, first: bool) -> str | None:
        """The caption of a name; None where there is none.

        Args:
            name: "" for the only caption of an image.
            first: It is the first of several, for which the only caption of another tool stands.
        """
        if not name or (first and not self.named):
            return self.text
        return self.named.get(name)


class AdoptedCaptions:
    """Captions by the identity of their sample.

    Args:
        sources: Files (``.jsonl``, ``.parquet``), folders of them, or globs.
        output: The output folder of the stage.
        flag: The option that names the sources, for messages.

    Attributes:
        files: The files, sorted.
        digest: Of their names, sizes and times.

    Raises:
        UsageError: A source has no such files.
    """

    def __init__(self, sources: Sequence[str], output: Path, flag: str = "--adopt") -> None:
        self._flag = flag
        self.files = sorted({path for source in sources for path in _files_of(source, flag)})
        marks = [[path.name, (there := path.stat()).st_size, there.st_mtime_ns] for path in self.files]
        self.digest = xxhash.xxh3_128_hexdigest(dump_json(marks))
        self._path = output / FOLDER / f"{self.digest}.{_LAYOUT}.sqlite"

    def prepare(self) -> None:
        """Write the index, where no earlier run or other process has done so.

        Raises:
            UsageError: There is no caption in the files.
            InfrastructureError: A file cannot be read.
        """
        if self._path.exists():
            return
        make_folder(self._path.parent)
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        part.unlink(missing_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(part)) as index:
                self._write(index)
            os.replace(part, self._path)  # several processes may come here: their files are alike
        except sqlite3.Error as error:
            raise InfrastructureError(f"{part}: the index of {self._flag} cannot be written: {error}") from error
        finally:
            part.unlink(missing_ok=True)

    def _write(self, index: sqlite3.Connection) -> None:
        index.executescript(
            "pragma journal_mode=off; pragma synchronous=off; pragma cache_size=-65536;"
            "create table captions (uid text, place text, key text, url text, caption text, model text, revision text,"
            "                       sha256 text, image_sha256 text);"
            "create table named (caption integer primary key, captions text); create table names (name text);"
        )
        count, names = 0, set[str]()
        for path in self.files:
            rows = (row for row in _rows_of(path, self._flag) if row is not None)
            while batch := list(islice(rows, _BATCH)):
                index.executemany("insert into captions values (?, ?, ?, ?, ?, ?, ?, ?, ?)", [row for row, _ in batch])
                named = [(count + n, captions) for n, (_, captions) in enumerate(batch, 1) if captions]
                index.executemany("insert into named values (?, ?)", [(n, dump_json(one).decode()) for n, one in named])
                names.update(*(captions for _, captions in named))
                count += len(batch)
        if index.execute("select 1 from captions limit 1").fetchone() is None:
            raise UsageError(f"{self._flag} {self.files[0]}: no row has {_WANTED}")
        for name in _IDENTITIES:
            index.execute(f"create index by_{name} on captions ({name}) where {name} is not null")
        index.executemany("insert into names values (?)", [(name,) for name in sorted(names)])
        index.commit()

    def _open(self) -> sqlite3.Connection:
        """Read-only, and without locks, which shared filesystems do not always have."""
        place = quote(str(self._path.absolute()))
        try:
            return sqlite3.connect(f"file:{place}?mode=ro&immutable=1", uri=True, check_same_thread=False)
        except sqlite3.Error as error:
            raise InfrastructureError(f"{self._path}: the index of {self._flag} cannot be read: {error}") from error

    def names(self) -> set[str]:
        """The names of further captions, in any row."""
        with contextlib.closing(self._open()) as index:
            return {name for (name,) in index.execute("select name from names")}

    def of_shard(self, shard_id: str) -> ShardCaptions:
        """Those for the samples of a shard; close it after use."""
        return ShardCaptions(self._open(), shard_id)


class ShardCaptions:
    """What ``AdoptedCaptions`` has for the samples of one shard."""

    def __init__(self, index: sqlite3.Connection, shard_id: str) -> None:
        self._index, self._shard_id = index, shard_id

    def close(self) -> None:
        self._index.close()

    def find(self, key: str, metadata: Mapping[str, Any]) -> AdoptedCaption | None:
        """The caption of a sample, by its uid, its place (tar and key), its key or its URL, in this order.

        A row that says otherwise than the sample of any of these is another sample's.

        Args:
            key: The sample's key.
            metadata: Its json.
        """
        told = {name: _identity(metadata.get(name)) for name in ("uid", "url")}
        known = _identity(key) or ""
        mine = {"uid": told["uid"], "place": _place(f"{self._shard_id}.tar", known), "key": known, "url": told["url"]}
        for name in _IDENTITIES:
            if mine[name] is None:
                continue
            query = f"select rowid, * from captions where {name} = ? limit 8"  # noqa: S608
            for row, uid, place, _, url, caption, model, revision, *more in self._index.execute(query, (mine[name],)):
                theirs = {"uid": uid, "url": url} | ({"place": place} if name != "uid" else {})
                if all(mine[n] is None or value is None or mine[n] == value for n, value in theirs.items()):
                    return AdoptedCaption(caption, model, revision, self._named(row), *more)
        return None

    def _named(self, row: int) -> dict[str, str]:
        found = self._index.execute("select captions from named where caption = ?", (row,)).fetchone()
        return dict(parse_json_object(found[0].encode())) if found is not None else {}


def _files_of(source: str, flag: str) -> list[Path]:
    """The files of one source.  A folder may have them in folders, as a repository of the hub has in ``data/``."""
    path = Path(source)
    if path.is_dir():
        found = [file for suffix in _SUFFIXES for file in path.rglob(f"*{suffix}")]
        found = [file for file in found if not any(part[0] in "._" for part in file.relative_to(path).parts)]
        merged = [file for file in found if file.parent == path and file.stem in ("all_captions", "captions")]
        found = merged[:1] or found  # the parts beside it have the same rows
    else:
        found = [Path(name) for name in ([source] if path.exists() else glob_paths(source, recursive=True))]
        found = [file for file in found if file.suffix in _SUFFIXES]
    found = [file for file in found if file.suffix != ".parquet" or _has_captions(file, flag)]
    if not found:
        raise UsageError(
            f"{flag} {source}: no captions there: files that end in {' or '.join(_SUFFIXES)} are needed, whose rows "
            f"have {_WANTED}"
        )
    return found


def _has_captions(path: Path, flag: str) -> bool:
    """Whether a table has new captions: img2dataset's beside it have a column caption with the original ones."""
    from pyarrow.parquet import read_schema

    try:
        names = set(read_schema(path).names)
    except Exception as error:
        raise InfrastructureError(f"{flag} {path}: cannot be read as parquet: {str(error)[:200]}") from error
    return "vlm_caption" in names or {"caption", "original_caption"} <= names


def _rows_of(path: Path, flag: str) -> Iterator[tuple[tuple[str | None, ...], dict[str, str]] | None]:
    """Yields what the index holds of each row, and its captions by name, where it has several; None for a row without a
    caption or an identity."""
    rows = _jsonl_rows(path, flag) if path.suffix == ".jsonl" else _parquet_rows(path, flag)
    for row in rows:
        names = _CAPTIONS if "original_caption" in row else _CAPTIONS[:1]
        caption = next((row[name] for name in names if isinstance(row.get(name), str)), None)
        text = clean_text(caption[:MOST_CHARACTERS]) if caption is not None else ""
        key, tar = _identity(row.get("key")), _identity(row.get("tar_file"))
        uid, url = _identity(row.get("uid")), _identity(row.get("url"))
        place = _place(tar, key) if tar is not None and key is not None else None
        if not text or (uid is None and url is None and key is None):
            yield None
            continue
        model = _identity(row.get("model")) or f"adopted from {path.name}"
        # A key alone names a sample only where no tar does.
        alone = key if tar is None else None
        told = [_identity(row.get(name)) for name in ("revision", "sha256", "image_sha256")]
        yield (uid, place, alone, url, text, clean_text(model), told[0] or "", *told[1:]), _named_of(row)


def _named_of(row: Mapping[str, Any]) -> dict[str, str]:
    found = {
        told: text
        for name, value in row.items()
        if name.startswith(COLUMN_PREFIX) and (told := _identity(name[len(COLUMN_PREFIX) :])) is not None
        if isinstance(value, str) and (text := clean_text(value[:MOST_CHARACTERS]))
    }
    return found if len(found) <= _MOST_NAMES else {}


def _jsonl_rows(path: Path, flag: str) -> Iterator[Mapping[str, Any]]:
    """The last line of a file may be cut off, because its writer was killed; it is left out."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MOST_LINE + 1), b""), 1):
            try:
                yield parse_row(line, f"{flag} {path}, line {number}")
            except ShardError as error:
                if (line.endswith(b"\n") or len(line) > MOST_LINE) and line.strip():
                    raise InfrastructureError(str(error)) from None


def _parquet_rows(path: Path, flag: str) -> Iterator[Mapping[str, Any]]:
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in (*_CAPTIONS, *_MORE) if name in names]
            wanted += [name for name in names if name.startswith(COLUMN_PREFIX)][:_MOST_NAMES]
            for batch in file.iter_batches(4096, columns=wanted):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise InfrastructureError(f"{flag} {path}: cannot be read as parquet: {str(error)[:200]}") from error


def _identity(value: object) -> str | None:
    """A text that says which sample it is, or what a name is; None for none.  What is no UTF-8 is escaped, because
    SQLite takes nothing else."""
    if not isinstance(value, str) or not value:
        return None
    return value[:MOST_CHARACTERS].encode("utf-8", "backslashreplace").decode()


def _place(tar: str, key: str) -> str:
    return f"{os.path.basename(tar)}/{key}"
